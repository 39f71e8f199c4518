"""What does a volume look like along one body axis: radiological planes, MIP and sum, with depth?

Axial pictures show anterior up and the patient's right on the left, coronal ones superior up and
the patient's right on the left, sagittal ones superior up and anterior on the left. Rays run along
the array axis closest to the view's own, away from the reader: towards superior, posterior and the
patient's right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from med_gradcam.calibration import Calibration
from med_gradcam.errors import UsageError
from med_gradcam.geometry import Geometry, Reorientation, reorient_array, reorientation
from med_gradcam.maps import Heatmap, Polarity

View = Literal["axial", "coronal", "sagittal"]
Kind = Literal["max", "sum"]
VIEWS: tuple[View, ...] = get_args(View)

# What rows (down), columns (to the right) and rays (away from the reader) point to.
_AXES: dict[View, str] = {"axial": "PLS", "coronal": "ILP", "sagittal": "IPR"}
_OPPOSITE = dict(zip("RASLPI", "LPIRAS", strict=True))
_MM_PER_CM = 10.0
# A background average reads at most this many layers of a scan.
_LAYERS = 96

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Edges:
    """The patient letter at each edge of a picture."""

    left: str
    right: str
    top: str
    bottom: str


@dataclass(frozen=True, slots=True)
class Plane:
    """How a grid's array (I, J, K) is seen in one view: `how` brings it to (row, column, depth)."""

    view: View
    grid: Geometry
    how: Reorientation

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and depth, voxels."""
        rows, columns, depth = (self.grid.shape[axis] for axis in self.how.order)
        return rows, columns, depth

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Height of a row and width of a column, mm."""
        row, column, _ = self.how.order
        return self.grid.spacing_mm[row], self.grid.spacing_mm[column]

    @property
    def step_mm(self) -> float:
        """Distance between voxel centres along a ray, mm."""
        return self.grid.spacing_mm[self.how.order[2]]

    @property
    def edges(self) -> Edges:
        """The letters at the picture's edges, computed from the affine."""
        codes = self.grid.axcodes
        pairs = zip(self.how.order, self.how.flip, strict=True)
        down, right, _ = (_OPPOSITE[codes[i]] if flip else codes[i] for i, flip in pairs)
        return Edges(_OPPOSITE[right], right, _OPPOSITE[down], down)

    def oriented(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of an array (..., I, J, K) as (..., row, column, depth)."""
        return reorient_array(array, self.how)

    def index_ijk(self, row_column_depth: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Index in the grid's own array of (fractional) row, column, depth, shape (..., 3)."""
        seen = np.asarray(row_column_depth, dtype=np.float64)
        index = np.empty(seen.shape)
        for new, (old, flip) in enumerate(zip(self.how.order, self.how.flip, strict=True)):
            at = seen[..., new]
            index[..., old] = self.grid.shape[old] - 1 - at if flip else at
        return index

    def row_column_depth(self, index_ijk: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Row, column, depth of (fractional) indices of the grid's own array, shape (..., 3)."""
        index = np.asarray(index_ijk, dtype=np.float64)
        seen = np.empty(index.shape)
        for new, (old, flip) in enumerate(zip(self.how.order, self.how.flip, strict=True)):
            at = index[..., old]
            seen[..., new] = self.grid.shape[old] - 1 - at if flip else at
        return seen


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A heat map seen along one axis: `values` (rows, columns) float32 in `unit`.

    `depth_index` (rows, columns) int32: the index, along the array axis that was projected, of the
    voxel with the largest size on each ray (the one nearest the reader among equals); -1 where the
    ray carries nothing. `depth_mm` float32: its distance from the first layer of the whole grid
    along the ray, NaN where there is none. `kind` max keeps the unit of the map; sum integrates it
    to log-odds per cm2, so that sum(values) * pixel area = the map's log-odds.
    """

    values: Floats
    depth_index: Indices
    depth_mm: Floats
    plane: Plane
    kind: Kind
    polarity: Polarity
    unit: str
    scale: Calibration

    @property
    def view(self) -> View:
        """Axial, coronal or sagittal."""
        return self.plane.view

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Height of a row and width of a column, mm."""
        return self.plane.pixel_mm

    @property
    def edges(self) -> Edges:
        """The patient letters at the four edges."""
        return self.plane.edges

    @property
    def pixel_cm2(self) -> float:
        """Area of a pixel, cm2."""
        height_mm, width_mm = self.pixel_mm
        return height_mm * width_mm / _MM_PER_CM**2

    def voxel_ijk(self, row: int, column: int) -> tuple[int, int, int] | None:
        """The voxel (index of the grid's own array) that a pixel shows; None on an empty ray."""
        depth = int(self.depth_index[row, column])
        if depth < 0:
            return None
        index = self.plane.index_ijk((row, column, 0)).round().astype(int).tolist()
        index[self.plane.how.order[2]] = depth
        i, j, k = index
        return i, j, k

    def point_ras_mm(self, row: int, column: int) -> tuple[float, float, float] | None:
        """Where in the patient that voxel's centre lies, RAS+ mm; None on an empty ray."""
        voxel = self.voxel_ijk(row, column)
        if voxel is None:
            return None
        r, a, s = self.plane.grid.world_ras(voxel).tolist()
        return r, a, s


def plane_of(grid: Geometry, view: str) -> Plane:
    """How `grid` is seen in an axial, coronal or sagittal view.

    Raises:
        UsageError: no such view.
    """
    if view not in VIEWS:
        raise UsageError(f"expected a view of {', '.join(VIEWS)}, got {view!r}.")
    return Plane(view, grid, reorientation(grid, _AXES[view]))


def slab_of(
    grid: Geometry, view: str, centre_ras_mm: npt.ArrayLike, thickness_mm: float
) -> tuple[int, int]:
    """The slab (first index, one past the last) of the projected array axis around a point.

    Raises:
        UsageError: the slab misses the grid.
    """
    plane = plane_of(grid, view)
    axis = plane.how.order[2]
    centre = float(grid.index_ijk(centre_ras_mm)[axis])
    half = max(thickness_mm / plane.step_mm, 1.0) / 2
    first, last = int(np.floor(centre - half + 0.5)), int(np.floor(centre + half + 0.5))
    first, stop = max(first, 0), min(max(last, first + 1), grid.shape[axis])
    if first >= stop:
        raise UsageError(f"expected a slab inside the image, got one at index {centre:.1f}.")
    return first, stop


def project(
    heatmap: Heatmap, view: str, *, kind: Kind = "max", slab: tuple[int, int] | None = None
) -> Projection:
    """The maximum or the integral of a heat map along a view's rays.

    `slab` (first index, one past the last) limits the projected array axis. A signed map has no
    maximum projection: the weaker sign would vanish behind the stronger one.

    Raises:
        UsageError: unknown view or kind, a slab off the image, or the maximum of a signed map.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"expected a projection of {', '.join(get_args(Kind))}, got {kind!r}.")
    if kind == "max" and heatmap.polarity == "signed":
        raise UsageError(
            "expected a map for or against, got the signed one, whose maximum hides the evidence "
            "that lowers the score; project both polarities, or use kind='sum'."
        )
    plane = plane_of(heatmap.grid, view)
    start, seen = _cut(plane, heatmap.values, slab)
    sized = np.abs(seen) if heatmap.polarity == "signed" else seen
    best, depth = _largest(sized)
    values, unit = best, heatmap.unit
    if kind == "sum":
        height_mm, width_mm = plane.pixel_mm
        pixel_cm2 = height_mm * width_mm / _MM_PER_CM**2
        total = seen.sum(axis=2, dtype=np.float64) * (heatmap.grid.voxel_ml / pixel_cm2)
        values, unit = total.astype(np.float32), heatmap.unit.replace("per mL", "per cm2")
    shown = depth >= 0
    depth = np.where(shown, depth + start, -1)
    last = plane.shape[2] - 1
    index = np.where(shown & plane.how.flip[2], last - depth, depth).astype(np.int32)
    depth_mm = np.where(shown, depth * plane.step_mm, np.nan).astype(np.float32)
    return Projection(values, index, depth_mm, plane, kind, heatmap.polarity, unit, heatmap.scale)


def project_scan(
    channel: npt.NDArray[Any],
    plane: Plane,
    *,
    slab: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
) -> Floats:
    """The mean of a scan's channel (I, J, K) along a view's rays, (rows, columns) float32.

    At most 96 layers, evenly spread, are read: this is a backdrop, not a measurement. `limits` (in
    the scan's unit) clip each voxel first, so that padding and metal do not darken or glare.
    """
    _, seen = _cut(plane, channel, slab)
    layers = seen[:, :, :: -(-seen.shape[2] // _LAYERS)]
    total = np.zeros_like(layers[:, :, 0], dtype=np.float32)
    for depth in range(layers.shape[2]):
        layer = layers[:, :, depth].astype(np.float32)
        total += layer if limits is None else np.clip(layer, *limits)
    return total / np.float32(layers.shape[2])


def slice_scan(array: npt.NDArray[Any], plane: Plane, depth: int) -> npt.NDArray[Any]:
    """One layer (rows, columns) of an array (I, J, K); `depth` counts along the ray."""
    return plane.oriented(array)[:, :, min(max(depth, 0), plane.shape[2] - 1)]


def _cut(
    plane: Plane, array: npt.NDArray[Any], slab: tuple[int, int] | None
) -> tuple[int, npt.NDArray[Any]]:
    """The oriented array within a slab, and the depth at which it starts."""
    seen, depth = plane.oriented(array), plane.shape[2]
    if slab is None:
        return 0, seen
    first, stop = slab
    if not 0 <= first < stop <= depth:
        raise UsageError(f"expected a slab within 0 to {depth} voxels, got {first} to {stop}.")
    if plane.how.flip[2]:
        first, stop = depth - stop, depth - first
    return first, seen[:, :, first:stop]


def _largest(seen: npt.NDArray[Any]) -> tuple[Floats, Indices]:
    """The largest value on each ray (rows, columns, depth) and its depth, -1 where nothing is > 0.

    Everything is read in the order in which it lies in memory.
    """
    best = np.zeros_like(seen[:, :, 0], dtype=np.float32)
    depth = np.full_like(best, -1, dtype=np.int32)
    if abs(seen.strides[2]) == min(abs(s) for s in seen.strides):
        for row in range(seen.shape[0]):
            at = seen[row].argmax(axis=1)
            best[row] = np.take_along_axis(seen[row], at[:, None], axis=1)[:, 0]
            depth[row] = np.where(best[row] > 0, at, -1)
        return best, depth
    for layer in range(seen.shape[2]):
        better = seen[:, :, layer] > best
        if better.any():
            np.copyto(best, seen[:, :, layer], where=better)
            np.copyto(depth, layer, where=better)
    return best, depth
