"""What do TorchScript's own words do: arithmetic on plain numbers, lists, texts, and checks?

Operations on tensors are torch's; these are the rest of the language, in Python.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from med_gradcam.errors import ModelError


def _whole_power(base: Any, exponent: Any) -> Any:
    return math.pow(base, exponent) if isinstance(base, float) else base**exponent


def _size(x: torch.Tensor, dim: int | None = None) -> Any:
    return list(x.shape) if dim is None else x.shape[dim]


def _length(value: Any) -> int:
    return value.shape[0] if isinstance(value, torch.Tensor) else len(value)


def _piece(values: Sequence[Any], start: Any = None, end: Any = None, step: int = 1) -> Any:
    return values[start:end:step]


def _put(values: Any, key: Any, value: Any) -> Any:
    values[key] = value
    return values


def _done(change: Callable[..., Any]) -> Callable[..., Any]:
    def changed(values: Any, *args: Any) -> Any:
        change(values, *args)
        return values

    return changed


def _number(kind: type) -> Callable[..., Any]:
    def number(value: Any, *rest: Any) -> Any:
        return kind(value.item() if isinstance(value, torch.Tensor) else value, *rest)

    return number


def _format(text: str, *values: Any) -> str:
    try:
        return text.format(*values)
    except (IndexError, KeyError, ValueError):
        return text


def raised(*args: Any) -> Any:
    """A `raise` in the program."""
    raise ModelError(f"the network refused this input: {str(args[0] if args else '')[:200]}")


def _warned(*args: Any) -> None:
    del args  # the author's hints to programmers


# Where no tensor is among the arguments.
PLAIN: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "add_": operator.iadd,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "mod": math.fmod,
    "pow": _whole_power,
    "neg": operator.neg,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "slice": _piece,
    "str": str,
    "lower": str.lower,
    "upper": str.upper,
    "join": str.join,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "replace": str.replace,
    "split": str.split,
    "strip": str.strip,
    "sum": sum,
    "any": any,
    "all": all,
    "range": lambda *args: list(range(*args)),
    "sorted": sorted,
}
# Whatever is among the arguments.
ALWAYS: dict[str, Callable[..., Any]] = {
    "size": _size,
    "dim": lambda x: x.ndim,
    "numel": lambda x: x.numel(),
    "len": _length,
    "__not__": operator.not_,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__getitem__": operator.getitem,
    "__contains__": operator.contains,
    "_set_item": _put,
    "append": _done(list.append),
    "insert": _done(list.insert),
    "extend": _done(list.extend),
    "clear": _done(operator.methodcaller("clear")),
    "reverse": _done(list.reverse),
    "pop": lambda values, *at: values.pop(*at),
    "list": list,
    "dict": dict,
    "copy": lambda values: values.copy(),
    "keys": lambda table: list(table.keys()),
    "values": lambda table: list(table.values()),
    "items": lambda table: list(table.items()),
    "get": lambda table, *key: table.get(*key),
    "Int": _number(int),
    "IntImplicit": _number(int),
    "Float": _number(float),
    "FloatImplicit": _number(float),
    "Bool": _number(bool),
    "ScalarImplicit": lambda value: value.item() if isinstance(value, torch.Tensor) else value,
    "Scalar": lambda value: value.item() if isinstance(value, torch.Tensor) else value,
    "item": lambda value: value.item() if isinstance(value, torch.Tensor) else value,
    "format": _format,
    "warn": _warned,
    "is_grad_enabled": torch.is_grad_enabled,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__derive_index": lambda turn, start, step: start + turn * step,
    "is_scripting": lambda: True,
    "has_torch_function": lambda *_: False,
}
# The language's own.
PRIM: dict[str, Callable[..., Any]] = {
    "ListConstruct": lambda *values: list(values),
    "TupleConstruct": lambda *values: tuple(values),
    "TupleIndex": operator.getitem,
    "NumToTensor": torch.tensor,
    "RaiseException": raised,
    "Print": _warned,
    "unchecked_cast": lambda value, *_: value,
    "unchecked_unwrap_optional": lambda value, *_: value,
    "Uninitialized": lambda *_: None,
    "device": lambda x: x.device,
    "dtype": lambda x: x.dtype,
    "layout": lambda x: x.layout,
    "shape": lambda x: list(x.shape),
    "is_cuda": lambda x: x.is_cuda,
    "is_mkldnn": lambda x: x.is_mkldnn,
    "is_quantized": lambda x: x.is_quantized,
    "is_sparse": lambda x: x.is_sparse,
    "is_meta": lambda x: x.is_meta,
    "requires_grad": lambda x: x.requires_grad,
    "data": lambda x: x.detach(),
    "min": min,
    "max": max,
    "abs": abs,
    "ListUnpack": tuple,
    "TupleUnpack": tuple,
    "StringIndex": operator.getitem,
    "type": lambda device: device.type,
    "index": lambda device: device.index,
    "itemsize": lambda x: x.itemsize,
    "grad": lambda x: x.grad,
}


def holds_tensor(values: Sequence[Any]) -> bool:
    """Whether a tensor is among some arguments, or in a list or tuple of them."""
    return any(
        isinstance(v, torch.Tensor) or (isinstance(v, (list, tuple)) and holds_tensor(v))
        for v in values
    )
