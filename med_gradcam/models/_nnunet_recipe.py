"""How does nnU-Net v2 make a network's input: cropped to what is not 0, normalised, resampled?

Normalised before it is resampled, by each channel's own scheme; a cubic spline with repeated edges,
clipped to the values there were; along one much coarser axis the nearest slice. The new voxels
cover the same extent as the old ones, so their size is not exactly the plan's.
Source: nnunetv2 preprocessing/{cropping,normalization,resampling}, default_preprocessor.py, whose
resize is scikit-image's (scipy.ndimage.zoom, grid_mode, mode "nearest").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ImageError
from med_gradcam.model import Ready, Step

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
COARSE = 3.0  # voxels this much longer along one axis: resampled apart along it
RIM = 12  # copies of the edge before the spline is fitted; its weights fall by 0.27 per voxel
LEAST_SD = 1e-8
MOST_NUMBERS = 2_000_000_000  # 8 GB as float32
WIDE = 3e38  # no limit
ORDERS = (0, 1, 3)
SCHEMES = (
    "CTNormalization",
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
MOST_RGB = 255.0


@dataclass(frozen=True, slots=True)
class Channel:
    """How one channel is normalised: a name of SCHEMES and, for CT, the numbers of the plan.

    `masked`: measured, and changed, only inside what is not 0.
    """

    scheme: str
    masked: bool = False
    mean: float = 0.0
    sd: float = 1.0
    low: float = -WIDE
    high: float = WIDE


@dataclass(frozen=True, slots=True)
class Applied:
    """What a channel's scheme came to on one scan: clip to low..high, take off, divide by."""

    low: float
    high: float
    off: float
    by: float
    masked: bool


@dataclass(frozen=True, slots=True)
class NnunetRecipe:
    """nnU-Net's preprocessing of an array (C, i, j, k) whose axes are already the plan's.

    `spacing_mm` of the plan; `order` of the spline, `order_z` along an axis that is resampled
    apart; `apart`: always, never, or (None) where one axis is much coarser; not `resample`: not at
    all, whatever the voxels.
    """

    channels: tuple[Channel, ...]
    spacing_mm: tuple[float, float, float]
    order: int = 3
    order_z: int = 0
    apart: bool | None = None
    resample: bool = True

    def __call__(self, array: npt.NDArray[Any], spacing_mm: tuple[float, float, float]) -> Ready:
        """The scan on the plan's voxels.

        Raises:
            ImageError: the values do not fit a channel's scheme, or the plan's voxels are so small
                that the scan would not fit into memory.
        """
        start, shape = box_of(array)
        new = self._shape(len(array), shape, spacing_mm)
        inner = array[(slice(None), *(slice(s, s + n) for s, n in zip(start, shape, strict=True)))]
        raw = np.ascontiguousarray(inner, dtype=np.float32)
        masked = any(channel.masked for channel in self.channels)
        mask = filled((raw != 0).any(axis=0)) if masked else np.ones(raw.shape[1:], dtype=bool)
        applied = [applied_to(c, one, mask) for c, one in zip(self.channels, raw, strict=True)]
        exact = np.stack([normalised(a, one, mask) for a, one in zip(applied, raw, strict=True)])
        notes = self._notes(array.shape[1:], shape, spacing_mm, new)
        if new != shape:
            axis = coarse_axis(spacing_mm, self.spacing_mm, self.apart)
            how = (new, axis, self.order, self.order_z)
            raw = np.stack([resized(channel, *how) for channel in raw])
            exact = np.stack([resized(channel, *how) for channel in exact])
        jump = [n / m for n, m in zip(shape, new, strict=True)]
        first = [s + (j - 1) / 2 for s, j in zip(start, jump, strict=True)]
        a, b, c = first
        i, j, k = jump
        return Ready(raw, exact, (a, b, c), (i, j, k), _steps(applied), tuple(notes))

    def _shape(
        self, channels: int, shape: tuple[int, ...], spacing_mm: Sequence[float]
    ) -> tuple[int, ...]:
        """How many voxels of the plan's size cover the same extent.

        Raises:
            ImageError: too many, or the weights of one axis would be.
        """
        if not self.resample:
            return shape
        sizes = zip(spacing_mm, self.spacing_mm, shape, strict=True)
        wished = [max(1.0, old / wish * n) for old, wish, n in sizes]
        # One axis is resampled after the other: between them is the larger of both sizes.
        most = channels * math.prod(map(max, wished, shape))
        matrices = [2 * new * (old + 2 * RIM) for new, old in zip(wished, shape, strict=True)]
        most = max(most, *matrices)  # these are float64
        if most > MOST_NUMBERS:
            old_mm, new_mm = (
                " x ".join(f"{s:g}" for s in mm) for mm in (spacing_mm, self.spacing_mm)
            )
            raise ImageError(
                f"expected a scan of at most {MOST_NUMBERS:,} numbers on the model's voxels of "
                f"{new_mm} mm, got {most:.3g} (voxels of {old_mm} mm, {channels} x "
                f"{' x '.join(map(str, shape))}); check the spacing of the scan and of the model's "
                f"plans.json, or crop the scan."
            )
        return tuple(round(n) for n in wished)

    def _notes(
        self,
        whole: tuple[int, ...],
        shape: tuple[int, ...],
        spacing_mm: Sequence[float],
        new: tuple[int, ...],
    ) -> list[str]:
        found = []
        if shape != whole:
            have, kept = (" x ".join(str(n) for n in s) for s in (whole, shape))
            found.append(f"{have} voxels cropped to the {kept} that are not 0, as nnU-Net does")
        if new != shape:
            have, wish = (
                " x ".join(f"{s:.2f}" for s in sizes) for sizes in (spacing_mm, self.spacing_mm)
            )
            found.append(f"voxels of {have} mm resampled to {wish} mm, as nnU-Net does")
        return found


# --------------------------------------------------------------------------------- cropping


def box_of(array: npt.NDArray[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of the smallest box that holds all voxels that are not 0 in any channel."""
    mask = (array != 0).any(axis=0)
    start, shape = [], []
    for axis in range(mask.ndim):
        others = tuple(n for n in range(mask.ndim) if n != axis)
        found = np.flatnonzero(mask.any(axis=others))
        first, last = (int(found[0]), int(found[-1])) if found.size else (0, mask.shape[axis] - 1)
        start.append(first)
        shape.append(last - first + 1)
    return tuple(start), tuple(shape)


def filled(mask: Bools) -> Bools:
    """A mask with its holes closed: what no path between faces of voxels leads out of."""
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
    closed = sitk.GetArrayFromImage(sitk.BinaryFillhole(image, fullyConnected=False))
    return np.asarray(closed[1:-1, 1:-1, 1:-1] > 0)


# ------------------------------------------------------------------------------ normalising


def applied_to(channel: Channel, values: Floats, mask: Bools) -> Applied:
    """A channel's scheme with what it measures on this scan measured."""
    if channel.scheme == "CTNormalization":
        sd = max(channel.sd, LEAST_SD)
        return Applied(channel.low, channel.high, channel.mean, sd, masked=False)
    if channel.scheme == "ZScoreNormalization":
        seen = values[mask] if channel.masked else values
        mean = float(seen.mean()) if seen.size else 0.0
        sd = float(seen.std()) if seen.size else 0.0
        return Applied(-WIDE, WIDE, mean, max(sd, LEAST_SD), channel.masked)
    if channel.scheme == "RescaleTo01Normalization":
        low = float(values.min())
        return Applied(-WIDE, WIDE, low, max(float(values.max()) - low, LEAST_SD), masked=False)
    if channel.scheme == "RGBTo01Normalization":
        if float(values.min()) < 0 or float(values.max()) > MOST_RGB:
            raise ImageError(
                f"expected colours of 0 to 255 for this model, got values from "
                f"{float(values.min()):g} to {float(values.max()):g}."
            )
        return Applied(-WIDE, WIDE, 0.0, MOST_RGB, masked=False)
    return Applied(-WIDE, WIDE, 0.0, 1.0, masked=False)


def normalised(how: Applied, values: Floats, mask: Bools) -> Floats:
    """One channel after its scheme."""
    made = np.clip(values, np.float32(how.low), np.float32(how.high))
    made = (made - np.float32(how.off)) / np.float32(how.by)
    return np.where(mask, made, values) if how.masked else made


def _steps(applied: Sequence[Applied]) -> tuple[Step, ...]:
    """The same as steps that another array in the scan's unit can go through."""
    steps = []
    if any(a.low > -WIDE or a.high < WIDE for a in applied):
        limits = tuple(a.low for a in applied), tuple(a.high for a in applied)
        steps.append(Step("clip", limits))
    for name, masked in (("normalise", False), ("normalise_nonzero", True)):
        own = [(a.off, a.by) if a.masked == masked else (0.0, 1.0) for a in applied]
        if any(pair != (0.0, 1.0) for pair in own):
            steps.append(Step(name, (tuple(o for o, _ in own), tuple(b for _, b in own))))
    return tuple(steps)


# ------------------------------------------------------------------------------- resampling


def coarse_axis(
    old_mm: Sequence[float],
    new_mm: Sequence[float],
    apart: bool | None,  # noqa: FBT001 - the plan's own three answers
) -> int | None:
    """The axis that is resampled apart from the others; None for all three together."""
    if apart is False:
        return None
    for spacing in (old_mm, new_mm):
        if apart or max(spacing) / min(spacing) > COARSE:
            found = [n for n, s in enumerate(spacing) if max(spacing) / s == 1]
            return found[0] if len(found) == 1 else None
    return None


def resized(
    values: Floats, shape: Sequence[int], axis: int | None, order: int, order_z: int
) -> Floats:
    """One channel (i, j, k) on as many voxels over the same extent, clipped to what there was.

    Along `axis`, if any, with `order_z` after the others; then each slice is clipped to its own.
    """
    others = [n for n in range(3) if n != axis]
    made: npt.NDArray[Any] = values
    for n in others:
        if shape[n] != values.shape[n]:
            made = _along(made, n, weights(values.shape[n], shape[n], order))
    whole = tuple(others) if axis is not None else None
    low, high = (f(values, axis=whole, keepdims=axis is not None) for f in (np.min, np.max))
    made = np.clip(made, low, high)
    if axis is not None and shape[axis] != values.shape[axis]:
        if order_z == 0:
            made = np.take(made, _nearest(values.shape[axis], shape[axis]), axis=axis)
        else:
            made = _along(made, axis, weights(values.shape[axis], shape[axis], order_z))
    return np.ascontiguousarray(made, dtype=np.float32)


def _along(values: npt.NDArray[Any], axis: int, matrix: Matrix) -> npt.NDArray[Any]:
    moved = np.moveaxis(values, axis, 0)
    flat = moved.reshape(moved.shape[0], -1)
    made = (matrix @ flat).reshape(matrix.shape[0], *moved.shape[1:])
    return np.moveaxis(made, 0, axis)


def _places(old: int, new: int) -> Matrix:
    """Where the centres of the new voxels lie among the old ones."""
    return np.asarray((np.arange(new) + 0.5) * (old / new) - 0.5)


def _nearest(old: int, new: int) -> npt.NDArray[np.intp]:
    return np.clip(np.floor(_places(old, new) + 0.5).astype(np.intp), 0, old - 1)


def weights(old: int, new: int, order: int) -> Matrix:
    """The weights (new, old) of one axis: nearest, linear, or cubic spline; edges are repeated."""
    matrix = np.zeros((new, old))
    rows = np.arange(new)
    if order == 0:
        matrix[rows, _nearest(old, new)] = 1.0
        return matrix
    at = _places(old, new)
    low = np.floor(at).astype(int)
    t = at - low
    if order == 1:
        np.add.at(matrix, (rows, np.clip(low, 0, old - 1)), 1 - t)
        np.add.at(matrix, (rows, np.clip(low + 1, 0, old - 1)), t)
        return matrix
    taps = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)
    spread = np.zeros((new, old + 2 * RIM))
    for n, tap in enumerate(taps):
        spread[rows, low + RIM - 1 + n] += tap / 6
    return np.asarray(spread @ _spline(old))


def _spline(n: int) -> Matrix:
    """The spline's coefficients (n + 2 RIM, n) that go through n values with the edges repeated."""
    size = n + 2 * RIM
    values = np.zeros((size, n))
    values[np.arange(size), np.clip(np.arange(size) - RIM, 0, n - 1)] = 1.0
    through = np.diag(np.full(size, 4 / 6))
    through += np.diag(np.full(size - 1, 1 / 6), 1) + np.diag(np.full(size - 1, 1 / 6), -1)
    through[0, 0] = through[-1, -1] = 5 / 6  # beyond the rim the coefficients are mirrored
    return np.asarray(np.linalg.solve(through, values))
