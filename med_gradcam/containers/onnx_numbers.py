"""What do ONNX operators give for plain numbers, such as the arithmetic on shapes?

The same operators that work on tensors, in numpy: shapes are known without any value of the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from med_gradcam.containers.onnx_node import Node, Numbers, axis_of
from med_gradcam.errors import ModelError

MOST = 2**26  # elements that numbers of a network may have
_KINDS: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
}


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    if math.prod(max(1, int(n)) for n in shape) > MOST:
        raise ModelError(
            f"expected an ONNX network whose constants have at most {MOST} elements, got one that "
            f"makes {' x '.join(str(int(n)) for n in shape)}."
        )
    return tuple(int(n) for n in shape)


def kind(number: int) -> Any:
    """The numpy type of an ONNX element type.

    Raises:
        KeyError: numpy has none.
    """
    return _KINDS[number]


def _div(node: Node, a: Numbers, b: Numbers) -> Any:
    del node
    if a.dtype.kind in "iu":
        return np.trunc(np.divide(a, b)).astype(a.dtype)
    return np.divide(a, b)


def _mod(node: Node, a: Numbers, b: Numbers) -> Any:
    return np.fmod(a, b) if node.get("fmod", 0) else np.mod(a, b)


def _pow(node: Node, a: Numbers, b: Numbers) -> Any:
    del node
    return np.power(a.astype(np.float64), b).astype(a.dtype)


def _cast(node: Node, a: Numbers) -> Any:
    return a.astype(kind(int(node.get("to"))))


def _gather(node: Node, a: Numbers, at: Numbers) -> Any:
    return np.take(a, at, axis=int(node.get("axis", 0)))


def _slice(node: Node, a: Numbers, *given: Numbers | None) -> Any:
    cut: list[slice] = [slice(None)] * a.ndim
    for axis, one in slices(node, a.shape, given).items():
        cut[axis] = slice(one.start, None if one.stop < 0 else one.stop, one.step)
    return a[tuple(cut)]


def slices(node: Node, shape: Sequence[int], given: Sequence[Any]) -> dict[int, range]:
    """The indices that Slice takes along each axis that it cuts."""
    starts, ends, axes, steps = (*given, *[None] * 4)[:4]
    first = node.option("starts", starts)
    last = node.option("ends", ends)
    along = node.option("axes", axes, list(range(len(first))))
    step = node.option("steps", steps, [1] * len(first))
    found = {}
    for a, s, e, by in zip(along, first, last, step, strict=True):
        axis = int(a) % len(shape)
        found[axis] = range(*slice(int(s), int(e), int(by)).indices(shape[axis]))
    return found


def _squeeze(node: Node, a: Numbers, axes: Numbers | None = None) -> Any:
    along = node.option("axes", axes)
    return np.squeeze(a, None if along is None else tuple(along))


def _unsqueeze(node: Node, a: Numbers, axes: Numbers | None = None) -> Any:
    return np.expand_dims(a, tuple(node.option("axes", axes)))


def new_shape(node: Node, old: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The shape that Reshape asks for, its zeros filled in."""
    if node.get("allowzero", 0):
        return [int(n) for n in wanted]
    return [old[n] if size == 0 else int(size) for n, size in enumerate(wanted)]


def _reshape(node: Node, a: Numbers, shape: Numbers | None = None) -> Any:
    return a.reshape(new_shape(node, a.shape, node.option("shape", shape)))


def _transpose(node: Node, a: Numbers) -> Any:
    return np.transpose(a, node.get("perm"))


def _flatten(node: Node, a: Numbers) -> Any:
    axis = axis_of(node, a.ndim, 1)
    return a.reshape(math.prod(a.shape[:axis]), -1)


def _expand(node: Node, a: Numbers, shape: Numbers) -> Any:
    del node
    wanted = np.broadcast_shapes(a.shape, _small(shape.tolist()))
    return np.broadcast_to(a, _small(wanted)).copy()


def _tile(node: Node, a: Numbers, repeats: Numbers) -> Any:
    del node
    _small([n * int(r) for n, r in zip(a.shape, repeats, strict=True)])
    return np.tile(a, tuple(int(r) for r in repeats))


def _filled(node: Node, shape: Numbers) -> Any:
    value = node.get("value")
    filling = np.zeros(1, np.float32) if value is None else np.asarray(value)
    return np.full(_small(shape.reshape(-1).tolist()), filling.reshape(-1)[0], dtype=filling.dtype)


def _range(node: Node, start: Numbers, limit: Numbers, step: Numbers) -> Any:
    del node
    first, last, by = (float(v.reshape(-1)[0]) for v in (start, limit, step))
    _small([max(0, math.ceil((last - first) / by))])
    return np.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(node: Node, a: Numbers, axes: Numbers | None = None) -> Any:
        along = node.option("axes", axes)
        if not along and node.get("noop_with_empty_axes", 0):
            return a
        keep = bool(node.get("keepdims", 1))
        return np.asarray(function(a, axis=tuple(along) if along else None, keepdims=keep), a.dtype)

    return reduce


def split_sizes(node: Node, length: int, given: Any) -> list[int]:
    """How long the parts are that Split makes of an axis."""
    sizes = node.option("split", given)
    if sizes is not None:
        return [int(n) for n in sizes]
    count = int(node.get("num_outputs", node.outputs))
    each = -(-length // count)
    return [max(0, min(each, length - n * each)) for n in range(count)]


def _split(node: Node, a: Numbers, given: Numbers | None = None) -> Any:
    axis = axis_of(node, a.ndim, 0)
    ends = np.cumsum(split_sizes(node, a.shape[axis], given))[:-1]
    parts = tuple(np.split(a, ends, axis))
    return parts if node.outputs > 1 else parts[0]


def _clip(node: Node, a: Numbers, low: Numbers | None = None, high: Numbers | None = None) -> Any:
    least, most = node.option("min", low), node.option("max", high)
    least = least[0] if isinstance(least, list) else least
    most = most[0] if isinstance(most, list) else most
    return a if least is None and most is None else np.clip(a, least, most).astype(a.dtype)


def _scatter(node: Node, a: Numbers, at: Numbers, new: Numbers) -> Any:
    out = a.copy()
    if node.get("reduction", "none") != "none":
        raise node.no_form("adds up numbers, which has no form here")
    out[tuple(np.moveaxis(at, -1, 0))] = new
    return out


def _gather_nd(node: Node, a: Numbers, at: Numbers) -> Any:
    if node.get("batch_dims", 0):
        raise node.no_form("has batch_dims on numbers, which has no form here")
    return a[tuple(np.moveaxis(at, -1, 0))]


def _trilu(node: Node, a: Numbers, k: Numbers | None = None) -> Any:
    by = 0 if k is None else int(k.reshape(-1)[0])
    return np.triu(a, by) if node.get("upper", 1) else np.tril(a, by)


def _arg(function: Callable[..., Any]) -> Callable[..., Any]:
    def arg(node: Node, a: Numbers) -> Any:
        axis = int(node.get("axis", 0))
        if node.get("select_last_index", 0):
            raise node.no_form("has select_last_index on numbers, which has no form here")
        found = function(a, axis=axis)
        return np.expand_dims(found, axis) if node.get("keepdims", 1) else found

    return arg


def _round(node: Node, a: Numbers) -> Any:
    del node
    return np.rint(a)


def _variadic(function: Callable[..., Any]) -> Callable[..., Any]:
    def several(node: Node, first: Numbers, *rest: Numbers) -> Any:
        del node
        for other in rest:
            first = function(first, other)
        return first

    return several


def _concat(node: Node, *parts: Numbers) -> Any:
    return np.concatenate(parts, axis=int(node.get("axis", 0)))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args: function(*args)


NUMBERS: dict[str, Callable[..., Any]] = {
    **{name: _plain(getattr(np, word)) for name, word in (
        ("Add", "add"), ("Sub", "subtract"), ("Mul", "multiply"), ("Neg", "negative"),
        ("Abs", "abs"), ("Floor", "floor"), ("Ceil", "ceil"), ("Sqrt", "sqrt"), ("Exp", "exp"),
        ("Log", "log"), ("Sign", "sign"), ("Sin", "sin"), ("Cos", "cos"), ("Equal", "equal"),
        ("Greater", "greater"), ("Less", "less"), ("GreaterOrEqual", "greater_equal"),
        ("LessOrEqual", "less_equal"), ("And", "logical_and"), ("Or", "logical_or"),
        ("Xor", "logical_xor"), ("Not", "logical_not"), ("Where", "where"),
        ("Reciprocal", "reciprocal"), ("MatMul", "matmul"),
    )},
    "Identity": lambda _, a: a,
    "NonZero": lambda _, a: np.array(np.nonzero(a), dtype=np.int64),
    "Min": _variadic(np.minimum),
    "Max": _variadic(np.maximum),
    "Sum": _variadic(np.add),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Cast": _cast,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "ScatterND": _scatter,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Concat": _concat,
    "Split": _split,
    "Clip": _clip,
    "Trilu": _trilu,
    "Round": _round,
    "ArgMax": _arg(np.argmax),
    "ArgMin": _arg(np.argmin),
    "ReduceSum": _reduce(np.sum),
    "ReduceProd": _reduce(np.prod),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceMean": _reduce(np.mean),
    "Shape": lambda node, a: np.array(shape_of(node, np.shape(a)), dtype=np.int64),
    "Size": lambda _, a: np.array(np.size(a), dtype=np.int64),
}  # fmt: skip


def shape_of(node: Node, shape: Sequence[int]) -> list[int]:
    """What Shape gives, with its attributes start and end."""
    return [int(n) for n in shape][node.get("start", 0) : node.get("end", len(shape))]


def given(node: Node, args: Sequence[Any]) -> Any:
    """What an operator gives for numbers.

    Raises:
        ModelError: they do not fit it.
    """
    if node.op in ("Shape", "Size"):  # of a tensor, too
        shape = tuple(args[0].shape)
        found = shape_of(node, shape) if node.op == "Shape" else math.prod(shape)
        return np.array(found, dtype=np.int64)
    with np.errstate(all="ignore"):
        try:
            made = NUMBERS[node.op](node, *args)
        except (ValueError, IndexError, TypeError, KeyError, MemoryError) as error:
            why = " ".join(str(error).split())[:120]
            raise ModelError(
                f"expected an ONNX network whose shapes go together, its operator {node.op!r} "
                f"fails on them: {why}."
            ) from error
    return made if isinstance(made, tuple) else np.asarray(made)
