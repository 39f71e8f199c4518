"""Which traps move or blur a map: resizing, saved files, the size of the cells, windows?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from med_gradcam.checkup.facts import Facts, Numbers
from med_gradcam.checkup.rows import (
    CAPTUM,
    EVERY,
    GRAD_CAM,
    HEIRS,
    MEDCAM,
    MONAI,
    NNUNET_CAM,
    TORCHCAM,
    Row,
    Verdict,
    absent,
    mm,
    percent,
)
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry, cells, point_words

ONE_VOXEL, HALF_VOXEL = 1.0, 0.5
UNSEEN_MM = 0.05
NODULE_MM, LESION_MM = 30.0, 10.0  # what a lung nodule is at most; a lesion that one measures


def strongest(f: Facts) -> tuple[int, int, int]:
    """The cell that speaks most: of the ledger where there is one, else of Grad-CAM."""
    values = f.ledger.evidence if isinstance(f.ledger, Explanation) else f.gradcam()
    i, j, k = np.unravel_index(int(np.abs(values).argmax()), values.shape)
    return int(i), int(j), int(k)


def cell_grid(f: Facts) -> Geometry:
    """Where the cells really lie."""
    return cells(f.prepared.grid, f.cells.jump, f.cells.start, f.shape)


def half_pixel(voxels: int, count: int) -> Numbers:
    """Where the cells' centres are drawn, voxels, by resizing without aligned corners.

    Source: torch.nn.functional.interpolate(align_corners=False), any mode.
    """
    return np.asarray((np.arange(count) + 0.5) * voxels / count - 0.5)


def aligned(voxels: int, count: int) -> Numbers:
    """The same for a zoom that lays the first and last cells on the first and last voxels.

    Source: scipy.ndimage.zoom(grid_mode=False), as in pytorch-grad-cam's scale_cam_image.
    """
    return np.asarray(np.arange(count) * (voxels - 1) / max(count - 1, 1))


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """How far a way of resizing draws cells from where they look.

    At the strongest cell, in voxels and as a vector in RAS+ mm; at worst per axis, in voxels.
    """

    here: Numbers
    ras_mm: Numbers
    worst: Numbers

    @property
    def size(self) -> float:
        """How far the strongest cell is off, mm."""
        return float(np.linalg.norm(self.ras_mm))

    @property
    def words(self) -> str:
        """The same for people."""
        if self.size < UNSEEN_MM:
            return "in its place"
        return f"{self.size:.1f} mm off, towards {point_words(self.ras_mm)},"

    def figures(self, name: str) -> dict[str, float | list[float]]:
        """All of it for the record."""
        return {
            f"{name}_mm": self.size,
            f"{name}_voxels": self.here.tolist(),
            f"{name}_ras_mm": self.ras_mm.tolist(),
            f"{name}_worst_voxels": self.worst.tolist(),
        }


def _drawn(f: Facts, rule: Callable[[int, int], Numbers]) -> _Drawn:
    parts = zip(f.prepared.grid.shape, f.shape, f.cells.start, f.cells.jump, strict=True)
    off = [  # a single cell is drawn the same all along its axis
        (rule(size, n) - (start + jump * np.arange(n))) * (n > 1) for size, n, start, jump in parts
    ]
    here = np.array([o[n] for o, n in zip(off, strongest(f), strict=True)])
    world = f.prepared.grid.affine[:3, :3] @ here
    return _Drawn(here, world, np.array([np.abs(o).max() for o in off]))


def resized(f: Facts) -> Row:
    """S1, S31: how far the usual ways of resizing draw a cell from where it looks."""
    steps = np.array(f.prepared.grid.spacing_mm)
    half, zoom = _drawn(f, half_pixel), _drawn(f, aligned)
    far = [float(np.linalg.norm(one.worst * steps)) for one in (half, zoom)]
    bad = [one.worst.max() > ONE_VOXEL for one in (half, zoom)]
    fair = max(half.worst.max(), zoom.worst.max()) <= HALF_VOXEL
    verdict: Verdict = "wrong" if any(bad) else "fine" if fair else "check"
    tools = [*((MONAI, MEDCAM, CAPTUM) if bad[0] else ()), *((GRAD_CAM, *HEIRS) if bad[1] else ())]
    doubt = "" if f.cells.how == "exact" else f" (the place of the cells is {f.cells.how})"
    lattice = zip(f.cells.start, f.cells.jump, "ijk", strict=True)
    return Row(
        "place",
        ("S1", "S31"),
        verdict,
        f"the strongest cell is drawn {half.words} by half-pixel resizing, and {zoom.words} by a "
        f"zoom that aligns corners; anywhere in the scan up to {far[0]:.1f} and {far[1]:.1f} mm "
        f"off{doubt}",
        "these ways of drawing show the cells where they look"
        if verdict == "fine"
        else "an overlay shows the finding beside itself, by this vector",
        "move such an overlay back by the vector, or draw the cells again where they lie: voxel "
        + ", ".join(f"{s:g} + {j:g} {n}" for s, j, n in lattice),
        tuple(tools),
        "corners are aligned by pytorch-grad-cam in 3D and what builds on it; the rest, and people "
        "who resize torchcam's maps, go by half-pixels",
        {
            **half.figures("half_pixel"),
            **zoom.figures("aligned"),
            "half_pixel_worst_mm": far[0],
            "aligned_worst_mm": far[1],
            "axes": f.prepared.grid.axcodes,
            "cell_start_voxels": list(f.cells.start),
            "cell_jump_voxels": list(f.cells.jump),
            "placed": f.cells.how,
        },
    )


def saved(f: Facts) -> Row:
    """S10, S24: where a file of the raw map would lie."""
    here = strongest(f)
    i, j, k = here
    true = cell_grid(f).world_ras(here)
    medcam = float(np.linalg.norm(np.array([j, k, i]) - true))
    kept = float(np.linalg.norm(f.prepared.grid.world_ras(here) - true))
    wide = [n * s for n, s in zip(f.prepared.grid.shape, f.prepared.grid.spacing_mm, strict=True)]
    small = [n * s for n, s in zip(f.shape, f.prepared.grid.spacing_mm, strict=True)]
    same = f.shape == f.prepared.grid.shape
    return Row(
        "saved files",
        ("S10", "S24"),
        "wrong",
        f"a saved map of these {'x'.join(str(n) for n in f.shape)} cells would lie {medcam:.0f} mm "
        f"off in medcam's file (no affine, axes turned)"
        + (
            ""
            if same
            else f", and {kept:.0f} mm off with the scan's affine kept on it, where it "
            f"covers {mm(small)} instead of {mm(wide)}"
        ),
        "opened beside the scan, the file is a speck or lies elsewhere",
        "take the numbers, not the place, from such files; ours carry the cells' own affine",
        (MEDCAM, *(() if same else (TORCHCAM, CAPTUM))),
        "medcam in every file; torchcam and captum with a MetaTensor",
        {"medcam_mm": medcam, "kept_affine_mm": kept, "kept_affine_covers_mm": small},
    )


def resolution(f: Facts) -> Row:
    """The smallest thing that this layer can tell apart."""
    grid = cell_grid(f)
    spacing = grid.spacing_mm
    smallest = 2 * max(spacing)
    ball = 4 / 3 * math.pi * (LESION_MM / 2) ** 3 / 1000
    share = ball / grid.voxel_ml
    sees = [
        field * s
        for field, s in zip(f.cells.receptive_field, f.prepared.grid.spacing_mm, strict=True)
    ]
    fine, auto = smallest <= NODULE_MM, f.auto
    return Row(
        "smallest lesion",
        (),
        "fine" if fine else "check",
        f"cells of {mm(spacing)}: nothing under {smallest:.0f} mm is told apart, and a lesion of "
        f"{LESION_MM:.0f} mm "
        + (f"fills {percent(share)} of one cell" if share < 1 else f"covers {share:.1f} cells"),
        "a smooth overlay of such cells looks finer than it is; two things in one cell are one"
        if not fine
        else "a map of this layer can tell a nodule from its surroundings",
        f"name a finer layer; {f.name(auto.layer)} tells things of "
        f"{auto.smallest_localisable_mm:.0f} mm apart"
        if isinstance(auto, Explanation) and auto.smallest_localisable_mm < smallest and not fine
        else "read a map no finer than its cells",
        (EVERY,),
        "",
        {
            "cell_mm": list(spacing),
            "smallest_mm": smallest,
            "lesion_10_mm_in_cells": share,
            "receptive_field_mm": sees,
        },
    )


def windows(f: Facts) -> Row:
    """S25: windows of a scan that are each scaled to 0..1."""
    patch = f.model.input.patch
    image, grid = f.prepared.image, f.prepared.grid
    count = 1
    if patch is not None:
        scan = np.abs(np.linalg.inv(grid.affine)[:3, :3] @ image.affine[:3, :3]) @ image.shape
        count = math.prod(
            math.ceil(float(n) / p - 0.1) or 1 for n, p in zip(scan, patch, strict=True)
        )
    if count <= 1:
        return absent("windows", ("S25",), "the network sees the whole scan at once")
    return Row(
        "windows",
        ("S25",),
        "check",
        f"the scan takes about {count} patches of this network, and one was looked at",
        "where every patch is scaled to 0..1 on its own, an empty one is as bright as that with "
        "the finding",
        "scale once, after the patches were put together",
        (MONAI, NNUNET_CAM),
        "MONAI where GradCAM is wired into sliding_window_inference",
        {"patches": count},
    )


ROWS = (resized, saved, resolution, windows)
