"""Small grids, scans, networks and explanations that many tests share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from med_gradcam.explanation import Cells, Explanation, Reference
from med_gradcam.geometry import Geometry
from med_gradcam.provenance import Provenance, Source
from med_gradcam.target import Target
from med_gradcam.volume import Volume

Matrix = npt.NDArray[np.float64]
# All 48 ways to store a scan whose axes lie along the patient's: letters such as "SPL".
ORDERS = [
    "".join(pair[sign] for pair, sign in zip(pairs, signs, strict=True))
    for pairs in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]


def rotation(x: float, y: float, z: float) -> Matrix:
    """A rotation by three angles in degrees."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians([x, y, z])):
        i, j = [n for n in range(3) if n != axis]
        one = np.eye(3)
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        turned = turned @ one
    return turned


def affine_of(
    axes: str,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    turn: Sequence[float] = (0.0, 0.0, 0.0),
) -> Matrix:
    """An affine whose index axes point to `axes`, turned by angles in degrees."""
    affine = np.eye(4)
    for n, letter in enumerate(axes):
        step = np.zeros(3)
        step["RLAPSI".index(letter) // 2] = spacing[n] if letter in "RAS" else -spacing[n]
        affine[:3, n] = rotation(*turn) @ step
    affine[:3, 3] = origin
    return affine


@st.composite
def grids(draw: st.DrawFn, *, turned: float = 20.0, most: int = 9) -> Geometry:
    """Grids of any order, spacing and place, turned by up to `turned` degrees about each axis."""
    number = st.floats(-turned, turned, allow_nan=False)
    place = st.floats(-500, 500, allow_nan=False)
    axes = draw(st.sampled_from(ORDERS))
    spacing = [draw(st.floats(0.2, 6.0)) for _ in range(3)]
    affine = affine_of(axes, spacing, [draw(place) for _ in "xyz"], [draw(number) for _ in "xyz"])
    i, j, k = (draw(st.integers(1, most)) for _ in range(3))
    return Geometry((i, j, k), affine)


def provenance(**changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "versions": {"med_gradcam": "0.1.0"},
        "parameters": {"target": "auto", "at": None},
        "input_sha256": ("12" * 32,),
        "weights_sha256": "ab" * 32,
        "model_name": "tiny",
        "utc": "2026-01-02T03:04:05Z",
    }
    return Provenance(**{**fields, **changes})


def explained(
    evidence: npt.ArrayLike, grid: Geometry, image: Geometry, **changes: Any
) -> Explanation:
    """An explanation written by hand."""
    values: dict[str, Any] = {
        "evidence": np.asarray(evidence, dtype=np.float32),
        "grid": grid,
        "image": image,
        "score": 1.5,
        "reference_score": 0.5,
        "target": Target("class", "nodule", (1,), "softmax"),
        "method": "integrated",
        "layer": "features.3",
        "reference": Reference("tissue", -800.0, "uniform lung (-800 HU)"),
        "cells": Cells((2.0, 2.0, 2.0), (0.5, 0.5, 0.5), (5.0, 5.0, 5.0), "exact"),
        "status": "complete",
        "cost_in_forwards": 3.25,
        "provenance": provenance(),
    }
    return Explanation(**{**values, **changes})


def volume(
    array: npt.ArrayLike, affine: Matrix | None = None, modality: str | None = "CT", **changes: Any
) -> Volume:
    """A volume of one channel from an array (I, J, K), or of several from (C, I, J, K)."""
    voxels = np.asarray(array)
    voxels = voxels[None] if voxels.ndim == 3 else voxels
    i, j, k = voxels.shape[1:]
    grid = Geometry((i, j, k), np.eye(4) if affine is None else affine)
    return Volume(voxels, grid, modality, "HU" if modality == "CT" else "a.u.", **changes)


def source(**changes: Any) -> Source:
    return Source(**{"kind": "array", "sha256": "cd" * 32, **changes})


# ------------------------------------------------------------------------------------ networks

SIZE = 12
LAYERS: list[Any] = [
    ["Conv3d", {"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": 1}],
    ["ReLU", {}],
    ["MaxPool3d", {"kernel_size": 2}],
    ["Conv3d", {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}],
    ["ReLU", {}],
    ["AdaptiveAvgPool3d", {"output_size": 1}],
    ["Flatten", {}],
    ["Linear", {"in_features": 4, "out_features": 2}],
]


def spec(**changes: Any) -> dict[str, Any]:
    """The spec of a network for patches of 12 voxels; a change to None takes a key away."""
    full: dict[str, Any] = {
        "format": "med-gradcam-model/1",
        "name": "tiny",
        "task": "classification",
        "labels": ["quiet", "nodule"],
        "link": "softmax",
        "licence": "MIT",
        "input": {
            "modality": "CT",
            "axes": "SPL",
            "channels": 1,
            "patch": [SIZE, SIZE, SIZE],
            "spacing_mm": None,
            "intensity": [["clip", -1000, 1000], ["scale", 0.001]],
        },
        "layers": LAYERS,
    }
    return {k: v for k, v in {**full, **changes}.items() if v is not None}


def build(layers: Sequence[Any]) -> torch.nn.Sequential:
    """The network as the shared example loader makes it: getattr(torch.nn, name)(**arguments)."""
    parts = [
        build(arguments) if name == "Sequential" else getattr(torch.nn, name)(**arguments)
        for name, arguments in layers
    ]
    return torch.nn.Sequential(*parts)


def save_model(
    folder: Path,
    description: Mapping[str, Any] | None = None,
    net: torch.nn.Module | None = None,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """A model folder with seeded weights; `change` may spoil them before they are written."""
    description = spec() if description is None else description
    if net is None:
        torch.manual_seed(3)
        net = build(description.get("layers", LAYERS))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(description), encoding="utf-8")
    weights = {k: v.clone().contiguous() for k, v in net.state_dict().items()}
    if change is not None:
        change(weights)
    save_file(weights, folder / "weights.safetensors")
    return folder


# --------------------------------------------------------------------------------------- scans


def chest(size: int = SIZE) -> npt.NDArray[np.int16]:
    """A cube of lung with grain, a wall of soft tissue and a ball of soft tissue in it."""
    random = np.random.default_rng(5)
    array = random.normal(-820, 15, (size,) * 3)
    array[:, :2] = random.normal(40, 15, (size, 2, size))
    i, j, k = np.ogrid[:size, :size, :size]
    middle = size / 2
    array[(i - middle) ** 2 + (j - middle) ** 2 + (k - middle) ** 2 < (size / 5) ** 2] = 60
    return array.astype(np.int16)


def opened(path: Path) -> Any:
    """A NIfTI file as nibabel reads it."""
    return nib.load(path)


def save_nifti(
    path: Path,
    array: npt.ArrayLike | None = None,
    affine: Matrix | None = None,
    *,
    codes: tuple[int, int] = (1, 1),
) -> Path:
    """A NIfTI-1 file; `codes` of sform and qform, 0 leaves that form out."""
    values = chest() if array is None else np.asarray(array)
    image = nib.Nifti1Image(values, None)
    image.header.set_xyzt_units("mm")
    where = np.diag([1.5, 1.25, 2.0, 1.0]) if affine is None else affine
    image.set_sform(where if codes[0] else None, codes[0])
    image.set_qform(where if codes[1] else None, codes[1])
    nib.save(image, path)
    return path
