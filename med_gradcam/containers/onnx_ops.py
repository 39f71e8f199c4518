"""Which torch function does each ONNX operator stand for, and which arguments are plain numbers?

The ordinary functions (F.conv3d, F.instance_norm, F.softmax) are called, which the rest of the
package recognises. Source: onnx/docs/Operators.md and Changelog.md, opsets 7 to 24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from med_gradcam.containers import (
    onnx_ops_norm,
    onnx_ops_recurrent,
    onnx_ops_resize,
    onnx_ops_shape,
    onnx_ops_window,
)
from med_gradcam.containers.onnx_node import Form, Node, device_of, tensor

# The kinds of elements that torch has, by ONNX's numbers.
KINDS: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _plain(function: Callable[..., Any]) -> Form:
    """An operator without attributes that is a function of torch."""
    return lambda _, *args: function(*args)


def _both(function: Callable[..., Any]) -> Form:
    """An operator of two values, of which one may be a number of the file."""

    def run(node: Node, a: Any, b: Any) -> Any:
        where = device_of((a, b), node.run)
        return function(_number(a, where), _number(b, where))

    return run


def _number(value: Any, where: torch.device) -> Any:
    """One number as Python's, many as a tensor."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    return tensor(value, where)


def _swapped(function: Callable[..., Any]) -> Form:
    """As `_both`, of a function whose first argument must be a tensor."""

    def run(node: Node, a: Any, b: Any) -> Any:
        where = device_of((a, b), node.run)
        return function(tensor(a, where), tensor(b, where))

    return run


def _div(a: Any, b: Any) -> Any:
    real = [v for v in (a, b) if isinstance(v, torch.Tensor)]
    if real and not real[0].is_floating_point() and not real[0].is_complex():
        return torch.div(a, b, rounding_mode="trunc")
    return a / b


def _mod(node: Node, a: Any, b: Any) -> Any:
    where = device_of((a, b), node.run)
    a, b = tensor(a, where), tensor(b, where)
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def _pow(a: Any, b: Any) -> Any:
    out = torch.pow(a, b)
    return out.to(a.dtype) if isinstance(a, torch.Tensor) and out.dtype != a.dtype else out


def _variadic(function: Callable[..., Any]) -> Form:
    def run(node: Node, *args: Any) -> Any:
        where = device_of(args, node.run)
        made = [tensor(value, where) for value in args]
        out = made[0]
        for other in made[1:]:
            out = function(out, other)
        return out

    return run


def _mean(node: Node, *args: Any) -> Any:
    return _variadic(torch.add)(node, *args) / len(args)


def _with(function: Callable[..., Any], **named: float) -> Form:
    """A function of torch whose settings are attributes, here with ONNX's defaults."""

    def run(node: Node, x: torch.Tensor) -> Any:
        given = {name: float(node.get(name, default)) for name, default in named.items()}
        return function(x, *given.values())

    return run


def _selu(x: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    usual = math.isclose(alpha, 1.6732632, rel_tol=1e-6) and math.isclose(
        gamma, 1.050701, rel_tol=1e-6
    )
    return F.selu(x) if usual else gamma * F.elu(x, alpha)


def _hard_sigmoid(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _above(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return F.threshold(x, alpha, 0.0)


def _swish(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def _gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


def _prelu(node: Node, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """PRelu's slopes have the shape of x behind the batch; torch wants one per channel."""
    del node
    per_channel = slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0] == x.shape[1]
    if slope.numel() == 1 or per_channel:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x >= 0, x, slope * x)


def _clip(node: Node, x: torch.Tensor, low: Any = None, high: Any = None) -> torch.Tensor:
    least, most = node.option("min", low), node.option("max", high)
    least = least[0] if isinstance(least, list) else least
    most = most[0] if isinstance(most, list) else most
    return torch.clamp(x, least, most) if least is not None or most is not None else x


def _cast(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.to(KINDS[int(node.get("to"))])


def _cast_like(node: Node, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    del node
    return x.to(like.dtype)


def _where(node: Node, condition: Any, a: Any, b: Any) -> torch.Tensor:
    where = device_of((condition, a, b), node.run)
    return torch.where(tensor(condition, where), tensor(a, where), tensor(b, where))


def _gemm(node: Node, a: torch.Tensor, b: torch.Tensor, c: Any = None) -> torch.Tensor:
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    a = a.t() if node.get("transA", 0) else a
    weight = b if node.get("transB", 0) else b.t()
    if alpha == 1.0 and (c is None or (beta == 1.0 and c.ndim == 1 and len(c) == len(weight))):
        return F.linear(a, weight, c)
    out = alpha * F.linear(a, weight)
    return out if c is None else out + beta * c


def _matmul(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if {1} & (node.weights | node.constant) and b.ndim == 2 and a.ndim > 1:
        return F.linear(a, b.t())
    return torch.matmul(a, b)


def _einsum(node: Node, *args: torch.Tensor) -> torch.Tensor:
    return torch.einsum(node.get("equation"), *args)


def _same(node: Node, x: Any, *rest: Any) -> Any:
    del node, rest
    return x


def _is_inf(node: Node, x: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if node.get("detect_positive", 1):
        found = found | torch.isposinf(x)
    return found | torch.isneginf(x) if node.get("detect_negative", 1) else found


_TWO: dict[str, Form] = {
    "Add": _both(lambda a, b: a + b),
    "Sub": _both(lambda a, b: a - b),
    "Mul": _both(lambda a, b: a * b),
    "Div": _both(_div),
    "Pow": _both(_pow),
    "Mod": _mod,
    "Equal": _swapped(torch.eq),
    "Greater": _swapped(torch.gt),
    "Less": _swapped(torch.lt),
    "GreaterOrEqual": _swapped(torch.ge),
    "LessOrEqual": _swapped(torch.le),
    "And": _swapped(torch.logical_and),
    "Or": _swapped(torch.logical_or),
    "Xor": _swapped(torch.logical_xor),
    "Where": _where,
    "Min": _variadic(torch.minimum),
    "Max": _variadic(torch.maximum),
    "Sum": _variadic(torch.add),
    "Mean": _mean,
}
_ONE: dict[str, Form] = {
    "Relu": _plain(F.relu),
    "LeakyRelu": _with(F.leaky_relu, alpha=0.01),
    "PRelu": _prelu,
    "ThresholdedRelu": _with(_above, alpha=1.0),
    "Elu": _with(F.elu, alpha=1.0),
    "Selu": _with(_selu, alpha=1.6732632, gamma=1.050701),
    "Celu": _with(F.celu, alpha=1.0),
    "Sigmoid": _plain(torch.sigmoid),
    "HardSigmoid": _with(_hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": _plain(F.hardswish),
    "Swish": _with(_swish, alpha=1.0),
    "Tanh": _plain(torch.tanh),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Mish": _plain(F.mish),
    "Gelu": _gelu,
    "Clip": _clip,
    "Erf": _plain(torch.erf),
    "Sqrt": _plain(torch.sqrt),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Abs": _plain(torch.abs),
    "Neg": _plain(torch.neg),
    "Reciprocal": _plain(torch.reciprocal),
    "Floor": _plain(torch.floor),
    "Ceil": _plain(torch.ceil),
    "Round": _plain(torch.round),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Cos": _plain(torch.cos),
    "Tan": _plain(torch.tan),
    "Atan": _plain(torch.atan),
    "Not": _plain(torch.logical_not),
    "IsNaN": _plain(torch.isnan),
    "IsInf": _is_inf,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Identity": _same,
    "Dropout": _same,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
}
FORMS: dict[str, Form] = {
    **_ONE,
    **_TWO,
    **onnx_ops_window.FORMS,
    **onnx_ops_norm.FORMS,
    **onnx_ops_shape.FORMS,
    **onnx_ops_resize.FORMS,
    **onnx_ops_recurrent.FORMS,
}
# The arguments that are plain numbers; of operators of two values any may be.
_ANY = frozenset(range(2))
HOSTS: dict[str, frozenset[int]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Mod"), _ANY),
    "Clip": frozenset((1, 2)),
    "Dropout": frozenset((1, 2)),
    **onnx_ops_norm.HOSTS,
    **onnx_ops_shape.HOSTS,
    **onnx_ops_resize.HOSTS,
}
# Of these, numbers are taken as they come: nothing makes a constant a number for their sake.
EITHER = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Gather"))
# What comes out of these does not change smoothly with what goes in.
NO_GRADIENT = frozenset(
    """
    ArgMax ArgMin NonZero Floor Ceil Round Sign Equal Greater Less GreaterOrEqual LessOrEqual
    And Or Xor Not IsNaN IsInf Shape Size OneHot
    """.split()
)


def call(node: Node, form: Form, args: list[Any]) -> Any:
    """Run an operator; of its arguments those that are no plain numbers become tensors."""
    hosts = HOSTS.get(node.op, frozenset())
    where = device_of(args, node.run)
    made = [
        value if value is None or n in hosts else tensor(value, where)
        for n, value in enumerate(args)
    ]
    return form(node, *made)


def refusal(node: Node) -> str:
    """Why an operator cannot be opened, in a clause; empty where it can."""
    if node.op == "Dropout" and node.outputs > 1:
        return "puts out its mask, which has no form here"
    if node.op == "Cast" and int(node.get("to", 1)) not in KINDS:
        return f"makes elements of kind {node.get('to')}, which torch does not have"
    for part in (onnx_ops_window, onnx_ops_norm, onnx_ops_shape, onnx_ops_resize):
        if why := part.refusal(node):
            return str(why)
    return onnx_ops_recurrent.refusal(node)
