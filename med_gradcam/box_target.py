"""Which box of a detector does the caller mean, and which logit of its output is that?"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from med_gradcam.anchors import CLASSES, Found, Level, box_of, fitting, kept, levels
from med_gradcam.detection import Detector
from med_gradcam.errors import CannotExplainError, ModelError, UsageError
from med_gradcam.geometry import Geometry, point_words
from med_gradcam.intake import Asked
from med_gradcam.model import Model
from med_gradcam.prepare import Prepared
from med_gradcam.target import Box, Target, TargetRegion, Weights, class_name, parse_classes
from med_gradcam.target_region import parse_box

SAME_BOX = 0.3  # overlap from which a box is the one that was pointed at
MOST_TOLD = 20  # boxes that a result names beside its own
_NUMBERED = re.compile(r"box:(.+)", re.DOTALL)
_WAYS = "CLASS, box:N, CLASS@box:N or CLASS@box:ras:X,Y,Z:SIZE_MM"


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a detector puts out for one scan: all anchors of all `levels`, and what it keeps."""

    levels: list[Level]
    kept: list[Found]
    classes: tuple[str, ...]
    grid: Geometry
    size: tuple[int, ...]
    threshold: float

    def box(self, n: int) -> Box:
        """The n-th box that it keeps, from 1."""
        return self.told(self.kept[n - 1], n)

    def told(self, one: Found, number: int, label: int | None = None) -> Box:
        """A box with its place in mm; `label`: another class than that of its score."""
        centre, size = one.placed(self.grid)
        c = one.label if label is None else label
        score = float(self.levels[one.level].logits[one.anchor, c])
        return Box(number, self.classes[c], score, centre, (size[0], size[1], size[2]))

    @property
    def boxes(self) -> tuple[Box, ...]:
        """All that it keeps, the highest score first."""
        return tuple(self.box(n) for n in range(1, len(self.kept) + 1))


def seen(output: Mapping[str, Any], model: Model, prepared: Prepared) -> Seen:
    """What a Detector's raw output for one scan holds.

    Raises:
        ModelError: the anchors or the labels do not fit the heads.
        CannotExplainError: a logit is not finite.
    """
    net = model.net
    if not isinstance(net, Detector):
        raise ModelError(
            f"expected a detector (MONAI's RetinaNetDetector, or med_gradcam.detector(network, "
            f"anchors)), got {type(net).__name__}; of a segmentation network list the components."
        )
    size = prepared.raw.shape[1:]
    found = levels(output, net.rules, size)
    outputs = found[0].logits.shape[1]
    if model.labels and len(model.labels) != outputs:
        raise ModelError(
            f"expected {len(model.labels)} classes ({', '.join(model.labels[:6])}), the detector "
            f"of {model.name!r} has {outputs}."
        )
    if not all(bool(torch.isfinite(t).all()) for one in found for t in (one.logits, one.boxes)):
        raise CannotExplainError(
            "not finite",
            "the detector's output holds NaN or infinite values for this scan; check the weights "
            "and the intensity steps.",
        )
    names = tuple(class_name(model.labels, c) for c in range(outputs))
    best, least = kept(found, net.rules, size), net.rules.threshold
    return Seen(found, best, names, prepared.grid, size, least)


def target_of(wish: Asked, output: Mapping[str, Any], model: Model, prepared: Prepared) -> Target:
    """The target that is meant: one class's logit at the anchor of one box.

    Raises:
        UsageError: no such class or box, or a place that is none of a detector's.
        CannotExplainError: the detector keeps no box, or no anchor fits the place.
    """
    place, where, classes = wish.place, wish.where, wish.classes
    written = None if place or classes in model.labels else _NUMBERED.fullmatch(classes)
    if written is not None:
        place, where, classes = "box", written[1], "auto"
    if place not in ("", "box"):
        raise UsageError(
            f"expected a target of a detector as {_WAYS}, got a {place}: {wish.whole!r}."
        )
    found = seen(output, model, prepared)
    index, text, weight = (None, "", 1.0)
    if classes != "auto":
        index, text, weight = parse_classes(classes, model.labels, len(found.classes))
    label = None if index is None else index[0]
    if place and not where.isdecimal():
        one, number, words = _pointed(found, where, label, prepared)
    else:
        number = _best_of(found, label) if not place else int(where)
        if not 1 <= number <= len(found.kept):
            raise _none(found, f"box:{where}" if place else f"none for {classes!r}")
        one, words = found.kept[number - 1], ""
    index = (one.label,) if index is None else index
    text = text or found.classes[one.label]
    box = found.told(one, number, index[0])
    told = [box, *(other for other in found.boxes if other.number != number)]
    words = words or f"box {number} of {len(found.kept)} that the detector keeps"
    named = f"{text}@box:{number}" if number else f"{text}@box"
    sha, weights, channels = _anchor(found, one, index)
    region = TargetRegion(
        "detection",
        f"the logit{'s' * (len(index) > 1)} of the anchor behind {words}: {box_words(box)}",
        1,
        1.0,
        sha,
        tuple(told[: MOST_TOLD + 1]),
    )
    place = f"{CLASSES}[{one.level}]"
    return Target("region", named, channels, "sigmoid", weight, place, region, weights)


def box_words(box: Box) -> str:
    """A box for people: "nodule, score 0.93, at R 34 P 12 S 88 mm, 12 x 10 x 14 mm"."""
    size = " x ".join(f"{mm:.0f}" for mm in box.size_mm)
    where = point_words(box.centre_ras_mm)
    return f"{box.label}, score {box.probability:.3g}, at {where}, {size} mm"


def _best_of(found: Seen, label: int | None) -> int:
    """The number of the best box of a class; 0 where there is none."""
    numbers = (n for n, one in enumerate(found.kept, 1) if label in (None, one.label))
    return next(numbers, 0)


def _pointed(
    found: Seen, where: str, label: int | None, prepared: Prepared
) -> tuple[Found, int, str]:
    """The box at a place in mm: one that is kept, else the best anchor there; number and words."""
    point, sides = parse_box(where, prepared.image)
    grid = found.grid
    order = ["RLAPSI".index(letter) // 2 for letter in grid.axcodes]
    half = np.array([sides[axis] for axis in order]) / grid.spacing_mm / 2
    middle = grid.index_ijk(point)
    corners = [*(middle - half).tolist(), *(middle + half).tolist()]
    size = found.size
    of_class = [one for one in found.kept if label in (None, one.label)]
    if of_class:
        only = [Level(torch.tensor([[o.logit]]), torch.tensor([o.corners]), (1, 1, 1), 1)
                for o in of_class]  # fmt: skip
        best, _ = fitting(only, corners, None, SAME_BOX, size)
        if best is not None:
            one = of_class[best.level]
            return one, found.kept.index(one) + 1, ""
    anchor, most = fitting(found.levels, corners, label, SAME_BOX, size)
    if anchor is None:
        raise CannotExplainError(
            "empty region",
            f"expected a place that some box of the detector covers, the best overlap with "
            f"{where!r} is {most:.3g} and {SAME_BOX:g} is the least; give the box's own centre and "
            f"sides in mm.",
        )
    return anchor, 0, "the highest score at the given place, where the detector keeps no box"


def _none(found: Seen, wanted: str) -> CannotExplainError | UsageError:
    """An error that says what is kept, or what comes nearest to it."""
    if found.kept:
        listed = "; ".join(f"{b.number}) {box_words(b)}" for b in found.boxes[:6])
        return UsageError(
            f"expected one of the {len(found.kept)} boxes that the detector keeps, got {wanted}; "
            f"they are {listed}."
        )
    level = max(found.levels, key=lambda one: float(one.logits.max()))
    n, c = divmod(int(level.logits.argmax()), level.logits.shape[1])
    best = box_of(level, 0, n, c, found.size)
    (x, y, z), sides = best.placed(found.grid)
    return CannotExplainError(
        "empty region",
        f"expected a box that the detector keeps, there is none: its highest score is "
        f"{1 / (1 + math.exp(-best.logit)):.2g} ({found.classes[c]}), its threshold "
        f"{found.threshold:g}; explain a place instead, such as {found.classes[c]}@box:"
        f"ras:{x:.1f},{y:.1f},{z:.1f}:{','.join(f'{s:.0f}' for s in sides)}.",
    )


def _anchor(
    found: Seen, one: Found, classes: tuple[int, ...]
) -> tuple[str, Weights, tuple[int, ...]]:
    """Digest and weights of an anchor's cell, and the channels of its logits in the level's map."""
    level = found.levels[one.level]
    cell, shape = level.place(one.anchor)
    channels = tuple(shape * len(found.classes) + c for c in classes)
    sha = hashlib.sha256(repr((one.level, level.shape, cell, channels)).encode()).hexdigest()
    return sha, Weights(level.shape, cell, torch.ones(1, 1, 1)), channels
