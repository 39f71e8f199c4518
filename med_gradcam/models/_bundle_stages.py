"""What does one step of a bundle's preprocessing do to a scan, and where do its voxels go?

Every stage takes a View and returns the next one. A View holds the scan twice, in its own unit and
as the steps so far have made it. Source: monai.transforms (grids, roundings, paddings).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ImageError
from med_gradcam.model import Step
from med_gradcam.prepare import apply_steps, fit_steps

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
Three = tuple[float, float, float]
Counts = tuple[int, int, int]
SAME_MM = 1e-3  # MONAI leaves an axis alone whose voxels differ by less
_NOISE = 1e-5  # voxels; what single precision leaves of 0
_RIM = 12  # voxels beside the scan that a cubic spline still feels (0.27^12 = 1e-7)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A scan on its way: `raw` in its own unit and `now` (C, i, j, k) after the steps so far.

    Voxel n along an axis lies at start + n * jump of the scan that came in; `steps` are the
    intensity steps done, fitted.
    """

    raw: Floats
    now: Floats
    start: Three = (0.0, 0.0, 0.0)
    jump: Three = (1.0, 1.0, 1.0)
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> Counts:
        """Voxels along the three axes."""
        i, j, k = self.now.shape[1:]
        return i, j, k


class Stage(Protocol):
    """One step. `turned`: whether it depends on which way the axes run."""

    @property
    def turned(self) -> bool:
        """Whether another order or direction of the axes would change what it does."""
        ...

    def __call__(self, view: View, affine: Matrix) -> View:
        """The next view; `affine` (index -> RAS+ mm) of the scan that came in."""
        ...


@dataclass(frozen=True, slots=True)
class Fill:
    """What lies beside the scan: a `value`, or the nearest voxel's ("edge"), or the minimum."""

    kind: str = "constant"
    value: float = 0.0


# ------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True, slots=True)
class Fixed:
    """Intensity steps whose numbers the bundle gives, or that prepare measures."""

    steps: tuple[Step, ...]
    turned: bool = False

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view after the steps."""
        del affine
        return _stepped(view, fit_steps(view.now, self.steps))


@dataclass(frozen=True, slots=True)
class Scaled:
    """The range between two quantiles (0..1) of the scan to `low`..`high`."""

    quantiles: tuple[float, float]
    low: float
    high: float
    clipped: bool = False
    per_channel: bool = False
    turned: bool = False

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view with its values scaled."""
        del affine
        parts = [c[None] for c in view.now] if self.per_channel else [view.now]
        means, shares = [], []
        for part in parts:
            below, above = (float(np.quantile(part, q)) for q in self.quantiles)
            if above <= below:
                raise ImageError(f"expected a scan with contrast, got {below:g} everywhere.")
            share = (above - below) / (self.high - self.low)
            means.append(below - self.low * share)
            shares.append(share)
        steps = [Step("normalise", (tuple(means), tuple(shares)))]
        if self.clipped:
            steps.append(Step("clip", ((self.low,), (self.high,))))
        return _stepped(view, tuple(steps))


def _stepped(view: View, steps: tuple[Step, ...]) -> View:
    return replace(view, now=apply_steps(view.now, steps), steps=view.steps + steps)


# ----------------------------------------------------------------------------------------- places


def _window(view: View, first: Sequence[int], shape: Sequence[int], fill: Fill) -> View:
    """The voxels from `first` (may be negative) on; what lies beside the scan is filled."""
    if list(first) == [0, 0, 0] and tuple(shape) == view.shape:
        return view
    if min(shape) < 1:
        raise ImageError("expected something to be left of the scan after cropping, got nothing.")
    now = _cut(view.now, first, shape, fill)
    raw = now if view.raw is view.now and fill.kind == "minimum" else None
    a, b, c = (s + f * j for s, f, j in zip(view.start, first, view.jump, strict=True))
    if raw is None:
        raw = _cut(view.raw, first, shape, Fill("minimum"))
    return replace(view, raw=raw, now=now, start=(a, b, c))


def _cut(array: Floats, first: Sequence[int], shape: Sequence[int], fill: Fill) -> Floats:
    ends = [f + n for f, n in zip(first, shape, strict=True)]
    have = array.shape[1:]
    inside = tuple(
        slice(max(f, 0), max(min(e, h), f, 0)) for f, e, h in zip(first, ends, have, strict=True)
    )
    part = array[(slice(None), *inside)]
    if part.shape[1:] == tuple(shape):
        return np.ascontiguousarray(part)
    before = [max(-f, 0) for f in first]
    widths = [(0, 0)] + [
        (b, n - b - m) for b, n, m in zip(before, shape, part.shape[1:], strict=True)
    ]
    if fill.kind == "edge":
        return np.pad(part, widths, mode="edge")
    if fill.kind == "minimum":
        low = part.min(axis=(1, 2, 3))
        return np.stack(
            [np.pad(c, widths[1:], constant_values=m) for c, m in zip(part, low, strict=True)]
        )
    return np.pad(part, widths, constant_values=fill.value)


@dataclass(frozen=True, slots=True)
class Padded:
    """Padded to at least `size` voxels (0: as it is), or to a multiple of `size`."""

    size: Counts
    fill: Fill
    multiple: bool = False
    symmetric: bool = True
    turned: bool = True

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view with voxels added."""
        del affine
        wanted = [
            math.ceil(n / s) * s if self.multiple and s > 0 else max(n, s)
            for n, s in zip(view.shape, self.size, strict=True)
        ]
        before = [
            (w - n) // 2 if self.symmetric else 0 for w, n in zip(wanted, view.shape, strict=True)
        ]
        return _window(view, [-b for b in before], wanted, self.fill)


@dataclass(frozen=True, slots=True)
class Centred:
    """The middle `size` voxels (0: all) of a larger scan."""

    size: Counts
    turned: bool = True

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view without its rims."""
        del affine
        wanted = [min(n, s) if s > 0 else n for n, s in zip(view.shape, self.size, strict=True)]
        first = [max(n // 2 - w // 2, 0) for n, w in zip(view.shape, wanted, strict=True)]
        return _window(view, first, wanted, Fill())


@dataclass(frozen=True, slots=True)
class Foreground:
    """The box around all voxels above `limit`, with a margin."""

    limit: float
    margin: Counts
    allow_smaller: bool
    divisible: Counts
    fill: Fill
    turned: bool = False

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view cropped to its foreground."""
        del affine
        above: npt.NDArray[np.bool_] = np.asarray((view.now > self.limit).any(axis=0))
        if not above.any():
            raise ImageError(
                f"expected voxels above {self.limit:g} to crop the scan to, found none."
            )
        first, shape = [], []
        for axis, (margin, k, n) in enumerate(
            zip(self.margin, self.divisible, view.shape, strict=True)
        ):
            found = np.flatnonzero(
                np.moveaxis(above, axis, 0).reshape(above.shape[axis], -1).any(axis=1)
            )
            start, end = int(found[0]) - margin, int(found[-1]) + 1 + margin
            if self.allow_smaller:
                start, end = max(start, 0), min(end, n)
            size = math.ceil((end - start) / k) * k
            first.append(start - (size - (end - start)) // 2)
            shape.append(size)
        return _window(view, first, shape, self.fill)


@dataclass(frozen=True, slots=True)
class Respaced:
    """Voxels of `spacing_mm` (0: as they are), the first one where the scan's first one is."""

    spacing_mm: Three
    cubic: bool = False

    @property
    def turned(self) -> bool:
        """Which corner stays where it is depends on the axes."""
        return True

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view on the new voxels."""
        move = np.diag([*view.jump, 1.0])
        move[:3, 3] = view.start
        old = affine @ move
        have = np.linalg.norm(old[:3, :3], axis=0)
        want = np.array(
            [
                w if w > 0 and abs(w - h) > SAME_MM else h
                for w, h in zip(self.spacing_mm, have, strict=True)
            ]
        )
        if np.array_equal(want, have):
            return view
        shape, start = _grid(old, _zoomed(old, want), view.shape)
        how = "cubic" if self.cubic else "linear"
        return _resampled(view, start, (want / have).tolist(), (shape, how))


def _zoomed(affine: Matrix, spacing: npt.NDArray[np.float64]) -> Matrix:
    """The affine with other voxel sizes, no shear and no origin.

    Source: monai.data.utils.zoom_affine.
    """
    part = affine[:3, :3]
    upper = np.linalg.cholesky(part.T @ part).T
    made = np.eye(4)
    made[:3, :3] = part @ np.linalg.inv(upper) @ np.diag(np.sign(np.diag(upper)) * spacing)
    return made


def _grid(old: Matrix, new: Matrix, shape: Counts) -> tuple[list[int], list[float]]:
    """How many voxels the new grid has, and where on the old one its first voxel lies.

    The first corner stays where it is if it is the first one along all new axes. Where the affine
    is oblique and written in single precision it is not, by 1e-7, and MONAI aligns the middles
    (counted from the corners of the corner voxels) instead: which of the two is part of its grid.
    Source: monai.data.utils.compute_shape_offset.
    """
    ends = np.stack(np.meshgrid(*[(0.0, n - 1.0) for n in shape], indexing="ij")).reshape(3, -1)
    corners = np.concatenate((ends, np.ones_like(ends[:1])))
    out = (np.linalg.solve(new, old) @ corners)[:3]
    count = np.round(np.ptp(out, axis=1) + 1.0)
    for n in range(out.shape[1]):
        if np.allclose(np.min(out - out[:, n : n + 1], axis=1), 0.0):
            return count.astype(int).tolist(), ends[:, n].tolist()
    first = old[:3, :3] @ (np.array(shape) / 2.0) + old[:3, 3] - new[:3, :3] @ (count / 2.0)
    start = np.linalg.solve(old, np.append(first, 1.0))[:3]
    return count.astype(int).tolist(), start.tolist()


@dataclass(frozen=True, slots=True)
class Resized:
    """A fixed number of voxels (0: as it is); `how` nearest, linear, corners or area."""

    size: Counts
    how: str
    turned: bool = True

    def __call__(self, view: View, affine: Matrix) -> View:
        """The view on as many voxels."""
        del affine
        shape = [s if s > 0 else n for s, n in zip(self.size, view.shape, strict=True)]
        jump = [n / s for n, s in zip(view.shape, shape, strict=True)]
        if self.how == "corners":
            jump = [
                (n - 1) / (s - 1) if s > 1 else 1.0 for n, s in zip(view.shape, shape, strict=True)
            ]
            return _resampled(view, [0.0, 0.0, 0.0], jump, (shape, "linear"))
        start = [(j - 1) / 2 for j in jump]
        return _resampled(view, start, jump, (shape, self.how))


def _resampled(
    view: View, start: Sequence[float], jump: Sequence[float], to: tuple[list[int], str]
) -> View:
    if tuple(to[0]) == view.shape and [*start, *jump] == [0.0] * 3 + [1.0] * 3:
        return view
    now = _lines(view.now, start, jump, to)
    raw = now if view.raw is view.now else _lines(view.raw, start, jump, to)
    first = [s + a * j for s, a, j in zip(view.start, start, view.jump, strict=True)]
    a, b, c = first
    x, y, z = (old * new for old, new in zip(view.jump, jump, strict=True))
    return replace(view, raw=raw, now=now, start=(a, b, c), jump=(x, y, z))


def _lines(
    array: Floats, start: Sequence[float], jump: Sequence[float], to: tuple[list[int], str]
) -> Floats:
    """Values at start + n * jump along each axis; beside the scan those of its nearest voxels."""
    shape, how = to
    if how == "cubic":
        return _cubic(array, start, jump, shape)
    for axis, (first, step, count) in enumerate(zip(start, jump, shape, strict=True), start=1):
        size = array.shape[axis]
        if size == count and step == 1.0 and abs(first) < _NOISE:
            continue
        if how == "area":
            array = _averaged(array, axis, count)
            continue
        if how == "nearest":  # the voxel in which the new one begins
            at = np.minimum((np.arange(count) * (size / count)).astype(int), size - 1)
            array = np.take(array, at, axis=axis)
            continue
        place = np.clip(first + step * np.arange(count), 0, size - 1)
        below = np.minimum(place.astype(int), max(size - 2, 0))
        share = (place - below).astype(np.float32)
        form = [1] * array.ndim
        form[axis] = count
        weight = share.reshape(form)
        low = np.take(array, below, axis=axis)
        high = np.take(array, np.minimum(below + 1, size - 1), axis=axis)
        array = low + (high - low) * weight
    return np.ascontiguousarray(array, dtype=np.float32)


def _averaged(array: Floats, axis: int, count: int) -> Floats:
    """Means over the stretches of an adaptive average pool."""
    size = array.shape[axis]
    parts = []
    for n in range(count):
        stretch = slice(n * size // count, -(-(n + 1) * size // count))
        index: list[Any] = [slice(None)] * array.ndim
        index[axis] = stretch
        parts.append(array[tuple(index)].mean(axis=axis, dtype=np.float32))
    return np.stack(parts, axis=axis)


def _cubic(
    array: Floats, start: Sequence[float], jump: Sequence[float], shape: Sequence[int]
) -> Floats:
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    ends = [s + j * (m - 1) for s, j, m in zip(start, jump, shape, strict=True)]
    rims = [
        _RIM + max(0, math.ceil(max(-s, e - n + 1)))
        for s, e, n in zip(start, ends, array.shape[1:], strict=True)
    ]
    wide = np.pad(array, [(0, 0), *((r, r) for r in rims)], mode="edge")
    channels = []
    for channel in wide:
        image = sitk.GetImageFromArray(np.ascontiguousarray(channel.T, dtype=np.float64))
        out = sitk.Resample(
            image,
            [int(n) for n in shape],
            sitk.Transform(),
            sitk.sitkBSpline3,
            [float(s + r) for s, r in zip(start, rims, strict=True)],
            [float(j) for j in jump],
            image.GetDirection(),
            0.0,
            sitk.sitkFloat64,
        )
        channels.append(sitk.GetArrayFromImage(out).T.astype(np.float32))
    return np.stack(channels)
