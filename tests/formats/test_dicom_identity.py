"""Does any word about the patient leave the house without being asked to?"""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset

from med_gradcam.formats import dicom_parametric_map, dicom_series
from tests.formats import dicom_phantom as phantom
from tests.formats.dicom_maps import bundle, problems

PLANT = "ZQPLANTEDNAME"
# Elements that must stay as they are for the series to be one, or a DICOM file at all.
NEEDED = {
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PhotometricInterpretation",
}
TEXT = {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}


def _plant_everywhere(number: int, data: Dataset) -> None:
    for tag, entry in DicomDictionary.items():
        vr = entry[0]
        if tag >> 16 in (0x0000, 0x0002, 0xFFFE) or keyword_for_tag(tag) in NEEDED:
            continue
        if vr in TEXT:
            data.add_new(tag, vr, PLANT)
    item = Dataset()
    item.add_new("PatientName", "PN", PLANT)
    data.add_new("ReferencedPatientSequence", "SQ", [item])
    block = data.private_block(0x0099, PLANT, create=True)
    block.add_new(1, "LO", PLANT)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A series with the plant in every text element, file name and folder name."""
    settings = pydicom.config.settings
    before = settings.writing_validation_mode
    settings.writing_validation_mode = pydicom.config.IGNORE
    monkeypatch.setattr(settings, "reading_validation_mode", pydicom.config.IGNORE)
    folder = phantom.write(tmp_path / PLANT, _plant_everywhere)
    settings.writing_validation_mode = before
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(f"{PLANT}_{path.name}"))
    return folder


def test_no_planted_name_leaves_the_house(
    planted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert PLANT.encode() in next(planted.iterdir()).read_bytes()
    volume = dicom_series.read(planted)
    out = tmp_path / "out"
    out.mkdir()
    for path in dicom_parametric_map.save(bundle(volume), out):
        content = path.read_bytes()
        assert PLANT.encode() not in content
        assert PLANT.lower().encode() not in content.lower()
        data = pydicom.dcmread(path)
        assert data.PatientIdentityRemoved == "YES"
        assert (str(data.PatientName), data.PatientID, data.AccessionNumber) == ("", "", "")
        assert problems(path) == []
    heard = capfd.readouterr()
    assert PLANT not in heard.out + heard.err + caplog.text + repr(volume.source.notes)
    assert volume.modality is None


def test_odd_values_are_copied_as_they_are_when_identified(planted: Path, tmp_path: Path) -> None:
    volume = dicom_series.read(planted)
    out = tmp_path / "out"
    out.mkdir()
    for path in dicom_parametric_map.save(bundle(volume, identified=True), out):
        data = pydicom.dcmread(path)
        assert str(data.PatientName) == data.PatientID == PLANT
        assert data.PatientBirthDate == ""  # no valid date
        assert "PatientIdentityRemoved" not in data
        assert planted.name + "_" not in repr(data)


def _identify(number: int, data: Dataset) -> None:
    data.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    data.PatientName = "Yamada^Tarou=山田^太郎"
    data.PatientID, data.PatientBirthDate, data.PatientSex = "4711", "19700101", "M"
    data.AccessionNumber, data.StudyID, data.StudyDescription = "A1", "S1", "Thorax"
    data.ReferringPhysicianName = "House^Gregory"
    data.InstitutionName = "General Hospital"


def test_identified_copies_patient_and_study(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source", _identify))
    for path in dicom_parametric_map.save(bundle(volume, identified=True), tmp_path):
        data = pydicom.dcmread(path)
        assert str(data.PatientName) == "Yamada^Tarou=山田^太郎"
        assert (data.PatientID, data.PatientBirthDate, data.PatientSex) == ("4711", "19700101", "M")
        assert (data.AccessionNumber, data.StudyID, data.StudyDescription) == ("A1", "S1", "Thorax")
        assert (data.StudyDate, data.StudyTime) == ("20240229", "101112")
        assert data.ReferringPhysicianName == "House^Gregory"
        assert "PatientIdentityRemoved" not in data
        assert "InstitutionName" not in data
        assert problems(path) == []


def test_not_identified_keeps_only_the_studys_date(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "source", _identify))
    data = pydicom.dcmread(dicom_parametric_map.save(bundle(volume), tmp_path)[0])
    assert (data.StudyDate, data.StudyTime) == ("20240229", "101112")
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID"):
        assert not data.get(keyword)
    assert "StudyDescription" not in data
