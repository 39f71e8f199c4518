"""Is what explain() computes behind a layer what the whole network does there?

P4, P21 and P22 and list A of docs/properties.md, in MONAI's networks.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.capture import Capture
from med_gradcam.geometry import crop
from med_gradcam.methods import Bound, integrated
from tests.engine import architectures, nets
from tests.oracle import papers
from tests.secant import architectures as small
from tests.secant.pairs import shared

METHODS = ("secant", "integrated", "gradcam", "hirescam")


def margin(output: Any) -> torch.Tensor:
    """The second class over the first, the mean over places where there are any."""
    y: torch.Tensor = output[0] if isinstance(output, (list, tuple)) else output
    return (y[:, 1] - y[:, 0]).reshape(len(y), -1).mean(1)


# ------------------------------------------------------------------- P4: more nodes, less missing


class Transformer(nn.Module):
    """Patches, attention and layer norms, then the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, 8, 4, 4), nn.GELU())
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.first(x).flatten(2).transpose(1, 2)
        out: torch.Tensor = self.head(self.norm(self.block(tokens)).mean(1))
        return out


TAILS = {**nets.TAILS, "layer norm": Transformer}


def _missed(capture: Capture, nodes: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """What the map of the integral misses with that many nodes on one stretch, in log-odds."""
    at, weight = np.polynomial.legendre.leggauss(nodes)
    for name, value in (("NODES", nodes), ("_AT", at), ("_WEIGHT", weight)):
        monkeypatch.setattr(integrated, name, value)
    found = integrated.evidence(capture, Bound(float("inf"), 0.0))
    assert found.nodes == nodes
    assert capture.reference_score is not None
    return abs(capture.score - capture.reference_score - float(found.values.sum()))


@pytest.mark.slow
def test_the_integral_misses_less_with_more_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: on the median over tails and scans, and at 32 nodes by 0.01 log-odds at most."""
    missed: dict[int, list[float]] = {nodes: [] for nodes in (1, 2, 4, 8, 16, 32)}
    for tail, seed in itertools.product(TAILS, range(8)):
        if tail in ("mean + linear", "flatten + linear"):
            continue  # exact with one node
        net = nets.made(TAILS[tail], dtype=torch.float64)
        x, other = (nets.batch(nets.scan(seed=s), torch.float64) for s in (seed, 50 + seed))
        for nodes, found in missed.items():
            capture = nets.captured(net, "first", 2 * x, nets.score_of(1, "softmax"), other)
            found.append(_missed(capture, nodes, monkeypatch))
    medians = [float(np.median(found)) for found in missed.values()]
    assert all(b < a for a, b in itertools.pairwise(medians)), medians
    assert max(missed[32]) <= 0.01
    assert max(missed[1]) > 0.1, "or this tests nothing"


def _loud(tail: str) -> nn.Module:
    """With weights that move the score by more than rounding."""
    net = nets.made(TAILS[tail])
    for module in net.get_submodule("rest" if hasattr(net, "rest") else "head").modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(4.0)
    return net


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("method", ["secant", "integrated"])
def test_the_evidence_is_the_difference_from_the_reference(method: str, tail: str) -> None:
    """P4, as explain() hands it out."""
    made = mg.explain(
        nets.volume(), _loud(tail), target=1, layer="first", method=method,
        reference=nets.volume(seed=5), precise=True,
    )  # fmt: skip
    assert made.reference_score is not None
    change = made.score - made.reference_score
    total = float(made.evidence.sum(dtype=np.float64))
    assert abs(change) > 1e-3
    most = 1e-4 * abs(change) if method == "secant" else min(0.01, 0.01 * abs(change) + 1e-6)
    assert (made.method, made.status) == (method, "complete")
    assert abs(total - change) <= most


# ------------------------------------------------------------------- A, P22: the plain gradient

LAYERS = [
    ("resnet18", "layer3"),
    ("resnet50", "layer3"),
    ("SEResNet50", "layer3"),
    ("DenseNet121", "features.denseblock3"),
    ("EfficientNet-b0", "_blocks.4"),
    ("BasicUNet", "down_3"),
    ("UNet", "model.1.submodule.0"),
    ("SegResNet", "down_layers.2"),
    ("DynUNet", "bottleneck"),
    ("ViT", "patch_embedding.patch_embeddings"),
    ("UNETR", "encoder3"),
    ("SwinUNETR", "encoder3"),
]
SLOW = ("SwinUNETR", "UNETR", "BasicUNet", "SegResNet", "resnet50", "SEResNet50", "DenseNet121")


def _marked(rows: list[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(*row, id=row[0], marks=[pytest.mark.slow] * (row[0] in SLOW)) for row in rows
    ]


@pytest.mark.parametrize(("name", "layer"), _marked(LAYERS))
def test_the_tail_s_gradient_is_the_whole_network_s(name: str, layer: str) -> None:
    """P22: to 1e-6 of the largest, in float64 to 1e-10."""
    size = small.ARCHITECTURES[name].size
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        net = small.made(name).to(dtype)
        x, other = (nets.batch(nets.scan(size, seed), dtype) for seed in (0, 5))
        activation, gradient = papers.full_gradient(net, layer, x, margin)
        capture = nets.captured(net, layer, x, margin, other)
        for ours, theirs in ((capture.activation, activation), (capture.gradient(), gradient)):
            assert float((ours - theirs).abs().max()) <= near * float(theirs.abs().max())


SHAPES = [(64, 64, 64), (32, 64, 96)]
MODELS = {
    "DenseNet121": "class_layers.relu",
    "resnet18": "layer4",
    "UNet": "model.1.submodule.1.submodule.1.submodule",
    "SwinUNETR": "swinViT.layers3.0",
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=["64^3", "32x64x96"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_equal_the_plain_gradient_s(name: str, shape: tuple[int, int, int]) -> None:
    """List A: the error on the layer's own cells is 1e-6 of the peak at most."""
    net, layer = architectures.made(name), MODELS[name]
    array = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    activation, gradient = papers.full_gradient(net, layer, nets.batch(array), margin)
    weights = gradient.double().mean(dim=(1, 2, 3), keepdim=True)
    for method, product in (
        ("gradcam", weights * activation),
        ("hirescam", gradient.double() * activation),
    ):
        wanted = product.sum(0).numpy()
        made = mg.explain(nets.as_volume(array), net, target=margin, layer=layer, method=method)
        assert np.abs(made.evidence - wanted).max() <= 1e-6 * np.abs(wanted).max(), method


# ------------------------------------------------------------------- P21: windows


def _segmenter(*, linear: bool) -> nn.Module:
    torch.manual_seed(0)
    act: nn.Module = nn.Identity() if linear else nn.SiLU()
    return nn.Sequential(nets.conv(1, 4), nn.SiLU(), nets.conv(4, 4), act, nets.conv(4, 1)).double()


def _windows(size: int, width: int, step: int) -> list[tuple[int, int, int]]:
    starts = range(0, size - width + 1, step)
    return [(i, j, k) for i in starts for j in starts for k in starts]


def _bump(width: int) -> npt.NDArray[np.float64]:
    line = np.exp(-(((np.arange(width) - (width - 1) / 2) / (width / 4)) ** 2))
    made: npt.NDArray[np.float64] = line[:, None, None] * line[:, None] * line
    return made


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("width", "step"), [(12, 4), (8, 8), (20, 1)])
def test_summed_maps_of_windows_are_the_blended_score_s(
    width: int, step: int, linear: bool
) -> None:
    """P21: each window is asked for its share of the blended score, and the maps are added."""
    size, net = 20 if step != 8 else 16, _segmenter(linear=linear)
    array, blank = nets.scan(size), np.full((1, size, size, size), 0.2, np.float32)
    region = np.random.default_rng(1).random((size,) * 3) > 0.7
    covered, places = np.zeros((size,) * 3), _windows(size, width, step)
    bump = _bump(width)
    for at in places:
        covered[tuple(slice(a, a + width) for a in at)] += bump
    blended = {"scan": 0.0, "blank": 0.0}
    stitched, exact = np.zeros((size,) * 3), 0.0
    scan = nets.as_volume(array)
    for at in places:
        here = tuple(slice(a, a + width) for a in at)
        share = torch.from_numpy(region[here] * bump / covered[here])

        def score(output: Any, share: torch.Tensor = share) -> torch.Tensor:
            total: torch.Tensor = (output[:, 0] * share).sum((1, 2, 3))
            return total

        cut = {
            which: torch.from_numpy(whole[(slice(None), *here)].copy())[None].double()
            for which, whole in (("scan", array), ("blank", blank))
        }
        for which, x in cut.items():
            with torch.no_grad():
                blended[which] += float(score(net(x)))
        found = shared(net, cut["scan"], cut["blank"], ["1"], lambda _, s=score: s)  # type: ignore[misc]
        exact += float(found.evidence("1").sum())
        window = mg.Volume(
            np.ascontiguousarray(array[(slice(None), *here)]), crop(scan.grid, at, (width,) * 3)
        )
        made = mg.explain(
            window, net, target=score, layer="1", method="secant", reference="value:0.2"
        )
        grid = made.grid.world_ras((0, 0, 0))
        assert grid == pytest.approx(scan.grid.world_ras(at))
        stitched[here] += made.evidence.astype(np.float64)
    change = blended["scan"] - blended["blank"]
    assert abs(change) > 1e-3
    assert exact == pytest.approx(change, rel=1e-9)
    assert stitched.sum() == pytest.approx(change, abs=1e-7 * np.abs(stitched).sum())


def test_one_window_as_large_as_the_scan_gives_the_plain_map() -> None:
    """P21: with the weights of the blend cancelled by what covers each voxel."""
    net, scan = _segmenter(linear=False), nets.volume(16)
    region = np.random.default_rng(1).random((16, 16, 16)) > 0.7
    share = torch.from_numpy(region * _bump(16) / _bump(16))

    def blended(output: Any) -> torch.Tensor:
        mean: torch.Tensor = (output[:, 0] * share).sum((1, 2, 3)) / float(region.sum())
        return mean

    settings: dict[str, Any] = {"layer": "1", "method": "secant", "reference": "value:0.2"}
    one = mg.explain(scan, net, target=blended, **settings)
    plain = mg.explain(scan, net, target=(0, region), link="none", **settings)
    assert one.score == pytest.approx(plain.score, rel=1e-9)
    assert np.abs(one.evidence - plain.evidence).max() <= 1.2e-7 * np.abs(plain.evidence).max()
    assert plain.target.region is not None
