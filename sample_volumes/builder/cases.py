"""Which scan is which: a background, its lesions, and its twin without the findings?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .findings import Lesion, Materials, paint_lesion, random_lesion
from .grid import Grid

BASE_LOG_ODDS = -1.0
EFFECT = {"core": 3.5, "rim": -3.0, "neutral": 0.0}


@dataclass(frozen=True, slots=True)
class Scene:
    """A background with the places where lesions may lie.

    Attributes:
        volume: Noise-free scan (r, a, s).
        depth_mm: Distance to the nearest place where no lesion may lie (0 = forbidden).
    """

    volume: np.ndarray
    depth_mm: np.ndarray


def designed_log_odds(kinds: list[str]) -> float:
    """The log-odds a perfect network gives to a scan with these lesions."""
    return BASE_LOG_ODDS + sum(EFFECT[kind] for kind in kinds)


def place_lesions(
    scene: Scene,
    grid: Grid,
    kinds: list[str],
    rng: np.random.Generator,
    side: dict[str, float] | None = None,
    scale: float = 1.0,
    clearance: float = 0.88,
) -> list[Lesion]:
    """Draw lesions that lie inside the allowed region and keep apart from each other.

    Args:
        side: Optional wish per kind: +1 patient's right, -1 patient's left.
        scale: Size of the lesions against those of the chest.
        clearance: Distance of a lesion's centre to forbidden places, in lesion radii.
    """
    placed: list[Lesion] = []
    right_mm = grid.axis_mm(0)
    for kind in kinds:
        for _ in range(40):
            lesion = random_lesion(kind, np.zeros(3), rng, scale)
            allowed = scene.depth_mm > clearance * lesion.outer_mm
            wish = (side or {}).get(kind)
            if wish is not None:
                allowed = allowed & (wish * right_mm > 20)[:, None, None]
            spots = np.flatnonzero(allowed)
            if spots.size == 0:
                continue
            index = np.unravel_index(int(rng.choice(spots)), grid.shape)
            centre = np.array([grid.axis_mm(axis)[index[axis]] for axis in range(3)])
            centre += rng.uniform(-0.5, 0.5, 3) * np.array(grid.spacing_mm)
            near = any(
                np.linalg.norm(centre - np.array(other.centre_mm))
                < other.outer_mm + lesion.outer_mm + 4.0
                for other in placed
            )
            if not near:
                moved = tuple(float(value) for value in centre)
                placed.append(Lesion(kind, moved, lesion.radius_mm, lesion.outer_mm, lesion.seed))
                break
    return placed


def paint(scene: Scene, grid: Grid, lesions: list[Lesion], materials: Materials) -> np.ndarray:
    """The scene's scan with these lesions in it, before noise."""
    volume = scene.volume.copy()
    for lesion in lesions:
        paint_lesion(volume, grid, lesion, materials)
    return volume
