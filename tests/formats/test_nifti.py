"""Does a NIfTI file keep voxels, places and evidence, and does a bad one say what is off?"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from med_gradcam.bundle import Bundle
from med_gradcam.errors import ImageError, InputError
from med_gradcam.explanation import Explanation
from med_gradcam.formats import nifti
from med_gradcam.geometry import Geometry, cells
from med_gradcam.maps import draw
from med_gradcam.record import to_record
from med_gradcam.target import Target
from tests.tiny import ORDERS, affine_of, explained, grids, opened, save_nifti

Array = npt.NDArray[Any]
VOXELS = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
OBLIQUE = affine_of("LPS", (0.7, 0.8, 2.5), (12.5, -20.25, 33), (5, 10, -15))


# --------------------------------------------------------------------------------------- reading


def test_a_scan_keeps_its_voxels_order_and_type(tmp_path: Path) -> None:
    volume = nifti.read(save_nifti(tmp_path / "a.nii.gz", VOXELS, OBLIQUE))
    assert np.array_equal(volume.array[0], VOXELS)
    assert volume.array.dtype == np.int16
    assert volume.grid.affine == pytest.approx(OBLIQUE, abs=1e-5)
    assert (volume.modality, volume.unit, volume.source.kind) == (None, "a.u.", "nifti")
    assert volume.source.notes == ()


@pytest.mark.parametrize("axes", ORDERS)
def test_any_order_and_sign_of_axes(tmp_path: Path, axes: str) -> None:
    affine = affine_of(axes, (1, 2, 3), (4, 5, 6), (3, -4, 5))
    for codes in ((1, 0), (0, 1), (2, 1)):
        volume = nifti.read(save_nifti(tmp_path / "a.nii", VOXELS, affine, codes=codes))
        assert volume.grid.axcodes == axes
        assert volume.grid.affine == pytest.approx(affine, abs=1e-4)
        assert np.array_equal(volume.array[0], VOXELS)


def test_neither_form(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", VOXELS, codes=(0, 0))
    with pytest.raises(
        ImageError, match=r"orientation in 'a.nii.gz', but both its qform and sform"
    ):
        nifti.read(path)


def test_forms_that_disagree(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(affine_of("LPS", origin=(10, 0, 0)), 1)
    image.set_qform(affine_of("LPS"), 1)
    nib.save(image, tmp_path / "a.nii")
    volume = nifti.read(tmp_path / "a.nii")
    assert volume.grid.affine[0, 3] == 10
    assert volume.source.notes == ("sform and qform differ by up to 10.0 mm; the sform was used",)


def test_a_qform_that_is_no_rotation_does_not_matter_beside_an_sform(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(affine_of("LPS"), 1)
    image.header["qform_code"] = 1
    image.header["quatern_b"] = image.header["quatern_c"] = 0.9
    path = tmp_path / "a.nii"
    path.write_bytes(raw_header(image) + VOXELS.tobytes(order="F"))
    volume = nifti.read(path)
    assert volume.grid.affine == pytest.approx(affine_of("LPS"))
    assert "the qform is damaged; the sform was used" in volume.source.notes
    image.header["sform_code"] = 0
    path.write_bytes(raw_header(image) + VOXELS.tobytes(order="F"))
    with pytest.raises(ImageError, match=r"'a.nii' cannot be read"):
        nifti.read(path)


def raw_header(image: Any) -> bytes:
    """Header and empty extension flag, as they stand, without nibabel's checks."""
    image.header["vox_offset"] = 352
    image.header["magic"] = b"n+1"
    return bytes(image.header.binaryblock) + b"\0\0\0\0"


@pytest.mark.parametrize(("unit", "factor"), [("micron", 0.001), ("meter", 1000.0), ("mm", 1.0)])
def test_micrometres_and_metres(tmp_path: Path, unit: str, factor: float) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(affine_of("RAS", (2, 3, 4), (5, 6, 7)), 1)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    volume = nifti.read(tmp_path / "a.nii")
    assert volume.grid.spacing_mm == pytest.approx((2 * factor, 3 * factor, 4 * factor))
    assert volume.grid.affine[:3, 3] == pytest.approx((5 * factor, 6 * factor, 7 * factor))
    assert (volume.source.notes == ()) == (unit == "mm")


@pytest.mark.parametrize("code", [0, 7, 8])
def test_units_that_are_unknown_are_millimetres(tmp_path: Path, code: int) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(affine_of("RAS", (2, 3, 4)), 1)
    image.header["xyzt_units"] = code
    nib.save(image, tmp_path / "a.nii")
    assert nifti.read(tmp_path / "a.nii").grid.spacing_mm == pytest.approx((2, 3, 4))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_types_of_voxels(tmp_path: Path, dtype: Any) -> None:
    volume = nifti.read(save_nifti(tmp_path / "a.nii.gz", VOXELS.astype(dtype)))
    assert np.array_equal(volume.array[0], VOXELS)
    assert volume.array.dtype == (np.float32 if dtype == np.float64 else dtype)


def test_a_slope_and_an_intercept(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(np.eye(4), 1)
    image.header.set_slope_inter(2.5, -1024)
    path = tmp_path / "a.nii"
    path.write_bytes(raw_header(image) + VOXELS.tobytes(order="F"))
    assert nifti.read(path).array[0] == pytest.approx(VOXELS * 2.5 - 1024)


def test_the_other_byte_order(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS.astype(">f4"), None, nib.Nifti1Header(endianness=">"))
    image.header.set_data_dtype(np.float32)
    image.set_sform(OBLIQUE, 1)
    nib.save(image, tmp_path / "a.nii")
    volume = nifti.read(tmp_path / "a.nii")
    assert np.array_equal(volume.array[0], VOXELS)
    assert volume.array.dtype.isnative
    image = nib.Nifti1Image(VOXELS.astype(">i2"), None, nib.Nifti1Header(endianness=">"))
    image.set_sform(OBLIQUE, 1)
    nib.save(image, tmp_path / "b.nii")
    assert np.array_equal(nifti.read(tmp_path / "b.nii").array[0], VOXELS)


def test_nifti_2(tmp_path: Path) -> None:
    image = nib.Nifti2Image(VOXELS, OBLIQUE)
    image.set_sform(OBLIQUE, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = nifti.read(tmp_path / "a.nii.gz")
    assert np.array_equal(volume.array[0], VOXELS)
    assert volume.grid.affine == pytest.approx(OBLIQUE, abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_one_volume_with_more_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    volume = nifti.read(save_nifti(tmp_path / "a.nii", VOXELS.reshape(shape)))
    assert np.array_equal(volume.array, VOXELS[None])


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((4, 5, 3, 2), r"got several volumes of shape \(4, 5, 3, 2\) in 'a.nii'"),
        ((4, 30), "got a two-dimensional image"),
        ((4, 30, 1), "got a two-dimensional image"),
        ((1, 4, 30), "got a two-dimensional image"),
    ],
)
def test_not_one_volume(tmp_path: Path, shape: tuple[int, ...], says: str) -> None:
    path = save_nifti(tmp_path / "a.nii", VOXELS.reshape(shape))
    with pytest.raises(ImageError, match=says):
        nifti.read(path)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("array", [np.zeros((4, 5, 6), RGB), np.zeros((4, 5, 6), np.complex64)])
def test_colours_and_complex_numbers(tmp_path: Path, array: Array) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", array)
    with pytest.raises(ImageError, match=r"real numbers as voxels in 'a.nii.gz', got .*not read"):
        nifti.read(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_voxels_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    array = VOXELS.astype(np.float64)
    array[1, 2, 3] = bad
    path = save_nifti(tmp_path / "a.nii.gz", array)
    with pytest.raises(
        ImageError, match=r"a.nii.gz: .* got 1 NaN or infinite ones.*\(0, 1, 2, 3\)"
    ):
        nifti.read(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_file_cut_short(tmp_path: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)
    path = save_nifti(tmp_path / name, noise)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(ImageError, match=rf"'{name}', but the file is cut short or damaged"):
        nifti.read(path)


def test_a_gzip_with_a_flipped_byte(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)
    path = save_nifti(tmp_path / "a.nii.gz", noise)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 0xFF  # the checksum
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="cut short or damaged"):
        nifti.read(path)


def header(**fields: Any) -> bytes:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(np.eye(4), 1)
    for key, value in fields.items():
        image.header[key] = value
    return raw_header(image) + VOXELS.tobytes(order="F")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.nii", b""),
        ("a.nii.gz", b""),
        ("a.nii", b"this is no scan but a letter\n" * 20),
        ("a.nii.gz", b"this is no gzip but a letter\n" * 20),
        ("a.nii.gz", gzip.compress(b"garbage " * 100, mtime=0)),
        ("a.nii.gz", b"\x1f\x8b\x08\x00" + bytes(range(200))),
        ("a.nii", bytes(range(256)) * 4),
        ("a.nii", header(datatype=9999)),
        ("a.nii", header(dim=[9, 4, 5, 6, 1, 1, 1, 1])),
        ("a.nii", header(dim=[3, -4, 5, 6, 1, 1, 1, 1])),
        ("a.nii", header(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])),
        ("a.nii", header(srow_x=[0, 0, 0, 0])),
        ("a.nii", header(srow_x=[np.nan, 0, 0, 0])),
    ],
    ids=range(13),
)
def test_what_is_no_nifti(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        nifti.read(path)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sniffing_goes_by_name(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "A.NII.GZ")
    assert nifti.sniff(path)
    assert not nifti.sniff(tmp_path)
    assert not nifti.sniff(tmp_path / "missing.nii")
    (tmp_path / "folder.nii").mkdir()
    assert not nifti.sniff(tmp_path / "folder.nii")


# --------------------------------------------------------------------------------------- writing

SCAN = Geometry((24, 20, 16), affine_of("LPS", (0.7, 0.9, 2.5), (120.3, -80.2, -350), (4, 7, -9)))
CELLS = cells(SCAN, (4, 4, 4), (1.5, 1.5, 1.5), (6, 5, 4))


def evidence(seed: int = 0) -> Array:
    values = np.random.default_rng(seed).normal(size=(6, 5, 4)).astype(np.float32)
    values[4, 1, 2] = 9.0
    return values


def bundle(e: Explanation) -> Bundle:
    return Bundle(e, draw(e))


def test_four_files_that_nibabel_and_simpleitk_read_alike(tmp_path: Path) -> None:
    e = explained(evidence(), CELLS, SCAN)
    paths = nifti.save(bundle(e), tmp_path)
    assert [p.name for p in paths] == [
        "explanation.nii.gz",
        "signed.nii.gz",
        "for.nii.gz",
        "against.nii.gz",
    ]
    for path, grid in zip(paths, (CELLS, SCAN, SCAN, SCAN), strict=True):
        one, other = opened(path), sitk.ReadImage(str(path))
        values = np.asarray(one.dataobj)
        assert values.dtype == np.float32
        assert one.shape == grid.shape
        theirs = sitk.GetArrayFromImage(other).T
        assert np.array_equal(values, theirs)
        peak = tuple(int(n) for n in np.unravel_index(int(np.abs(values).argmax()), values.shape))
        ras = nib.affines.apply_affine(one.affine, peak)
        lps = np.array(other.TransformIndexToPhysicalPoint(peak))
        assert lps * (-1, -1, 1) == pytest.approx(ras, abs=1e-4)
        assert grid.world_ras(peak) == pytest.approx(ras, abs=1e-4)
        h = one.header
        assert (int(h["sform_code"]), int(h["qform_code"])) == (1, 1)
        assert h.get_xyzt_units()[0] == "mm"
        assert h.get_intent()[0] == "estimate"
        assert h.get_zooms() == pytest.approx(grid.spacing_mm, rel=1e-6)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grids(turned=60, most=6))
def test_any_grid_is_written_where_it_lies(tmp_path: Path, grid: Geometry) -> None:
    values = np.zeros(grid.shape)
    values[-1, 0, -1] = 1.0
    path = nifti.save(bundle(explained(values, grid, grid)), tmp_path)[1]
    corner = (grid.shape[0] - 1, 0, grid.shape[2] - 1)
    ras = nib.affines.apply_affine(opened(path).affine, corner)
    assert ras == pytest.approx(grid.world_ras(corner), abs=2e-4)
    if min(grid.shape) > 1:
        lps = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint(corner)
        assert np.array(lps) * (-1, -1, 1) == pytest.approx(grid.world_ras(corner), abs=1e-3)


def test_a_sheared_grid_has_no_qform_but_its_voxel_size(tmp_path: Path) -> None:
    affine = np.array(SCAN.affine)
    affine[:3, 2] += 0.3 * affine[:3, 1]
    sheared = Geometry(SCAN.shape, affine)
    placed = cells(sheared, (4, 4, 4), (1.5, 1.5, 1.5), (6, 5, 4))
    for path in nifti.save(bundle(explained(evidence(), placed, sheared)), tmp_path):
        h = opened(path).header
        assert (int(h["sform_code"]), int(h["qform_code"])) == (1, 0)
        grid = placed if path.name == "explanation.nii.gz" else sheared
        assert h.get_sform() == pytest.approx(grid.affine, abs=1e-4)
        assert h.get_zooms() == pytest.approx(grid.spacing_mm, rel=1e-6)


def test_the_header_carries_the_scale(tmp_path: Path) -> None:
    e = explained(evidence(), CELLS, SCAN)
    maps = draw(e)
    for path in nifti.save(bundle(e), tmp_path)[1:]:
        h = opened(path).header
        assert float(h["cal_max"]) == pytest.approx(maps.signed.peak, rel=1e-6)
        low = -maps.signed.peak if path.name == "signed.nii.gz" else 0
        assert float(h["cal_min"]) == pytest.approx(low, rel=1e-6)
        assert h.get_intent()[2] == "log-odds/mL"


@pytest.mark.parametrize("link", ["softmax", "none"])
@pytest.mark.parametrize(
    ("measure", "word"),
    [("score", ""), ("score per input unit", "gradient"), ("relative units", "relative")],
)
def test_the_header_says_the_unit(tmp_path: Path, measure: Any, word: str, link: Any) -> None:
    target = Target("class" if link == "softmax" else "regression", "x", (1,), link)
    e = explained(evidence(), CELLS, SCAN, measure=measure, target=target)
    word = word or ("log-odds" if link == "softmax" else "score")
    for path in nifti.save(bundle(e), tmp_path):
        per = "cell" if path.name == "explanation.nii.gz" else "mL"
        assert opened(path).header.get_intent()[2] == f"{word}/{per}"


def test_the_same_explanation_gives_the_same_bytes(tmp_path: Path) -> None:
    e = explained(evidence(), CELLS, SCAN)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (nifti.save(bundle(e), tmp_path / n) for n in "ab")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grids(most=5), st.integers(0, 999), st.floats(-1e6, 1e6))
def test_the_explanation_comes_back_equal(
    tmp_path: Path, grid: Geometry, seed: int, score: float
) -> None:
    values = np.random.default_rng(seed).normal(size=grid.shape).astype(np.float32)
    e = explained(values, grid, SCAN, score=score, warnings=("ü, “quoted”, 肺",))
    path = nifti.write_explanation(e, tmp_path / "explanation.nii.gz", to_record(e, None))
    assert nifti.read_explanation(path) == e
    assert nifti.read_explanation(tmp_path) == e


def test_other_readers_skip_the_extension(tmp_path: Path) -> None:
    e = explained(evidence(), CELLS, SCAN)
    path = nifti.write_explanation(e, tmp_path / "explanation.nii.gz", to_record(e, draw(e)))
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, e.evidence)
    extension = opened(path).header.extensions[0]
    assert extension.get_code() == 6


def lose_extension(path: Path) -> None:
    image = opened(path)
    clean = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    clean.set_sform(image.affine, 1)
    nib.save(clean, path)


def change_record(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        e = explained(evidence(), CELLS, SCAN)
        record = to_record(e, draw(e))
        change(record)
        nifti.write_explanation(e, path, record)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lose_extension, "holds no record"),
        (change_record(lambda r: r.pop("layer")), "record is damaged: 'layer'"),
        (change_record(lambda r: r.update(format="x/9")), "expected an explanation of format"),
        (change_record(lambda r: r["cell_grid"].update(shape=[1, 2])), "record is damaged"),
        (change_record(lambda r: r["cell_grid"].update(shape=[1, 2, 3])), "record is damaged"),
        (change_record(lambda r: r["target"].update(kind="mask")), "record is damaged"),
        (change_record(lambda r: r.update(target=None)), "record is damaged"),
        (change_record(lambda r: r.update(colour_scale={"peak": 1})), "record is damaged"),
        (change_record(lambda r: r["image_grid"].update(affine_ras=[[0] * 4] * 4)), "is damaged"),
    ],
)
def test_a_damaged_explanation(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "explanation.nii.gz"
    e = explained(evidence(), CELLS, SCAN)
    nifti.write_explanation(e, path, to_record(e, draw(e)))
    spoil(path)
    with pytest.raises(ImageError, match=says):
        nifti.read_explanation(path)


def test_no_explanation_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"expected an explanation.nii.gz, found none"):
        nifti.read_explanation(tmp_path)


def test_without_isal_plain_gzip_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "isal", None)
    e = explained(evidence(), CELLS, SCAN)
    path = nifti.write_explanation(e, tmp_path / "explanation.nii.gz", to_record(e, None))
    assert nifti.read_explanation(path) == e


@pytest.mark.slow
def test_a_whole_chest_is_written_in_seconds(tmp_path: Path) -> None:
    grid = Geometry((512, 512, 300), affine_of("LPS", (0.7, 0.7, 1.0)))
    placed = cells(grid, (16, 16, 16), (7.5, 7.5, 7.5), (32, 32, 19))
    e = explained(np.random.default_rng(0).normal(size=placed.shape), placed, grid)
    maps = draw(e)
    start = time.perf_counter()
    nifti.save(Bundle(e, maps), tmp_path)
    assert time.perf_counter() - start < 20  # three maps of 315 MB; zlib alone takes 12 s for each


def test_a_map_without_a_sign_is_one_file(tmp_path: Path) -> None:
    e = explained(np.abs(evidence()), CELLS, SCAN, signed=False, measure="relative units")
    cells_, strength = nifti.save(bundle(e), tmp_path)
    assert (cells_.name, strength.name) == ("explanation.nii.gz", "strength.nii.gz")
    for path in (cells_, strength):
        assert opened(path).header["descrip"].item().startswith(b"Map without a sign, research")
    assert float(opened(strength).header["cal_min"]) == 0
    assert np.array_equal(np.asarray(opened(strength).dataobj), draw(e).signed.values)
    assert nifti.read_explanation(tmp_path) == e
