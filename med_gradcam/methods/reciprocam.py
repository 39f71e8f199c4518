"""Recipro-CAM: the score when one cell of the layer alone is left, behind the layer only.

The paper: S(u) = softmax probability of A * M_u, M_u one at the cell u and zero elsewhere, scaled
to 0..1. Here the log-odds, less those of an empty map: E(u) = z(A * M_u) - z(0), signed and in the
target's unit; before one linear layer it is HiResCAM. With more than 2048 cells M_u is a block of
neighbours, doubled along the longest axis until that is enough, and its evidence is shared evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.rerun import behind

TITLE = "Recipro-CAM, signed: the score of each cell alone, less that of an empty map"
SOURCE = "Byun and Lee, arXiv:2209.14074 (log-odds, no rescaling; masks of one cell)"
CANNOT_SHOW = (
    "evidence that takes several cells together; one cell in an empty map is a case the network "
    "never saw, and a normalisation behind the layer blows it up; the sum is no promise"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False

MOST_MASKS = 2048


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed Recipro-CAM (i, j, k)."""
    del bound
    tail, activation = behind(capture), capture.activation
    shape = activation.shape[1:]
    block = _block(shape)
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    places = [_place(n, counts, block) for n in range(counts[0] * counts[1] * counts[2])]

    def alone(some: slice) -> torch.Tensor:
        batch = activation.new_zeros(some.stop - some.start, *activation.shape)
        for row, n in zip(batch, range(some.start, some.stop), strict=True):
            if n:  # the first is the empty map
                row[places[n - 1]] = activation[places[n - 1]]
        return batch

    scores = tail.scores(len(places) + 1, alone)
    values = torch.zeros(shape, dtype=torch.float64, device=activation.device)
    for place, score in zip(places, scores[1:] - scores[0], strict=True):
        values[place[1:]] = score / values[place[1:]].numel()
    return Evidence(values)


def _block(shape: Sequence[int]) -> list[int]:
    """Cells per mask along each axis, so that there are at most MOST_MASKS masks."""
    block = [1, 1, 1]

    def counts() -> list[int]:
        return [-(-n // b) for n, b in zip(shape, block, strict=True)]

    while counts()[0] * counts()[1] * counts()[2] > MOST_MASKS:
        block[counts().index(max(counts()))] *= 2
    return block


def _place(n: int, counts: Sequence[int], block: Sequence[int]) -> tuple[slice, ...]:
    """All channels of the cells of mask `n`."""
    at = (n // (counts[1] * counts[2]), n // counts[2] % counts[1], n % counts[2])
    return (slice(None), *(slice(a * b, (a + 1) * b) for a, b in zip(at, block, strict=True)))
