"""How do windows that move over a tensor change its places: convolutions, pools, interpolation?

Per axis, with k_e = d (k - 1) + 1: start += ((k_e - 1) / 2 - p_left) * jump, then jump *= s for
convolutions and pools; a transposed convolution divides first. Source: Araujo, Norris, Sim,
"Computing Receptive Fields of CNNs", Distill 2019; for interpolation torch's own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from med_gradcam.places import ZERO, Places, Run, larger, plus

aten = torch.ops.aten
Rule = Callable[[Places, tuple[Any, ...], torch.Tensor], Places | None]


@dataclass(frozen=True, slots=True)
class Window:
    """A kernel along one dim; `left` is the padding before it."""

    kernel: int
    stride: int = 1
    left: float = 0
    dilation: int = 1
    transposed: bool = False


def windowed(places: Places, dim: int, window: Window, size: int) -> Places | None:
    """After a convolution, pool or transposed convolution along one dim, `size` indices long."""
    even = places.even(dim)
    if even is None:
        return None
    wide = window.dilation * (window.kernel - 1) + 1
    offset = (wide - 1) / 2 - window.left
    step, off = even.run.step, even.off
    if window.transposed:
        new = sees = plus(ZERO, step, 1 / window.stride)
        move = plus(even.move, new, -offset)
        off = plus(off, larger(new, ZERO), _uneven(window))
    else:
        new, sees = plus(ZERO, step, window.stride), step
        move = plus(even.move, step, offset)
    field = larger(plus(ZERO, sees, wide - 1), ZERO)
    return places.with_run(dim, Run(size, new), move, field, off)


def _uneven(window: Window) -> float:
    """How far the indices of a transposed convolution are off an even spacing, in their own steps.

    Index o takes the taps t with (o + left - t) divisible by the stride; their mean is not the
    kernel's middle for every o.
    """
    taps = [window.dilation * n for n in range(window.kernel)]
    phases = [[t for t in taps if t % window.stride == o] for o in range(window.stride)]
    return max(abs(taps[-1] / 2 - sum(own) / len(own)) for own in phases if own)


def _all(value: Any, count: int, default: Sequence[int] = (1,)) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value) or list(default)
    return [int(n) for n in (numbers * count if len(numbers) == 1 else numbers)]


def _windows(places: Places, windows: Sequence[Window], out: torch.Tensor) -> Places | None:
    first = out.ndim - len(windows)
    made: Places | None = places
    for n, window in enumerate(windows):
        made = None if made is None else windowed(made, first + n, window, out.shape[first + n])
    return made


def _convolution(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    kernel = list(args[1].shape[2:])
    count = len(kernel)
    stride, padding, dilation = (_all(args[n], count) for n in (3, 4, 5))
    windows = [
        Window(k, s, p, d, bool(args[6]))
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    ]
    channel = out.ndim - count - 1
    return _windows(places.averaged(channel, out.shape[channel]), windows, out)


def _pool(count: int, dilated: int) -> Rule:
    """A pool over `count` dims; its dilation is argument number `dilated`, if it has one."""

    def rule(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
        given = (*args, *[()] * 5)
        kernel = _all(given[1], count)
        stride = _all(given[2], count, kernel)
        padding = _all(given[3], count, (0,))
        dilation = _all(given[dilated], count) if dilated else [1] * count
        rows = zip(kernel, stride, padding, dilation, strict=True)
        return _windows(places, [Window(*row) for row in rows], out)

    return rule


def _adaptive(count: int) -> Rule:
    """Bins from floor(i r) to ceil((i + 1) r), r = cells in / cells out: even only on average."""

    def rule(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
        made: Places | None = places
        for dim in range(out.ndim - count, out.ndim):
            if made is None:
                return None
            before, after = args[0].shape[dim], out.shape[dim]
            step = before / after
            first = (step - 1) / 2
            ends = [(i * before // after, -(-(i + 1) * before // after)) for i in range(after)]
            off = max(abs((a + b - 1) / 2 - first - i * step) for i, (a, b) in enumerate(ends))
            made = _rescaled(made, dim, Look(first, step, off), after)
        return made

    return rule


# -------------------------------------------------------------------------- interpolation


@dataclass(frozen=True, slots=True)
class Look:
    """Index i of a new axis lies at first + i * step of the old one, off by `off` at most."""

    first: float
    step: float
    off: float = 0.0


def _rescaled(places: Places, dim: int, look: Look, size: int) -> Places | None:
    even = places.even(dim)
    if even is None:
        return None
    step = even.run.step
    aside = larger(step, ZERO)
    return places.with_run(
        dim,
        Run(size, plus(ZERO, step, look.step)),
        plus(even.move, step, look.first),
        plus(ZERO, aside, max(look.step, 1.0)),
        plus(even.off, aside, look.off),
    )


def looks(kind: str, before: int, after: int, scale: float | None) -> Look:
    """Where the indices of a resized axis look.

    `kind`: corners, linear (half a pixel), nearest (floor(i r)) or exact (floor((i + 1/2) r)), with
    r = `before` / `after`, or 1 / `scale` where that is given; floors by their mean.
    Source: torch.nn.functional.interpolate.
    """
    if kind == "corners":
        return Look(0.0, (before - 1) / (after - 1) if after > 1 else 1.0)
    ratio = Fraction(before, after) if not scale else 1 / Fraction(scale).limit_denominator(1000)
    p, q = ratio.numerator, ratio.denominator
    if kind == "nearest":
        return Look(-(q - 1) / (2 * q), p / q, (q - 1) / (2 * q))
    if kind == "exact" and p % 2 == 0:
        return Look((p - q + 1) / (2 * q), p / q, (q - 1) / (2 * q))
    return Look((p / q - 1) / 2, p / q, (q - 1) / (2 * q) if kind == "exact" else 0.0)


def _resize(kind: str, count: int) -> Rule:
    def rule(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
        given = list(_flat(args[2:]))
        corners = any(value is True for value in given)
        scales = [v for v in given if isinstance(v, float)]
        scales = scales if len(scales) == count else [0.0] * count
        before, after = args[0].shape[-count:], out.shape[-count:]
        if math.prod(before) == 1 < math.prod(after):
            return None  # one value for all places has none of its own
        made: Places | None = places
        for n in range(count):
            if made is None:
                return None
            look = looks("corners" if corners else kind, before[n], after[n], scales[n])
            made = _rescaled(made, out.ndim - count + n, look, after[n])
        return made

    return rule


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _table() -> Iterator[tuple[str, Rule]]:
    for n, linear in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d")):
        yield f"max_pool{n}d_with_indices", _pool(n, 4)
        yield f"avg_pool{n}d", _pool(n, 0)
        yield f"_adaptive_avg_pool{n}d", _adaptive(n)
        yield f"adaptive_max_pool{n}d", _adaptive(n)
        yield f"upsample_nearest{n}d", _resize("nearest", n)
        yield f"_upsample_nearest_exact{n}d", _resize("exact", n)
        yield f"upsample_{linear}", _resize("linear", n)
    yield "upsample_bicubic2d", _resize("linear", 2)
    yield "convolution", _convolution


WINDOWS: dict[Any, Rule] = {
    getattr(aten, name): rule for name, rule in _table() if hasattr(aten, name)
}
