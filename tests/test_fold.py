"""Do the maps of several layers become one map without losing or moving any evidence?"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from med_gradcam.capture import Capture
from med_gradcam.explanation import Cells
from med_gradcam.fold import Map, fold, together
from med_gradcam.geometry import Geometry, cells
from med_gradcam.methods import Evidence
from med_gradcam.tail import Tail

Values = npt.NDArray[np.float64]
VOXELS = (12, 10, 14)
# A scan that lies askew, with voxels that are no cubes.
AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1.0]])
IMAGE = Geometry(VOXELS, AFFINE)


def _grid(jump: float, start: float, count: int | tuple[int, int, int]) -> Geometry:
    shape = (count,) * 3 if isinstance(count, int) else count
    return cells(IMAGE, (jump,) * 3, (start,) * 3, shape)


def _random(grid: Geometry, seed: int = 0) -> Values:
    return np.random.default_rng(seed).standard_normal(grid.shape)


def _centre_ras(values: Values, grid: Geometry) -> Values:
    index = np.argwhere(np.ones(values.shape, dtype=bool))
    weights = np.abs(values).ravel()
    found: Values = (grid.world_ras(index) * weights[:, None]).sum(0) / weights.sum()
    return found


def test_one_map_stays_as_it_is() -> None:
    grid = _grid(2, 0.5, (6, 5, 7))
    values = _random(grid)
    made, finest = fold([(values, grid)])
    assert np.array_equal(made, values)
    assert finest == 0


def test_maps_on_the_same_cells_are_added() -> None:
    grid = _grid(2, 0.5, (6, 5, 7))
    one, other = _random(grid, 0), _random(grid, 1)
    made, _ = fold([(one, grid), (other, grid)])
    assert np.array_equal(made, one + other)


def test_the_maps_that_were_given_stay() -> None:
    fine, coarse = _grid(1, 0, VOXELS), _grid(4, 1.5, (3, 2, 3))
    one, other = _random(fine, 0), _random(coarse, 1)
    before = one.copy(), other.copy()
    fold([(one, fine), (other, coarse)])
    assert np.array_equal(one, before[0])
    assert np.array_equal(other, before[1])


@pytest.mark.parametrize("turn", [1, -1])
def test_the_finest_cells_are_taken_whatever_the_order(turn: int) -> None:
    parts = [
        (_random(grid, n), grid)
        for n, grid in enumerate((_grid(4, 1.5, (3, 2, 3)), _grid(2, 0.5, (6, 5, 7))))
    ]
    made, finest = fold(parts[::turn])
    assert made.shape == (6, 5, 7)
    assert parts[::turn][finest][1].shape == (6, 5, 7)
    again, _ = fold(parts)
    assert np.allclose(made, again, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    jumps=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=2, max_size=4),
    start=st.floats(-4, 6),
    seed=st.integers(0, 99),
)
def test_nothing_is_lost(jumps: list[int], start: float, seed: int) -> None:
    """Whatever lies where: cells beside the finest ones give to the nearest of these."""
    grids = [_grid(jump, start * (n > 0), max(1, 12 // jump)) for n, jump in enumerate(jumps)]
    parts = [(_random(grid, seed + n), grid) for n, grid in enumerate(grids)]
    made, _ = fold(parts)
    wanted = sum(float(values.sum()) for values, _ in parts)
    size = sum(float(np.abs(values).sum()) for values, _ in parts)
    assert float(made.sum()) == pytest.approx(wanted, abs=1e-6 * size)


def test_cells_that_touch_no_finer_one_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: what lies outside is left out."""
    fine, coarse = _grid(1, 0, 4), _grid(4, 1.5, 3)
    parts = [(np.zeros(fine.shape), fine), (np.ones(coarse.shape), coarse)]
    assert float(fold(parts)[0].sum()) == pytest.approx(27)
    monkeypatch.setattr(np, "argwhere", lambda _: np.empty((0, 3), dtype=int))
    assert float(fold(parts)[0].sum()) == pytest.approx(8)


@pytest.mark.parametrize("cell", [(1, 1, 1), (0, 1, 2), (2, 0, 1)])
def test_a_coarse_cell_s_evidence_stays_about_its_own_centre(cell: tuple[int, int, int]) -> None:
    fine, coarse = _grid(1, 0, VOXELS), _grid(4, 1.5, (3, 3, 3))
    values = np.zeros(coarse.shape)
    values[cell] = -2.5
    made, _ = fold([(np.zeros(fine.shape), fine), (values, coarse)])
    assert (made <= 0).all(), "no sign but its own"
    assert float(made.sum()) == pytest.approx(-2.5, rel=1e-6)
    reach = np.argwhere(made)
    assert (np.abs(reach - (1.5 + 4 * np.array(cell))) < 4).all()
    if cell == (1, 1, 1):  # away from the border the spread is even on both sides
        apart = _centre_ras(made, fine) - coarse.world_ras(cell)
        assert np.abs(apart).max() < 1e-5


def test_what_lies_outside_goes_to_the_nearest_cell() -> None:
    fine = _grid(1, 0, 4)
    coarse = _grid(4, 1.5, 3)  # the third cell along each axis lies at 9.5, far outside
    values = np.zeros(coarse.shape)
    values[2, 0, 0] = 3.0
    made, _ = fold([(np.zeros(fine.shape), fine), (values, coarse)])
    assert made[3, 2, 2] == pytest.approx(3.0)
    assert np.count_nonzero(made) == 1


def test_an_even_density_stays_even() -> None:
    fine, coarse = _grid(1, 0, 12), _grid(3, 1, 4)
    made, _ = fold([(np.zeros(fine.shape), fine), (np.ones(coarse.shape), coarse)])
    assert np.allclose(made, 1 / 27, rtol=1e-5)


# ------------------------------------------------------------------------------ the whole of it


def _map(layer: str, grid: Geometry, jump: float, seed: int) -> Map:
    activation = torch.zeros(1, *grid.shape)
    tail = Tail(torch.nn.Identity(), layer, torch.zeros(1, 1, *VOXELS), ())
    capture = Capture(layer, activation, cast("Any", None), 7.0, tail, reference_score=1.0)
    place = Cells((jump,) * 3, (0.0,) * 3, (jump,) * 3, "exact")
    return Map(capture, place, _random(grid, seed), grid)


def _cut() -> list[Map]:
    return [
        _map("deep", _grid(4, 1.5, (3, 2, 3)), 4, 0),
        _map("top", _grid(1, 0, VOXELS), 1, 1),
        _map("middle", _grid(2, 0.5, (6, 5, 7)), 2, 2),
    ]


def _evidence(maps: list[Map]) -> dict[str, Evidence]:
    return {m.capture.layer: Evidence(torch.from_numpy(m.values), 1.0) for m in maps}


def test_a_cut_says_what_each_layer_carries() -> None:
    maps = _cut()
    made = together(maps, _evidence(maps))
    assert [(p.layer, p.jump) for p in made.parts] == [
        ("deep", (4,) * 3),
        ("top", (1,) * 3),
        ("middle", (2,) * 3),
    ]
    assert [p.net for p in made.parts] == [float(m.values.sum()) for m in maps]
    assert made.capture.layer == maps[1].capture.layer == "top"
    assert made.cells == maps[1].cells
    assert made.grid == maps[1].grid
    assert float(made.values.sum()) == pytest.approx(sum(p.net for p in made.parts), abs=1e-4)


def test_what_a_cut_leaves_out_is_the_score_less_its_parts() -> None:
    maps = _cut()
    made = together(maps, _evidence(maps))
    assert made.total.start_score == pytest.approx(7.0 - sum(p.net for p in made.parts), abs=1e-9)
    assert made.total.converged


def test_a_single_layer_has_no_parts() -> None:
    maps = _cut()[:1]
    evidence = _evidence(maps)
    made = together(maps, evidence)
    assert not made.parts
    assert made.values is maps[0].values
    assert made.total is evidence["deep"]
