"""What do the planted findings look like, and which voxels do they fill?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from .grid import Grid, box_around
from .shapes import filled, tube_distance_mm


@dataclass(frozen=True, slots=True)
class Lesion:
    """One lesion: its kind (`core`, `rim` or `neutral`), place and size.

    Attributes:
        kind: `core` = spiculated nodule, `rim` = nodule in a rim, `neutral` = smooth nodule.
        centre_mm: From the middle of the grid, along R, A, S.
        radius_mm: Nodule without spicules or rim.
        outer_mm: Reach of the spicules or the rim.
        seed: Everything else about its look.
    """

    kind: str
    centre_mm: tuple[float, float, float]
    radius_mm: float
    outer_mm: float
    seed: int


@dataclass(frozen=True, slots=True)
class Materials:
    """Values of the lesion's parts in the unit of the scan: (low, high) to draw from."""

    core: tuple[float, float]
    neutral: tuple[float, float]
    rim: tuple[float, float]
    texture: float


CT_MATERIALS = Materials(
    core=(60.0, 110.0), neutral=(-10.0, 60.0), rim=(-100.0, -65.0), texture=10.0
)


def random_lesion(
    kind: str, centre_mm: np.ndarray, rng: np.random.Generator, scale: float = 1.0
) -> Lesion:
    """Draw a lesion's size and look; `scale` shrinks or grows all of it."""
    sizes = {"core": (8.8, 10.8), "rim": (6.5, 9.0), "neutral": (4.0, 8.5)}
    radius = rng.uniform(*sizes[kind]) * scale
    more = {"core": rng.uniform(10.0, 12.0), "rim": rng.uniform(6.5, 8.5), "neutral": 0.0}[kind]
    place = tuple(float(value) for value in centre_mm)
    return Lesion(kind, place, radius, radius + more * scale, int(rng.integers(2**31)))


def paint_lesion(volume: np.ndarray, grid: Grid, lesion: Lesion, materials: Materials) -> None:
    """Paint one lesion into a volume, in place."""
    rng = np.random.default_rng([11, lesion.seed])
    slices, nodule, extra = lesion_shares(grid, lesion)
    part = volume[slices]
    texture = materials.texture * gaussian_filter(rng.standard_normal(part.shape), 0.7)
    inside = rng.uniform(*(materials.core if lesion.kind == "core" else materials.neutral))
    if lesion.kind == "rim":
        part += extra * (rng.uniform(*materials.rim) + texture - part)
    else:
        nodule = np.maximum(nodule, extra)
    part += nodule * (inside + texture - part)


def lesion_shares(
    grid: Grid, lesion: Lesion
) -> tuple[tuple[slice, slice, slice], np.ndarray, np.ndarray]:
    """Slices of the box, share of each voxel filled by the nodule, and by its spicules or rim."""
    rng = np.random.default_rng([13, lesion.seed])
    slices, offset = box_around(grid, np.array(lesion.centre_mm), lesion.outer_mm + 5.0)
    distance = np.sqrt((offset**2).sum(axis=0))
    nodule = filled(distance * (1 + _bumps(offset, distance, rng)) - lesion.radius_mm)
    extra = np.zeros_like(nodule)
    if lesion.kind == "rim":
        extra = filled(distance * (1 + _bumps(offset, distance, rng)) - lesion.outer_mm)
    if lesion.kind == "core":
        for tip in _spicule_tips(lesion, rng):
            start = tip / np.linalg.norm(tip) * lesion.radius_mm * 0.5
            spicule_mm = tube_distance_mm(offset, start, tip, (rng.uniform(3.2, 4.0), 1.4))
            np.maximum(extra, filled(spicule_mm, 2.4), out=extra)
    return slices, nodule, extra


def lesion_mask(grid: Grid, lesion: Lesion) -> np.ndarray:
    """Voxels that carry the finding: nodule with spicules (core) or the shell alone (rim)."""
    slices, nodule, extra = lesion_shares(grid, lesion)
    mask = np.zeros(grid.shape, np.uint8)
    mask[slices] = extra - nodule > 0.5 if lesion.kind == "rim" else np.maximum(nodule, extra) > 0.5
    return mask


def _bumps(offset: np.ndarray, distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A slightly irregular surface: relative change of the distance by direction."""
    unit = offset / np.maximum(distance, 1e-3)
    total = np.zeros_like(distance)
    for strength in (0.06, 0.05, 0.04):
        direction = rng.normal(0, 1.6, 3).reshape(3, 1, 1, 1)
        total += strength * np.sin((unit * direction).sum(axis=0) * 2 + rng.uniform(0, 6))
    return total


def _spicule_tips(lesion: Lesion, rng: np.random.Generator) -> np.ndarray:
    """Ends of 14 to 18 spicules, spread evenly over all directions with some jitter (mm)."""
    count = int(rng.integers(14, 19))
    height = 1 - 2 * (np.arange(count) + 0.5) / count
    turn = np.arange(count) * 2.399963 + rng.uniform(0, 6.28)
    flat = np.sqrt(1 - height**2)
    tips = np.stack([flat * np.cos(turn), flat * np.sin(turn), height], axis=1)
    spin, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    tips = tips @ spin + rng.normal(0, 0.13, tips.shape)
    tips /= np.linalg.norm(tips, axis=1, keepdims=True)
    return tips * lesion.outer_mm * rng.uniform(0.85, 1.0, (count, 1))
