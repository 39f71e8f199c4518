"""Occlusion: what the score loses when a patch of the scan is replaced by the reference input.

E(P) = z(x) - z(x with the patch P taken from the reference), spread evenly over P's voxels, so that
a patch's voxels add up to its own effect. Coarse to fine: 4 x 4 x 4 patches; then the patches
with the largest effects (at most 12, none below a fifth of the largest) are cut in two along each
axis, twice. Halves that together show less than half of what their patch showed do not replace it:
there any part alone can be missed. At most 256 predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.rerun import input_scores

TITLE = "occlusion against a reference input, coarse to fine"
SOURCE = "Zeiler and Fergus, ECCV 2014, arXiv:1311.2901, sect. 4.2 (log-odds, reference tissue)"
CANNOT_SHOW = (
    "what two patches do only together; for and against that cancel inside one coarse patch; "
    "anything finer than a 16th of the scan; the edges of a patch are news to the network"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = False
NEEDS_GRADIENT = False

SPLITS = 4  # patches along an axis at first
REFINEMENTS = 2
MOST_REFINED, WORTH, KEPT = 12, 0.2, 0.5


@dataclass(frozen=True, slots=True)
class Patch:
    """Voxels start <= v < stop along three axes, and what the score loses without them."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    effect: float = 0.0

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """The patch as an index of the last three axes."""
        a, b, c = (slice(i, j) for i, j in zip(self.start, self.stop, strict=True))
        return a, b, c

    def cut(self, parts: int) -> list[Patch]:
        """`parts` pieces along each axis, fewer where it has fewer voxels."""
        edges = []
        for first, last in zip(self.start, self.stop, strict=True):
            n = min(parts, last - first)
            marks = [first + (last - first) * m // n for m in range(n + 1)]
            edges.append(list(pairwise(marks)))
        return [Patch((a[0], b[0], c[0]), (a[1], b[1], c[1])) for a, b, c in product(*edges)]


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed effect per voxel (I, J, K) of the network's input.

    Raises:
        UsageError: the capture has no reference input.
    """
    del bound
    values = torch.zeros(capture.input.shape[2:], dtype=torch.float64, device=capture.input.device)
    for patch in leaves(capture):
        values[patch.place] = patch.effect / values[patch.place].numel()
    return Evidence(values)


def leaves(capture: Capture) -> list[Patch]:
    """Patches that cover the input without overlap, each with its effect."""
    i, j, k = capture.input.shape[2:]
    found = _tested(capture, Patch((0, 0, 0), (i, j, k)).cut(SPLITS))
    fresh = found
    for _ in range(REFINEMENTS):
        parents = _worth(fresh, max(abs(p.effect) for p in found))
        pieces = [parent.cut(2) for parent in parents]
        flat = iter(_tested(capture, [piece for family in pieces for piece in family]))
        fresh = []
        for parent, family in zip(parents, pieces, strict=True):
            tested = [next(flat) for _ in family]
            if sum(abs(p.effect) for p in tested) >= KEPT * abs(parent.effect):
                found.remove(parent)
                fresh += tested
        found = found + fresh
    return found


def _worth(patches: Sequence[Patch], largest: float) -> list[Patch]:
    """The patches that deserve a closer look: large effects, and more than one voxel."""
    worth = [
        p
        for p in patches
        if abs(p.effect) >= max(WORTH * largest, 1e-12)
        and any(b - a > 1 for a, b in zip(p.start, p.stop, strict=True))
    ]
    return sorted(worth, key=lambda p: -abs(p.effect))[:MOST_REFINED]


def _tested(capture: Capture, patches: Sequence[Patch]) -> list[Patch]:
    """The patches with their effects measured."""
    fill = capture.reference_input
    if fill is None:
        raise UsageError("expected a reference input for the method 'occlusion', got none.")
    if not patches:
        return []

    def without(some: slice) -> torch.Tensor:
        batch = capture.input.repeat(some.stop - some.start, 1, 1, 1, 1)
        for row, patch in zip(batch, patches[some], strict=True):
            row[:, *patch.place] = fill[0][:, *patch.place]
        return batch

    lost = capture.score - input_scores(capture, len(patches), without)
    return [Patch(p.start, p.stop, float(e)) for p, e in zip(patches, lost, strict=True)]
