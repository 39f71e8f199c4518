"""Where are bones, heart, vessels, airways, abdomen and table of the chest phantom?"""

from __future__ import annotations

import numpy as np

from .grid import Grid
from .shapes import blend, ellipsoid_mm, filled, paint_tube, smooth_noise

Mesh = tuple[np.ndarray, np.ndarray, np.ndarray]


def paint_table(hu: np.ndarray, grid: Grid, half_depth_mm: float) -> None:
    """A curved carbon couch under the back, in place."""
    right, anterior, _ = grid.open_mm()
    top_mm = -half_depth_mm - 3.0 + 6.0 * (right / 110.0) ** 2
    below = filled(anterior - top_mm)
    hollow = filled(anterior - top_mm + 5.0)
    wide = filled(np.abs(right) - 122.0)
    shell = np.broadcast_to((below - 0.85 * hollow) * wide, hu.shape)
    blend(hu, shell, -350.0)


def paint_wall(
    hu: np.ndarray,
    skin_mm: np.ndarray,
    cage_mm: np.ndarray,
    fat_mm: float,
    rng: np.random.Generator,
) -> None:
    """Skin, subcutaneous fat, muscle with fat planes, and soft tissue inside the cage, in place."""
    streaks = smooth_noise(hu.shape, 1.3, rng)
    blend(hu, filled(skin_mm), 20.0)
    blend(hu, filled(skin_mm + 3.0), -100.0 + 8.0 * streaks)
    blend(hu, filled(skin_mm + fat_mm), 48.0 + 10.0 * streaks)
    planes = np.clip(np.abs(smooth_noise(hu.shape, 2.5, rng)) - 0.05, 0, 0.25) < 0.12
    between = filled(skin_mm + fat_mm + 2.0) * filled(-cage_mm + 9.0)
    blend(hu, 0.6 * between * planes, -80.0)
    blend(hu, filled(cage_mm - 2.0), -60.0)
    blend(hu, filled(cage_mm + 1.0), 38.0)


def paint_mediastinum(
    hu: np.ndarray, mesh: Mesh, blood_hu: float, heart_mm: float, rng: np.random.Generator
) -> None:
    """Mediastinal fat, heart, aorta, caval vein and pulmonary trunk, in place."""
    superior = mesh[2]
    fat = filled(ellipsoid_mm(mesh, (1, 20, 20), (26, 34, np.inf))) * filled(-superior - 5)
    inside = filled(-hu - 400) < 0.5  # not lung
    blend(hu, fat * inside * 0.85, -95.0)
    sac = ellipsoid_mm(mesh, (-24, 18, -46), (heart_mm + 4, 38, 43))
    blend(hu, filled(sac), -90.0)
    muscle = ellipsoid_mm(mesh, (-24, 18, -46), (heart_mm, 34, 39))
    blend(hu, filled(muscle), 50.0)
    for centre, radii in (
        ((-40, 20, -54), (21, 21, 27)),
        ((2, 28, -48), (19, 18, 25)),
        ((-12, -6, -28), (26, 13, 17)),
    ):
        blend(hu, filled(ellipsoid_mm(mesh, centre, radii)), blood_hu)
    top_mm = 44.0 + rng.uniform(-4, 4)
    tubes = (
        ((-19, -40), 11.5, (-200.0, top_mm)),
        ((11, 10), 15.0, (-34.0, top_mm)),
        ((24, 14), 9.0, (-30.0, 115.0)),
        ((-14, 22), 13.0, (-12.0, 16.0)),
        ((17, -6), 5.5, (top_mm, 115.0)),
        ((-13, -6), 5.0, (top_mm, 115.0)),
    )
    for (right_mm, anterior_mm), radius_mm, (low_mm, high_mm) in tubes:
        tube = ellipsoid_mm(mesh, (right_mm, anterior_mm, 0), (radius_mm, radius_mm, np.inf))
        between = filled(low_mm - superior) * filled(superior - high_mm)
        blend(hu, filled(tube) * between, blood_hu)
    _paint_arch(hu, mesh, top_mm, blood_hu)


def _paint_arch(hu: np.ndarray, mesh: Mesh, top_mm: float, blood_hu: float) -> None:
    """The aortic arch: half a ring from the ascending to the descending aorta, in place."""
    start, end = np.array([11.0, 10.0]), np.array([-19.0, -40.0])
    middle, half = (start + end) / 2, (end - start) / 2
    length = float(np.linalg.norm(half))
    unit = half / length
    along = (mesh[0] - middle[0]) * unit[0] + (mesh[1] - middle[1]) * unit[1]
    aside = (mesh[0] - middle[0]) * -unit[1] + (mesh[1] - middle[1]) * unit[0]
    up = np.maximum(mesh[2] - top_mm, 0) * 1.25
    ring_mm = np.sqrt((np.sqrt(along**2 + up**2) - length) ** 2 + aside**2) - 12.0
    blend(hu, filled(ring_mm) * filled(top_mm - mesh[2]), blood_hu)


def paint_below_diaphragm(
    hu: np.ndarray, mesh: Mesh, cage_mm: np.ndarray, diaphragm_mm: float
) -> None:
    """Liver on the right, spleen and a gas-filled stomach on the left, in place."""
    right, _, superior = mesh
    soft = filled(cage_mm + 4.0) * (hu > -300) * filled(superior - diaphragm_mm - 34)
    blend(hu, soft * filled(-right - 12) * 0.9, 58.0)
    blend(hu, soft * filled(right + 30) * 0.9, 46.0)
    gas = ellipsoid_mm(mesh, (-52, 28, diaphragm_mm - 12), (20, 16, 15))
    blend(hu, filled(gas) * filled(cage_mm + 6.0), -950.0)


def paint_spine(hu: np.ndarray, mesh: Mesh, rng: np.random.Generator) -> None:
    """Vertebral bodies with discs, canal, pedicles, transverse and spinous processes, in place."""
    right, anterior, superior = mesh
    phase = np.mod(superior + rng.uniform(0, 25), 25.0)
    disc = np.clip((np.abs(phase - 12.5) - 9.5) / 2.0, 0, 1)
    body = ellipsoid_mm(mesh, (0, -52, 0), (16, 13.5, np.inf), power=2.3)
    bone = 165.0 + 25 * smooth_noise(hu.shape, 0.8, rng)
    shell = np.clip(1 - np.abs(body + 1.5) / 2.5, 0, 1)
    blend(hu, filled(body), bone * (1 - disc) + 75.0 * disc + 330 * shell * (1 - 0.8 * disc))
    ring = ellipsoid_mm(mesh, (0, -71, 0), (13, 9, np.inf))
    blend(hu, filled(ring) * (0.45 + 0.55 * (1 - disc)), 420.0)
    blend(hu, filled(ellipsoid_mm(mesh, (0, -70.5, 0), (9, 6.5, np.inf))), 25.0)
    wings = ellipsoid_mm((right, anterior, phase), (0, -74, 9), (32, 4.5, 6.5))
    blend(hu, filled(wings), 330.0)
    blend(hu, filled(ellipsoid_mm(mesh, (0, -70.5, 0), (8, 6.0, np.inf))), 25.0)
    spike = ellipsoid_mm((right, anterior, phase), (0, -83, 9), (3.5, 11, 9))
    blend(hu, filled(spike), 350.0)


def paint_ribs(hu: np.ndarray, mesh: Mesh, cage_mm: np.ndarray, phase: float) -> None:
    """Ribs as bands around the cage that slope down to cartilage in front, in place."""
    right, anterior, superior = mesh
    angle = np.arctan2(anterior + 15.0, np.abs(right) + 1e-3)  # -pi/2 back .. +pi/2 front
    around = (angle + np.pi / 2) / np.pi
    height_mm = superior + 62.0 * around**1.2
    turn_mm = (np.mod(height_mm / 25.0 + phase, 1.0) - 0.5) * 25.0
    across = np.sqrt(((cage_mm - 6.5) / 4.6) ** 2 + (turn_mm / 6.6) ** 2)
    inside_mm = (across - 1.0) * 4.6
    reach = filled((np.abs(right) < 16) * 50.0 - 25.0) * (cage_mm > -2)
    cortex = np.clip(1 - np.abs(inside_mm + 1.2) / 2.2, 0, 1)
    bone = np.where(around > 0.80, 110.0, 190.0 + 520.0 * cortex)
    blend(hu, filled(inside_mm) * reach, bone)


def paint_sternum_and_scapulae(
    hu: np.ndarray, mesh: Mesh, half_width_mm: float, half_depth_mm: float
) -> None:
    """The breastbone in front and the shoulder blades behind, in place."""
    right, anterior, superior = mesh
    front_mm = half_depth_mm - 17.0 - 0.10 * np.clip(superior, 0, None)
    sternum = ellipsoid_mm((right, anterior - front_mm, superior), (0, 0, 22), (17, 5.5, 78), 3.0)
    blend(hu, filled(sternum), 230.0)
    for side in (1.0, -1.0):
        outward = right * side - (half_width_mm - 50.0)
        plate_mm = np.abs(anterior + half_depth_mm - 25.0 - 0.45 * outward) - 2.6
        wide_mm = np.maximum(np.abs(outward) - 27.0, np.abs(superior - 62.0) - 48.0)
        blend(hu, filled(np.maximum(plate_mm, wide_mm)), 380.0)


def paint_airways(hu: np.ndarray, grid: Grid, shift_mm: tuple[float, float]) -> None:
    """Trachea and main bronchi with a thin wall, in place; the carina lies at the aortic root."""
    centre = np.array([shift_mm[0], shift_mm[1] + 7.0, 0.0])
    carina = centre + np.array([2.0, -18.0, 16.0])
    top = centre + np.array([1.0, -14.0, 130.0])
    paths = [(top, carina, (8.5, 8.5))]
    for side, drop in ((1.0, 24.0), (-1.0, 18.0)):
        hilum = carina + np.array([side * 32.0, 2.0, -drop])
        paths.append((carina, hilum, (6.8, 5.2)))
        paths.append((hilum, hilum + np.array([side * 14.0, -6.0, -26.0]), (4.4, 3.2)))
    for widen, value in ((1.8, 30.0), (0.0, -985.0)):
        share = np.zeros(grid.shape, np.float32)
        for start, end, radii in paths:
            paint_tube(share, grid, start, end, (radii[0] + widen, radii[1] + widen))
        blend(hu, share, value)
