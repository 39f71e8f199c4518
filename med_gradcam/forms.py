"""How is a layer's raw output seen as cells (C, i, j, k), and given back as the network wants it?

Tokens (1, N, C), slices folded into the batch (S, C, i, j), images (1, C, i, j) and channels that
come last: where each element of the raw output came from (places.py) says which cell it is. A form
moves numbers and computes nothing. An output (1, C, i, j, k) needs none.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from med_gradcam.places import NEAR, Places, Run, plus
from med_gradcam.receptive import Axis, Lattice, lattice
from med_gradcam.tokens import Beside, Followed

CHANNEL = -1
LEAST_DIMS = 3  # of a raw output that may have a form: a row of numbers is a vector


@dataclass(frozen=True, slots=True)
class Form:
    """A raw output of one scan, and how its elements are those of cells (C, i, j, k).

    `raw`: its shape; `factors`: the sizes that each of its dims is cut into, slowest first, the
    elements without a place left out; `order`: the factors of all dims in the order of the cells'
    channels and axes; `counts`: (C, i, j, k); `rest`: the dim along which elements have no place
    (class and register tokens), and how many there are before and behind; `batch`: the dim in
    which several scans follow each other, slowest; `channels`: the dims with channels in them;
    `sequence`: the places of several axes lie in one dim, as tokens do.
    """

    raw: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    counts: tuple[int, int, int, int]
    rest: tuple[int, int, int] | None = None
    batch: int = 0
    channels: frozenset[int] = frozenset()
    sequence: bool = False

    @property
    def folded(self) -> bool:
        """Whether several scans share a dim with the slices or windows of each."""
        return self.raw[self.batch] != 1 or self.batch != 0

    def cells(self, raw: torch.Tensor) -> torch.Tensor:
        """Cells (n, C, i, j, k) of a raw output for n scans; a view where that can be."""
        placed = raw
        if self.rest is not None:
            dim, before, behind = self.rest
            placed = raw.narrow(dim, before, raw.shape[dim] - before - behind)
        count = raw.shape[self.batch] // self.raw[self.batch]
        flat = [size for sizes in self.factors for size in sizes]
        apart = placed.movedim(self.batch, 0).reshape(count, *flat)
        return apart.permute(0, *(1 + n for n in self.order)).reshape(count, *self.counts)

    def whole(self, cells: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
        """The raw output with these cells (n, C, i, j, k) and this `rest`, in new memory.

        `rest`: what `beside` gave, of one scan or of n.
        """
        count, flat = len(cells), [size for sizes in self.factors for size in sizes]
        apart = cells.clone().reshape(count, *(flat[n] for n in self.order))
        back = [0] * len(self.order)
        for new, old in enumerate(self.order):
            back[old] = new + 1
        sizes = [math.prod(size) for size in self.factors]
        moved = [sizes[self.batch], *(s for n, s in enumerate(sizes) if n != self.batch)]
        placed = apart.permute(0, *back).reshape(count * moved[0], *moved[1:])
        placed = placed.movedim(0, self.batch)
        if self.rest is None:
            return placed
        if rest is None:
            raise ValueError("expected the elements without a place, got none.")
        dim, before, behind = self.rest
        times = [1] * rest.ndim
        times[self.batch] = placed.shape[self.batch] // rest.shape[self.batch]
        rest = rest.repeat(times).to(placed.dtype)
        ends = rest.narrow(dim, 0, before), rest.narrow(dim, before, behind)
        return torch.cat([ends[0], placed, ends[1]], dim)

    def beside(self, raw: torch.Tensor) -> torch.Tensor | None:
        """The elements without a place, those before and then those behind; None for none."""
        if self.rest is None:
            return None
        dim, before, behind = self.rest
        length = raw.shape[dim]
        parts = [raw.narrow(dim, 0, before), raw.narrow(dim, length - behind, behind)]
        return torch.cat(parts, dim)


class _Factor(NamedTuple):
    """One factor of a raw dim: its number among all, and the run that it is along one axis."""

    number: int
    axis: int
    run: Run


def derived(
    shape: Sequence[int], followed: Followed | None, extent: Sequence[int]
) -> tuple[Form | None, Lattice | None] | None:
    """The form and the cells of a raw output of one scan; None where it cannot be seen as cells.

    `extent`: the sides of the input, in voxels. The form is None for (1, C, i, j, k) as it is.
    """
    if len(shape) == 5:
        own = lattice(followed) if isinstance(followed, Places) else None
        found = None if own is not None or followed is None else _form(shape, followed, extent)
        return found or (None, own)
    if followed is None or len(shape) < LEAST_DIMS:
        return None
    return _form(shape, followed, extent)


def _form(
    shape: Sequence[int], followed: Followed, extent: Sequence[int]
) -> tuple[Form, Lattice] | None:
    sizes, rest = list(shape), None
    places = followed if isinstance(followed, Places) else followed.places
    if isinstance(followed, Beside):
        rest = followed.dim, followed.before, followed.behind
        sizes[rest[0]] -= rest[1] + rest[2]
    cut = _factors(sizes, places)
    if cut is None:
        return None
    factors, each = cut
    rows = [[f for f in each if f.axis == axis] for axis in range(3)]
    along = [_axis(row) for row in rows]
    if any(run is None for run in along):
        return None
    counts = [math.prod(f.run.size for f in row) for row in rows]
    if max(counts) == 1:
        return None
    flat = [size for own in factors for size in own]
    placed = [f.number for row in rows for f in sorted(row, key=lambda f: -f.run.step[f.axis])]
    channels = [n for n in range(len(flat)) if n not in placed]
    form = Form(
        tuple(shape),
        factors,
        (*channels, *placed),
        (math.prod(flat[n] for n in channels), counts[0], counts[1], counts[2]),
        rest,
        _batch(sizes, places),
        frozenset(_dim_of(n, factors) for n in channels if flat[n] > 1),
        _in_one_dim(each, factors),
    )
    axes = []
    for n, run in enumerate(along):
        known = run is not None and run.step[n] > NEAR
        jump = run.step[n] if known and run is not None else float(extent[n])
        numbers = places.start[n], jump, places.field[n]
        axes.append(Axis(*(round(number, 9) + 0.0 for number in numbers)))
    apart = plus(places.high, places.low, -1.0)
    return form, Lattice((axes[0], axes[1], axes[2]), apart, places.uneven)


def _in_one_dim(each: Sequence[_Factor], factors: Sequence[Sequence[int]]) -> bool:
    """Whether a raw dim holds the places of several axes."""
    held = {(_dim_of(f.number, factors), f.axis) for f in each if f.run.size > 1}
    return len({dim for dim, _ in held}) < len(held)


def _dim_of(number: int, factors: Sequence[Sequence[int]]) -> int:
    """The raw dim that a factor is a part of."""
    for dim, own in enumerate(factors):
        if number < len(own):
            return dim
        number -= len(own)
    raise IndexError(number)


def _factors(
    sizes: Sequence[int], places: Places
) -> tuple[tuple[tuple[int, ...], ...], list[_Factor]] | None:
    """The sizes that each dim is cut into, and those factors that lie along an axis of the scan.

    None where indices of a factor lie along no one axis, or backwards.
    """
    factors: list[tuple[int, ...]] = []
    placed: list[_Factor] = []
    number = 0
    for size, known in zip(sizes, places.dims, strict=True):
        runs = known or (Run(size),)
        if math.prod(run.size for run in runs) != size:
            return None
        for run in runs:
            axes = [n for n in range(3) if abs(run.step[n]) > NEAR]
            if len(axes) > 1 or any(run.step[n] < 0 for n in axes):
                return None
            if axes:
                placed.append(_Factor(number, axes[0], run))
            number += 1
        factors.append(tuple(run.size for run in runs))
    return tuple(factors), placed


def _axis(row: Sequence[_Factor]) -> Run | None:
    """The factors of an axis as one evenly spaced run; None where they are not one."""
    made = Run(1)
    for one in sorted(row, key=lambda f: f.run.step[f.axis]):
        step, size = one.run.step[one.axis], one.run.size
        if size == 1 and made.size > 1:
            continue
        if made.size > 1 and abs(step - made.step[one.axis] * made.size) > NEAR:
            return None
        made = Run(made.size * size, made.step if made.size > 1 else one.run.step)
    return made


def _batch(sizes: Sequence[int], places: Places) -> int:
    """The dim in which several scans follow each other: the first, or the second of (N, 1, C)."""
    second = len(sizes) == LEAST_DIMS and sizes[1] == 1 and not places.dims[1]
    return 1 if second and places.steps(0) else 0


# ---------------------------------------------------------------- the forms of a network

Forms = dict[tuple[tuple[int, ...], str], Form]
_KNOWN: weakref.WeakKeyDictionary[torch.nn.Module, Forms] = weakref.WeakKeyDictionary()


def remember(net: torch.nn.Module, shape: Sequence[int], forms: Mapping[str, Form | None]) -> None:
    """The forms of a network's layers for inputs of `shape` (C, I, J, K), from their trace."""
    known = _KNOWN.setdefault(net, {})
    for name, form in forms.items():
        if form is None:
            known.pop((tuple(shape), name), None)
        else:
            known[tuple(shape), name] = form


def form_of(net: torch.nn.Module, layer: str, x: torch.Tensor) -> Form | None:
    """The form of a layer for inputs like `x` (n, C, I, J, K); None for (1, C, i, j, k)."""
    known = _KNOWN.get(net)
    # torch.jit.trace has tensors for sizes
    return known.get((tuple(int(n) for n in x.shape[1:]), layer)) if known else None
