"""What does the dock say at each moment? No window needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from med_gradcam.explanation import Explanation
from med_gradcam.progress import Step
from med_gradcam.volume import Volume
from napari_plugin import state

Scan = Callable[..., Volume]
Explain = Callable[..., Explanation]
READY = state.DockState(scan="CT", model="net")


def test_explain_needs_scan_and_model() -> None:
    empty = state.DockState()
    assert not empty.can_explain
    assert empty.missing == "Choose a scan and a model, then explain."
    assert state.with_model(empty, "net").missing == "Choose a scan, then explain."
    assert READY.can_explain
    assert READY.missing == ""
    assert empty.status == empty.missing
    assert state.told(READY).status == "Ready to explain."


def test_a_run_is_busy_until_it_ends_and_its_news_grow_stale() -> None:
    running = state.started(READY, "explaining", "Explaining")
    assert running.busy
    assert not running.can_explain
    assert running.missing == "A run is under way."
    assert running.generation == READY.generation + 1
    ended = state.stopped(running, "Cancelled.")
    assert (ended.busy, ended.status) == (False, "Cancelled.")
    assert ended.generation == running.generation + 1


def test_error_stays_until_the_next_run() -> None:
    bad = state.failed(READY, "It broke.", "trace")
    assert (bad.error, bad.details, bad.status) == ("It broke.", "trace", "")
    again = state.started(bad, "opening", "Opening")
    assert (again.error, again.details) == ("", "")


def test_step_is_shown() -> None:
    seen = state.stepped(READY, Step(2, 5, "integrating"))
    assert (seen.step, seen.status) == (Step(2, 5, "integrating"), "integrating")


def test_new_scan_takes_the_old_result_away(make_scan: Scan) -> None:
    old = replace(READY, rows=(("Finding", "nodule"),), warnings=("w",))
    new = state.with_scan(old, make_scan())
    assert (new.rows, new.warnings) == ((), ())
    assert new.scan == "CT, 41 x 31 x 21 voxels of 2.0 x 2.5 x 3.0 mm"
    assert state.with_scan(new, None).scan == ""


def test_result_table(make_scan: Scan, make_explanation: Explain) -> None:
    shown = state.with_result(READY, make_explanation(make_scan()), "of the model", "R 30 A 20")
    table = dict(shown.rows)
    assert table["Finding"] == "nodule"
    assert table["Model's score"] == "+1.50 log-odds"
    assert table["Probability"] == "0.8176"
    assert table["Relative to"] == "uniform lung: +0.500 log-odds"
    assert table["Raises it (for)"] == "+2.00 log-odds"
    assert table["Lowers it (against)"] == "-1.00 log-odds"
    assert table["Net evidence"] == "+1.00 log-odds"
    assert table["Residual"].startswith("+0.000 (the map adds up")
    assert table["Cells"] == "2.0 x 2.5 x 3.0 mm (R, A, S)"
    assert table["Layer"] == "features.3, integrated"
    assert table["Colour scale"] == "of the model"
    assert shown.warnings == ("A warning of the engine.",)
    assert shown.status == "Strongest evidence at R 30 A 20."


def test_result_without_sum_or_reference(make_scan: Scan, make_explanation: Explain) -> None:
    explanation = make_explanation(make_scan(), status="no_sum", reference_score=None)
    table = dict(state.result_rows(explanation, "scale"))
    assert table["Residual"] == "this method does not promise a sum"
    assert table["Relative to"] == "uniform lung"


def test_nothing_that_stands_out_is_said(make_scan: Scan, make_explanation: Explain) -> None:
    shown = state.with_result(READY, make_explanation(make_scan()), "scale", "")
    assert shown.status == state.NOTHING


@pytest.mark.parametrize(
    ("probability", "words"),
    [
        (None, "none: this score has no probability"),
        (1.0, "above 0.9999"),
        (0.99861, "0.9986"),
        (0.0, "below 0.0001"),
    ],
)
def test_probability_words(probability: float | None, words: str) -> None:
    assert state.probability_words(probability) == words


def test_point_text_is_what_the_engine_reads() -> None:
    assert state.point_text((34.04, -12.0, 88.0)) == "ras:34.0,-12.0,88.0"
    assert state.where_words((34.0, -12.0, 88.0)) == "R 34 P 12 S 88 mm, patient's right"


def test_scores_have_the_score_s_unit(make_scan: Scan, make_explanation: Explain) -> None:
    explanation = make_explanation(make_scan(), measure="relative units", status="no_sum")
    table = dict(state.result_rows(explanation, "scale"))
    assert table["Model's score"] == "+1.50 log-odds"
    assert table["Relative to"] == "uniform lung: +0.500 log-odds"
    assert table["Raises it (for)"] == "+2.00 relative units"


def test_a_map_without_a_sign_raises_and_lowers_nothing(
    make_scan: Scan, make_explanation: Explain
) -> None:
    explanation = make_explanation(make_scan())
    bare = explanation.replace(
        evidence=abs(explanation.evidence), signed=False, measure="relative units", status="no_sum"
    )
    shown = state.with_result(READY, bare, "scale", "R 30 A 20")
    assert shown.status == "The map is strongest at R 30 A 20."
    table = dict(shown.rows)
    assert not {"Raises it (for)", "Lowers it (against)", "Net evidence"} & set(table)
    assert table["Map"].startswith("in relative units, with no sign: it shows where it is strong")
    assert table["Residual"] == "this method does not promise a sum"


def test_without_a_reference_the_map_adds_up_to_the_score(
    make_scan: Scan, make_explanation: Explain
) -> None:
    table = dict(state.result_rows(make_explanation(make_scan(), reference_score=None), "scale"))
    assert table["Residual"] == "the map adds up to the score"
