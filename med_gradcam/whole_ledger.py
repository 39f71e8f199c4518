"""What does each window have to do with a volume's score, and which ones should be looked at?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from med_gradcam.geometry import point_words, side_words

Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class WindowRow:
    """One window: `start` in voxels of the network's grid, its centre in RAS+ mm, its scores.

    `share`: its part of the volume's change from the reference, in the volume's unit; `net`: what
    its map adds up to, which is the same but for what flows past the layer; `explained`: whether
    it has a map; `skipped`: why it was not run, or "". A window of an output map has as its score
    what it adds to the volume's.
    """

    number: int
    start: tuple[int, int, int]
    centre_ras_mm: Point
    score: float | None
    reference_score: float | None
    share: float
    net: float
    explained: bool
    skipped: str = ""

    @property
    def words(self) -> str:
        """Where its centre is, for people."""
        return point_words(self.centre_ras_mm)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place that speaks for the target: the window that scores highest there.

    `windows`: how many windows were taken for the same place.
    """

    window: int
    score: float
    centre_ras_mm: Point
    share: float
    windows: int

    @property
    def words(self) -> str:
        """Where it is, for people: "R 34 P 12 S 88 mm"."""
        return point_words(self.centre_ras_mm)

    @property
    def side(self) -> str:
        """Which side of the scanner's midline it lies on."""
        return side_words(self.centre_ras_mm)


def candidates(
    rows: Sequence[WindowRow],
    values: Sequence[float],
    window: Sequence[int],
    *,
    most: int,
    least: float | None,
    apart_mm: float | None,
) -> tuple[Candidate, ...]:
    """The rows with the largest `values`, each at a place of its own.

    A row is left to a better one within `apart_mm`, or without that one whose window overlaps it.
    `least`: no value below it is listed, but for the best.
    """
    order = sorted(range(len(rows)), key=lambda n: -values[n])
    starts = np.array([row.start for row in rows]).reshape(-1, 3)
    centres = np.array([row.centre_ras_mm for row in rows]).reshape(-1, 3)
    free = np.ones(len(rows), dtype=bool)
    found: list[Candidate] = []
    for n in order:
        if len(found) == most or (found and least is not None and values[n] < least):
            break
        if not free[n]:
            continue
        if apart_mm is None:
            near = (np.abs(starts - starts[n]) < np.array(window)).all(axis=1)
        else:
            near = np.linalg.norm(centres - centres[n], axis=1) <= apart_mm
        row, count = rows[n], int((near & free).sum())
        free &= ~near
        found.append(Candidate(row.number, values[n], row.centre_ras_mm, row.share, count))
    return tuple(found)
