"""Is an explanation the same in a batch, in another number format, on another device?

P17 and lists C, E, G and K of docs/properties.md, in MONAI's networks, where test_many.py,
test_acceptance.py and test_notices.py have small ones.
"""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from tests.engine import nets
from tests.secant import architectures as small

LAYERS = {"resnet18": "layer2", "ViT": "patch_embedding.patch_embeddings"}


def far(made: mg.Explanation, wanted: mg.Explanation) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(made.evidence - wanted.evidence).max() / np.abs(wanted.evidence).max())


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
@pytest.mark.parametrize("name", ["ViT", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_scan_in_a_batch_gets_its_own_map(name: str, method: str) -> None:
    """P17, list D. In float64: in float32 torch itself takes other kernels for other batches."""
    net, scans = small.made(name).double(), [nets.volume(32, seed=seed) for seed in (0, 1, 2)]
    settings: dict[str, Any] = {"layer": LAYERS[name], "method": method}
    made = mg.explain_many(scans, net, target=[0, 1], batch=3, **settings)
    for n, one in enumerate(made):
        assert far(one, mg.explain(scans[n // 2], net, target=n % 2, **settings)) <= 5e-7
    assert far(made[0], made[2]) > 0.01, "other scans have other maps"


@pytest.mark.parametrize(
    ("name", "method"),
    [("ViT", "secant"), ("ViT", "gradcam"), ("ViT", "hirescam"), ("resnet18", "secant")],
)
def test_bfloat16_tells_the_same(name: str, method: str) -> None:
    """P17: r > 0.99. This resnet18's plain gradient in bfloat16 has r = 0.94 by torch alone."""
    net = small.made(name).float()
    settings: dict[str, Any] = {"target": 1, "layer": LAYERS[name], "method": method}
    wanted = mg.explain(nets.volume(32), net, **settings)
    made = mg.explain(nets.volume(32), copy.deepcopy(net).bfloat16(), **settings)
    assert np.corrcoef(made.evidence.ravel(), wanted.evidence.ravel())[0, 1] > 0.99
    assert made.evidence.dtype == np.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("method", ["secant", "gradcam", "hirescam"])
def test_another_device_gives_the_same_map(method: str) -> None:
    """P17, in float64."""
    net = small.made("resnet18").double()
    settings: dict[str, Any] = {"target": 1, "layer": "layer2", "method": method}
    here, there = (
        mg.explain(nets.volume(32), net, device=device, **settings) for device in ("cpu", "cuda")
    )
    assert far(there, here) <= 5e-7
    assert there.provenance.device.startswith("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["secant", "gradcam"])
def test_of_160_calls_in_four_threads_none_is_wrong(method: str) -> None:
    """List G."""
    net = nets.made(nets.gated).train()

    def one(number: int) -> mg.Explanation:
        layer = "first" if number % 3 else "rest.0"
        scan = nets.volume(12, seed=number % 5)
        return mg.explain(scan, net, target=number % 2, layer=layer, method=method)

    wanted, interval = [one(number) for number in range(30)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(one, [n % 30 for n in range(160)]))
    finally:
        sys.setswitchinterval(interval)
    assert all(np.array_equal(e.evidence, wanted[n % 30].evidence) for n, e in enumerate(made))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_occlusion_of_four_channels_and_one_logit_is_not_constant(link: str) -> None:
    """List K, from the scan to the map: a softmax over one logit would be 1 everywhere."""
    torch.manual_seed(0)
    net = nn.Sequential(nets.conv(4, 4, 2), nn.ReLU(), nets.Pooled(4, 1)).eval()
    scan = nets.volume(16, channels=4)
    made = mg.explain(scan, net, link=link, method="occlusion", reference="zero")
    assert made.evidence.std() > 0.02 * np.abs(made.evidence).max() > 1e-6
    with torch.no_grad():
        score = float(net(nets.batch(np.asarray(scan.array))))
    assert made.score == pytest.approx(score, rel=1e-5)
