"""Where do the cells of each layer lie: the rule of every operation that moves places.

The centre of cell i is start + i * jump in voxels of the network's input. Convolutions, pools and
interpolation are in windows.py; here are views, slices, matrix products and branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from med_gradcam.places import NEAR, ZERO, Places, Run, Three, joined, met, plus
from med_gradcam.windows import WINDOWS, Rule

aten = torch.ops.aten
Known = list[tuple[torch.Tensor, Places]]


@dataclass(frozen=True, slots=True)
class Axis:
    """Cells along one axis: centre of cell i at start + i * jump, each sees `field` voxels."""

    start: float = 0.0
    jump: float = 1.0
    field: float = 1.0


@dataclass(frozen=True, slots=True)
class Lattice:
    """Cells of a layer along three axes.

    `apart`: how far the branches that meet put a cell from each other, at most, in voxels;
    `uneven`: how far a cell lies off the even spacing, at most, as neighbours do that were made
    from one cell.
    """

    axes: tuple[Axis, Axis, Axis] = (Axis(), Axis(), Axis())
    apart: Three = ZERO
    uneven: Three = ZERO

    @property
    def agreed(self) -> bool:
        """Whether the branches that meet here put each cell at the same place."""
        return max(self.apart) < NEAR

    @property
    def jump(self) -> Three:
        """Cell distance in voxels."""
        a, b, c = (x.jump for x in self.axes)
        return a, b, c

    @property
    def start(self) -> Three:
        """Centre of cell 0 in voxels."""
        a, b, c = (x.start for x in self.axes)
        return a, b, c

    @property
    def field(self) -> Three:
        """Receptive field in voxels."""
        a, b, c = (x.field for x in self.axes)
        return a, b, c


def of_input(shape: Sequence[int]) -> Places:
    """The places of the network's input (1, C, I, J, K): each voxel its own."""
    channels, i, j, k = shape[-4:]
    runs = (Run(i, (1.0, 0.0, 0.0)), Run(j, (0.0, 1.0, 0.0)), Run(k, (0.0, 0.0, 1.0)))
    dims = ((), (Run(channels),) if channels > 1 else (), *((run,) for run in runs))
    return Places(ZERO, dims)


def lattice(places: Places | None) -> Lattice | None:
    """The cells of an output (1, C, i, j, k); None unless its axes are those of the scan.

    Channels that stand for different places (patches) count with their mean.
    """
    if places is None or len(places.dims) != 5 or places.steps(0):
        return None
    whole = places.averaged(1, 1)
    axes, uneven = [], whole.uneven
    for n in range(3):
        even = whole.even(2 + n)
        if even is None:
            return None
        step = even.run.step
        if step[n] < NEAR or any(abs(step[m]) > NEAR for m in range(3) if m != n):
            return None
        numbers = whole.start[n] + even.move[n], step[n], whole.field[n]
        axes.append(Axis(*(round(number, 9) + 0.0 for number in numbers)))
        uneven = plus(uneven, even.off)
    return Lattice((axes[0], axes[1], axes[2]), plus(whole.high, whole.low, -1.0), uneven)


def follow(
    packet: Any, args: tuple[Any, ...], known: Known, out: torch.Tensor, turn: int = 0
) -> Places | None:
    """The places of result `turn` of one operation, from the operands whose places are known."""
    if packet in LOST or out.numel() == 0:
        return None
    if packet in _JOINS:
        return _join(packet, args, known, out)
    if packet not in RULES and packet not in _PARTS:
        return _elementwise(known, out)
    first = known[0]
    if first[0] is not args[1 if packet is aten.addmm else 0]:
        return None  # weights that follow from the scan
    if packet in _PARTS:
        return _part(packet, first, args, out, turn)
    return RULES[packet](first[1], args, out)


# ------------------------------------------------------------------- pieces, views, channels


def _pad(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    made: Places | None = places
    sides = list(args[1])  # torch pads the last dim first
    for n in range(len(sides) // 2):
        dim = out.ndim - 1 - n
        if made is not None and (sides[2 * n] or sides[2 * n + 1]):
            made = made.sliced(dim, -sides[2 * n], 1, out.shape[dim])
            made = None if made is None else replace(made, root=None)
    return made


def _slice(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    given = (*args, *[None] * 4)
    dim = int(given[1] or 0) % out.ndim
    length = args[0].shape[dim]
    first, step = int(given[2] or 0), int(args[4]) if len(args) > 4 else 1
    first = max(0, first + length) if first < 0 else first
    if (first, step, out.shape[dim]) == (0, 1, length):
        return places
    return places.sliced(dim, first, step, out.shape[dim])


_PARTS = {aten.select, aten.unbind, aten.split, aten.split_with_sizes, aten.unsafe_split}


def _part(
    packet: Any,
    whole: tuple[torch.Tensor, Places],
    args: tuple[Any, ...],
    out: torch.Tensor,
    turn: int,
) -> Places | None:
    """One index (select, unbind) or one piece (split) along a dim."""
    tensor, places = whole
    given = (*args, *[0] * 3)
    single = packet in (aten.select, aten.unbind)
    dim = int(given[1] if single else given[2]) % tensor.ndim
    length = tensor.shape[dim]
    if packet is aten.select:
        first = int(given[2]) % length
    elif packet is aten.unbind:
        first = turn
    else:
        first = turn * given[1] if isinstance(given[1], int) else sum(given[1][:turn])
    size = 1 if single else out.shape[dim]
    made = places if size == length else places.sliced(dim, first, 1, size)
    if made is None or not single:
        return made
    return replace(made, dims=made.dims[:dim] + made.dims[dim + 1 :])


def _view(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    del args
    return places.viewed(out.shape)


def _unsqueeze(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places:
    dim = int(args[1]) % out.ndim
    return replace(places, dims=(*places.dims[:dim], (), *places.dims[dim:]))


def _permute(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places:
    return places.permuted([int(n) % out.ndim for n in args[1]])


def _transpose(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places:
    order = list(range(out.ndim))
    a, b = (int(n) % out.ndim for n in (args[1:] or (0, -1)))
    order[a], order[b] = b, a
    return places.permuted(order)


def _expand(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    del args
    return places.lengthened(out.shape)


def _repeat(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places:
    del out
    times = list(args[1])
    dims = ((),) * (len(times) - len(places.dims)) + places.dims
    longer = tuple((Run(t), *d) if t > 1 else d for t, d in zip(times, dims, strict=True))
    return replace(places, dims=longer)


def _unfold(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    """Windows along a dim, each laid out along a new last dim."""
    dim = int(args[1]) % len(places.dims)
    even = places.even(dim)
    if even is None:
        return None
    step, stride = even.run.step, int(args[3])
    made = places.with_run(
        dim, Run(out.shape[dim], plus(ZERO, step, stride)), even.move, off=even.off
    )
    return replace(made, dims=(*made.dims, (Run(out.shape[-1], step),)))


def _linear(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    """A matrix product with weights: every index of the last dim goes into each new one."""
    del args
    made = places.averaged(len(places.dims) - 1, out.shape[-1])
    return made if made.axes() == places.axes() else None


def _reduce(places: Places, args: tuple[Any, ...], out: torch.Tensor) -> Places | None:
    """A mean, sum or maximum over dims; one over the scan's axes leaves no place."""
    count = len(places.dims)
    given = args[1] if len(args) > 1 and args[1] not in (None, [], ()) else range(count)
    gone = {int(n) % count for n in ([given] if isinstance(given, int) else given)}
    made = places
    for dim in gone:
        made = made.averaged(dim, 1)
    if made.axes() != places.axes():
        return None
    if out.ndim < count:
        made = replace(made, dims=tuple(d for n, d in enumerate(made.dims) if n not in gone))
    return made


# ------------------------------------------------------------------------------- branches

_JOINS = {aten.cat, aten.stack}


def _join(packet: Any, args: tuple[Any, ...], known: Known, out: torch.Tensor) -> Places | None:
    dim = int(args[1]) % out.ndim if len(args) > 1 else 0
    parts = [places for _, places in known]
    if packet is aten.stack:
        parts = [_unsqueeze(part, (None, dim), out) for part in parts]
    return joined(parts, dim, out.shape[dim])


def _elementwise(known: Known, out: torch.Tensor) -> Places | None:
    """Operands that give every place a value of its own decide; others (gates) are spread."""
    fitting = []
    for tensor, places in known:
        if tensor.ndim <= out.ndim:
            front = out.ndim - tensor.ndim
            fitting.append(
                (
                    (1,) * front + tuple(tensor.shape),
                    replace(places, dims=((),) * front + places.dims),
                )
            )
    own = {
        dim
        for shape, places in fitting
        for dim in range(out.ndim)
        if shape[dim] == out.shape[dim] and places.steps(dim)
    }
    whole = [
        places for shape, places in fitting if all(shape[dim] == out.shape[dim] for dim in own)
    ]
    made = met(whole) if own and whole else None
    return None if made is None else made.lengthened(out.shape)


_PADS = [
    getattr(aten, f"{how}_pad{n}d") for how in ("reflection", "replication") for n in (1, 2, 3)
]
RULES: dict[Any, Rule] = {
    **WINDOWS,
    **dict.fromkeys((aten.constant_pad_nd, *_PADS), _pad),
    aten.slice: _slice,
    aten.unsqueeze: _unsqueeze,
    aten.permute: _permute,
    aten.expand: _expand,
    aten.repeat: _repeat,
    aten.unfold: _unfold,
    **dict.fromkeys((aten.transpose, aten.t), _transpose),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.squeeze), _view),  # noqa: SLF001 - public in aten
    **dict.fromkeys((aten.mm, aten.addmm, aten.linear), _linear),
    **dict.fromkeys(
        (aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std), _reduce
    ),
}
# Operations that move places about or mix them: the cells behind them are unknown.
LOST = {
    getattr(aten, name)
    for name in """
    mv bmm baddbmm roll flip rot90 sort gather index index_select index_put scatter scatter_add
    cumsum grid_sampler_2d grid_sampler_3d _fft_r2c _fft_c2c _fft_c2r as_strided im2col col2im
    """.split()
}
