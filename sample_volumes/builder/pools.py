"""Which backgrounds do the networks learn from and are they tested on?"""

from __future__ import annotations

import numpy as np

from .cases import Scene
from .chest import CHEST_GRID, add_noise, render_chest
from .draws import Pool
from .findings import CT_MATERIALS


def chest_pool(seeds: range) -> Pool:
    """Chests from seeds, with scanner noise."""
    scenes = []
    for seed in seeds:
        chest = render_chest(seed)
        scenes.append(Scene(chest.hu.astype(np.float16), chest.lung_depth_mm.astype(np.float16)))
    return Pool(CHEST_GRID, scenes, CT_MATERIALS, 1.0, -500.0, _noisy_ct, _uniform_ct)


def steady_chest_pool() -> Pool:
    """How the shipped chests are made: always the same noise level."""
    return Pool(CHEST_GRID, [], CT_MATERIALS, 1.0, -500.0, _steady_ct, _uniform_ct)


def _steady_ct(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """CT noise of 12 HU."""
    return np.round(add_noise(volume, 12.0, rng))


def _noisy_ct(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """CT noise of 6 to 24 HU and a calibration shift of a few HU."""
    sigma, shift = rng.uniform(6, 24), rng.normal(0, 4)
    return np.round(add_noise(volume.astype(np.float32) + shift, sigma, rng))


def _uniform_ct(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One HU value everywhere: lung mostly, sometimes soft tissue."""
    value = rng.uniform(-980, -600) if rng.random() < 0.75 else rng.uniform(-150, 150)
    return np.full(volume.shape, value, np.float32)
