"""The headline MR: a regression network without padding, where naive placement is 45 mm off."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import med_gradcam as mg

pytestmark = pytest.mark.real

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import real_mr  # noqa: E402

CENTRES = {"block1": (5, 4), "block2": (13, 8), "block3": (25, 16), "block4": (49, 32)}


@pytest.fixture(scope="module")
def case(real_data: Path) -> tuple[mg.Volume, mg.Model]:
    volume = mg.read(real_data / "mr_brain_t1" / "t1_crop_mni.nii.gz")
    return volume, mg.load_model(real_data / "nets" / "ncomms_cog_fold0")


@pytest.mark.parametrize("block", CENTRES)
def test_cells_lie_where_the_arithmetic_says(case: Any, block: str) -> None:
    volume, model = case
    e = mg.explain(volume, model, layer=block, method="hirescam")
    start, jump = CENTRES[block]
    assert e.score == pytest.approx(0.227, abs=0.005)
    assert e.probability is None  # a score, not a class
    assert e.unit == "score"
    assert e.cells.how == "exact"
    assert list(e.cells.start) == [start] * 3
    assert list(e.cells.jump) == [jump] * 3
    first = volume.grid.world_ras((start, start, start))
    assert np.abs(e.grid.world_ras((0, 0, 0)) - first).max() < 1e-6


@pytest.mark.parametrize("block", ["block2", "block3"])
def test_exact_placement_puts_the_evidence_into_the_head(case: Any, block: str) -> None:
    volume, model = case
    e = mg.explain(volume, model, layer=block, method="hirescam")
    inside = real_mr.head(volume)
    naive = real_mr.share_in_head(e, real_mr.naive(e), inside)
    exact = real_mr.share_in_head(e, e.grid, inside)
    assert exact > naive + 0.05
