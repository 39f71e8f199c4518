"""What do the methods find on a real chest CT with a real trained nodule network?

Needs MED_GRADCAM_REAL_DATA (a folder with ct_chest_c3n00247 and nets/luna_nodule_cls). For each
of three lesions and each block, with lung as the reference:
    near    net evidence (log-odds) over the voxels within 10 mm of the lesion's centre, dense map
    true    z(x) - z(x with the silver label, dilated by 2 voxels, set to the reference)
    energy  share of the positive evidence within those 10 mm, against the share of the volume
    peak    distance of the strongest raising cell from the lesion's centre
Run it from the repository: python -m benchmarks.real_ct
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import med_gradcam as mg
from med_gradcam import reference
from med_gradcam.prepare import prepare
from med_gradcam.summary import evidence_within, peaks

# Centres as column, row, slice of the 45 slices at hand; label in the silver mask.
LESIONS = {
    "primary": ((108, 168, 17), 1),
    "nodule left": ((443, 277, 16), 2),
    "nodule right": ((51, 287, 29), 3),
}
NEAR_MM = 10.0
METHODS = ("secant", "integrated", "hirescam", "gradcam")  # the first two find a layer of their own


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one layer on one lesion."""

    lesion: str
    method: str
    layer: str
    near: float
    true: float
    energy_over_chance: float
    peak_mm: float
    residual: float | None
    explanation: Any


def folder() -> Path:
    """Where the real data lie."""
    where = os.environ.get("MED_GRADCAM_REAL_DATA")
    if not where:
        raise SystemExit("MED_GRADCAM_REAL_DATA is not set: no real scans to measure on.")
    return Path(where)


def scan_and_net() -> tuple[mg.Volume, mg.Model]:
    """The chest CT and the nodule network."""
    home = folder()
    volume = mg.read(home / "ct_chest_c3n00247" / "dicom")
    return volume, mg.load_model(home / "nets" / "luna_nodule_cls")


def at(lesion: str) -> str:
    """The --at of a lesion's centre."""
    return "ijk:" + ",".join(str(n) for n in LESIONS[lesion][0])


def within(volume: mg.Volume, lesion: str, radius_mm: float = NEAR_MM) -> npt.NDArray[np.bool_]:
    """The voxels of the scan within a radius of the lesion's centre."""
    index = np.moveaxis(np.indices(volume.grid.shape), 0, -1)
    offset = (index - np.array(LESIONS[lesion][0])) @ volume.grid.affine[:3, :3].T
    return np.asarray((offset**2).sum(-1) <= radius_mm**2)


def _dilated(mask: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """A mask grown by one face neighbour per step."""
    for _ in range(steps):
        grown = mask.copy()
        for axis in range(3):
            for shift in (-1, 1):
                moved = np.roll(mask, shift, axis)
                edge = [slice(None)] * 3
                edge[axis] = slice(0, 1) if shift == 1 else slice(-1, None)
                moved[tuple(edge)] = False
                grown |= moved
        mask = grown
    return mask


def true_effect(volume: mg.Volume, model: mg.Model, lesion: str) -> float:
    """z(x) - z(x with the lesion's label, dilated by 2 voxels, set to the reference)."""
    import nibabel as nib

    image: Any = nib.load(folder() / "ct_chest_c3n00247" / "lesions_silver.nii.gz")
    labels = np.asarray(image.dataobj)
    prepared = prepare(volume, model, at(lesion))
    index = np.moveaxis(np.indices(prepared.grid.shape), 0, -1)
    # The label file has axes of its own: its voxels are found by the affines.
    to_label = np.linalg.inv(image.affine) @ prepared.grid.affine
    where = np.rint(index @ to_label[:3, :3].T + to_label[:3, 3]).astype(int)
    inside = ((where >= 0) & (where < labels.shape)).all(-1)
    safe = np.where(inside[..., None], where, 0)
    label = inside & (labels[tuple(np.moveaxis(safe, -1, 0))] == LESIONS[lesion][1])
    background = reference.build("auto", prepared, "CT", "HU")
    without = prepared.raw.copy()
    without[0][_dilated(label, 2)] = background.raw[0].flat[0]
    return _score(model, prepared.network_input()) - _score(model, prepared.network_input(without))


def _score(model: mg.Model, array: npt.NDArray[np.float32]) -> float:
    with torch.no_grad():
        out = model.net(torch.from_numpy(array)[None])[0]
    return float(out[1] - out[0])


def measure(volume: mg.Volume, model: mg.Model, lesion: str, method: str, layer: str) -> Row:
    """What one method at one layer says of one lesion."""
    e = mg.explain(volume, model, at=at(lesion), target="nodule", method=method, layer=layer)
    maps = mg.draw(e)
    ball = within(volume, lesion)
    box = maps.signed.values != 0
    raises = maps.raises.values
    share = float(raises[ball].sum() / max(raises.sum(), 1e-12))
    chance = float((ball & box).sum() / max(box.sum(), 1))
    strongest = [p for p in peaks(e, most=1) if p.polarity == "for"]
    centre = volume.grid.world_ras(LESIONS[lesion][0])
    away = float(np.linalg.norm(np.array(strongest[0].ras_mm) - centre)) if strongest else np.nan
    return Row(
        lesion,
        method,
        e.layer,
        evidence_within(maps.signed, ball),
        true_effect(volume, model, lesion),
        share / chance,
        away,
        e.residual,
        e,
    )


def _every_layer(volume: mg.Volume, model: mg.Model) -> None:
    blocks = list(model.aliases)
    print("| lesion (true effect) | method | " + " | ".join(blocks) + " |")
    print("|---|---|" + "---|" * len(blocks))
    for lesion in LESIONS:
        for n, method in enumerate(METHODS):
            rows = [measure(volume, model, lesion, method, block) for block in blocks]
            first = f"{lesion} ({rows[0].true:.2f})" if n == 0 else ""
            said = [
                f"{r.near:z.2f}, **{r.near / r.true:z.2f}**, x{r.energy_over_chance:.1f}, "
                f"{r.peak_mm:.0f} mm"
                for r in rows
            ]
            print(f"| {first} | {method} | " + " | ".join(said) + " |", flush=True)


def _automatic(volume: mg.Volume, model: mg.Model) -> None:
    names = {path: alias for alias, path in model.aliases.items()}
    print(
        "| lesion | method | layer | causal slope | near / true | peak mm | residual | forwards |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for lesion in LESIONS:
        for method in METHODS[:2]:
            r = measure(volume, model, lesion, method, "auto")
            e = r.explanation
            slope = next(t.slope for t in e.trials if t.layer == e.layer)
            print(
                f"| {lesion} | {method} | {names[r.layer]} | {slope:.2f} | {r.near / r.true:.2f} | "
                f"{r.peak_mm:.0f} | {e.residual:.1g} | {e.cost_in_forwards:.1f} |",
                flush=True,
            )
            tried = ", ".join(f"{names[t.layer]} {t.slope:.2f}" for t in e.trials)
            print(
                f"<!-- {lesion}, {method}: {e.score:.2f} against {e.reference_score:.2f}, "
                f"{e.reference.words}; slopes {tried} -->"
            )


def main() -> None:
    """Print the tables as Markdown."""
    volume, model = scan_and_net()
    _every_layer(volume, model)
    print()
    _automatic(volume, model)


if __name__ == "__main__":
    main()
