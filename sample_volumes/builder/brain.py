"""What does a head without findings look like in T1-weighted MR? The MNI152 brain, varied."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform, distance_transform_edt, gaussian_filter

from .cases import Scene
from .draws import Pool
from .findings import Materials
from .grid import Grid
from .net_io import foreground
from .shapes import smooth_noise

BRAIN_GRID = Grid(shape=(80, 96, 80), spacing_mm=(2.0, 2.0, 2.0), origin_ras_mm=(-79, -112, -76))
MR_MATERIALS = Materials(
    core=(860.0, 980.0), neutral=(640.0, 740.0), rim=(110.0, 190.0), texture=12.0
)
LESION_SCALE = 0.8
WHITE_MATTER = 600.0
TEMPLATE = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@cache
def template() -> tuple[np.ndarray, np.ndarray]:
    """The 1 mm MNI152 2009a average brain, white matter near 600, and its affine (RAS+ mm)."""
    with (files("nilearn") / "datasets" / "data" / TEMPLATE).open("rb") as stream:
        image = nib.Nifti1Image.from_bytes(gzip.decompress(stream.read()))
    data = np.asarray(image.dataobj, np.float32)
    return gaussian_filter(data, 0.7) * (WHITE_MATTER / 218.0), image.affine


def render_brain(seed: int, grid: Grid = BRAIN_GRID) -> Scene:
    """One head from a seed, without noise, and the depth below the brain's surface (mm)."""
    rng = np.random.default_rng([37, seed])
    data, affine = template()
    pose = _random_pose(rng)
    to_template = np.linalg.inv(affine) @ pose @ grid.affine
    brain = affine_transform(
        data, to_template[:3, :3], to_template[:3, 3], output_shape=grid.shape, order=1
    )
    inside = brain > 0.25 * WHITE_MATTER
    texture = 1 + 0.02 * smooth_noise(grid.shape, 1.0, rng)
    gamma = rng.uniform(0.85, 1.2)
    brain = WHITE_MATTER * (np.clip(brain, 0, None) / WHITE_MATTER) ** gamma * texture
    depth = distance_transform_edt(inside, sampling=grid.spacing_mm)
    return Scene(brain.astype(np.float32), depth.astype(np.float32))


def _random_pose(rng: np.random.Generator) -> np.ndarray:
    """A small rotation, scaling and shift (4x4, mm)."""
    pose = np.eye(4)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        angle = np.deg2rad(rng.uniform(-7, 7))
        turn = np.eye(4)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        pose = pose @ turn
    pose[:3, :3] = pose[:3, :3] @ np.diag(rng.uniform(0.96, 1.08, 3))
    pose[:3, 3] = rng.uniform(-3, 3, 3)
    return pose


def brain_pool(seeds: range) -> Pool:
    """Heads from seeds, with varying field and noise."""
    scenes = []
    for seed in seeds:
        scene = render_brain(seed)
        scenes.append(Scene(scene.volume.astype(np.float16), scene.depth_mm.astype(np.float16)))
    return Pool(BRAIN_GRID, scenes, MR_MATERIALS, LESION_SCALE, np.inf, _varied_mr, uniform_mr)


def steady_brain_pool() -> Pool:
    """How the shipped heads are made: always the same noise, a moderate field."""
    return Pool(BRAIN_GRID, [], MR_MATERIALS, LESION_SCALE, np.inf, _steady_mr, uniform_mr)


def _varied_mr(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Field of up to 20 %, Rician noise of 6 to 24, gain of 8 %."""
    return _degrade(volume, rng, rng.uniform(0.03, 0.2), rng.uniform(6, 24), rng.normal(1, 0.04))


def _steady_mr(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Field of 10 %, Rician noise of 12."""
    return _degrade(volume, rng, 0.1, 12.0, 1.0)


def _degrade(
    volume: np.ndarray, rng: np.random.Generator, field: float, sigma: float, gain: float
) -> np.ndarray:
    """Receive field (smooth, per cent of one), gain and Rician noise; air keeps little of it."""
    shape = volume.shape
    axes = [np.linspace(-1, 1, count, dtype=np.float32) for count in shape]
    x, y, z = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    push = rng.normal(0, 0.5, 6)
    smooth = push[0] * x + push[1] * y + push[2] * z + push[3] * x * y + push[4] * y * z
    smooth = smooth + push[5] * (x * x + y * y + z * z - 1)
    image = volume.astype(np.float32) * gain * np.exp(field * smooth)
    scale = sigma * np.where(volume > 60, 1.0, 0.15).astype(np.float32)
    real = image + scale * rng.standard_normal(shape, dtype=np.float32)
    imaginary = scale * rng.standard_normal(shape, dtype=np.float32)
    return np.round(np.sqrt(real**2 + imaginary**2))


def uniform_mr(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The head with all tissue at one value, mostly its median; air unchanged."""
    volume = volume.astype(np.float32)
    inside = foreground(volume)
    if not inside.any():
        return volume
    middle = float(np.median(volume[inside]))
    value = middle if rng.random() < 0.5 else rng.uniform(300, 750)
    return np.where(inside, np.float32(value), volume)
