"""Which preprocessing does a bundle's configuration declare, and what of it can be honoured?

The literal transforms become stages in their own order. What cannot be honoured is named, never
dropped in silence; random transforms are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import GeometryError, ModelError
from med_gradcam.geometry import Geometry, check_axcodes
from med_gradcam.model import Ready
from med_gradcam.models._bundle_readers import READERS, Arguments, NotHonouredError
from med_gradcam.models._bundle_stages import Matrix, Stage, Three, View
from med_gradcam.models._bundle_words import Code
from med_gradcam.running import first_line

_NOTHING = frozenset(
    """
    EnsureChannelFirst AsChannelFirst AddChannel ToTensor ToDevice ToMetaTensor
    FromMetaTensor DeleteItems SelectItems Identity EnsureSameShape
    """.split()
)
_SPECIAL = frozenset({"Orientation", "ConcatItems"})
_NOT_INPUT = ("label", "labels", "mask", "seg", "segmentation", "pred")


@dataclass(frozen=True, slots=True, eq=False)
class Pipeline:
    """A bundle's preprocessing: `axes` first, then the stages. Called, it is a Recipe.

    `literal` are the transforms in MONAI's own words, for the comparison; `drift` names what is
    not honoured; `keys` the images in the order of the channels; `affine` where the oriented scan
    lies (index -> RAS+ mm).
    """

    stages: tuple[Stage, ...]
    axes: str | None
    notes: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()
    literal: tuple[tuple[str, dict[str, Any]], ...] = ()
    keys: tuple[str, ...] = ("image",)
    affine: Matrix | None = None

    def on(self, grid: Geometry) -> Pipeline:
        """The same for a scan on a grid: MONAI's change of spacing depends on it."""
        return replace(self, affine=grid.affine)

    def __call__(self, array: npt.NDArray[Any], spacing: Three) -> Ready:
        """The scan (C, i, j, k) as the bundle prepares it; `spacing` in mm."""
        plain = np.ascontiguousarray(array, dtype=np.float32)
        view = View(plain, plain)
        affine = np.diag([*spacing, 1.0]) if self.affine is None else self.affine
        for stage in self.stages:
            view = stage(view, affine)
        return Ready(view.raw, view.now, view.start, view.jump, view.steps)


@dataclass(slots=True)
class _Reading:
    """What has been read so far."""

    keys: list[str]
    stages: list[Stage] = field(default_factory=list)
    axes: str | None = None
    drift: list[str] = field(default_factory=list)
    literal: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    turned: str = ""  # the first transform that depends on the axes
    joined: bool = False


def pipeline(transforms: Sequence[Any], inputs: Collection[str] = ()) -> Pipeline:
    """The stages of a list of resolved transforms; `inputs`: the input names of metadata.json.

    Raises:
        ModelError: one of them is random, or is no transform.
    """
    listed = [t for t in transforms if not _off(t)]
    reading = _Reading(_image_keys(listed, inputs))
    several = tuple(reading.keys)
    for transform in listed:
        _read(transform, reading)
    if len(reading.keys) > 1:
        reading.drift.append(f"images {', '.join(reading.keys)} that nothing joins to channels")
    notes: tuple[str, ...] = ()
    if len(several) > 1:
        notes = (f"one image per channel, in the bundle's order: {', '.join(several)}",)
    return Pipeline(
        tuple(reading.stages), reading.axes, notes, tuple(reading.drift),
        tuple(reading.literal), several,
    )  # fmt: skip


def _off(transform: Any) -> bool:
    off = transform.get("_disabled_", False) if isinstance(transform, dict) else False
    return bool(off) and not isinstance(off, Code)


def _keys(transform: dict[str, Any]) -> list[str]:
    keys = transform.get("keys", [])
    if isinstance(keys, Code):
        return []
    return [str(k) for k in keys] if isinstance(keys, (list, tuple)) else [str(keys)]


def _image_keys(listed: Sequence[Any], inputs: Collection[str]) -> list[str]:
    """The images of one case, in the order in which they are joined to channels."""
    for transform in listed:
        if isinstance(transform, dict) and base_name(transform) == "ConcatItems":
            return _keys(transform)
    for transform in listed:
        if isinstance(transform, dict) and _keys(transform):
            found = _keys(transform)
            known = [k for k in found if k in inputs]
            return known or [k for k in found if k not in _NOT_INPUT] or found
    return ["image"]


def base_name(transform: dict[str, Any]) -> str:
    """The name of a transform without package and without the mark of the dictionary form."""
    name = str(transform.get("_target_", "")).rsplit(".", 1)[-1]
    if name in READERS or name in _NOTHING:
        return name
    for ending in ("Dict", "d", "D"):
        short = name.removesuffix(ending)
        if short != name and (short in READERS or short in _NOTHING or short in _SPECIAL):
            return short
    return name


def _read(transform: Any, reading: _Reading) -> None:
    if not isinstance(transform, dict) or not isinstance(transform.get("_target_"), str):
        raise ModelError(
            f"expected a list of transforms with _target_ in the bundle's preprocessing, got "
            f"{str(transform)[:80]!r}."
        )
    target, name = transform["_target_"], base_name(transform)
    own = target.rsplit(".", 1)[-1]
    if own.startswith("Rand"):
        raise ModelError(
            f"expected preprocessing that gives the same input every time, got the random "
            f"transform {own}: use the bundle's configuration for inference."
        )
    foreign = "." in target and not target.startswith("monai.transforms.")
    keys = _keys(transform) or reading.keys
    if not foreign and "keys" in transform and not set(keys) & set(reading.keys):
        return  # it concerns labels alone
    values = {k: v for k, v in transform.items() if not k.startswith("_")}
    values.pop("device", None)
    known = "" if foreign or transform.get("_mode_", "default") != "default" else name
    try:
        _one(known, Arguments(values, len(reading.keys) > 1), reading, keys)
        reading.literal.append((name, values))
    except NotHonouredError as error:
        why = first_line(error) if str(error) else ""
        reading.drift.append(f"{own} ({why})" if why else own)


def _one(name: str, arguments: Arguments, reading: _Reading, keys: list[str]) -> None:
    if name in _NOTHING:
        return
    if name not in _SPECIAL and name not in READERS:
        raise NotHonouredError("")
    if not set(reading.keys) <= set(keys) and name != "ConcatItems":
        raise NotHonouredError(f"only {', '.join(keys)} of {', '.join(reading.keys)}")
    if name == "Orientation":
        _orientation(arguments, reading)
    elif name == "ConcatItems":
        arguments.only("dim", 0)
        reading.keys = [str(arguments.take("name"))]
    else:
        made = READERS[name](arguments)
        reading.stages += made
        if any(stage.turned for stage in made) and not reading.turned:
            reading.turned = name
    arguments.check_rest()


def _orientation(arguments: Arguments, reading: _Reading) -> None:
    closest = arguments.flag("as_closest_canonical")
    codes = "RAS" if closest else arguments.take("axcodes", "RAS")
    arguments.take("labels")
    plain = [["L", "R"], ["P", "A"], ["I", "S"]]
    labels = arguments.values.get("labels")
    if labels is not None and [list(pair) for pair in labels] != plain:
        raise NotHonouredError(f"labels={labels!r}")
    try:
        reading.axes = check_axcodes("".join(codes))
    except (GeometryError, TypeError) as error:
        raise NotHonouredError(f"axcodes={codes!r}") from error
    if reading.turned:  # done first instead, so that at least the network sees its own directions
        raise NotHonouredError(f"after {reading.turned}")
