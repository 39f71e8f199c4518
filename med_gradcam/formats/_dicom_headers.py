"""Which files of a folder are DICOM, and what do their headers say, as far as it may be trusted?

Only checked values leave this file: numbers that are numbers, UIDs that are UIDs, terms of the
standard. Descriptions, names and every other free text of a header are never read, logged or kept.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import UID

from med_gradcam.errors import ImageError, ResourceError

MODALITIES = frozenset(
    {
        "CT",
        "MR",
        "PT",
        "NM",
        "US",
        "XA",
        "CR",
        "DX",
        "MG",
        "SC",
        "OT",
        "SR",
        "KO",
        "PR",
        "SEG",
        "REG",
        "RTSTRUCT",
        "RTDOSE",
        "RTPLAN",
        "RTIMAGE",
        "DOC",
        "SM",
    }
)
_DICOMDIR = "1.2.840.10008.1.3.10"
# First elements of a data set that was written without preamble: (0002,xxxx) or (0008,xxxx).
_BARE = tuple(b"\x08\x00" + bytes((e, 0)) for e in (0x00, 0x01, 0x05, 0x08, 0x12, 0x16, 0x18))
_BARE += (b"\x02\x00\x00\x00", b"\x02\x00\x10\x00")
_PREAMBLE = 128
# pydicom's settings and Python's warning filters belong to the whole process.
_ONE_AT_A_TIME = threading.RLock()
# What pydicom raises on damaged files; each becomes one sentence, without the cause: pydicom's
# messages quote bytes of the file, names included.
DAMAGE = (
    BytesLengthException,
    InvalidDicomError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "PixelPaddingValue",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "WindowCenter",
    "WindowWidth",
    "ModalityLUTSequence",
]


@dataclass(frozen=True, slots=True)
class Slice:
    """What one file's header says; None or () where it says nothing that can be trusted.

    Positions and orientations are LPS (mm, unit vectors) as in the file; `spacing_mm` is DICOM's
    (between rows, between columns).
    """

    path: Path
    sop_class: str | None
    sop_uid: str | None
    study_uid: str | None
    series_uid: str | None
    frame_uid: str | None
    modality: str | None
    syntax: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    signed: bool
    padding: int | None
    position_lps: tuple[float, ...]
    orientation_lps: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    thickness_mm: float | None
    slope: float
    intercept: float
    has_rescale: bool
    rescale_type: str
    has_lut: bool
    window: tuple[float, float] | None

    @property
    def name(self) -> str:
        """The file's name without its folder, for messages."""
        return self.path.name

    @property
    def kind(self) -> str:
        """What the object is, in the standard's words."""
        return UID(self.sop_class).name if self.sop_class else f"{self.modality or 'DICOM'} object"


@contextmanager
def quiet() -> Iterator[None]:
    """While open, pydicom accepts odd values in silence: its warnings quote values with names."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        yield from _hushed()


def _hushed() -> Iterator[None]:
    mode, logger = config.settings.reading_validation_mode, logging.getLogger("pydicom")
    before = logger.disabled
    warnings.simplefilter("ignore")
    config.settings.reading_validation_mode = config.IGNORE
    logger.disabled = True
    try:
        yield
    finally:
        config.settings.reading_validation_mode = mode
        logger.disabled = before


def looks_like_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM files do; False when it cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(_PREAMBLE + 4)
    except OSError:
        return False
    return start[_PREAMBLE:] == b"DICM" or start[:4] in _BARE


def uid(data: Dataset, keyword: str) -> str | None:
    """A UID of the header, if it is one: digits and dots, at most 64 characters."""
    value = UID(str(data.get(keyword) or ""))
    return str(value) if value.is_valid else None


def numbers(data: Dataset, keyword: str) -> tuple[float, ...]:
    """The finite numbers of an element; () when it is absent, empty or holds anything else."""
    try:
        value: Any = data.get(keyword)
        if value is None or value == "":
            return ()
        single = isinstance(value, (str, bytes, int, float))
        found = tuple(float(v) for v in ([value] if single else value))
    except DAMAGE:
        return ()
    return found if all(math.isfinite(v) for v in found) else ()


def term(data: Dataset, keyword: str) -> str:
    """A code string in upper case, to be compared with the standard's terms; "" when absent."""
    try:
        value: Any = data.get(keyword)
        first = value if isinstance(value, str) or not value else value[0]
        return str(first or "").strip().upper()
    except DAMAGE:
        return ""


def _whole(data: Dataset, keyword: str, default: int) -> int:
    found = numbers(data, keyword)
    return int(found[0]) if found else default


def load_header(path: Path, tags: list[str] | None = None) -> Dataset:
    """The data set of a file up to its pixels; call it inside `quiet`.

    Raises:
        ImageError: the file is damaged.
        ResourceError: it may not be read.
    """
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
    except PermissionError as error:
        raise ResourceError(f"expected to read {path.name}, got no permission.") from error
    except FileNotFoundError as error:
        raise ImageError(f"expected the file {path.name}, but it is gone.") from error
    except DAMAGE:
        raise ImageError(
            f"expected a DICOM header in {path.name}, got a truncated or damaged one; "
            f"copy the file again from its archive."
        ) from None


def header(path: Path) -> Slice:
    """The checked header values of one file; call it inside `quiet`.

    Raises:
        ImageError: the file is damaged.
    """
    data = load_header(path, _TAGS)
    try:
        return _slice(path, data)
    except DAMAGE:
        raise ImageError(
            f"expected a DICOM header in {path.name}, got a damaged one; "
            f"copy the file again from its archive."
        ) from None


def _slice(path: Path, data: Dataset) -> Slice:
    meta = getattr(data, "file_meta", Dataset())
    slope, intercept = numbers(data, "RescaleSlope"), numbers(data, "RescaleIntercept")
    centre, width = numbers(data, "WindowCenter"), numbers(data, "WindowWidth")
    modality, padding = term(data, "Modality"), numbers(data, "PixelPaddingValue")
    thickness = numbers(data, "SliceThickness")
    return Slice(
        path=path,
        sop_class=uid(data, "SOPClassUID") or uid(meta, "MediaStorageSOPClassUID"),
        sop_uid=uid(data, "SOPInstanceUID") or uid(meta, "MediaStorageSOPInstanceUID"),
        study_uid=uid(data, "StudyInstanceUID"),
        series_uid=uid(data, "SeriesInstanceUID"),
        frame_uid=uid(data, "FrameOfReferenceUID"),
        modality=modality if modality in MODALITIES else None,
        syntax=uid(meta, "TransferSyntaxUID") or "",
        rows=_whole(data, "Rows", 0),
        columns=_whole(data, "Columns", 0),
        frames=_whole(data, "NumberOfFrames", 1),
        samples=_whole(data, "SamplesPerPixel", 1),
        photometric=term(data, "PhotometricInterpretation"),
        bits_allocated=_whole(data, "BitsAllocated", 0),
        bits_stored=_whole(data, "BitsStored", 0),
        signed=_whole(data, "PixelRepresentation", 0) == 1,
        padding=int(padding[0]) if padding else None,
        position_lps=numbers(data, "ImagePositionPatient"),
        orientation_lps=numbers(data, "ImageOrientationPatient"),
        spacing_mm=numbers(data, "PixelSpacing"),
        thickness_mm=thickness[0] if thickness and thickness[0] > 0 else None,
        slope=slope[0] if slope else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        has_rescale=bool(slope and intercept),
        rescale_type=term(data, "RescaleType"),
        has_lut="ModalityLUTSequence" in data,
        window=(centre[0], width[0]) if centre and width and width[0] > 0 else None,
    )


def headers(folder: Path) -> tuple[list[Slice], int]:
    """The DICOM objects of a folder (not of its subfolders), and how many other files it has.

    Raises:
        ImageError: a file called .dcm is no DICOM file, or a header is damaged.
        ResourceError: the folder may not be read.
    """
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file())
    except PermissionError as error:
        raise ResourceError(f"expected to read {folder.name}, got no permission.") from error
    found, skipped = [], 0
    for path in files:
        if not os.access(path, os.R_OK):
            raise ResourceError(f"expected to read {path.name}, got no permission.")
        if not looks_like_dicom(path):
            if path.suffix.lower() == ".dcm":
                raise ImageError(not_dicom(path))
            skipped += 1
            continue
        one = header(path)
        if one.sop_class == _DICOMDIR:
            skipped += 1
        else:
            found.append(one)
    return found, skipped


def not_dicom(path: Path) -> str:
    """The sentence about a file that is called .dcm and is something else."""
    try:
        size = path.stat().st_size
    except OSError:
        size = 0
    what = f"{size} bytes of something else" if size else "an empty file"
    return (
        f"expected a DICOM file in {path.name}, got {what}; "
        f"remove it from the folder or copy it again from its archive."
    )
