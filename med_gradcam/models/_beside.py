"""What is known of a network that came as a program: from its file, from beside it, or assumed?

Its own metadata.json (MONAI stores one), else NAME.json or spec.json beside it, with the keys of a
model folder; else channels from its first convolution and nothing more, which is noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from med_gradcam.containers.program_facts import input_channels
from med_gradcam.errors import ModelError
from med_gradcam.model import InputSpec, Model
from med_gradcam.models import _archive, _spec

_METADATA = "extra/metadata.json"
_ASSUMED = (
    "nothing is known of the model beyond its program: {channels}, no labels, softmax assumed; say "
    "more in {name}.json beside it"
)


def model(net: torch.nn.Module, archive: _archive.Archive, path: str) -> Model:
    """The network with what is known of it.

    Raises:
        ModelError: a description that is there is off.
    """
    there = Path(path)
    found = _metadata(archive)
    if found is not None:
        return _of_monai(net, found, archive)
    for beside in (there.with_name(there.name + ".json"), there.with_name("spec.json")):
        if beside.is_file():
            spec = _spec.read(beside)
            return _spec.model(net, spec, beside, archive.sha256)
    channels = input_channels(net)
    note = _ASSUMED.format(channels=_said(channels), name=there.name)
    return Model(
        net=net,
        input=InputSpec(channels=channels or 1),
        weights_sha256=archive.sha256,
        notes=(note,),
    )


def _said(channels: int | None) -> str:
    if channels is None:
        return "its input channels cannot be told from it (1 assumed)"
    return f"{channels} input channel{'' if channels == 1 else 's'} (its first convolution)"


def _metadata(archive: _archive.Archive) -> dict[str, Any] | None:
    if _METADATA not in archive.sizes:
        return None
    try:
        found = json.loads(archive.text(_METADATA))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"expected readable JSON as metadata.json in {archive.name!r}, got: {error}."
        ) from error
    known = isinstance(found, dict) and isinstance(found.get("network_data_format"), dict)
    return found if known else None


def _of_monai(net: torch.nn.Module, found: Mapping[str, Any], archive: _archive.Archive) -> Model:
    """Labels and input from MONAI's network_data_format; what it cannot say is noted."""
    ins = _first(found["network_data_format"], "inputs")
    outs = _first(found["network_data_format"], "outputs")
    labels = _labels(outs.get("channel_def"))
    squashed = str(outs.get("type", ""))
    notes = []
    value_range = ins.get("value_range")
    if isinstance(value_range, list) and len(value_range) == 2:
        notes.append(
            f"the model expects values within {value_range[0]:g} to {value_range[1]:g} and does "
            f"not say how a scan gets there: hand in scans that were prepared so"
        )
    try:
        return Model(
            net=net,
            input=InputSpec(
                channels=int(ins.get("num_channels", input_channels(net) or 1)),
                modality=_modality(ins),
                patch=_patch(ins),
            ),
            labels=labels,
            link="sigmoid" if len(labels) == 1 else "softmax",
            name=str(found.get("name", "unnamed network")),
            weights_sha256=archive.sha256,
            licence=str(found.get("copyright", "not stated")),
            task=str(found.get("task", squashed or "classification")),
            notes=tuple(notes),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"metadata.json in {archive.name!r}: {error}") from error


def _first(formats: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    listed = formats.get(key)
    first = next(iter(listed.values()), None) if isinstance(listed, dict) else None
    return first if isinstance(first, dict) else {}


def _labels(named: Any) -> tuple[str, ...]:
    """channel_def is {"0": "background", ...}; taken only if it names every channel once."""
    if not isinstance(named, dict) or not all(str(k).isdigit() for k in named):
        return ()
    ordered = {int(k): str(v) for k, v in named.items()}
    labels = tuple(ordered[n] for n in sorted(ordered))
    whole = sorted(ordered) == list(range(len(ordered))) and len(set(labels)) == len(labels)
    return labels if whole else ()


def _modality(ins: Mapping[str, Any]) -> str | None:
    wanted = str(ins.get("modality", "")).upper()
    known = {"CT": "CT", "MR": "MR", "MRI": "MR", "PT": "PT", "PET": "PT"}
    return known.get(wanted, "CT" if str(ins.get("format", "")) == "hounsfield" else None)


def _patch(ins: Mapping[str, Any]) -> tuple[int, int, int] | None:
    shape = ins.get("spatial_shape")
    fixed = isinstance(shape, list) and len(shape) == 3 and bool(ins.get("is_patch_data"))
    if not fixed or not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        return None
    return (shape[0], shape[1], shape[2])
