"""A small DICOM series with known voxels and place, to be spoilt slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

COLUMNS, ROWS, SLICES = 7, 5, 6
BETWEEN_ROWS_MM, BETWEEN_COLUMNS_MM, STEP_MM = 0.8, 0.6, 2.5
FIRST_LPS = np.array([11.5, -20.25, 30.125])
AXIAL = np.array([1.0, 0, 0, 0, 1, 0])
_TURN = np.deg2rad(20)
OBLIQUE = np.array([np.cos(_TURN), np.sin(_TURN), 0, 0, 0, -1])
Change = Callable[[int, Dataset], None]


def values() -> npt.NDArray[np.int16]:
    """The phantom's stored values (I, J, K), each voxel another one."""
    i, j, k = np.ogrid[:COLUMNS, :ROWS, :SLICES]
    return np.asarray(i + 10 * j + 100 * k, dtype=np.int16)


def normal(orientation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.cross(orientation[:3], orientation[3:])


def affine_ras(orientation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Index (column, row, slice) -> RAS+ mm, written down by hand."""
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * BETWEEN_COLUMNS_MM
    affine[:3, 1] = orientation[3:] * BETWEEN_ROWS_MM
    affine[:3, 2] = normal(orientation) * STEP_MM
    affine[:3, 3] = FIRST_LPS
    affine[:2] *= -1
    return affine


def data_set(
    number: int, orientation: npt.NDArray[np.float64], uids: dict[str, str], modality: str
) -> Dataset:
    """Slice `number` of the phantom."""
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 100"
    data.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    data.SOPInstanceUID = f"{uids['series']}.{number + 1}"
    data.StudyInstanceUID, data.SeriesInstanceUID = uids["study"], uids["series"]
    data.FrameOfReferenceUID = uids["frame"]
    data.Modality = modality
    data.StudyDate, data.StudyTime = "20240229", "101112"
    data.InstanceNumber = SLICES - number  # against the order of the positions
    data.ImagePositionPatient = [
        round(float(v), 9) for v in FIRST_LPS + number * STEP_MM * normal(orientation)
    ]
    data.ImageOrientationPatient = [round(float(v), 13) for v in orientation]
    data.PixelSpacing = [BETWEEN_ROWS_MM, BETWEEN_COLUMNS_MM]
    data.SliceThickness = STEP_MM
    data.Rows, data.Columns, data.SamplesPerPixel = ROWS, COLUMNS, 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.WindowCenter, data.WindowWidth = [-500, 40], [1500, 400]
    data.PixelData = np.ascontiguousarray(values()[:, :, number].T).astype("<u2").tobytes()
    return data


def store(data: Dataset, path: Path) -> None:
    """Write a data set as an uncompressed DICOM file."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta = meta
    data.save_as(path, enforce_file_format=True)


def write(
    folder: Path,
    change: Change | None = None,
    *,
    orientation: npt.NDArray[np.float64] = AXIAL,
    modality: str = "CT",
) -> Path:
    """Write the phantom into `folder` under file names that say nothing of its order.

    `change` may spoil each slice's data set; one whose Rows became 0 is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uids = {name: str(generate_uid()) for name in ("study", "series", "frame")}
    uids["series"] = uids["series"][:50]
    for number in range(SLICES):
        data = data_set(number, orientation, uids, modality)
        if change is not None:
            change(number, data)
        if data.get("Rows") != 0:
            store(data, folder / f"im{(number * 5 + 2) % 7}.dcm")
    return folder


def name(number: int) -> str:
    """The file name of slice `number`."""
    return f"im{(number * 5 + 2) % 7}.dcm"
