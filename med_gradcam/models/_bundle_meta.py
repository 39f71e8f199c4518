"""What does a bundle's metadata.json say of its network: channels, labels, modality, patch?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from med_gradcam.errors import ModelError
from med_gradcam.models._bundle_net import Plan

_MODALITY = {"CT": "CT", "MR": "MR", "MRI": "MR", "PT": "PT", "PET": "PT", "CR": "CR", "DX": "DX",
             "US": "US", "MG": "MG", "MAMMOGRAM": "MG", "XRAY": "DX", "X-RAY": "DX"}  # fmt: skip
_SIZE = re.compile(r"(?:(\d+)\s*\*\s*)?n(?:\s*\*\s*(\d+))?(?:\s*[+-]\s*\d+)?|(\d+)\s*\*\*\s*\w+|\*")
_LONGEST = 200  # characters of a text that goes into a result
_OUT = ("out_channels", "num_classes", "out_classes", "n_classes")
_IN = ("in_channels", "n_input_channels")


@dataclass(frozen=True, slots=True)
class Facts:
    """What metadata.json says; `shape` None where the network takes any size."""

    channels: int
    modality: str | None
    labels: tuple[str, ...]
    shape: tuple[int, int, int] | None
    is_patch: bool
    dims: int
    inputs: tuple[str, ...]
    name: str
    task: str
    licence: str
    notes: tuple[str, ...]


def facts(meta: Mapping[str, Any], plan: Plan, where: str) -> Facts:
    """The facts, checked against the network.

    Raises:
        ModelError: something needed is missing, or labels and channels do not fit the network.
    """
    inputs, outputs = _formats(meta, where)
    name, image = _image(inputs, where)
    notes: list[str] = []
    channels = image.get("num_channels")
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise ModelError(_missing(f"network_data_format.inputs.{name}.num_channels", where))
    own = None if plan.name == "TorchVisionFCModel" else _declared(plan, _IN)
    if own is not None and own != channels:
        raise ModelError(
            f"expected as many input channels in {where} as the network takes ({own}), "
            f"got {channels}; correct the one that is wrong."
        )
    others = [n for n in inputs if n != name]
    if others:
        notes.append(f"the bundle's network also takes {', '.join(map(_text, others))}")
    shape = image.get("spatial_shape", [])
    listed = shape if isinstance(shape, list) else []
    values = image.get("value_range")
    if isinstance(values, list) and len(values) == 2:
        notes.append(f"the bundle says its network takes values in {values[0]} to {values[1]}")
    return Facts(
        channels=channels,
        modality=_modality(image, notes),
        labels=_labels(outputs, plan, where, notes),
        shape=_shape(listed),
        is_patch=bool(image.get("is_patch_data")),
        dims=int(plan.arguments.get("spatial_dims", len(listed) or 3)),
        inputs=tuple(str(n) for n in inputs),
        name=_text(meta.get("name") or f"MONAI bundle {plan.name} {meta.get('version', '')}"),
        task=_text(meta.get("task") or "not stated"),
        licence=_licence(meta),
        notes=tuple(notes),
    )


def _formats(meta: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    formats = meta.get("network_data_format")
    if not isinstance(formats, dict):
        raise ModelError(_missing("network_data_format", where))
    found = formats.get("inputs"), formats.get("outputs")
    for key, value in zip(("inputs", "outputs"), found, strict=True):
        if not isinstance(value, dict) or not value:
            raise ModelError(_missing(f"network_data_format.{key}", where))
    return found  # type: ignore[return-value]


def _missing(key: str, where: str) -> str:
    return (
        f"expected {key} in {where}, which says what the network takes and means, found none; "
        f"add it as MONAI's bundle specification describes."
    )


def _image(inputs: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    listed = {k: v for k, v in inputs.items() if isinstance(v, dict)}
    images = [k for k, v in listed.items() if v.get("type") == "image"] or list(listed)
    if not images:
        raise ModelError(_missing("network_data_format.inputs", where))
    name = "image" if "image" in images else images[0]
    return name, listed[name]


def _declared(plan: Plan, names: tuple[str, ...]) -> int | None:
    found = (plan.arguments.get(n) for n in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def _modality(image: Mapping[str, Any], notes: list[str]) -> str | None:
    said = str(image.get("modality", "")).strip()
    known = _MODALITY.get(said.upper())
    if known is None and str(image.get("format", "")) == "hounsfield":
        known = "CT"
    if known is None and said:
        notes.append(f"the bundle's modality {_text(said)!r} is not one of DICOM's: not checked")
    return known


def _labels(
    outputs: Mapping[str, Any], plan: Plan, where: str, notes: list[str]
) -> tuple[str, ...]:
    name = "pred" if "pred" in outputs else next(iter(outputs))
    out = outputs[name] if isinstance(outputs[name], dict) else {}
    named = out.get("channel_def")
    if not isinstance(named, dict) or not named:
        notes.append("the bundle does not name its outputs (channel_def): they are numbered")
        return ()
    if set(named) != {str(n) for n in range(len(named))}:
        raise ModelError(
            f"expected the outputs 0 to {len(named) - 1} in channel_def of {where}, "
            f"got {', '.join(sorted(map(str, named))[:8])}."
        )
    labels = [_text(named[str(n)]) for n in range(len(named))]
    head, several = _declared(plan, _OUT), len(outputs) > 1
    said = out.get("num_channels", len(labels))
    if not several and ((head is not None and head != len(labels)) or said != len(labels)):
        raise ModelError(
            f"expected one label for each output of the network ({said if head is None else head}) "
            f"in channel_def of {where}, got {len(labels)} ({', '.join(labels[:4])}); "
            f"labels and head do not belong together."
        )
    if several:
        notes.append(f"the bundle's network has the outputs {', '.join(map(_text, outputs))}")
        return ()
    return tuple(_different(labels))


def _different(labels: list[str]) -> list[str]:
    """The labels with a number behind those that come again."""
    made: list[str] = []
    for label in labels:
        new, n = label, 2
        while new in made:
            new, n = f"{label} ({n})", n + 1
        made.append(new)
    return made


def _shape(listed: list[Any]) -> tuple[int, int, int] | None:
    """Three whole numbers; None where one of them is an expression such as "8*n"."""
    sizes = [int(s) if str(s).strip().isdigit() else None for s in listed]
    if len(sizes) != 3 or any(s is None or s < 1 for s in sizes):
        return None
    a, b, c = (int(s) for s in sizes if s is not None)
    return a, b, c


def smallest(meta: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The smallest input where the shape is given as "8*n": 8 along that axis."""
    formats = meta.get("network_data_format")
    inputs = formats.get("inputs") if isinstance(formats, dict) else None
    listed = [v.get("spatial_shape") for v in (inputs or {}).values() if isinstance(v, dict)]
    shape = listed[0] if listed and isinstance(listed[0], list) else []
    found = [_SIZE.fullmatch(s.strip()) if isinstance(s, str) else None for s in shape]
    if len(found) != 3 or not all(found):
        return None
    a, b, c = (int(f[1] or f[2] or f[3] or 1) for f in found if f is not None)
    return a, b, c


def _licence(meta: Mapping[str, Any]) -> str:
    said = [_text(meta.get("license") or meta.get("licence") or "not stated")]
    for key, words in (("copyright", ""), ("intended_use", "intended use: ")):
        if meta.get(key):
            said.append(f"{words}{_text(meta[key])}")
    return "; ".join(said)


def _text(value: Any) -> str:
    """A printable line of at most 200 characters."""
    line = "".join(c if c.isprintable() else " " for c in str(value))
    return " ".join(line.split())[:_LONGEST] or "not stated"
