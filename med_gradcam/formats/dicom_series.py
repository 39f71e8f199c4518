"""How does a folder of single-frame DICOM slices become a volume in the right place?

The array is (1, I, J, K) = (channel, column, row, slice), slices ascending along row x column. LPS
turns into RAS+ in _dicom_stack; stored values turn into HU or a.u. with each slice's own rescale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from med_gradcam.errors import ImageError
from med_gradcam.formats._dicom_headers import (
    DAMAGE,
    Slice,
    header,
    headers,
    looks_like_dicom,
    not_dicom,
    quiet,
)
from med_gradcam.formats._dicom_stack import check_same, some, stack
from med_gradcam.geometry import Geometry
from med_gradcam.provenance import Source
from med_gradcam.volume import Volume, digest

TITLE = "DICOM series: a folder of single-frame CT or MR slices"

_SHADES = ("MONOCHROME1", "MONOCHROME2")
_NO_SCANS = ("Segmentation Storage", "Surface Segmentation Storage", "Parametric Map Storage")
_MANY_SERIES = 8
_THREADS = 4
Stored = npt.NDArray[np.integer[Any]]


def sniff(path: Path) -> bool:
    """Whether `path` is a folder that holds a DICOM file, or is one itself."""
    try:
        if path.is_dir():
            files = (p for p in sorted(path.iterdir()) if p.is_file())
            return any(p.suffix.lower() == ".dcm" or looks_like_dicom(p) for p in files)
        return path.is_file() and (path.suffix.lower() == ".dcm" or looks_like_dicom(path))
    except OSError:
        return False


def read(path: Path) -> Volume:
    """The volume of a folder with the slices of one series, voxels in HU (CT) or a.u.

    Raises:
        ImageError: the folder holds no such series, more than one, or one that is not a complete,
            straight, evenly spaced stack; the message names the files.
        ResourceError: something may not be read.
    """
    with quiet():
        if not path.is_dir():
            raise ImageError(_no_folder(path))
        slices, skipped = headers(path)
        _check_series(path, slices, skipped)
        _check_images(slices)
        ordered, affine = stack(slices)
        stored = _pixels(ordered)
    array, notes = _values(ordered, stored)
    if skipped:
        notes.append(f"{skipped} files of the folder are no DICOM images and were skipped")
    return _volume(array, affine, ordered, notes)


def _volume(
    array: npt.NDArray[Any], affine: npt.NDArray[np.float64], ordered: list[Slice], notes: list[str]
) -> Volume:
    first, middle = ordered[0], ordered[len(ordered) // 2]
    _, i, j, k = array.shape
    grid = Geometry((i, j, k), affine, "patient", first.frame_uid)
    sop_uids = tuple(s.sop_uid for s in ordered if s.sop_uid)
    if len(set(sop_uids)) != len(ordered):
        sop_uids = ()
        notes.append("the slices have no SOPInstanceUIDs of their own: nothing can refer to them")
    for keyword, value in (
        ("FrameOfReferenceUID", first.frame_uid),
        ("StudyInstanceUID", first.study_uid),
        ("SeriesInstanceUID", first.series_uid),
        ("SOPClassUID", first.sop_class),
    ):
        if value is None:
            notes.append(f"the slices have no valid {keyword}")
    source = Source(
        "dicom",
        digest(array, grid),
        tuple(str(s.path) for s in ordered),
        first.study_uid,
        first.series_uid,
        sop_uids,
        tuple(notes),
    )
    return Volume(array, grid, first.modality, _unit(ordered), source, middle.window)


def _unit(ordered: Sequence[Slice]) -> str:
    known = all(s.has_rescale and s.rescale_type in ("", "HU") for s in ordered)
    return "HU" if ordered[0].modality == "CT" and known else "a.u."


def _no_folder(path: Path) -> str:
    if not path.exists():
        return f"expected a folder of DICOM slices, but there is no {path.name}."
    if not looks_like_dicom(path):
        return not_dicom(path)
    if header(path).frames > 1:
        return _multi_frame([path.name])
    return (
        f"expected a folder of DICOM slices, got the single file {path.name}; "
        f"name the folder that holds all slices of the series."
    )


def _multi_frame(names: Sequence[str]) -> str:
    return (
        f"expected single-frame slices, got a multi-frame file ({some(names)}), which is not read "
        f"yet; convert it to NIfTI first, for example with dcm2niix."
    )


def _check_series(folder: Path, slices: Sequence[Slice], skipped: int) -> None:
    if not slices:
        below = sum(sniff(p) for p in folder.iterdir() if p.is_dir())
        advice = (
            f"{below} of its subfolders hold some: name one of them"
            if below
            else "name the folder that holds the slices"
        )
        raise ImageError(
            f"expected a folder with DICOM images, got none among {skipped} files in "
            f"{folder.name}; {advice}."
        )
    series = Counter((s.series_uid, s.modality) for s in slices)
    if len({uid for uid, _ in series}) == 1:
        return
    if all(s.frames > 1 for s in slices):
        _check_kinds(slices)
    found = [
        f"{n}) {modality or 'unknown modality'}, {count} files, {uid or 'no SeriesInstanceUID'}"
        for n, ((uid, modality), count) in enumerate(series.most_common(), start=1)
    ]
    raise ImageError(
        f"expected the slices of one series, got {len(found)} series in the folder: "
        f"{'; '.join(found[:_MANY_SERIES])}{'; ...' if len(found) > _MANY_SERIES else ''}. "
        f"Put each series into a folder of its own and name that."
    )


def _check_kinds(slices: Sequence[Slice]) -> None:
    no_scan = [s for s in slices if s.rows < 1 or s.columns < 1 or s.kind in _NO_SCANS]
    if no_scan:
        raise ImageError(
            f"expected CT or MR images, got objects that are no scan ({no_scan[0].kind}): "
            f"{some([s.name for s in no_scan])}; name the folder of the images themselves."
        )
    many = [s.name for s in slices if s.frames > 1 or "Enhanced" in s.kind]
    if many:
        raise ImageError(_multi_frame(many))


def _check_images(slices: Sequence[Slice]) -> None:
    _check_kinds(slices)
    colour = [s.name for s in slices if s.samples != 1 or s.photometric not in _SHADES]
    if colour:
        raise ImageError(
            f"expected grey images (MONOCHROME1 or MONOCHROME2), got colour or none in "
            f"{some(colour)}; name the folder of the original CT or MR slices."
        )
    table = [s.name for s in slices if s.has_lut or s.slope == 0]
    if table:
        raise ImageError(
            f"expected values with a rescale slope other than 0, got a look-up table or slope 0 "
            f"in {some(table)}; export the original images again."
        )
    if len(slices) == 1:
        raise ImageError(
            f"expected at least two slices, got one ({slices[0].name}); "
            f"a single 2D image is no volume: name the folder of the whole series."
        )
    check_same(slices, "size (columns, rows)", lambda s: (s.columns, s.rows))
    check_same(slices, "frame of reference", lambda s: s.frame_uid)
    check_same(slices, "study", lambda s: s.study_uid)
    check_same(slices, "modality", lambda s: s.modality)
    check_same(slices, "PhotometricInterpretation", lambda s: s.photometric)


def _pixels(ordered: Sequence[Slice]) -> list[Stored]:
    """The stored values (rows, columns) of each slice.

    Raises:
        ImageError: pixels are missing, truncated or packed in a way nothing here can unpack.
    """
    for syntax in {s.syntax for s in ordered}:
        _check_syntax(syntax, next(s.name for s in ordered if s.syntax == syntax))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_slice_pixels, ordered))


def _check_syntax(syntax: str, name: str) -> None:
    if not syntax:
        return
    known = UID(syntax)
    try:
        ready = get_decoder(known).is_available
    except NotImplementedError:
        ready = False
    if not ready:
        raise ImageError(
            f"expected pixels that can be unpacked here, got {known.name} in {name}; install the "
            f"decoders with: pip install med_gradcam[codecs]"
        )


def _slice_pixels(one: Slice) -> Stored:
    try:
        found = _with_syntax(pydicom.dcmread(one.path, force=True)).pixel_array
    except DAMAGE:
        raise ImageError(
            f"expected {one.columns} x {one.rows} pixels of {one.bits_allocated} bits in "
            f"{one.name}, got truncated, damaged or no pixel data; "
            f"copy the file again from its archive."
        ) from None
    if found.shape != (one.rows, one.columns) or found.dtype.kind not in "iu":
        raise ImageError(
            f"expected {one.columns} x {one.rows} whole-numbered pixels in {one.name}, got "
            f"{found.dtype} of shape {found.shape}."
        )
    return _stored_bits(found, one)


def _with_syntax(data: Dataset) -> Dataset:
    """The same data set; a file without file meta gets the syntax it was written in."""
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, _ = data.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = syntax
    return data


def _stored_bits(found: Stored, one: Slice) -> Stored:
    """The values without bits above BitsStored (old files keep overlays there)."""
    spare = found.dtype.itemsize * 8 - one.bits_stored
    if not 0 < spare < found.dtype.itemsize * 8:
        return found
    return np.right_shift(np.left_shift(found, spare), spare)


def _values(
    ordered: Sequence[Slice], stored: Sequence[Stored]
) -> tuple[npt.NDArray[Any], list[str]]:
    """The array (1, I, J, K), int16 where that loses nothing and float32 elsewhere, and notes."""
    whole = all(s.slope == 1 and s.intercept.is_integer() for s in ordered)
    low = min(float(p.min()) + s.intercept for s, p in zip(ordered, stored, strict=True))
    high = max(float(p.max()) + s.intercept for s, p in zip(ordered, stored, strict=True))
    small = np.iinfo(np.int16)
    keep = whole and small.min <= low and high <= small.max
    array = np.empty((len(ordered), *stored[0].shape), np.int16 if keep else np.float32)
    padded = 0
    for k, (one, pixels) in enumerate(zip(ordered, stored, strict=True)):
        if keep:
            array[k] = pixels.astype(np.int32) + int(one.intercept)
        else:
            array[k] = pixels * one.slope + one.intercept
        if one.padding is not None:
            padded += int((pixels == one.padding).sum())
    notes = []
    if padded:
        notes.append(f"{padded} voxels hold the padding value and were kept as they are")
    if ordered[0].photometric == "MONOCHROME1":
        notes.append("MONOCHROME1: values were kept, not inverted")
    if len({(s.slope, s.intercept) for s in ordered}) > 1:
        notes.append("the rescale differs from slice to slice and was applied to each")
    return array.transpose(2, 1, 0)[None], notes
