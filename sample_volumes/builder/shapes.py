"""Which share of each voxel does a smooth shape fill?"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from .grid import Grid, box_around


def filled(signed_mm: np.ndarray, softness_mm: float = 3.0) -> np.ndarray:
    """Share 0..1 of each voxel inside a shape, from its signed distance (mm, negative inside)."""
    return np.clip(0.5 - signed_mm / softness_mm, 0.0, 1.0)


def blend(volume: np.ndarray, share: np.ndarray, value: np.ndarray | float) -> None:
    """Mix a material into a volume, in place, by the share of each voxel it fills."""
    volume += share * (value - volume)


def ellipsoid_mm(
    mesh: tuple[np.ndarray, np.ndarray, np.ndarray],
    centre_mm: tuple[float, float, float],
    radii_mm: tuple[float, float, float],
    power: float = 2.0,
) -> np.ndarray:
    """Approximate signed distance (mm) to a superellipsoid; an infinite radius makes a cylinder."""
    total = sum(
        np.abs((axis - centre) / radius) ** power
        for axis, centre, radius in zip(mesh, centre_mm, radii_mm, strict=True)
        if np.isfinite(radius)
    )
    smallest = min(radii_mm)
    return ((total ** (1.0 / power)) - 1.0) * np.float32(smallest)


def smooth_noise(
    shape: tuple[int, int, int], sigma_voxels: float, rng: np.random.Generator
) -> np.ndarray:
    """Correlated noise with zero mean and unit standard deviation."""
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma_voxels, mode="wrap")
    return field / (field.std() + 1e-6)


def paint_tube(
    share: np.ndarray,
    grid: Grid,
    start_mm: np.ndarray,
    end_mm: np.ndarray,
    radius_mm: tuple[float, float],
) -> None:
    """Raise `share` where a tapering tube fills the voxels, in place.

    A tube thinner than a voxel keeps its volume: the share falls with its cross-section.
    """
    middle = (start_mm + end_mm) / 2
    reach = float(np.linalg.norm(end_mm - start_mm)) / 2 + max(radius_mm) + 3.0
    slices, offset = box_around(grid, middle, reach)
    if min(offset.shape[1:]) == 0:
        return
    tube_mm = tube_distance_mm(offset, start_mm - middle, end_mm - middle, radius_mm)
    thin = min(1.0, (sum(radius_mm) / 2 / 1.4) ** 1.3)
    np.maximum(share[slices], filled(tube_mm) * thin, out=share[slices])


def tube_distance_mm(
    offset: np.ndarray, start_mm: np.ndarray, end_mm: np.ndarray, radius_mm: tuple[float, float]
) -> np.ndarray:
    """Signed distance (mm) to a tapering capsule; `offset` is (3, i, j, k) in mm."""
    along = (end_mm - start_mm).astype(np.float32)
    relative = offset - start_mm.astype(np.float32).reshape(3, 1, 1, 1)
    share = np.tensordot(along, relative, axes=1) / max(float(along @ along), 1e-6)
    share = np.clip(share, 0.0, 1.0)
    away = relative - along.reshape(3, 1, 1, 1) * share
    radius = radius_mm[0] + (radius_mm[1] - radius_mm[0]) * share
    return np.sqrt((away**2).sum(axis=0)) - radius
