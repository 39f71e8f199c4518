"""Does the network see the scan it expects, and do its voxels lie where the scan's lie?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from med_gradcam.errors import ImageError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.model import InputSpec, Model, Ready, Step
from med_gradcam.prepare import apply_steps, fit_steps, parse_point, prepare
from tests.tiny import ORDERS, affine_of, grids, volume

Doubles = npt.NDArray[np.float64]


def model(**changes: Any) -> Model:
    fields: dict[str, Any] = {"channels": 1, "modality": "CT", "axes": "SPL"}
    return Model(torch.nn.Identity(), InputSpec(**{**fields, **changes}), name="tiny")


def ramp_of(grid: Geometry) -> Doubles:
    """A number that tells every point of the patient apart: a linear function of RAS+ mm."""
    every = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return np.asarray(grid.world_ras(every) @ (1.0, 3.0, 7.0))


def ramp(
    shape: tuple[int, int, int],
    axes: str = "LPS",
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Any:
    affine = affine_of(axes, spacing, (3, -4, 5), turn)
    return volume(ramp_of(Geometry(shape, affine)).astype(np.float32), affine)


@pytest.mark.parametrize("stored", ["RAS", "LPS", "SPL", "PIR"])
@pytest.mark.parametrize("axes", ORDERS)
def test_every_order_of_axes(stored: str, axes: str) -> None:
    prepared = prepare(ramp((4, 5, 6), stored, (1, 1.5, 2), (7, 3, 5)), model(axes=axes))
    assert prepared.grid.axcodes == axes
    assert prepared.raw[0] == pytest.approx(ramp_of(prepared.grid), abs=1e-4)


@pytest.mark.parametrize("stored", ["LPS", "SPL", "AIR"])
@pytest.mark.parametrize("turn", [(0, 0, 0), (8.0, 3.0, 5.0)])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 0.7, 1.3), (3, 3, 3), (0.5, 4, 1)])
def test_another_spacing_keeps_every_place(
    stored: str, turn: tuple[float, float, float], spacing: tuple[float, float, float]
) -> None:
    scan = ramp((14, 11, 12), stored, (0.8, 1.2, 2.0), turn)
    prepared = prepare(scan, model(spacing_mm=spacing))
    assert prepared.grid.spacing_mm == pytest.approx(spacing)
    inside = np.ones(prepared.grid.shape, dtype=bool)
    every = np.stack(np.meshgrid(*map(np.arange, prepared.grid.shape), indexing="ij"), axis=-1)
    at = scan.grid.index_ijk(prepared.grid.world_ras(every))
    inside &= ((at >= 0) & (at <= np.array(scan.grid.shape) - 1)).all(axis=-1)
    assert inside.mean() > 0.2
    want = ramp_of(prepared.grid)
    assert prepared.raw[0][inside] == pytest.approx(want[inside], abs=1e-3)
    # The half voxels at the rim take the nearest voxel's value, not the padding.
    nearest = np.clip(at, 0, np.array(scan.grid.shape) - 1)
    assert prepared.raw[0] == pytest.approx(
        scan.grid.world_ras(nearest) @ (1.0, 3.0, 7.0), abs=1e-3
    )
    assert any("resampled to the model's spacing" in note for note in prepared.notes)


@given(st.integers(2, 40), st.floats(0.3, 5))
def test_the_new_grid_covers_the_same_patient(voxels: int, spacing: float) -> None:
    scan = ramp((voxels, 2, 2), "LPS")
    assume(abs(spacing - 1) > 0.02)
    prepared = prepare(scan, model(axes="LPS", spacing_mm=(spacing, 1, 1)))
    grid = prepared.grid
    assert prepared.raw[0] == pytest.approx(ramp_of(grid), abs=0.51)  # half a voxel at the rims
    first, last = scan.grid.index_ijk(grid.world_ras([[0, 0, 0], [grid.shape[0] - 1, 0, 0]]))[:, 0]
    assert first > -0.5
    assert last < voxels - 0.5
    assert first + last == pytest.approx(voxels - 1, abs=1e-6)  # what does not divide: both rims
    if grid.shape[0] > 1:
        assert first - spacing / 2 == pytest.approx(-0.5, abs=spacing / 4 + 1e-6)


def test_spacing_within_one_per_cent_is_left_alone() -> None:
    scan = ramp((4, 5, 6), "LPS", (1.005, 0.995, 1))
    prepared = prepare(scan, model(axes="LPS", spacing_mm=(1, 1, 1)))
    assert np.array_equal(prepared.raw[0], scan.array[0])
    assert prepared.grid == scan.grid
    assert prepared.notes == ()


@pytest.mark.parametrize("n", [4, 5])
def test_the_patch_starts_half_a_patch_before_the_point(n: int) -> None:
    scan = ramp((20, 20, 20), "LPS")
    prepared = prepare(scan, model(axes="LPS", patch=(n, n, n)), at="ijk:9,10,11")
    start = scan.grid.index_ijk(prepared.grid.world_ras((0, 0, 0)))
    assert start == pytest.approx((9 - n // 2, 10 - n // 2, 11 - n // 2), abs=1e-6)
    assert prepared.raw.shape == (1, n, n, n)
    assert prepared.raw[0] == pytest.approx(ramp_of(prepared.grid), abs=1e-4)


@given(grids(most=14), st.sampled_from(ORDERS), st.integers(1, 6), st.data())
def test_a_patch_stays_inside(grid: Geometry, axes: str, n: int, data: st.DataObject) -> None:
    if min(grid.shape) < n:
        grid = Geometry((14, 13, 12), grid.affine)
    point = [data.draw(st.integers(0, size - 1)) for size in grid.shape]
    # the voxel's number tells which voxels were taken
    array = np.arange(np.prod(grid.shape), dtype=np.float32).reshape(grid.shape)
    text = "ijk:" + ",".join(str(p) for p in point)
    prepared = prepare(volume(array, grid.affine), model(axes=axes, patch=(n, n, n)), text)
    assert prepared.raw.shape == (1, n, n, n)
    every = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), axis=-1)
    at = np.round(grid.index_ijk(prepared.grid.world_ras(every))).astype(int)
    assert at.min() >= 0
    assert np.array_equal(prepared.raw[0], array[tuple(np.moveaxis(at, -1, 0))])
    assert array[tuple(point)] in prepared.raw  # the point itself is in the patch
    assert prepared.notes == ()


def test_a_small_scan_is_padded_at_its_minimum() -> None:
    scan = ramp((4, 9, 9), "LPS")
    prepared = prepare(scan, model(axes="LPS", patch=(7, 7, 7)), at="ijk:1,4,4")
    every = np.stack(np.meshgrid(*[np.arange(7)] * 3, indexing="ij"), axis=-1)
    at = scan.grid.index_ijk(prepared.grid.world_ras(every))
    beside = ((at < -0.5) | (at > np.array(scan.grid.shape) - 0.5)).any(axis=-1)
    assert beside.sum() == 3 * 49
    assert (prepared.raw[0][beside] == scan.array.min()).all()
    assert prepared.raw[0][~beside] == pytest.approx(ramp_of(prepared.grid)[~beside], abs=1e-4)
    assert any("padded at the scan's minimum" in note for note in prepared.notes)


def test_each_channel_is_padded_at_its_own_minimum() -> None:
    array = np.stack([np.full((2, 4, 4), 5.0), np.full((2, 4, 4), -7.0)]).astype(np.float32)
    prepared = prepare(volume(array), model(axes="RAS", channels=2, patch=(4, 4, 4)), "ijk:0,0,0")
    assert set(np.unique(prepared.raw[0])) == {5.0}
    assert set(np.unique(prepared.raw[1])) == {-7.0}


def test_a_scan_within_a_tenth_of_the_patch_is_taken_around_its_middle() -> None:
    scan = ramp((11, 10, 9), "LPS")
    prepared = prepare(scan, model(axes="LPS", patch=(10, 10, 10)))
    assert prepared.raw.shape == (1, 10, 10, 10)
    start = scan.grid.index_ijk(prepared.grid.world_ras((0, 0, 0)))
    assert start == pytest.approx((0, 0, 0), abs=1e-6)
    with pytest.raises(UsageError, match=r"expected a point --at.*10 x 10 x 10.*12 x 10 x 10"):
        prepare(ramp((12, 10, 10), "LPS"), model(axes="LPS", patch=(10, 10, 10)))


def test_a_network_without_a_patch_takes_no_point() -> None:
    with pytest.raises(UsageError, match="expected no --at"):
        prepare(ramp((4, 4, 4)), model(), at="ijk:1,1,1")


def test_too_small_a_scan() -> None:
    with pytest.raises(ImageError, match=r"at least \(8, 8, 8\) voxels along SPL, got \(6, 9, 9\)"):
        prepare(ramp((9, 9, 6), "LPS"), model(min_patch=(8, 8, 8)))


def test_another_modality_or_number_of_channels() -> None:
    scan = volume(np.arange(27.0).reshape(3, 3, 3), modality="MR")
    with pytest.raises(ImageError, match="expected a CT scan for 'tiny', got modality MR"):
        prepare(scan, model())
    with pytest.raises(ImageError, match=r"expected 2 input channel\(s\) for 'tiny', got 1"):
        prepare(scan, model(modality="MR", channels=2))


def test_an_unknown_modality_is_taken_as_the_models_and_said() -> None:
    said = "the file does not say its modality; taken as CT, as the model does"
    scan = volume(np.linspace(-1000.0, 300.0, 27).reshape(3, 3, 3), modality=None)
    assert prepare(scan, model()).notes == (said,)
    other = volume(np.arange(27.0).reshape(3, 3, 3), modality=None)
    assert prepare(other, model()).notes == (
        said,
        "the values do not look like a CT in HU: none is below 0",
    )


def test_the_scans_own_array_is_left_alone() -> None:
    array = np.arange(125, dtype=np.int16).reshape(5, 5, 5)
    prepared = prepare(volume(array), model(axes="RAS", intensity=(Step("clip", ((3,), (9,))),)))
    prepared.network_input()
    assert np.array_equal(array.ravel(), np.arange(125))
    assert prepared.raw.dtype == np.float32


# ------------------------------------------------------------------------------------- intensity


def test_intensity_steps_run_in_order() -> None:
    raw = np.array([-2000, -500, 0, 500, 3000], dtype=np.float32).reshape(1, 5, 1, 1)
    steps = (
        Step("clip", ((-1000,), (1000,))),
        Step("scale", ((0.001,),)),
        Step("normalise", ((0.5,), (2.0,))),
    )
    want = (np.array([-1, -0.5, 0, 0.5, 1]) - 0.5) / 2
    got = apply_steps(raw, steps)
    assert got.dtype == np.float32
    assert got.ravel() == pytest.approx(want)
    other = apply_steps(raw, (steps[1], steps[0]))
    assert other.ravel() == pytest.approx([-2, -0.5, 0, 0.5, 3])


def test_normalise_per_channel() -> None:
    raw = np.ones((2, 1, 1, 1), dtype=np.float32)
    got = apply_steps(raw, (Step("normalise", ((0.0, 1.0), (2.0, 4.0))),))
    assert got.ravel() == pytest.approx([0.5, 0.0])
    with pytest.raises(ImageError, match=r"one mean and sd, or one per channel \(2\), got 3 and 3"):
        apply_steps(raw, (Step("normalise", ((0.0,) * 3, (1.0,) * 3)),))


def test_quantiles_are_scaled_to_0_and_1_as_the_networks_authors_do() -> None:
    random = np.random.default_rng(0)
    raw = random.gamma(2, 50, (1, 8, 8, 8)).astype(np.float32)
    low, high = np.quantile(raw, [0.02, 0.98])
    fitted = fit_steps(raw, (Step("quantile_scale", ((0.02,), (0.98,))),))
    want = np.clip((raw - low) / (high - low), 0, 1)
    assert apply_steps(raw, fitted) == pytest.approx(want, abs=1e-6)


def test_quantiles_are_measured_on_the_scan_and_not_on_the_reference() -> None:
    scan = ramp((9, 9, 9), "LPS")
    step = Step("quantile_scale", ((0.1,), (0.9,)))
    prepared = prepare(scan, model(axes="LPS", intensity=(step,)))
    low, high = np.quantile(scan.array, [0.1, 0.9])
    uniform = np.full_like(prepared.raw, (low + high) / 2)
    assert prepared.network_input(uniform) == pytest.approx(0.5, abs=1e-5)
    # The planted fault: fitted on the reference itself there is nothing to scale by.
    with pytest.raises(ImageError, match="expected a scan with contrast, got equal quantiles"):
        fit_steps(uniform, (step,))


def test_quantiles_after_a_clip_are_those_of_the_clipped_scan() -> None:
    raw = np.arange(100, dtype=np.float32).reshape(1, 4, 5, 5)
    steps = (Step("clip", ((20,), (60,))), Step("quantile_scale", ((0.0,), (1.0,))))
    got = apply_steps(raw, fit_steps(raw, steps))
    assert got.min() == 0
    assert got.max() == 1
    assert got.ravel()[40] == pytest.approx(0.5)


def test_a_step_that_was_not_fitted_is_refused() -> None:
    with pytest.raises(ImageError, match="expected fitted intensity steps, got 'quantile_scale'"):
        apply_steps(np.ones((1, 1, 1, 1), np.float32), (Step("quantile_scale", ((0.0,), (1.0,))),))


def test_a_zscore_of_what_is_not_zero_leaves_zero() -> None:
    random = np.random.default_rng(0)
    raw = random.normal([[[[40]]], [[[-7]]]], [[[[5]]], [[[2]]]], (2, 6, 6, 6)).astype(np.float32)
    raw[:, :2] = 0
    together, apart = (
        apply_steps(raw, fit_steps(raw, (Step("zscore", ((1.0,), (each,))),)))
        for each in (0.0, 1.0)
    )
    for made in (together, apart):
        assert (made[:, :2] == 0).all()
    assert apart[:, 2:].mean(axis=(1, 2, 3)) == pytest.approx((0, 0), abs=1e-5)
    assert apart[:, 2:].std(axis=(1, 2, 3)) == pytest.approx((1, 1), abs=1e-5)
    assert together[:, 2:].mean() == pytest.approx(0, abs=1e-5)
    assert together[:, 2:].std() == pytest.approx(1, abs=1e-5)
    assert together[0, 2:].mean() > 0.9  # two channels on one scale stay apart


def test_a_zscore_of_everything() -> None:
    raw = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
    made = apply_steps(raw, fit_steps(raw, (Step("zscore", ((0.0,), (0.0,))),)))
    assert made == pytest.approx((raw - 13) / np.std(np.arange(27)), abs=1e-5)
    flat = np.full((1, 2, 2, 2), 5, np.float32)  # nothing to divide by: no NaN
    assert (apply_steps(flat, fit_steps(flat, (Step("zscore", ((0.0,), (0.0,))),))) == 0).all()


def test_the_whole_range_is_scaled() -> None:
    raw = np.array([-50, 0, 150], dtype=np.float32).reshape(1, 3, 1, 1)
    made = apply_steps(raw, fit_steps(raw, (Step("minmax_scale", ((-1.0,), (1.0,))),)))
    assert made.ravel() == pytest.approx([-1, -0.5, 1], abs=1e-6)
    with pytest.raises(ImageError, match="contrast, got equal smallest and largest value: 7"):
        fit_steps(np.full((1, 2, 2, 2), 7, np.float32), (Step("minmax_scale", ((0.0,), (1.0,))),))


@pytest.mark.parametrize(("above", "want"), [(1.0, [9, 9, 5]), (0.0, [1, 9, 9])])
def test_a_threshold_replaces_the_others(above: float, want: list[float]) -> None:
    raw = np.array([1, 3, 5], dtype=np.float32).reshape(1, 3, 1, 1)
    made = apply_steps(raw, (Step("threshold", ((3.0,), (above,), (9.0,))),))
    assert made.ravel().tolist() == want
    assert made.dtype == np.float32


def test_steps_are_measured_on_the_whole_scan_and_not_on_the_patch() -> None:
    scan = ramp((12, 12, 12), "LPS")
    step = Step("minmax_scale", ((0.0,), (1.0,)))
    spec = {"axes": "LPS", "patch": (4, 4, 4), "intensity": (step,)}
    made = prepare(scan, model(**spec), at="ijk:6,6,6").network_input()
    low, high = float(scan.array.min()), float(scan.array.max())
    assert made == pytest.approx((scan.array[:, 4:8, 4:8, 4:8] - low) / (high - low), abs=1e-5)
    assert made.max() < 0.9  # measured on the patch it would be 1


def test_cubic_interpolation_follows_a_curve() -> None:
    x = np.linspace(0, 3 * np.pi, 40)
    wave = np.broadcast_to(np.sin(x)[:, None, None], (40, 4, 4)).astype(np.float32)
    spec = {"axes": "RAS", "spacing_mm": (0.5, 1, 1)}
    errors = []
    for how in ("linear", "cubic"):
        made = prepare(volume(wave), model(**spec, interpolation=how))
        at = made.grid.world_ras(np.stack([np.arange(80), np.zeros(80), np.zeros(80)], axis=1))
        wanted = np.sin(at[8:-8, 0] * x[1])
        errors.append(float(np.abs(made.raw[0, 8:-8, 2, 2] - wanted).max()))
        assert any(f"spacing ({how})" in note for note in made.notes)
    assert errors[1] < errors[0] / 10


def test_intensity_before_the_change_of_spacing() -> None:
    array = np.zeros((8, 4, 4), np.float32)
    array[4:] = 100
    step = (Step("clip", ((0.0,), (10.0,))),)
    spec = {"axes": "RAS", "spacing_mm": (0.7, 1, 1), "intensity": step}
    first = prepare(volume(array), model(**spec, intensity_first=True))
    last = prepare(volume(array), model(**spec))
    assert last.exact is None
    assert first.exact is not None
    assert np.array_equal(first.raw, last.raw)
    edge = (first.raw > 10) & (first.raw < 99)
    assert edge.any()
    assert first.network_input()[edge] == pytest.approx(first.raw[edge] / 10)  # a share of 10
    assert (last.network_input()[edge] == 10).all()
    # a reference keeps what it does not replace, and goes through the steps elsewhere
    reference = first.raw.copy()
    reference[0, :3] = 40
    made = first.network_input(reference)
    assert (made[0, :3] == 10).all()
    assert np.array_equal(made[0, 3:], first.network_input()[0, 3:])


def test_a_recipe_says_where_its_voxels_lie() -> None:
    scan = ramp((10, 9, 8), "LPS", (1.0, 1.5, 2.0))
    seen: list[Geometry] = []

    def recipe(array: Any, spacing: tuple[float, float, float]) -> Ready:
        assert spacing == pytest.approx((1.5, 1.0, 2.0))
        raw = np.ascontiguousarray(array[:, 2::2, 1:, ::3], dtype=np.float32)
        return Ready(
            raw,
            raw / np.float32(7),
            (2.0, 1.0, 0.0),
            (2.0, 1.0, 3.0),
            (Step("scale", ((1 / 7,),)),),
        )

    def on(grid: Geometry) -> Any:
        seen.append(grid)
        return recipe

    for how in ({"recipe": recipe}, {"recipe_on": on}):
        prepared = prepare(scan, model(axes="ARS", **how))
        assert prepared.raw[0] == pytest.approx(ramp_of(prepared.grid), abs=1e-4)
        assert prepared.network_input() == pytest.approx(prepared.raw / 7)
    assert [grid.axcodes for grid in seen] == ["ARS"]


def test_padding_of_the_networks_own() -> None:
    scan = ramp((4, 9, 9), "LPS")
    spec = {"axes": "LPS", "patch": (7, 7, 7), "padding": 0.0}
    step = (Step("normalise", ((5.0,), (2.0,))),)

    def recipe(array: Any, spacing: Any) -> Ready:
        raw = np.ascontiguousarray(array, dtype=np.float32)
        return Ready(raw, apply_steps(raw, step), (0.0,) * 3, (1.0,) * 3, step)

    prepared = prepare(scan, model(**spec, recipe=recipe), at="ijk:1,4,4")
    assert prepared.beside is not None
    assert prepared.beside.sum() == 3 * 49
    assert (prepared.network_input()[0][prepared.beside] == 0).all()
    reference = np.full_like(prepared.raw, 9.0)
    made = prepared.network_input(reference)[0]
    assert (made[prepared.beside] == 0).all()
    assert (made[~prepared.beside] == 2).all()


# ---------------------------------------------------------------------------------------- points

GRID = Geometry((20, 30, 40), affine_of("LPS", (0.7, 0.7, 2.5), (100, 120, -80)))


def test_the_three_ways_to_name_a_point_agree() -> None:
    ras = GRID.world_ras((4, 9, 33))
    x, y, z = ras.tolist()
    for text in ("ijk:4,9,33", f"ras:{x},{y},{z}", f"lps:{-x},{-y},{z}"):
        assert parse_point(text, GRID) == pytest.approx(ras)


def test_a_point_in_voxels_counts_in_the_files_order() -> None:
    assert parse_point("ijk:0,0,0", GRID) == pytest.approx((100, 120, -80))


@pytest.mark.parametrize(
    "text",
    [
        "4,9,33",
        "ras:1,2",
        "ras:1,2,3,4",
        "ras:a,b,c",
        "xyz:1,2,3",
        "ijk:nan,0,0",
        "ras:",
        "",
        "ijk",
    ],
)
def test_no_point(text: str) -> None:
    with pytest.raises(UsageError, match="expected a point as ras:X,Y,Z or lps:X,Y,Z in mm"):
        parse_point(text, GRID)


@pytest.mark.parametrize("text", ["ijk:20,0,0", "ijk:-1,0,0", "ras:0,0,500", "lps:100,120,-80"])
def test_a_point_outside_the_scan(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"expected a point inside the scan \(voxels 0,0,0 to 19,29,39"
    ):
        parse_point(text, GRID)


@given(grids(turned=30, most=20))
def test_the_range_a_message_names_holds_the_whole_scan(grid: Geometry) -> None:
    with pytest.raises(UsageError, match="inside the scan") as caught:
        parse_point("ras:9999,9999,9999", grid)
    numbers = str(caught.value).partition("RAS about ")[2].partition(" mm")[0]
    low, high = (np.array(eval(part)) for part in numbers.split(" to "))
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in grid.shape], indexing="ij"), axis=-1)
    points = grid.world_ras(corners.reshape(-1, 3))
    assert (points >= low - 0.51).all()
    assert (points <= high + 0.51).all()
