"""What does the dock do beside the window: open a scan or an explanation, explain? No Qt.

The engine and torch are imported when a task runs, never when the dock opens.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import med_gradcam
from med_gradcam.explanation import Explanation
from med_gradcam.progress import Progress, Step
from med_gradcam.volume import Volume
from napari_plugin.layers import (
    Floats,
    LayerData,
    map_layers,
    scale_words,
    scan_layers,
    strongest,
)
from napari_plugin.state import where_words

if TYPE_CHECKING:
    from med_gradcam.model import Model

EXPLANATION_FILE = "explanation.nii.gz"


@dataclass(frozen=True, slots=True)
class Question:
    """What the user asks of a model about a scan; empty texts mean "as the engine thinks best"."""

    model: Path
    target: str = ""
    layer: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """An explanation ready to be shown: its layers, the scale in words, and where to look."""

    explanation: Explanation
    layers: tuple[LayerData, ...]
    scale: str
    look_at: Floats | None
    peak: str

    def is_about(self, volume: Volume) -> bool:
        """Whether it explains this very scan."""
        return volume.source.sha256 in self.explanation.provenance.input_sha256


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A scan ready to be shown."""

    layers: tuple[LayerData, ...]


class Models:
    """The model that was loaded last, kept as long as its files do not change."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._model: Model | None = None

    def load(self, path: Path) -> Model:
        """The model at a path, from memory where it is the one loaded last."""
        files = sorted(p for p in path.glob("*") if p.is_file()) if path.is_dir() else [path]
        key = (path, *((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in files))
        if self._model is None or key != self._key:
            self._model, self._key = None, ()
            self._model = med_gradcam.load_model(path)
            self._key = key
        return self._model


def explanation_file(path: Path) -> Path | None:
    """The explanation file that a path is or holds."""
    file = path / EXPLANATION_FILE if path.is_dir() else path
    return file if file.name == EXPLANATION_FILE and file.is_file() else None


def answer(explanation: Explanation) -> Answer:
    """An explanation with its maps drawn."""
    maps = med_gradcam.draw(explanation)
    peak = strongest(maps)
    return Answer(
        explanation,
        tuple(map_layers(explanation, maps)),
        scale_words(maps.signed),
        peak.world_mm if peak else None,
        where_words(peak.ras_mm) if peak else "",
    )


def read_answer(file: Path) -> Answer:
    """The explanation in a file that med_gradcam has written."""
    return answer(importlib.import_module("med_gradcam.formats.nifti").read_explanation(file))


def open_path(path: Path, progress: Progress) -> Opened | Answer:
    """A scan (NIfTI file or DICOM folder), or an explanation that was written before."""
    progress(Step(0, 0, "Reading the file" if path.is_file() else "Reading the folder"))
    file = explanation_file(path)
    if file is not None:
        return read_answer(file)
    return Opened(tuple(scan_layers(med_gradcam.read(path))))


def explain(question: Question, volume: Volume, models: Models, progress: Progress) -> Answer:
    """The model's evidence in a scan."""
    progress(Step(0, 0, "Loading the model"))
    model = models.load(question.model)
    found = med_gradcam.explain(
        volume,
        model,
        target=question.target or "auto",
        layer=question.layer or "auto",
        at=question.at or None,
        progress=progress,
    )
    progress(Step(0, 0, "Drawing the maps"))
    return answer(found)
