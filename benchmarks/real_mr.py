"""How much of the positive evidence lies in the head, placed naively and placed exactly?

Needs MED_GRADCAM_REAL_DATA (mr_brain_t1/t1_crop_mni.nii.gz and nets/ncomms_cog_fold0). The
network's convolutions are not padded, so resizing the cell grid to the volume misplaces it.
Run it from the repository: python -m benchmarks.real_mr
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import med_gradcam as mg
from benchmarks.real_ct import folder
from med_gradcam.maps import drawing


def head(volume: mg.Volume) -> npt.NDArray[np.bool_]:
    """The voxels of the skull-stripped head."""
    return np.asarray(volume.array[0] > volume.array[0].min())


def naive(e: mg.Explanation) -> mg.Geometry:
    """The cell grid as F.interpolate(align_corners=False) would place it: stretched to the scan."""
    jump = [n / c for n, c in zip(e.image.shape, e.grid.shape, strict=True)]
    step = np.diag([*jump, 1.0])
    step[:3, 3] = [(j - 1) / 2 for j in jump]
    return mg.Geometry(e.grid.shape, e.image.affine @ step)


def share_in_head(e: mg.Explanation, grid: mg.Geometry, inside: npt.NDArray[np.bool_]) -> float:
    """Share of the evidence for that is drawn inside the head."""
    dense = drawing(grid, e.image).spread(np.maximum(e.evidence, 0))
    return float(dense[inside].sum() / dense.sum())


def main() -> None:
    """Print the table as Markdown."""
    home = folder()
    volume = mg.read(home / "mr_brain_t1" / "t1_crop_mni.nii.gz")
    model = mg.load_model(home / "nets" / "ncomms_cog_fold0")
    inside = head(volume)
    print("| block | cells | first centre + i * jump | method | score | naive | exact |")
    print("|---|---|---|---|---|---|---|")
    for alias in model.aliases:
        for method in ("secant", "integrated", "hirescam"):
            e = mg.explain(volume, model, layer=alias, method=method)
            cells = "x".join(str(n) for n in e.grid.shape)
            where = f"{e.cells.start[0]:g} + {e.cells.jump[0]:g} i"
            shares = [share_in_head(e, g, inside) for g in (naive(e), e.grid)]
            print(
                f"| {alias} | {cells} | {where} | {method} | {e.score:.4f} | "
                f"{shares[0]:.2f} | {shares[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
