"""Does the network see what nnU-Net's own preprocessing would show it, and score the same?

The oracle is written from nnunetv2's published recipe with scipy, as slowly as it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name
import torch
from scipy import ndimage

import med_gradcam as mg
from med_gradcam.errors import ImageError
from med_gradcam.geometry import Geometry
from med_gradcam.loading import load_model, read
from med_gradcam.model import Model
from med_gradcam.models._nnunet_recipe import Channel, NnunetRecipe, coarse_axis, filled, resized
from med_gradcam.prepare import prepare
from med_gradcam.volume import Volume
from tests.models import nnunet_folder as files
from tests.tiny import affine_of

Array = npt.NDArray[Any]
NOISE = np.random.default_rng(5)


# ------------------------------------------------------------------------------- the oracle


def resize(image: Array, shape: Sequence[int], order: int) -> Array:
    """What skimage.transform.resize(mode="edge", anti_aliasing=False) does."""
    factors = [new / old for new, old in zip(shape, image.shape, strict=True)]
    out = ndimage.zoom(image, factors, order=order, mode="nearest", grid_mode=True)
    return np.asarray(np.clip(out, image.min(), image.max()))


def resampled(image: Array, shape: Sequence[int], axis: int | None) -> Array:
    if tuple(shape) == image.shape:
        return image
    if axis is None:
        return resize(image, shape, 3)
    flat = [n for i, n in enumerate(shape) if i != axis]
    slices = [resize(one, flat, 3) for one in np.moveaxis(image, axis, 0)]
    made = np.stack(slices, axis)
    if made.shape[axis] == shape[axis]:
        return made
    places = np.mgrid[tuple(slice(n) for n in shape)].astype(float)
    scale = made.shape[axis] / shape[axis]
    places[axis] = scale * (places[axis] + 0.5) - 0.5
    return np.asarray(ndimage.map_coordinates(made, places, order=0, mode="nearest"))


def oracle(paths: Sequence[Path], plan: dict[str, Any], patch: Sequence[int]) -> Array:
    """The patch that nnU-Net's network would see of a scan smaller than it."""
    chosen = plan["configurations"]["3d_fullres"]
    images = [sitk.ReadImage(str(path)) for path in paths]
    data = np.stack([sitk.GetArrayFromImage(image) for image in images]).astype(np.float32)
    turn = plan["transpose_forward"]
    data = data.transpose(0, *(n + 1 for n in turn))
    spacing = [images[0].GetSpacing()[::-1][n] for n in turn]
    mask = ndimage.binary_fill_holes((data != 0).any(axis=0))
    (box,) = ndimage.find_objects(mask.astype(int))
    data, mask = data[(slice(None), *box)], mask[box]
    for c, scheme in enumerate(chosen["normalization_schemes"]):
        one = data[c]
        if scheme == "CTNormalization":
            own = plan["foreground_intensity_properties_per_channel"][str(c)]
            one = np.clip(one, own["percentile_00_5"], own["percentile_99_5"])
            data[c] = (one - own["mean"]) / max(own["std"], 1e-8)
        elif scheme == "ZScoreNormalization" and chosen["use_mask_for_norm"][c]:
            data[c][mask] = (one[mask] - one[mask].mean()) / max(one[mask].std(), 1e-8)
        elif scheme == "ZScoreNormalization":
            data[c] = (one - one.mean()) / max(one.std(), 1e-8)
        elif scheme == "RescaleTo01Normalization":
            data[c] = (one - one.min()) / np.clip((one - one.min()).max(), 1e-8, None)
        elif scheme == "RGBTo01Normalization":
            data[c] = one / 255.0
    wish = chosen["spacing"]
    shape = [round(s / w * n) for s, w, n in zip(spacing, wish, data.shape[1:], strict=True)]
    axis = None
    for sizes in (spacing, wish):
        if axis is None and max(sizes) / min(sizes) > 3:
            longest = [n for n, s in enumerate(sizes) if s == max(sizes)]
            axis = longest[0] if len(longest) == 1 else None
    made = np.stack([resampled(one.astype(float), shape, axis) for one in data])
    less = [p - n for p, n in zip(patch, shape, strict=True)]
    assert min(less) >= 0
    around = [(0, 0), *((d // 2, d // 2 + d % 2) for d in less)]
    return np.pad(made.astype(np.float32), around)


# -------------------------------------------------------------------------------- the scans


def scan(folder: Path, channels: int, spacing: Sequence[float], *, bare: bool) -> list[Path]:
    """Oblique channels in a file order of their own; `bare`: 0 around and in holes inside."""
    generator, shape, paths = np.random.default_rng(11), (19, 16, 12), []
    i, j, k = np.ogrid[tuple(slice(n) for n in shape)]
    head = ((i - 9) / 8) ** 2 + ((j - 8) / 6) ** 2 + ((k - 6) / 5) ** 2 < 1
    for c in range(channels):
        array = 100 + 60 * generator.normal(size=shape) + 200 * ((i - 7) ** 2 + (j - 9) ** 2 < 9)
        if bare:
            array = np.where(head, array.clip(1), 0)
            array[8:10, 7:9, 6] = 0
            array[9, 8 + c, 5] = 0
        image = nib.Nifti1Image(
            array.astype(np.float32), affine_of("LIP", spacing, (5, -9, 40), (7, 3, -11))
        )
        paths.append(folder / f"scan_{c:04d}.nii.gz")
        nib.save(image, paths[-1])
    return paths


def made(folder: Path, plan: dict[str, Any], names: Sequence[str]) -> tuple[Model, torch.nn.Module]:
    dataset = {**files.DATASET, "channel_names": {str(n): c for n, c in enumerate(names)}}
    net = files.real_network(files.architecture("PlainConvUNet"), len(names), 3, 7)
    model = load_model(files.write(folder, [net], plan, dataset))
    net.decoder.deep_supervision = False  # type: ignore[union-attr]
    return model, net


CASES: dict[str, tuple[list[str], list[str], list[bool], list[float], list[float], list[int]]] = {
    "CT, isotropic to isotropic": (
        ["CT"], ["CTNormalization"], [False], [1.5, 1.5, 1.5], [1.2, 1.2, 1.2], [0, 1, 2],
    ),
    "CT, thick slices stay": (
        ["CT"], ["CTNormalization"], [False], [0.9, 1.1, 5.0], [5.0, 1.0, 1.0], [0, 1, 2],
    ),
    "CT, thick slices to thinner ones, transposed": (
        ["CT"], ["CTNormalization"], [False], [4.6, 1.1, 1.0], [3.2, 1.0, 1.3], [2, 0, 1],
    ),
    "MR, thick voxels only in the plan": (
        ["T1"], ["ZScoreNormalization"], [False], [1.0, 1.0, 2.5], [3.6, 1.0, 1.0], [0, 1, 2],
    ),
    "MR, two skull-stripped channels": (
        ["T1", "T2"], ["ZScoreNormalization"] * 2, [True, True], [1.0, 1.2, 1.1], [0.9, 0.9, 0.9],
        [0, 1, 2],
    ),
    "mixed schemes": (
        ["CT", "T1", "noNorm", "rescale_to_0_1"],
        ["CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization"],
        [False, True, False, False], [1.0, 1.2, 1.1], [1.2, 0.9, 1.0], [1, 0, 2],
    ),
    "nothing to resample": (
        ["CT"], ["CTNormalization"], [False], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0, 1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_input_and_the_score_are_nnunets(tmp_path: Path, case: str) -> None:
    names, schemes, masked, old, new, turn = CASES[case]
    patch = [20, 28, 28]
    bare = True in masked
    paths = scan(tmp_path, len(names), old, bare=bare)
    plan = files.plans(
        normalization_schemes=schemes, use_mask_for_norm=masked, spacing=new, patch_size=patch
    )
    plan["transpose_forward"] = turn
    reverse = np.array([12, 16, 19])[turn] * np.array(old[::-1])[turn] / new
    plan["configurations"]["3d_fullres"]["patch_size"] = patch = [
        4 * int(np.ceil(n / 4) + 1) for n in reverse
    ]
    model, net = made(tmp_path / "model", plan, names)
    channels = [read(path) for path in paths]
    volume = Volume(np.concatenate([v.array for v in channels]), channels[0].grid, None)
    ready = prepare(volume, model)
    want = oracle(paths, plan, patch)
    found = ready.network_input()
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=0, atol=5e-6)
    with torch.inference_mode():
        ours, theirs = (net(torch.from_numpy(one)[None]) for one in (found, want))
    spread = float(theirs.max() - theirs.min())
    assert float((ours - theirs).abs().max()) < 1e-4 * max(spread, 1.0)
    with torch.inference_mode():
        assert torch.equal(model.net(torch.from_numpy(found)[None]), ours)


def test_what_is_written_home_lies_where_the_scan_is(tmp_path: Path) -> None:
    # A point's index in the prepared grid must hold what the scan has there.
    (path,) = scan(tmp_path, 1, [2.0, 1.5, 1.7], bare=False)
    plan = files.plans(
        spacing=[1.0, 1.0, 1.0],
        normalization_schemes=["NoNormalization"],
        patch_size=[44, 40, 48],
    )
    model, _ = made(tmp_path / "model", plan, ["CT"])
    volume = read(path)
    i, j, k = np.meshgrid(*(np.arange(n) for n in volume.grid.shape), indexing="ij")
    x = volume.grid.world_ras(np.stack([i, j, k], -1))
    for axis in range(3):  # the world's own coordinates as a scan: linear, so no spline bends it
        own = Volume(x[..., axis].astype(np.float32)[None] + 500, volume.grid, None)
        ready = prepare(own, model)
        inside = np.argwhere(~ready.beside) if ready.beside is not None else np.empty((0, 3))
        middle = inside[(np.abs(inside - inside.mean(0)) < 5).all(1)]
        assert len(middle) > 100
        world = ready.grid.world_ras(middle)[:, axis] + 500
        # Edges that are repeated bend the spline by some 0.005 mm even here; a voxel is 1 mm.
        np.testing.assert_allclose(ready.raw[0][tuple(middle.T)], world, rtol=0, atol=0.02)


def test_scan_and_reference_are_both_padded_with_zero(tmp_path: Path) -> None:
    model, _ = made(tmp_path, files.plans(patch_size=[16, 32, 32]), ["CT"])
    volume = read(files.scan(tmp_path / "scan.nii.gz"))
    ready = prepare(volume, model)
    other = ready.network_input(np.full_like(ready.raw, 40.0))
    assert ready.beside is not None
    beside = ready.beside
    assert 0.2 < beside.mean() < 0.9
    assert not ready.network_input()[0][beside].any()
    assert not other[0][beside].any()
    np.testing.assert_allclose(other[0][~beside], 10 / 120, rtol=1e-5)
    assert any("padded with 0" in note for note in ready.notes)


def test_a_scan_larger_than_the_patch_needs_a_point(tmp_path: Path) -> None:
    model, _ = made(tmp_path, files.plans(patch_size=[8, 16, 16]), ["CT"])
    volume = read(files.scan(tmp_path / "scan.nii.gz"))
    with pytest.raises(mg.MedGradcamError, match="expected a point --at"):
        prepare(volume, model)
    assert prepare(volume, model, "ijk:9,12,4").raw.shape == (1, 8, 16, 16)


def test_cropping_to_what_is_not_zero() -> None:
    array = np.zeros((2, 9, 8, 7), np.float32)
    array[0, 2:5, 3, 1:6] = 4.0
    array[1, 3, 1:4, 2] = 5.0
    recipe = NnunetRecipe((Channel("NoNormalization"),) * 2, (1.0, 1.0, 1.0))
    ready = recipe(array, (1.0, 1.0, 1.0))
    assert (ready.start, ready.jump) == ((2.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(ready.exact, array[:, 2:5, 1:4, 1:6])
    assert ready.notes == (
        "9 x 8 x 7 voxels cropped to the 3 x 3 x 5 that are not 0, as nnU-Net does",
    )
    nothing = recipe(np.zeros_like(array), (1.0, 1.0, 1.0))
    assert nothing.raw.shape == array.shape


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("shape", [(20, 9, 11), (6, 33, 5), (13, 17, 1)])
def test_resizing_is_scipys(order: int, shape: tuple[int, int, int]) -> None:
    image = NOISE.normal(size=(13, 17, 11)).astype(np.float32)
    want = resize(image.astype(float), shape, order)
    np.testing.assert_allclose(resized(image, shape, None, order, 0), want, atol=1e-6)


def test_resizing_is_skimages() -> None:
    transform = pytest.importorskip("skimage.transform")
    image = NOISE.normal(size=(7, 9, 5)).astype(np.float32)
    want = transform.resize(image.astype(float), (12, 6, 11), 3, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(resized(image, (12, 6, 11), None, 3, 0), want, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "apart", "axis"),
    [
        ((1, 1, 1), (3.5, 1, 1), None, 0),
        ((1, 4, 1), (3.5, 1, 1), None, 1),
        ((1, 3, 1), (1, 3, 1), None, None),  # 3 is not more than 3
        ((4, 4, 1), (1, 1, 1), None, None),  # two long axes
        ((1, 1, 4), (1, 1, 1), False, None),
        ((1, 1, 2), (1, 1, 1), True, 2),
    ],
)
def test_which_axis_is_resampled_apart(
    old: Sequence[float], new: Sequence[float], apart: bool | None, axis: int | None
) -> None:
    assert coarse_axis(old, new, apart) == axis


def test_holes_are_filled_as_scipy_does() -> None:
    for _ in range(10):
        mask = NOISE.random((8, 9, 7)) < 0.6
        np.testing.assert_array_equal(filled(mask), ndimage.binary_fill_holes(mask))


def test_colours_that_are_none() -> None:
    recipe = NnunetRecipe((Channel("RGBTo01Normalization"),), (1.0, 1.0, 1.0))
    with pytest.raises(ImageError, match=r"colours of 0 to 255 for this model, got .* 400"):
        recipe(np.full((1, 3, 3, 3), 400.0), (1.0, 1.0, 1.0))


def test_no_resampling_takes_the_voxels_as_they_are(tmp_path: Path) -> None:
    plan = files.plans(resampling_fn_data="no_resampling_data_or_seg_to_shape")
    model, _ = made(tmp_path, plan, ["CT"])
    array = NOISE.normal(size=(1, 10, 11, 9)).astype(np.float32)
    volume = Volume(array, Geometry((10, 11, 9), affine_of("RAS", (2.0, 2.0, 2.0))), "CT")
    ready = prepare(volume, model)
    assert int((~ready.beside).sum()) == array.size if ready.beside is not None else False
