"""Does drawing keep the sum, the sign, the box and the place of every cell?"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from med_gradcam.calibration import Calibration, from_case
from med_gradcam.errors import GeometryError, InputError, UsageError
from med_gradcam.geometry import Geometry, cells, crop, reorient, reorientation
from med_gradcam.maps import Heatmap, axis_weights, draw, drawing
from tests.tiny import ORDERS, affine_of, explained, grids

Doubles = npt.NDArray[np.float64]
triples = st.tuples(*[st.integers(1, 5)] * 3)
jumps = st.tuples(*[st.floats(0.3, 9)] * 3)
starts = st.tuples(*[st.floats(-6, 12)] * 3)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Geometry, Geometry, Doubles]:
    """A grid of cells in any order of axes, the scan's grid, and evidence of both signs."""
    image = draw(grids(most=12))
    network = reorient(image, reorientation(image, draw(st.sampled_from(ORDERS))))
    placed = cells(network, draw(jumps), draw(starts), draw(triples))
    seed = draw(st.integers(0, 2**32 - 1))
    return placed, image, np.random.default_rng(seed).normal(0, 3, placed.shape)


@given(drawn())
def test_the_sum_is_kept(case: tuple[Geometry, Geometry, Doubles]) -> None:
    placed, image, evidence = case
    how = drawing(placed, image)
    for one_sign in (np.maximum(evidence, 0), np.maximum(-evidence, 0)):
        inside = how.spread(one_sign).sum(dtype=np.float64) * image.voxel_ml
        assert inside + how.outside(one_sign) == pytest.approx(one_sign.sum(), rel=1e-6)
    inside = how.spread(evidence).sum(dtype=np.float64) * image.voxel_ml
    gross = np.abs(evidence).sum()
    assert inside + how.outside(evidence) == pytest.approx(evidence.sum(), abs=1e-6 * gross)


@given(drawn())
def test_no_new_sign_and_nothing_outside_the_box(
    case: tuple[Geometry, Geometry, Doubles],
) -> None:
    placed, image, evidence = case
    dense = drawing(placed, image).spread(np.abs(evidence))
    assert dense.min() >= 0
    every = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), axis=-1)
    at = placed.index_ijk(image.world_ras(every))
    far = np.abs(at - (np.array(placed.shape) - 1) / 2) > np.array(placed.shape) / 2 + 1e-6
    assert not dense[far.any(axis=-1)].any()


@given(drawn())
def test_a_constant_density_stays_constant_inside_the_box(
    case: tuple[Geometry, Geometry, Doubles],
) -> None:
    placed, image, _ = case
    how = drawing(placed, image)
    dense = how.spread(how.share() * image.voxel_ml * 2.5)  # 2.5 per mL in every cell's own voxels
    inside = np.ones(image.shape)
    for axis, weights in zip(how.order, how.weights, strict=True):
        shape = [1, 1, 1]
        shape[axis] = -1
        inside = inside * (weights.sum(axis=1) > 0).reshape(shape)
    assert dense == pytest.approx(2.5 * inside, rel=1e-5)


@given(drawn(), st.integers(0, 2**32 - 1))
def test_gather_is_the_adjoint_of_spread(
    case: tuple[Geometry, Geometry, Doubles], seed: int
) -> None:
    placed, image, evidence = case
    mask = np.random.default_rng(seed).random(image.shape)
    how = drawing(placed, image)
    shares = how.gather(mask)
    assert shares.shape == placed.shape
    left = (shares * evidence).sum()
    right = (how.spread(evidence).astype(np.float64) * mask).sum() * image.voxel_ml
    assert left == pytest.approx(right, abs=1e-6 * np.abs(evidence).sum())
    assert shares.min() >= 0
    assert shares.max() <= 1 + 1e-9


@given(drawn())
def test_for_and_against_are_split_per_cell(case: tuple[Geometry, Geometry, Doubles]) -> None:
    placed, image, evidence = case
    e = explained(evidence, placed, image)
    maps = draw(e)
    for heatmap, total in ((maps.raises, e.sum_for), (maps.lowers, e.sum_against)):
        assert heatmap.values.min() >= 0
        inside = heatmap.values.sum(dtype=np.float64) * image.voxel_ml
        assert inside + heatmap.outside_image == pytest.approx(total, rel=1e-5)
    assert np.array_equal(maps.signed.values, maps.raises.values - maps.lowers.values)
    assert maps.signed.outside_image == pytest.approx(
        maps.raises.outside_image - maps.lowers.outside_image
    )


def linear(placed: Geometry, image: Geometry, evidence: Doubles) -> Doubles:
    """The definition, written slowly voxel by voxel: linear weights, clamped, none outside."""
    relation = np.linalg.inv(image.affine) @ placed.affine
    weight = np.zeros((*image.shape, *placed.shape))
    for v in np.ndindex(*image.shape):
        at = np.linalg.solve(relation[:3, :3], np.array(v) - relation[:3, 3])
        counts = np.array(placed.shape)
        if (at < -0.5 - 1e-9).any() or (at > counts - 0.5 + 1e-9).any():
            continue
        at = np.clip(at, 0, counts - 1)
        low = np.minimum(np.floor(at).astype(int), np.maximum(counts - 2, 0))
        for corner in itertools.product((0, 1), repeat=3):
            u = low + corner
            if (u < counts).all():
                part = np.where(np.array(corner) == 1, at - low, 1 - (at - low))
                product = np.prod(part)
                weight[(*v, *u)] += product if product > 1e-9 else 0.0
    share = weight.sum(axis=(0, 1, 2))
    density = np.divide(
        evidence, image.voxel_ml * share, where=share > 0, out=np.zeros(share.shape)
    )
    return np.asarray(np.einsum("abcijk,ijk->abc", weight, density))


@pytest.mark.parametrize("axes", ["RAS", "SPL", "ILA", "PRS"])
@pytest.mark.parametrize(
    ("jump", "start"),
    [((2, 2, 2), (0.5, 0.5, 0.5)), ((3, 2, 4), (1, -2, 2.5)), ((1, 1.5, 2.25), (0, 3, 0.1))],
)
def test_drawing_is_the_definition(
    axes: str, jump: tuple[float, ...], start: tuple[float, ...]
) -> None:
    image = Geometry((7, 6, 8), affine_of("LPS", (0.8, 1.1, 2.5), (10, -20, 30), (4, 5, 6)))
    placed = cells(reorient(image, reorientation(image, axes)), jump, start, (3, 2, 3))
    evidence = np.random.default_rng(1).normal(size=(3, 2, 3))
    assert drawing(placed, image).spread(evidence) == pytest.approx(
        linear(placed, image, evidence), abs=1e-4
    )


@pytest.mark.parametrize("axes", ORDERS)
def test_any_order_of_axes_gives_the_same_map_in_the_patient(axes: str) -> None:
    image = Geometry((8, 9, 10), affine_of("LPS", (1, 1.2, 2), (5, 6, 7), (3, 2, 1)))
    placed = cells(image, (2, 3, 2), (0.5, 1, 1.5), (3, 3, 4))
    evidence = np.random.default_rng(2).normal(size=placed.shape)
    how = reorientation(placed, axes)
    turned = reorient(placed, how)
    flips = tuple(n for n, flipped in enumerate(how.flip) if flipped)
    same = np.flip(evidence.transpose(how.order), flips)
    there = drawing(turned, image).spread(same)
    assert there == pytest.approx(drawing(placed, image).spread(evidence), abs=1e-4)


@pytest.mark.parametrize("axes", ORDERS)
def test_a_cell_that_ends_at_a_voxels_centre_never_draws_by_rounding(axes: str) -> None:
    """Centres a whole jump from the scan's last voxel: rounding must not decide what is outside."""
    image = Geometry((7, 7, 7), affine_of("LPS", (0.8, 0.8, 0.8), (10.3, -20.1, 30.7), (4, 5, 6)))
    placed = cells(reorient(image, reorientation(image, axes)), (2,) * 3, (-2,) * 3, (6,) * 3)
    assert drawing(placed, image).outside(np.ones(placed.shape)) == 6**3 - 4**3


def test_cells_of_a_resampled_patch_come_home() -> None:
    """Cells on a patch of a grid of another spacing: the hot cell's middle is where it was."""
    image = Geometry((40, 36, 30), affine_of("LPS", (0.7, 0.7, 2.5), (12, 34, -56), (6, 0, 9)))
    network = reorient(image, reorientation(image, "SPL"))
    jump = [1.0 / s for s in network.spacing_mm]
    network = cells(network, jump, [(j - 1) / 2 for j in jump], (75, 25, 28))
    placed = cells(crop(network, (20, 4, 2), (32, 16, 16)), (4, 4, 4), (1.5,) * 3, (8, 4, 4))
    evidence = np.zeros(placed.shape)
    evidence[4, 2, 1] = 1.0
    dense = drawing(placed, image).spread(evidence).astype(np.float64)
    every = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), axis=-1)
    middle = (image.world_ras(every) * dense[..., None]).sum(axis=(0, 1, 2)) / dense.sum()
    off = placed.index_ijk(middle) - (4, 2, 1)
    assert np.abs(off).max() < 0.15  # cells; a cell is 4 mm, a voxel 2.5 mm


def test_the_half_pixel_fault_is_caught() -> None:
    """The planted fault: cells of jump 8 placed at their corners, as peers do with zoom."""
    image = Geometry((64, 64, 64), np.eye(4))
    evidence = np.zeros((8, 8, 8))
    evidence[4, 4, 4] = 1.0

    def middle(start: float) -> float:
        dense = drawing(cells(image, (8,) * 3, (start,) * 3, (8,) * 3), image).spread(evidence)
        profile = dense.sum(axis=(1, 2), dtype=np.float64)
        return float((profile * np.arange(64)).sum() / profile.sum())

    assert middle(3.5) == pytest.approx(35.5, abs=1e-5)
    assert middle(0.0) != pytest.approx(35.5, abs=1.0)


def test_a_plain_gather_would_not_keep_the_sum() -> None:
    """The planted fault: interpolating the densities without the cells' real shares."""
    image = Geometry((10, 10, 10), np.eye(4))
    placed = cells(image, (4, 4, 4), (0, 0, 0), (3, 3, 3))
    evidence = np.random.default_rng(3).random((3, 3, 3))
    how = drawing(placed, image)
    naive = evidence / placed.voxel_ml
    for axis, weights in enumerate(how.weights):
        naive = np.moveaxis(np.tensordot(weights, naive, axes=(1, axis)), 0, axis)
    assert naive.sum() * image.voxel_ml != pytest.approx(evidence.sum(), rel=1e-2)
    assert how.spread(evidence).sum() * image.voxel_ml == pytest.approx(evidence.sum(), rel=1e-6)


def test_the_native_cells_are_the_dense_map_at_their_centres() -> None:
    """P20: a coarse grid of densities equals the dense map where cells and voxels meet."""
    image = Geometry((32, 32, 32), np.eye(4))
    placed = cells(image, (4, 4, 4), (2, 2, 2), (8, 8, 8))
    evidence = np.zeros((8, 8, 8))
    evidence[3, 4, 5] = 1.0
    how = drawing(placed, image)
    dense = how.spread(evidence)
    density = evidence / (image.voxel_ml * how.share())
    assert dense[2::4, 2::4, 2::4] == pytest.approx(density, rel=1e-5)
    assert np.argwhere(dense == dense.max()).tolist() == [[14, 18, 22]]


@pytest.mark.parametrize("jump", [0.25, 0.5, 0.9])
def test_cells_finer_than_voxels_share_them(jump: float) -> None:
    image = Geometry((6, 6, 6), np.diag([2.0, 2.0, 2.0, 1.0]))
    count = int(6 / jump)
    placed = cells(image, (jump,) * 3, ((jump - 1) / 2,) * 3, (count,) * 3)
    evidence = np.random.default_rng(4).random((count,) * 3)
    how = drawing(placed, image)
    assert how.outside(evidence) == 0
    assert (how.share() > 0).all()
    total = how.spread(evidence).sum(dtype=np.float64) * image.voxel_ml
    assert total == pytest.approx(evidence.sum(), rel=1e-6)


def test_cells_beside_the_scan_are_counted_as_outside() -> None:
    image = Geometry((8, 8, 8), np.eye(4))
    placed = cells(image, (4, 4, 4), (-5.5, 1.5, 1.5), (3, 2, 2))
    evidence = np.ones((3, 2, 2))
    how = drawing(placed, image)
    assert how.outside(evidence) == 4.0  # the first plane of cells lies before voxel 0
    assert how.spread(evidence).sum() * image.voxel_ml == pytest.approx(8.0)


def test_no_cell_touches_the_scan() -> None:
    image = Geometry((4, 4, 4), np.eye(4))
    maps = draw(explained(np.ones((2, 2, 2)), cells(image, (2,) * 3, (50,) * 3, (2,) * 3), image))
    assert not maps.signed.values.any()
    assert maps.signed.outside_image == 8.0
    assert maps.coloured_share == 0.0
    assert maps.signed.peak == 1.0  # a scale all the same


def test_one_scale_for_both_polarities() -> None:
    image = Geometry((4, 4, 4), np.eye(4))
    evidence = np.zeros((4, 4, 4))
    evidence[0, 0, 0], evidence[3, 3, 3] = 0.5, -2.0
    maps = draw(explained(evidence, image, image))
    assert maps.raises.peak == maps.lowers.peak == maps.signed.peak == pytest.approx(2000.0)
    assert maps.raises.floor == pytest.approx(200.0)
    assert maps.coloured_share == pytest.approx(2 / 64)
    fixed = Calibration("nodule", "integrated", "features.3", 10.0, 1.0, 20)
    maps = draw(explained(evidence, image, image, calibration=fixed))
    assert maps.lowers.scale == fixed


def test_a_rotated_cell_grid_is_refused() -> None:
    image = Geometry((8, 8, 8), np.eye(4))
    turned = Geometry((2, 2, 2), affine_of("RAS", (3, 3, 3), turn=(0, 0, 10)))
    with pytest.raises(GeometryError, match="parallel to the image's, got a rotated"):
        drawing(turned, image)
    diagonal = Geometry((2, 2, 2), affine_of("RAS", (3, 3, 3), turn=(0, 0, 45)))
    with pytest.raises(GeometryError, match="rotated cell grid"):
        drawing(diagonal, image)


@given(st.integers(1, 30), st.integers(1, 9), st.floats(-9, 20), st.floats(0.2, 12))
def test_axis_weights_sum_to_one_or_nothing(
    voxels: int, count: int, start: float, jump: float
) -> None:
    weights = axis_weights(voxels, count, start, jump)
    assert weights.shape == (voxels, count)
    assert weights.min() >= 0
    rows = weights.sum(axis=1)
    assert np.all((np.abs(rows - 1) < 1e-9) | (rows == 0))
    at = np.arange(voxels)
    inside = (at > start - jump / 2 + 1e-6) & (at < start + (count - 0.5) * jump - 1e-6)
    assert (rows[inside] > 0).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"values": np.zeros((2, 2, 3), np.float32)}, r"grid \(2, 2, 2\), got float32 \(2, 2, 3\)"),
        ({"values": np.zeros((2, 2, 2))}, "got float64"),
        ({"polarity": "both"}, "expected for, against, signed or strength, got 'both'"),
    ],
)
def test_no_heatmap(changes: dict[str, Any], says: str) -> None:
    fields = {
        "values": np.zeros((2, 2, 2), np.float32),
        "grid": Geometry((2, 2, 2), np.eye(4)),
        "polarity": "for",
        "unit": "log-odds per mL",
        "scale": from_case(1.0, "t", "m", "l"),
    }
    with pytest.raises(InputError, match=says):
        Heatmap(**{**fields, **changes})


# ---------------------------------------------------------------------------- maps without a sign


def test_a_map_without_a_sign_is_one_map() -> None:
    image = Geometry((8, 8, 8), np.eye(4))
    grid = cells(image, (2, 2, 2), (0.5, 0.5, 0.5), (4, 4, 4))
    evidence = np.random.default_rng(0).random((4, 4, 4))
    signed, bare = (draw(explained(evidence, grid, image, signed=s)) for s in (True, False))
    assert (signed.has_sign, bare.has_sign) == (True, False)
    assert [h.polarity for h in signed.written] == ["signed", "for", "against"]
    assert [h.polarity for h in bare.written] == ["strength"]
    assert {side: h.polarity for side, h in signed.sides.items()} == {
        "for": "for",
        "against": "against",
    }
    assert {side: h.polarity for side, h in bare.sides.items()} == {"strength": "strength"}
    assert np.array_equal(bare.signed.values, signed.raises.values)
    assert not bare.lowers.values.any()
    assert bare.coloured_share == signed.coloured_share > 0
    other = from_case(9.0, "t", "m", "l")
    assert [h.scale for h in bare.on_scale(other).written] == [other]


def test_what_cannot_be_drawn_is_one_sentence() -> None:
    image = Geometry((8, 8, 8), np.eye(4))
    e = explained(np.ones((8, 8, 8)), image, image)
    with pytest.raises(UsageError, match=r"expected a grid .* got int; leave it out"):
        draw(e, 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected an Explanation to draw, got str"):
        draw("e")  # type: ignore[arg-type]
