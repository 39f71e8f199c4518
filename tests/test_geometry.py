"""Does every voxel keep its place in the patient, whatever is done to its grid?"""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from med_gradcam.errors import GeometryError
from med_gradcam.geometry import (
    Geometry,
    cells,
    check_axcodes,
    crop,
    point_words,
    reorient,
    reorient_array,
    reorientation,
    side_words,
)
from tests.tiny import ORDERS, affine_of, grids

indices = st.tuples(*[st.floats(-50, 50)] * 3)


def test_there_are_48_orders() -> None:
    assert len(set(ORDERS)) == 48


@given(grids(turned=80), indices)
def test_index_to_world_and_back(grid: Geometry, index: tuple[float, float, float]) -> None:
    assert grid.index_ijk(grid.world_ras(index)) == pytest.approx(index, abs=1e-8)


@given(grids(), st.lists(indices, min_size=1, max_size=5))
def test_many_points_are_the_same_as_one_by_one(
    grid: Geometry, points: list[tuple[float, float, float]]
) -> None:
    together = grid.world_ras(points)
    assert together.shape == (len(points), 3)
    assert together == pytest.approx(np.stack([grid.world_ras(p) for p in points]), abs=1e-9)
    alone = np.stack([grid.index_ijk(p) for p in together])
    assert grid.index_ijk(together) == pytest.approx(alone, abs=1e-9)


@given(grids(turned=20))
def test_letters_agree_with_nibabel(grid: Geometry) -> None:
    unit = np.abs(grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0))
    assume((unit.max(axis=0) > 0.75).all())  # nearer to 45 degrees the choice is arbitrary
    assert grid.axcodes == "".join(nib.aff2axcodes(grid.affine))


@given(grids(turned=20), st.sampled_from(ORDERS), st.data())
def test_reorienting_keeps_every_voxel_at_its_place(
    grid: Geometry, axes: str, data: st.DataObject
) -> None:
    array = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    how = reorientation(grid, axes)
    turned, moved = reorient(grid, how), reorient_array(array, how)
    assert turned.axcodes == axes
    assert moved.shape == turned.shape
    here = tuple(data.draw(st.integers(0, n - 1)) for n in turned.shape)
    there = np.round(grid.index_ijk(turned.world_ras(here))).astype(int)
    assert grid.world_ras(there) == pytest.approx(turned.world_ras(here), abs=1e-9)
    assert moved[here] == array[tuple(there)]


@pytest.mark.parametrize("axes", ORDERS)
def test_all_48_orders_there_and_back(axes: str) -> None:
    grid = Geometry((3, 4, 5), affine_of("RAS", (1, 2, 3), (7, 8, 9), (5, -8, 11)))
    array = np.arange(60).reshape(1, 3, 4, 5)
    how = reorientation(grid, axes)
    turned = reorient(grid, how)
    back = reorientation(turned, "RAS")
    assert np.array_equal(reorient_array(reorient_array(array, how), back), array)
    assert reorient(turned, back).affine == pytest.approx(grid.affine, abs=1e-12)
    nibabel = nib.Nifti1Image(array[0].astype(np.int16), grid.affine)
    want = nib.orientations.axcodes2ornt(tuple(axes))
    have = nib.orientations.io_orientation(grid.affine)
    theirs = nibabel.as_reoriented(nib.orientations.ornt_transform(have, want))
    assert np.array_equal(np.asarray(theirs.dataobj), reorient_array(array, how)[0])
    assert turned.affine == pytest.approx(theirs.affine, abs=1e-9)


@given(grids(), st.tuples(*[st.integers(-4, 4)] * 3), st.tuples(*[st.integers(1, 5)] * 3))
def test_a_crop_keeps_the_place(
    grid: Geometry, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    part = crop(grid, start, shape)
    assert part.shape == shape
    assert part.world_ras((0, 0, 0)) == pytest.approx(grid.world_ras(start), abs=1e-9)
    far = np.array(start) + 3
    assert part.world_ras((3, 3, 3)) == pytest.approx(grid.world_ras(far), abs=1e-9)


@given(
    grids(),
    st.tuples(*[st.floats(0.3, 32)] * 3),
    st.tuples(*[st.floats(-8, 20)] * 3),
    st.tuples(*[st.integers(0, 6)] * 3),
)
def test_cell_centres_lie_at_start_plus_jump(
    grid: Geometry,
    jump: tuple[float, float, float],
    start: tuple[float, float, float],
    cell: tuple[int, int, int],
) -> None:
    made = cells(grid, jump, start, (7, 7, 7))
    voxel = [s + j * i for s, j, i in zip(start, jump, cell, strict=True)]
    assert made.world_ras(cell) == pytest.approx(grid.world_ras(voxel), abs=1e-8)
    mm = [j * s for j, s in zip(jump, grid.spacing_mm, strict=True)]
    assert made.spacing_mm == pytest.approx(mm, rel=1e-9)


@given(grids(turned=80))
def test_the_volume_of_a_voxel(grid: Geometry) -> None:
    assert grid.voxel_ml == pytest.approx(np.prod(grid.spacing_mm) / 1000, rel=1e-9)
    assert grid.is_orthogonal


def test_a_sheared_grid_knows_it() -> None:
    affine = np.eye(4)
    affine[1, 2] = 0.2
    assert not Geometry((2, 2, 2), affine).is_orthogonal


def test_oblique_degrees() -> None:
    assert Geometry((2, 2, 2), affine_of("LPS")).oblique_degrees == pytest.approx(0)
    turned = Geometry((2, 2, 2), affine_of("LPS", turn=(0, 0, 12)))
    assert turned.oblique_degrees == pytest.approx(12)


def test_geometry_is_frozen_and_compares_by_value() -> None:
    affine = np.eye(4)
    grid = Geometry((2, 3, 4), affine)
    affine[0, 3] = 5  # the caller's array is not ours
    assert grid == Geometry((2, 3, 4), np.eye(4))
    assert hash(grid) == hash(Geometry((2, 3, 4), np.eye(4)))
    assert grid != Geometry((2, 3, 4), affine)
    assert grid != Geometry((2, 3, 4), np.eye(4), frame_uid="1.2")
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 2


@pytest.mark.parametrize(
    ("shape", "affine", "says"),
    [
        ((2, 3), np.eye(4), r"three positive integers, got \(2, 3\)"),
        ((2, 0, 4), np.eye(4), r"got \(2, 0, 4\)"),
        ((2, -1, 4), np.eye(4), r"got \(2, -1, 4\)"),
        ((2, 2.5, 4), np.eye(4), r"got \(2, 2.5, 4\)"),
        ((2, float("nan"), 4), np.eye(4), r"three positive integers, got \(2, nan, 4\)"),
        ((2, 3, 4), np.eye(3), r"finite 4x4 affine, got shape \(3, 3\)"),
        ((2, 3, 4), np.full((4, 4), np.nan), "finite 4x4 affine"),
        ((2, 3, 4), np.diag([1, 1, 0, 1]), "singular"),
        ((2, 3, 4), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        ((2, 3, 4), np.diag([1, 1, 1, 2]), "last affine row 0 0 0 1, got"),
    ],
)
def test_no_grid(shape: tuple[int, int, int], affine: np.ndarray, says: str) -> None:
    with pytest.raises(GeometryError, match=says):
        Geometry(shape, affine)


def test_tiny_and_huge_voxels_are_no_singular_affine() -> None:
    assert Geometry((2, 2, 2), np.diag([1e-4, 1e-4, 3e-3, 1])).spacing_mm[0] == pytest.approx(1e-4)
    assert Geometry((2, 2, 2), np.diag([1e4, 1e4, 1e4, 1])).voxel_ml == pytest.approx(1e9)


@pytest.mark.parametrize("axes", ["RAA", "XYZ", "RA", "RASI", "", "RLS"])
def test_letters_that_are_none(axes: str) -> None:
    with pytest.raises(GeometryError, match="one of each pair"):
        check_axcodes(axes)


def test_letters_in_small_are_taken() -> None:
    assert check_axcodes("spl") == "SPL"


def test_a_voxel_reaches_half_a_voxel_out() -> None:
    grid = Geometry((4, 4, 4), np.eye(4))
    assert grid.contains((-0.5, 0, 3.5))
    assert not grid.contains((-0.51, 0, 0))
    assert not grid.contains((0, 3.6, 0))


def test_points_in_words() -> None:
    assert point_words((34.2, -12.4, 88)) == "R 34 P 12 S 88 mm"
    assert point_words((-1.0, 2.0, -3.0)) == "L 1 A 2 I 3 mm"
    assert side_words((34.2, 0, 0)) == "patient's right"
    assert side_words((-34.2, 0, 0)) == "patient's left"
    assert side_words((0.2, 0, 0)) == "midline"


def test_a_forgotten_flip_is_caught() -> None:
    """The planted fault: the affine of a flipped axis without the move of its origin."""
    grid = Geometry((3, 4, 5), affine_of("RAS", (1, 2, 3)))
    right = reorient(grid, reorientation(grid, "LAS"))
    wrong = Geometry((3, 4, 5), grid.affine @ np.diag([-1.0, 1, 1, 1]))
    assert right.world_ras((0, 0, 0)) == pytest.approx(grid.world_ras((2, 0, 0)))
    assert wrong.world_ras((0, 0, 0)) != pytest.approx(grid.world_ras((2, 0, 0)))
