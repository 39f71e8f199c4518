"""Which DICOM folders are refused, and does the sentence name the file and the millimetres?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage, RLELossless

from med_gradcam.errors import ImageError
from med_gradcam.formats import dicom_series
from tests.formats import dicom_phantom as phantom


def _drop(*numbers: int) -> phantom.Change:
    def change(number: int, data: Dataset) -> None:
        if number in numbers:
            data.Rows = 0

    return change


def _move(number_to_move: int, by_mm: float, axis: int = 2) -> phantom.Change:
    def change(number: int, data: Dataset) -> None:
        if number == number_to_move:
            place = list(data.ImagePositionPatient)
            place[axis] = float(place[axis]) + by_mm
            data.ImagePositionPatient = place

    return change


def _tilt(number: int, data: Dataset) -> None:
    place = list(data.ImagePositionPatient)
    data.ImagePositionPatient = [place[0], float(place[1]) + 0.7 * number, place[2]]


def _four_d(number: int, data: Dataset) -> None:
    place = list(data.ImagePositionPatient)
    place[2] = float(phantom.FIRST_LPS[2]) + (number // 2) * phantom.STEP_MM
    data.ImagePositionPatient = place


def _set(keyword: str, value: object, only: int | None = None) -> phantom.Change:
    def change(number: int, data: Dataset) -> None:
        if only is None or number == only:
            setattr(data, keyword, value)

    return change


def _delete(keyword: str, only: int) -> phantom.Change:
    def change(number: int, data: Dataset) -> None:
        if number == only:
            delattr(data, keyword)

    return change


def _colour(number: int, data: Dataset) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, "RGB"
    data.PlanarConfiguration = 0


def _no_image(number: int, data: Dataset) -> None:
    data.SOPClassUID, data.Modality = KeyObjectSelectionDocumentStorage, "KO"
    del data.Rows, data.Columns, data.PixelData


def _short(number: int, data: Dataset) -> None:
    if number == 3:
        data.PixelData = data.PixelData[:40]


N = phantom.name
REFUSALS: dict[str, tuple[phantom.Change, str]] = {
    "one missing": (
        _drop(2),
        rf"slice every 2\.50 mm, but 1 missing: 1 between {N(1)} and {N(3)} \(5\.00 mm apart\)",
    ),
    "three missing": (_drop(1, 2, 3), rf"3 missing: 3 between {N(0)} and {N(4)} \(10\.00 mm"),
    "duplicated": (_move(3, -2.5), rf"1 too many: ({N(2)}, {N(3)}|{N(3)}, {N(2)}) lie at the same"),
    "uneven": (_move(2, 0.9), r"evenly spaced slices, got distances from 1\.60 to 3\.40 mm"),
    "tilted": (_tilt, r"shifts sideways by 3\.50 mm over 12\.50 mm \(15\.6 degrees, gantry tilt\)"),
    "one aside": (_move(5, 0.4, axis=0), r"shifts sideways by 0\.40 mm .* im6\.dcm"),
    "4D": (_four_d, r"got 2 at each of 3 positions: this is a 4D series"),
    "localizer": (
        _set("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], only=0),
        rf"one ImageOrientationPatient in the series, got 2 .*{N(0)}",
    ),
    "size": (_set("Columns", 6, only=4), rf"one size \(columns, rows\) .*{N(4)}: 6 5"),
    "spacing": (_set("PixelSpacing", [0.8, 0.7], only=1), rf"one PixelSpacing .*{N(1)}: 0\.8 0\.7"),
    "frames": (_set("FrameOfReferenceUID", "1.2.3", only=1), rf"one frame of reference .*{N(1)}"),
    "no frame": (_delete("FrameOfReferenceUID", only=1), rf"one frame of ref.*{N(1)}: none"),
    "no position": (_delete("ImagePositionPatient", only=1), rf"ImagePositionPatient .*{N(1)}"),
    "no spacing": (_delete("PixelSpacing", only=1), rf"PixelSpacing .*{N(1)}"),
    "zero spacing": (_set("PixelSpacing", [0, 0]), "positive PixelSpacing"),
    "shear": (_set("ImageOrientationPatient", [1, 0, 0, 0.5, 1, 0]), "at a right angle"),
    "one slice": (_drop(1, 2, 3, 4, 5), rf"at least two slices, got one \({N(0)}\)"),
    "colour": (_colour, "expected grey images"),
    "multi-frame": (_set("NumberOfFrames", 5), "multi-frame file .* not read yet"),
    "key object": (_no_image, r"objects that are no scan \(Key Object Selection"),
    "series": (
        _set("SeriesInstanceUID", "1.2.3.4", only=1),
        r"got 2 series in the folder: 1\) CT, 5 files, [\d.]+; 2\) CT, 1 files, 1\.2\.3\.4\. Put",
    ),
    "truncated": (_short, rf"7 x 5 pixels of 16 bits in {N(3)}, got truncated"),
    "no pixels": (_delete("PixelData", only=2), rf"{N(2)}, got truncated, damaged or no pixel"),
    "slope 0": (_set("RescaleSlope", 0), "slope other than 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSALS[case]
    folder = phantom.write(tmp_path / "s", change)
    with pytest.raises(ImageError, match=message) as caught:
        dicom_series.read(folder)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.exit_code == 3


def test_text_called_dcm_is_refused(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    (folder / "readme.dcm").write_text("Patient: Doe^Jane, seen on Monday")
    with pytest.raises(ImageError, match=r"DICOM file in readme\.dcm, got 33 bytes") as caught:
        dicom_series.read(folder)
    assert "Doe" not in str(caught.value)
    (folder / "readme.dcm").write_bytes(b"")
    with pytest.raises(ImageError, match=r"readme\.dcm, got an empty file"):
        dicom_series.read(folder)


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ImageError, match=r"none among 1 files .* name the folder"):
        dicom_series.read(tmp_path)
    phantom.write(tmp_path / "deeper")
    with pytest.raises(ImageError, match="1 of its subfolders hold some"):
        dicom_series.read(tmp_path)


def test_single_file_is_refused_with_advice(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    with pytest.raises(ImageError, match=r"the single file im2\.dcm; name the folder"):
        dicom_series.read(folder / "im2.dcm")
    with pytest.raises(ImageError, match=r"there is no absent"):
        dicom_series.read(folder / "absent")


def test_syntax_without_decoder_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = phantom.write(tmp_path / "s")
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)

    class Unavailable:
        is_available = False

    monkeypatch.setattr(dicom_series, "get_decoder", lambda syntax: Unavailable())
    with pytest.raises(ImageError, match=r"RLE Lossless .* pip install med_gradcam\[codecs\]"):
        dicom_series.read(folder)


def test_private_syntax_is_refused(tmp_path: Path) -> None:
    folder = phantom.write(tmp_path / "s")
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.113619.5.2.1"))
    with pytest.raises(
        ImageError, match=r"pixels that can be unpacked here, got 1\.2\.840\.113619"
    ):
        dicom_series.read(folder)


def test_damaged_files_only_ever_raise_image_errors(tmp_path: Path) -> None:
    """Cut and flip bytes at random: one sentence or a volume, never another exception."""
    random = np.random.default_rng(7)
    folder = phantom.write(tmp_path / "s")
    victim = folder / phantom.name(2)
    whole = victim.read_bytes()
    seen: list[str] = []
    for _ in range(150):
        content = bytearray(
            whole[: random.integers(1, len(whole))] if random.random() < 0.3 else whole
        )
        for at in random.integers(0, len(content), random.integers(1, 12)):
            content[at] = random.integers(0, 256)
        victim.write_bytes(bytes(content))
        try:
            dicom_series.read(folder)
        except ImageError as error:
            seen.append(str(error))
    assert len(seen) > 50
    assert all(words.startswith("expected ") for words in seen)


@pytest.mark.real
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ct_tilt_philips_phantom", r"by 4\.26 mm over 14\.38 mm \(16\.5 degrees, gantry tilt\)"),
        ("multiframe_small/emri_small.dcm", r"multi-frame file \(emri_small\.dcm\)"),
        ("multiframe_small", r"multi-frame file \(eCT_Supplemental\.dcm, emri_small\.dcm"),
        ("dicom_seg_pm_examples", "got 4 series in the folder"),
    ],
)
def test_real_series_refused(real_data: Path, case: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        dicom_series.read(real_data / case)
