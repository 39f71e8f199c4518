"""Do colours say what the scale says: none below the floor, one per density, and no ringing?"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from med_gradcam import paint
from med_gradcam.calibration import Calibration
from med_gradcam.errors import UnknownNameError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.volume import Volume

SCALE = Calibration("t", "m", "l", 2.0, 0.5, 9)


def scan(
    array: npt.NDArray[Any], unit: str = "HU", window: tuple[float, float] | None = None
) -> Volume:
    shape = array.shape
    grid = Geometry((shape[0], shape[1], shape[2]), np.eye(4))
    return Volume(array[None], grid, "CT" if unit == "HU" else "MR", unit, window=window)


def test_below_the_floor_nothing_is_coloured() -> None:
    density = np.array([-1.0, 0.0, 0.1, 0.49999, 0.5, 1.0, 2.0, 9.0], dtype=np.float32)
    alpha = paint.opacity(density, SCALE)
    assert (alpha[:4] == 0).all()
    assert (alpha[4:] > 0).all()
    assert (np.diff(alpha) >= 0).all()
    assert alpha[6] == alpha[7] == pytest.approx(paint.OPACITY[1])
    backdrop = np.full((1, 8), 77, dtype=np.uint8)
    for side in paint.RAMPS:
        picture = paint.blend(backdrop, {side: density[None]}, SCALE)
        assert (picture[0, :4] == 77).all()
        assert (picture[0, 4:] != 77).any(axis=-1).all()
    assert (paint.rgba(density, "for", SCALE)[:4, 3] == 0).all()


def test_a_floor_of_zero_leaves_zero_transparent() -> None:
    scale = Calibration("t", "m", "l", 1.0, 0.0, 3)
    assert paint.opacity([0.0, 1e-6], scale).tolist() == [0.0, pytest.approx(0.25, abs=1e-4)]


def test_a_floor_at_the_peak_is_a_plain_threshold() -> None:
    scale = Calibration("t", "m", "l", 1.0, 1.0, 3)
    np.testing.assert_allclose(paint.opacity([0.9, 1.0, 5.0], scale), (0, 0.85, 0.85), rtol=1e-6)


def test_one_scale_gives_one_colour_whatever_else_the_case_holds() -> None:
    quiet, loud = np.full((2, 2), 1.1, np.float32), np.array([[1.1, 50], [3, 0]], np.float32)
    backdrop = np.full((2, 2), 60, dtype=np.uint8)
    a = paint.blend(backdrop, {"for": quiet}, SCALE)[0, 0]
    b = paint.blend(backdrop, {"for": loud}, SCALE)[0, 0]
    np.testing.assert_array_equal(a, b)


def test_for_is_orange_against_is_blue_and_neither_hides_the_other() -> None:
    backdrop = np.full((1, 1), 60, dtype=np.uint8)
    one = np.full((1, 1), 2.0, dtype=np.float32)
    red, _, blue = paint.blend(backdrop, {"for": one}, SCALE)[0, 0].astype(int)
    assert red > blue + 60
    red, _, blue = paint.blend(backdrop, {"against": one}, SCALE)[0, 0].astype(int)
    assert blue > red + 60
    weak = np.full((1, 1), 1.2, dtype=np.float32)
    both = paint.blend(backdrop, {"for": one, "against": weak}, SCALE)[0, 0].astype(int)
    alone = paint.blend(backdrop, {"for": one}, SCALE)[0, 0].astype(int)
    assert both[2] > alone[2] + 15  # the weaker sign still shows
    swapped = paint.blend(backdrop, {"for": weak, "against": one}, SCALE)[0, 0].astype(int)
    assert swapped[2] > both[2]


def test_no_evidence_leaves_the_scan_grey() -> None:
    backdrop = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = paint.blend(backdrop, {}, SCALE)
    np.testing.assert_array_equal(picture, np.repeat(backdrop[..., None], 3, axis=-1))


def test_the_ramps_are_bright_enough_to_read_on_dark_grey() -> None:
    for side, level in itertools.product(paint.RAMPS, (0.5, 2.0)):
        red, green, blue = paint.colour(np.array(level), side, SCALE).tolist()
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue > 95, (side, level)


def test_windows_map_their_ends_to_black_and_white() -> None:
    lung = paint.window_named("lung")
    assert (lung.low, lung.high) == (-1350, 150)
    assert paint.grey([-2000, -1350, -600, 150, 900], lung).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(UnknownNameError, match="window, got 'lungs'"):
        paint.window_named("lungs")
    with pytest.raises(UsageError, match="width above 0"):
        paint.Window(0, 0, "none")


def test_ct_windows_follow_the_files_own_then_what_is_shown() -> None:
    air = np.full((6, 6, 6), -850, dtype=np.int16)
    flesh = np.full((6, 6, 6), 50, dtype=np.int16)
    assert paint.window_for(scan(air)).name == "lung"
    assert paint.window_for(scan(flesh)).name == "soft tissue"
    assert paint.window_for(scan(flesh), shown=air).name == "lung"
    own = paint.window_for(scan(air, window=(70.0, 150.0)))
    assert (own.centre, own.width) == (70, 150)
    few = flesh.copy()
    few[0] = -850  # 17 % of the voxels
    assert paint.window_for(scan(few)).name == "soft tissue"
    room_air = np.full((6, 6, 6), -1000, dtype=np.int16)
    assert paint.window_for(scan(room_air)).name == "soft tissue"


def test_an_mr_window_ignores_the_background_and_a_hot_spot() -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((30, 30, 30), dtype=np.float32)
    array[8:22, 8:22, 8:22] = rng.uniform(300, 900, (14, 14, 14))
    array[10, 10, 10] = 1e5
    window = paint.window_for(scan(array, "a.u."))
    assert 850 < window.high < 950
    assert 0 <= window.low < 310
    flat = paint.window_for(scan(np.full((3, 3, 3), 4.0, dtype=np.float32), "a.u."))
    assert flat.width > 0


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=12, max_size=12),
    st.floats(0.3, 4.0),
    st.sampled_from((0, 1)),
)
def test_resampling_never_rings(values: list[float], square_mm: float, order: int) -> None:
    picture = np.array(values, dtype=np.float32).reshape(3, 4)
    drawn = paint.resample(picture, (1.3, 0.7), square_mm, order=order)
    assert drawn.min() >= picture.min() - 1e-5
    assert drawn.max() <= picture.max() + 1e-5


def test_resampling_makes_square_pixels_and_keeps_places() -> None:
    ramp = np.repeat(np.arange(10, dtype=np.float32)[:, None], 20, axis=1)
    drawn = paint.resample(ramp, (3.0, 1.0), 0.5)
    assert drawn.shape == (60, 40)
    # Pixel 32 of the fine picture has its centre at 16.25 mm; coarse centres lie at 1.5 + 3 n mm.
    assert drawn[32, 0] == pytest.approx((16.25 - 1.5) / 3.0, abs=1e-5)
    small = paint.resample(ramp, (3.0, 1.0), 6.0)
    assert small.shape == (5, 3)
    assert np.diff(small[:, 0]) == pytest.approx(np.full(4, 2.0), abs=0.35)


def test_sampling_knows_where_the_picture_ends() -> None:
    picture = np.full((3, 3), 7.0, dtype=np.float32)
    at = np.array((-0.75, -0.5, 0.0, 2.5, 2.75))
    drawn = paint.sample(picture, at, at, outside=-1.0)
    assert drawn[1:4, 1:4] == pytest.approx(7.0)
    assert (drawn[[0, -1]] == -1).all()
    eye = np.eye(3, dtype=np.float32)
    nearest = paint.sample(eye, np.array([0.4, 1.2]), np.array([0.4]), order=0)
    assert nearest.tolist() == [[1.0], [0.0]]
    with pytest.raises(UsageError, match="order of 0"):
        paint.sample(picture, at, at, order=3)
