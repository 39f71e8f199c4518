"""The methods: one file each, from a capture to signed evidence per cell.

A method is a module with TITLE, SOURCE (the paper), CANNOT_SHOW (what its map cannot say),
SIGNED (whether it can show evidence against), UNIT (of its map: "score" where a cell is an amount
of the score, see explanation.Measure), LEVEL ("layer", or "input" for methods whose cells are the
voxels of the network's input), BESIDE (whether a method at the input also needs the capture of a
layer), USES_REFERENCE, PROMISES_SUM and `evidence(capture, bound)`; REFERENCES, words, if it
compares with more than the reference input; and REST, what the part of the score that its map
leaves out does, if that is not to flow past the layer; NEEDS_GRADIENT = False, of a method at
the input that predictions are enough for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from med_gradcam.capture import Capture
    from med_gradcam.explanation import Measure


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a sum may miss: max(absolute, share * |score - reference score|), in log-odds."""

    absolute: float
    share: float

    def of(self, difference: float) -> float:
        """The bound for one difference of scores."""
        return max(self.absolute, self.share * abs(difference))


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Signed evidence `values` (i, j, k) float64, and what the method knows about its sum.

    `start_score`: the score where its path begins (the reference's activation at the layer, the
    rest of the case as it is); `converged`: whether the sum met the bound; None without a promise;
    `reference_score`: the mean score of the references, of a method that has several.
    """

    values: torch.Tensor
    start_score: float | None = None
    converged: bool | None = None
    nodes: int = 0
    reference_score: float | None = None


class Method(Protocol):
    """What a module in this folder must have."""

    TITLE: str
    SOURCE: str
    CANNOT_SHOW: str
    SIGNED: bool
    UNIT: Measure
    LEVEL: Literal["layer", "input"]
    BESIDE: bool
    USES_REFERENCE: bool
    PROMISES_SUM: bool

    def evidence(self, capture: Capture, bound: Bound) -> Evidence:
        """Signed evidence per cell, shape (i, j, k), in UNIT."""
