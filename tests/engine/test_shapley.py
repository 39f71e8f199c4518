"""Do the values of regions add up, treat equals alike and agree when they are sampled?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from med_gradcam import rerun
from med_gradcam.capture import Capture
from med_gradcam.errors import InputError, UsageError
from med_gradcam.metrics import shapley as module
from med_gradcam.metrics.shapley import shapley
from tests.engine import nets

Masks = npt.NDArray[np.float64]


class _Mixed(nn.Module):
    """A score in which the places of the layer interact strongly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.head = nn.Identity(), nn.Linear(64, 12), nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.mix(self.first(x).flatten(1))))
        return 10 * out


def _mixed(seed: int = 0) -> Capture:
    torch.manual_seed(seed)
    net = _Mixed().double().eval()
    x, other = (torch.randn(1, 1, 4, 4, 4, dtype=torch.float64) for _ in range(2))
    return nets.captured(net, "first", x, None, other)


def _regions(count: int, covered: float = 1.0, seed: int = 0) -> Masks:
    """Random soft regions of 4^3 cells."""
    raw = np.random.default_rng(seed).random((count, 4, 4, 4)) ** 4
    masks: Masks = covered * raw / raw.sum(0)
    return masks


def _score(capture: Capture, mask: Masks) -> float:
    assert capture.baseline is not None
    share = torch.tensor(mask)
    mixed = capture.baseline + share * (capture.activation - capture.baseline)
    return float(capture.scores(mixed[None])[0])


@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_add_up(tail: str, dtype: torch.dtype, near: float) -> None:
    net = nets.made(nets.TAILS[tail], dtype=dtype)
    x, other = (nets.batch(nets.scan(seed=s), dtype) for s in (0, 5))
    found = nets.captured(net, "first", x, nets.score_of(1, "softmax"), other)
    masks = np.zeros((3, 8, 8, 8))
    masks[0, :4], masks[1, 4:, :5], masks[2, 4:, 5:] = 1.0, 0.7, 0.3
    values = shapley(found, masks, seed=0)
    assert found.reference_score is not None
    whole = found.score - found.reference_score
    assert values.values.sum() == pytest.approx(whole, abs=near * max(1, abs(found.score)))
    assert (values.start_score, values.score) == pytest.approx(
        (found.reference_score, found.score), abs=near * max(1, abs(found.score))
    )
    assert (values.passes, found.passes) == (16, 16 + 2)


def test_two_regions_have_a_closed_form() -> None:
    found = _mixed()
    a, b = masks = _regions(2)
    none, one, other, both = (_score(found, m) for m in (0 * a, a, b, a + b))
    values = shapley(found, masks, seed=0).values
    first = ((one - none) + (both - other)) / 2
    assert values == pytest.approx([first, both - none - first, 0.0], abs=1e-10)
    assert abs((both - other) - (one - none)) > 0.2  # they do interact


def test_elsewhere_is_a_player_of_its_own() -> None:
    found, masks = _mixed(), _regions(2, covered=0.6)
    apart = shapley(found, [*masks, 1 - masks.sum(0)], seed=0).values
    values = shapley(found, masks, seed=0).values
    assert apart == pytest.approx([*values, 0.0], abs=1e-10)
    assert abs(values[-1]) > 0.1


class _Twins(nn.Module):
    """Blind to the order of places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp = nn.Identity(), nn.Sequential(nn.Linear(2, 8), nn.SiLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = 5 * self.first(x).mean((2, 3, 4))
        out: torch.Tensor = 10 * self.head(self.mlp(mean))
        return out


def test_equals_get_the_same_and_a_dummy_gets_nothing() -> None:
    torch.manual_seed(1)
    net = _Twins().double().eval()
    x, other = (torch.randn(1, 2, 4, 4, 4, dtype=torch.float64) for _ in range(2))
    x[..., 1] = x[..., 0]  # two equal slabs
    other[..., 1] = other[..., 0]
    x[..., 3] = other[..., 3]  # here nothing differs from the reference
    found = nets.captured(net, "first", x, None, other)
    masks = np.zeros((4, 4, 4, 4))
    for n in range(4):
        masks[n, ..., n] = 1.0
    values = shapley(found, masks, seed=0).values
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    assert values[3] == pytest.approx(0.0, abs=1e-12)
    assert abs(values[0] - values[2]) > 0.1


def test_a_score_that_adds_gives_each_region_its_own_change() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(64, 1)).double().eval()
    x, other = (torch.randn(1, 1, 4, 4, 4, dtype=torch.float64) for _ in range(2))
    found, masks = nets.captured(net, "0", x, None, other), _regions(5, covered=0.8)
    change = (nets.weight(net, "2").reshape(4, 4, 4) * (x - other)[0, 0]).numpy()
    values = shapley(found, masks, seed=0).values
    assert values[:-1] == pytest.approx((masks * change).sum((1, 2, 3)), abs=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_lies_within_three_standard_errors(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, masks = _mixed(seed), _regions(8, covered=0.9, seed=seed)
    exact = shapley(found, masks, seed=0)
    monkeypatch.setattr(module, "EXACT", 4)
    sampled = shapley(found, masks, seed=seed)
    assert sampled.values.sum() == pytest.approx(exact.values.sum(), abs=1e-9)
    assert sampled.standard_errors.min() > 0
    assert sampled.standard_errors.max() < 0.2 * np.abs(exact.values).max()
    assert (np.abs(sampled.values - exact.values) < 3 * sampled.standard_errors).all()


def test_the_standard_error_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found, masks = _mixed(), _regions(7)
    exact = shapley(found, masks, seed=0).values
    monkeypatch.setattr(module, "EXACT", 4)
    runs = [shapley(found, masks, seed=s, most_passes=500) for s in range(60)]
    off = np.array([(r.values - exact)[:-1] / r.standard_errors[:-1] for r in runs])
    assert 0.8 < np.sqrt((off**2).mean()) < 1.3
    assert (np.abs(off) > 3).mean() < 0.02
    assert np.abs(off.mean(0)).max() < 0.5  # no bias


def test_opposite_orders_halve_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairwise interactions only, an order and its opposite together are exact."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix = nn.Identity(), nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = (self.mix(self.first(x).flatten(1)) ** 2).sum(1, keepdim=True)
            return out

    torch.manual_seed(0)
    net = Pairs().double().eval()
    x, other = (torch.randn(1, 1, 4, 4, 4, dtype=torch.float64) for _ in range(2))
    found, masks = nets.captured(net, "first", x, None, other), _regions(6)
    exact = shapley(found, masks, seed=0).values
    monkeypatch.setattr(module, "EXACT", 2)
    sampled = shapley(found, masks, seed=3, most_passes=0)
    assert sampled.values == pytest.approx(exact, abs=1e-9)
    assert sampled.standard_errors.max() < 1e-9


def test_more_than_ten_regions_are_sampled() -> None:
    found = _mixed()
    ten, eleven = (shapley(found, _regions(n), seed=0) for n in (10, 11))
    assert ten.passes == 2**10
    assert not ten.standard_errors.any()
    assert eleven.standard_errors[:-1].min() > 0
    assert eleven.passes <= 2048
    again = shapley(found, _regions(11), seed=0)
    assert np.array_equal(again.values, eleven.values)
    assert not np.array_equal(shapley(found, _regions(11), seed=1).values, eleven.values)


def test_small_batches_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    found, masks = _mixed(), _regions(4)
    whole = shapley(found, masks, seed=0).values
    monkeypatch.setattr(rerun, "BATCH_BYTES", 1.0)
    assert shapley(found, masks, seed=0).values == pytest.approx(whole, abs=1e-12)


def _too_much(masks: Masks) -> Masks:
    return masks + 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m[:, :3], r"expected masks on the layer's cells \(R, 4, 4, 4\), got \(2, 3"),
        (lambda m: m[0], r"got \(4, 4, 4\)"),
        (lambda m: m[:0], r"got \(0, 4, 4, 4\)"),
        (_too_much, r"sums up to 2"),
        (lambda m: -m, r"values from -"),
        (lambda m: m * np.nan, r"expected masks of 0 to 1"),
    ],
)
def test_masks_that_are_none_are_refused(change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        shapley(_mixed(), change(_regions(2)), seed=0)


def test_without_a_reference_there_are_no_values() -> None:
    found = _mixed()
    found.baseline = None
    with pytest.raises(UsageError, match="expected a reference input for Shapley values, got none"):
        shapley(found, _regions(2), seed=0)
