"""What does the caller's target mean for this output of this model, on this scan?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from med_gradcam import box_target, intake, layers, loading, target_region
from med_gradcam.anchors import BOXES, CLASSES
from med_gradcam.detection import Detector
from med_gradcam.errors import CannotExplainError, MedGradcamError, ModelError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.intake import Asked, Request
from med_gradcam.model import Model
from med_gradcam.outputs import changed, first_tensor, full_resolution, what
from med_gradcam.prepare import Prepared
from med_gradcam.running import MISFIT, first_line
from med_gradcam.target import (
    Target,
    class_name,
    is_map,
    output_matrix,
    parse_classes,
    parse_target,
)
from med_gradcam.target_region import Bools, Floats
from med_gradcam.volume import Volume

_NAMED = 6  # classes that an error lists
_PLACES = "CLASS@mask:FILE, CLASS@voxel:ras:X,Y,Z or CLASS@box:ras:X,Y,Z:SIZE_MM"


def asked(target: object) -> Asked:
    """What the caller wants explained; a mask's file is read here, before the network runs.

    Raises:
        UsageError: it is no target.
        ImageError: the mask cannot be read.
    """
    found = intake.asked(target)
    mask = found.mask
    if found.place == "mask" and mask is None:
        return replace(found, mask=loading.read(found.where))
    if isinstance(mask, (str, Path)):
        return replace(found, mask=loading.read(mask))
    return found


def pick(request: Request, output: object, model: Model, prepared: Prepared) -> Target:
    """The target of a request, given the model's raw output for the scan.

    Raises:
        UsageError: no such class, output or place.
        CannotExplainError: the output cannot be explained, or the region is empty.
        ModelError: the model's labels do not fit its output.
    """
    wish, place = request.target, request.output
    if wish.function is not None:
        return _custom(wish.function, output, place)
    if wish.target is not None:
        ready = replace(wish.target, output=place) if place else wish.target
        _check_finite(ready(output))
        return ready
    if wish.whole in model.labels:  # a label that looks like a place
        wish = Asked(wish.whole)
    if isinstance(model.net, Detector):
        return box_target.target_of(wish, output, model, prepared)  # type: ignore[arg-type]
    _check_no_box(wish, output, place)
    place = full_resolution(output, place)
    tensor = first_tensor(output, place)
    if is_map(tensor):
        return replace(_Dense(wish, tensor.detach(), model, prepared).target(), output=place)
    logits = output_matrix(tensor)
    _check_logits(logits, model, named=not place)
    if wish.place:
        raise UsageError(
            f"expected a target without a place, since the network of {model.name!r} puts out one "
            f"row of scores per scan and no map, got {wish.whole!r}."
        )
    scores = [float(v) for v in logits[0].detach()]
    return replace(parse_target(wish.classes, model.labels, model.link, scores), output=place)


def _check_no_box(wish: Asked, output: object, place: str) -> None:
    """Refuse the heads and the boxes of a network that is not known as a detector.

    Raises:
        UsageError: with what to do.
    """
    numbered = wish.place == "box" and wish.where.isdecimal()
    heads = isinstance(output, Mapping) and CLASSES in output and BOXES in output
    if not (numbered or re.fullmatch(r"box:.*", wish.classes) or (heads and not place)):
        return
    raise UsageError(
        f"expected a detector whose anchors are known for the target {wish.whole!r}, got a network "
        f"that puts out {what(output)}; hand over MONAI's RetinaNetDetector, or "
        f"med_gradcam.detector(network, anchors)."
    )


# ---------------------------------------------------------------------------------- the checks


def _check_logits(logits: torch.Tensor, model: Model, *, named: bool) -> None:
    if len(logits) != 1:
        raise CannotExplainError(
            "output",
            f"expected one row of scores per scan (1, K), got {tuple(logits.shape)} for one "
            f"scan; does the network squeeze away its batch axis?",
        )
    _check_finite(logits)
    layers.check_logits(model.net, model.link, logits.detach(), named=named)
    outputs = logits.shape[1]
    if model.labels and len(model.labels) != outputs:
        raise ModelError(
            f"expected {len(model.labels)} outputs ({', '.join(model.labels[:6])}), the network of "
            f"{model.name!r} gives {outputs}."
        )


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CannotExplainError(
            "not finite",
            "the network's output holds NaN or infinite values for this scan; check the "
            "weights and the intensity steps.",
        )


# ------------------------------------------------------------------------- the caller's function


def _custom(function: Callable[[Any], Any], output: object, place: str) -> Target:
    """A target from a function of the raw output, tried on it once."""
    label = intake.function_label(function)
    target = Target("custom", label, (), "none", output=place, function=function)
    try:
        with torch.enable_grad():
            score = target(changed(output, _leaf))
    except MedGradcamError:
        raise
    except MISFIT as error:
        raise UsageError(
            f"the target function {label!r} failed on the network's output ({what(output)}): "
            f"{first_line(error)}."
        ) from error
    if not score.requires_grad:
        raise UsageError(
            f"expected the target function {label!r} to compute its number from the network's "
            f"output with torch, but no gradient leads back to it; leave out item(), numpy(), "
            f"detach(), argmax and comparisons."
        )
    if not bool(torch.isfinite(score).all()):
        raise CannotExplainError(
            "not finite",
            f"the target function {label!r} gives {float(score[0].detach())} for this scan.",
        )
    return target


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of an output as a new start of a graph."""
    leaf = tensor.detach().clone()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


# ---------------------------------------------------------------------------------------- maps


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """A target over a region of an output map `logits` (1, K, i, j, k)."""

    wish: Asked
    logits: torch.Tensor
    model: Model
    prepared: Prepared

    def target(self) -> Target:
        _check_logits(self.logits, self.model, named=False)
        _, _, i, j, k = self.logits.shape
        grid = target_region.output_grid(self.prepared.grid, (i, j, k))
        given = self._given(grid)
        index, label, weight = self._classes(None if given is None else given[0] > 0)
        mask, words = self._predicted(index[0]) if given is None else given
        place = self.wish.place or "predicted"
        region, box = target_region.region(place, words, mask)
        box = replace(box, values=box.values.to(self.logits.device))
        if place == "component":
            label = f"{label}@component:{self.wish.where}"
        elif place != "predicted":
            label = f"{label}@{place}"
        link = self.model.link
        return Target("region", label, index, link, weight, region=region, weights=box)

    def _given(self, grid: Geometry) -> tuple[Floats, str] | None:
        """Weights and words of a place that the caller gave; None for what the net predicts."""
        wish, image = self.wish, self.prepared.image
        if wish.place == "mask":
            mask = target_region.from_mask(_as_mask(wish.mask, image), grid)
            found = mask, "the given mask"
        elif wish.place == "voxel":
            found = target_region.from_voxel(wish.where, grid, image)
        elif wish.place == "box":
            found = target_region.from_box(wish.where, grid, image)
        else:
            return None
        if not found[0].any():
            corners = grid.world_ras([[0, 0, 0], [n - 1 for n in grid.shape]]).round(1).tolist()
            size = " x ".join(f"{s:.3g}" for s in grid.spacing_mm)
            raise CannotExplainError(
                "empty region",
                f"expected a {wish.place} with voxels of the network's output in it, got none: the "
                f"output reaches from RAS {corners[0]} to {corners[1]} mm in voxels of {size} mm.",
            )
        return found

    def _classes(self, inside: Bools | None) -> tuple[tuple[int, ...], str, float]:
        """Index, label and rival's weight; auto is the largest class but the background."""
        labels, link, outputs = self.model.labels, self.model.link, self.logits.shape[1]
        if self.wish.classes != "auto":
            return parse_classes(self.wish.classes, labels, outputs)
        if link == "none":
            only = parse_target("auto", labels, link, [0.0] * outputs)
            return only.index, only.label, 1.0
        counts = target_region.counts(self.logits, link, inside)
        first = 1 if link == "softmax" and outputs > 1 else 0  # class 0 is the background
        best = max(range(first, outputs), key=lambda c: counts[c])
        if counts[best] == 0:
            raise self._empty("any class but the background" if first else "any class", inside)
        return (best,), class_name(labels, best), 1.0

    def _predicted(self, c: int) -> tuple[Bools, str]:
        """The predicted region of a class, or one of its parts, with words."""
        name = class_name(self.model.labels, c)
        if self.model.link == "none":
            raise UsageError(
                f"expected a place with the target {name!r}, since a model without a link function "
                f"predicts no region: {_PLACES}."
            )
        mask = target_region.predicted(self.logits, self.model.link, c)
        if not mask.any():
            raise self._empty(repr(name), None)
        if self.wish.place != "component":
            return mask, f"the predicted region of {name}"
        text = self.wish.where
        number = int(text) if text.isdecimal() else 0
        part, parts = target_region.component(mask, number) if number else (mask, 0)
        if not number or number > parts:
            raise UsageError(
                f"expected a part of the predicted region of {name!r} as component:N with N from 1 "
                f"(the largest)" + (f" to {parts}" if number else "") + f", got {text!r}."
            )
        return part, f"part {number} of {parts} of the predicted region of {name}"

    def _empty(self, wanted: str, inside: Bools | None) -> CannotExplainError:
        """An error that names what is predicted instead."""
        counts = target_region.counts(self.logits, self.model.link, inside)
        most = sorted((c for c in range(len(counts)) if counts[c]), key=lambda c: -counts[c])
        listed = [f"{class_name(self.model.labels, c)} ({counts[c]} voxels)" for c in most]
        there = ", ".join(listed[:_NAMED]) + (" and others" if len(listed) > _NAMED else "")
        return CannotExplainError(
            "empty region",
            f"expected voxels that the network takes for {wanted}, there are none; "
            f"it predicts {there or 'no class anywhere'}. Name a class that it predicts, or a "
            f"place: {_PLACES}.",
        )


def _as_mask(mask: object, image: Geometry) -> Volume:
    """A mask as a Volume: it is one, or an array on the scan's own grid."""
    if isinstance(mask, Volume):
        return mask
    array = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
    if array.dtype.kind not in "biuf":
        raise UsageError(f"expected a mask as a Volume or an array, got {type(mask).__name__}.")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.shape != image.shape:
        raise UsageError(
            f"expected a mask array on the scan's grid {image.shape}, got {array.shape}; hand over "
            f"a Volume where it lies on another grid."
        )
    return Volume(array[None].astype(np.float32), image)
