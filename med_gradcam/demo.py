"""What does `med-gradcam demo` show: each planted finding, explained on the shipped nets?"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from med_gradcam import delivery, loading, samples
from med_gradcam.errors import ImageError
from med_gradcam.explanation import Explanation
from med_gradcam.model import Model
from med_gradcam.record import to_record
from med_gradcam.volume import Volume

Explain = Callable[[Volume, Model, argparse.Namespace], Explanation]


@dataclass(frozen=True, slots=True)
class Case:
    """One sample scan and its explanation."""

    name: str
    explanation: Explanation

    def as_json(self) -> dict[str, Any]:
        """The case's record, with its name."""
        return {"case": self.name, **to_record(self.explanation)}


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
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.absolute().parent))
    cases = []
    try:
        for entry in plan:
            model = loading.load_model(home / entry["net"])
            volume = loading.read(home / entry["image"])
            explanation = explain(volume, model, args)
            dicom = ("dicom",) if volume.source.kind == "dicom" else ()
            delivery.write(
                explanation,
                partial / entry["name"],
                volume=volume,
                formats=("nifti", "png", *dicom),
            )
            cases.append(Case(entry["title"], explanation))
        records = [c.as_json() for c in cases]
        (partial / "explanation.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        delivery.put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Finished(tuple(cases), folder / plan[0]["name"])
