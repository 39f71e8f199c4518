"""How do the vessels of a lung branch?"""

from __future__ import annotations

import numpy as np

from .grid import Grid
from .shapes import paint_tube


def vessel_share(grid: Grid, lung_depth_mm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share of each voxel filled by two random vessel trees that start at the hila."""
    share = np.zeros(grid.shape, np.float32)
    for side in (1.0, -1.0):
        hilum = np.array([side * 30.0, -8.0, -2.0]) + rng.normal(0, 4, 3)
        count = int(rng.integers(11, 16))
        for number in range(count):
            polar = np.pi * (number + rng.uniform(0.2, 0.8)) / count
            turn = rng.uniform(-1.0, 1.0)
            direction = np.array([side * np.sin(polar), turn, np.cos(polar) * 1.3])
            radius_mm = rng.uniform(2.4, 4.8)
            _grow(share, grid, lung_depth_mm, hilum, direction, radius_mm, 0, rng)
    return share


def _grow(
    share: np.ndarray,
    grid: Grid,
    lung_depth_mm: np.ndarray,
    start_mm: np.ndarray,
    direction: np.ndarray,
    radius_mm: float,
    level: int,
    rng: np.random.Generator,
) -> None:
    """Paint one branch and its children, in place, as long as it stays inside the lung."""
    direction = direction / np.linalg.norm(direction)
    end_mm = start_mm + direction * rng.uniform(11.0, 22.0) * (0.9**level)
    index = np.round(grid.index_of(end_mm)).astype(int)
    if np.any(index < 0) or np.any(index >= np.array(grid.shape)):
        return
    if level > 1 and lung_depth_mm[tuple(index)] <= 1.0:
        return
    thinner_mm = radius_mm * rng.uniform(0.72, 0.86)
    paint_tube(share, grid, start_mm, end_mm, (radius_mm, thinner_mm))
    if level >= 7 or thinner_mm < 0.5:
        return
    for _ in range(2):
        child = direction + rng.normal(0, 0.5, 3)
        _grow(share, grid, lung_depth_mm, end_mm, child, thinner_mm, level + 1, rng)
