"""Do the maps of several inputs add up, each alone and all of them together?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import joint
from med_gradcam.errors import CannotExplainError, ModelError, UsageError
from tests.engine import nets
from tests.tiny import affine_of, volume

T1, T2 = nets.scan(), nets.scan(seed=3)


class Branches(nn.Module):
    """Two scans, a branch each; `meet` says how they come together."""

    def __init__(self, meet: str = "product") -> None:
        super().__init__()
        self.meet = meet
        self.first = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU())
        self.second = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU(), nn.MaxPool3d(2))
        self.head = nn.Linear(6, 2)

    def forward(self, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
        one, two = 4 * self.first(t1).mean((2, 3, 4)), 4 * self.second(t2).mean((2, 3, 4))
        out: torch.Tensor = self.head(one + two if self.meet == "sum" else one * two)
        return 5 * out


GIVEN: dict[str, Any] = {"target": 1, "reference": "zero", "link": "sigmoid"}


def _net(meet: str = "product") -> nn.Module:
    return nets.made(lambda: Branches(meet))


def _score(net: nn.Module, one: float, two: float) -> float:
    """The score with the first and second scan kept (1) or zero (0)."""
    with torch.no_grad():
        return float(net(torch.tensor(one * T1)[None], torch.tensor(two * T2)[None])[0, 1])


def _net_of(e: mg.Explanation) -> float:
    return e.sum_for - e.sum_against


def _alone(net: nn.Module) -> tuple[mg.Explanation, mg.Explanation]:
    """Each scan explained with the other one as an input."""
    first = mg.explain(T1, net, layer="first", inputs=(..., T2[None]), **GIVEN)
    second = mg.explain(T2, net, layer="second", inputs=(T1[None], ...), **GIVEN)
    return first, second


@pytest.mark.parametrize("meet", ["sum", "product"])
def test_each_map_adds_up_to_its_own_difference(meet: str) -> None:
    net = _net(meet)
    for e, others in zip(_alone(net), [(0, 1), (1, 0)], strict=True):
        assert e.status == "complete"
        assert e.reference_score == pytest.approx(_score(net, *others), abs=1e-5)
        assert _net_of(e) == pytest.approx(_score(net, 1, 1) - _score(net, *others), abs=1e-5)


def test_alone_they_add_up_together_only_where_branches_do_not_interact() -> None:
    for meet in ("sum", "product"):
        net = _net(meet)
        both = sum(_net_of(e) for e in _alone(net))
        whole = _score(net, 1, 1) - _score(net, 0, 0)
        missed = whole - both
        # With ReLUs a branch is quiet or not by itself, so only what the two do together is left.
        together = _score(net, 0, 1) + _score(net, 1, 0) - _score(net, 1, 1) - _score(net, 0, 0)
        assert missed == pytest.approx(together, abs=1e-5)
        if meet == "sum":
            assert missed == pytest.approx(0, abs=1e-5)
        else:
            assert abs(missed) > 0.1 * abs(whole)


@pytest.mark.parametrize("meet", ["sum", "product"])
def test_jointly_they_always_do(meet: str) -> None:
    net = _net(meet)
    found = mg.explain_inputs([T1, T2], net, layers=["first", "second"], **GIVEN)
    whole = _score(net, 1, 1) - _score(net, 0, 0)
    assert sum(found.nets) == pytest.approx(whole, rel=1e-4)
    assert found.residual == pytest.approx(0, abs=1e-4 * abs(whole))
    assert [e.layer for e in found.maps] == ["first", "second"]
    assert [e.evidence.shape for e in found.maps] == [(8, 8, 8), (4, 4, 4)]
    assert found.names == ("input 1", "input 2")
    for e, other in zip(found.maps, found.nets[::-1], strict=True):
        assert e.bypassed == pytest.approx(other / whole, rel=1e-3)
        assert joint.TOGETHER in e.warnings
        assert not any("skip connections" in w for w in e.warnings)
    if meet == "sum":  # nothing is shared, so each is as it is alone
        for e, alone in zip(found.maps, _alone(net), strict=True):
            size = np.abs(alone.evidence).max()
            assert np.abs(e.evidence - alone.evidence).max() <= 1e-4 * size
            assert e.grid == alone.grid


def test_a_product_is_shared_between_its_factors() -> None:
    """a b - a0 b0 by the secant rule: (a - a0)(b + b0) / 2 + (b - b0)(a + a0) / 2."""
    net = _net()
    found = mg.explain_inputs([T1, T2], net, layers=["first", "second"], **GIVEN)
    assert isinstance(net, Branches)
    with torch.no_grad():
        one, zero_one = (4 * net.first(torch.tensor(s * T1)[None]).mean((2, 3, 4)) for s in (1, 0))
        two, zero_two = (4 * net.second(torch.tensor(s * T2)[None]).mean((2, 3, 4)) for s in (1, 0))
        weight = 5 * net.head.weight[1]
        first = float((weight * (one - zero_one) * (two + zero_two) / 2).sum())
        second = float((weight * (two - zero_two) * (one + zero_one) / 2).sum())
    assert found.nets == pytest.approx((first, second), rel=1e-4)


@pytest.mark.parametrize("how", ["names", "names turned", "volumes", "references", "age"])
def test_scans_come_in_many_forms(how: str) -> None:
    class WithAge(Branches):
        def forward(  # type: ignore[override]
            self, t1: torch.Tensor, t2: torch.Tensor, age: float
        ) -> torch.Tensor:
            assert age == 7.0
            return super().forward(t1, t2)

    layers: Any = ["first", "second"]
    net = _net()
    wanted = mg.explain_inputs([T1, T2], net, layers=layers, **GIVEN)
    given = dict(GIVEN)
    images: Any = {
        "names": {"t1": T1, "t2": T2},
        "names turned": {"t2": T2, "t1": T1},
        "volumes": [nets.as_volume(T1), nets.as_volume(T2)],
    }.get(how, [T1, T2])
    if how == "names turned":
        layers = ["second", "first"]
    if how == "references":
        given["reference"] = [0 * T1, 0 * T2]
    if how == "age":
        net, given["inputs"] = nets.made(lambda: WithAge("product")), (..., 7.0)
    made = mg.explain_inputs(images, net, layers=layers, **given)
    nets_ = made.nets[::-1] if how == "names turned" else made.nets
    assert nets_ == pytest.approx(wanted.nets, rel=1e-5)
    assert made.names == (tuple(images) if how.startswith("names") else ("input 1", "input 2"))


def test_the_network_comes_back_as_it_was() -> None:
    net = _net().train()
    mg.explain_inputs([T1, T2], net, layers=["first", "second"], **GIVEN)
    assert all(m.training for m in net.modules())
    assert "forward" not in net.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("images", "layers", "settings", "says"),
    [
        ([T1], ["first"], {}, "two scans or more and one layer for each, got 1 scans"),
        ([T1, T2], ["first"], {}, r"one layer for each, got 2 scans and \['first'\]"),
        ([T1, T2], "ab", {}, "one layer for each, got 2 scans and 'ab'"),
        ([T1, T2], ["second", "first"], {}, "'first' for input 2, but it changes with input 1"),
        ([T1, T2[:, :8]], ["first", "second"], {}, "scans on one grid"),
        (
            [volume(T1, None, None), volume(T2, affine_of("RAS", origin=(3, 0, 0)), None)],
            ["first", "second"], {}, "scans on one grid",
        ),
        ([T1, T2], ["first", "second"], {"method": "gradcam"}, "the method 'secant', got 'grad"),
        ([T1, T2], ["first", "second"], {"layer": "first"}, "no layer beside layers"),
        ([T1, T2], ["first", "thrid"], {}, "known layer, got 'net.thrid'"),
        (3, ["first", "second"], {}, "a list of scans, or a dict, got int"),
        ([T1, T2], ["first", "second"], {"reference": 3}, "or one for each scan, got int"),
    ],
)  # fmt: skip
def test_refusals(images: Any, layers: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        mg.explain_inputs(images, _net(), layers=layers, **{**GIVEN, **settings})


def test_no_module_and_a_shared_branch() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU()), nn.Linear(6, 2)

        def forward(self, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head((self.first(t1) * self.first(t2)).mean((2, 3, 4)))
            return out

    with pytest.raises(ModelError, match="a torch module of several inputs, got str"):
        mg.explain_inputs([T1, T2], "net", layers=["first", "second"])
    with pytest.raises((CannotExplainError, UsageError)):
        mg.explain_inputs([T1, T2], nets.made(Shared), layers=["first", "first"], **GIVEN)


def test_the_cost_is_that_of_the_pair_and_the_trial() -> None:
    found = mg.explain_inputs([T1, T2], _net(), layers=["first", "second"], **GIVEN)
    pair = mg.explain(T1, _net(), layer="first", inputs=(..., T2[None]), **GIVEN)
    assert found.maps[0].cost_in_forwards == pytest.approx(pair.cost_in_forwards + 3, abs=0.9)
    assert found.maps[1].cost_in_forwards == 0
