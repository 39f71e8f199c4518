"""What does a chest without findings look like in Hounsfield units?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from . import chest_parts as parts
from .grid import Grid
from .shapes import blend, ellipsoid_mm, filled, smooth_noise
from .vessels import vessel_share

CHEST_GRID = Grid(
    shape=(96, 80, 72), spacing_mm=(2.8, 2.8, 3.2), origin_ras_mm=(-131.4, -104.2, 1096.4)
)


@dataclass(frozen=True, slots=True)
class Chest:
    """A chest before noise: `hu` (r, a, s), and how deep each voxel lies in a lung (mm, or 0)."""

    hu: np.ndarray
    lung_depth_mm: np.ndarray


@dataclass(frozen=True, slots=True)
class Build:
    """How one patient is built: everything that differs between patients, in mm and HU."""

    half_width_mm: float
    half_depth_mm: float
    fat_mm: float
    wall_mm: float
    diaphragm_mm: float
    blood_hu: float
    lung_hu: float
    rib_phase: float
    heart_mm: float
    shift_mm: tuple[float, float]


def random_build(rng: np.random.Generator) -> Build:
    """Draw a patient."""
    return Build(
        half_width_mm=rng.uniform(118, 128),
        half_depth_mm=rng.uniform(88, 95),
        fat_mm=rng.uniform(4, 9),
        wall_mm=rng.uniform(16.5, 21),
        diaphragm_mm=rng.uniform(-122, -102),
        blood_hu=float(rng.choice([42.0, 45.0, rng.uniform(90, 230)])),
        lung_hu=rng.uniform(-885, -815),
        rib_phase=rng.uniform(0, 1),
        heart_mm=rng.uniform(38, 48),
        shift_mm=(rng.uniform(-5, 5), rng.uniform(-3, 3)),
    )


def render_chest(seed: int, grid: Grid = CHEST_GRID) -> Chest:
    """Render one patient from a seed: HU without noise, and the depth inside the lungs."""
    rng = np.random.default_rng([7, seed])
    build = random_build(rng)
    right, anterior, superior = grid.open_mm()
    mesh = (right - build.shift_mm[0], anterior - build.shift_mm[1] - 7.0, superior)
    hu = np.full(grid.shape, -1000.0, np.float32)
    parts.paint_table(hu, grid, build.half_depth_mm)
    skin_mm, cage_mm = body_surfaces_mm(mesh, build)
    parts.paint_wall(hu, skin_mm, cage_mm, build.fat_mm, rng)
    lung_share = lung_shares(mesh, cage_mm, build, rng)
    hu_lung = _lung_tissue(grid, build, rng)
    blend(hu, lung_share, hu_lung)
    depth_mm = distance_transform_edt(lung_share > 0.5, sampling=grid.spacing_mm)
    blend(hu, vessel_share(grid, depth_mm, rng) * (depth_mm > 0), min(build.blood_hu, 120.0))
    lung_hu = hu.copy()
    parts.paint_mediastinum(hu, mesh, build.blood_hu, build.heart_mm, rng)
    parts.paint_below_diaphragm(hu, mesh, cage_mm, build.diaphragm_mm)
    parts.paint_spine(hu, mesh, rng)
    parts.paint_ribs(hu, mesh, cage_mm, build.rib_phase)
    parts.paint_sternum_and_scapulae(hu, mesh, build.half_width_mm, build.half_depth_mm)
    parts.paint_airways(hu, grid, build.shift_mm)
    lung = (lung_share > 0.5) & (np.abs(hu - lung_hu) < 100)
    depth_mm = distance_transform_edt(lung, sampling=grid.spacing_mm).astype(np.float32)
    return Chest(hu=hu, lung_depth_mm=np.minimum(depth_mm, grid.edge_depth_mm()))


def body_surfaces_mm(
    mesh: tuple[np.ndarray, np.ndarray, np.ndarray], build: Build
) -> tuple[np.ndarray, np.ndarray]:
    """Signed distances (mm) to the skin and to the inside of the rib cage."""
    right, anterior, superior = mesh
    taper = 1.0 - 0.07 * np.clip((superior - 30) / 85, 0, 1) ** 2
    skin = (right / taper, anterior, superior)
    skin_mm = ellipsoid_mm(
        skin, (0, 0, 0), (build.half_width_mm, build.half_depth_mm, np.inf), power=2.5
    )
    apex = np.clip((superior - 12) / 110.0, 0, 0.98)
    narrowing = np.sqrt(1.0 - apex**2.6)
    inside_width = (build.half_width_mm - build.wall_mm) * narrowing
    inside_depth = (build.half_depth_mm - build.wall_mm) * (0.35 + 0.65 * narrowing)
    scaled = (right / inside_width, (anterior + 12 * (1 - narrowing)) / inside_depth)
    radius = (np.abs(scaled[0]) ** 2.3 + np.abs(scaled[1]) ** 2.3) ** (1 / 2.3)
    cage_mm = (radius - 1.0) * np.minimum(inside_width, inside_depth)
    return skin_mm.astype(np.float32), cage_mm.astype(np.float32)


def lung_shares(
    mesh: tuple[np.ndarray, np.ndarray, np.ndarray],
    cage_mm: np.ndarray,
    build: Build,
    rng: np.random.Generator,
) -> np.ndarray:
    """Share of each voxel filled by lung: in the cage, beside the heart, above the diaphragm."""
    right, anterior, superior = mesh
    middle_mm = 21 + 6 * np.exp(-((superior - 5) ** 2) / 900) + rng.uniform(-2, 3)
    middle_mm = middle_mm - 14 * np.clip((anterior - 25) / 30, 0, 1)
    beside_mm = middle_mm - np.abs(right + 2)
    dome_mm = 26 * np.exp(-(((np.abs(right) - 55) / 40) ** 2) - ((anterior - 5) / 55) ** 2)
    slope_mm = 0.30 * (anterior + 30)
    above_mm = build.diaphragm_mm + dome_mm + slope_mm + 6 * (right > 0) - superior
    spine_mm = ellipsoid_mm(mesh, (0, -58, 0), (24, 30, np.inf))
    outside_mm = np.maximum.reduce(
        np.broadcast_arrays(cage_mm + 1.5, beside_mm, above_mm, -spine_mm)
    )
    return filled(outside_mm).astype(np.float32)


def _lung_tissue(grid: Grid, build: Build, rng: np.random.Generator) -> np.ndarray:
    """Aerated lung: denser towards the back, with patchy ventilation and faint fissures."""
    right, anterior, superior = grid.open_mm()
    patchy = 14 * smooth_noise(grid.shape, 5.0, rng) + 16 * smooth_noise(grid.shape, 1.6, rng)
    gradient = -0.35 * anterior
    tissue = build.lung_hu + gradient + patchy
    plane_mm = superior - 0.85 * anterior - rng.uniform(-14, 6) + 0.05 * np.abs(right)
    tissue = tissue + 70 * np.exp(-((plane_mm / 2.2) ** 2))
    return tissue.astype(np.float32)


def add_noise(hu: np.ndarray, sigma_hu: float, rng: np.random.Generator) -> np.ndarray:
    """Scanner noise, a little correlated between neighbours; less of it in the air outside."""
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noise = 0.6 * noise + 0.8 * gaussian_filter(noise, 0.7) / 0.36
    scale = np.where(hu < -960, 0.35, 1.0)
    return np.clip(hu + sigma_hu * scale * noise, -1024, 3071).astype(np.float32)
