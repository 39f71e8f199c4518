"""Bundles made by hand, and what other people's readers make of our Parametric Maps."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from med_gradcam import maps
from med_gradcam.bundle import Bundle
from med_gradcam.explanation import Cells, Explanation, Reference
from med_gradcam.geometry import Geometry, cells
from med_gradcam.maps import Heatmap
from med_gradcam.provenance import Provenance
from med_gradcam.target import Target
from med_gradcam.volume import Volume

POLARITIES = ("for", "against", "signed")
WEIGHTS = "0123456789abcdef" * 4


def explanation(volume: Volume, target: Target | None = None, **changes: object) -> Explanation:
    """Random evidence on a coarse grid, with one cell that outshines all others."""
    shape = (3, 2, 3)
    jump = tuple(n / m for n, m in zip(volume.grid.shape, shape, strict=True))
    start = tuple((j - 1) / 2 for j in jump)
    evidence = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    evidence[2, 0, 1] = 40.0
    made = Explanation(
        evidence=evidence,
        grid=cells(volume.grid, jump, start, shape),
        image=volume.grid,
        score=3.0,
        reference_score=-2.0,
        target=target or Target("class", "nodule", (1,), "softmax"),
        method="integrated",
        layer="features.block3",
        reference=Reference("tissue", -850.0, "uniform lung"),
        cells=Cells((2.0, 2.0, 2.0), (0.5, 0.5, 0.5), (8.0, 8.0, 8.0), "exact"),
        status="complete",
        cost_in_forwards=12.0,
        provenance=Provenance(
            {"torch": "2.13.0"},
            {},
            (volume.source.sha256,),
            WEIGHTS,
            "lung net",
            utc="2026-11-20T18:23:58Z",
        ),
    )
    return made.replace(**changes)


def bundle(volume: Volume, *, identified: bool = False, **changes: object) -> Bundle:
    made = explanation(volume, **changes)  # type: ignore[arg-type]
    return Bundle(made, maps.draw(made), volume, identified)


def heatmaps(of: Bundle) -> dict[str, Heatmap]:
    return {"for": of.maps.raises, "against": of.maps.lowers, "signed": of.maps.signed}


def peak_index(values: npt.NDArray[np.float32]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.abs(values).argmax(), values.shape))


def assert_highdicom_agrees(path: Path, heatmap: Heatmap) -> None:
    """Bit for bit the same values, the peak within 1e-3 mm."""
    volume = hd.pm.ParametricMap.from_file(path).get_volume(dtype=np.float32)
    volume = volume.ensure_handedness(hd.AxisHandedness.LEFT_HANDED, flip_axis=0)
    np.testing.assert_array_equal(volume.array.transpose(2, 1, 0), heatmap.values)
    i, j, k = peak_index(heatmap.values)
    lps = volume.map_indices_to_reference(np.array([[k, j, i]]))[0]
    np.testing.assert_allclose(
        lps * (-1, -1, 1), heatmap.grid.world_ras((i, j, k)), atol=1e-3, rtol=0
    )


def assert_nifti_agrees(path: Path, voxels: npt.NDArray[np.generic], grid: Geometry) -> None:
    """A converted image: the same voxels, every corner within 1e-3 mm, whatever its axis order."""
    theirs = nib.nifti1.Nifti1Image.from_filename(path)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(theirs.affine), nib.io_orientation(grid.affine)
    )
    moved = theirs.as_reoriented(turn)
    np.testing.assert_array_equal(np.asarray(moved.dataobj), voxels)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.shape) - 1)
    place = corners @ moved.affine[:3, :3].T + moved.affine[:3, 3]
    np.testing.assert_allclose(place, grid.world_ras(corners), atol=1e-3, rtol=0)


def tool(name: str) -> str:
    """Another reader's program, from this environment or the system; skips where it is missing."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def assert_dcmqi_agrees(path: Path, heatmap: Heatmap, folder: Path) -> None:
    subprocess.run(
        [
            tool("paramap2itkimage"),
            "--inputDICOM",
            path,
            "--outputDirectory",
            folder,
            "-n",
            path.stem,
            "-t",
            "nifti",
        ],
        check=True,
        capture_output=True,
    )
    assert_nifti_agrees(folder / f"{path.stem}-pmap.nii.gz", heatmap.values, heatmap.grid)


def assert_dcm2niix_agrees(path: Path, heatmap: Heatmap, folder: Path) -> None:
    subprocess.run(
        [tool("dcm2niix"), "-s", "y", "-f", f"n_{path.stem}", "-o", folder, path],
        check=True,
        capture_output=True,
    )
    assert_nifti_agrees(folder / f"n_{path.stem}.nii", heatmap.values, heatmap.grid)


def problems(path: Path) -> list[str]:
    """What dciodvfy says, without what is known: terms younger than it, and the empty identity."""
    said = subprocess.run([tool("dciodvfy"), path], check=False, capture_output=True, text=True)
    empty = r"needed to build DICOMDIR - (Patient ID|Study (ID|Date|Time))"
    known = rf"<QUANTITY> for value 4|{empty}|^ParametricMap$"
    lines = (said.stdout + said.stderr).splitlines()
    return [line for line in lines if line.strip() and not re.search(known, line)]
