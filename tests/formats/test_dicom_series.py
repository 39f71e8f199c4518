"""Is a DICOM folder read at the right place with the right values, and is every bad one refused?"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from med_gradcam.formats import _dicom_stack, dicom_series
from med_gradcam.formats._dicom_headers import Slice
from med_gradcam.volume import Volume, digest
from tests.formats import dicom_phantom as phantom
from tests.formats.dicom_maps import assert_nifti_agrees, tool

# ---- what is right


@pytest.mark.parametrize("orientation", [phantom.AXIAL, phantom.OBLIQUE])
def test_voxels_and_place_of_shuffled_files(
    tmp_path: Path, orientation: npt.NDArray[np.float64]
) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "s", orientation=orientation))
    assert volume.array.shape == (1, phantom.COLUMNS, phantom.ROWS, phantom.SLICES)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array[0], phantom.values() - 1024)
    np.testing.assert_allclose(volume.grid.affine, phantom.affine_ras(orientation), atol=1e-7)
    assert (volume.modality, volume.unit, volume.window) == ("CT", "HU", (-500.0, 1500.0))


def test_source_lists_slices_in_the_volumes_order(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "s"))
    source = volume.source
    assert [Path(p).name for p in source.paths] == [phantom.name(k) for k in range(phantom.SLICES)]
    assert [int(u.rsplit(".", 1)[1]) for u in source.sop_uids] == [1, 2, 3, 4, 5, 6]
    assert source.kind == "dicom"
    assert source.sha256 == digest(volume.array, volume.grid)
    head = pydicom.dcmread(source.paths[0])
    assert (source.study_uid, source.series_uid) == (head.StudyInstanceUID, head.SeriesInstanceUID)
    assert volume.grid.frame_uid == head.FrameOfReferenceUID


def test_simpleitk_sees_the_same(tmp_path: Path) -> None:
    volume = dicom_series.read(phantom.write(tmp_path / "s", orientation=phantom.OBLIQUE))
    assert_equals_simpleitk(volume)


def test_rescale_of_each_slice(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.RescaleSlope, data.RescaleIntercept = 1 + 0.5 * number, number

    volume = dicom_series.read(phantom.write(tmp_path / "s", change, modality="MR"))
    k = np.arange(phantom.SLICES)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[0], phantom.values() * (1 + 0.5 * k) + k, rtol=1e-6)
    assert volume.unit == "a.u."
    assert any("differs from slice to slice" in note for note in volume.source.notes)


def test_int16_is_kept_only_when_it_holds_everything(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.BitsStored = 16
        data.PixelData = np.full((phantom.ROWS, phantom.COLUMNS), 60000, "<u2").tobytes()

    volume = dicom_series.read(phantom.write(tmp_path / "s", change))
    assert volume.array.dtype == np.float32
    assert float(volume.array.max()) == 60000 - 1024


def test_monochrome1_is_not_inverted(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.PhotometricInterpretation = "MONOCHROME1"

    volume = dicom_series.read(phantom.write(tmp_path / "s", change))
    np.testing.assert_array_equal(volume.array[0], phantom.values() - 1024)
    assert any("MONOCHROME1" in note for note in volume.source.notes)


def test_overlay_bits_above_bits_stored_are_dropped(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        pixels = np.frombuffer(data.PixelData, "<u2") | 0xF000
        data.PixelData = pixels.astype("<u2").tobytes()

    volume = dicom_series.read(phantom.write(tmp_path / "s", change))
    np.testing.assert_array_equal(volume.array[0], phantom.values() - 1024)


def test_signed_values_of_few_bits_keep_their_sign(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.PixelRepresentation, data.RescaleIntercept = 1, 0
        pixels = (np.frombuffer(data.PixelData, "<u2").astype(np.int16) - 300) & 0x0FFF
        data.PixelData = pixels.astype("<u2").tobytes()

    volume = dicom_series.read(phantom.write(tmp_path / "s", change))
    np.testing.assert_array_equal(volume.array[0], phantom.values() - 300)


def test_padding_is_kept_and_noted(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        data.add_new("PixelPaddingValue", "US", 100 * number)

    volume = dicom_series.read(phantom.write(tmp_path / "s", change))
    np.testing.assert_array_equal(volume.array[0], phantom.values() - 1024)
    assert any(note.startswith("6 voxels hold the padding value") for note in volume.source.notes)


def test_no_frame_of_reference_is_allowed_and_noted(tmp_path: Path) -> None:
    def change(number: int, data: Dataset) -> None:
        del data.FrameOfReferenceUID

    volume = dicom_series.read(phantom.write(tmp_path / "s", change))
    assert volume.grid.frame_uid is None
    assert "the slices have no valid FrameOfReferenceUID" in volume.source.notes


def test_unit_is_hu_only_where_the_file_says_so(tmp_path: Path) -> None:
    def other_type(number: int, data: Dataset) -> None:
        data.RescaleType = "US"

    def no_rescale(number: int, data: Dataset) -> None:
        del data.RescaleSlope, data.RescaleIntercept

    assert dicom_series.read(phantom.write(tmp_path / "a", other_type)).unit == "a.u."
    assert dicom_series.read(phantom.write(tmp_path / "b", no_rescale)).unit == "a.u."


def test_other_files_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    (folder / "notes.txt").write_text("Doe^Jane")
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    volume = dicom_series.read(folder)
    assert "2 files of the folder are no DICOM images and were skipped" in volume.source.notes
    assert "Doe" not in repr(volume.source.notes)


def test_files_without_preamble_or_suffix_are_read(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    for path in sorted(folder.iterdir()):
        data = pydicom.dcmread(path)
        del data.file_meta
        data.save_as(
            folder / path.stem, implicit_vr=True, little_endian=True, enforce_file_format=False
        )
        path.unlink()
    assert dicom_series.sniff(folder)
    np.testing.assert_array_equal(dicom_series.read(folder).array[0], phantom.values() - 1024)


def test_rle_is_read(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    np.testing.assert_array_equal(dicom_series.read(folder).array[0], phantom.values() - 1024)


def test_sniff(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    assert dicom_series.sniff(folder)
    assert dicom_series.sniff(folder / "im0.dcm")
    assert not dicom_series.sniff(tmp_path / "text.txt")
    assert not dicom_series.sniff(tmp_path / "empty")
    assert not dicom_series.sniff(tmp_path / "absent")


def test_nothing_of_a_name_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """pydicom's own warnings quote the values of odd elements; none may come through."""

    def change(number: int, data: Dataset) -> None:
        data.add_new("PatientID", "LO", "Doe-Jane" * 20)
        data.add_new("PatientBirthDate", "DA", "Doe-Jane")
        data.add_new("SeriesDescription", "LO", "Doe-Jane")
        data.add_new("SpecificCharacterSet", "CS", "DOE-JANE")

    before = pydicom.config.settings.writing_validation_mode
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        with pytest.warns(UserWarning, match="."):  # pydicom, while it writes the bad file
            folder = phantom.write(tmp_path / "s", change)
    finally:
        pydicom.config.settings.writing_validation_mode = before
    caplog.clear()
    capfd.readouterr()
    volume = dicom_series.read(folder)
    out = capfd.readouterr()
    heard = out.out + out.err + caplog.text + repr(volume.source.notes)
    assert "doe" not in heard.lower()


def test_settings_of_others_are_left_alone(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    settings = pydicom.config.settings
    before = (settings.reading_validation_mode, list(warnings.filters))
    with ThreadPoolExecutor(4) as pool:
        volumes = list(pool.map(dicom_series.read, [folder] * 12))
    assert (settings.reading_validation_mode, list(warnings.filters)) == before
    assert len({volume.source.sha256 for volume in volumes}) == 1


# ---- real scans, and other people's readers


def assert_equals_simpleitk(volume: Volume) -> None:
    """Equal voxels, and every corner within 1e-3 mm."""
    image = SimpleITK.ReadImage(list(volume.source.paths))
    theirs = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.array[0], theirs)
    for corner in np.ndindex(2, 2, 2):
        index = [c * (n - 1) for c, n in zip(corner, volume.grid.shape, strict=True)]
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(
            volume.grid.world_ras(index), lps * (-1, -1, 1), atol=1e-3, rtol=0
        )


def assert_equals_dcm2niix(volume: Volume, tmp_path: Path) -> None:
    folder = Path(volume.source.paths[0]).parent
    command: list[str | Path] = [tool("dcm2niix"), "-f", "out", "-o", tmp_path, folder]
    subprocess.run(command, check=True, capture_output=True)
    assert_nifti_agrees(tmp_path / "out.nii", volume.array[0], volume.grid)


@pytest.mark.real
@pytest.mark.parametrize(
    ("case", "shape", "unit"),
    [
        ("ct_chest_c3n00247/dicom", (512, 512, 45), "HU"),
        ("mr_oblique_studyforrest", (274, 384, 16), "a.u."),
        ("ct_abdomen_totalseg/dicom_j2k", (512, 512, 20), "HU"),
    ],
)
def test_real_series_agree_with_other_readers(
    real_data: Path, tmp_path: Path, case: str, shape: tuple[int, int, int], unit: str
) -> None:
    volume = dicom_series.read(real_data / case)
    assert volume.grid.shape == shape
    assert volume.unit == unit
    assert volume.grid.axcodes == "LPS"
    assert_equals_simpleitk(volume)
    if "j2k" not in case:  # dcm2niix wants the UIDs that this series lacks
        assert_equals_dcm2niix(volume, tmp_path)


# ---- planted faults: would these tests notice?


def assert_is_the_phantom(volume: Volume) -> None:
    np.testing.assert_array_equal(volume.array[0], phantom.values() - 1024)
    np.testing.assert_allclose(volume.grid.affine, phantom.affine_ras(phantom.AXIAL), atol=1e-7)


def _by_instance_number(slices: Sequence[Slice]) -> tuple[list[Slice], npt.NDArray[np.float64]]:
    _, affine = _dicom_stack.stack(slices)
    return sorted(slices, key=lambda one: int(pydicom.dcmread(one.path).InstanceNumber)), affine


@pytest.mark.parametrize("fault", ["no LPS flip", "sorted by InstanceNumber"])
def test_a_planted_fault_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = phantom.write(tmp_path / "s")
    assert_is_the_phantom(dicom_series.read(folder))
    if fault == "no LPS flip":
        monkeypatch.setattr(_dicom_stack, "LPS_TO_RAS", np.eye(4))
    else:
        monkeypatch.setattr(dicom_series, "stack", _by_instance_number)
    volume = dicom_series.read(folder)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_is_the_phantom(volume)


def test_uids_that_are_no_uids_are_dropped(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    for path in folder.iterdir():
        head = pydicom.dcmread(path)
        content = path.read_bytes()
        for found in (head.FrameOfReferenceUID, head.StudyInstanceUID):
            content = content.replace(found.encode(), b"Doe" + found.encode()[3:])
        path.write_bytes(content)
    volume = dicom_series.read(folder)
    assert (volume.grid.frame_uid, volume.source.study_uid) == (None, None)
