"""Do maps of several depths, blended by their causal slopes, still add up?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.explanation import LayerTrial
from med_gradcam.fold import blended
from med_gradcam.methods import Evidence
from tests.engine import nets
from tests.engine.test_engine import _deep


def _evidence(*totals: float) -> dict[str, Evidence]:
    return {f"l{n}": Evidence(torch.full((2, 2, 2), t / 8)) for n, t in enumerate(totals)}


def test_the_weights_sum_to_one_and_the_slope_nearest_one_weighs_most() -> None:
    trials = [LayerTrial("l0", 0.5, None), LayerTrial("l1", 0.9, None), LayerTrial("l2", 2.0, None)]
    found = blended(_evidence(1.0, 1.0, 1.0), trials)
    weights = [float(one.values.sum()) for one in found.values()]
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    assert min(weights) >= 0
    assert weights[1] / weights[0] == pytest.approx((0.5 / 0.1) ** 2, rel=1e-4)
    assert weights[1] > weights[0] > weights[2]


def test_without_any_slope_all_weigh_the_same() -> None:
    trials = [LayerTrial("l0", None, None), LayerTrial("l1", None, None)]
    found = blended(_evidence(1.0, 1.0), trials)
    assert [float(e.values.sum()) for e in found.values()] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("method", ["secant", "integrated"])
def test_a_fused_map_is_complete(method: str) -> None:
    fused = mg.explain(
        nets.volume(24),
        _deep(),
        target=0,
        layer="fused",
        method=method,
        reference="value:0.2",
        link="none",
        precise=True,
    )
    assert fused.layer.startswith("fused: ")
    assert fused.status == "complete"
    assert len(fused.parts) > 1
    change = fused.score - (fused.reference_score or 0.0)
    allowed = max(0.01 * abs(change), 1e-5)  # the bound of --precise, and single precision
    assert fused.residual == pytest.approx(0.0, abs=allowed)
    assert sum(part.net for part in fused.parts) == pytest.approx(change, abs=allowed)
    assert np.isfinite(fused.evidence).all()
