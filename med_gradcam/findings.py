"""What does a network find in a scan: predicted parts or boxes, each with the target to ask for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from med_gradcam import box_target, target_region
from med_gradcam.capture import outputs
from med_gradcam.case import Case
from med_gradcam.detection import Detector
from med_gradcam.errors import UsageError
from med_gradcam.geometry import Geometry, point_words, side_words
from med_gradcam.opening import opened
from med_gradcam.outputs import first_tensor, full_resolution, what
from med_gradcam.target import Box, class_name, is_map, log_odds, parse_classes

BACKGROUND = "background"
SHOWN = 20  # parts or boxes that a table lists


@dataclass(frozen=True, slots=True)
class Component:
    """A connected part of what a network takes for a class, on the grid of its output.

    `number` from 1, the largest first; `score`: the voxels' mean log-odds; `centre_ras_mm` of its
    voxels; `size_mm` of the box around it, along the scan's axes closest to right-left,
    anterior-posterior and superior-inferior.
    """

    label: str
    number: int
    voxels: int
    ml: float
    score: float
    centre_ras_mm: tuple[float, float, float]
    size_mm: tuple[float, float, float]

    @property
    def target(self) -> str:
        """The target of explain() for this part."""
        return f"{self.label}@component:{self.number}"

    @property
    def words(self) -> str:
        """Where it lies, for people."""
        return f"{point_words(self.centre_ras_mm)} ({side_words(self.centre_ras_mm)})"


def components(
    image: object, model: object, target: str | int = "auto", **settings: Any
) -> tuple[Component, ...]:
    """The connected parts (26 neighbours) of what a segmentation network predicts, largest first.

    `target`: a class, or auto for all classes but the background (class 0 of a softmax, and a class
    of that name), which is listed only when it is named. Softmax: the largest logit wins; sigmoid:
    logits above 0. Further settings are those of explain(), such as `output`, `at` and `link`. Each
    number is the one that CLASS@component:N takes.

    Raises:
        UsageError: the network's output is no map, or predicts no regions. Otherwise as explain().
    """
    with opened(image, model, {**settings, "target": _nothing}) as case:
        output = outputs(case.model.net, case.tensor(case.prepared.network_input()))
        place = full_resolution(output, case.request.output)
        logits = first_tensor(output, place)
        _check_map(case, logits, output)
        grid = target_region.output_grid(case.prepared.grid, tuple(logits.shape[2:]))
        made: list[Component] = []
        for c in _classes(case, str(target), logits.shape[1]):
            made += _parts(case, logits, c, grid)
    return tuple(made)


def boxes(image: object, model: object, **settings: Any) -> tuple[Box, ...]:
    """The boxes that a detector keeps, the highest score first.

    `model`: a RetinaNetDetector, or what detector() makes of a network. Box N is what the target
    box:N explains. Further settings are those of explain().

    Raises:
        ModelError: it is no detector. Otherwise as explain().
    """
    with opened(image, model, {**settings, "target": _nothing}) as case:
        output = outputs(case.model.net, case.tensor(case.prepared.network_input()))
        return box_target.seen(output, case.model, case.prepared).boxes


def _nothing(output: object) -> object:
    """A target that is never asked for."""
    return output


def _check_map(case: Case, logits: Any, output: object) -> None:
    if isinstance(case.model.net, Detector):
        raise UsageError(
            "expected a segmentation network, got a detector; list its boxes (boxes() in Python, "
            "or `med-gradcam boxes`)."
        )
    if not is_map(logits):
        raise UsageError(
            f"expected a segmentation network, which puts out a map (1, K, i, j, k), got "
            f"{what(output)}; name another output by its place, as [1] or logits."
        )
    if case.model.link == "none":
        raise UsageError(
            "expected a network that predicts classes, got one without a link function; name a "
            "mask, a voxel or a box as target instead."
        )


def _classes(case: Case, wish: str, count: int) -> list[int]:
    labels = case.model.labels
    if wish != "auto":
        found = parse_classes(wish, labels, count)[0]
        if len(found) > 1:
            raise UsageError(f"expected one class whose parts to list, got {wish!r}.")
        return [found[0]]
    first = 1 if case.model.link == "softmax" and count > 1 else 0
    names = [class_name(labels, c) for c in range(count)]
    return [c for c in range(first, count) if names[c].casefold() != BACKGROUND]


def _parts(case: Case, logits: Any, c: int, grid: Geometry) -> list[Component]:
    link = case.model.link
    numbered, sizes = target_region.parts(target_region.predicted(logits, link, c))
    scores = log_odds(logits, (c,), link)[0].double().cpu().numpy()
    sums = np.bincount(numbered.ravel(), weights=scores.ravel(), minlength=len(sizes) + 1)
    inside = np.argwhere(numbered > 0)
    which = numbered[tuple(inside.T)]
    made = []
    order = np.argsort(which, kind="stable")
    ends = np.cumsum([0, *sizes])
    axes = ["RLAPSI".index(letter) // 2 for letter in grid.axcodes]
    for n, size in enumerate(sizes, start=1):
        voxels = inside[order[ends[n - 1] : ends[n]]]
        x, y, z = grid.world_ras(voxels.mean(axis=0)).tolist()
        spans = (np.ptp(voxels, axis=0) + 1) * grid.spacing_mm
        a, b, d = (float(spans[axes.index(axis)]) for axis in range(3))
        label, ml = class_name(case.model.labels, c), size * grid.voxel_ml
        made.append(Component(label, n, size, ml, float(sums[n]) / size, (x, y, z), (a, b, d)))
    return made


# -------------------------------------------------------------------------------- what is written


def as_record(found: Sequence[Component | Box]) -> list[dict[str, Any]]:
    """All of it as plain values, for JSON."""
    rows = []
    for one in found:
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(one).items()}
        if isinstance(one, Box):
            rows.append({"target": f"box:{one.number}", **lists, "probability": one.probability})
        else:
            rows.append({"target": one.target, **lists})
        rows[-1]["words"] = point_words(one.centre_ras_mm)
    return rows


def as_text(found: Sequence[Component | Box], kind: str, most: int = SHOWN) -> str:
    """The table for people; `kind`: components or boxes."""
    if not found:
        what_ = "boxes above the detector's threshold" if kind == "boxes" else "predicted parts"
        return f"no {what_}"
    rows = [_head(kind), *(_row(one) for one in found[:most])]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if n in (0, len(row) - 2) else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    more = len(found) - most
    if more > 0:
        smaller = "with lower scores" if kind == "boxes" else "more (per class the largest first)"
        lines.append(f"and {more} {smaller}; --most lists them")
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _head(kind: str) -> tuple[str, ...]:
    own = ("class", "score") if kind == "boxes" else ("mL", "voxels")
    return ("target", *own, "log-odds", "centre", "size mm")


def _row(one: Component | Box) -> tuple[str, ...]:
    size = " x ".join(f"{mm:.0f}" for mm in one.size_mm)
    where = f"{point_words(one.centre_ras_mm)} ({side_words(one.centre_ras_mm)})"
    if isinstance(one, Box):
        own = (f"box:{one.number}", one.label, f"{one.probability:.3f}")
    else:
        own = (one.target, f"{one.ml:.3g}", str(one.voxels))
    return (*own, f"{one.score:+.2f}", where, size)
