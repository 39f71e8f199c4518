"""What is a scan to us: channels of voxels on one grid, with modality, unit and source?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ImageError
from med_gradcam.geometry import Geometry
from med_gradcam.provenance import Source

UNITS = ("HU", "a.u.", "RGB")


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """Voxels `array` (C, I, J, K) on `grid`; `modality` is a DICOM modality code or None.

    `unit` is HU, a.u. or RGB; `window` is the file's own display window (centre, width), if any.
    The array keeps the axis order of its file and is read-only.

    Raises:
        ImageError: not four axes, not on the grid, not real numbers, or not all finite.
    """

    array: npt.NDArray[Any] = field(repr=False)
    grid: Geometry
    modality: str | None = None
    unit: str = "a.u."
    source: Source = field(default_factory=lambda: Source("array", ""))
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        array = self.array
        if array.ndim != 4 or array.shape[1:] != self.grid.shape:
            raise ImageError(
                f"expected an array (C, I, J, K) on a grid {self.grid.shape}, got {array.shape}."
            )
        if array.shape[0] == 0:
            raise ImageError("expected at least one channel of voxels, got none.")
        if array.dtype.kind not in "iuf":
            raise ImageError(f"expected real numbers as voxels, got dtype {array.dtype}.")
        if self.unit not in UNITS:
            raise ImageError(f"expected a unit of {', '.join(UNITS)}, got {self.unit!r}.")
        check_finite(array)
        view = array.view()
        view.setflags(write=False)
        object.__setattr__(self, "array", view)
        if not self.source.sha256:
            object.__setattr__(self, "source", Source("array", digest(view, self.grid)))


def taken_as(volume: Volume, modality: str | None) -> Volume:
    """The same volume, of `modality` where its file does not say one (a CT is then in HU)."""
    if volume.modality is not None or modality is None:
        return volume
    return replace(volume, modality=modality, unit="HU" if modality == "CT" else volume.unit)


def check_finite(array: npt.NDArray[Any]) -> None:
    """Refuse NaN and infinite voxels, saying how many there are and where the first is.

    Raises:
        ImageError: some voxel is NaN or infinite.
    """
    if array.dtype.kind != "f":
        return
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ImageError(
            f"expected finite voxels, got {int(bad.sum())} NaN or infinite ones, the first at "
            f"{first}; replace them (for example by the scan's minimum) before explaining."
        )


def digest(array: npt.NDArray[Any], grid: Geometry) -> str:
    """SHA-256 of the voxels (C order) and the affine."""
    sha = hashlib.sha256(np.ascontiguousarray(array).data)
    sha.update(grid.affine.tobytes())
    return sha.hexdigest()
