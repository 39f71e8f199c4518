"""Does a path become the scan or model it holds, or a sentence that says what it is instead?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from med_gradcam.errors import ImageError, InputError, ModelError
from med_gradcam.loading import load_model, read
from tests.tiny import affine_of, chest, save_model, save_nifti


def test_one_image(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz")
    assert np.array_equal(read(path).array[0], chest())
    assert np.array_equal(read(str(path)).array, read([path]).array)


def test_several_images_are_channels_in_their_order(tmp_path: Path) -> None:
    paths = [save_nifti(tmp_path / f"{n}.nii", chest() + n) for n in range(3)]
    volume = read(paths)
    assert volume.array.shape == (3, 12, 12, 12)
    for n in range(3):
        assert np.array_equal(volume.array[n], chest() + n)
    assert volume.source.kind == "nifti"
    assert volume.source.sha256 != read(paths[::-1]).source.sha256
    assert volume.source.paths == tuple(str(p) for p in paths)


def test_channels_on_different_grids(tmp_path: Path) -> None:
    one = save_nifti(tmp_path / "a.nii")
    small = save_nifti(tmp_path / "b.nii", chest(8))
    moved = save_nifti(tmp_path / "c.nii", affine=affine_of("RAS", origin=(9, 9, 9)))
    for other in (small, moved):
        with pytest.raises(
            ImageError, match="expected channels on one grid, but image 2 has shape"
        ):
            read([one, other])


def test_no_image() -> None:
    with pytest.raises(ImageError, match="expected at least one image, got none"):
        read([])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.nii.gz", None, "expected an image, but there is no"),
        ("letter.txt", b"Dear all", "a file of a kind that is not known: 'letter.txt'"),
        ("letter.dcm", b"Dear all", "letter.dcm"),
        ("noname", b"", "noname"),
    ],
)
def test_what_is_no_image(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(tmp_path / name)


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("text")
    for name in ("empty", "notes"):
        with pytest.raises(ImageError, match=f"{name}"):
            read(tmp_path / name)


def test_a_name_longer_than_any_file() -> None:
    with pytest.raises(ImageError, match="there is no"):
        read("x" * 5000)
    with pytest.raises(ModelError, match="nothing there"):
        load_model("x" * 5000)


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    assert load_model(str(save_model(tmp_path / "net"))).name == "tiny"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "got nothing there: 'missing'"),
        ("empty", "got a folder without spec.json: 'empty'"),
        ("net.onnx", "got a .onnx file: 'net.onnx'"),
        ("net.pt", "Pickles can run code and are not read: save the weights as safetensors"),
        ("net.ckpt", "Pickles can run code"),
        ("plain", "got a plain file: 'plain'"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, says: str) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "missing":
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=says) as caught:
        load_model(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)
