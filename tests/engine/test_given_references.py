"""Are expected gradients over given scans the mean of integrated gradients over each?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.errors import UsageError
from tests.engine import nets
from tests.tiny import affine_of, volume

SCAN = nets.as_volume(3 * nets.scan())


def _net(norm: bool = False) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True) if norm else nn.SiLU(),
        nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(32, 8), nn.SiLU(), nn.Linear(8, 2),
    ).eval()  # fmt: skip


def _set(count: int) -> list[mg.Volume]:
    return [nets.as_volume(nets.scan(seed=20 + n) * (n + 1) - n) for n in range(count)]


def _explained(net: nn.Module, method: str, reference: Any) -> mg.Explanation:
    return mg.explain(SCAN, net, target=1, method=method, reference=reference, precise=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_the_map_is_the_mean_over_the_set(count: int, norm: bool) -> None:
    net, given = _net(norm), _set(count)
    made = _explained(net, "expected_gradients", given)
    each = [_explained(net, "integrated_gradients", one) for one in given]
    mean = np.mean([e.evidence.astype(np.float64) for e in each], axis=0)
    assert np.abs(made.evidence - mean).max() <= 1e-5 * np.abs(mean).max()
    scores = [e.reference_score for e in each]
    assert None not in scores
    wanted = float(np.mean([s for s in scores if s is not None]))
    assert made.reference_score == pytest.approx(wanted, abs=1e-5)
    with torch.no_grad():
        inputs = [torch.tensor(v.array[None], dtype=torch.float32) for v in given]
        true = np.mean([float(made.target(net(x))[0]) for x in inputs])
    assert made.reference_score == pytest.approx(float(true), abs=1e-5)
    assert made.residual is not None
    change = made.score - float(true)
    assert made.sum_for - made.sum_against == pytest.approx(change, rel=0.01, abs=1e-4)
    assert made.residual == pytest.approx(
        np.mean([e.residual for e in each if e.residual is not None]), abs=1e-5
    )
    assert made.status == "complete"
    if count > 1:
        assert np.ptp([s for s in scores if s is not None]) > 0.01 * abs(change)


def test_the_set_is_told_and_its_order_does_not_matter() -> None:
    net, given = _net(), _set(3)
    made = _explained(net, "expected_gradients", given)
    assert (made.reference.kind, made.reference.value) == ("file", None)
    assert made.reference.words == "the mean of 3 given reference scans"
    assert made.provenance.parameters["reference"] == "file"
    turned = _explained(net, "expected_gradients", tuple(given[::-1]))
    assert np.abs(made.evidence - turned.evidence).max() <= 1e-5 * np.abs(made.evidence).max()
    one = _explained(net, "expected_gradients", given[0])
    assert one.reference.words.endswith("textures of the scan's noise, their mean")
    rows = mg.explain_many([SCAN], net, target=1, method="expected_gradients", reference=given)
    loose = mg.explain(SCAN, net, target=1, method="expected_gradients", reference=given)
    assert np.array_equal(rows[0].evidence, loose.evidence)


@pytest.mark.parametrize(
    ("method", "reference", "says"),
    [
        ("integrated_gradients", _set(2), "one reference for the method 'integrated_gradients', "),
        ("secant", _set(2), "got a list of 2; only 'expected_gradients' takes the mean"),
        ("expected_gradients", [], "expected a list of Volumes as references, got none"),
        ("expected_gradients", [*_set(1), "zero"], "as references, got Volume, str"),
        ("expected_gradients", 3, r"a Volume \(or several\), got int"),
        (
            "expected_gradients",
            [*_set(1), volume(np.zeros((4, 4, 4)), modality=None)],
            "expected a reference scan of the same size",
        ),
        (
            "expected_gradients",
            [*_set(1), volume(nets.scan(), affine_of("RAS", origin=(5, 0, 0)), None)],
            "same place as the scan, got one that lies 5.0 mm off",
        ),
    ],
)
def test_refusals(method: str, reference: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        mg.explain(SCAN, _net(), target=1, method=method, reference=reference)
