"""What does a spec.json, or a file like it beside a network, say of the network?

Format `med-gradcam-model/1`. Errors name the file; `where` is that file, or its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from med_gradcam.calibration import Calibration
from med_gradcam.errors import MedGradcamError, ModelError
from med_gradcam.model import InputSpec, Model, parse_steps

FORMAT = "med-gradcam-model/1"


def name_of(where: Path) -> str:
    """The file as errors name it."""
    path = where if where.suffix else where / "spec.json"
    return f"{path.parent.name}/{path.name}"


def read(path: Path) -> dict[str, Any]:
    """The object in a spec.json.

    Raises:
        ModelError: there is none, or it is none of ours.
    """
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"expected a spec.json in the model folder, found none: {path}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"expected readable JSON in {name_of(path)}, got: {error}.") from error
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        got = spec.get("format") if isinstance(spec, dict) else type(spec).__name__
        raise ModelError(f"expected format {FORMAT!r} in {name_of(path)}, got {got!r}.")
    return spec


def key(spec: Mapping[str, Any], name: str, kind: type, where: Path) -> Any:
    """The value of a key that must be there.

    Raises:
        ModelError: it is not, or of another kind.
    """
    if not isinstance(spec.get(name), kind):
        raise ModelError(
            f"expected the key {name!r} ({kind.__name__}) in {name_of(where)}, "
            f"got {spec.get(name)!r}."
        )
    return spec[name]


def optional(spec: Mapping[str, Any], name: str, default: Any, where: Path) -> Any:
    """The value of a key of the default's kind; the default where it is missing."""
    return key({name: default, **spec}, name, type(default), where)


def model(net: torch.nn.Module, spec: Mapping[str, Any], where: Path, sha256: str) -> Model:
    """The network with what a spec says of it; `sha256` of its weights' file.

    Raises:
        ModelError: a key is missing or off, naming it.
    """
    try:
        return Model(
            net=net.eval(),
            input=input_of(key(spec, "input", dict, where), where),
            labels=tuple(str(label) for label in key(spec, "labels", list, where)),
            link=key(spec, "link", str, where),  # checked by Model
            name=str(spec.get("name", "unnamed network")),  # a folder may be named after a patient
            weights_sha256=sha256,
            licence=str(spec.get("licence", "not stated")),
            task=str(spec.get("task", "classification")),
            aliases=_aliases(optional(spec, "cam_layers", {}, where), net),
            calibration=_calibration(optional(spec, "calibration", [], where), net),
        )
    except MedGradcamError as error:
        if str(error).startswith(name_of(where)):
            raise
        raise ModelError(f"{name_of(where)}: {error}") from error


def input_of(spec: Mapping[str, Any], where: Path) -> InputSpec:
    """What the network takes.

    Raises:
        ModelError: a key is missing or off, naming it.
    """
    modality = key(spec, "modality", str, where)
    axes = key(spec, "axes", str, where)
    tile = axes == "row,column"  # an image without patient directions, taken as it is
    if not tile and ("," in axes or len(axes) not in {2, 3}):
        raise ModelError(
            f"expected the axes of a volume such as 'SPL', of an image such as 'PL', or "
            f"'row,column', got axes {axes!r}."
        )
    flat = tile or len(axes) == 2
    channels = spec.get("channels", 1)
    if not isinstance(channels, int):
        raise ModelError(f"expected a whole number of channels, got {channels!r}.")
    return InputSpec(
        channels=channels,
        modality=modality,
        axes=None if tile else axes + _third(axes) * flat,
        patch=_triple(spec.get("patch"), int, "patch", flat=flat),
        min_patch=_triple(spec.get("min_patch"), int, "min_patch", flat=flat),
        spacing_mm=_triple(spec.get("spacing_mm"), float, "spacing_mm", flat=flat),
        intensity=parse_steps(optional(spec, "intensity", [], where)),
    )


def _third(axes: str) -> str:
    """The axis across an image, along which it has one pixel."""
    left = (pair[0] for pair in ("RL", "AP", "SI") if not {*pair} & {*axes.upper()})
    return next(left, "")


def _triple(value: Any, kind: type, name: str, *, flat: bool = False) -> Any:
    """Three numbers; `flat`: two of an image, which is one pixel thick."""
    if value is None:
        return None
    count, word = (2, "two") if flat else (3, "three")
    whole = isinstance(value, list) and len(value) == count
    if not whole or not all(isinstance(v, (int, float)) for v in value):
        raise ModelError(f"expected {word} numbers or null as {name}, got {value!r}.")
    if kind is int and not all(float(v).is_integer() for v in value):
        raise ModelError(f"expected {word} whole numbers or null as {name}, got {value!r}.")
    return tuple(kind(v) for v in ([*value, 1] if flat else value))


def _aliases(named: dict[Any, Any], net: torch.nn.Module) -> dict[str, str]:
    aliases = {str(alias): str(path) for alias, path in named.items()}
    for alias, path in aliases.items():
        _check_layer(path, net, f"the layer {alias!r} of cam_layers")
    return aliases


def _check_layer(path: str, net: torch.nn.Module, what: str) -> None:
    if path not in dict(net.named_modules()):
        raise ModelError(f"expected {what} to name a module of the network, got {path!r}.")


def _calibration(entries: list[Any], net: torch.nn.Module) -> tuple[Calibration, ...]:
    try:
        scales = tuple(Calibration(**entry) for entry in entries)
    except TypeError as error:
        raise ModelError(f"a calibration entry does not fit: {error}.") from error
    for scale in scales:
        _check_layer(scale.layer, net, "the layer of a calibration entry")
        if scale.of_case:
            raise ModelError("expected a calibration learnt from at least one volume, got 0.")
    return scales
