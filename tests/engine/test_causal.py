"""Does the causal choice take the layer whose map tells what the model really does?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from med_gradcam.explanation import Reference
from med_gradcam.geometry import Geometry, cells
from med_gradcam.maps import drawing
from med_gradcam.metrics import causal
from med_gradcam.metrics.causal import CandidateMap, Choice
from med_gradcam.prepare import Prepared
from med_gradcam.reference import ReferenceInput
from tests.engine import nets

SIZE = 24
GRID = Geometry((SIZE, SIZE, SIZE), np.diag([2.0, 2.0, 2.0, 1.0]))
Values = npt.NDArray[np.float64]


class World:
    """A linear model: the score is sum(weight * scan), so that every effect is known by hand."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.raw = nets.scan(SIZE, seed)
        self.weight = generator.standard_normal((SIZE,) * 3)
        at = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"))
        for centre, sign in (((7, 7, 7), 30.0), ((17, 16, 15), -30.0)):
            near = ((at - np.array(centre)[:, None, None, None]) ** 2).sum(0) < 9
            self.weight[near] += sign
        self.evidence = self.weight * self.raw[0]
        self.prepared = Prepared(self.raw, GRID, GRID, ())
        self.reference = ReferenceInput(
            np.zeros_like(self.raw), Reference("zero", 0.0, "zero"), (0.0,)
        )
        self.calls = 0

    def score(self, array: npt.NDArray[np.float32]) -> float:
        self.calls += 1
        return float((self.weight * array[0]).sum())

    def choose(self, factors: Sequence[float], seed: int = 0, flat: bool = False) -> Choice:
        maps = [
            CandidateMap(f"layer{n}", factor * self.evidence, GRID)
            for n, factor in enumerate(factors)
        ]
        here = float(self.evidence.sum())
        score = (lambda _a: here) if flat else self.score
        return causal.choose(
            maps, self.prepared, self.reference, (score, here, 0.02 * abs(here)), seed
        )


def test_a_map_that_tells_the_truth_has_slope_one() -> None:
    world = World()
    choice = world.choose([1.0])
    assert choice.trials[0].slope == pytest.approx(1.0, rel=1e-4)
    assert choice.trials[0].r == pytest.approx(1.0, abs=1e-6)
    for region in choice.regions:
        assert region.net == pytest.approx(region.effect, rel=1e-3, abs=0.05)
    assert choice.note == ""


def test_twelve_forwards_six_regions() -> None:
    world = World()
    choice = world.choose([1.0, 0.5, 0.1])
    assert world.calls == 12
    up, low = ["top raising"] * 2, ["top lowering"] * 2
    assert [r.chosen for r in choice.regions] == [*up, *low, "random", "random"]
    assert choice.regions[0].effect > 50
    assert choice.regions[2].effect < -50
    assert choice.regions[1].radius_mm == pytest.approx(1.5 * choice.regions[0].radius_mm)
    assert choice.regions[1].centre_ras_mm == choice.regions[0].centre_ras_mm


def test_regions_lie_where_the_map_raises_and_lowers_most() -> None:
    raising, _, lowering = World().choose([1.0]).regions[:3]
    assert np.abs(np.array(raising.centre_ras_mm) / 2 - (7, 7, 7)).max() <= 2
    assert np.abs(np.array(lowering.centre_ras_mm) / 2 - (17, 16, 15)).max() <= 2


@pytest.mark.parametrize(
    ("factors", "winner"),
    [
        ([0.12, 0.9, 2.0], "layer1"),  # nearest 1
        ([0.12, 1.6, 0.7], "layer2"),
        ([0.95, 1.0, 1.0], "layer0"),  # a tie goes to the coarser, which comes first
        ([1.06, 1.0, 0.9], "layer1"),
        ([-1.0, 0.3, 0.2], "layer1"),  # a wrong sign is further away than too little
    ],
)
def test_the_slope_nearest_one_wins_and_ties_go_to_the_coarser(
    factors: list[float], winner: str
) -> None:
    choice = World().choose(factors)
    assert choice.layer == winner
    for trial, factor in zip(choice.trials, factors, strict=True):
        assert trial.slope == pytest.approx(factor, rel=1e-3)
    chosen = factors[int(winner[-1])]
    assert [r.net / r.effect for r in choice.regions[:2]] == pytest.approx([chosen] * 2, rel=0.01)


def test_a_map_that_tells_little_is_taken_with_a_warning() -> None:
    choice = World().choose([0.2, 0.5])
    assert choice.layer == "layer1"
    assert "names 50% of what the score really changes" in choice.note


@pytest.mark.parametrize(
    ("count", "fallback"), [(1, "layer0"), (2, "layer0"), (3, "layer1"), (4, "layer2")]
)
def test_without_any_effect_the_second_finest_is_taken_and_told(count: int, fallback: str) -> None:
    choice = World().choose([1.0] * count, flat=True)
    assert choice.layer == fallback
    assert "no tested region moves the score" in choice.note


def test_the_same_seed_gives_the_same_choice_and_another_other_regions() -> None:
    one, again, other = World().choose([1.0]), World().choose([1.0]), World().choose([1.0], seed=1)
    assert one.regions == again.regions
    assert one.regions[4:] != other.regions[4:]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0)])
def test_regions_do_not_overlap_and_stay_inside(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    grid = Geometry((32, 30, 20), np.diag([*spacing, 1.0]))
    evidence = np.random.default_rng(seed).standard_normal(grid.shape)
    radius = causal.radius_for(grid, grid)
    picked = causal.pick_regions([CandidateMap("a", evidence, grid)], grid, radius, seed)
    assert len(picked) >= 2
    assert {one.radius_mm for one in picked} <= {radius, causal.WIDER * radius}
    for a, b in itertools.combinations(picked, 2):
        if a.centre != b.centre and a.radius_mm == b.radius_mm == radius:
            both = [causal.ball(grid, one.centre, one.radius_mm) for one in (a, b)]
            assert float((both[0] * both[1]).sum()) == 0.0
    masks = [causal.ball(grid, one.centre, radius) for one in picked]
    whole = causal.ball(Geometry((99, 99, 99), grid.affine), (49, 49, 49), radius).sum()
    for mask in masks:
        assert float(mask.sum()) > 0.85 * float(whole), "cut off at the border"


def test_a_ball_has_the_volume_of_a_ball() -> None:
    grid = Geometry((40, 40, 40), np.diag([0.5, 1.0, 0.8, 1.0]))
    mask = causal.ball(grid, (20, 20, 20), 6.0)
    assert float(mask.sum()) * 0.4 == pytest.approx(4 / 3 * np.pi * 6.0**3, rel=0.03)
    assert mask[20, 20, 20] == 1.0
    assert (mask[20, 14, 20], mask[20, 13, 20]) == (0.5, 0.0)


@pytest.mark.parametrize("jump", [4.0, 2.0, 0.5, 3.7])
def test_the_ledger_is_the_drawn_map_summed_in_the_mask(jump: float) -> None:
    """gather is the adjoint of spread: sum(gather(mask) E) = sum(spread(E) mask) voxel_ml."""
    generator = np.random.default_rng(3)
    grid = cells(GRID, (jump, jump, 4.0), (1.5, 0.3, -1.0), (6, 7, 5))
    evidence, mask = generator.standard_normal((6, 7, 5)), generator.random((SIZE,) * 3)
    drawn = float((drawing(grid, GRID).spread(evidence) * mask).sum()) * GRID.voxel_ml
    ledger = causal.ledger(CandidateMap("a", evidence, grid), GRID, mask)
    assert ledger == pytest.approx(drawn, rel=1e-4, abs=1e-5)
    everything = causal.ledger(CandidateMap("a", evidence, grid), GRID, np.ones((SIZE,) * 3))
    outside = drawing(grid, GRID).outside(evidence)
    assert everything == pytest.approx(evidence.sum() - outside, rel=1e-9)


def test_slope_and_r_by_hand() -> None:
    assert causal.slope_and_r([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx((0.5, 1.0))
    slope, r = causal.slope_and_r([1.0, -1.0, 0.0], [0.0, -2.0, -1.0])
    assert (slope, r) == pytest.approx((0.4, 1.0))
    assert causal.slope_and_r([1.0, -1.0], [0.0, -2.0]) == (0.5, None), "two points, one line"
    assert causal.slope_and_r([1.0, 2.0], [0.0, 0.0]) == (None, None)
    assert causal.slope_and_r([2.0], [4.0]) == (0.5, None)


def test_the_texture_is_that_of_the_reference_and_the_mean_of_two() -> None:
    """With noise a ball's effect is the mean over two fills, the same for the same seed."""
    world = World()
    noisy = ReferenceInput(world.reference.raw, world.reference.reference, (0.3,))
    balls = [causal.Ball("random", centre, 8.0) for centre in ((8, 8, 8), (16, 16, 16))]
    one, again = (causal.effects(world.prepared, noisy, balls, world.score, 7) for _ in range(2))
    other = causal.effects(world.prepared, noisy, balls, world.score, 8)
    clean = causal.effects(world.prepared, world.reference, balls, world.score, 7)
    assert one == again
    assert one != other
    assert one != clean
    assert len(clean) == 2


def test_displaced_cells_would_be_seen() -> None:
    """Planted fault: the cells lie two cells off; the slope falls."""
    world = World()
    blocks = world.evidence.reshape(6, 4, 6, 4, 6, 4).sum((1, 3, 5))
    right = cells(GRID, (4.0,) * 3, (1.5,) * 3, (6, 6, 6))
    wrong = cells(GRID, (4.0,) * 3, (9.5,) * 3, (6, 6, 6))
    maps = [CandidateMap("wrong", blocks, wrong), CandidateMap("right", blocks, right)]
    here = float(world.evidence.sum())
    choice = causal.choose(
        maps, world.prepared, world.reference, (world.score, here, 0.02 * here), 0
    )
    assert choice.layer == "right"


# ------------------------------------------------------------------ maps that are no amounts


def _of(world: World, maps: Sequence[Values], *, signed: bool) -> Choice:
    here = float(world.evidence.sum())
    candidates = [CandidateMap(f"layer{n}", values, GRID) for n, values in enumerate(maps)]
    scores = (world.score, here, 0.02 * abs(here))
    kind = causal.Kind(amounts=False, signed=signed)
    return causal.choose(candidates, world.prepared, world.reference, scores, 0, kind)


def test_maps_in_a_unit_of_their_own_are_chosen_by_likeness_not_by_size() -> None:
    world = World()
    noise = np.random.default_rng(1).standard_normal(GRID.shape)
    choice = _of(world, [100 * noise, 1e4 * world.evidence, world.evidence + noise], signed=True)
    assert choice.layer == "layer1"
    assert [t.slope for t in choice.trials] == [None] * 3
    assert choice.trials[1].r == pytest.approx(1.0, abs=1e-6)
    assert choice.note == ""
    assert choice.regions[0].chosen == "top raising"


def test_a_map_without_a_sign_is_held_against_the_size_of_the_effects() -> None:
    world = World()
    strength = np.abs(world.evidence)
    noise = np.abs(np.random.default_rng(1).standard_normal(GRID.shape))
    choice = _of(world, [noise, strength], signed=False)
    assert choice.layer == "layer1"
    assert choice.trials[1].r is not None
    assert choice.trials[1].r > 0.9  # with the effects' signs it would be near 0
    assert {r.chosen for r in choice.regions} == {"strongest", "weakest", "random"}


def test_likeness_that_no_map_has_is_said() -> None:
    world = World()
    choice = _of(world, [-1.0 * world.evidence], signed=True)
    assert "do not trust this map" in choice.note
    assert "slope" not in choice.note
