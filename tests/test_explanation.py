"""Does an explanation add up, stay what it is, and refuse what cannot be one?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from med_gradcam.calibration import from_case
from med_gradcam.errors import InputError
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry
from med_gradcam.target import Target
from tests.tiny import explained

GRID = Geometry((2, 3, 4), np.diag([8.0, 8.0, 12.0, 1.0]))
IMAGE = Geometry((16, 24, 48), np.eye(4))
EVIDENCE = np.linspace(-1, 2, 24, dtype=np.float32).reshape(2, 3, 4)


def make(**changes: Any) -> Explanation:
    return explained(changes.pop("evidence", EVIDENCE), GRID, IMAGE, **changes)


@given(hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_for_minus_against_is_the_sum(evidence: Any) -> None:
    e = make(evidence=evidence)
    assert e.sum_for - e.sum_against == pytest.approx(
        evidence.sum(dtype=np.float64), abs=1e-9 * float(np.abs(evidence).sum())
    )
    assert e.sum_for >= 0
    assert e.sum_against >= 0
    residual = e.residual
    assert residual is not None
    assert residual == pytest.approx(1.0 - evidence.sum(dtype=np.float64), abs=1e-6)


def test_a_residual_only_where_a_sum_is_promised() -> None:
    assert make(status="no_sum").residual is None
    assert make(reference_score=None).residual is None
    assert make(status="not_converged").residual is not None


def test_millimetres() -> None:
    e = make()
    assert e.cell_mm == pytest.approx((8, 8, 12))
    assert e.receptive_field_mm == pytest.approx((20, 20, 30))
    assert e.smallest_localisable_mm == pytest.approx(24)


def test_probability_and_unit() -> None:
    assert make(score=0.0).probability == pytest.approx(0.5)
    regression = make(target=Target("regression", "age", (0,), "none"))
    assert regression.probability is None
    assert regression.unit == "score"


@pytest.mark.parametrize(
    ("measure", "log_odds", "amount"),
    [
        ("score", "log-odds", "score"),
        ("score per input unit", "log-odds per input unit", "score per input unit"),
        ("relative units", "relative units", "relative units"),
    ],
)
def test_the_evidence_may_have_another_unit_than_the_score(
    measure: Any, log_odds: str, amount: str
) -> None:
    e = make(measure=measure)
    assert (e.unit, e.target.unit) == (log_odds, "log-odds")
    e = make(measure=measure, target=Target("regression", "age", (0,), "none"))
    assert (e.unit, e.target.unit) == (amount, "score")


def test_a_measure_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected a measure of .* got 'log-odds'"):
        make(measure="log-odds")


def test_equal_means_every_field() -> None:
    e = make()
    assert e == make()
    assert hash(e) == hash(make())
    assert e != make(layer="other")
    assert e != make(evidence=EVIDENCE + np.float32(1e-7))
    assert e != make(warnings=("x",))
    assert e.replace(layer="other") == make(layer="other")
    assert e != "explanation"


def test_the_evidence_is_a_copy_and_read_only() -> None:
    evidence = EVIDENCE.copy()
    e = make(evidence=evidence)
    evidence[:] = 0
    assert e.sum_for > 0
    with pytest.raises(ValueError, match="read-only"):
        e.evidence[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evidence": np.zeros((2, 3, 5))}, r"on a grid \(2, 3, 4\), got shape \(2, 3, 5\)"),
        ({"evidence": np.full((2, 3, 4), np.nan)}, "finite evidence, got 24 NaN or infinite"),
        ({"status": "fine"}, "expected a status of .*'complete'.*, got 'fine'"),
        ({"score": float("nan")}, "expected a finite score, got nan"),
        ({"score": float("inf")}, "expected a finite score, got inf"),
        (
            {"calibration": from_case(1.0, "nodule", "integrated", "features.3")},
            "learnt from scans, or None for the case's own, got one learnt from 0 scans",
        ),
        ({"reference_score": float("nan")}, "expected a finite reference_score, got nan"),
    ],
)
def test_no_explanation(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(**changes)


def test_a_map_without_a_sign_has_no_cell_below_zero() -> None:
    assert not make(evidence=np.ones((2, 3, 4)), signed=False).signed
    with pytest.raises(InputError, match="no cell below 0 in a map without a sign, got 24"):
        make(evidence=-np.ones((2, 3, 4)), signed=False)
