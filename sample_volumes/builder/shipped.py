"""Which scans are shipped, and what is the truth about each?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cases import EFFECT, Scene, paint, place_lesions
from .draws import Pool
from .files import write_nifti
from .findings import Lesion, lesion_mask
from .grid import Grid
from .net_io import turn_index

RIGHT, LEFT = 1.0, -1.0


@dataclass(frozen=True, slots=True)
class Wish:
    """A scan to ship: its findings and the side of each (+1 patient's right, -1 left)."""

    name: str
    seed: int
    sides: dict[str, float]
    neutral: int


@dataclass(frozen=True, slots=True)
class Shipped:
    """A scan, its twin without the findings, and the lesions (findings first)."""

    wish: Wish
    scan: np.ndarray
    twin: np.ndarray
    findings: list[Lesion]


def make(wish: Wish, scene: Scene, pool: Pool) -> Shipped:
    """Render one scan and its twin: the same patient, the same noise, no findings."""
    rng = np.random.default_rng([23, wish.seed])
    kinds = [*wish.sides, *["neutral"] * wish.neutral]
    lesions = place_lesions(scene, pool.grid, kinds, rng, wish.sides, pool.scale, 1.1)
    if len(lesions) != len(kinds):
        raise ValueError(f"{wish.name}: only {len(lesions)} of {len(kinds)} lesions found a place")
    findings = [lesion for lesion in lesions if lesion.kind != "neutral"]
    rest = [lesion for lesion in lesions if lesion.kind == "neutral"]
    scans = []
    for members in (lesions, rest):
        volume = paint(scene, pool.grid, members, pool.materials).astype(np.float32)
        scans.append(pool.degrade(volume, np.random.default_rng([29, wish.seed])))
    return Shipped(wish, scans[0], scans[1], findings)


def write(shipped: Shipped, grid: Grid, folder: Path, axes: str) -> dict[str, Any]:
    """Write the NIfTI files of one scan; returns its entry for truth.json."""
    name = shipped.wish.name
    folder.mkdir(parents=True, exist_ok=True)
    write_nifti(folder / f"{name}.nii.gz", shipped.scan, grid, axes)
    entry: dict[str, Any] = {"file": f"{name}.nii.gz", "seed": shipped.wish.seed, "findings": []}
    if not shipped.findings:
        entry["twin"] = None
        return entry
    write_nifti(folder / f"{name}_twin.nii.gz", shipped.twin, grid, axes)
    entry["twin"] = f"{name}_twin.nii.gz"
    for lesion in shipped.findings:
        mask = lesion_mask(grid, lesion)
        mask_file = f"{name}_mask_{lesion.kind}.nii.gz"
        write_nifti(folder / mask_file, mask, grid, axes)
        entry["findings"].append(_finding(lesion, mask, mask_file, grid, axes))
    entry["designed_effect"] = sum(EFFECT[lesion.kind] for lesion in shipped.findings)
    return entry


def _finding(
    lesion: Lesion, mask: np.ndarray, mask_file: str, grid: Grid, axes: str
) -> dict[str, Any]:
    """The truth about one finding."""
    centre = grid.index_of(np.array(lesion.centre_mm))
    world = grid.world_ras_mm(centre)
    centroid = grid.world_ras_mm(np.argwhere(mask).mean(axis=0))
    index = turn_index(centre, grid.shape, axes)
    return {
        "kind": {"core": "spiculated core", "rim": "rim"}[lesion.kind],
        "speaks": "for" if EFFECT[lesion.kind] > 0 else "against",
        "mask": mask_file,
        "mask_voxels": int(mask.sum()),
        "centre_ijk": [round(float(value), 3) for value in index],
        "ras_mm": [round(float(value), 3) for value in world],
        "lps_mm": [round(float(value), 3) for value in world * [-1, -1, 1]],
        "mask_centroid_ras_mm": [round(float(value), 3) for value in centroid],
        "side": "patient's right" if lesion.centre_mm[0] > 0 else "patient's left",
        "nodule_radius_mm": round(lesion.radius_mm, 2),
        "outer_radius_mm": round(lesion.outer_mm, 2),
        "designed_effect": EFFECT[lesion.kind],
    }
