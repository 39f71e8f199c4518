"""Which number is explained, of many windows' scores or of the map that they make together?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch

from med_gradcam import targeting
from med_gradcam.case import Case
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.intake import Asked, function_label
from med_gradcam.target import Target
from med_gradcam.whole_score import Score, pool

Aggregate = str | Callable[[torch.Tensor], torch.Tensor]  # max, mean, lse, noisy-or, or a function


def of_map(case: Case, stitched: npt.NDArray[Any]) -> Target:
    """The target that a request means on a stitched map (K, i, j, k).

    Raises:
        CannotExplainError: it is none that a map can be read by.
    """
    request = replace(case.request, output="")
    target = targeting.pick(request, torch.from_numpy(stitched)[None], case.model, case.prepared)
    if target.weights is None and target.function is None:
        raise CannotExplainError(
            "dense",
            f"expected a target that reads the stitched map, such as a class or a mask, got "
            f"{target.label!r}.",
        )
    return target


def place_is_given(case: Case) -> bool:
    """Whether where a map is read, and of which class, is known before there is a map."""
    wish = case.request.target
    given = wish.place in ("mask", "voxel", "box") and wish.whole not in case.model.labels
    return given and wish.classes != "auto"


def of_scores(
    case: Case, outputs: torch.Tensor, aggregate: Aggregate, temperature: float
) -> tuple[Target, Score | None, Target]:
    """The target of the volume, how windows' scores are taken together, and a window's own target.

    `outputs` (W, K). "auto" is the class with the largest score of the volume, but the first of
    several; a function of all outputs is a target of its own, and needs no other.

    Raises:
        UsageError: no such aggregation, or none of such scores.
    """
    wish = case.request.target
    if not isinstance(aggregate, str):
        if wish.whole != "auto":
            raise UsageError(
                f"expected no target beside an aggregation by a function, got {wish.whole!r}: "
                f"the function says which number is explained."
            )
        label = function_label(aggregate)
        own = Target("custom", label, (), "none", function=aggregate)
        return own, None, own
    how = pool(aggregate, temperature)
    request = replace(case.request, output="")
    if wish.classes == "auto" and wish.function is None and wish.target is None:
        request = replace(request, target=Asked(_likeliest(case, outputs, how)))
    own = targeting.pick(request, outputs[:1], case.model, case.prepared)
    if aggregate == "noisy-or" and own.unit != "log-odds":
        raise UsageError(
            f"expected log-odds for noisy-or, got a target in {own.unit!r}; use max or mean."
        )
    return replace(own, label=f"{own.label}, {aggregate} over windows"), how, own


def _likeliest(case: Case, outputs: torch.Tensor, how: Score) -> str:
    """The class with the largest score of the volume; auto where it is not ours to say."""
    link, count = case.model.link, outputs.shape[1]
    if count == 1 or link == "none":
        return "auto"
    first = 1 if link == "softmax" else 0  # the first is the background
    rows = outputs.double()

    def score(c: int) -> float:
        return float(how(Target("class", str(c), (c,), link)(rows)))

    return f"#{max(range(first, count), key=score)}"
