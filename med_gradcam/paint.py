"""How do scan and evidence become colours: windows, colour ramps, resampling, blending?

Evidence for is orange and evidence against is blue (Okabe and Ito's colour-blind safe pair, made
brighter to read on dark grey): two channels, blended, never the larger of the two. A map without a
sign has a colour of its own, their reddish purple. Below the floor of the scale nothing is
coloured; from there opacity and brightness rise to the peak, and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.calibration import Calibration
from med_gradcam.errors import UnknownNameError, UsageError
from med_gradcam.maps import Side
from med_gradcam.volume import Volume

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Numbers = npt.ArrayLike


@dataclass(frozen=True, slots=True)
class Window:
    """Which values a picture shows: `centre` and `width` in the scan's unit; `name` for people."""

    centre: float
    width: float
    name: str

    def __post_init__(self) -> None:
        if not (np.isfinite((self.centre, self.width)).all() and self.width > 0):
            raise UsageError(
                f"expected a finite window with a width above 0, got centre {self.centre}, "
                f"width {self.width}."
            )

    @property
    def low(self) -> float:
        """The value drawn black."""
        return self.centre - self.width / 2

    @property
    def high(self) -> float:
        """The value drawn white."""
        return self.centre + self.width / 2


WINDOWS: dict[str, Window] = {
    "lung": Window(-600, 1500, "lung"),
    "soft tissue": Window(40, 400, "soft tissue"),
    "bone": Window(480, 2500, "bone"),
    "brain": Window(40, 80, "brain"),
}
# Aerated lung, HU, and the share of the shown voxels from which a picture counts as one of lung.
_LUNG_HU = (-980.0, -600.0)
_LUNG_SHARE = 0.2
# MR: the window spans these percentiles of the foreground, which begins at this share of the range.
_MR_PERCENTILES = (1.0, 99.5)
_FOREGROUND = 0.1
# A window is judged on about this many voxels.
_SAMPLE = 1_000_000

# Colour at the floor and at the peak of the scale, RGB.
RAMPS: dict[Side, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "for": ((214, 128, 0), (255, 190, 64)),
    "against": ((30, 122, 200), (110, 200, 255)),
    "strength": ((178, 88, 140), (245, 165, 215)),
}
# Opacity at the floor and at the peak of the scale.
OPACITY = (0.25, 0.85)


def window_named(name: str) -> Window:
    """The preset of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in WINDOWS:
        raise UnknownNameError("window", name, WINDOWS)
    return WINDOWS[name]


def window_for(volume: Volume, shown: npt.NDArray[Any] | None = None) -> Window:
    """The window for a scan, or for the part of it that is `shown` (any shape, same unit).

    The file's own comes first. Else CT is shown as lung where at least 20 % of the voxels are
    aerated lung, as soft tissue elsewhere; everything else from percentile 1 to 99.5 of its
    foreground.
    """
    if volume.window is not None and volume.window[1] > 0:
        return Window(float(volume.window[0]), float(volume.window[1]), "the file's own")
    part = volume.array[0] if shown is None else shown
    values = _thinned(part)
    if volume.unit == "HU":
        low, high = _LUNG_HU
        share = float(((values >= low) & (values <= high)).mean()) if values.size else 0.0
        return WINDOWS["lung" if share >= _LUNG_SHARE else "soft tissue"]
    return _foreground_window(values)


def _thinned(array: npt.NDArray[Any]) -> Floats:
    step = max(1, round((array.size / _SAMPLE) ** (1 / max(array.ndim, 1))))
    thin: Floats = array[(slice(None, None, step),) * array.ndim].astype(np.float32)
    return thin.ravel()


def _foreground_window(values: Floats) -> Window:
    if values.size == 0:
        return Window(0.5, 1.0, "full range")
    base, top = np.percentile(values, (0.0, _MR_PERCENTILES[1])).tolist()
    inside = values[values > base + _FOREGROUND * (top - base)]
    if inside.size == 0 or top <= base:
        return Window(base, 1.0, "full range")
    low, high = np.percentile(inside, _MR_PERCENTILES).tolist()
    low = min(low, base + _FOREGROUND * (top - base))
    return Window((low + high) / 2, max(high - low, 1e-6), "percentile 1 to 99.5")


def grey(values: Numbers, window: Window) -> Bytes:
    """Grey levels 0..255 of a scan's values within a window, same shape."""
    span = (np.asarray(values, dtype=np.float32) - window.low) / window.width
    return np.asarray(np.clip(span * 255 + 0.5, 0, 255), dtype=np.uint8)


def strength(density: Numbers, scale: Calibration) -> Floats:
    """Where a density lies between the floor (0) and the peak (1) of its scale, clipped."""
    values = np.asarray(density, dtype=np.float32)
    span = scale.peak_per_ml - scale.floor_per_ml
    if span <= 0:
        return (values >= scale.peak_per_ml).astype(np.float32)
    share = (values - np.float32(scale.floor_per_ml)) / np.float32(span)
    return np.asarray(np.clip(share, 0, 1))


def opacity(density: Numbers, scale: Calibration) -> Floats:
    """Opacity 0..1 of a density (in the scale's unit): 0 below the floor, rising to the peak."""
    values = np.asarray(density, dtype=np.float32)
    low, high = OPACITY
    rising = np.float32(low) + np.float32(high - low) * strength(values, scale)
    shown = (values >= np.float32(scale.floor_per_ml)) & (values > 0)
    return np.where(shown, rising, np.float32(0))


def colour(density: Numbers, side: Side, scale: Calibration) -> Floats:
    """RGB 0..255 (..., 3) of a density (in the scale's unit) on its side's ramp."""
    first, last = (np.array(c, dtype=np.float32) for c in RAMPS[side])
    return first + (last - first) * strength(density, scale)[..., None]


def rgba(density: Numbers, side: Side, scale: Calibration) -> Bytes:
    """RGBA (..., 4) of a density (in the scale's unit), transparent below the floor."""
    alpha = opacity(density, scale)[..., None] * 255
    return np.concatenate((colour(density, side, scale), alpha), axis=-1).round().astype(np.uint8)


def blend(backdrop: Bytes, sides: Mapping[Side, Numbers], scale: Calibration) -> Bytes:
    """RGB (rows, columns, 3): the sides' densities, in the scale's unit, over a grey backdrop.

    Each polarity keeps its own opacity; where both are present their colours mix by it, so that
    neither hides the other.
    """
    painted = np.repeat(backdrop[..., None], 3, axis=-1)
    given = [(side, np.asarray(density)) for side, density in sides.items()]
    opacities = [opacity(density, scale) for _, density in given]
    shown = np.any([alpha > 0 for alpha in opacities], axis=0) if given else np.zeros(1, dtype=bool)
    if not shown.any():
        return painted
    count = int(shown.sum())
    clear, weight = np.ones((count, 1), dtype=np.float32), np.zeros((count, 1), dtype=np.float32)
    mixed = np.zeros((count, 3), dtype=np.float32)
    for (side, density), alpha in zip(given, opacities, strict=True):
        part = alpha[shown][:, None]
        clear *= 1 - part
        weight += part
        mixed += part * colour(density[shown], side, scale)
    under = backdrop[shown][:, None].astype(np.float32)
    painted[shown] = (under * clear + mixed / weight * (1 - clear)).round().astype(np.uint8)
    return painted


def sample(
    values: npt.NDArray[Any],
    rows: npt.NDArray[np.float64],
    columns: npt.NDArray[np.float64],
    *,
    order: int = 1,
    outside: float = 0.0,
) -> Floats:
    """Values at evenly spaced fractional row and column indices, shape (rows, columns).

    Order 0 takes the nearest pixel; order 1 is linear, with the triangle widened where the picture
    shrinks. No weight is negative, so nothing rings and no sign appears that was not there.
    `outside` is the value more than half a pixel off the edge.

    Raises:
        UsageError: another order.
    """
    if order not in (0, 1):
        raise UsageError(f"expected an order of 0 (nearest) or 1 (linear), got {order}.")
    down, across = _taps(values.shape[0], rows, order), _taps(values.shape[1], columns, order)
    drawn = _gathered(_gathered(values, down).T, across).T
    return np.where(down.inside[:, None] & across.inside, drawn, np.float32(outside))


def resample(
    values: npt.NDArray[Any], pixel_mm: tuple[float, float], square_mm: float, *, order: int = 1
) -> Floats:
    """A picture with pixels of `pixel_mm` (row, column) on square pixels of `square_mm`."""
    indices = []
    for count, size_mm in zip(values.shape, pixel_mm, strict=True):
        wanted = max(1, round(count * size_mm / square_mm))
        indices.append((np.arange(wanted) + 0.5) * (count / wanted) - 0.5)
    return sample(values, indices[0], indices[1], order=order)


@dataclass(frozen=True, slots=True, eq=False)
class _Taps:
    """Which samples make up each output along one axis, (taps, outputs), weights summing to 1."""

    index: npt.NDArray[np.intp]
    weight: Floats
    inside: npt.NDArray[np.bool_]


def _taps(count: int, at: npt.NDArray[np.float64], order: int) -> _Taps:
    inside = (at >= -0.5 - 1e-9) & (at <= count - 0.5 + 1e-9)
    near = np.clip(at, 0, count - 1)
    if order == 0:
        near = np.floor(near + 0.5)
    step = abs(float(at[1] - at[0])) if order == 1 and at.size > 1 else 1.0
    width = max(step, 1.0)
    index = np.floor(near - width).astype(np.intp) + np.arange(1, int(2 * width) + 2)[:, None]
    weight = np.maximum(0.0, 1 - np.abs(index - near) / width)
    weight[(index < 0) | (index >= count)] = 0.0
    weight /= weight.sum(axis=0)
    return _Taps(np.clip(index, 0, count - 1), weight.astype(np.float32), inside)


def _gathered(values: npt.NDArray[Any], taps: _Taps) -> Floats:
    """The weighted sum of rows for each output row, float32."""
    total = np.zeros((taps.index.shape[1], values.shape[1]), dtype=np.float32)
    for index, weight in zip(taps.index, taps.weight, strict=True):
        if weight.any():
            total += values[index] * weight[:, None]
    return total
