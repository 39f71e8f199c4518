"""Which boxes does a detector find, and which number of its output made each of them?

RetinaNet: every cell of every level has anchors, boxes of a few shapes around it; the network gives
each anchor a logit per class and six numbers that move it. What is kept is chosen by score and by
non-maximum suppression. So a box has one logit behind it, and that one is explained.
Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002; the choice
of boxes is that of MONAI's RetinaNetDetector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from med_gradcam.errors import ModelError
from med_gradcam.geometry import Geometry

CLASSES, BOXES = "classification", "box_regression"
SHIFT_LIMIT = math.log(1000.0 / 16)  # a regression never stretches an anchor by more than that
Overlap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """How boxes come out of a detector's heads.

    `anchors`: of each level (A, 6), lowest and highest corner around a cell's centre, in voxels of
    the input; `weights` by which the six numbers were multiplied in training; `threshold` of the
    score 0..1, `per_level` and `most` boxes, `nms`: the overlap from which the lower one goes;
    `divisible`: the input is padded with 0 at its ends to multiples of this.
    """

    anchors: tuple[torch.Tensor, ...]
    weights: tuple[float, ...] = (1.0,) * 6
    threshold: float = 0.05
    per_level: int = 1000
    nms: float = 0.5
    most: int = 300
    divisible: tuple[int, ...] = (1, 1, 1)
    keys: tuple[str, str] = (CLASSES, BOXES)
    limit: float = SHIFT_LIMIT
    crossed: bool = False  # the anchors' first two axes change places
    overlap: Overlap | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One level of the heads: `logits` (n, K) and `boxes` (n, 6) of its anchors, in order.

    Corners in voxel indices of the network's input; anchor n is that of cell and shape `place`.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    shape: tuple[int, int, int]
    shapes: int

    def place(self, n: int) -> tuple[tuple[int, int, int], int]:
        """The cell (i, j, k) of an anchor, and which of the shapes it has."""
        cell, shape = divmod(n, self.shapes)
        i, j, k = (int(v) for v in np.unravel_index(cell, self.shape))
        return (i, j, k), shape


def levels(output: Mapping[str, Sequence[torch.Tensor]], rules: Rules, size: Any) -> list[Level]:
    """The anchors of all levels, moved as the network says; `size` of the scan in voxels.

    Raises:
        ModelError: the anchors do not fit the heads.
    """
    maps, codes = output[CLASSES], output[BOXES]
    if not len(maps) == len(codes) == len(rules.anchors):
        raise ModelError(
            f"expected anchors for each of the {len(maps)} levels of the network, got them for "
            f"{len(rules.anchors)}."
        )
    padded = [n + -n % d for n, d in zip(size, rules.divisible, strict=True)]
    made = []
    for logits, code, shapes in zip(maps, codes, rules.anchors, strict=True):
        count = len(shapes)
        if code.shape[1] != 6 * count or logits.shape[1] % count:
            raise ModelError(
                f"expected heads for {count} anchors per place, {6 * count} numbers for their "
                f"boxes, got {code.shape[1]} beside {logits.shape[1]} logits; are these the "
                f"network's anchors?"
            )
        i, j, k = (int(n) for n in logits.shape[2:])
        around = _grid(shapes.to(code), (i, j, k), padded, crossed=rules.crossed)
        boxes = _moved(_listed(code, count), around, rules)
        made.append(Level(_listed(logits, count), boxes, (i, j, k), count))
    return made


def _listed(head: torch.Tensor, count: int) -> torch.Tensor:
    """A head's map (1, A * n, i, j, k) as (i * j * k * A, n)."""
    one = head.detach()[0]
    by_anchor = one.reshape(count, -1, *one.shape[1:]).permute(2, 3, 4, 0, 1)
    return by_anchor.reshape(-1, one.shape[0] // count)


def _grid(
    shapes: torch.Tensor, cells: tuple[int, int, int], size: Sequence[int], *, crossed: bool
) -> torch.Tensor:
    """The anchors (n, 6) of a level: cell i has its centre at i * stride + stride // 2."""
    steps = [s // n for s, n in zip(size, cells, strict=True)]
    ends = [torch.arange(n) * s + s // 2 for n, s in zip(cells, steps, strict=True)]
    centre = [axis.reshape(-1) for axis in torch.meshgrid(*ends, indexing="ij")]
    if crossed:
        centre[0], centre[1] = centre[1], centre[0]
    at = torch.stack(centre * 2, dim=1).to(shapes)
    return (at[:, None] + shapes[None]).reshape(-1, 6)


def _moved(codes: torch.Tensor, anchors: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Anchors (n, 6) moved and stretched by the network's six numbers each."""
    codes = codes.float()
    weights = codes.new_tensor(rules.weights)
    low, high = anchors[:, :3].float(), anchors[:, 3:].float()
    size, middle = high - low, (low + high) / 2
    centre = codes[:, :3] / weights[:3] * size + middle
    stretch = (codes[:, 3:] / weights[3:]).clamp(max=rules.limit)
    half = 0.5 * torch.exp(stretch) * size
    return torch.cat([centre - half, centre + half], dim=1)


# ------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True, slots=True)
class Found:
    """A box: the level, anchor and class it comes from, its logit and its corners in voxels."""

    level: int
    anchor: int
    label: int
    logit: float
    corners: tuple[float, ...]

    def placed(self, grid: Geometry) -> tuple[tuple[float, float, float], tuple[float, ...]]:
        """Its centre in RAS+ mm, and its size in mm along the axes closest to R-L, A-P, S-I.

        A corner at c lies at voxel index c, as in MONAI's AffineBoxToWorldCoordinate.
        """
        low, high = np.array(self.corners[:3]), np.array(self.corners[3:])
        sizes = (high - low) * grid.spacing_mm
        order = ["RLAPSI".index(letter) // 2 for letter in grid.axcodes]
        x, y, z = grid.world_ras((low + high) / 2).tolist()
        return (x, y, z), tuple(float(sizes[order.index(axis)]) for axis in range(3))


def kept(found: Sequence[Level], rules: Rules, size: Sequence[int]) -> list[Found]:
    """The boxes that the detector keeps, the highest score first."""
    listed: list[Found] = []
    scores: list[torch.Tensor] = []
    for number, level in enumerate(found):
        chosen, score = _best(level, number, rules, size)
        listed += chosen
        scores.append(score)
    if not listed:
        return []
    order = torch.argsort(torch.cat(scores), descending=True, stable=True).numpy()
    corners = np.array([one.corners for one in listed], dtype=np.float32)
    labels = np.array([one.label for one in listed])
    made: list[Found] = []
    while len(order) and len(made) < rules.most:
        first, order = int(order[0]), order[1:]
        made.append(listed[first])
        same = labels[order] == labels[first]
        over = overlaps(corners[first], corners[order[same]], rules.overlap)
        same[same] = over > rules.nms
        order = order[~same]
    return made


def _best(
    level: Level, number: int, rules: Rules, size: Sequence[int]
) -> tuple[list[Found], torch.Tensor]:
    """The boxes of a level's best scores above the threshold, where one is left, and the scores."""
    flat = torch.sigmoid(level.logits.float()).flatten()
    above = torch.where(flat > rules.threshold)[0]
    top, at = flat[above].topk(min(rules.per_level, len(above)))
    anchor = above[at] // level.logits.shape[1]
    label = above[at] % level.logits.shape[1]
    cut = _clipped(level.boxes[anchor], size)
    left = (cut[:, 3:] >= cut[:, :3] + 1).all(dim=1)
    anchor, label, cut = anchor[left], label[left], cut[left]
    logits = level.logits[anchor, label].tolist()
    rows = zip(anchor.tolist(), label.tolist(), logits, cut.tolist(), strict=True)
    return [Found(number, n, c, z, tuple(box)) for n, c, z, box in rows], top[left].cpu()


def _clipped(boxes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Boxes (6) or (n, 6) cut off at the scan's ends."""
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([*size, *size]))


def box_of(level: Level, number: int, n: int, c: int, size: Sequence[int]) -> Found:
    """The box of anchor `n` of level `number`, for class `c`, cut off at the scan's ends."""
    corners = tuple(float(v) for v in _clipped(level.boxes[n], size))
    return Found(number, n, c, float(level.logits[n, c]), corners)


def fitting(
    found: Sequence[Level], corners: Sequence[float], label: int | None, least: float, size: Any
) -> tuple[Found | None, float]:
    """The anchor with the highest logit among those whose box overlaps a given one enough.

    `label`: of this class, or of any; `least` overlap, 0..1. Also the best overlap that there is.
    """
    best, most = None, 0.0
    corners = _clipped(torch.tensor([*corners]), size).tolist()
    for number, level in enumerate(found):
        over = overlaps(corners, _clipped(level.boxes, size).cpu().numpy(), None)
        most = max(most, float(over.max()))
        inside = torch.where(torch.as_tensor(over) >= least)[0]
        if not len(inside):
            continue
        logits = level.logits[inside] if label is None else level.logits[inside][:, [label]]
        at, c = divmod(int(logits.argmax()), logits.shape[1])
        one = box_of(level, number, int(inside[at]), c if label is None else label, size)
        best = one if best is None or one.logit > best.logit else best
    return best, most


def overlaps(one: Any, others: Any, how: Overlap | None = None) -> Any:
    """The overlap of a box (6) with others (n, 6): what they share, by what they cover together."""
    if how is not None:
        pair = (torch.as_tensor(np.asarray(v, dtype=np.float32)) for v in (others, [one]))
        return how(*pair).flatten().numpy()
    a, b = np.asarray(one, dtype=np.float32), np.asarray(others, dtype=np.float32)
    low, high = np.maximum(a[:3], b[:, :3]), np.minimum(a[3:], b[:, 3:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    both = (a[3:] - a[:3]).prod() + (b[:, 3:] - b[:, :3]).prod(axis=1) - shared
    return shared / np.maximum(both, np.finfo(np.float32).eps)
