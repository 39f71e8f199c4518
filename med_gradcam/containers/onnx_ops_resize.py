"""Which interpolation of torch does ONNX's Resize stand for?

Where torch looks at the same places, its own function is called; otherwise values are picked by
index (nearest), or each axis is multiplied with a matrix of weights (linear, cubic).
Source: onnx/docs/Operators.md, Resize (opsets 10 to 19).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from med_gradcam.containers.onnx_node import Form, Node, Numbers, listed

_MODES = ("nearest", "linear", "cubic")
_COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
)
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis that changes its size: from `before` to `after` cells, `scale` times."""

    number: int
    before: int
    after: int
    scale: float


def _looks(node: Node, axis: Axis) -> Numbers:
    """Where each new cell looks, in indices of the old ones."""
    new, scale = np.arange(axis.after, dtype=np.float64), axis.scale
    how = _coordinates(node)
    if how == "asymmetric":
        return new / scale
    if how == "align_corners":
        return new * ((axis.before - 1) / (axis.after - 1) if axis.after > 1 else 0.0)
    if how == "pytorch_half_pixel" and axis.after == 1:
        return np.zeros(1)
    if how == "tf_half_pixel_for_nn":
        return (new + 0.5) / scale
    if how == "half_pixel_symmetric":
        centre = axis.before / 2
        off = centre * (1 - axis.after / (scale * axis.before))
        return off + (new + 0.5) / scale - 0.5
    return (new + 0.5) / scale - 0.5


def _coordinates(node: Node) -> str:
    asymmetric = node.op == "Upsample" or node.opset < 11
    default = "asymmetric" if asymmetric else "half_pixel"
    return str(node.get("coordinate_transformation_mode", default))


def _axes(node: Node, x: torch.Tensor, scales: Any, sizes: Any) -> list[Axis]:
    named = node.get("axes")
    along = [int(a) % x.ndim for a in (range(x.ndim) if named is None else named)]
    found = []
    if sizes is not None and len(listed(sizes)):
        for axis, size in zip(along, listed(sizes), strict=True):
            before = x.shape[axis]
            found.append(Axis(axis, before, int(size), int(size) / before))
        if found[0].number == 0 and found[0].before != found[0].after == 1 and node.run.fixed:
            found = found[1:]  # the file's one scan
    else:
        for axis, scale in zip(along, listed(scales), strict=True):
            before = x.shape[axis]
            found.append(Axis(axis, before, math.floor(before * scale), float(scale)))
    return [a for a in found if a.after != a.before or a.scale != 1.0]


def _resize(node: Node, x: torch.Tensor, *given: Any) -> torch.Tensor:
    """Resize with (roi, scales, sizes), with (scales) in opset 10, or Upsample."""
    if node.op == "Upsample" or node.opset < 11:
        scales, sizes = given[0] if given else node.get("scales"), None
    else:
        _, scales, sizes = (*given, None, None, None)[:3]
    axes = _axes(node, x, scales, sizes)
    if not axes:
        return x
    by_size = sizes is not None and len(listed(sizes)) > 0
    if str(node.get("mode", "nearest")) == "nearest":
        return _nearest(node, x, axes)
    own: torch.Tensor | None = _own(node, x, axes, by_size=by_size)
    if own is not None:
        return own
    for axis in axes:
        weights = torch.from_numpy(_weights(node, axis)).to(x.device, x.dtype)
        moved: torch.Tensor = F.linear(x.transpose(axis.number, -1), weights)
        x = moved.transpose(axis.number, -1)
    return x


def _nearest(node: Node, x: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
    wanted = {axis.number: _nearest_of(node, axis) for axis in axes}
    if x.ndim in _LINEAR and min(wanted) > 1:
        size = [next((a.after for a in axes if a.number == n), x.shape[n]) for n in range(x.ndim)]
        for mode, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
            same = [
                np.array_equal(wanted[a.number], _torch_nearest(a.before, a.after, shift))
                for a in axes
            ]
            if all(same):
                return F.interpolate(x, size=size[2:], mode=mode)
    for number, at in wanted.items():
        x = x.index_select(number, torch.from_numpy(at).to(x.device))
    return x


def _torch_nearest(before: int, after: int, shift: float) -> Numbers:
    """The indices that torch takes: floor((i + shift) * before / after)."""
    ratio = np.float32(before) / np.float32(after)
    at = np.floor((np.arange(after, dtype=np.float32) + np.float32(shift)) * ratio)
    found: Numbers = np.minimum(at.astype(np.int64), before - 1)
    return found


def _nearest_of(node: Node, axis: Axis) -> Numbers:
    at = _looks(node, axis)
    default = "floor" if node.op == "Upsample" or node.opset < 11 else "round_prefer_floor"
    how = str(node.get("nearest_mode", default))
    rules: dict[str, Callable[[Numbers], Numbers]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }
    found: Numbers = np.clip(rules[how](at), 0, axis.before - 1).astype(np.int64)
    return found


def _own(node: Node, x: torch.Tensor, axes: Sequence[Axis], *, by_size: bool) -> Any:
    """Torch's own interpolation; None where it looks at other places."""
    how, mode = _coordinates(node), str(node.get("mode"))
    half = how == "half_pixel" or (how == "pytorch_half_pixel" and all(a.after > 1 for a in axes))
    if x.ndim not in _LINEAR or min(a.number for a in axes) < 2:
        return None
    if not half and how != "align_corners":
        return None
    if mode == "cubic":
        usual = float(node.get("cubic_coeff_a", -0.75)) == -0.75
        if x.ndim != 4 or not usual or node.get("exclude_outside", 0):
            return None
        word = "bicubic"
    else:
        word = _LINEAR[x.ndim]
    known = {a.number: a for a in axes}
    count = range(2, x.ndim)
    if by_size or not half:
        size = [known[n].after if n in known else x.shape[n] for n in count]
        return F.interpolate(x, size=size, mode=word, align_corners=not half)
    scale = [known[n].scale if n in known else 1.0 for n in count]
    return F.interpolate(x, scale_factor=scale, mode=word, align_corners=False)


def _weights(node: Node, axis: Axis) -> Numbers:
    """How much each old cell counts in each new one (after, before)."""
    at = _looks(node, axis)
    cubic = node.get("mode") == "cubic"
    if not cubic:
        at = np.clip(at, 0, axis.before - 1)
    first = np.floor(at).astype(np.int64)
    table = np.zeros((axis.after, axis.before))
    rows = np.arange(axis.after)
    for tap in range(-1, 3) if cubic else range(2):
        column = first + tap
        far = np.abs(at - column)
        weight = _cubic(far, float(node.get("cubic_coeff_a", -0.75))) if cubic else 1 - far
        inside = (column >= 0) & (column < axis.before)
        if node.get("exclude_outside", 0):
            weight = np.where(inside, weight, 0.0)
        np.add.at(table, (rows, np.clip(column, 0, axis.before - 1)), weight)
    if node.get("exclude_outside", 0):
        table /= table.sum(axis=1, keepdims=True)
    return table


def _cubic(far: Numbers, a: float) -> Numbers:
    """Weight at a distance. Source: Keys, IEEE TASSP 29(6), 1981, as torch and ONNX use it."""
    near = ((a + 2) * far - (a + 3)) * far**2 + 1
    out = a * (((far - 5) * far + 8) * far - 4)
    found: Numbers = np.where(far <= 1, near, np.where(far < 2, out, 0.0))
    return found


FORMS: dict[str, Form] = {"Resize": _resize, "Upsample": _resize}
HOSTS: dict[str, frozenset[int]] = {
    "Resize": frozenset((1, 2, 3)),
    "Upsample": frozenset((1,)),
}


def refusal(node: Node) -> str:
    """Why a Resize cannot be opened, in a clause; empty where it can."""
    if node.op not in FORMS:
        return ""
    if _coordinates(node) not in _COORDINATES:
        return f"has the coordinates {_coordinates(node)!r}, which torch does not have"
    if node.get("mode", "nearest") not in _MODES:
        return f"has the mode {node.get('mode')!r}, which torch does not have"
    if node.get("antialias", 0):
        return "is smoothed before (antialias), which has no form here"
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keeps the aspect ratio, which has no form here"
    return ""
