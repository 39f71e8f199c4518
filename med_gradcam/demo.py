"""What does `med-gradcam demo` show: each planted finding, explained on the shipped nets?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from med_gradcam import delivery, loading, samples
from med_gradcam.errors import ImageError, UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.model import Model
from med_gradcam.volume import Volume

Explain = Callable[[Volume, Model, argparse.Namespace], Explanation]


@dataclass(frozen=True, slots=True)
class Case:
    """One sample scan, its explanation and what was written of it."""

    name: str
    explanation: Explanation
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """All cases, and the folder of the first one."""

    cases: tuple[Case, ...]
    to_show: Path


def run(folder: Path, args: argparse.Namespace, explain: Explain) -> Finished:
    """Explain every case that demo.json of the samples lists, into `folder`/CASE; all or none."""
    home = samples.folder()
    try:
        plan = json.loads((home / "demo.json").read_text(encoding="utf-8"))["cases"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ImageError(f"expected demo.json in sample_volumes, got: {error}.") from error
    cases = []
    with delivery.staged(folder) as partial:
        for entry in plan:
            model = loading.load_model(home / entry["net"])
            volume = loading.read(home / entry["image"])
            settings = argparse.Namespace(**{**vars(args), "target": entry["target"]})
            explanation = explain(volume, model, settings)
            formats = delivery.default_formats(volume)
            out = partial / entry["name"]
            delivery.write(explanation, out, volume=volume, formats=formats)
            record = json.loads((out / "explanation.json").read_text(encoding="utf-8"))
            cases.append(Case(entry["title"], explanation, {"case": entry["title"], **record}))
        text = json.dumps([case.record for case in cases], indent=1)
        (partial / "demo.json").write_text(text, encoding="utf-8")
    return Finished(tuple(cases), folder / plan[0]["name"])


def show(folder: Path) -> None:
    """Open an output folder in napari, until its window is closed.

    Raises:
        UsageError: napari is not installed.
    """
    try:
        import napari
    except ImportError as error:
        raise UsageError(
            "expected napari for --open; install it with: pip install 'med-gradcam[napari]' PyQt6."
        ) from error
    viewer = napari.Viewer()
    viewer.open(folder, plugin="med-gradcam")
    napari.run()
