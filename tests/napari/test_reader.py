"""Does napari open our folders and scans through the reader, and leave other files alone?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import med_gradcam.samples
from med_gradcam import maps
from med_gradcam.bundle import Bundle
from med_gradcam.errors import ImageError
from med_gradcam.explanation import Explanation
from med_gradcam.formats import nifti
from med_gradcam.volume import Volume
from napari_plugin import reader, samples, tasks
from napari_plugin.layers import KEY


@pytest.fixture
def explanation_file(
    tmp_path: Path,
    make_scan: Callable[..., Volume],
    make_explanation: Callable[..., Explanation],
) -> Path:
    """An explanation as it was written to a folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    volume = make_scan("LPS")
    explanation = make_explanation(volume)
    nifti.save(Bundle(explanation, maps.draw(explanation), volume), folder)
    return folder / tasks.EXPLANATION_FILE


@pytest.mark.parametrize("whole_folder", [True, False])
def test_explanation_becomes_two_maps_and_no_scan(
    explanation_file: Path, *, whole_folder: bool
) -> None:
    path = str(explanation_file.parent if whole_folder else explanation_file)
    read = reader.get_reader(path)
    assert read is not None
    kinds = [layer[1]["metadata"][KEY]["kind"] for layer in read(path)]
    assert kinds == ["against", "for"]


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ"])
def test_nifti_scan_is_ours(name: str, tmp_path: Path, engine: Any) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    read = reader.get_reader(str(file))
    assert read is not None
    assert [layer[1]["name"] for layer in read(str(file))] == ["scan (CT)"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("IM0001", bytes(128) + b"DICM"), ("1.dcm", b""), ("sub/1.IMA", b"")],
)
def test_dicom_folder_is_ours(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    assert reader.get_reader(str(tmp_path)) is reader.read


@pytest.mark.parametrize("name", ["photo.tif", "notes.txt"])
def test_other_files_and_folders_are_left_alone(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("hello")
    assert reader.get_reader(str(file)) is None
    assert reader.get_reader(str(tmp_path)) is None
    assert reader.get_reader([str(file)]) is None
    assert reader.get_reader(str(tmp_path / "absent.nii")) is None


@pytest.mark.gui
def test_napari_opens_an_explanation_folder_by_our_reader(
    make_napari_viewer_proxy: Any, plugin: str, explanation_file: Path, finding_ras: Any
) -> None:
    viewer = make_napari_viewer_proxy()
    layers = viewer.open(str(explanation_file.parent), plugin=plugin)
    assert [layer.name for layer in layers] == [
        "lowers the model's score: nodule",
        "raises the model's score: nodule",
    ]
    where = np.unravel_index(int(np.argmax(layers[1].data)), layers[1].data.shape)
    assert np.abs(np.array(layers[1].data_to_world(where)) + finding_ras[::-1]).max() <= 1.5
    raises = layers[1].colormap
    assert raises.map(0.0)[0, 3] == 0  # clear at and below the floor
    assert raises.map(1.0)[0, 3] == pytest.approx(0.85)


@pytest.fixture
def sample_folder(
    tmp_path: Path, make_scan: Callable[..., Volume], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Samples as sample_volumes has them: scans, networks, and demo.json that pairs them."""
    cases = []
    for modality, axes in (("CT", "LAS"), ("MR", "RAS")):
        volume = make_scan(axes)
        image = nibabel.Nifti1Image(np.asarray(volume.array[0]), volume.grid.affine)
        nibabel.save(image, tmp_path / f"case_{modality}.nii.gz")
        net = tmp_path / "nets" / f"net_{modality}"
        net.mkdir(parents=True)
        (net / "spec.json").write_text(json.dumps({"input": {"modality": modality}}))
        cases.append({"net": f"nets/net_{modality}", "image": f"case_{modality}.nii.gz"})
    (tmp_path / "demo.json").write_text(json.dumps({"cases": cases}))
    monkeypatch.setattr(med_gradcam.samples, "folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.gui
def test_sample_scans_open_and_are_taken_by_the_dock(
    make_napari_viewer_proxy: Any, plugin: str, sample_folder: Path
) -> None:
    viewer = make_napari_viewer_proxy()
    _, dock = viewer.window.add_plugin_dock_widget(plugin, "Evidence maps (3D Grad-CAM)")
    assert dock.form.model.itemText(1) == "sample: net_CT"
    for key in ("ct", "mr"):
        viewer.open_sample(plugin, key)
        assert viewer.layers[-1].name == f"scan ({key.upper()})"
        assert dock.state.scan.startswith(key.upper())


def test_sample_scan_is_the_one_demo_json_names(sample_folder: Path) -> None:
    assert samples.sample_scan("MR") == sample_folder / "case_MR.nii.gz"
    with pytest.raises(ImageError, match="expected a sample US"):
        samples.sample_scan("US")
    (sample_folder / "demo.json").write_text("{")
    with pytest.raises(ImageError, match=r"expected demo\.json"):
        samples.sample_scan("MR")


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_shipped_samples_are_found(modality: str) -> None:
    assert samples.sample_models()
    assert samples.sample_scan(modality).exists()


def test_without_samples_no_network_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ImageError("none")

    monkeypatch.setattr(med_gradcam.samples, "folder", missing)
    assert samples.sample_models() == {}
