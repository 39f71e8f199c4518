"""How are the sample scans written: NIfTI files, truth and checksums?"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .grid import Grid
from .net_io import RAS, to_axes


def file_affine(grid: Grid, axes: str) -> np.ndarray:
    """4x4 matrix, index -> RAS+ mm, of an (R, A, S) array turned to the given axis letters."""
    turn = np.zeros((4, 4))
    turn[3, 3] = 1.0
    for column, letter in enumerate(axes):
        axis, sign = RAS[letter]
        turn[axis, column] = sign
        turn[axis, 3] = 0.0 if sign > 0 else grid.shape[axis] - 1
    return grid.affine @ turn


def write_nifti(path: Path, array_ras: np.ndarray, grid: Grid, axes: str) -> None:
    """Write a scan (int16) or a mask (uint8), with sform and qform; the same bytes every time."""
    kind = np.uint8 if array_ras.dtype == np.uint8 else np.int16
    turned = np.ascontiguousarray(to_axes(array_ras, axes)).astype(kind)
    affine = file_affine(grid, axes)
    image = nib.Nifti1Image(turned, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), 9, mtime=0))


def read_ras(path: Path) -> np.ndarray:
    """A NIfTI file as a float32 (R, A, S) array (axis-aligned files only)."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj, np.float32)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_checksums(folder: Path) -> None:
    """List the SHA-256 of every shipped file below a folder in SHA256SUMS."""
    wanted = {".gz", ".dcm", ".json", ".safetensors", ".txt"}
    files = sorted(path for path in folder.rglob("*") if path.suffix in wanted)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}"
        for path in files
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
