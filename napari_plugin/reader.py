"""How does napari open our explanation folders, NIfTI scans and DICOM folders the right way?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from napari_plugin import tasks
from napari_plugin.layers import LayerData

ReaderFunction = Callable[[str], list[LayerData]]

_NIFTI = (".nii", ".nii.gz")
_LOOKED_AT = 50  # files of a folder that are looked into before it counts as no DICOM folder
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")


def get_reader(path: str | Sequence[str]) -> ReaderFunction | None:
    """The function that reads a path as layers, or None where it is nothing of ours."""
    if not isinstance(path, str):
        return None  # a stack of images is not a scan
    place = Path(path)
    if place.is_file() and place.name.lower().endswith(_NIFTI):
        return read
    if tasks.explanation_file(place):
        return read
    return read if place.is_dir() and _holds_dicom(place) else None


def read(path: str) -> list[LayerData]:
    """The layers of a scan or, for an explanation, of its maps against and for.

    Raises:
        MedGradcamError: it cannot be read; the message is ready for people.
    """
    return list(tasks.open_path(Path(path), lambda _step: None).layers)


def _holds_dicom(folder: Path) -> bool:
    files = (p for p in folder.rglob("*") if p.is_file())
    return any(_is_dicom(p) for p in islice(files, _LOOKED_AT))


def _is_dicom(file: Path) -> bool:
    if file.suffix.lower() in _DICOM_ENDINGS:
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
