"""Do the cells really lie where the recursion says? A centre-tap probe of the network.

The network is run once more with every kernel reduced to its centre tap, pools to their centre,
norms and activations to the identity; the gradient of one cell then sits at the cell's centre in
the input, borders and weights aside. Nothing of the network is changed: the functions are replaced
on the fly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode

Point = tuple[float, float, float]
Spatial = tuple[int, ...]


def _three(value: Any) -> Spatial:
    return (int(value),) * 3 if isinstance(value, int) else tuple(int(v) for v in value)


def _sample(
    x: torch.Tensor, kernel: Spatial, stride: Spatial, padding: Sequence[Any], dilation: Spatial
) -> torch.Tensor:
    """The centre tap of each window of (1, 1, I, J, K); the mean of the middle two for even k."""
    for axis in range(3):
        k, s, d = kernel[axis], stride[axis], dilation[axis]
        left, right = padding[axis]
        dim = axis + 2
        sides = [0] * 6
        sides[2 * (2 - axis)], sides[2 * (2 - axis) + 1] = left, right
        x = F.pad(x, sides)
        count = (x.shape[dim] - d * (k - 1) - 1) // s + 1
        picks = [d * ((k - 1) // 2), d * (k // 2)]
        parts = [x.narrow(dim, p, (count - 1) * s + 1) for p in sorted(set(picks))]
        slices = [part[(slice(None),) * dim + (slice(None, None, s),)] for part in parts]
        x = slices[0] if len(slices) == 1 else (slices[0] + slices[1]) / 2
    return x


def _mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over channels; where they are one channel expanded, that one."""
    return x[:, :1] if x.stride(1) == 0 else x.mean(1, keepdim=True)


def _given(names: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _both(padding: Spatial) -> list[tuple[int, int]]:
    return [(p, p) for p in padding]


def _convolve(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    given = _given("bias stride padding dilation groups", args, kwargs)
    kernel, stride = tuple(weight.shape[2:]), _three(given.get("stride", 1))
    dilation, padding = _three(given.get("dilation", 1)), given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = _both(_three(0 if padding == "valid" else padding))
    one = _sample(_mean(x), kernel, stride, sides, dilation)
    return one.expand(-1, weight.shape[0], -1, -1, -1)


def _transpose(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Linear interpolation between the places where the kernel's centre puts each cell."""
    given = _given("bias stride padding output_padding groups dilation", args, kwargs)
    stride, padding = _three(given.get("stride", 1)), _three(given.get("padding", 0))
    extra, dilation = _three(given.get("output_padding", 0)), _three(given.get("dilation", 1))
    one = _mean(x)
    for axis in range(3):
        s, wide = stride[axis], dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        before = one.shape[2 + axis]
        after = (before - 1) * s - 2 * padding[axis] + wide + extra[axis]
        at = (torch.arange(after, device=x.device) - ((wide - 1) / 2 - padding[axis])) / s
        cells = torch.arange(before, device=x.device)
        table = (1 - (at[:, None] - cells[None, :]).abs()).clamp(min=0).to(x.dtype)
        one = (one.transpose(2 + axis, 4) @ table.T).transpose(2 + axis, 4)
    return one.expand(-1, weight.shape[1] * int(given.get("groups", 1)), -1, -1, -1)


def _pool(x: torch.Tensor, kernel_size: Any, given: dict[str, Any]) -> torch.Tensor:
    kernel = _three(kernel_size)
    stride = given.get("stride")
    step = kernel if stride is None or stride == [] else _three(stride)
    sides = _both(_three(given.get("padding", 0)))
    if given.get("ceil_mode") is True:
        sides = [(a, b + s - 1) for (a, b), s in zip(sides, step, strict=True)]
    one = _sample(_mean(x), kernel, step, sides, _three(given.get("dilation", 1)))
    return one.expand(-1, x.shape[1], -1, -1, -1)


def _max_pool(x: torch.Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _pool(x, kernel_size, _given("stride padding dilation ceil_mode", args, kwargs))


def _avg_pool(x: torch.Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _pool(x, kernel_size, _given("stride padding ceil_mode", args, kwargs))


def _adaptive(x: torch.Tensor, output_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return F.adaptive_avg_pool3d(_mean(x), output_size).expand(-1, x.shape[1], -1, -1, -1)


def _interpolate(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Nearest neighbours as linear interpolation: cells that share one lie on either side of it."""
    given = _given("size scale_factor mode align_corners", args, kwargs)
    if given.get("mode", "nearest").startswith("nearest") and x.ndim == 5:
        size, factor = given.get("size"), given.get("scale_factor")
        one = F.interpolate(_mean(x), size, factor, "trilinear", align_corners=False)
        return one.expand(-1, x.shape[1], -1, -1, -1)
    return F.interpolate(x, *args, **kwargs)


def _same(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return x


def _ones(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return torch.ones_like(x)


_IDENTITY = frozenset(
    """
    relu relu_ leaky_relu leaky_relu_ elu elu_ selu gelu silu mish prelu hardswish softplus
    tanh relu6 hardtanh celu rrelu dropout dropout3d alpha_dropout batch_norm instance_norm
    group_norm layer_norm
    """.split()
)
# In-place sums on the expanded tensors of the probe would fail: they are done out of place.
_OUT_OF_PLACE = {"__iadd__": "__add__", "add_": "add", "__imul__": "__mul__", "mul_": "mul"}
_GATES = ("sigmoid", "hardsigmoid", "softmax", "sigmoid_")
_REPLACED: dict[str, Callable[..., torch.Tensor]] = {
    "conv3d": _convolve,
    "conv_transpose3d": _transpose,
    "max_pool3d": _max_pool,
    "avg_pool3d": _avg_pool,
    "_adaptive_max_pool3d": _adaptive,
    "adaptive_max_pool3d": _adaptive,
    "interpolate": _interpolate,
    **dict.fromkeys(_IDENTITY, _same),
    **dict.fromkeys(_GATES, _ones),
}


class _CentreTap(TorchFunctionMode):
    """Answers for convolutions, pools, norms and activations with their centre-tap forms."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "boolean_dispatch" or name.startswith("_max_pool"):
            name = "max_pool3d"
        if name in _OUT_OF_PLACE:
            return getattr(args[0], _OUT_OF_PLACE[name])(*args[1:], **kwargs)
        replaced = _REPLACED.get(name)
        if replaced is None or not (args and isinstance(args[0], torch.Tensor)):
            return func(*args, **kwargs)
        kwargs.pop("inplace", None)
        kwargs.pop("return_indices", None)
        return replaced(*args, **kwargs)


class _Stop(Exception):  # noqa: N818 - it is no error
    """The layer has run; the rest of the network is not needed."""


def _centroid(gradient: torch.Tensor) -> Point | None:
    """Centre of mass of the gradient of one cell; None where it does not reach the input.

    Values under 1 % of the largest are left out: global terms of gates spread over all voxels.
    """
    weight = gradient.abs().sum(dim=(0, 1)).double()
    weight = weight * (weight > 0.01 * weight.max())
    total = float(weight.sum())
    if not total > 0:  # nothing, or NaN
        return None
    centre = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        line = weight.sum(dim=others)
        at = torch.arange(len(line), dtype=line.dtype, device=line.device)
        centre.append(float((line * at).sum() / total))
    return centre[0], centre[1], centre[2]


def cell_centres(
    net: torch.nn.Module, layer: str, shape: Sequence[int], at: Sequence[Spatial]
) -> list[Point | None]:
    """Centres of the cells `at` (indices i, j, k) of a layer in input voxels, or None.

    `shape` is the input's (C, I, J, K). The network must be in eval mode; it is not changed.
    """
    first = next(net.parameters(), torch.empty(0))
    found: list[Point | None] = []
    x = torch.zeros((1, *shape), device=first.device, dtype=first.dtype)
    x.requires_grad = True

    def stop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        for cell in at:
            i, j, k = cell
            value = output[0, :, i, j, k].sum()
            reached = torch.autograd.grad(value, x, retain_graph=True, materialize_grads=True)
            found.append(_centroid(reached[0]))
        raise _Stop

    handle = net.get_submodule(layer).register_forward_hook(stop)
    try:
        with torch.enable_grad(), _CentreTap():
            net(x)
    except _Stop:
        return found
    except (RuntimeError, TypeError, ValueError, IndexError):
        return [None] * len(at)
    finally:
        handle.remove()
    return [None] * len(at)
