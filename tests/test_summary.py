"""Are the peaks the strongest cells, at their place, and is a region worth what the map says?"""

from __future__ import annotations

import numpy as np
import pytest

from med_gradcam.explanation import STATUS_WORDS
from med_gradcam.geometry import Geometry, cells
from med_gradcam.maps import draw
from med_gradcam.summary import evidence_within, peaks, status_words
from tests.tiny import affine_of, explained

IMAGE = Geometry((24, 24, 24), affine_of("LPS", (1, 1, 2), (10, 10, -20)))
CELLS = cells(IMAGE, (4, 4, 4), (1.5, 1.5, 1.5), (6, 6, 6))


def test_peaks_of_both_polarities_strongest_first() -> None:
    evidence = np.zeros((6, 6, 6))
    evidence[1, 1, 1], evidence[4, 4, 4], evidence[1, 4, 1] = 2.0, 3.0, -1.5
    evidence[1, 1, 2] = 1.0  # a slope, no peak
    found = peaks(explained(evidence, CELLS, IMAGE))
    assert [(p.polarity, p.evidence) for p in found] == [("for", 3), ("for", 2), ("against", 1.5)]
    top = found[0]
    assert top.ras_mm == pytest.approx(CELLS.world_ras((4, 4, 4)))
    assert top.lps_mm == pytest.approx((-top.ras_mm[0], -top.ras_mm[1], top.ras_mm[2]))
    assert top.per_ml == pytest.approx(3.0 / (64 * 2 / 1000))
    assert (top.words, top.side) == ("L 8 P 8 S 15 mm", "patient's left")


def test_at_most_as_many_as_asked_for() -> None:
    evidence = np.zeros((6, 6, 6))
    evidence[::2, ::2, ::2] = np.arange(27).reshape(3, 3, 3) + 1
    e = explained(evidence, CELLS, IMAGE)
    assert [p.evidence for p in peaks(e, most=2)] == [27, 26]
    assert len(peaks(e)) == 3


def test_no_peaks_without_evidence_or_outside_the_scan() -> None:
    assert peaks(explained(np.zeros((6, 6, 6)), CELLS, IMAGE)) == ()
    beside = cells(IMAGE, (4, 4, 4), (-9, 1.5, 1.5), (2, 2, 2))
    evidence = np.zeros((2, 2, 2))
    evidence[0, 0, 0] = 5
    assert peaks(explained(evidence, beside, IMAGE)) == ()


def test_a_region_is_worth_the_sum_of_its_cells() -> None:
    evidence = np.zeros((6, 6, 6))
    evidence[1, 1, 1], evidence[4, 4, 4] = 2.0, -3.0
    signed = draw(explained(evidence, CELLS, IMAGE)).signed
    assert evidence_within(signed, np.ones(IMAGE.shape)) == pytest.approx(-1.0, abs=1e-6)
    near = np.zeros(IMAGE.shape)
    near[:12, :12, :12] = 1
    assert evidence_within(signed, near) == pytest.approx(2.0, abs=1e-6)
    assert evidence_within(signed, near / 2) == pytest.approx(1.0, abs=1e-6)


def test_peaks_at_opposite_rims_are_two_peaks() -> None:
    evidence = np.zeros((6, 6, 6))
    evidence[0, 0, 0], evidence[5, 0, 0] = 1.0, 2.0
    assert [p.evidence for p in peaks(explained(evidence, CELLS, IMAGE))] == [2.0, 1.0]


def test_a_map_without_a_sign_has_peaks_of_its_strength() -> None:
    evidence = np.zeros((6, 6, 6))
    evidence[1, 1, 1], evidence[4, 4, 4] = 2.0, 3.0
    e = explained(evidence, CELLS, IMAGE, signed=False)
    for found in (peaks(e), peaks(e, draw(e))):
        assert [(p.polarity, p.evidence) for p in found] == [("strength", 3), ("strength", 2)]


def test_without_a_reference_a_map_adds_up_to_the_score() -> None:
    e = explained(np.ones((6, 6, 6)), CELLS, IMAGE)
    assert status_words(e) == "the map adds up to the score's difference from the reference"
    assert status_words(e.replace(reference_score=None)) == "the map adds up to the score"
    for status in ("not_converged", "not_a_cut", "no_sum"):
        other = e.replace(reference_score=None, status=status)
        assert status_words(other) == STATUS_WORDS[status]
