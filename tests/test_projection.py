"""Do projections show every scan the same way round, conserve the evidence and point back?"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from med_gradcam.calibration import Calibration
from med_gradcam.errors import UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.maps import Heatmap, Polarity
from med_gradcam.projection import (
    VIEWS,
    Kind,
    plane_of,
    project,
    project_scan,
    slab_of,
    slice_scan,
)

SCALE = Calibration("t", "m", "l", 1.0, 0.1, 5)
# Voxels and spacing along R, A, S; where the corner voxel most left, posterior, inferior lies.
COUNTS, SPACING, CORNER = (8, 10, 12), np.array((2.0, 1.5, 3.0)), np.array((-7.0, 20.0, -300.0))
ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
# Marks by their place in R, A, S voxels: one far right, one far anterior, one far superior, ...
MARKS = {(7, 4, 5): 1.0, (3, 9, 6): 2.0, (4, 3, 11): 3.0, (0, 0, 0): 0.5, (6, 7, 8): 4.0}
# What a radiologist sees, from R, A, S voxel coordinates: rows and columns of each view.
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}


def turn(degrees: float) -> npt.NDArray[np.float64]:
    a, b = np.radians(degrees), np.radians(degrees / 2)
    about_s = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return np.asarray(about_s @ about_r)


def phantom(
    order: tuple[int, ...], signs: tuple[int, ...], degrees: float = 0.0
) -> tuple[npt.NDArray[np.float32], Geometry]:
    """The marks in an array whose axis n runs along world axis order[n], forward or backward."""
    rotation = turn(degrees)
    affine = np.eye(4)
    affine[:3, 3] = rotation @ CORNER
    shape = [COUNTS[axis] for axis in order]
    for n, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        step = np.zeros(3)
        step[axis] = SPACING[axis]
        affine[:3, n] = rotation @ step * sign
        if sign < 0:
            affine[:3, 3] += rotation @ step * (COUNTS[axis] - 1)
    array = np.zeros(shape, dtype=np.float32)
    for place, value in MARKS.items():
        index = tuple(
            place[axis] if sign > 0 else COUNTS[axis] - 1 - place[axis]
            for axis, sign in zip(order, signs, strict=True)
        )
        array[index] = value
    return array, Geometry((shape[0], shape[1], shape[2]), affine)


def heat(array: npt.NDArray[np.float32], grid: Geometry, polarity: Polarity = "for") -> Heatmap:
    return Heatmap(np.ascontiguousarray(array), grid, polarity, "log-odds per mL", SCALE)


def expected(view: str) -> npt.NDArray[np.float32]:
    """The picture worked out from the marks alone."""
    r, a, s = COUNTS
    shape = {"axial": (a, r), "coronal": (s, r), "sagittal": (s, a)}[view]
    picture = np.zeros(shape, dtype=np.float32)
    for (x, y, z), value in MARKS.items():
        at = {
            "axial": (a - 1 - y, r - 1 - x),  # anterior up, right on the left
            "coronal": (s - 1 - z, r - 1 - x),  # superior up, right on the left
            "sagittal": (s - 1 - z, a - 1 - y),  # superior up, anterior on the left
        }[view]
        picture[at] = max(picture[at], value)
    return picture


@pytest.mark.parametrize("degrees", [0.0, 20.0])
@pytest.mark.parametrize("view", VIEWS)
def test_all_48_orientations_give_one_picture_with_the_right_letters(
    view: str, degrees: float
) -> None:
    for order, signs in ORIENTATIONS:
        array, grid = phantom(order, signs, degrees)
        found = project(heat(array, grid), view)
        np.testing.assert_array_equal(found.values, expected(view), err_msg=grid.axcodes)
        edges = found.edges
        assert edges.left + edges.right + edges.top + edges.bottom == EDGES[view], grid.axcodes
        rows, columns = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}[view]
        np.testing.assert_allclose(found.pixel_mm, (SPACING[rows], SPACING[columns]))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["max", "sum"])
def test_depth_points_back_to_the_voxel_and_to_the_same_place_in_the_patient(
    view: str, kind: Kind
) -> None:
    for order, signs in ORIENTATIONS:
        array, grid = phantom(order, signs, 20.0)
        found = project(heat(array, grid), view, kind=kind)
        for row, column in np.argwhere(found.values > 0).tolist():
            voxel = found.voxel_ijk(row, column)
            assert voxel is not None
            assert voxel[found.plane.how.order[2]] == found.depth_index[row, column]
            point = found.point_ras_mm(row, column)
            assert point is not None
            place = (turn(20.0).T @ np.array(point) - CORNER) / SPACING
            assert array[voxel] == pytest.approx(MARKS[tuple(place.round().astype(int).tolist())])
            np.testing.assert_allclose(place, place.round(), atol=1e-9)
            np.testing.assert_allclose(grid.index_ijk(point), voxel, atol=1e-9)


def test_an_empty_ray_points_nowhere() -> None:
    array, grid = phantom((0, 1, 2), (1, 1, 1))
    found = project(heat(array, grid), "axial")
    assert found.depth_index.min() == -1
    assert np.isnan(found.depth_mm).sum() == (found.values == 0).sum()
    row, column = np.argwhere(found.values == 0)[0].tolist()
    assert found.voxel_ijk(row, column) is None
    assert found.point_ras_mm(row, column) is None


@pytest.mark.parametrize(("view", "far"), [("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_depth_mm_is_physical_and_the_nearest_of_equals_wins(view: str, far: int) -> None:
    for order, signs in ORIENTATIONS:
        array, grid = phantom(order, signs)
        found = project(heat(np.ones_like(array), grid), view)
        assert (found.depth_mm == 0).all(), grid.axcodes  # all equal: the layer nearest the reader
        ramp = np.zeros_like(array)
        along = grid.world_ras(np.moveaxis(np.indices(array.shape), 0, -1))[..., far]
        # Away from the reader: to superior, posterior, the patient's right.
        ramp += (along.max() - along if view == "coronal" else along - along.min()) + 1
        deep = project(heat(ramp, grid), view)
        np.testing.assert_allclose(deep.depth_mm, (COUNTS[far] - 1) * SPACING[far])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_a_sum_projection_keeps_the_evidence(view: str, degrees: float) -> None:
    rng = np.random.default_rng(3)
    for order, signs in ORIENTATIONS[::7]:
        array, grid = phantom(order, signs, degrees)
        for polarity in ("for", "signed"):
            values = rng.normal(size=array.shape).astype(np.float32)
            values = np.abs(values) if polarity == "for" else values
            found = project(heat(values, grid, polarity), view, kind="sum")
            total = float(values.sum(dtype=np.float64)) * grid.voxel_ml
            assert found.unit == "log-odds per cm2"
            mass = found.values.sum(dtype=np.float64) * found.pixel_cm2
            assert mass == pytest.approx(total, rel=1e-5, abs=1e-5)


def test_a_sheared_grid_keeps_the_evidence_too() -> None:
    affine = np.diag((1.0, 2.0, 3.0, 1.0))
    affine[1, 2] = 0.8  # gantry tilt
    values = np.ones((4, 5, 6), dtype=np.float32)
    grid = Geometry((4, 5, 6), affine)
    for view in VIEWS:
        found = project(heat(values, grid), view, kind="sum")
        mass = found.values.sum(dtype=np.float64) * found.pixel_cm2
        assert mass == pytest.approx(values.sum() * grid.voxel_ml, rel=1e-6)


def test_one_cm_of_one_per_ml_is_one_per_cm2() -> None:
    values = np.ones((3, 3, 4), dtype=np.float32)
    grid = Geometry((3, 3, 4), np.diag((0.7, 0.9, 2.5, 1.0)))
    np.testing.assert_allclose(project(heat(values, grid), "axial", kind="sum").values, 1.0)


@pytest.mark.parametrize("view", VIEWS)
def test_a_slab_projects_only_its_layers(view: str) -> None:
    for order, signs in ORIENTATIONS[::5]:
        array, grid = phantom(order, signs)
        plane = plane_of(grid, view)
        axis = plane.how.order[2]
        for first, stop in ((0, 3), (2, 5), (4, grid.shape[axis])):
            found = project(heat(array, grid), view, slab=(first, stop))
            kept = np.zeros_like(array)
            part = tuple(slice(first, stop) if n == axis else slice(None) for n in range(3))
            kept[part] = array[part]
            whole = project(heat(kept, grid), view)
            np.testing.assert_array_equal(found.values, whole.values)
            np.testing.assert_array_equal(found.depth_index, whole.depth_index)
            np.testing.assert_array_equal(found.depth_mm, whole.depth_mm)


def test_a_slab_in_mm_lies_around_its_point() -> None:
    _, grid = phantom((2, 0, 1), (1, -1, 1))
    point = CORNER + SPACING * (3, 4, 5)
    assert slab_of(grid, "axial", point, 9.0) in {(4, 7)}
    first, stop = slab_of(grid, "coronal", point, 0.0)
    assert stop - first == 1
    assert slab_of(grid, "axial", point, 1e6) == (0, 12)
    with pytest.raises(UsageError, match="slab inside the image"):
        slab_of(grid, "axial", point + np.array((0, 0, 500.0)), 9.0)


def test_what_cannot_be_projected_is_refused() -> None:
    array, grid = phantom((0, 1, 2), (1, 1, 1))
    with pytest.raises(UsageError, match="maximum hides the evidence that lowers"):
        project(heat(array, grid, "signed"), "axial")
    with pytest.raises(UsageError, match="axial, coronal, sagittal, got 'oblique'"):
        project(heat(array, grid), "oblique")
    with pytest.raises(UsageError, match="projection of max, sum, got 'mean'"):
        project(heat(array, grid), "axial", kind="mean")  # type: ignore[arg-type]
    for slab in ((3, 3), (-1, 2), (0, 13)):
        with pytest.raises(UsageError, match="slab within 0 to 12"):
            project(heat(array, grid), "axial", slab=slab)


def test_a_signed_sum_points_to_the_largest_size_of_either_sign() -> None:
    values = np.zeros((2, 2, 5), dtype=np.float32)
    values[0, 0] = (0, 1, 0, -3, 0)
    found = project(heat(values, Geometry((2, 2, 5), np.eye(4)), "signed"), "axial", kind="sum")
    assert found.voxel_ijk(1, 1) == (0, 0, 3)
    assert found.values[1, 1] == pytest.approx(-0.2)


def test_scan_backdrop_is_the_mean_and_clips_before_it() -> None:
    array, grid = phantom((1, 2, 0), (-1, 1, -1))
    plane = plane_of(grid, "coronal")
    seen = plane.oriented(array)
    np.testing.assert_allclose(project_scan(array, plane), seen.mean(axis=2), rtol=1e-6)
    clipped = project_scan(array, plane, limits=(0.0, 1.0))
    np.testing.assert_allclose(clipped, np.clip(seen, 0, 1).mean(axis=2), rtol=1e-6)
    np.testing.assert_array_equal(slice_scan(array, plane, 2), seen[:, :, 2])
    deep = np.ones((3, 300, 3), dtype=np.int16)
    ones = project_scan(deep, plane_of(Geometry((3, 300, 3), np.eye(4)), "coronal"))
    np.testing.assert_array_equal(ones, np.ones((3, 3)))


def test_indices_travel_there_and_back() -> None:
    for order, signs in ORIENTATIONS:
        array, grid = phantom(order, signs)
        for view in VIEWS:
            plane = plane_of(grid, view)
            index = (1.5, 2.0, 3.25)
            seen = plane.row_column_depth(index)
            np.testing.assert_allclose(plane.index_ijk(seen), index)
            whole = tuple(int(n) for n in plane.row_column_depth((1, 2, 3)))
            assert plane.oriented(array)[whole] == array[1, 2, 3]
