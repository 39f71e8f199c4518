"""Does the default method add up, for any tail, and say so when it does not?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.methods import Bound, Evidence, integrated
from tests.engine import nets

LOOSE = Bound(float("inf"), 0.0)


class Comb(nn.Module):
    """A score that bends often along the path: max-pools and ReLUs of many shifted copies."""

    def __init__(self, bends: int = 40) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.linspace(-3, 3, bends))
        self.head = nn.Linear(bends, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = x.amax(dim=(1, 2, 3, 4))[:, None]
        out: torch.Tensor = self.head(torch.relu(torch.sin(9.0 * high - self.at) * 3.0))
        return out


class Cliff(nn.Module):
    """A score that jumps: no quadrature can add that up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3, 4))[:, None]
        return mean + 5.0 * (mean > 0.9).to(x.dtype)


class Step(nn.Module):
    """Steep but smooth at one place of the path, flat elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3, 4))[:, None]
        return 4.0 * torch.sigmoid(60.0 * (mean - 0.83)) + mean


def _capture(net: nn.Module, dtype: torch.dtype = torch.float64, layer: str = "first") -> Capture:
    x, reference = (nets.batch(nets.scan(seed=s), dtype) for s in (0, 5))
    return nets.captured(net, layer, x, nets.score_of(0), reference)


def _line(tail: nn.Module) -> Capture:
    """A path from 0 to 1 at one cell: the tail sees exactly t."""
    net = nn.Sequential(nn.Identity(), tail).double().eval()
    x = torch.ones(1, 1, 2, 2, 2, dtype=torch.float64)
    return nets.captured(net, "0", x, nets.score_of(0), torch.zeros_like(x))


def _missed(capture: Capture, found: Evidence) -> float:
    assert capture.reference_score is not None
    return abs(capture.score - capture.reference_score - float(found.values.sum()))


@pytest.mark.parametrize("tail", nets.TAILS)
def test_evidence_adds_up_to_the_difference_from_the_reference(tail: str) -> None:
    net = nets.made(nets.TAILS[tail])
    made = mg.explain(
        nets.volume(),
        net,
        target=1,
        layer="first",
        reference=nets.volume(seed=5),
        precise=True,
    )
    assert made.status == "complete"
    assert made.reference_score is not None
    assert made.residual is not None
    assert abs(made.residual) <= 0.01 * abs(made.score - made.reference_score) + 1e-6
    assert made.score - made.reference_score - made.residual == pytest.approx(
        made.sum_for - made.sum_against, abs=1e-9
    )
    assert made.bypassed == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("tail", ["gate", "SiLU MLP", "group norm", "instance norm"])
def test_tight_bounds_are_kept_in_float64(tail: str) -> None:
    capture = _capture(nets.made(nets.TAILS[tail], dtype=torch.float64))
    bound = 1e-8 if tail == "SiLU MLP" else 1e-3 * abs(capture.score)
    found = integrated.evidence(capture, Bound(bound, 0.0))
    assert found.converged
    assert _missed(capture, found) <= bound


def test_one_linear_layer_needs_no_more_than_eight_nodes() -> None:
    capture = _capture(nets.made(nets.flat_linear, dtype=torch.float64))
    found = integrated.evidence(capture, Bound(1e-9, 0.0))
    assert (found.nodes, found.converged) == (8, True)
    assert _missed(capture, found) < 1e-9


def test_nodes_gather_where_the_path_bends() -> None:
    """Eight nodes miss a steep step; splitting finds it with far fewer nodes than a plain rule."""
    capture = _line(Step())
    plain = integrated.evidence(capture, LOOSE)
    assert plain.nodes == 8
    assert _missed(capture, plain) > 0.5
    found = integrated.evidence(capture, Bound(0.02, 0.0))
    assert found.converged
    assert _missed(capture, found) <= 0.02
    assert found.nodes <= 72


def test_splitting_the_wrong_part_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the part that misses least is cut instead."""

    def wrong(*values: Any, key: Any = None) -> Any:
        return max(*values) if key is None else min(*values, key=key)

    monkeypatch.setattr(integrated, "max", wrong, raising=False)
    found = integrated.evidence(_line(Step()), Bound(0.02, 0.0))
    assert not found.converged


def test_a_score_that_jumps_is_not_passed_off_as_converged() -> None:
    net = nn.Sequential(nn.Identity(), Cliff()).eval()
    ones = torch.ones(1, 8, 8, 8)
    ones[0, 0, 0, 0] = 1.5
    made = mg.explain(ones, net, link="none", layer="0", reference="zero")
    assert made.status == "not_converged"
    assert made.residual == pytest.approx(5.0, abs=0.05)
    assert any("has not converged after 248 nodes" in w for w in made.warnings)


def test_a_comb_of_bends_converges_or_says_that_it_did_not() -> None:
    torch.manual_seed(3)
    capture = _line(Comb().double())
    found = integrated.evidence(capture, Bound(0.0, 0.05))
    assert capture.reference_score is not None
    allowed = 0.05 * abs(capture.score - capture.reference_score)
    assert found.converged == (_missed(capture, found) <= allowed)


def test_not_a_cut_and_not_converged_are_both_told() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cliff = nn.Identity(), Cliff()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.cliff(self.layer(x)) + 3.0 * x.mean()
            return out

    x = torch.ones(1, 8, 8, 8)
    x[0, 0, 0, 0] = 1.5
    made = mg.explain(x, Both().eval(), link="none", layer="layer", reference="zero")
    assert made.status == "not_a_cut"
    assert any("flows past" in w for w in made.warnings)
    assert any("has not converged" in w for w in made.warnings)


@pytest.mark.parametrize("past", [0.0, 0.25, 1.0])
def test_what_flows_past_the_layer_is_stated(past: float) -> None:
    """Against the hand computation: the score is linear in what each path brings."""
    net = nets.made(lambda: nets.Skip(past))
    nets.weight(net, "head").mul_(20.0)
    x, reference = (nets.batch(nets.scan(seed=s)) for s in (0, 5))
    with torch.no_grad():
        side = []
        for one in (x, reference):
            stem = torch.relu(net.get_submodule("stem")(one))
            went = past * torch.relu(net.get_submodule("side")(stem)).mean(dim=(2, 3, 4))
            side.append(float((went @ nets.weight(net, "head").T)[0, 0]))
        whole = float(net(x)[0, 0] - net(reference)[0, 0])
    share = (side[0] - side[1]) / whole
    made = mg.explain(
        nets.volume(), net, link="none", layer="layer", reference=nets.volume(seed=5), precise=True
    )
    assert made.bypassed == pytest.approx(share, abs=1e-4)
    assert made.status == ("complete" if past == 0 else "not_a_cut")
    if past:
        assert abs(share) > 0.02
        assert any("flows past the layer 'layer'" in w for w in made.warnings)
        assert made.residual == pytest.approx(share * whole, rel=0.05, abs=0.01 * abs(whole))


def test_small_batches_give_the_same_map(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = _capture(nets.made(nets.max_pooled, dtype=torch.float64))
    whole = integrated.evidence(capture, LOOSE).values
    monkeypatch.setattr(integrated, "BATCH_BYTES", 1.0)
    single = integrated.evidence(capture, LOOSE).values
    assert torch.allclose(whole, single, rtol=1e-12, atol=1e-15)


def test_without_a_reference_there_is_no_integral() -> None:
    capture = _capture(nets.made(nets.gated), torch.float32)
    capture.baseline = None
    with pytest.raises(UsageError, match=r"expected a reference input for the method 'integrated'"):
        integrated.evidence(capture, LOOSE)
