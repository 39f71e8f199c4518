"""For each operation with a rule: calls that use it, as functions of some tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from tests.secant.calls import (
    FLAT,
    LINE,
    MASK,
    MEAN,
    PLANE,
    SCALE,
    SHIFT,
    VARIANCE,
    VOLUME,
    Case,
    aten,
    one,
    several,
)
from tests.secant.linear_operations import LINEAR
from tests.secant.pairs import noise

FORBIDDEN = torch.where(MASK, 0.0, -torch.inf).double()


def _bn(a: torch.Tensor, *, training: bool) -> torch.Tensor:
    mean, var = (None, None) if training else (MEAN, VARIANCE)
    return F.batch_norm(a, mean, var, SCALE, SHIFT, training=training)


CURVES: dict[str, list[Case]] = {
    **{
        name: one(function)
        for name, function in {
            "relu": torch.relu,
            "leaky_relu": lambda a: F.leaky_relu(a, 0.2),
            "hardtanh": lambda a: F.hardtanh(a, -0.5, 0.8),
            "hardsigmoid": lambda a: F.hardsigmoid(a * 3),
            "threshold": lambda a: F.threshold(a, 0.3, -2.0),
            "clamp": lambda a: a.clamp(-0.5, 0.7),
            "clamp_min": lambda a: aten.clamp_min(a, 0.2),
            "clamp_max": lambda a: aten.clamp_max(a, 0.2),
            "abs": torch.abs,
            "_prelu_kernel": lambda a: F.prelu(a, torch.tensor([0.1, -0.3, 2.0]).double()),
            "softshrink": lambda a: F.softshrink(a, 0.4),
            "hardshrink": lambda a: F.hardshrink(a, 0.4),
            "round": lambda a: (3 * a).round(),
            "floor": lambda a: (3 * a).floor(),
            "ceil": lambda a: (3 * a).ceil(),
            "sign": lambda a: a.sign(),
            "trunc": lambda a: (3 * a).trunc(),
            "sigmoid": torch.sigmoid,
            "tanh": torch.tanh,
            "silu": F.silu,
            "mish": F.mish,
            "elu": lambda a: F.elu(a, 1.5),
            "celu": lambda a: F.celu(a, 1.5),
            "hardswish": lambda a: F.hardswish(a * 2),
            "log_sigmoid_forward": F.logsigmoid,
            "erf": torch.erf,
            "erfc": torch.erfc,
            "sin": torch.sin,
            "cos": torch.cos,
            "expm1": torch.expm1,
            "exp2": torch.exp2,
            "sinh": torch.sinh,
            "cosh": torch.cosh,
            "atan": torch.atan,
            "asinh": torch.asinh,
            "sinc": torch.sinc,
        }.items()
    },
    **{
        name: one(function, positive=True)
        for name, function in {
            "log1p": torch.log1p,
            "log2": torch.log2,
            "log10": torch.log10,
            "rsqrt": torch.rsqrt,
            "reciprocal": torch.reciprocal,
        }.items()
    },
    "exp": several(one(torch.exp), one(lambda a: (a + FORBIDDEN).exp())),
    "log": several(
        one(torch.log, positive=True),
        one(lambda a: torch.where(MASK, (a * a + 1).log(), a)),
        one(lambda a: torch.where(MASK, a, (a * 0).log())),
    ),
    "sqrt": several(one(torch.sqrt, positive=True), one(lambda a: a.relu().sqrt())),
    "gelu": several(one(F.gelu), one(lambda a: F.gelu(a, approximate="tanh"))),
    "softplus": several(one(F.softplus), one(lambda a: F.softplus(a * 0.02, beta=100.0))),
    "pow": several(
        one(lambda a: a**2),
        one(lambda a: a**3),
        one(lambda a: a**4),
        one(lambda a: a**0.5, positive=True),
        one(lambda a: a**-0.5, positive=True),
        one(lambda a: a**-1, positive=True),
        one(lambda a: (1e-5 * a) ** 0.3, positive=True),
    ),
}


def _mixed(a: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.conv3d(a, w, b, stride=2, padding=1, groups=2)


def _turned(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv_transpose3d(a, w, stride=2, padding=1, output_padding=1)


PRODUCTS: dict[str, list[Case]] = {
    "mul": several(
        one(lambda a, b: a * b, FLAT, (3, 1)),
        one(lambda a: a * a),
        one(lambda a: torch.mul(2.0, a)),
        one(lambda a, b: a * b, FLAT, ()),
        one(lambda a, b: (a * MASK) * 2 * b, FLAT, FLAT),
    ),
    "div": several(
        one(lambda a, b: a / b, FLAT, (3, 1), positive=True),
        one(lambda a, b: a / b, FLAT, ()),
        one(lambda a: 1 / (1 + a * a) + a / torch.full((4,), 3.0) + a / 7),
        one(lambda a: torch.div(2.0, a)),
        one(lambda a: torch.div(2.0, a), positive=True),
        one(lambda a: a / a.norm(dim=1, keepdim=True).clamp_min(1e-6)),
    ),
    "mm": one(lambda a, b: a @ b, (3, 4), (4, 2)),
    "bmm": one(lambda a, b: a @ b, (2, 3, 4), (2, 4, 2)),
    "addmm": several(
        one(lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=-2), (2,), (3, 4), (4, 2)),
        one(lambda a: F.linear(a, noise(5, 4), noise(5)) ** 2, (3, 4)),
    ),
    "baddbmm": one(lambda c, a, b: torch.baddbmm(c, a, b, beta=2), (3, 1), (2, 3, 4), (2, 4, 2)),
    "convolution": several(
        one(_mixed, (2, 4, 5, 6, 4), (6, 2, 3, 3, 3), (6,)), one(_turned, VOLUME, (4, 2, 3, 3, 3))
    ),
    "_convolution": one(
        lambda a, w: aten._convolution.deprecated(
            a, w, None, [1], [1], [1], False, [0], 1, False, False, True
        ),
        LINE,
        (2, 3, 3),
    ),
}

NORMS: dict[str, list[Case]] = {
    "native_batch_norm": several(
        one(lambda a: _bn(a, training=False), VOLUME),
        one(lambda a: _bn(a, training=True), VOLUME),
        one(lambda a: F.instance_norm(a, weight=SCALE, bias=SHIFT), VOLUME),
    ),
    "_native_batch_norm_legit": one(
        lambda a: aten._native_batch_norm_legit.no_stats(a, SCALE, SHIFT, True, 0.1, 1e-5)[0],
        VOLUME,
    ),
    "native_group_norm": several(
        one(lambda a: F.group_norm(a, 2, SCALE, SHIFT), VOLUME),
        one(lambda a: F.group_norm(a, 1), (2, 4, 3)),
    ),
    "native_layer_norm": several(
        one(lambda a: F.layer_norm(a, (4,), SCALE, SHIFT)),
        one(lambda a: F.layer_norm(a, (3, 4), eps=0.1)),
    ),
    "var": several(
        one(lambda a: a.var((0, -1))),
        one(lambda a: a.var(unbiased=False)),
        one(lambda a: a.var(1, correction=0, keepdim=True)),
    ),
    "std": several(one(lambda a: a.std(-1, keepdim=True)), one(lambda a: a.std())),
    "var_mean": one(lambda a: torch.var_mean(a, (1, 2))),
    "std_mean": one(lambda a: torch.std_mean(a, -1, keepdim=True)),
    "linalg_vector_norm": several(
        one(lambda a: a.norm(dim=(0, -1))), one(lambda a: torch.linalg.vector_norm(a, keepdim=True))
    ),
    "_softmax": several(
        one(lambda a: a.softmax(1)),
        one(lambda a: (a * 200).softmax(-1)),
        one(lambda a: a.masked_fill(MASK, -torch.inf).softmax(-1)),
    ),
    "_safe_softmax": one(
        lambda a: torch._safe_softmax(a.masked_fill(a.new_ones(3, 1).cumsum(0) == 2, -torch.inf), 2)
    ),
    "_log_softmax": several(
        one(lambda a: a.log_softmax(1)), one(lambda a: (a * 300).log_softmax(-1))
    ),
    "logsumexp": several(
        one(lambda a: a.logsumexp((0, -1))), one(lambda a: (a * 300).logsumexp(1, keepdim=True))
    ),
}

CHOICES: dict[str, list[Case]] = {
    "maximum": several(
        one(torch.maximum, FLAT, (3, 1)), one(lambda a: torch.maximum(a, torch.tensor(0.3)))
    ),
    "minimum": one(torch.minimum, FLAT, FLAT),
    "amax": several(
        one(torch.amax, ()),
        one(lambda a: (a + FORBIDDEN).amax(-1)),
        one(lambda a: a.amax((0, -1))),
        one(lambda a: a.amax(1, keepdim=True)),
        one(torch.amax),
    ),
    "amin": one(lambda a: a.amin(-2)),
    "max": several(
        one(lambda a: a.max()),
        one(lambda a: a.max(-1)[0]),
        one(lambda a: F.pad(a, (1, 1), value=-torch.inf).max(1, keepdim=True)[0].clamp_min(-9)),
    ),
    "min": several(one(lambda a: a.min(1, keepdim=True)[0]), one(lambda a: a.min())),
    "max_pool2d_with_indices": several(
        one(lambda a: F.max_pool2d(a, 3, 1, 1), PLANE),
        one(lambda a: F.max_pool2d(a, 3, 2, 1, 2, True), PLANE),
        one(lambda a: F.max_pool1d(a, 3, 2), LINE),
    ),
    "max_pool3d_with_indices": several(
        one(lambda a: F.max_pool3d(a, 2), VOLUME),
        one(lambda a: F.max_pool3d(a, 3, 2, 1, ceil_mode=True), VOLUME),
        one(lambda a: F.max_pool3d(a, 3, 1), (3, 5, 4, 5)),
    ),
    "adaptive_max_pool2d": one(lambda a: F.adaptive_max_pool2d(a, (4, 3)), PLANE),
    "adaptive_max_pool3d": one(lambda a: F.adaptive_max_pool3d(a, (3, 2, 3)), VOLUME),
}

# Their rule is not the transpose at one point: a derivative in its place is wrong.
BENT = {**CURVES, **PRODUCTS, **NORMS, **CHOICES}
ALL = {**LINEAR, **BENT}

# Rules of operations that a CPU never calls; they take the arguments of those above.
ELSEWHERE = {
    "cudnn_batch_norm": "CUDA only; the arguments of native_batch_norm, in the same places",
    "miopen_batch_norm": "ROCm only; the arguments of native_batch_norm, in the same places",
}
