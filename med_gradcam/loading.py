"""How does a path become a Volume or a Model: which format takes it?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import ModuleType

import numpy as np

from med_gradcam import _plugins
from med_gradcam.errors import ImageError, ModelError
from med_gradcam.explanation import Explanation
from med_gradcam.model import Model
from med_gradcam.models import _archive, _trust
from med_gradcam.provenance import Source
from med_gradcam.volume import Volume, digest, off_words, resampled, same_grid

AnyPath = str | PathLike[str]
_LONGEST = 4096  # no path is longer
_BESIDE = 0.005  # share of a grid beside a scan from which a note says so


def read(
    path: AnyPath | Sequence[AnyPath],
    *,
    time: int | None = None,
    resample_to_first: bool = False,
    modality: str | None = None,
) -> Volume:
    """The volume at a path: a NIfTI file or a DICOM folder; several paths are its channels.

    `time`: which of a file's several volumes, from 1. Channels lie on one grid;
    `resample_to_first` brings the others to the first one's by a linear interpolation. They are of
    one modality, unless `modality` names one for each, as PT+CT: what a model of both takes.

    Raises:
        ImageError: nothing there can be read as a volume, or the channels do not go together; the
            message names the file.
    """
    paths = [Path(path)] if isinstance(path, (str, PathLike)) else [Path(p) for p in path]
    volumes = [_read_one(p) if time is None else _at_time(p, time) for p in paths]
    if not volumes:
        raise ImageError("expected at least one image, got none.")
    if len(volumes) == 1:
        return volumes[0]
    names = [p.name for p in paths]
    return _channels(_on_one_grid(volumes, names, resample=resample_to_first), names, modality)


def read_series(path: AnyPath | Sequence[AnyPath]) -> list[Volume]:
    """The volumes of a time series in order: of a NIfTI file (x, y, z, t), or one per path.

    Raises:
        ImageError: one of them cannot be read, or lies on another grid than the first.
    """
    if isinstance(path, (str, PathLike)):
        return _read_all(Path(path))
    paths = [Path(p) for p in path]
    if len(paths) == 1:
        return _read_all(paths[0])
    if not paths:
        raise ImageError("expected at least one image, got none.")
    names = [p.name for p in paths]
    volumes = _on_one_grid([_read_one(p) for p in paths], names, kind="time points")
    other = next((n for n, v in enumerate(volumes) if v.modality != volumes[0].modality), None)
    if other is not None:
        raise ImageError(
            f"expected time points of one modality, got {_said(volumes[0].modality)} in "
            f"{names[0]!r} and {_said(volumes[other].modality)} in {names[other]!r}."
        )
    return volumes


def read_for(
    paths: Sequence[AnyPath],
    model: Model,
    *,
    time: int | None = None,
    resample: bool = False,
) -> Volume:
    """The volume at some paths as a model takes it.

    A file of as many volumes as the model has channels is all of them. `resample`: the channels to
    the first one's grid.

    Raises:
        ImageError: as read().
    """
    spec = model.input
    if len(paths) == 1 and time is None and spec.channels > 1 and _exists(Path(paths[0])):
        several = _read_all(Path(paths[0]))
        if len(several) == spec.channels:
            made = _channels(several, [Path(paths[0]).name] * len(several), spec.modality)
            note = f"the {len(several)} volumes of the file are the network's channels"
            source = replace(
                made.source, paths=made.source.paths[:1], notes=(note, *several[0].source.notes)
            )
            return replace(made, source=source)
        if len(several) == 1:
            return several[0]
        raise ImageError(
            f"expected one file per channel, or one of {spec.channels} volumes, for "
            f"{model.name!r}, got {len(several)} volumes in {Path(paths[0]).name!r}."
        )
    return read(paths, time=time, resample_to_first=resample, modality=spec.modality)


def _exists(path: Path) -> bool:
    return len(str(path)) < _LONGEST and path.exists()


def _read_one(path: Path) -> Volume:
    if not _exists(path):
        raise ImageError(f"expected an image, but there is no {str(path)!r}.")
    for name in _plugins.names("formats"):
        module = _plugins.load("formats", name)
        if hasattr(module, "read") and module.sniff(path):
            volume: Volume = module.read(path)
            return volume
    what = "a folder without images" if path.is_dir() else "a file of a kind that is not known"
    raise ImageError(
        f"expected a NIfTI file (.nii, .nii.gz) or a DICOM folder, got {what}: {path.name!r}; "
        f"`med-gradcam formats` lists what can be read."
    )


def _read_all(path: Path) -> list[Volume]:
    """Every volume of a file, or the one that there is."""
    for name in _plugins.names("formats"):
        module = _plugins.load("formats", name)
        if hasattr(module, "read_all") and _exists(path) and module.sniff(path):
            found: list[Volume] = module.read_all(path)
            return found
    return [_read_one(path)]


def _at_time(path: Path, time: int) -> Volume:
    volumes = _read_all(path)
    if not 1 <= time <= len(volumes):
        raise ImageError(
            f"expected a time point from 1 to {len(volumes)} of {path.name!r}, got {time}."
        )
    one = volumes[time - 1]
    if len(volumes) == 1:
        return one
    note = f"time point {time} of {len(volumes)}"
    return replace(one, source=replace(one.source, notes=(note, *one.source.notes)))


def _on_one_grid(
    volumes: list[Volume], names: list[str], *, resample: bool = False, kind: str = "channels"
) -> list[Volume]:
    """The volumes, those that lie elsewhere brought to the first one's grid where that is asked.

    Raises:
        ImageError: with the file that lies elsewhere, and by how many mm.
    """
    first, made = volumes[0].grid, volumes[:1]
    for n, (other, name) in enumerate(zip(volumes[1:], names[1:], strict=True), start=2):
        if same_grid(first, other.grid):
            made.append(other)
            continue
        if not resample:
            advice = " with --resample-to-first (resample_to_first=True)" * (kind == "channels")
            raise ImageError(
                f"expected {kind} on one grid, but image {n} ({name!r}) does not lie on that of "
                f"{names[0]!r}: {off_words(first, other.grid)}; resample it to the first{advice}."
            )
        moved, beside = resampled(other, first)
        note = f"channel {n} resampled to the grid of channel 1 (linear)"
        note += f": {off_words(first, other.grid)}"
        note += f"; {beside:.0%} of the grid lies beside it" * (beside >= _BESIDE)
        made.append(replace(moved, source=replace(moved.source, notes=(*moved.source.notes, note))))
    return made


def _said(modality: str | None) -> str:
    return "a file that does not say one" if modality is None else modality


def _one_modality(volumes: list[Volume], names: list[str], wanted: str | None) -> str | None:
    """The channels' modality, or theirs joined by + where a model names one for each.

    Raises:
        ImageError: they differ, and no model asks for that; or they come in another order.
    """
    have = [v.modality for v in volumes]
    each = (wanted or "").split("+")
    if len(set(have)) == 1 and (have[0] is None or len(set(each)) == 1):
        return have[0]
    listed = ", ".join(f"{_said(m)} in {name!r}" for m, name in zip(have, names, strict=True))
    if len(each) < 2:
        raise ImageError(
            f"expected channels of one modality, got {listed}; a model that takes several names "
            f"one per channel in its spec, as PT+CT."
        )
    fits = len(each) == len(have)
    if not fits or any(m not in (None, e) for m, e in zip(have, each, strict=True)):
        raise ImageError(
            f"expected channels of {' then '.join(each)}, in that order, got {listed}; give the "
            f"files in the model's order."
        )
    return wanted


def _channels(volumes: list[Volume], names: list[str], wanted: str | None) -> Volume:
    """Volumes on one grid as the channels of one."""
    first = volumes[0]
    modality = _one_modality(volumes, names, wanted)
    array = np.concatenate([v.array.astype(np.float32) for v in volumes])
    source = Source(
        first.source.kind,
        digest(array, first.grid),
        tuple(p for v in volumes for p in v.source.paths[:1]),
        first.source.study_uid,
        first.source.series_uid,
        first.source.sop_uids,
        tuple(dict.fromkeys(note for v in volumes for note in v.source.notes)),
    )
    unit = first.unit if len({v.unit for v in volumes}) == 1 else "a.u."
    return Volume(array, first.grid, modality, unit, source, first.window)


def read_explanation(path: AnyPath) -> Explanation:
    """The Explanation in an output folder or its explanation.nii.gz, equal to the one written.

    Raises:
        ImageError: there is no such file, or it holds no record of an explanation.
    """
    explanation: Explanation = _plugins.load("formats", "nifti").read_explanation(Path(path))
    return explanation


def load_model(path: AnyPath, trust: str | Collection[str] = ()) -> Model:
    """The model that a path, a `module:function` or a URL names.

    `trust`: how far the user trusts the file: "data" (the default: nothing in it runs), "archive"
    (TorchScript), "code" (it may run code), "code:SHA256" (that very file may); or several such.

    Raises:
        ModelError: no format takes it, or it does not fit its own description.
        UntrustedModelError: its format needs more trust; the message says which, and its SHA-256.
    """
    text, words = str(path), _trust.agreed(trust)
    if why := _archive.cut(text) if len(text) < _LONGEST else "":
        raise ModelError(f"expected a whole model file, {Path(text).name!r} {why}; copy it again.")
    module = model_format(text)
    if module is not None:
        model: Model = module.load(text, words)
        return model
    there = Path(text)
    what = (
        "a folder without spec.json"
        if _exists(there) and there.is_dir()
        else f"a {there.suffix or 'plain'} file"
        if _exists(there)
        else "nothing there"
    )
    raise ModelError(
        f"expected a model folder (spec.json + weights.safetensors), a model file or "
        f"module:function, got {what}: {there.name!r}. `med-gradcam models` lists what can be "
        f"loaded."
    )


def model_format(text: str) -> ModuleType | None:
    """The model format that takes what the user named; None if none does."""
    for name in _plugins.names("models") if len(text) < _LONGEST else ():
        module = _plugins.load("models", name)
        if module.sniff(text):
            return module
    return None
