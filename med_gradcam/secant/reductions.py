"""The rules of `secant` for operations that reduce: norms, variance, maxima, pools.

Each is written as the simpler operations it stands for (mean, square, root, quotient, a maximum
over a window) and their rules in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from med_gradcam.secant.rules import Multipliers, Pair, Rule, axes, cross, with_axes
from med_gradcam.secant.tape import Seen, aten


def normalised(
    a: torch.Tensor, b: torch.Tensor, dims: Sequence[int], eps: float, g: torch.Tensor
) -> torch.Tensor:
    """Multipliers of (a - mean) / sigma, sigma^2 = var + eps over `dims`, g being the output's.

    The quotient's rule (rules.py): a reference without any variance gives no huge numbers.
    """
    dims = list(dims)
    a, b = (v - v.mean(dims, keepdim=True) for v in (a, b))
    sigma, sigma0 = ((v.square().mean(dims, keepdim=True) + eps).sqrt() for v in (a, b))
    middle = (sigma + sigma0) / 2
    count = a.numel() // middle.numel()
    m_sigma = (g * (a / sigma + b / sigma0)).sum(dims, keepdim=True) / (-2 * middle)
    m = g / middle + (a + b) * (m_sigma / (2 * middle * count))
    return m - m.mean(dims, keepdim=True)


def _value(seen: Any, shape: Sequence[int]) -> torch.Tensor | None:
    return seen.of().reshape(shape) if isinstance(seen, Seen) else None


def _scaled(g: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return g if weight is None else g * weight


def _first(pair: Pair, m: torch.Tensor) -> Multipliers:
    return [m, *[None] * (len(pair.a) - 1)]


def own_statistics(func: Any, args: Sequence[Any]) -> bool:
    """Whether a batch norm uses the statistics of what it takes in, not stored ones."""
    if func.overloadpacket is aten._native_batch_norm_legit_no_training:  # noqa: SLF001
        return False
    return bool(args[3] if func._overloadname == "no_stats" else args[5])  # noqa: SLF001


def batch_norm(pair: Pair, g: Multipliers) -> Multipliers:
    """Batch norm: linear by its stored statistics; by the scan's own, a norm over places."""
    if g[0] is None:
        return [None] * len(pair.a)
    args = pair.case.args
    ndim = len(pair.a[0].shape)
    shape = (1, -1, *[1] * (ndim - 2))
    weight, eps = _value(args[1], shape), float(args[-1])
    if own_statistics(pair.case.func, args):
        dims = (0, *range(2, ndim))
        return _first(pair, normalised(*pair.values(), dims, eps, _scaled(g[0], weight)))
    root = (args[4].of().reshape(shape) + eps).rsqrt()
    return _first(pair, g[0] * _scaled(root, weight))


def group_norm(pair: Pair, g: Multipliers) -> Multipliers:
    """Group norm over (N, C, places)."""
    if g[0] is None:
        return [None] * len(pair.a)
    _, weight, _, count, channels, _, groups, eps = pair.case.args
    a, b = pair.values()
    shape = (1, channels, *[1] * (a.ndim - 2))
    scaled = _scaled(g[0], _value(weight, shape))
    rows = [v.reshape(count, groups, -1) for v in (a, b, scaled)]
    return _first(pair, normalised(rows[0], rows[1], (2,), eps, rows[2]).reshape(a.shape))


def layer_norm(pair: Pair, g: Multipliers) -> Multipliers:
    """Layer norm over the last axes."""
    if g[0] is None:
        return [None] * len(pair.a)
    _, shape, weight, _, eps = pair.case.args
    a, b = pair.values()
    dims = range(a.ndim - len(shape), a.ndim)
    return _first(pair, normalised(a, b, dims, eps, _scaled(g[0], _value(weight, shape))))


# ---------------------------------------------------------------------------------- variance


def spread(pair: Pair, g: Multipliers) -> Multipliers:
    """Variance or standard deviation (the first output), and the mean beside it."""
    dims, _ = axes(pair)
    keep = bool(pair.case.kwargs.get("keepdim", False))
    correction = pair.case.kwargs.get("correction")
    centred = [v - v.mean(dims, keepdim=True) for v in pair.values()]
    count = math.prod(pair.a[0].shape[d] for d in dims)
    rest = count - (1 if correction is None else correction)
    m = torch.zeros_like(centred[0])
    if g[0] is not None:
        of = with_axes(g[0], dims, keep=keep)
        if "std" in pair.packet:
            sd = [(v * v).sum(dims, keepdim=True).div(rest).sqrt() for v in centred]
            of = _share(of, sd[0] + sd[1])
        m = of * (centred[0] + centred[1]) / rest
        m = m - m.mean(dims, keepdim=True)
    if len(g) > 1 and g[1] is not None:
        m = m + with_axes(g[1], dims, keep=keep) / count
    return [m]


def _share(g: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.where(total > 0, g / total, 0.0)


def vector_norm(pair: Pair, g: Multipliers) -> Multipliers | None:
    """The length of a vector: root of a sum of squares."""
    if float(pair.argument(1, "ord", 2)) != 2.0:
        return None
    if g[0] is None:
        return [None]
    ndim = len(pair.a[0].shape)
    given = pair.argument(2, "dim")
    dims = sorted(d % ndim for d in (range(ndim) if given is None else given))
    a, b = pair.values()
    total = sum(torch.linalg.vector_norm(v, 2, dims, keepdim=True) for v in (a, b))
    of = with_axes(g[0], dims, keep=bool(pair.argument(3, "keepdim", default=False)))
    return [_share(of, total) * (a + b)]


# ---------------------------------------------------------------------------------- maxima


def amax(pair: Pair, g: Multipliers) -> Multipliers:
    """amax, amin over some axes; max(dim), min(dim) with its places; max() of everything."""
    if g[0] is None:
        return [None]
    sign = -1 if "min" in pair.packet else 1
    ndim = len(pair.a[0].shape)
    dims, keep = axes(pair) if len(pair.case.args) > 1 else (list(range(ndim)), False)
    rest = [d for d in range(ndim) if d not in dims]
    rows = [
        sign * v.permute([*rest, *dims]).reshape([*(v.shape[d] for d in rest), -1])
        for v in pair.values()
    ]
    out = g[0].squeeze(dims) if keep else g[0]
    best = [row.max(-1, keepdim=True) for row in rows]
    m = cross(rows[0], rows[1], (best[0], best[1]), (out.unsqueeze(-1), -1))
    shape = [pair.a[0].shape[d] for d in (*rest, *dims)]
    back = sorted(range(ndim), key=lambda n: (*rest, *dims)[n])
    return [m.reshape(shape).permute(back)]


def max_pool(places: int) -> Rule:
    """Max pooling over the last `places` axes, strided or adaptive; windows may overlap."""

    def rule(pair: Pair, g: Multipliers) -> Multipliers:
        if g[0] is None:
            return [None]
        a, b = (v.flatten(-places) for v in pair.values())
        best = [
            tuple(seen.of().flatten(-places) for seen in entry.kept)
            for entry in (pair.case, pair.reference)
        ]
        m = cross(a, b, (best[0], best[1]), (g[0].flatten(-places), -1))
        return [m.reshape(pair.a[0].shape)]

    return rule


POOLS = {
    aten.max_pool2d_with_indices: max_pool(2),
    aten.max_pool3d_with_indices: max_pool(3),
    aten.adaptive_max_pool2d: max_pool(2),
    aten.adaptive_max_pool3d: max_pool(3),
}
