"""Where do the voxels of a sample volume lie, in millimetres?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Grid:
    """Voxel grid whose index axes point to Right, Anterior and Superior.

    Attributes:
        shape: Voxels along R, A and S.
        spacing_mm: Voxel size along R, A and S.
        origin_ras_mm: Centre of voxel (0, 0, 0), RAS+ millimetres.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_ras_mm: tuple[float, float, float]

    @property
    def affine(self) -> np.ndarray:
        """4x4 matrix from voxel index to RAS+ millimetres."""
        matrix = np.diag([*self.spacing_mm, 1.0])
        matrix[:3, 3] = self.origin_ras_mm
        return matrix

    def axis_mm(self, axis: int) -> np.ndarray:
        """Voxel centres along one axis, measured from the middle of the grid (mm)."""
        count = self.shape[axis]
        return ((np.arange(count) - (count - 1) / 2) * self.spacing_mm[axis]).astype(np.float32)

    def open_mm(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three broadcastable coordinate arrays from the middle of the grid (mm): R, A, S."""
        right, anterior, superior = (self.axis_mm(axis) for axis in range(3))
        return right[:, None, None], anterior[None, :, None], superior[None, None, :]

    def index_of(self, centred_mm: np.ndarray) -> np.ndarray:
        """Fractional voxel index of points given from the middle of the grid (mm)."""
        middle = (np.array(self.shape) - 1) / 2
        return np.asarray(centred_mm) / np.array(self.spacing_mm) + middle

    def edge_depth_mm(self) -> np.ndarray:
        """Distance of each voxel to the nearest face of the grid (r, a, s)."""
        depths = [
            np.minimum(axis - axis[0], axis[-1] - axis) for axis in map(self.axis_mm, range(3))
        ]
        flat = np.minimum(depths[0][:, None], depths[1][None, :])
        return np.minimum(flat[:, :, None], depths[2][None, None, :])

    def world_ras_mm(self, index_ijk: np.ndarray) -> np.ndarray:
        """RAS+ millimetres of a voxel index."""
        return np.array(self.origin_ras_mm) + np.asarray(index_ijk) * np.array(self.spacing_mm)


def box_around(
    grid: Grid, centred_mm: np.ndarray, reach_mm: float
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """Slices of the voxels within reach of a point, and their offsets to it (3, i, j, k) in mm."""
    slices, offsets = [], []
    for axis in range(3):
        positions = grid.axis_mm(axis)
        low = int(np.searchsorted(positions, centred_mm[axis] - reach_mm))
        high = int(np.searchsorted(positions, centred_mm[axis] + reach_mm, side="right"))
        slices.append(slice(low, high))
        offsets.append(positions[low:high] - np.float32(centred_mm[axis]))
    mesh = np.stack(np.meshgrid(*offsets, indexing="ij"))
    return (slices[0], slices[1], slices[2]), mesh
