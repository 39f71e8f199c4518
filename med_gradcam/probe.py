"""Do the cells really lie where the recursion says? A centre-tap probe of the network.

The network is run once more with every kernel reduced to its centre tap, pools to their centre,
norms and activations to the identity; the gradient of one cell then sits at the cell's centre in
the input, borders and weights aside. Nothing of the network is changed: the functions are replaced
on the fly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode

from med_gradcam.forms import form_of

Point = tuple[float, float, float]
Spatial = tuple[int, ...]


def _many(value: Any, count: int) -> Spatial:
    return (int(value),) * count if isinstance(value, int) else tuple(int(v) for v in value)


def _sample(
    x: torch.Tensor, kernel: Spatial, stride: Spatial, padding: Sequence[Any], dilation: Spatial
) -> torch.Tensor:
    """The centre tap of each window of (1, 1, I, J, K); the mean of the middle two for even k."""
    count = len(kernel)
    for axis in range(count):
        k, s, d = kernel[axis], stride[axis], dilation[axis]
        left, right = padding[axis]
        dim = axis + 2
        sides = [0] * 2 * count
        sides[2 * (count - 1 - axis)], sides[2 * (count - 1 - axis) + 1] = left, right
        x = F.pad(x, sides)
        made = (x.shape[dim] - d * (k - 1) - 1) // s + 1
        picks = [d * ((k - 1) // 2), d * (k // 2)]
        parts = [x.narrow(dim, p, (made - 1) * s + 1) for p in sorted(set(picks))]
        slices = [part[(slice(None),) * dim + (slice(None, None, s),)] for part in parts]
        x = slices[0] if len(slices) == 1 else (slices[0] + slices[1]) / 2
    return x


def _at(x: torch.Tensor, dim: int, at: torch.Tensor) -> torch.Tensor:
    """Linear interpolation at fractional indices `at` of one dim."""
    cells = torch.arange(x.shape[dim], device=x.device)
    table = (1 - (at[:, None] - cells[None, :]).abs()).clamp(min=0).to(x.dtype)
    return (x.transpose(dim, -1) @ table.T).transpose(dim, -1)


def _mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over channels; where they are one channel expanded, that one."""
    return x[:, :1] if x.stride(1) == 0 else x.mean(1, keepdim=True)


def _as_channels(one: torch.Tensor, channels: int) -> torch.Tensor:
    return one.expand(-1, channels, *[-1] * (one.ndim - 2))


def _given(names: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _both(padding: Spatial) -> list[tuple[int, int]]:
    return [(p, p) for p in padding]


def _convolve(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    given = _given("bias stride padding dilation groups", args, kwargs)
    kernel = tuple(weight.shape[2:])
    count = len(kernel)
    stride, dilation = _many(given.get("stride", 1), count), _many(given.get("dilation", 1), count)
    padding = given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = _both(_many(0 if padding == "valid" else padding, count))
    return _as_channels(_sample(_mean(x), kernel, stride, sides, dilation), weight.shape[0])


def _transpose(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Linear interpolation between the places where the kernel's centre puts each cell."""
    given = _given("bias stride padding output_padding groups dilation", args, kwargs)
    count = weight.ndim - 2
    stride, padding, extra, dilation = (
        _many(given.get(name, default), count)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    one = _mean(x)
    for axis in range(count):
        s, wide = stride[axis], dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        after = (one.shape[2 + axis] - 1) * s - 2 * padding[axis] + wide + extra[axis]
        cells = torch.arange(after, device=x.device)
        one = _at(one, 2 + axis, (cells - ((wide - 1) / 2 - padding[axis])) / s)
    return _as_channels(one, weight.shape[1] * int(given.get("groups", 1)))


def _pool(x: torch.Tensor, kernel_size: Any, given: dict[str, Any]) -> torch.Tensor:
    count = x.ndim - 2
    kernel, stride = _many(kernel_size, count), given.get("stride")
    step = kernel if stride is None or stride == [] else _many(stride, count)
    sides = _both(_many(given.get("padding", 0), count))
    if given.get("ceil_mode") is True:
        sides = [(a, b + s - 1) for (a, b), s in zip(sides, step, strict=True)]
    one = _sample(_mean(x), kernel, step, sides, _many(given.get("dilation", 1), count))
    return _as_channels(one, x.shape[1])


def _max_pool(x: torch.Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _pool(x, kernel_size, _given("stride padding dilation ceil_mode", args, kwargs))


def _avg_pool(x: torch.Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _pool(x, kernel_size, _given("stride padding ceil_mode", args, kwargs))


def _adaptive(x: torch.Tensor, output_size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.ndim - 3]
    one = pool(_mean(x), output_size)
    return _as_channels(_placeless(one, x.ndim - 2), x.shape[1])


def _averaged(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _placeless(x.mean(*args, **kwargs), 3)


def _spread(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ones_like(x.std(*args, **kwargs)).detach()


def _placeless(x: torch.Tensor, axes: int) -> torch.Tensor:
    """One value for the whole scan has no place: it is taken as a constant."""
    whole = x.ndim < 3 or (x.ndim > axes + 1 and all(n == 1 for n in x.shape[-axes:]))
    return x.detach() if whole else x


def _interpolate(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As it is; nearest neighbours evenly: cells that share one lie on either side of it."""
    given = _given("size scale_factor mode align_corners", args, kwargs)
    mode = given.get("mode", "nearest")
    one = F.interpolate(_mean(x), *args, **kwargs)
    if mode.startswith("nearest"):
        shape, one = one.shape, _mean(x)
        for dim in range(2, x.ndim):
            one = _at(one, dim, _evenly(one.shape[dim], shape[dim], given, dim - 2).to(x.device))
    return _as_channels(one, x.shape[1])


def _evenly(before: int, after: int, given: dict[str, Any], axis: int) -> torch.Tensor:
    """Where torch looks along a resized axis, as the evenly spaced indices nearest to that."""
    scale = given.get("scale_factor")
    if scale is None or given.get("recompute_scale_factor"):
        by, ratio = {"size": after}, before / after
    else:
        scale = float(scale[axis] if isinstance(scale, (tuple, list)) else scale)
        by, ratio = {"scale_factor": scale}, 1 / scale  # type: ignore[dict-item]
    ramp = torch.arange(before, dtype=torch.float64)[None, None]
    looks = F.interpolate(ramp, mode=given.get("mode", "nearest"), **by)[0, 0]  # type: ignore[arg-type]
    even = torch.arange(after, dtype=torch.float64) * ratio
    return even + (looks - even).mean()


def _linear(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return x.mean(-1, keepdim=True).expand(*x.shape[:-1], weight.shape[0])


def _softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention of tokens to themselves alone; any other softmax is a gate."""
    dim = _given("dim", args, kwargs).get("dim")
    if dim in (-1, x.ndim - 1) and x.shape[-1] == x.shape[-2]:
        return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)
    return torch.ones_like(x)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    del query, key, args, kwargs
    out: torch.Tensor = value
    return out


def _heads(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    return _attention(query, key, value, *args, **kwargs), None


def _same(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return x


def _ones(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return torch.ones_like(x)


_IDENTITY = frozenset(
    """
    relu relu_ leaky_relu leaky_relu_ elu elu_ selu gelu silu mish prelu hardswish softplus
    tanh relu6 hardtanh celu rrelu clamp clamp_ clip threshold dropout dropout1d dropout2d dropout3d
    feature_dropout alpha_dropout batch_norm instance_norm group_norm layer_norm rms_norm normalize
    """.split()
)
# On the expanded tensors of the probe work in place would fail, and views of them too.
_OUT_OF_PLACE = {
    **{f"__i{name}__": f"__{name}__" for name in ("add", "sub", "mul", "truediv")},
    **{f"{name}_": name for name in ("add", "sub", "mul", "div")},
    "view": "reshape",
}
_GATES = ("sigmoid", "hardsigmoid", "sigmoid_")
_REPLACED: dict[str, Callable[..., Any]] = {
    **{f"conv{n}d": _convolve for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _transpose for n in (1, 2, 3)},
    **{f"max_pool{n}d": _max_pool for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _avg_pool for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _adaptive for n in (1, 2, 3) for kind in ("max", "avg")},
    "mean": _averaged,
    "std": _spread,
    "var": _spread,
    "interpolate": _interpolate,
    "linear": _linear,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _heads,
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


def _centroid(gradient: torch.Tensor, least: float) -> Point | None:
    """Centre of mass of the gradient of one cell; None where it does not reach the input.

    Values under `least` times the largest are left out.
    """
    weight = gradient.abs().sum(dim=(0, 1)).double()
    weight = weight * (weight > least * weight.max())
    total = float(weight.sum())
    if not 0 < total < math.inf:  # nothing, or NaN
        return None
    centre = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        line = weight.sum(dim=others)
        at = torch.arange(len(line), dtype=line.dtype, device=line.device)
        centre.append(float((line * at).sum() / total))
    return centre[0], centre[1], centre[2]


@dataclass(frozen=True, slots=True)
class _Look:
    """One way to look: the network's functions, what of a cell counts, and what is left out."""

    mode: Callable[[], AbstractContextManager[Any]]
    amount: Callable[[torch.Tensor], torch.Tensor]
    least: float


_NOMINAL = _Look(_CentreTap, torch.sum, 1e-7)
# Gates and norms let each cell see all voxels a little: under 1 % of the largest is left out.
_EFFECTIVE = _Look(nullcontext, lambda values: values.abs().sum(), 0.01)


def cell_centres(
    net: torch.nn.Module, layer: str, shape: Sequence[int], at: Sequence[Spatial]
) -> list[Point | None]:
    """Centres of the cells `at` (indices i, j, k) of a layer in input voxels, or None.

    `shape` is the input's (C, I, J, K). The network must be in eval mode; it is not changed.
    """
    first = next(net.parameters(), torch.empty(0))
    x = torch.zeros((1, *shape), device=first.device, dtype=first.dtype)
    return _looked(net, layer, x, at, _NOMINAL)


def effective_centres(
    net: torch.nn.Module, layer: str, x: torch.Tensor, at: Sequence[Spatial]
) -> list[Point | None]:
    """Where cells of a layer look on an input `x` (1, C, I, J, K), or None where they are silent.

    The centroid of the size of the gradient of sum_k |A_k| of each cell, the network as it is.
    Source: effective receptive field, Luo et al., NeurIPS 2016, arXiv:1701.04128.
    """
    return _looked(net, layer, x.detach().clone(), at, _EFFECTIVE)


def _looked(
    net: torch.nn.Module, layer: str, x: torch.Tensor, at: Sequence[Spatial], look: _Look
) -> list[Point | None]:
    found: list[Point | None] = []
    x.requires_grad = True
    form = form_of(net, layer, x)

    def stop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        cells = output if form is None else form.cells(output)
        for i, j, k in at:
            value = look.amount(cells[0, :, i, j, k])
            reached = torch.autograd.grad(value, x, retain_graph=True, materialize_grads=True)
            found.append(_centroid(reached[0], look.least))
        raise _Stop

    handle = net.get_submodule(layer).register_forward_hook(stop)
    try:
        with torch.enable_grad(), look.mode():
            net(x)
    except _Stop:
        return found
    except (RuntimeError, TypeError, ValueError, IndexError):
        return [None] * len(at)
    finally:
        handle.remove()
    return [None] * len(at)
