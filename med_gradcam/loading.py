"""How does a path become a Volume or a Model: which format takes it?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from med_gradcam import _plugins
from med_gradcam.errors import ImageError, ModelError
from med_gradcam.explanation import Explanation
from med_gradcam.model import Model
from med_gradcam.provenance import Source
from med_gradcam.volume import Volume, digest

AnyPath = str | PathLike[str]
_LONGEST = 4096  # no path is longer


def read(path: AnyPath | Sequence[AnyPath]) -> Volume:
    """The volume at a path: a NIfTI file or a DICOM folder; several paths are its channels.

    Raises:
        ImageError: nothing there can be read as a volume; the message names the file.
    """
    if isinstance(path, (str, PathLike)):
        return _read_one(Path(path))
    volumes = [_read_one(Path(p)) for p in path]
    if not volumes:
        raise ImageError("expected at least one image, got none.")
    return volumes[0] if len(volumes) == 1 else _channels(volumes)


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


def _channels(volumes: list[Volume]) -> Volume:
    first = volumes[0]
    for n, other in enumerate(volumes[1:], start=2):
        same = other.grid.shape == first.grid.shape and np.allclose(
            other.grid.affine, first.grid.affine, atol=1e-3
        )
        if not same:
            raise ImageError(
                f"expected channels on one grid, but image {n} has shape {other.grid.shape} and "
                f"image 1 {first.grid.shape}, or their affines differ; resample them first."
            )
        if other.modality != first.modality:
            raise ImageError(
                f"expected channels of one modality, got {first.modality} and {other.modality}."
            )
    array = np.concatenate([v.array.astype(np.float32) for v in volumes])
    source = Source(
        first.source.kind,
        digest(array, first.grid),
        tuple(p for v in volumes for p in v.source.paths[:1]),
        first.source.study_uid,
        first.source.series_uid,
        first.source.sop_uids,
        tuple(note for v in volumes for note in v.source.notes),
    )
    return Volume(array, first.grid, first.modality, first.unit, source, first.window)


def read_explanation(path: AnyPath) -> Explanation:
    """The Explanation in an output folder or its explanation.nii.gz, equal to the one written.

    Raises:
        ImageError: there is no such file, or it holds no record of an explanation.
    """
    explanation: Explanation = _plugins.load("formats", "nifti").read_explanation(Path(path))
    return explanation


def load_model(path: AnyPath, trust: Collection[str] = ()) -> Model:
    """The model a path or `module:function` names; `trust` lists what the user agreed to.

    Raises:
        ModelError: no format takes it, or it does not fit its own description.
    """
    text = str(path)
    for name in _plugins.names("models"):
        module = _plugins.load("models", name)
        if len(text) < _LONGEST and module.sniff(text):
            model: Model = module.load(text, trust)
            return model
    there = Path(text)
    what = (
        "a folder without spec.json"
        if _exists(there) and there.is_dir()
        else f"a {there.suffix or 'plain'} file"
        if _exists(there)
        else "nothing there"
    )
    hint = ""
    if there.suffix in (".pt", ".pth", ".ckpt", ".pkl"):
        hint = " Pickles can run code and are not read: save the weights as safetensors."
    raise ModelError(
        f"expected a model folder (spec.json + weights.safetensors) or module:function, got "
        f"{what}: {there.name!r}.{hint} `med-gradcam models` lists what can be loaded."
    )
