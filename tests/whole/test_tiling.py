"""Are the windows, their weights and what is stitched from them those of MONAI?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.tiling import (
    Lattice,
    importance,
    lattice_shape,
    resized,
    tiles,
    total,
)

SIZES = st.tuples(*[st.integers(1, 40)] * 3)


@settings(max_examples=60, deadline=None)
@given(shape=SIZES, window=SIZES, overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9]))
def test_positions_are_those_of_monai(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float
) -> None:
    from monai.data.utils import dense_patch_slices
    from monai.inferers.utils import _get_scan_interval

    image = tuple(max(a, b) for a, b in zip(shape, window, strict=True))
    step = _get_scan_interval(image, window, 3, (overlap,) * 3)
    want = [[s.start for s in row] for row in dense_patch_slices(image, window, step)]
    before = [(a - b) // 2 for a, b in zip(image, shape, strict=True)]
    found = tiles(shape, window, overlap)
    assert [[s + b for s, b in zip(start, before, strict=True)] for start in found.starts] == want


@pytest.mark.parametrize("kind", ["constant", "gaussian"])
@pytest.mark.parametrize("window", [(96, 96, 96), (8, 32, 5), (1, 7, 64)])
def test_the_importance_is_that_of_monai(kind: str, window: tuple[int, int, int]) -> None:
    from monai.data.utils import compute_importance_map

    want = compute_importance_map(window, mode=kind).numpy()
    found = importance(window, kind)  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert np.abs(found - want).max() < 1e-6
    assert found.min() == pytest.approx(want.min(), rel=1e-5)  # the clamped corner


def test_a_map_of_another_size_has_the_nearest_weights() -> None:
    weights = importance((8, 6, 4), "gaussian")
    want = torch.nn.functional.interpolate(
        torch.from_numpy(weights)[None, None], (4, 3, 8), mode="nearest-exact"
    )[0, 0].numpy()
    assert np.array_equal(resized(weights, (4, 3, 8)), want)


def test_every_voxel_is_covered() -> None:
    tiled = tiles((17, 9, 30), (8, 12, 7), 0.3)
    covered = total(tiled, importance(tiled.window, "constant"), np.zeros(tiled.shape))
    assert covered.min() >= 1


def test_windows_of_a_smaller_output_must_begin_on_its_voxels() -> None:
    tiled = tiles((20, 20, 20), (8, 8, 8), 0.5)
    assert tiled.scaled((4, 4, 4)).starts[1] == (0, 0, 2)
    with pytest.raises(CannotExplainError, match="multiple of the network's stride"):
        tiles((20, 20, 20), (8, 8, 8), 0.3).scaled((4, 4, 4))  # a step of 5


@pytest.mark.parametrize(
    ("window", "overlap", "words"),
    [
        ((8, 8), 0.5, "three whole numbers"),
        ((8, 0, 8), 0.5, "three whole numbers"),
        ((8, 8, 2.5), 0.5, "three whole numbers"),
        ((8, 8, 8), 1.0, "below 1"),
        ((8, 8, 8), (0.5, 0.5), "one number or three"),
    ],
)
def test_what_is_no_window_is_refused(window: tuple[int, ...], overlap: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiles((20, 20, 20), window, overlap)
    with pytest.raises(UsageError, match="constant or gaussian"):
        importance((4, 4, 4), "flat")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- the lattice


@settings(max_examples=40, deadline=None)
@given(
    first=st.tuples(*[st.floats(0, 6)] * 3), jump=st.tuples(*[st.floats(0.5, 4)] * 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_window_keeps_its_sum_and_centre_of_mass_on_the_lattice(
    first: tuple[float, float, float], jump: tuple[float, float, float], seed: int
) -> None:
    lattice = Lattice((0.0, 0.0, 0.0), jump, np.zeros((20, 20, 20)))
    values = np.random.default_rng(seed).normal(size=(3, 4, 2))
    lattice.add(values, first)
    assert lattice.values.sum() == pytest.approx(values.sum(), abs=1e-9)
    for axis in range(3):
        own = first[axis] + jump[axis] * np.arange(values.shape[axis])
        grid = jump[axis] * np.arange(20)
        others = tuple(a for a in range(3) if a != axis)
        want = (values.sum(axis=others) * own).sum()
        assert (lattice.values.sum(axis=others) * grid).sum() == pytest.approx(want, abs=1e-6)


def test_cells_on_the_lattice_stay_where_they_are() -> None:
    tiled = tiles((20, 20, 20), (8, 8, 8), 0.5)  # steps of 4 voxels
    start, shape = lattice_shape(tiled, (0.5, 0.5, 0.5), (2.0, 2.0, 2.0), (4, 4, 4))
    assert start == (0.5, 0.5, 0.5)
    assert shape == (10, 10, 10)
    lattice = Lattice(start, (2.0, 2.0, 2.0), np.zeros(shape))
    lattice.add(np.ones((4, 4, 4)), (4.5, 0.5, 12.5))
    assert lattice.between == 0
    assert lattice.values[2:6, 0:4, 6:10].sum() == 64 == lattice.values.sum()
    start, shape = lattice_shape(
        tiles((21, 20, 20), (8, 8, 8), 0.5), (0.5,) * 3, (2.0,) * 3, (4,) * 3
    )
    assert shape == (11, 10, 10)  # the last window begins at 13, between two cells
