"""What does one training or test example look like: a scan, and what its log-odds should be?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .cases import Scene, designed_log_odds, paint, place_lesions
from .findings import Lesion, Materials
from .grid import Grid


@dataclass(frozen=True, slots=True)
class Pool:
    """Backgrounds and how to make scans from them.

    Attributes:
        scenes: Noise-free backgrounds.
        scale: Size of the lesions against the chest's.
        brightest: Uniform tissue above this value gets no lesions, as they would not show.
        degrade: (volume, rng) -> scan with noise and everything else that varies.
        uniform: (volume, rng) -> the scan with all tissue replaced by one value.
    """

    grid: Grid
    scenes: list[Scene]
    materials: Materials
    scale: float
    brightest: float
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    uniform: Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class Pair:
    """A scan and its twin with some of the findings removed.

    Attributes:
        scans: In (r, a, s) order.
        log_odds: Designed for each scan.
        present: Lesions in each scan.
        removed: Kinds of the findings that the twin lacks.
        grid: Of both scans.
    """

    scans: tuple[np.ndarray, np.ndarray]
    log_odds: tuple[float, float]
    present: tuple[list[Lesion], list[Lesion]]
    removed: tuple[str, ...]
    grid: Grid


def cropped(pool: Pool, scene: Scene, side: int, rng: np.random.Generator) -> Scene:
    """A cube cut from a scene, mostly where lesions may lie; they must lie wholly inside."""
    spots = np.flatnonzero(scene.depth_mm > 6) if rng.random() < 0.85 else None
    shape = np.array(scene.volume.shape)
    spot = int(rng.choice(spots)) if spots is not None else int(rng.integers(shape.prod()))
    middle = np.array(np.unravel_index(spot, shape)) + rng.integers(-8, 9, 3)
    low = np.clip(middle - side // 2, 0, shape - side)
    box = tuple(slice(int(start), int(start) + side) for start in low)
    edge_mm = replace(pool.grid, shape=(side, side, side)).edge_depth_mm()
    depth = np.minimum(scene.depth_mm[box].astype(np.float32), edge_mm)
    return Scene(scene.volume[box], depth)


def draw_pair(
    pool: Pool, rng: np.random.Generator, *, plain: bool = False, crop: int | None = None
) -> Pair:
    """Draw a scan and its twin.

    Args:
        plain: Leave out the augmentations (for testing).
        crop: Voxels per side of the cube to draw instead of the whole scan.
    """
    scene = pool.scenes[int(rng.integers(len(pool.scenes)))]
    if crop is not None:
        scene = cropped(pool, scene, crop, rng)
        pool = replace(pool, grid=replace(pool.grid, shape=(crop, crop, crop)))
    if not plain and rng.random() < 0.5:
        scene = Scene(scene.volume[::-1], scene.depth_mm[::-1])
    if not plain and rng.random() < 0.12:
        scene = Scene(pool.uniform(scene.volume, rng), scene.depth_mm)
    visible = float(np.median(scene.volume)) < pool.brightest or float(scene.volume.std()) > 1
    kinds = [kind for kind in ("core", "rim") if rng.random() < 0.55]
    kinds += ["neutral"] * int(rng.integers(0, 4 if crop is None else 3))
    lesions = place_lesions(scene, pool.grid, kinds if visible else [], rng, scale=pool.scale)
    kept = [lesion for lesion in lesions if lesion.kind == "neutral"]
    found = [lesion for lesion in lesions if lesion.kind != "neutral"]
    if len(found) == 2 and rng.random() < 0.4:
        kept.append(found[int(rng.integers(2))])
    seed = int(rng.integers(2**31))
    scans, present = [], []
    cuts = [] if plain else _draw_cuts(pool.grid, rng)
    for members in (lesions, kept):
        volume = paint(scene, pool.grid, members, pool.materials)
        same = np.random.default_rng(seed)
        volume = pool.degrade(volume, same)
        present.append(_cut(volume, pool, members, lesions, cuts, seed))
        scans.append(volume)
    targets = [designed_log_odds([lesion.kind for lesion in members]) for members in present]
    removed = tuple(lesion.kind for lesion in found if lesion not in kept)
    return Pair(
        (scans[0], scans[1]), (targets[0], targets[1]), (present[0], present[1]), removed, pool.grid
    )


def _draw_cuts(grid: Grid, rng: np.random.Generator) -> list[tuple[slice, slice, slice]]:
    """Boxes of the scan to be replaced by uniform tissue, so that no place can matter by itself."""
    if rng.random() < 0.4:
        return []
    boxes = []
    for _ in range(int(rng.integers(1, 5))):
        ends = []
        for count in grid.shape:
            size = int(count * rng.uniform(0.2, 0.75))
            low = int(rng.integers(-size // 3, count - size + size // 3 + 1))
            ends.append(slice(max(low, 0), min(low + size, count)))
        boxes.append((ends[0], ends[1], ends[2]))
    return boxes


def _cut(
    volume: np.ndarray,
    pool: Pool,
    members: list[Lesion],
    everything: list[Lesion],
    boxes: list[tuple[slice, slice, slice]],
    seed: int,
) -> list[Lesion]:
    """Replace boxes by uniform tissue, in place; returns the lesions that are still there.

    A box that would cut through a lesion is left out.
    """
    rng = np.random.default_rng([17, seed])
    blank = pool.uniform(volume, rng) if boxes else volume
    gone: set[int] = set()
    for box in boxes:
        states = [_covered(pool.grid, lesion, box) for lesion in everything]
        if None in states:
            continue
        volume[box] = blank[box]
        gone |= {lesion.seed for lesion, state in zip(everything, states, strict=True) if state}
    return [lesion for lesion in members if lesion.seed not in gone]


def _covered(grid: Grid, lesion: Lesion, box: tuple[slice, slice, slice]) -> bool | None:
    """Whether a box holds the whole lesion (True), none of it (False) or a part (None)."""
    centre = grid.index_of(np.array(lesion.centre_mm))
    reach = (lesion.outer_mm + 4.0) / np.array(grid.spacing_mm)
    low = np.array([part.start for part in box])
    high = np.array([part.stop - 1 for part in box])
    if np.any(centre + reach < low) or np.any(centre - reach > high):
        return False
    whole = np.all((centre - reach >= low) | (low == 0))
    whole &= bool(np.all((centre + reach <= high) | (high == np.array(grid.shape) - 1)))
    return True if whole else None
