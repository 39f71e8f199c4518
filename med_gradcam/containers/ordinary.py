"""Which ordinary torch function does an operation of a program stand for?

Programs name operations by their inner forms (aten::_convolution). Called by their ordinary names
the rest of the package, which looks at functions, recognises them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

_CONV: dict[int, Callable[..., torch.Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}


def _convolution(  # noqa: PLR0913, PLR0917 - aten's own arguments
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001
    output_padding: Sequence[int],
    groups: int,
    *switches: Any,
) -> torch.Tensor:
    del switches  # of cuDNN
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    if transposed:
        extra = list(output_padding)
        make = _TRANSPOSED[weight.ndim]
        return make(x, weight, bias, stride, padding, extra, groups, dilation)
    return _CONV[weight.ndim](x, weight, bias, stride, padding, dilation, groups)


def _resized(mode: str) -> Callable[..., torch.Tensor]:
    linear = mode in ("linear", "bilinear", "trilinear", "bicubic")

    def resize(x: torch.Tensor, size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        align = (args[0] if args else kwargs.get("align_corners")) if linear else None
        rest = args[1:] if linear else args
        scales = kwargs.get("scale_factors", rest[0] if rest else None)
        if isinstance(scales, float) or (scales is None and len(rest) > 1):  # one per axis
            scales = list(rest)
        scales = None if scales is None or None in scales else list(scales)
        if size is None:
            return F.interpolate(x, scale_factor=scales, mode=mode, align_corners=align)
        if scales is not None and _sizes(x, scales) == list(size):
            return F.interpolate(x, scale_factor=scales, mode=mode, align_corners=align)
        return F.interpolate(x, size=list(size), mode=mode, align_corners=align)

    return resize


def _sizes(x: torch.Tensor, scales: Sequence[float]) -> list[int]:
    return [int(n * s) for n, s in zip(x.shape[2:], scales, strict=True)]


def _layer_norm(
    x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[torch.Tensor, None, None]:
    return F.layer_norm(x, list(shape), weight, bias, eps), None, None


def _group_norm(  # noqa: PLR0913, PLR0917 - aten's own arguments
    x: torch.Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[torch.Tensor, None, None]:
    del n, c, hw
    return F.group_norm(x, groups, weight, bias, eps), None, None


def _batch_norm(  # noqa: PLR0913, PLR0917 - aten's own arguments
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[torch.Tensor, None, None]:
    return F.batch_norm(x, mean, var, weight, bias, momentum=momentum, eps=eps), None, None


def _trained_batch_norm(  # noqa: PLR0913, PLR0917 - aten's own arguments
    x: torch.Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,  # noqa: FBT001
    momentum: float,
    eps: float,
    *switches: Any,
) -> torch.Tensor:
    """Traced in training mode it would change its running means, which are the user's."""
    del switches
    mean, var = _copies(mean, var) if training else (mean, var)
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(  # noqa: PLR0913, PLR0917 - aten's own arguments
    x: torch.Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    by_input: bool,  # noqa: FBT001
    momentum: float,
    eps: float,
    *switches: Any,
) -> torch.Tensor:
    del switches
    mean, var = _copies(mean, var) if by_input else (mean, var)
    return F.instance_norm(x, mean, var, weight, bias, by_input, momentum, eps)


def _copies(*values: Any) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]


def _max_pool(count: int) -> Callable[..., tuple[torch.Tensor, None]]:
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[count]

    def pooled(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return pool(x, *args, **kwargs), None

    return pooled


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.t(), bias)


_FORMS: dict[str, Callable[..., Any]] = {
    "_convolution": _convolution,
    "convolution": _convolution,
    "upsample_nearest1d": _resized("nearest"),
    "upsample_nearest2d": _resized("nearest"),
    "upsample_nearest3d": _resized("nearest"),
    "_upsample_nearest_exact1d": _resized("nearest-exact"),
    "_upsample_nearest_exact2d": _resized("nearest-exact"),
    "_upsample_nearest_exact3d": _resized("nearest-exact"),
    "upsample_linear1d": _resized("linear"),
    "upsample_bilinear2d": _resized("bilinear"),
    "upsample_trilinear3d": _resized("trilinear"),
    "upsample_bicubic2d": _resized("bicubic"),
    "batch_norm": _trained_batch_norm,
    "instance_norm": _instance_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "max_pool2d_with_indices": _max_pool(2),
    "max_pool3d_with_indices": _max_pool(3),
}


def _in_place(name: str) -> Callable[..., torch.Tensor]:
    make = getattr(F, name)
    return lambda *args: make(*args, inplace=True)


_FORMS |= {
    f"{name}_": _in_place(name)
    for name in "silu mish hardswish hardsigmoid celu selu hardtanh dropout".split()
}


def word(name: str, weight_axes: int | None, *, transposed: bool) -> str:
    """The name of an operation for people: conv3d for _convolution with weights of five axes."""
    if name not in ("_convolution", "convolution") or weight_axes not in _CONV:
        return name.strip("_")
    return f"conv{'_transpose' * transposed}{weight_axes - 2}d"


def function(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The ordinary function for aten's operation `name`; `otherwise` where it is one itself."""
    return _FORMS.get(name, otherwise)
