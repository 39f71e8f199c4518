"""How does an explanation become a folder of files that is complete or absent?"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from med_gradcam import _plugins
from med_gradcam.bundle import Bundle
from med_gradcam.calibration import ALL_LAYERS, from_case
from med_gradcam.errors import (
    MedGradcamError,
    OutputExistsError,
    ResourceError,
    UnknownNameError,
    UsageError,
)
from med_gradcam.explanation import Explanation
from med_gradcam.maps import draw
from med_gradcam.progress import Progress, Step, silent
from med_gradcam.record import to_json, to_record
from med_gradcam.volume import Volume, taken_as

WRITERS = {"nifti": "nifti", "png": "png", "dicom": "dicom_parametric_map"}
LAYERS = "layers.json"  # of a folder with one explanation per layer


def check_names(formats: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the wished formats, each once; a text such as "nifti,png" names several.

    Raises:
        UsageError: neither a text nor a list of them.
        UnknownNameError: a format that cannot be written, with the near ones.
    """
    wished: object = formats.split(",") if isinstance(formats, str) else formats
    given = list(wished) if isinstance(wished, Iterable) else [wished]
    names = [name.strip() for name in given if isinstance(name, str)]
    if len(names) < len(given):
        raise UsageError(
            f"expected names of formats ({', '.join(WRITERS)}) in a list, got {formats!r}."
        )
    names = [name for name in names if name]
    for name in names:
        if name not in WRITERS:
            raise UnknownNameError("output format", name, WRITERS)
    return tuple(dict.fromkeys(names))


def check_formats(formats: str | Sequence[str], volume: Volume | None) -> tuple[str, ...]:
    """The wished formats, each known and possible.

    Raises:
        UnknownNameError: a format that cannot be written.
        UsageError: no names at all, or DICOM without a DICOM source.
    """
    wished = check_names(formats)
    reason = _no_dicom(volume) if "dicom" in wished else None
    if reason is not None:
        raise UsageError(reason)
    return wished


def default_formats(volume: Volume) -> tuple[str, ...]:
    """NIfTI and pictures; and DICOM where the scan's slices can be referred to."""
    return ("nifti", "png") if _no_dicom(volume) else ("nifti", "png", "dicom")


def _no_dicom(volume: Volume | None) -> str | None:
    """Why DICOM maps of a scan cannot be written, or None."""
    reason: str | None = _plugins.load("formats", WRITERS["dicom"]).why_not(volume)
    return reason


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, before any work is done.

    Raises:
        OutputExistsError: it exists, and overwrite was not asked for or it is not one of ours.
        ResourceError: its parent cannot be written.
    """
    try:
        if folder.exists():
            _check_ours(folder, overwrite=overwrite)
        place = folder.absolute().parent
        while not place.exists():  # made only when there is something to put there
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _resource(error, folder) from error


_OURS = ("explanation.json", "demo.json", "series.json", LAYERS)


def _check_ours(folder: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputExistsError(
            f"the output folder {str(folder)!r} exists already; choose another name, or say "
            f"--overwrite to replace it whole."
        )
    ours = folder.is_dir() and (
        any((folder / name).is_file() for name in _OURS) or not any(folder.iterdir())
    )
    if not ours:
        raise OutputExistsError(
            f"{str(folder)!r} holds no explanation.json, so it is not one of our output "
            f"folders and will not be replaced; choose another name."
        )


def write(  # noqa: PLR0913 - the door out, as explain() is the door in
    explanation: Explanation,
    directory: str | Path,
    *,
    volume: Volume | None = None,
    formats: str | Sequence[str] = ("nifti", "png"),
    overwrite: bool = False,
    identified: bool = False,
    beside: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = silent,
) -> Path:
    """Write the maps of an explanation into a new folder, all files or none; returns the folder.

    `volume`: the scan, drawn under the pictures and needed for DICOM. `formats`: nifti, png, dicom,
    in a list or as "nifti,png"; explanation.json is always written. Without `identified` no name,
    id, path or file name of the source goes into any file. `beside`: texts of more files, by name.

    Raises:
        UsageError: unknown formats, or a folder that exists.
        ResourceError: no room or no permission; nothing is left behind.
    """
    folder = Path(directory)
    wished = check_formats(formats, volume)
    check_output(folder, overwrite=overwrite)
    with staged(folder) as partial:
        scan = None if volume is None else taken_as(volume, explanation.modality)
        bundle = Bundle(explanation, draw(explanation), scan, identified)
        _fill(partial, bundle, wished, progress)
        for name, text in beside.items():
            (partial / name).write_text(text, encoding="utf-8")
    return folder


def write_layers(  # noqa: PLR0913 - as write()
    explanations: Sequence[Explanation],
    directory: str | Path,
    *,
    volume: Volume | None = None,
    formats: str | Sequence[str] = ("nifti", "png"),
    overwrite: bool = False,
    identified: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write one scan's explanations at several layers, one sub-folder each, all files or none.

    All are drawn on one colour scale, whose peak is the largest of theirs, so that they can be
    compared; a scale that the model brings for one of the layers is set aside. layers.json holds
    the records. The rest as write().

    Raises:
        UsageError, ResourceError: as write().
    """
    folder = Path(directory)
    wished = check_formats(formats, volume)
    check_output(folder, overwrite=overwrite)
    plain = [e.replace(calibration=None) for e in explanations]
    records = []
    with staged(folder) as partial:
        peak = max((draw(e).signed.peak for e in plain), default=0.0)
        for name, e in zip(folder_names(plain), plain, strict=True):
            scan = None if volume is None else taken_as(volume, e.modality)
            scale = from_case(peak, e.target.label, e.method, ALL_LAYERS)
            bundle = Bundle(e, draw(e).on_scale(scale), scan, identified)
            (partial / name).mkdir()
            records.append({"folder": name, **_fill(partial / name, bundle, wished, progress)})
        (partial / LAYERS).write_text(to_json(records), encoding="utf-8")
    return folder


def folder_names(explanations: Sequence[Explanation]) -> list[str]:
    """Names of sub-folders by number and layer: 1_block4, 2_block3."""
    wide = len(str(len(explanations)))
    layers = [re.sub(r"[^\w.@+-]+", "_", e.layer, flags=re.ASCII)[:80] for e in explanations]
    return [f"{n:0{wide}d}_{layer}" for n, layer in enumerate(layers, start=1)]


def _fill(
    folder: Path, bundle: Bundle, formats: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Write one explanation's files; returns its record."""
    for done, name in enumerate(formats):
        progress(Step(done, len(formats) + 1, f"writing {name}"))
        _plugins.load("formats", WRITERS[name]).save(bundle, folder)
    record = to_record(bundle.explanation, bundle.maps)
    (folder / "explanation.json").write_text(to_json(record), encoding="utf-8")
    progress(Step(len(formats), len(formats) + 1, "writing"))
    return record


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends without an error.

    After an error nothing is left behind, and an old `folder` is as it was.

    Raises:
        ResourceError: no room or no permission.
    """
    parent, partial = folder.absolute().parent, None
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
        yield partial
        put_in_place(partial, folder)
    except MedGradcamError:
        raise
    except OSError as error:
        raise _resource(error, folder) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty ends it
            for place in made:
                place.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def put_in_place(partial: Path, folder: Path) -> None:
    """Put a finished folder in its place; an old one goes only when the new one is there."""
    partial.chmod(0o777 & ~_umask())  # mkdtemp made it for its owner alone
    if not folder.exists():
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.absolute().parent))
    was = old / "was"
    try:
        folder.rename(was)
        try:
            partial.rename(folder)
        except OSError:
            was.rename(folder)
            raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _resource(error: OSError, place: Path) -> ResourceError:
    reasons = {
        errno.ENOSPC: "no room is left on the disk",
        errno.EDQUOT: "your disk quota is used up",
        errno.EACCES: "you have no permission to write there",
        errno.EPERM: "you have no permission to write there",
        errno.EROFS: "the disk is read-only",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
    }
    why = reasons.get(error.errno or 0, error.strerror or type(error).__name__)
    return ResourceError(
        f"expected to write {str(place)!r}, but {why}; choose another folder with -o."
    )
