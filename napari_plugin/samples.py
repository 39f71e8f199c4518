"""Which scans can one try under File > Open Sample: those of sample_volumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import med_gradcam
from med_gradcam import samples
from med_gradcam.errors import ImageError, MedGradcamError
from napari_plugin.layers import LayerData, scan_layers

_UNITS = {"CT": "HU", "MR": "a.u."}


def sample_ct() -> list[LayerData]:
    """The rendered CT chest with a planted finding."""
    return _sample("CT")


def sample_mr() -> list[LayerData]:
    """The MR head with a planted finding."""
    return _sample("MR")


def _sample(modality: str) -> list[LayerData]:
    volume = med_gradcam.read(sample_scan(modality))
    # NIfTI does not say its modality and unit; of the samples they are known.
    return scan_layers(replace(volume, modality=modality, unit=_UNITS[modality]))


def sample_scan(modality: str) -> Path:
    """The first scan that demo.json of the samples gives to a network for this modality.

    Raises:
        ImageError: there is none.
    """
    home = samples.folder()
    try:
        for case in json.loads((home / "demo.json").read_text(encoding="utf-8"))["cases"]:
            spec = json.loads((home / case["net"] / "spec.json").read_text(encoding="utf-8"))
            if spec["input"]["modality"] == modality:
                return home / str(case["image"])
    except (OSError, KeyError, ValueError) as error:
        raise ImageError(f"expected demo.json in sample_volumes, got: {error}.") from error
    raise ImageError(f"expected a sample {modality} in demo.json of sample_volumes, found none.")


def sample_models() -> dict[str, Path]:
    """Name -> folder of the sample networks; empty where the samples are not installed."""
    try:
        nets = samples.folder() / "nets"
    except MedGradcamError:
        return {}
    return {p.parent.name: p.parent for p in sorted(nets.glob("*/spec.json"))}
