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
# Two scans are on one grid where no corner is further off than that: mm, or of a voxel's side.
SAME_PLACE_MM, SAME_PLACE_SHARE = 0.1, 0.1


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


def apart_mm(grid: Geometry, other: Geometry) -> float:
    """How far the corners of two grids lie apart at most, mm, each with its own of the other."""
    corners = []
    for one in (grid, other):
        ends = [(0, n - 1) for n in one.shape]
        corners.append(one.world_ras(np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1).T))
    return float(np.linalg.norm(corners[0] - corners[1], axis=1).max())


def same_grid(grid: Geometry, other: Geometry) -> bool:
    """Whether the voxels of two scans are the same: as many, and their corners at one place."""
    near = min(SAME_PLACE_MM, SAME_PLACE_SHARE * min(grid.spacing_mm))
    return grid.shape == other.shape and apart_mm(grid, other) <= near


def off_words(grid: Geometry, other: Geometry) -> str:
    """What keeps `other` from being on `grid`, for people: voxels, their size, how far off."""
    said = []
    if grid.shape != other.shape:
        have, want = (" x ".join(str(n) for n in g.shape) for g in (other, grid))
        said.append(f"{have} voxels instead of {want}")
    if not np.allclose(grid.spacing_mm, other.spacing_mm, rtol=1e-3):
        have, want = (" x ".join(f"{s:.4g}" for s in g.spacing_mm) for g in (other, grid))
        said.append(f"voxels of {have} mm instead of {want} mm")
    said.append(f"its corners up to {apart_mm(grid, other):.1f} mm off")
    return ", ".join(said)


def resampled(volume: Volume, grid: Geometry) -> tuple[Volume, float]:
    """A scan on another grid, by one linear interpolation; and the share of that beside the scan.

    Beside the scan there is the smallest value of its channel.
    """
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    step = np.linalg.solve(volume.grid.affine, grid.affine)  # index of `grid` -> own index
    move = sitk.AffineTransform(3)
    move.SetMatrix(step[:3, :3].ravel().tolist())
    move.SetTranslation(step[:3, 3].tolist())
    unit = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tuple(np.eye(3).ravel().tolist()))
    channels = []
    inside = np.ones(volume.grid.shape, dtype=np.float32)
    for array in (*volume.array, inside):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.T, dtype=np.float32))
        low = 0.0 if array is inside else float(array.min())
        out = sitk.Resample(image, grid.shape, move, sitk.sitkLinear, *unit, low, sitk.sitkFloat32)
        channels.append(sitk.GetArrayFromImage(out).T)
    share = float((channels.pop() <= 0).mean())
    array = np.ascontiguousarray(np.stack(channels))
    source = replace(volume.source, sha256=digest(array, grid))
    return replace(volume, array=array, grid=grid, source=source), share


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
