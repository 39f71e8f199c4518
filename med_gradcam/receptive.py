"""Where do the cells of each layer lie: the rule of every operation that moves places.

Per axis, with k_e = d (k - 1) + 1: start += ((k_e - 1) / 2 - p_left) * jump, then jump *= s for
convolutions and pools; a transposed convolution divides first. The centre of cell i is
start + i * jump in voxels of the network's input. Source: Araujo, Norris, Sim, "Computing
Receptive Fields of CNNs", Distill 2019; half-pixel rules for interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Three = tuple[float, float, float]
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Axis:
    """Cells along one axis: centre of cell i at start + i * jump, each sees `field` voxels."""

    start: float = 0.0
    jump: float = 1.0
    field: float = 1.0

    def window(self, kernel: int, stride: int, left: float, dilation: int = 1) -> Axis:
        """After a convolution or pool with `left` voxels of padding before the axis."""
        wide = dilation * (kernel - 1) + 1
        return Axis(
            self.start + ((wide - 1) / 2 - left) * self.jump,
            self.jump * stride,
            self.field + (wide - 1) * self.jump,
        )

    def transposed(self, kernel: int, stride: int, left: int, dilation: int = 1) -> Axis:
        """After a transposed convolution."""
        wide, jump = dilation * (kernel - 1) + 1, self.jump / stride
        return Axis(
            self.start - ((wide - 1) / 2 - left) * jump, jump, self.field + (wide - 1) * jump
        )

    def resized(self, ratio: float, *, corners: bool) -> Axis:
        """After interpolation by `ratio` = cells out / cells in (corners: (out-1) / (in-1))."""
        jump = self.jump / ratio
        start = self.start if corners else self.start + (1 / ratio - 1) / 2 * self.jump
        return Axis(start, jump, self.field + self.jump)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Cells of a layer along three axes; `agreed` is False where branches that meet disagree."""

    axes: tuple[Axis, Axis, Axis] = (Axis(), Axis(), Axis())
    agreed: bool = True

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

    def same_place(self, other: Lattice) -> bool:
        """Whether start and jump agree to 1e-6 voxels."""
        pairs = zip(self.start + self.jump, other.start + other.jump, strict=True)
        return all(abs(a - b) < 1e-6 for a, b in pairs)


def _three(value: Sequence[int], default: Sequence[int] = (1, 1, 1)) -> tuple[int, ...]:
    numbers = list(value) or list(default)
    return tuple(int(n) for n in (numbers * 3 if len(numbers) == 1 else numbers))


def _axes(lattice: Lattice, change: Callable[[int, Axis], Axis]) -> Lattice:
    a, b, c = (change(n, axis) for n, axis in enumerate(lattice.axes))
    return Lattice((a, b, c), lattice.agreed)


def _convolution(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice:
    del out
    kernel, stride, padding, dilation = (
        tuple(args[1].shape[2:]),
        _three(args[3]),
        _three(args[4]),
        _three(args[5]),
    )

    def change(n: int, axis: Axis) -> Axis:
        make = axis.transposed if args[6] else axis.window
        return make(kernel[n], stride[n], padding[n], dilation[n])

    return _axes(lattice, change)


def _pool(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice:
    del out
    kernel = _three(args[1])
    stride = _three(args[2] if len(args) > 2 else (), kernel)
    padding = _three(args[3] if len(args) > 3 else (), (0, 0, 0))
    return _axes(lattice, lambda n, axis: axis.window(kernel[n], stride[n], padding[n]))


def _max_pool(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice:
    if len(args) <= 4:
        return _pool(lattice, args, out)
    kernel, dilation = _three(args[1]), _three(args[4])
    stride, padding = _three(args[2], kernel), _three(args[3])
    return _axes(
        lattice, lambda n, axis: axis.window(kernel[n], stride[n], padding[n], dilation[n])
    )


def _shrink(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice | None:
    before, after = args[0].shape[-3:], out.shape[-3:]
    if any(b % a for b, a in zip(before, after, strict=True)):
        return None
    ratio = [b // a for b, a in zip(before, after, strict=True)]
    return _axes(lattice, lambda n, axis: axis.window(ratio[n], ratio[n], 0))


def _pad(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice:
    del out
    sides = list(args[1]) + [0] * 6
    left = (sides[4], sides[2], sides[0])  # torch pads the last axis first
    return _axes(
        lattice, lambda n, axis: Axis(axis.start - left[n] * axis.jump, axis.jump, axis.field)
    )


def _resize(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice:
    before, after = args[0].shape[-3:], out.shape[-3:]
    corners = len(args) > 2 and args[2] is True

    def change(n: int, axis: Axis) -> Axis:
        if corners and after[n] > 1:
            return axis.resized((after[n] - 1) / max(before[n] - 1, 1), corners=True)
        return axis.resized(after[n] / before[n], corners=False)

    return _axes(lattice, change)


def _slice(lattice: Lattice, args: tuple[Any, ...], out: torch.Tensor) -> Lattice:
    dim = int(args[1]) if len(args) > 1 else 0
    place = (dim % out.ndim) - (out.ndim - 3)
    first = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    if place < 0:
        return lattice
    first = first + args[0].shape[dim] if first < 0 else first
    return _axes(
        lattice,
        lambda n, axis: (
            Axis(axis.start + first * axis.jump, axis.jump * step, axis.field)
            if n == place
            else axis
        ),
    )


RULES: dict[Any, Callable[[Lattice, tuple[Any, ...], torch.Tensor], Lattice | None]] = {
    aten.convolution: _convolution,
    aten.max_pool3d_with_indices: _max_pool,
    aten.avg_pool3d: _pool,
    aten._adaptive_avg_pool3d: _shrink,  # noqa: SLF001 - the operation's public name in aten
    aten.adaptive_max_pool3d: _shrink,
    aten.constant_pad_nd: _pad,
    aten.reflection_pad3d: _pad,
    aten.replication_pad3d: _pad,
    aten.upsample_nearest3d: _resize,
    aten.upsample_trilinear3d: _resize,
    aten.slice: _slice,
}
# Operations that move places about or mix them: the cells behind them are unknown.
SCRAMBLE = {aten.permute, aten.transpose, aten.roll, aten.flip, aten.t, aten.bmm, aten.mm}
