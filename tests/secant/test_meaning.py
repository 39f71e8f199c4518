"""Does the evidence mean what it says: linear cases, signs, sums of targets, batches, constants?"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from med_gradcam.secant.pair import run_all, share
from med_gradcam.tail import INPUT, at_rest
from tests.engine import nets
from tests.secant.architectures import made, margin, scans
from tests.secant.pairs import both, noise, off, shared

Score = Callable[[Any], torch.Tensor]
PRECISE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", PRECISE, ids=["single", "double"])
SCAN, OTHER = noise(1, 1, 16, 16, 16, seed=1), noise(1, 1, 16, 16, 16, seed=2)


def weights(*w: float) -> Callable[[Any], Score]:
    """The score that is this combination of the outputs."""
    return lambda _: lambda y: (y.double() * torch.tensor(w, dtype=torch.float64)).sum(1)


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    return float((a - b).abs().max()) <= PRECISE[dtype] * float(a.abs().max())


@DTYPES
@pytest.mark.parametrize("tail", ["mean + linear", "flatten + linear"])
def test_hirescam_where_the_tail_is_linear_and_the_reference_zero(
    tail: str, dtype: torch.dtype
) -> None:
    net = nets.made(nets.TAILS[tail], dtype=dtype).requires_grad_(requires_grad=False)
    first = net.get_submodule("first")
    inner = first.get_submodule("0")
    with torch.no_grad():
        inner.get_parameter("bias").zero_()  # so that a scan of zeros has no activation
    x = SCAN.to(dtype)
    found = shared(net, x, torch.zeros_like(x), ["first"], weights(1.0, -1.0))
    activation = first(x).detach().requires_grad_()
    score = net.get_submodule("rest")(activation)
    (gradient,) = torch.autograd.grad((score[:, 0] - score[:, 1]).sum(), activation)
    hirescam = (activation.detach().double() * gradient.double()).sum(1)
    assert float(found.reference.activations["first"].abs().max()) == 0.0
    assert close(hirescam, found.evidence("first"), dtype)


@DTYPES
@pytest.mark.parametrize("tail", nets.TAILS)
def test_the_other_class_gets_the_opposite(tail: str, dtype: torch.dtype) -> None:
    net = nets.made(nets.TAILS[tail], dtype=dtype)
    x, r = SCAN.to(dtype), OTHER.to(dtype)
    layers = [INPUT, "first"]
    one = shared(net, x, r, layers, lambda _: lambda y: y[:, 1] - y[:, 0])
    other = shared(net, x, r, layers, lambda _: lambda y: y[:, 0] - y[:, 1])
    for layer in layers:
        assert torch.equal(one.multipliers[layer], -other.multipliers[layer])


@DTYPES
@pytest.mark.parametrize("tail", nets.TAILS)
def test_evidence_is_linear_in_the_target(tail: str, dtype: torch.dtype) -> None:
    net = nets.made(nets.TAILS[tail], dtype=dtype)
    x, r = SCAN.to(dtype), OTHER.to(dtype)
    a, b, both_ = (shared(net, x, r, choose=weights(*w)) for w in ((1, 0), (0, 1), (2, -3)))
    wanted = 2 * a.evidence(INPUT) - 3 * b.evidence(INPUT)
    scale = max(float(e.abs().max()) for e in (a.evidence(INPUT), b.evidence(INPUT)))
    most = 20 * PRECISE[dtype] * scale
    assert float((both_.evidence(INPUT) - wanted).abs().max()) <= most


@pytest.mark.parametrize("tail", nets.TAILS)
def test_swapping_the_two_inputs_turns_the_sign(tail: str) -> None:
    net = nets.made(nets.TAILS[tail], dtype=torch.float64)
    there = shared(net, SCAN, OTHER, choose=weights(1.0, -1.0))
    back = shared(net, OTHER, SCAN, choose=weights(1.0, -1.0))
    assert close(there.evidence(INPUT), -back.evidence(INPUT), torch.float64)


@pytest.mark.parametrize("name", ["DenseNet121", "EfficientNet-b0", "ViT", "BasicUNet"])
def test_the_items_of_a_batch_are_their_single_runs(name: str) -> None:
    net = made(name).double()
    x, r = scans(name, torch.float64, count=2)
    together = shared(net, x, r, choose=margin)
    for n in range(2):
        alone = shared(net, x[n : n + 1], r[n : n + 1], choose=margin)
        difference = (together.evidence(INPUT)[n] - alone.evidence(INPUT)[0]).abs().max()
        assert float(difference) <= 1e-10 * float(alone.evidence(INPUT).abs().max())


@pytest.mark.parametrize("tail", nets.TAILS)
def test_one_reference_for_two_scans(tail: str) -> None:
    """Each item of the batch has its own reference; here it is the same one."""
    net = nets.made(nets.TAILS[tail], dtype=torch.float64)
    x = torch.cat([SCAN, noise(1, 1, 16, 16, 16, seed=3)])
    found = shared(net, x, OTHER.expand_as(x).clone(), choose=weights(1.0, -1.0))
    assert off(found) <= 1e-9


@pytest.mark.parametrize("tail", nets.TAILS)
def test_what_did_not_change_gets_nothing(tail: str) -> None:
    net = nets.made(nets.TAILS[tail], dtype=torch.float64)
    r = SCAN.clone()
    r[..., :8] = OTHER[..., :8]
    found = shared(net, SCAN, r, choose=weights(1.0, -1.0))
    assert float(found.evidence(INPUT)[..., 8:].abs().max()) == 0.0
    assert off(found) <= 1e-9
    same = shared(net, SCAN, SCAN, [INPUT, "first"], weights(1.0, -1.0))
    for layer in (INPUT, "first"):
        assert float(same.evidence(layer).abs().max()) == 0.0
        assert bool(same.multipliers[layer].isfinite().all())


def test_a_score_that_does_not_depend_on_the_layer_gives_zeros() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Conv3d(1, 2, 1), nn.Conv3d(1, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.layer(x)
            out: torch.Tensor = self.other(x).mean((2, 3, 4))
            return out

    found = shared(Beside().double(), SCAN, OTHER, ["layer"], weights(1.0, 1.0))
    assert float(found.multipliers["layer"].abs().max()) == 0.0
    assert found.past["layer"]


@pytest.mark.parametrize("normed", ["instance", "group", "layer"])
@pytest.mark.parametrize("dtype", PRECISE, ids=["single", "double"])
def test_a_reference_without_variance_gives_no_huge_evidence(
    normed: str, dtype: torch.dtype
) -> None:
    """Behind a norm a constant reference has sigma = 0; the evidence stays of the change's size."""
    torch.manual_seed(0)
    norm: nn.Module = {
        "instance": nn.InstanceNorm3d(4, affine=True),
        "group": nn.GroupNorm(2, 4),
        "layer": nn.LayerNorm((16, 16, 16)),
    }[normed]
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1, padding_mode="circular"), norm, nn.ReLU(),
                        nn.Conv3d(4, 4, 3), nn.ReLU(), nets.Pooled(4)).to(dtype)  # fmt: skip
    x = SCAN.to(dtype)
    found = shared(net, x, torch.full_like(x, 0.3), choose=weights(1.0, -1.0))
    assert off(found) <= 100 * PRECISE[dtype]
    change = float((found.case.score - found.reference.score).abs())
    gross = float(found.evidence(INPUT).abs().sum())
    noisy = shared(net, x, OTHER.to(dtype), choose=weights(1.0, -1.0))
    usual = float(noisy.evidence(INPUT).abs().sum()) / float(
        (noisy.case.score - noisy.reference.score).abs()
    )
    assert gross / change <= 3 * max(usual, 10.0)


def test_a_shift_of_all_logits_is_nothing_to_a_softmax() -> None:
    """Attention that rises everywhere alike is the same attention."""
    x, r = noise(1, 1, 4, 4, 4, seed=1), noise(1, 1, 4, 4, 4, seed=2)
    net = nn.Sequential(nn.Flatten(), nn.Softmax(1)).double()
    plain = shared(net, x, r)
    for shift in (1.0, 50.0, 900.0):
        found = shared(net, x + shift, r)
        assert off(found) <= 1e-9
        gross = float(found.evidence(INPUT).abs().sum())
        assert gross <= 4 * shift + float(plain.evidence(INPUT).abs().sum())
        alike, little = (shared(net, r + s, r, choose=weights(*range(64))) for s in (shift, 1e-3))
        assert close(little.multipliers[INPUT], alike.multipliers[INPUT], torch.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1e-6, 1e-3, 1.0, 30.0]))
def test_random_small_networks_add_up(seed: int, step: float) -> None:
    """Layers drawn at random, and references near and far."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kinds: list[Callable[[], nn.Module]] = [
        nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.Hardswish, nn.Tanh,
        lambda: nn.LeakyReLU(inplace=True), lambda: nn.MaxPool3d(2, 1), lambda: nn.AvgPool3d(2, 1),
        lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm3d(4), lambda: nets.Gate(4),
        lambda: nn.Conv3d(4, 4, 1), lambda: nn.Softmax(1), lambda: nn.PReLU(4),
    ]  # fmt: skip
    drawn = [kinds[at]() for at in torch.randint(len(kinds), (6,), generator=generator).tolist()]
    head = nn.Sequential(nn.AdaptiveMaxPool3d(2), nn.Flatten(), nn.Linear(32, 2))
    net = nn.Sequential(nn.Conv3d(1, 4, 3), *drawn, head).double()
    x = noise(1, 1, 11, 11, 11, seed=seed)
    r = x + step * noise(1, 1, 11, 11, 11, seed=seed + 1)
    found = shared(net, x, r, [INPUT, "0"], weights(1.0, -1.0))
    change = float(found.case.score - found.reference.score)
    rounding = 1e-13 * float(found.case.score.abs() + found.reference.score.abs())
    for layer in (INPUT, "0"):
        parts = found.evidence(layer)
        most = 1e-9 * max(abs(change), 1e-3 * float(parts.abs().sum())) + rounding
        assert abs(float(parts.sum()) - change) <= most


def test_evidence_is_a_sum_over_channels_in_double_precision() -> None:
    net = nets.made(nets.TAILS["gate"], dtype=torch.float32)
    found = shared(net, SCAN.float(), OTHER.float(), ["first"], weights(1.0, 0.0))
    a, b = found.case.activations["first"], found.reference.activations["first"]
    by_hand = ((a.double() - b.double()) * found.multipliers["first"].double()).sum(1)
    assert torch.equal(found.evidence("first"), by_hand)
    assert found.evidence("first").dtype == torch.float64
    assert F.relu(a).equal(a)


def _this(score: Score, output: Any) -> Score:
    del output
    return score


def test_several_scores_of_one_forward_are_as_if_alone() -> None:
    net = nets.made(nets.TAILS["gate"], dtype=torch.float64)
    chosen = [weights(1.0, 0.0)(None), weights(1.0, -1.0)(None)]
    with at_rest(net):
        cases, others = (run_all(net, ["first"], t, lambda _: chosen) for t in (SCAN, OTHER))
    for score, case, other in zip(chosen, cases, others, strict=True):
        found = share(case, other, ["first"])
        alone = shared(net, SCAN, OTHER, ["first"], partial(_this, score))
        assert torch.equal(found.multipliers["first"], alone.multipliers["first"])
        assert off(found, "first") <= 1e-9


def test_threads_do_not_see_each_other() -> None:
    made_here = {tail: nets.made(nets.TAILS[tail], dtype=torch.float64) for tail in nets.TAILS}

    def evidence(tail: str) -> torch.Tensor:
        return shared(made_here[tail], SCAN, OTHER, choose=weights(1.0, -1.0)).evidence(INPUT)

    alone = {tail: evidence(tail) for tail in nets.TAILS}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for tail, found in zip(nets.TAILS, pool.map(evidence, nets.TAILS), strict=True):
                assert torch.equal(found, alone[tail])


def test_layers_asked_for_together_are_as_if_alone() -> None:
    net = nets.made(nets.TAILS["max pool"], dtype=torch.float64)
    names = [INPUT, "first", "rest.0.1"]
    runs = both(net, SCAN, OTHER, names, weights(1.0, -1.0))
    together = share(*runs, names)
    for name in names:
        alone = shared(net, SCAN, OTHER, [name], weights(1.0, -1.0))
        assert torch.equal(alone.multipliers[name], together.multipliers[name])
