"""How is a sample CT written as a classic DICOM series, one file per slice?"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from .grid import Grid
from .net_io import to_axes

MADE_ON, MADE_AT = "20240102", "120000"


def made_uid(text: str) -> UID:
    """A UID that depends on nothing but the text."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, 'med_gradcam sample ' + text).int}")


def write_ct_series(folder: Path, hu_ras: np.ndarray, grid: Grid, name: str) -> None:
    """Write an (R, A, S) scan in HU as axial CT Image Storage files, slices from feet to head."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.clip(np.round(to_axes(hu_ras, "SPL")) + 1024, 0, 4095).astype("<u2")
    corner = np.array([grid.shape[0] - 1, grid.shape[1] - 1, 0])
    right, anterior, superior = grid.world_ras_mm(corner)
    for number, pixels in enumerate(stored):
        height = superior + number * grid.spacing_mm[2]
        position = [round(float(-right), 4), round(float(-anterior), 4), round(float(height), 4)]
        slice_file = _slice(pixels, grid, name, number, position)
        slice_file.save_as(folder / f"slice_{number + 1:03d}.dcm", enforce_file_format=True)


def _slice(
    pixels: np.ndarray, grid: Grid, name: str, number: int, position_lps_mm: list[float]
) -> FileDataset:
    """One slice with everything that a CT Image Storage object must have."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = made_uid(f"{name} slice {number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = made_uid("implementation")
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    _describe_patient(item, name)
    item.SOPClassUID = CTImageStorage
    item.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    item.InstanceNumber = number + 1
    item.AcquisitionNumber = 1
    item.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    item.ImagePositionPatient = position_lps_mm
    item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    item.SliceLocation = position_lps_mm[2]
    item.PixelSpacing = [grid.spacing_mm[1], grid.spacing_mm[0]]
    item.SliceThickness = grid.spacing_mm[2]
    item.SpacingBetweenSlices = grid.spacing_mm[2]
    item.Rows, item.Columns = pixels.shape
    item.SamplesPerPixel = 1
    item.PhotometricInterpretation = "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit = 16, 12, 11
    item.PixelRepresentation = 0
    item.RescaleIntercept, item.RescaleSlope, item.RescaleType = -1024, 1, "HU"
    item.WindowCenter, item.WindowWidth = [-600, 40], [1500, 400]
    item.WindowCenterWidthExplanation = ["LUNG", "MEDIASTINUM"]
    item.KVP = 120
    item.BurnedInAnnotation = "NO"
    item.PixelData = pixels.tobytes()
    return item


def _describe_patient(item: Dataset, name: str) -> None:
    """Patient, study, series, equipment and frame of reference, in place."""
    item.SpecificCharacterSet = "ISO_IR 192"
    item.PatientName = "PHANTOM^CHEST"
    item.PatientID = f"MEDGRADCAM-{name.upper()}"
    item.PatientBirthDate, item.PatientSex = "", "O"
    item.StudyInstanceUID = made_uid(f"{name} study")
    item.SeriesInstanceUID = made_uid(f"{name} series")
    item.FrameOfReferenceUID = made_uid(f"{name} frame")
    item.PositionReferenceIndicator = ""
    for prefix in ("Study", "Series", "Acquisition", "Content"):
        setattr(item, f"{prefix}Date", MADE_ON)
        setattr(item, f"{prefix}Time", MADE_AT)
    item.InstanceCreationDate, item.InstanceCreationTime = MADE_ON, MADE_AT
    item.AccessionNumber, item.ReferringPhysicianName = "", ""
    item.StudyID, item.SeriesNumber = "1", 2
    item.StudyDescription = "Rendered chest phantom"
    item.SeriesDescription = "Spiculated nodule, rendered"
    item.Modality = "CT"
    item.BodyPartExamined = "CHEST"
    item.PatientPosition = "HFS"
    item.Manufacturer = "med_gradcam"
    item.ManufacturerModelName = "rendered phantom"
    item.SoftwareVersions = "1"
