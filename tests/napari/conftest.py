"""Small scans, explanations and engines that the plugin's tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import med_gradcam
from med_gradcam import errors
from med_gradcam.calibration import Calibration
from med_gradcam.explanation import Cells, Explanation, Reference
from med_gradcam.geometry import Geometry, reorient, reorient_array, reorientation
from med_gradcam.progress import Progress, Step
from med_gradcam.provenance import Provenance
from med_gradcam.target import Target
from med_gradcam.volume import Volume

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "napari_plugin" / "napari.yaml"
# A finding in the patient's right, anterior and superior eighth of the scan, RAS+ mm.
FINDING_RAS = np.array([30.0, 20.0, 25.0])


def ras_grid() -> Geometry:
    """A grid in RAS+ order with three different sizes and spacings."""
    affine = np.diag([2.0, 2.5, 3.0, 1.0])
    affine[:3, 3] = (-40.0, -38.0, -30.0)
    return Geometry((41, 31, 21), affine)


def scan(axes: str = "RAS", modality: str = "CT") -> Volume:
    """A scan stored in some axis order: air, a body, and one bright voxel at FINDING_RAS."""
    grid = ras_grid()
    array = np.full(grid.shape, -1000, dtype=np.int16)
    array[4:-4, 4:-4, 2:-2] = 40
    array[tuple(np.round(grid.index_ijk(FINDING_RAS)).astype(int))] = 900
    how = reorientation(grid, axes)
    stored = np.ascontiguousarray(reorient_array(array, how))
    return Volume(stored[None], reorient(grid, how), modality, "HU" if modality == "CT" else "a.u.")


def planted(volume: Volume) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One cell per voxel: +2 at FINDING_RAS, -1 at its mirror point in the patient's left."""
    evidence = np.zeros(volume.grid.shape, dtype=np.float32)
    for point, value in ((FINDING_RAS, 2.0), (FINDING_RAS * (-1, 1, 1), -1.0)):
        evidence[tuple(np.round(volume.grid.index_ijk(point)).astype(int))] = value
    return evidence


def explained(volume: Volume, **changes: Any) -> Explanation:
    """An explanation of a scan, with `planted` evidence."""
    peak = 2.0 / volume.grid.voxel_ml
    values: dict[str, Any] = {
        "evidence": None if "evidence" in changes else planted(volume),
        "grid": volume.grid,
        "image": volume.grid,
        "score": 1.5,
        "reference_score": 0.5,
        "target": Target("class", "nodule", (1,), "softmax"),
        "method": "integrated",
        "layer": "features.3",
        "reference": Reference("tissue", -800.0, "uniform lung"),
        "cells": Cells((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (3.0, 3.0, 3.0), "exact"),
        "status": "complete",
        "cost_in_forwards": 12.0,
        "provenance": Provenance({}, {}, (volume.source.sha256,), "ab" * 32, "tiny"),
        "modality": volume.modality,
        "calibration": Calibration("nodule", "integrated", "features.3", peak, peak / 10, 20),
        "warnings": ("A warning of the engine.",),
    }
    return Explanation(**{**values, **changes})


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that looks like a model; the fake engine does not open it."""
    folder = tmp_path / "tiny_net"
    folder.mkdir()
    (folder / "spec.json").write_text("{}")
    return folder


class FakeEngine:
    """Stands in for med_gradcam.read, load_model and explain; remembers what it was asked."""

    def __init__(self) -> None:
        self.volume = scan()
        self.steps = 3
        self.seconds_per_step = 0.01
        self.raises: BaseException | None = None
        self.asked: list[dict[str, Any]] = []
        self.running = 0
        self.most_at_once = 0
        self.ended: list[str] = []

    def read(self, path: Path) -> Volume:
        """The scan, whatever the path; a file that is called bad is a bad file."""
        if "bad" in Path(path).name:
            raise errors.ImageError("expected a NIfTI file, got 12 bytes of text.")
        return self.volume

    def load_model(self, path: Path) -> object:
        """Any object is a model here."""
        return object()

    def explain(
        self, volume: Volume, model: object, *, progress: Progress, **asked: Any
    ) -> Explanation:
        """Takes its time, tells its progress, and fails where it was told to."""
        self.asked.append(asked)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            for done in range(self.steps):
                progress(Step(done, self.steps, "integrating"))
                time.sleep(self.seconds_per_step)
            if self.raises is not None:
                raise self.raises
            self.ended.append("done")
            return explained(volume)
        except errors.Cancelled:
            self.ended.append("cancelled")
            raise
        finally:
            self.running -= 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The fake engine, in place of the real one."""
    fake = FakeEngine()
    for name in ("read", "load_model", "explain"):
        monkeypatch.setattr(med_gradcam, name, getattr(fake, name))
    return fake


@pytest.fixture
def plugin(npe2pm: Any) -> Iterator[str]:
    """The plugin, registered from its manifest as napari would find it; yields its name."""
    with npe2pm.tmp_plugin(manifest=MANIFEST) as registered:
        yield registered.name


@pytest.fixture(scope="session")
def make_scan() -> Callable[..., Volume]:
    """scan(axes="RAS", modality="CT")."""
    return scan


@pytest.fixture(scope="session")
def make_explanation() -> Callable[..., Explanation]:
    """explained(volume, **changed fields)."""
    return explained


@pytest.fixture(scope="session")
def finding_ras() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Where the finding lies, RAS+ mm."""
    return FINDING_RAS


@pytest.fixture(scope="session")
def manifest_path() -> Path:
    """The plugin's manifest."""
    return MANIFEST
