"""Where does each frame of a multi-frame object lie, and from which source slice is it derived?"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage
from pydicom.valuerep import DSfloat

from med_gradcam.formats._dicom_headers import Slice

_IMAGE_POSITION, _PLANE_POSITION = 0x00200032, 0x00209113
_STORAGE = {"CT": CTImageStorage, "MR": MRImageStorage}


def code(value: str, scheme: str, meaning: str) -> Items:
    """A code sequence with one item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Items([item])


def decimals(values: Sequence[float]) -> list[DSfloat]:
    """Numbers as DICOM decimal strings of at most 16 characters."""
    return [DSfloat(v, auto_format=True) for v in values]


def reference(one: Slice) -> Dataset:
    """A reference to a source slice."""
    item = Dataset()
    item.ReferencedSOPClassUID = one.sop_class or _STORAGE.get(
        one.modality or "", SecondaryCaptureImageStorage
    )
    item.ReferencedSOPInstanceUID = one.sop_uid
    return item


def series_reference(slices: Sequence[Slice], series_uid: str) -> Items:
    """The ReferencedSeriesSequence with every slice of the source series."""
    item = Dataset()
    item.SeriesInstanceUID = series_uid
    item.ReferencedInstanceSequence = Items([reference(s) for s in slices])
    return Items([item])


def measures(one: Slice, step_mm: float) -> Items:
    """The PixelMeasuresSequence of slices `step_mm` apart."""
    item = Dataset()
    item.PixelSpacing = decimals(one.spacing_mm)
    item.SliceThickness = decimals([one.thickness_mm or step_mm])[0]
    item.SpacingBetweenSlices = decimals([step_mm])[0]
    return Items([item])


def orientation(one: Slice) -> Items:
    """The PlaneOrientationSequence of a source slice."""
    item = Dataset()
    item.ImageOrientationPatient = decimals(one.orientation_lps)
    return Items([item])


def anatomy(snomed: str, meaning: str, side: str) -> Items:
    """The FrameAnatomySequence; dcmqi and 3D Slicer cannot open a map without it."""
    item = Dataset()
    item.FrameLaterality = side or "U"
    item.AnatomicRegionSequence = code(snomed, "SCT", meaning)
    return Items([item])


def dimensions(into: Dataset, organisation_uid: str) -> None:
    """Say that frames are ordered by ImagePositionPatient."""
    kind = Dataset()
    kind.DimensionOrganizationUID = organisation_uid
    into.DimensionOrganizationSequence = Items([kind])
    index = Dataset()
    index.DimensionOrganizationUID = organisation_uid
    index.DimensionIndexPointer = _IMAGE_POSITION
    index.FunctionalGroupPointer = _PLANE_POSITION
    index.DimensionDescriptionLabel = "Image Position Patient"
    into.DimensionIndexSequence = Items([index])


def frames(slices: Sequence[Slice]) -> Items:
    """The PerFrameFunctionalGroupsSequence: one frame per source slice, in the slices' order.

    Ascending along row x column, because OHIF and dcmqi place frame i at slice i without looking
    at its position; exactly one source image per frame, because OHIF takes the first.
    """
    purpose = ("121322", "DCM", "Source image for image processing operation")
    found = []
    for number, one in enumerate(slices, start=1):
        content, position, source, derivation = Dataset(), Dataset(), reference(one), Dataset()
        content.DimensionIndexValues = number
        position.ImagePositionPatient = decimals(one.position_lps)
        source.SpatialLocationsPreserved = "YES"
        source.PurposeOfReferenceCodeSequence = code(*purpose)
        derivation.SourceImageSequence = Items([source])
        derivation.DerivationCodeSequence = code(
            "112187", "DCM", "Unspecified method of calculation"
        )
        frame = Dataset()
        frame.FrameContentSequence = Items([content])
        frame.PlanePositionSequence = Items([position])
        frame.DerivationImageSequence = Items([derivation])
        found.append(frame)
    return Items(found)
