"""Is a volume what it says it is, and is everything else refused with a reason?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from med_gradcam.errors import ImageError, InputError
from med_gradcam.geometry import Geometry
from med_gradcam.provenance import Provenance, Source
from med_gradcam.volume import Volume, digest

GRID = Geometry((2, 3, 4), np.eye(4))


def make(array: Any, **changes: Any) -> Volume:
    return Volume(array, changes.pop("grid", GRID), **changes)


def test_a_volume_keeps_its_voxels_and_cannot_be_written_to() -> None:
    array = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    volume = make(array, modality="CT", unit="HU")
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array, array)
    with pytest.raises(ValueError, match="read-only"):
        volume.array[0, 0, 0, 0] = 1
    array[0, 0, 0, 0] = 9  # the caller's own array stays the caller's to write
    assert array.flags.writeable


def test_the_digest_tells_voxels_and_places_apart() -> None:
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    volume = make(array)
    assert volume.source.kind == "array"
    assert volume.source.sha256 == digest(array, GRID) == digest(np.array(array, order="F"), GRID)
    moved = Geometry((2, 3, 4), np.diag([1.0, 1.0, 2.0, 1.0]))
    assert digest(array, moved) != volume.source.sha256
    assert digest(array + 1, GRID) != volume.source.sha256


@pytest.mark.parametrize(
    ("array", "changes", "says"),
    [
        (np.zeros((2, 3, 4)), {}, r"expected an array \(C, I, J, K\) .* got \(2, 3, 4\)"),
        (np.zeros((1, 2, 3, 5)), {}, r"on a grid \(2, 3, 4\), got \(1, 2, 3, 5\)"),
        (np.zeros((0, 2, 3, 4)), {}, "at least one channel"),
        (np.zeros((1, 2, 3, 4), complex), {}, "real numbers as voxels, got dtype complex128"),
        (np.zeros((1, 2, 3, 4), bool), {}, "got dtype bool"),
        (np.zeros((1, 2, 3, 4)), {"unit": "mm"}, "expected a unit of HU, a.u., RGB, got 'mm'"),
    ],
)
def test_no_volume(array: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        make(array, **changes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxels_that_are_no_numbers(bad: float, dtype: Any) -> None:
    array = np.zeros((1, 2, 3, 4), dtype)
    array[0, 1, 2, 3] = bad
    with pytest.raises(
        ImageError, match=r"got 1 NaN or infinite ones, the first at \(0, 1, 2, 3\)"
    ):
        make(array)


def test_infinities_of_both_signs_are_refused_without_a_warning() -> None:
    array = np.zeros((1, 2, 3, 4), np.float32)
    array[0, 0, 0, :2] = np.inf, -np.inf
    with pytest.raises(ImageError, match="got 2 NaN or infinite ones"):
        make(array)


def test_huge_finite_voxels_are_finite() -> None:
    make(np.full((1, 2, 3, 4), 1e308))


def test_a_source_of_an_unknown_kind() -> None:
    with pytest.raises(InputError, match="source kind nifti, dicom or array, got 'web'"):
        Source("web", "")


def test_a_time_without_its_zone() -> None:
    with pytest.raises(InputError, match="UTC time that ends in Z, got '2026-01-01T00:00:00'"):
        Provenance({}, {}, (), "", "tiny", utc="2026-01-01T00:00:00")


def test_a_volume_without_a_modality_is_taken_as_the_model_s() -> None:
    from med_gradcam.volume import taken_as

    plain = Volume(np.ones((1, 2, 2, 2)), Geometry((2, 2, 2), np.eye(4)))
    assert (taken_as(plain, "CT").modality, taken_as(plain, "CT").unit) == ("CT", "HU")
    assert taken_as(plain, "MR").unit == "a.u."
    assert taken_as(plain, None) is plain
    known = Volume(np.ones((1, 2, 2, 2)), Geometry((2, 2, 2), np.eye(4)), "MR")
    assert taken_as(known, "CT") is known
