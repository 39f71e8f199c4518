"""How do the maps become DICOM Parametric Maps on the source series' own slices?

One series per map, float32, frames ascending along row x column, one source image per frame. Built
from an empty data set, so that nothing of the source travels that was not chosen (_dicom_identity).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, ParametricMapStorage, generate_uid

from med_gradcam import __version__
from med_gradcam.bundle import Bundle
from med_gradcam.errors import ImageError, UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.formats import _dicom_frames as fg
from med_gradcam.formats import _dicom_identity as identity
from med_gradcam.formats._dicom_headers import Slice, header, load_header, quiet
from med_gradcam.maps import Heatmap
from med_gradcam.summary import NO_SIGN, status_words
from med_gradcam.volume import Volume

TITLE = "DICOM Parametric Maps: for, against and signed, each its own series"

_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_OFF_GRID_MM = 0.2
_MOST_BYTES = 2**32 - 2
_IMAGE_TYPE = ["DERIVED", "PRIMARY", "VOLUME", "QUANTITY"]
# polarity -> (series number, words before the label, content label)
_SERIES = {
    "for": (9001, "Evidence for", "EVIDENCE_FOR"),
    "against": (9002, "Evidence against", "EVIDENCE_AGAINST"),
    "signed": (9003, "Signed evidence", "EVIDENCE_SIGNED"),
    "strength": (9004, "Map without sign", "MAP_STRENGTH"),
}
_WARNING = "(research, not for diagnosis)"


@dataclass(frozen=True, slots=True)
class _Origin:
    """The source series: its slices as the volume has them, one header, its UIDs, the time."""

    slices: tuple[Slice, ...]
    data: Dataset
    study_uid: str
    series_uid: str
    frame_uid: str
    step_mm: float
    now: datetime
    notes: tuple[str, ...]


def why_not(volume: Volume | None) -> str | None:
    """Why this scan cannot have Parametric Maps, as one sentence; None when it can."""
    if volume is None or volume.source.kind != "dicom":
        return (
            f"expected a scan from a DICOM series for Parametric Maps, got "
            f"{'no scan' if volume is None else 'one from ' + volume.source.kind}; "
            f"leave dicom out of the formats, or explain the DICOM folder itself."
        )
    source, slices = volume.source, volume.grid.shape[2]
    if len(source.sop_uids) != slices or len(source.paths) != slices:
        return (
            f"expected a SOPInstanceUID and a file for each of {slices} slices, got "
            f"{len(source.sop_uids)} and {len(source.paths)}: a Parametric Map could not refer to "
            f"them; leave dicom out of the formats."
        )
    return None


def save(bundle: Bundle, folder: Path) -> list[Path]:
    """Write dicom/for.dcm, against.dcm and signed.dcm into `folder`; returns their paths.

    A map without a sign becomes dicom/strength.dcm instead.

    Raises:
        UsageError: the scan is no DICOM series, or the maps are not on its grid.
        ImageError: the source slices are gone or have changed.
    """
    reason = why_not(bundle.volume)
    if reason or bundle.volume is None:
        raise UsageError(reason or "expected a scan.")
    with quiet():
        origin = _origin(bundle.volume, bundle.explanation)
        target = folder / "dicom"
        target.mkdir(exist_ok=True)
        written = []
        for heatmap in bundle.maps.written:
            _check_map(heatmap, bundle.volume)
            path = target / f"{heatmap.polarity}.dcm"
            data = _data_set(heatmap, bundle.explanation, origin, identified=bundle.identified)
            data.save_as(path, enforce_file_format=True)
            written.append(path)
    return written


def derived_uid(*parts: str) -> str:
    """A UID that is the same for the same parts, for sources that lack one."""
    return str(generate_uid(prefix="2.25.", entropy_srcs=["med_gradcam", *parts]))


def _origin(volume: Volume, explanation: Explanation) -> _Origin:
    source, notes = volume.source, []
    slices = tuple(header(Path(path)) for path in source.paths)
    changed = [s.name for s, uid in zip(slices, source.sop_uids, strict=True) if s.sop_uid != uid]
    at = [volume.grid.world_ras((0, 0, k)) * _LPS_TO_RAS for k in range(len(slices))]
    changed += [
        s.name
        for s, place in zip(slices, at, strict=True)
        if len(s.position_lps) != len(place) or np.abs(place - s.position_lps).max() > _OFF_GRID_MM
    ]
    if changed:
        raise ImageError(
            f"expected the slices that were explained, but {changed[0]} has changed since it was "
            f"read; explain the series again."
        )
    series = source.series_uid or derived_uid("series", source.sha256)
    frame = volume.grid.frame_uid
    if frame is None:
        frame = derived_uid("frame of reference", series)
        notes.append("the source has no FrameOfReferenceUID: this one is made from its series UID")
    if source.study_uid is None:
        notes.append("the source has no StudyInstanceUID: this one is made from its series UID")
    utc = explanation.provenance.utc
    now = datetime.fromisoformat(utc) if utc else datetime.now(UTC)
    return _Origin(
        slices,
        load_header(Path(source.paths[0])),
        source.study_uid or derived_uid("study", series),
        series,
        frame,
        volume.grid.spacing_mm[2],
        now.astimezone(UTC),
        tuple(notes),
    )


def _check_map(heatmap: Heatmap, volume: Volume) -> None:
    same = heatmap.grid.shape == volume.grid.shape and np.allclose(
        heatmap.grid.affine, volume.grid.affine, rtol=0, atol=1e-3
    )
    if not same:
        raise UsageError(
            f"expected maps on the scan's grid {volume.grid.shape}, got {heatmap.grid.shape} or "
            f"another place; draw them on the scan's grid first."
        )
    if not np.isfinite(heatmap.values).all():
        raise UsageError(f"expected finite values in the map {heatmap.polarity}, got NaN or inf.")
    if heatmap.values.nbytes > _MOST_BYTES:
        raise UsageError(
            f"expected a map below 4 GiB (a limit of DICOM), got {heatmap.values.nbytes} bytes; "
            f"leave dicom out of the formats."
        )


def _data_set(
    heatmap: Heatmap, explanation: Explanation, origin: _Origin, *, identified: bool
) -> Dataset:
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    identity.copy_patient_and_study(origin.data, data, identified=identified)
    identity.copy_terms(origin.data, data)
    _series(data, heatmap, explanation, origin)
    _equipment(data, explanation, origin)
    _image(data, heatmap)
    fg.dimensions(data, str(generate_uid(prefix=None)))
    data.SharedFunctionalGroupsSequence = Items([_shared(heatmap, origin)])
    data.PerFrameFunctionalGroupsSequence = fg.frames(origin.slices)
    data.ReferencedSeriesSequence = fg.series_reference(origin.slices, origin.series_uid)
    data.AcquisitionContextSequence = Items()
    data.FloatPixelData = _float_pixels(heatmap.values)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = data.SOPClassUID
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    meta.ImplementationVersionName = f"MED_GRADCAM {__version__}"[:16].strip()
    data.file_meta = meta
    return data


def _float_pixels(values: npt.NDArray[np.float32]) -> bytes:
    """(I, J, K) = (column, row, slice) as frames of rows, little-endian."""
    return np.ascontiguousarray(values.transpose(2, 1, 0), dtype="<f4").tobytes()


def _local(origin: _Origin) -> tuple[str, str]:
    """Date and time of the content, in the zone the source states (UTC where it states none)."""
    zone = identity.offset(origin.data)
    minutes = int(f"{zone[0]}1") * (int(zone[1:3]) * 60 + int(zone[3:5])) if zone else 0
    local = origin.now.astimezone(timezone(timedelta(minutes=minutes)))
    return local.strftime("%Y%m%d"), local.strftime("%H%M%S.%f")


def _series(data: Dataset, heatmap: Heatmap, explanation: Explanation, origin: _Origin) -> None:
    number, words, content = _SERIES[heatmap.polarity]
    day, hour = _local(origin)
    room = 64 - len(words) - len(_WARNING) - 2
    label = identity.tidy(explanation.target.label, room)
    data.SOPClassUID = ParametricMapStorage
    data.SOPInstanceUID = str(generate_uid(prefix=None))
    data.StudyInstanceUID = origin.study_uid
    data.SeriesInstanceUID = str(generate_uid(prefix=None))
    data.FrameOfReferenceUID = origin.frame_uid
    data.PositionReferenceIndicator = ""
    data.Modality = "OT"
    data.SeriesNumber = number
    data.SeriesDescription = f"{words} {label} {_WARNING}"
    data.InstanceNumber = 1
    data.SeriesDate = data.ContentDate = data.InstanceCreationDate = day
    data.SeriesTime = data.ContentTime = data.InstanceCreationTime = hour
    data.ContentLabel = content
    data.ContentCreatorName = "med_gradcam^"
    about = f"{explanation.method}, {explanation.layer}, {explanation.target.label}"
    data.ContentDescription = f"NOT FOR DIAGNOSTIC USE: {identity.tidy(about, 40)}"


def _equipment(data: Dataset, explanation: Explanation, origin: _Origin) -> None:
    made = explanation.provenance
    versions = {"med_gradcam": __version__, **made.versions}
    # dcm2niix takes makers that begin with ME, SI, GE, ... for Mediso, Siemens, GE, ...
    data.Manufacturer, data.ManufacturerModelName = "The med_gradcam authors", "med_gradcam"
    data.DeviceSerialNumber = identity.tidy(made.weights_sha256 or "weights digest unknown", 64)
    data.SoftwareVersions = [identity.tidy(f"{k} {v}", 64) for k, v in versions.items()]
    network = Dataset()
    network.PurposeOfReferenceCodeSequence = fg.code("109102", "DCM", "Processing Equipment")
    network.Manufacturer = "The author of the network"
    network.ManufacturerModelName = identity.tidy(made.model_name or "unnamed network", 64)
    network.DeviceSerialNumber = data.DeviceSerialNumber
    network.SoftwareVersions = data.SoftwareVersions
    network.ContributionDateTime = origin.now.strftime("%Y%m%d%H%M%S.%f+0000")
    network.ContributionDescription = identity.tidy(_story(explanation, origin), 1024)
    data.ContributingEquipmentSequence = Items([network])


def _story(explanation: Explanation, origin: _Origin) -> str:
    """What the map says, in full sentences; free of paths and of anything about the patient."""
    relative = "a file" if explanation.reference.kind == "file" else explanation.reference.words
    label, signed = explanation.target.label, explanation.signed
    what = f"Evidence for and against {label}" if signed else f"Map without a sign, target {label}"
    parts = [
        f"NOT FOR DIAGNOSTIC USE. {what}, in "
        f"{explanation.unit} per mL, method {explanation.method} at layer {explanation.layer}, "
        f"relative to {relative}",
        f"model score {explanation.score:.6g} {explanation.target.unit}",
        f"score of the reference {explanation.reference_score:.6g}"
        if explanation.reference_score is not None
        else "no reference score",
        f"evidence for {explanation.sum_for:.6g}, against {explanation.sum_against:.6g}"
        if signed
        else f"this map has {NO_SIGN}",
        status_words(explanation),
        *origin.notes,
    ]
    return ". ".join(parts) + "."


def _image(data: Dataset, heatmap: Heatmap) -> None:
    columns, rows, slices = heatmap.values.shape
    data.ImageType = _IMAGE_TYPE
    data.PixelPresentation = "MONOCHROME"
    data.ContentQualification = "RESEARCH"
    data.BurnedInAnnotation = data.RecognizableVisualFeatures = "NO"
    data.PresentationLUTShape = "IDENTITY"
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.NumberOfFrames, data.Rows, data.Columns = slices, rows, columns
    data.BitsAllocated = 32


def _shared(heatmap: Heatmap, origin: _Origin) -> Dataset:
    _, snomed, meaning = identity.anatomy(origin.data)
    shared, identical, kind, window = Dataset(), Dataset(), Dataset(), Dataset()
    shared.PixelMeasuresSequence = fg.measures(origin.slices[0], origin.step_mm)
    shared.PlaneOrientationSequence = fg.orientation(origin.slices[0])
    shared.FrameAnatomySequence = fg.anatomy(snomed, meaning, identity.side(origin.data))
    identical.RescaleIntercept, identical.RescaleSlope, identical.RescaleType = "0", "1", "US"
    shared.PixelValueTransformationSequence = Items([identical])
    signed = heatmap.polarity == "signed"
    centre, width = (0.0, 2 * heatmap.peak) if signed else (heatmap.peak / 2, heatmap.peak)
    window.WindowCenter, window.WindowWidth = fg.decimals([centre, width])
    window.VOILUTFunction = "LINEAR_EXACT"  # LINEAR forbids windows narrower than 1
    shared.FrameVOILUTSequence = Items([window])
    kind.FrameType = _IMAGE_TYPE
    shared.ParametricMapFrameTypeSequence = Items([kind])
    shared.RealWorldValueMappingSequence = Items([_real_world(heatmap)])
    return shared


def _real_world(heatmap: Heatmap) -> Dataset:
    """What the numbers mean: evidence per mL, slope 1, over the range they have."""
    low, high = float(heatmap.values.min()), float(heatmap.values.max())
    words = _SERIES[heatmap.polarity][1].lower()
    mapping, quantity = Dataset(), Dataset()
    mapping.LUTLabel = words[:16]
    mapping.LUTExplanation = identity.tidy(f"{words}, {heatmap.unit}", 64)
    mapping.DoubleFloatRealWorldValueFirstValueMapped = low
    mapping.DoubleFloatRealWorldValueLastValueMapped = high if high > low else low + heatmap.peak
    mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope = 0.0, 1.0
    amount = heatmap.unit in ("log-odds per mL", "score per mL")
    mapping.MeasurementUnitsCodeSequence = fg.code(
        "/mL" if amount else "[arb'U]/mL", "UCUM", heatmap.unit
    )
    quantity.ValueType = "CODE"
    quantity.ConceptNameCodeSequence = fg.code("246205007", "SCT", "Quantity")
    quantity.ConceptCodeSequence = fg.code("130403", "DCM", "Gradient-weighted class activation")
    mapping.QuantityDefinitionSequence = Items([quantity])
    return mapping
