"""Do the Parametric Maps lie where the evidence lies, in other people's readers too?"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from med_gradcam import maps
from med_gradcam.bundle import Bundle
from med_gradcam.errors import ImageError, UsageError
from med_gradcam.formats import _dicom_frames, dicom_parametric_map, dicom_series
from med_gradcam.target import Target
from med_gradcam.volume import Volume
from tests.formats import dicom_phantom as phantom
from tests.formats.dicom_maps import (
    POLARITIES,
    WEIGHTS,
    assert_dcm2niix_agrees,
    assert_dcmqi_agrees,
    assert_highdicom_agrees,
    bundle,
    explanation,
    heatmaps,
    problems,
)


@pytest.fixture(autouse=True)
def _misspelt_keywords_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydicom.config, "INVALID_KEYWORD_BEHAVIOR", "RAISE")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Bundle, dict[str, Path]]:
    """The oblique phantom's bundle and its three files."""
    source = phantom.write(tmp_path / "source", orientation=phantom.OBLIQUE)
    made = bundle(dicom_series.read(source))
    paths = dicom_parametric_map.save(made, tmp_path)
    return made, {p.stem: p for p in paths}


# ---- place and values, in our eyes and in others'


@pytest.mark.parametrize("polarity", POLARITIES)
def test_highdicom_reads_it_back(written: tuple[Bundle, dict[str, Path]], polarity: str) -> None:
    made, paths = written
    assert_highdicom_agrees(paths[polarity], heatmaps(made)[polarity])


@pytest.mark.parametrize("polarity", POLARITIES)
def test_dcmqi_reads_it_back(
    written: tuple[Bundle, dict[str, Path]], polarity: str, tmp_path: Path
) -> None:
    made, paths = written
    assert_dcmqi_agrees(paths[polarity], heatmaps(made)[polarity], tmp_path)


@pytest.mark.parametrize("polarity", POLARITIES)
def test_dcm2niix_reads_it_back(
    written: tuple[Bundle, dict[str, Path]], polarity: str, tmp_path: Path
) -> None:
    made, paths = written
    assert_dcm2niix_agrees(paths[polarity], heatmaps(made)[polarity], tmp_path)


@pytest.mark.parametrize("polarity", POLARITIES)
def test_dciodvfy_finds_nothing(written: tuple[Bundle, dict[str, Path]], polarity: str) -> None:
    assert problems(written[1][polarity]) == []


def test_frames_lie_on_their_source_slices_in_ascending_order(
    written: tuple[Bundle, dict[str, Path]],
) -> None:
    made, paths = written
    assert made.volume is not None
    data = pydicom.dcmread(paths["signed"])
    frames = data.PerFrameFunctionalGroupsSequence
    assert len(frames) == data.NumberOfFrames == phantom.SLICES
    for k, frame in enumerate(frames):
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        slice_header = pydicom.dcmread(made.volume.source.paths[k])
        assert source.ReferencedSOPInstanceUID == slice_header.SOPInstanceUID
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(place, slice_header.ImagePositionPatient, atol=1e-9)
        assert frame.FrameContentSequence[0].DimensionIndexValues == k + 1
    first = np.frombuffer(data.FloatPixelData, "<f4")[: phantom.ROWS * phantom.COLUMNS]
    np.testing.assert_array_equal(
        first.reshape(phantom.ROWS, phantom.COLUMNS), made.maps.signed.values[:, :, 0].T
    )


def test_a_mirrored_frame_order_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundle(dicom_series.read(phantom.write(tmp_path / "source")))
    real = _dicom_frames.frames
    monkeypatch.setattr(_dicom_frames, "frames", lambda slices: real(slices[::-1]))
    path = dicom_parametric_map.save(made, tmp_path)[0]
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_highdicom_agrees(path, made.maps.signed)


# ---- what an object says


def test_each_map_is_a_series_of_its_own_in_the_sources_study(
    written: tuple[Bundle, dict[str, Path]],
) -> None:
    made, paths = written
    assert made.volume is not None
    objects = [pydicom.dcmread(p) for p in paths.values()]
    source = made.volume.source
    assert {d.StudyInstanceUID for d in objects} == {source.study_uid}
    assert {d.FrameOfReferenceUID for d in objects} == {made.volume.grid.frame_uid}
    assert len({d.SeriesInstanceUID for d in objects} | {source.series_uid}) == 4
    assert len({d.SOPInstanceUID for d in objects}) == 3
    for data in objects:
        (series,) = data.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == source.series_uid
        listed = [r.ReferencedSOPInstanceUID for r in series.ReferencedInstanceSequence]
        assert listed == list(source.sop_uids)


def test_words_codes_and_numbers(written: tuple[Bundle, dict[str, Path]]) -> None:
    made, paths = written
    wanted = {
        "for": "Evidence for nodule (research, not for diagnosis)",
        "against": "Evidence against nodule (research, not for diagnosis)",
        "signed": "Signed evidence nodule (research, not for diagnosis)",
    }
    for polarity, path in paths.items():
        data = pydicom.dcmread(path)
        assert data.SeriesDescription == wanted[polarity]
        assert data.ContentQualification == "RESEARCH"
        assert data.ContentDescription.startswith("NOT FOR DIAGNOSTIC USE: integrated, features.b")
        assert data.DeviceSerialNumber == WEIGHTS
        assert (data.ContentDate, data.ContentTime) == ("20261120", "182358.000000")
        (equipment,) = data.ContributingEquipmentSequence
        assert equipment.ManufacturerModelName == "lung net"
        assert "torch 2.13.0" in equipment.SoftwareVersions
        assert "relative to uniform lung" in equipment.ContributionDescription
        shared = data.SharedFunctionalGroupsSequence[0]
        mapping = shared.RealWorldValueMappingSequence[0]
        unit = mapping.MeasurementUnitsCodeSequence[0]
        assert (unit.CodeValue, unit.CodeMeaning) == ("/mL", "log-odds per mL")
        values = heatmaps(made)[polarity].values
        assert mapping.DoubleFloatRealWorldValueFirstValueMapped == float(values.min())
        assert mapping.DoubleFloatRealWorldValueLastValueMapped == float(values.max())
        quantity = mapping.QuantityDefinitionSequence[0]
        assert quantity.ConceptNameCodeSequence[0].CodeValue == "246205007"
        assert quantity.ConceptCodeSequence[0].CodeValue == "130403"


@pytest.mark.parametrize(
    ("measure", "code", "unit"),
    [
        ("score per input unit", "[arb'U]/mL", "log-odds per input unit per mL"),
        ("relative units", "[arb'U]/mL", "relative units per mL"),
    ],
)
def test_a_map_without_log_odds_does_not_claim_them(
    tmp_path: Path, measure: str, code: str, unit: str
) -> None:
    made = bundle(
        dicom_series.read(phantom.write(tmp_path / "source")), measure=measure, status="no_sum"
    )
    for path in dicom_parametric_map.save(made, tmp_path):
        data = pydicom.dcmread(path)
        shared = data.SharedFunctionalGroupsSequence[0]
        mapping = shared.RealWorldValueMappingSequence[0]
        said = mapping.MeasurementUnitsCodeSequence[0]
        assert (said.CodeValue, said.CodeMeaning) == (code, unit)
        assert mapping.LUTExplanation.endswith(unit)
        story = data.ContributingEquipmentSequence[0].ContributionDescription
        assert f"in {unit}, method" in story
        assert "log-odds. score of the reference" in story  # the scores have them
        assert problems(path) == []


def test_a_map_without_a_sign_is_one_object(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    made = bundle(volume, evidence=np.ones((3, 2, 3)), signed=False, measure="relative units",
                  status="no_sum", reference_score=None)  # fmt: skip
    (path,) = dicom_parametric_map.save(made, tmp_path)
    assert [p.name for p in (tmp_path / "dicom").iterdir()] == ["strength.dcm"] == [path.name]
    data = pydicom.dcmread(path)
    assert (data.SeriesNumber, data.ContentLabel) == (9004, "MAP_STRENGTH")
    assert data.SeriesDescription == "Map without sign nodule (research, not for diagnosis)"
    story = data.ContributingEquipmentSequence[0].ContributionDescription
    assert "Map without a sign, target nodule, in relative units per mL" in story
    assert "no sign: it shows where it is strong, not what raises or lowers the score" in story
    assert "evidence" not in f"{story} {data}".lower().replace("no evidence", "evidence")
    voi = data.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    peak = made.maps.signed.peak
    window = float(voi.WindowCenter), float(voi.WindowWidth)
    assert window == pytest.approx((peak / 2, peak))
    assert_highdicom_agrees(path, made.maps.signed)
    assert problems(path) == []


def test_one_window_for_both_polarities(written: tuple[Bundle, dict[str, Path]]) -> None:
    made, paths = written
    peak = made.maps.signed.peak
    found = {}
    for polarity, path in paths.items():
        shared = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0]
        voi = shared.FrameVOILUTSequence[0]
        found[polarity] = (float(voi.WindowCenter), float(voi.WindowWidth))
    assert found["for"] == found["against"] == pytest.approx((peak / 2, peak))
    assert found["signed"] == pytest.approx((0.0, 2 * peak))


def test_regression_is_in_score_per_ml(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    made = bundle(volume, target=Target("regression", "age", (0,), "none"))
    data = pydicom.dcmread(dicom_parametric_map.save(made, tmp_path)[0])
    mapping = data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert mapping.MeasurementUnitsCodeSequence[0].CodeMeaning == "score per mL"


def test_a_long_odd_label_fits(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    label = "Überlanges\\Etikett\nmit allem, was nicht in 64 Zeichen passt 病変"
    made = bundle(volume, target=Target("class", label, (1,), "softmax"), layer="x" * 200)
    for path in dicom_parametric_map.save(made, tmp_path):
        data = pydicom.dcmread(path)
        assert len(data.SeriesDescription) <= 64
        assert len(data.ContentDescription) <= 64
        assert "(research, not for diagnosis)" in data.SeriesDescription
        assert "Überlanges/E" in data.SeriesDescription
        assert problems(path) == []


def test_an_empty_map_is_written(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    made = bundle(volume, evidence=np.zeros((3, 2, 3), np.float32))
    for path in dicom_parametric_map.save(made, tmp_path):
        assert problems(path) == []
        assert_highdicom_agrees(path, made.maps.signed)


def test_body_part_and_position_travel_as_terms(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.BodyPartExamined, data.PatientPosition, data.Laterality = "KNEE", "FFS", "L"
        data.TimezoneOffsetFromUTC = "-0330"

    volume = dicom_series.read(phantom.write(tmp_path / "source", change))
    path = dicom_parametric_map.save(bundle(volume), tmp_path)[0]
    data = pydicom.dcmread(path)
    assert (data.BodyPartExamined, data.PatientPosition) == ("KNEE", "FFS")
    anatomy = data.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0]
    assert anatomy.FrameLaterality == "L"
    assert anatomy.AnatomicRegionSequence[0].CodeValue == "72696002"
    assert (data.ContentDate, data.ContentTime[:6]) == ("20261120", "145358")
    assert problems(path) == []


def test_lossy_history_travels(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.LossyImageCompression, data.LossyImageCompressionMethod = "01", "ISO_10918_1"
        data.LossyImageCompressionRatio = 12.5

    volume = dicom_series.read(phantom.write(tmp_path / "source", change))
    path = dicom_parametric_map.save(bundle(volume), tmp_path)[0]
    data = pydicom.dcmread(path)
    assert (data.LossyImageCompression, data.LossyImageCompressionRatio) == ("01", 12.5)
    assert problems(path) == []


# ---- what is refused, and what is made up and says so


def test_missing_frame_of_reference_is_made_from_the_series(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        del data.FrameOfReferenceUID

    volume = dicom_series.read(phantom.write(tmp_path / "source", change))
    made = bundle(volume)
    found = set()
    for _ in range(2):
        for path in dicom_parametric_map.save(made, tmp_path):
            data = pydicom.dcmread(path)
            found.add(data.FrameOfReferenceUID)
            story = data.ContributingEquipmentSequence[0].ContributionDescription
            assert "has no FrameOfReferenceUID" in story
            assert problems(path) == []
    assert len(found) == 1
    assert pydicom.uid.UID(found.pop()).is_valid


def test_a_scan_that_is_no_dicom_is_refused(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    made = bundle(volume)
    with pytest.raises(UsageError, match="got no scan; leave dicom out of the formats"):
        dicom_parametric_map.save(Bundle(made.explanation, made.maps), tmp_path)
    bare = Volume(volume.array, volume.grid)
    with pytest.raises(UsageError, match="got one from array; leave dicom out"):
        dicom_parametric_map.save(Bundle(made.explanation, made.maps, bare), tmp_path)
    assert dicom_parametric_map.why_not(volume) is None


def test_slices_without_uids_are_refused(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.SOPInstanceUID = "1.2.3"

    volume = dicom_series.read(phantom.write(tmp_path / "source", change))
    assert volume.source.sop_uids == ()
    with pytest.raises(UsageError, match="SOPInstanceUID and a file for each of 6 slices, got 0"):
        dicom_parametric_map.save(bundle(volume), tmp_path)


def test_changed_or_lost_slices_are_refused(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    made = bundle(volume)
    phantom.write(tmp_path / "source")  # another series under the same names
    with pytest.raises(ImageError, match=r"im2\.dcm has changed since it was read"):
        dicom_parametric_map.save(made, tmp_path)
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(ImageError, match=r"the file im2\.dcm, but it is gone"):
        dicom_parametric_map.save(made, tmp_path)


def test_maps_of_another_grid_are_refused(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source"))
    made = explanation(volume)
    coarse = maps.draw(made, made.grid)
    with pytest.raises(UsageError, match="scan on the grid of the maps"):
        dicom_parametric_map.save(Bundle(made, coarse, volume), tmp_path)


def test_infinite_values_are_refused(tmp_path: Path) -> None:
    made = bundle(dicom_series.read(phantom.write(tmp_path / "source")))
    made.maps.raises.values[0, 0, 0] = np.inf
    with pytest.raises(UsageError, match="finite values in the map for"):
        dicom_parametric_map.save(made, tmp_path)


# ---- real scans


@pytest.mark.real
@pytest.mark.parametrize(
    "case", ["ct_chest_c3n00247/dicom", "mr_oblique_studyforrest", "ct_abdomen_totalseg/dicom_j2k"]
)
def test_real_series(real_data: Path, tmp_path: Path, case: str) -> None:
    made = bundle(dicom_series.read(real_data / case))
    for path in dicom_parametric_map.save(made, tmp_path):
        heatmap = heatmaps(made)[path.stem]
        assert problems(path) == []
        assert_highdicom_agrees(path, heatmap)
        if path.stem == "signed":
            assert_dcmqi_agrees(path, heatmap, tmp_path)
            assert_dcm2niix_agrees(path, heatmap, tmp_path)
