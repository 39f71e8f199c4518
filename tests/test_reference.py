"""Is the reference the tissue it says it is, in the scan's own unit?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.prepare import Prepared
from med_gradcam.reference import build, foreground, from_scan, grain


def prepared(raw: npt.ArrayLike) -> Prepared:
    array = np.asarray(raw, dtype=np.float32)
    array = array[None] if array.ndim == 3 else array
    i, j, k = array.shape[1:]
    grid = Geometry((i, j, k), np.eye(4))
    return Prepared(array, grid, grid, ())


def ct(lung_share: float) -> npt.NDArray[np.float32]:
    """1000 voxels: a share of lung around -800, the rest soft tissue around 40 and some bone."""
    values = np.full(1000, 900.0)
    lung = round(1000 * lung_share)
    values[:lung] = np.linspace(-850, -750, lung) if lung else 0
    values[lung : lung + 150] = np.linspace(20, 60, 150)
    return np.random.default_rng(0).permutation(values).reshape(10, 10, 10).astype(np.float32)


@pytest.mark.parametrize(
    ("share", "value", "words"),
    [
        (0.8, -800, "uniform lung"),
        (0.20, -800, "uniform lung"),
        (0.199, 40, "uniform soft tissue"),
        (0.0, 40, "uniform soft tissue"),
    ],
)
def test_lung_where_a_fifth_is_lung_else_soft_tissue(
    share: float, value: float, words: str
) -> None:
    made = build("auto", prepared(ct(share)), "CT", "HU")
    assert made.reference.kind == "tissue"
    assert made.reference.value == pytest.approx(value, abs=0.5)
    assert made.reference.words == f"{words} ({value} HU)"
    assert made.raw.dtype == np.float32
    assert np.unique(made.raw) == pytest.approx([made.reference.value])
    assert 5 < made.noise[0] < 40


def test_a_ct_of_neither_lung_nor_soft_tissue_takes_its_median() -> None:
    raw = np.linspace(500, 1500, 125).reshape(5, 5, 5)
    made = build("tissue", prepared(raw), "CT", "HU")
    assert made.reference.value == pytest.approx(1000, abs=1)
    assert made.reference.words == "uniform tissue (1000 HU)"


def head() -> npt.NDArray[np.float32]:
    raw = np.zeros((12, 12, 12), dtype=np.float32)
    raw[3:9, 3:9, 3:9] = np.random.default_rng(1).normal(100, 5, (6, 6, 6))
    return raw


def test_mr_is_uniform_inside_and_unchanged_outside() -> None:
    raw = head()
    made = build("auto", prepared(raw), "MR", "a.u.")
    inside = raw > 0
    assert made.reference.value == pytest.approx(float(np.median(raw[inside])))
    assert np.unique(made.raw[0][inside]) == pytest.approx([made.reference.value])
    assert np.array_equal(made.raw[0][~inside], raw[~inside])
    assert made.noise[0] == pytest.approx(5, rel=0.3)


def test_mr_with_noise_in_the_air_is_told_by_otsu() -> None:
    raw = head()
    raw += np.abs(np.random.default_rng(2).normal(0, 3, raw.shape)).astype(np.float32)
    assert np.array_equal(foreground(raw), head() > 50)


def test_one_constant_channel_among_others_is_left_as_it_is() -> None:
    raw = np.stack([head(), np.full((12, 12, 12), 3.0, np.float32)])
    made = build("auto", prepared(raw), "MR", "a.u.")
    assert np.isfinite(made.raw).all()
    assert (made.raw[1] == 3).all()
    assert np.isfinite(made.noise).all()


def test_each_channel_has_a_value_of_its_own() -> None:
    made = build("tissue", prepared(np.stack([ct(0.8), ct(0.0)])), "CT", "HU")
    assert made.raw[0, 0, 0, 0] == pytest.approx(-800, abs=0.5)
    assert made.raw[1, 0, 0, 0] == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize(("kind", "value"), [("zero", 0.0), ("value:-700", -700.0)])
def test_a_value_of_the_users(kind: str, value: float) -> None:
    made = build(kind, prepared(ct(0.5)), "CT", "HU")
    assert (made.raw == value).all()
    assert made.reference.kind == kind.partition(":")[0]
    assert made.reference.value == value
    assert made.reference.words == f"a uniform input of {value:g} HU"


def test_auto_without_a_modality_is_zero() -> None:
    assert build("auto", prepared(ct(0.5)), None, "a.u.").reference.kind == "zero"


@pytest.mark.parametrize("kind", ["air", "value:", "value:x", "value:nan", "value:inf", "values:3"])
def test_no_reference(kind: str) -> None:
    with pytest.raises(UsageError, match="expected a reference of auto, tissue, zero, value:X or"):
        build(kind, prepared(ct(0.5)), "CT", "HU")


def test_tissue_of_an_unknown_modality() -> None:
    with pytest.raises(UsageError, match="CT or MR for --reference tissue, got modality PT"):
        build("tissue", prepared(ct(0.5)), "PT", "a.u.")


@pytest.mark.parametrize("kind", ["auto", "zero", "value:3"])
@pytest.mark.parametrize("modality", ["CT", "MR", None])
def test_a_constant_scan_is_refused(kind: str, modality: str | None) -> None:
    with pytest.raises(
        CannotExplainError, match=r"the scan is constant .-800 everywhere"
    ) as caught:
        build(kind, prepared(np.full((4, 4, 4), -800.0)), modality, "HU")
    assert caught.value.reason == "constant volume"


def test_a_reference_scan_must_fit() -> None:
    scan = prepared(ct(0.5))
    made = from_scan(prepared(ct(0.4)), scan)
    assert made.reference.kind == "file"
    assert made.reference.value is None
    with pytest.raises(UsageError, match=r"same size as the scan \(1, 10, 10, 10\), got \(1, 2, 2"):
        from_scan(prepared(np.zeros((1, 2, 2, 2))), scan)
    moved = np.eye(4)
    moved[0, 3] = 100.0
    grid = Geometry(scan.grid.shape, moved)
    elsewhere = Prepared(scan.raw, grid, grid, ())
    with pytest.raises(UsageError, match=r"lies 100\.0 mm off"):
        from_scan(elsewhere, scan)


def test_the_grain_is_the_noise_and_not_the_anatomy() -> None:
    random = np.random.default_rng(3)
    anatomy = np.linspace(-500, 500, 40)[None, None, :] * np.ones((20, 20, 1))
    noisy: Any = (anatomy + random.normal(0, 12, anatomy.shape)).astype(np.float32)
    assert grain(noisy) == pytest.approx(12, rel=0.1)
    assert grain(noisy[..., :1]) == 0.0


def test_dark_places_inside_the_head_are_filled_too() -> None:
    head = np.zeros((12, 12, 12), np.float32)
    head[2:10, 2:10, 2:10] = np.random.default_rng(5).normal(500, 20, (8, 8, 8))
    head[5:7, 5:7, 5:7] = 0.0  # a dark lesion, as dark as air
    made = build("tissue", prepared(head), "MR", "a.u.")
    assert made.raw[0, 5, 5, 5] == pytest.approx(500, abs=20)
    assert made.raw[0, 0, 0, 0] == 0.0
