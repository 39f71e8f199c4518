"""Which torch functions do ONNX's operators stand for that move values or pick some of them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from med_gradcam.containers.onnx_node import (
    Form,
    Node,
    axis_of,
    device_of,
    listed,
    scalar,
    tensor,
)
from med_gradcam.containers.onnx_numbers import new_shape, slices, split_sizes


def _reshape(node: Node, x: torch.Tensor, shape: Any = None) -> torch.Tensor:
    wanted = new_shape(node, x.shape, node.option("shape", shape))
    return x.reshape(node.run.rebatched(wanted) if 1 in node.constant or shape is None else wanted)


def _flatten(node: Node, x: torch.Tensor) -> torch.Tensor:
    axis = axis_of(node, x.ndim, 1)
    return x.flatten(1) if axis == 1 < x.ndim else x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.permute(node.get("perm") or tuple(reversed(range(x.ndim))))


def _squeeze(node: Node, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    along = node.option("axes", axes)
    if along is None:
        return x.squeeze()
    for axis in sorted((int(a) % x.ndim for a in along), reverse=True):
        if x.shape[axis] != 1:
            raise ValueError(f"expected an axis of size 1 to squeeze, got {x.shape[axis]}.")
        x = x.squeeze(axis)
    return x


def _unsqueeze(node: Node, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    along = node.option("axes", axes)
    for axis in sorted(int(a) % (x.ndim + len(along)) for a in along):
        x = x.unsqueeze(axis)
    return x


def _expand(node: Node, x: torch.Tensor, shape: Any) -> torch.Tensor:
    wanted = [int(n) for n in listed(shape)]
    if 1 in node.constant:
        wanted = node.run.rebatched(wanted)
    return x.expand(torch.broadcast_shapes(x.shape, tuple(wanted)))


def _tile(node: Node, x: torch.Tensor, repeats: Any) -> torch.Tensor:
    del node
    return x.repeat([int(n) for n in listed(repeats)])


def _concat(node: Node, *parts: Any) -> torch.Tensor:
    where = device_of(parts, node.run)
    return torch.cat([tensor(part, where) for part in parts], int(node.get("axis", 1)))


def _split(node: Node, x: torch.Tensor, given: Any = None) -> Any:
    axis = axis_of(node, x.ndim, 0)
    parts = x.split(split_sizes(node, x.shape[axis], given), axis)
    return parts if node.outputs > 1 else parts[0]


def _slice(node: Node, x: torch.Tensor, *given: Any) -> torch.Tensor:
    for axis, one in slices(node, x.shape, given).items():
        x = _taken(x, axis, one)
    return x


def _taken(x: torch.Tensor, axis: int, at: range) -> torch.Tensor:
    """Evenly spaced indices of one axis; backwards they are turned round after."""
    if at == range(x.shape[axis]):
        return x
    if len(at) == 0:
        return x.narrow(axis, 0, 0)
    ahead = at if at.step > 0 else at[::-1]
    cut = x[(slice(None),) * axis + (slice(ahead[0], ahead[-1] + 1, ahead.step),)]
    return cut if at.step > 0 else cut.flip(axis)


def _gather(node: Node, x: torch.Tensor, at: Any) -> torch.Tensor:
    axis = axis_of(node, x.ndim, 0)
    size = x.shape[axis]
    if isinstance(at, np.ndarray) and at.ndim == 0:
        return x.select(axis, int(at))
    if isinstance(at, np.ndarray) and at.ndim == 1 and (found := _even(at, size)) is not None:
        return _taken(x, axis, found)
    at = tensor(at, x.device)
    at = torch.where(at < 0, at + size, at)
    picked = x.index_select(axis, at.reshape(-1))
    return picked.reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])


def _even(at: Any, size: int) -> range | None:
    """Indices that are evenly spaced, as a range."""
    listed_ = [int(n) % size for n in at]
    step = listed_[1] - listed_[0] if len(listed_) > 1 else 1
    if not listed_ or step <= 0:
        return None
    found = range(listed_[0], listed_[-1] + 1, step)
    return found if listed_ == list(found) else None


def _not_negative(at: torch.Tensor, size: int) -> torch.Tensor:
    return torch.where(at < 0, at + size, at)


def _gather_elements(node: Node, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    axis = axis_of(node, x.ndim, 0)
    return x.gather(axis, _not_negative(at, x.shape[axis]))


def _by_rows(at: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return tuple(_not_negative(at[..., n], shape[n]) for n in range(at.shape[-1]))


def _gather_nd(node: Node, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    batch = int(node.get("batch_dims", 0))
    if not batch:
        return x[_by_rows(at, x.shape)]
    before, count = x.shape[:batch], math.prod(x.shape[:batch])
    flat, rows = x.reshape(count, *x.shape[batch:]), at.reshape(count, *at.shape[batch:])
    which = torch.arange(count, device=x.device).reshape(-1, *[1] * (rows.ndim - 2))
    picked = flat[(which, *_by_rows(rows, flat.shape[1:]))]
    return picked.reshape(*before, *picked.shape[1:])


def _scatter_nd(node: Node, x: torch.Tensor, at: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    add = node.get("reduction", "none") == "add"
    return x.index_put(_by_rows(at, x.shape), new, accumulate=add)


_SCATTER = {"mul": "prod", "max": "amax", "min": "amin", "add": "sum"}


def _scatter_elements(
    node: Node, x: torch.Tensor, at: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    axis, how = axis_of(node, x.ndim, 0), node.get("reduction", "none")
    at = _not_negative(at, x.shape[axis])
    if how == "none":
        return x.scatter(axis, at, new)
    return x.scatter_reduce(axis, at, new, _SCATTER[how])


_PADS = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(
    node: Node, x: torch.Tensor, pads: Any = None, value: Any = None, axes: Any = None
) -> torch.Tensor:
    given = [int(n) for n in node.option("pads", pads)]
    filling = scalar(value) if value is not None else node.get("value", 0.0)
    along = [int(a) % x.ndim for a in (range(x.ndim) if axes is None else listed(axes))]
    count = len(along)
    sides = {a: (given[n], given[n + count]) for n, a in enumerate(along)}
    mode = str(node.get("mode", "constant"))
    changed = [a for a, both in sides.items() if both != (0, 0)]
    if not changed:
        return x
    if mode == "constant":
        return F.pad(x, _flat(sides, min(changed), x.ndim), value=float(filling))
    if _fits(sides, changed, x, mode):
        first = max(2, x.ndim - 3)
        return F.pad(x, _flat(sides, first, x.ndim), mode=_PADS[mode])
    for axis in changed:
        x = x.index_select(
            axis, torch.from_numpy(_looked(x.shape[axis], sides[axis], mode)).to(x.device)
        )
    return x


def _flat(sides: dict[int, tuple[int, int]], first: int, count: int) -> list[int]:
    return [n for axis in reversed(range(first, count)) for n in sides.get(axis, (0, 0))]


def _fits(
    sides: dict[int, tuple[int, int]], changed: Sequence[int], x: torch.Tensor, mode: str
) -> bool:
    """Whether torch can pad so: a batch and channels, and nothing taken away."""
    if x.ndim not in (3, 4, 5) or min(changed) < 2:
        return False
    less = 1 if mode == "reflect" else 0
    return all(0 <= n <= x.shape[a] - less for a in changed for n in sides[a])


def _looked(size: int, both: tuple[int, int], mode: str) -> Any:
    """Which index each one of a padded axis has its value from."""
    before, behind = both
    ramp = np.arange(size)
    cut = ramp[max(0, -before) : size + min(0, behind)]
    return np.pad(cut, (max(0, before), max(0, behind)), mode=mode)  # type: ignore[call-overload]


def _depth_to_space(node: Node, x: torch.Tensor) -> torch.Tensor:
    b = int(node.get("blocksize"))
    n, c, h, w = x.shape
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    made = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return made.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(node: Node, x: torch.Tensor) -> torch.Tensor:
    b = int(node.get("blocksize"))
    n, c, h, w = x.shape
    made = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return made.reshape(n, c * b**2, h // b, w // b)


def _trilu(node: Node, x: torch.Tensor, k: Any = None) -> torch.Tensor:
    by = 0 if k is None else int(scalar(k))
    return torch.triu(x, by) if node.get("upper", 1) else torch.tril(x, by)


def _cumsum(node: Node, x: torch.Tensor, axis: Any) -> torch.Tensor:
    dim = int(scalar(axis)) % x.ndim
    backwards = bool(node.get("reverse", 0))
    x = x.flip(dim) if backwards else x
    out = x.cumsum(dim)
    out = out - x if node.get("exclusive", 0) else out
    return out.flip(dim) if backwards else out


def _top_k(node: Node, x: torch.Tensor, count: Any = None) -> Any:
    k = int(node.get("k", 0)) if count is None else int(scalar(count))
    axis, largest = axis_of(node, x.ndim, -1), bool(node.get("largest", 1))
    values, places = x.topk(k, axis, largest, bool(node.get("sorted", 1)))
    return (values, places) if node.outputs > 1 else values


def _arg(name: str) -> Form:
    def run(node: Node, x: torch.Tensor) -> torch.Tensor:
        axis, keep = axis_of(node, x.ndim, 0), bool(node.get("keepdims", 1))
        pick = getattr(torch, name)
        if not node.get("select_last_index", 0):
            found: torch.Tensor = pick(x, axis, keepdim=keep)
            return found
        found = pick(x.flip(axis), axis, keepdim=keep)
        return x.shape[axis] - 1 - found

    return run


def _filled(node: Node, shape: Any) -> torch.Tensor:
    value = node.get("value")
    one = np.zeros(1, np.float32) if value is None else np.asarray(value)
    filling = torch.from_numpy(np.array(one)).reshape(-1)[0].to(node.run.device)
    return filling.expand([int(n) for n in listed(shape)])


def _range(node: Node, start: Any, limit: Any, step: Any) -> torch.Tensor:
    made = np.arange(scalar(start), scalar(limit), scalar(step))
    return torch.from_numpy(made).to(node.run.device)


def _nonzero(node: Node, x: torch.Tensor) -> torch.Tensor:
    del node
    return x.nonzero().t()


def _one_hot(node: Node, at: torch.Tensor, depth: Any, values: torch.Tensor) -> torch.Tensor:
    count = int(scalar(depth))
    hot = F.one_hot(_not_negative(at.long(), count), count)
    hot = hot.movedim(-1, axis_of(node, hot.ndim, -1))
    return torch.where(hot.bool(), values[1], values[0])


FORMS: dict[str, Form] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "Scatter": _scatter_elements,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _trilu,
    "CumSum": _cumsum,
    "TopK": _top_k,
    "ArgMax": _arg("argmax"),
    "ArgMin": _arg("argmin"),
    "ConstantOfShape": _filled,
    "Range": _range,
    "NonZero": _nonzero,
    "OneHot": _one_hot,
}
_SECOND = frozenset((1,))
HOSTS: dict[str, frozenset[int]] = {
    **dict.fromkeys(
        "Reshape Squeeze Unsqueeze Expand Tile Split Trilu CumSum TopK OneHot Gather".split(),
        _SECOND,
    ),
    "Slice": frozenset((1, 2, 3, 4)),
    "Pad": frozenset((1, 2, 3)),
    "ConstantOfShape": frozenset((0,)),
    "Range": frozenset((0, 1, 2)),
}


def refusal(node: Node) -> str:
    """Why an operator cannot be opened, in a clause; empty where it can."""
    how = node.get("reduction", "none")
    if node.op == "ScatterND" and how not in ("none", "add"):
        return f"has the reduction {how!r}, which has no form here"
    if node.op == "Pad" and node.get("mode", "constant") not in _PADS:
        return f"has the mode {node.get('mode')!r}, which has no form here"
    return ""
