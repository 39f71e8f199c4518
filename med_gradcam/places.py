"""Which places of the scan do a tensor's elements stand for, through views, slices and branches?

Element (n0, n1, ...) lies at start + sum over its dims of index * step, in voxels of the network's
input. A dim holds one or more runs in row-major order, the last one fastest: a view cuts and joins
runs, a permutation carries them along. So tokens, windows and patches keep their places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import field as kept

Three = tuple[float, float, float]
ZERO: Three = (0.0, 0.0, 0.0)
NEAR = 1e-6  # voxels: places closer than this are the same


def plus(a: Three, b: Three, times: float = 1.0) -> Three:
    """The vector a + times * b."""
    return a[0] + times * b[0], a[1] + times * b[1], a[2] + times * b[2]


def larger(a: Three, b: Three) -> Three:
    """The larger size per axis."""
    return max(abs(a[0]), abs(b[0])), max(abs(a[1]), abs(b[1])), max(abs(a[2]), abs(b[2]))


def _least(a: Three, b: Three) -> Three:
    return min(a[0], b[0]), min(a[1], b[1]), min(a[2], b[2])


def _most(a: Three, b: Three) -> Three:
    return max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2])


def near(a: Three, b: Three) -> bool:
    """Whether two vectors agree to NEAR voxels."""
    return all(abs(x - y) < NEAR for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, slots=True)
class Run:
    """`size` indices, each `step` voxels (3 axes) further than the one before."""

    size: int
    step: Three = ZERO

    @property
    def reach(self) -> Three:
        """From its first index to its last, in voxels."""
        return plus(ZERO, self.step, self.size - 1)


Runs = tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Even:
    """A dim as one `run`: how far its start moved for that, how far an index is off at most."""

    run: Run
    move: Three = ZERO
    off: Three = ZERO


def _joined(runs: Sequence[Run]) -> Runs:
    """Runs that go on evenly become one; single indices without a step say nothing."""
    out: list[Run] = []
    for run in runs:
        if run.size == 1 and run.step == ZERO:
            continue
        goes_on = bool(out) and near(out[-1].step, plus(ZERO, run.step, run.size))
        out.append(Run(out.pop().size * run.size, run.step) if goes_on else run)
    return tuple(out)


def _cut(runs: list[Run], size: int) -> list[Run] | None:
    """Take from the front of `runs` what makes up `size` indices; None where no cut falls there."""
    if size == 1:
        return [runs.pop(0)] if runs and runs[0].size == 1 else []
    taken: list[Run] = []
    while size > 1:
        if not runs:
            return None
        run = runs.pop(0)
        if size % run.size == 0:
            size //= run.size
        elif run.size % size == 0:
            minor = run.size // size
            runs.insert(0, Run(minor, run.step))
            run, size = Run(size, plus(ZERO, run.step, minor)), 1
        else:
            return None
        taken.append(run)
    return taken


@dataclass(frozen=True, slots=True)
class Places:
    """The places of one tensor's elements.

    `start`: of element (0, 0, ...); `dims`: the runs of each dim; `field`: how far an element sees
    per axis; `low` and `high`: how far before and behind this place the branches that met put an
    element, at most; `uneven`: how far an element is off the even spacing, at most; `root`: what
    this is a slice of.
    """

    start: Three
    dims: tuple[Runs, ...]
    field: Three = (1.0, 1.0, 1.0)
    low: Three = ZERO
    high: Three = ZERO
    uneven: Three = ZERO
    root: Places | None = kept(default=None, compare=False, repr=False)

    def steps(self, dim: int) -> bool:
        """Whether indices of a dim differ in place, or would if there were more than one."""
        return any(run.step != ZERO for run in self.dims[dim])

    def axes(self) -> set[int]:
        """The axes of the scan along which any two elements differ."""
        return {n for runs in self.dims for run in runs for n in range(3) if run.step[n]}

    def even(self, dim: int) -> Even | None:
        """A dim as one evenly spaced run; None if it is not one.

        Indices that share one place (as after a pixel shuffle) are spread evenly about it.
        """
        move, off, out = ZERO, ZERO, Run(1)
        for run in reversed(self.dims[dim]):
            if run.size == 1 and out.size > 1:
                continue  # one index: how far the next would be does not matter
            if out.size == 1:
                out = run if run.size > 1 or run.step != ZERO else out
            elif near(run.step, plus(ZERO, out.step, out.size)):
                out = Run(run.size * out.size, out.step)
            elif out.step == ZERO:
                step = plus(ZERO, run.step, 1 / out.size)
                half = plus(ZERO, step, (out.size - 1) / 2)
                move, off = plus(move, half, -1.0), larger(half, off)
                out = Run(run.size * out.size, step)
            else:
                return None
        return Even(out, move, off)

    def with_run(
        self, dim: int, run: Run, move: Three = ZERO, field: Three = ZERO, off: Three = ZERO
    ) -> Places:
        """The same with another run along a dim.

        Its start is moved, its field and how far it is off an even spacing are enlarged.
        """
        dims = list(self.dims)
        dims[dim] = _joined([run])
        return replace(
            self,
            start=plus(self.start, move),
            dims=tuple(dims),
            field=plus(self.field, field),
            uneven=plus(self.uneven, off),
            root=None,
        )

    def averaged(self, dim: int, size: int) -> Places:
        """After every index of a dim is mixed into each of `size` new ones."""
        middle, reach = ZERO, ZERO
        for run in self.dims[dim]:
            middle, reach = plus(middle, run.reach, 0.5), plus(reach, larger(run.reach, ZERO))
        return self.with_run(dim, Run(size), middle, reach)

    def viewed(self, shape: Sequence[int]) -> Places | None:
        """The same elements in the same order under another shape; None where runs do not fit."""
        left = [run for runs in self.dims for run in runs]
        dims: list[list[Run]] = []
        for size in shape:
            taken = _cut(left, size)
            if taken is None:
                return None
            dims.append(taken)
        if left and dims:
            dims[-1] += left
        return replace(self, dims=tuple(_joined(d) for d in dims), root=None)

    def permuted(self, order: Sequence[int]) -> Places:
        """The dims in another order."""
        return replace(self, dims=tuple(self.dims[n] for n in order))

    def sliced(self, dim: int, first: int, step: int, size: int) -> Places | None:
        """Indices first, first + step, ... of a dim."""
        even = self.even(dim)
        if even is None:
            return None
        move = plus(even.move, even.run.step, first)
        made = self.with_run(dim, Run(size, plus(ZERO, even.run.step, step)), move, off=even.off)
        return replace(made, root=self if self.root is None else self.root)

    def lengthened(self, shape: Sequence[int]) -> Places | None:
        """Single indices repeated to `shape`, new dims in front; None where a place is spread."""
        dims = list(((),) * (len(shape) - len(self.dims)) + self.dims)
        for n, size in enumerate(shape):
            count = math.prod(run.size for run in dims[n])
            if size != count and dims[n]:
                return None
            dims[n] = dims[n] if size == count else (Run(size),)
        return replace(self, dims=tuple(dims))


def _blend(a: Places, b: Places, share: float) -> tuple[Places, Three, Three] | None:
    """Element by element (1 - share) a + share b, and how far b lies from a, from least to most.

    None where the two cannot be compared.
    """
    made, move_b, low, high = a, ZERO, ZERO, ZERO
    for dim in range(len(a.dims)):
        if a.dims[dim] == b.dims[dim]:
            continue
        one, other = a.even(dim), b.even(dim)
        if one is None or other is None:
            return None
        size = max(one.run.size, other.run.size)
        differ = plus(other.run.step, one.run.step, -1.0)
        reach = plus(ZERO, differ, size - 1)
        low, high = plus(low, _least(reach, ZERO)), plus(high, _most(reach, ZERO))
        run = Run(size, plus(one.run.step, differ, share))
        made = made.with_run(dim, run, one.move, off=larger(one.off, other.off))
        move_b = plus(move_b, other.move)
    gap = plus(plus(b.start, move_b), made.start, -1.0)
    made = replace(made, start=plus(made.start, gap, share), root=None)
    return made, plus(low, gap), plus(high, gap)


def met(parts: Sequence[Places]) -> Places | None:
    """Where branches meet, element by element: their mean place, and how far they lie about it."""
    here = parts[0]
    for count, part in enumerate(parts[1:], 2):
        share = 1 / count
        both = _blend(here, part, share)
        if both is None:
            return None
        mean, low, high = both
        field = larger(here.field, part.field)
        uneven = larger(mean.uneven, part.uneven)
        if near(low, ZERO) and near(high, ZERO):
            low = high = ZERO
            mean = here if here.uneven == uneven else mean
        here = replace(
            mean,
            low=_least(plus(here.low, high, -share), plus(part.low, low, 1 - share)),
            high=_most(plus(here.high, low, -share), plus(part.high, high, 1 - share)),
            field=plus(field, larger(low, high)),
            uneven=uneven,
        )
    return here


def joined(parts: Sequence[Places], dim: int, size: int) -> Places | None:
    """Branches side by side along a dim (channels) of `size` in all.

    Slices of one tensor whose starts differ by less than their own step make up one block, as in
    a patch merging: their mean is the block's middle, and nothing is apart.
    """
    if any(part.steps(dim) for part in parts):
        if any(part.axes() != part.averaged(dim, 1).axes() for part in parts):
            return None  # places set side by side, not channels
        parts = [part.averaged(dim, 1) for part in parts]
    flat = [part.with_run(dim, Run(1)) for part in parts]
    whole = met(flat)
    if whole is None:
        return None
    if _one_block(parts, dim):
        whole = replace(whole, low=parts[0].low, high=parts[0].high)
    return whole.with_run(dim, Run(size))


def _one_block(parts: Sequence[Places], dim: int) -> bool:
    roots = {id(part.root) for part in parts}
    first = parts[0]
    if len(roots) != 1 or first.root is None:
        return False
    steps = [run.step for n, runs in enumerate(first.dims) if n != dim for run in runs]
    pitch = [min((abs(s[n]) for s in steps if s[n]), default=0.0) for n in range(3)]
    return all(
        part.dims == first.dims
        and all(
            abs(a - b) < p - NEAR or abs(a - b) < NEAR
            for a, b, p in zip(part.start, first.start, pitch, strict=True)
        )
        for part in parts
    )
