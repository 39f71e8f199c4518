"""Does a path become the scan or model it holds, or a sentence that says what it is instead?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from med_gradcam import loading
from med_gradcam.errors import ImageError, InputError, ModelError
from med_gradcam.geometry import Geometry
from med_gradcam.loading import load_model, read, read_series
from med_gradcam.model import InputSpec, Model
from med_gradcam.volume import Volume
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
        ("net.onnx", "expected an ONNX network in 'net.onnx'"),
        ("net.pt", r"Pickles can run code and are not read as data: .* as safetensors"),
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


# ------------------------------------------------------------------- channels from several files


def test_a_channel_elsewhere_is_named_with_millimetres(tmp_path: Path) -> None:
    here = np.diag([1.5, 1.25, 2.0, 1.0])
    there, fine = here.copy(), here.copy()
    there[:3, 3] = (3, 0, 4)
    fine[0, 0] = 0.75
    one = save_nifti(tmp_path / "t1.nii", affine=here)
    moved = save_nifti(tmp_path / "flair.nii", affine=there)
    with pytest.raises(ImageError) as caught:
        read([one, moved])
    assert str(caught.value) == (
        "expected channels on one grid, but image 2 ('flair.nii') does not lie on that of "
        "'t1.nii': its corners up to 5.0 mm off; resample it to the first with --resample-to-first "
        "(resample_to_first=True)."
    )
    twice = save_nifti(tmp_path / "t2.nii", np.repeat(chest(), 2, axis=0), fine)
    says = r"'t2.nii'.*24 x 12 x 12 voxels instead of 12 x 12 x 12, voxels of 0.75 x 1.25 x 2 mm"
    with pytest.raises(ImageError, match=says):
        read([one, one, twice])
    flipped = save_nifti(
        tmp_path / "f.nii", affine=affine_of("LAS", (1.5, 1.25, 2.0), (16.5, 0, 0))
    )
    with pytest.raises(ImageError, match=r"up to 16\.5 mm off"):
        read([one, flipped])
    near = here.copy()
    near[0, 3] = 0.05
    assert read([one, save_nifti(tmp_path / "n.nii", affine=near)]).array.shape[0] == 2


def ramp(affine: npt.NDArray[np.float64], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """R + 2 A - 3 S of every voxel, mm: a linear interpolation gives it back exactly."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    points = Geometry(shape, affine).world_ras(index)
    return np.asarray(points @ (1.0, 2.0, -3.0), dtype=np.float32)


def test_channels_are_brought_to_the_first_one_s_grid(tmp_path: Path) -> None:
    here = affine_of("LPS", (1.5, 1.25, 2.0), (20, 10, -5))
    wide = affine_of("RAS", (0.9, 1.1, 1.3), (-8, -12, -12), (4, -7, 9))
    one = save_nifti(tmp_path / "a.nii", ramp(here, (10, 11, 12)), here)
    other = save_nifti(tmp_path / "b.nii", ramp(wide, (48, 40, 44)), wide)
    made = read([one, other], resample_to_first=True)
    assert made.grid == read(one).grid
    assert np.abs(made.array[1] - made.array[0]).max() < 1e-3
    assert made.source.notes[0].startswith(
        "channel 2 resampled to the grid of channel 1 (linear): 48 x 40 x 44 voxels instead of 10"
    )
    assert "b.nii" not in "".join(made.source.notes)
    assert "beside" not in made.source.notes[0]
    off = wide.copy()
    off[2, 3] += 18
    last = save_nifti(tmp_path / "c.nii", ramp(off, (48, 40, 44)) + 500, off)
    partly = read([one, last], resample_to_first=True)
    assert "of the grid lies beside it" in partly.source.notes[0]
    assert float(partly.array[1].min()) == float(read(last).array.min())
    assert np.array_equal(read([one, one], resample_to_first=True).array[1], read(one).array[0])


def of(modality: str | None, value: float = 1.0) -> Volume:
    array = np.full((1, 4, 4, 4), value, dtype=np.float32)
    array[0, 0, 0, 0] = 0
    unit = "HU" if modality == "CT" else "a.u."
    return Volume(array, Geometry((4, 4, 4), np.eye(4)), modality, unit)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Files whose modality is that of their name."""

    def made(*names: str) -> list[Path]:
        for name in names:
            (tmp_path / name).write_bytes(b"")
        return [tmp_path / name for name in names]

    known = {"PT": "PT", "CT": "CT", "MR": "MR"}
    monkeypatch.setattr(loading, "_read_one", lambda path: of(known.get(path.name[:2])))
    return made


def test_modalities_per_channel(shelf: Callable[..., list[Path]]) -> None:
    files = shelf("PT.nii", "CT.nii", "none.nii", "MR.nii")
    pet, ct, none, mr = files
    with pytest.raises(ImageError, match=r"one modality, got PT in 'PT.nii', CT in 'CT.nii'; a"):
        read([pet, ct])
    with pytest.raises(ImageError, match="expected channels of one modality"):
        read([pet, ct], modality="CT")
    made = read([pet, ct], modality="PT+CT")
    assert (made.modality, made.unit, made.array.shape[0]) == ("PT+CT", "a.u.", 2)
    assert read([pet, none], modality="PT+CT").modality == "PT+CT"
    assert read([none, none], modality="PT+CT").modality is None
    assert read([ct, ct]).unit == "HU"
    assert read([mr, mr], modality="MR").modality == "MR"
    with pytest.raises(ImageError, match=r"of PT then CT, in that order, got CT in 'CT.nii', PT"):
        read([ct, pet], modality="PT+CT")
    for wrong in ([ct, ct], [pet, ct, ct], [mr, ct]):
        with pytest.raises(ImageError, match="expected channels of PT then CT"):
            read(wrong, modality="PT+CT")


# ---------------------------------------------------------------------------------- time series


def four_d(path: Path, times: int = 3, tail: tuple[int, ...] = ()) -> Path:
    array = np.stack([chest() + n for n in range(times)], axis=-1)
    return save_nifti(path, array.reshape(*array.shape, *tail))


def test_a_file_of_several_volumes(tmp_path: Path) -> None:
    path = four_d(tmp_path / "dce.nii.gz")
    says = (
        r"got several volumes of shape \(12, 12, 12, 3\) in 'dce.nii.gz'; say which one \(--time N"
    )
    with pytest.raises(ImageError, match=says):
        read(path)
    found = read_series(path)
    assert [int(v.array[0, 5, 5, 5] - chest()[5, 5, 5]) for v in found] == [0, 1, 2]
    assert all(v.grid == found[0].grid for v in found)
    assert len({v.source.sha256 for v in found}) == 3
    second = read(path, time=2)
    assert np.array_equal(second.array, found[1].array)
    assert second.source.notes[0] == "time point 2 of 3"
    for wrong in (0, 4, -1):
        with pytest.raises(ImageError, match=f"from 1 to 3 of 'dce.nii.gz', got {wrong}"):
            read(path, time=wrong)
    single = save_nifti(tmp_path / "one.nii")
    assert len(read_series(single)) == len(read_series([single])) == 1
    assert np.array_equal(read(single, time=1).array, read(single).array)


def test_axes_beside_space_and_time(tmp_path: Path) -> None:
    one = save_nifti(tmp_path / "1.nii", chest()[..., None, None])
    assert np.array_equal(read(one).array[0], chest())
    vectors = np.stack([chest(), chest() + 1], axis=-1)[..., None, :]  # x, y, z, 1, 2
    assert len(read_series(save_nifti(tmp_path / "2.nii", vectors))) == 2
    both = np.zeros((4, 4, 4, 2, 3), dtype=np.int16)
    with pytest.raises(ImageError, match=r"got several axes beside space of shape \(4, 4, 4, 2, 3"):
        read_series(save_nifti(tmp_path / "3.nii", both))
    flat = np.zeros((4, 4, 1, 5), dtype=np.int16)
    with pytest.raises(ImageError, match="got a two-dimensional image of shape"):
        read(save_nifti(tmp_path / "4.nii", flat))


def test_a_bad_volume_of_several_is_numbered(tmp_path: Path) -> None:
    array = np.stack([chest()] * 3, axis=-1).astype(np.float32)
    array[2, 3, 4, 1] = np.nan
    with pytest.raises(ImageError, match=r"volume 2 of 3: bad.nii: expected finite voxels, got 1"):
        read_series(save_nifti(tmp_path / "bad.nii", array))


def test_phases_in_files_of_their_own(tmp_path: Path) -> None:
    paths = [save_nifti(tmp_path / f"{n}.nii", chest() + n) for n in range(3)]
    assert len(read_series(paths)) == 3
    moved = save_nifti(tmp_path / "m.nii", affine=np.diag([1.5, 1.25, 2.5, 1.0]))
    says = r"time points on one grid, but image 3 \('m.nii'\).*mm off; resample it to the first\."
    with pytest.raises(ImageError, match=says):
        read_series([paths[0], paths[1], moved])
    with pytest.raises(ImageError, match="at least one image"):
        read_series([])


def test_a_phase_of_another_modality(shelf: Callable[..., list[Path]]) -> None:
    with pytest.raises(ImageError, match="one modality, got CT in 'CT1' and MR in 'MR2'"):
        read_series(shelf("CT1", "CT2", "MR2"))


def test_the_volumes_of_a_file_as_channels(tmp_path: Path) -> None:
    path = four_d(tmp_path / "dce.nii.gz")

    def net(channels: int) -> Model:
        module = torch.nn.Conv3d(channels, 2, 1)
        return Model(module, InputSpec(channels=channels, modality="MR"), name="over time")

    made = loading.read_for([path], net(3))
    assert made.array.shape[0] == 3
    assert made.source.notes == ("the 3 volumes of the file are the network's channels",)
    assert made.source.paths == (str(path),)
    assert np.array_equal(made.array[2], chest() + 2)
    with pytest.raises(ImageError, match=r"one of 4 volumes, for 'over time', got 3 volumes in"):
        loading.read_for([path], net(4))
    with pytest.raises(ImageError, match="say which one"):
        loading.read_for([path], net(1))
    assert loading.read_for([path], net(1), time=3).array[0, 5, 5, 5] == chest()[5, 5, 5] + 2
    assert loading.read_for([path, path, path], net(3), time=1).array.shape[0] == 3
