"""Is what a picture would hide said: nothing for, nothing against, balanced, saturated, alike?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import NOTICE_WORDS
from med_gradcam.metrics import causal
from tests.engine import architectures, nets

SIGNED = ("secant", "integrated", "hirescam", "gradcam")
SCAN = nets.as_volume(np.abs(nets.scan()))


def one_sided(sign: float) -> nn.Module:
    """Positive cells times weights of one sign: all of the evidence has it."""
    net = nets.made(lambda: nets.Body(nets.Pooled(6, 1)))
    for name in ("weight", "bias"):
        nets.weight(net, "first.0", name).abs_()
    nets.weight(net, "rest.head").abs_().mul_(sign)
    return net


def _explain(net: nn.Module, method: str, **settings: Any) -> mg.Explanation:
    settings = {"layer": "first", "link": "sigmoid", **settings}
    return mg.explain(settings.pop("image", SCAN), net, method=method, **settings)


# ------------------------------------------------------------------------- one polarity is empty


@pytest.mark.parametrize("method", SIGNED)
def test_only_evidence_against_is_an_empty_for_and_a_full_against(method: str) -> None:
    made = _explain(one_sided(-1), method)
    assert made.sum_for == 0
    assert made.sum_against > 1
    assert made.notices == ("no_positive_evidence",)
    assert NOTICE_WORDS["no_positive_evidence"] in made.warnings


@pytest.mark.parametrize("method", SIGNED)
def test_only_evidence_for_is_told_as_well(method: str) -> None:
    made = _explain(one_sided(1), method)
    assert made.sum_for > 1
    assert made.sum_against == 0
    assert made.notices == ("no_negative_evidence",)
    assert NOTICE_WORDS["no_negative_evidence"] in made.warnings


@pytest.mark.parametrize("method", SIGNED)
def test_the_picture_of_a_class_without_evidence_for_is_not_black(method: str) -> None:
    """Both polarities share one scale: the empty one stays empty, the other one has its colours."""
    maps = mg.draw(_explain(one_sided(-1), method))
    assert not maps.raises.values.any()
    assert maps.raises.peak == maps.lowers.peak > 0
    assert float(maps.lowers.values.max()) >= 0.5 * maps.lowers.peak
    assert maps.coloured_share > 0.1


@pytest.mark.parametrize("method", SIGNED)
def test_of_two_classes_what_one_lacks_the_other_one_lacks_against(method: str) -> None:
    net = one_sided(1)
    net.rest = nets.made(lambda: nets.Pooled(6, 2))
    weight = nets.weight(net, "rest.head")
    weight.copy_(torch.stack([-weight[0].abs(), weight[0].abs()]))
    found = [_explain(net, method, link="softmax", target=t).notices for t in (0, 1)]
    assert found == [("no_positive_evidence",), ("no_negative_evidence",)]


def test_a_densenet_with_evidence_on_one_side_alone() -> None:
    """Where peers draw all black, or, upside down, all of the scan as most important."""
    net = architectures.made("DenseNet121")
    made = mg.explain_many(
        [nets.volume(32)], net, target=[0, 1], layer="class_layers.relu", method="gradcam"
    )
    assert {e.notices for e in made} == {("no_positive_evidence",), ("no_negative_evidence",)}
    for e in made:
        assert e.evidence.any()
        assert mg.draw(e).coloured_share > 0.1


@pytest.mark.parametrize("method", SIGNED)
def test_evidence_on_both_sides_needs_no_notice(method: str) -> None:
    assert _explain(nets.made(nets.gated), method, link=None, target=1).notices == ()


@pytest.mark.parametrize("method", ["layercam", "gradcam_pp"])
def test_a_map_of_one_sign_alone_is_refused_where_it_is_empty(method: str) -> None:
    with pytest.raises(CannotExplainError, match="zero or not finite everywhere") as caught:
        _explain(one_sided(-1), method)
    assert caught.value.reason == "zero evidence"


@pytest.mark.parametrize("method", ["layercam", "gradcam_pp", "eigencam"])
def test_a_map_without_a_sign_says_nothing_of_evidence_against(method: str) -> None:
    assert _explain(one_sided(1), method).notices == ()


# ------------------------------------------------------------------------- balanced by a norm


def _normed() -> nn.Module:
    net = nets.made(nets.instance_normed)
    nets.weight(net, "first.0").mul_(30)  # far above what keeps the norm from dividing by zero
    return net


@pytest.mark.parametrize("method", ["hirescam", "xgradcam"])
def test_a_norm_behind_the_layer_balances_for_and_against(method: str) -> None:
    made = _explain(_normed(), method, image=nets.volume(), link=None, target=1)
    assert made.notices == ("balanced_by_construction",)
    assert made.sum_for == pytest.approx(made.sum_against, rel=1e-3)
    assert any(words.startswith("for equals against") for words in made.warnings)


@pytest.mark.parametrize("method", ["secant", "integrated", "gradcam"])
def test_methods_that_are_not_balanced_by_it_do_not_say_so(method: str) -> None:
    made = _explain(_normed(), method, image=nets.volume(), link=None, target=1)
    assert made.notices == ()


# ------------------------------------------------------------------------- saturated, alike


class Clamped(nn.Module):
    """A score that stops moving at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU()), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = self.head(self.first(x).mean((2, 3, 4)))
        return torch.clamp(10 * seen + 3, -1, 1)


BRIGHT = nets.as_volume(3 * nets.scan())


def test_a_score_that_no_longer_moves_is_saturated() -> None:
    made = _explain(nets.made(Clamped), "integrated", image=BRIGHT, link="none")
    assert made.score == 1
    assert made.reference_score == pytest.approx(0.48, abs=0.01)
    assert made.notices == ("saturated",)
    other = nets.made(Clamped)
    nets.weight(other, "head").mul_(0.01)
    nets.weight(other, "head", "bias").fill_(-0.3)
    assert _explain(other, "integrated", image=BRIGHT, link="none").notices == ()


def test_secant_adds_up_where_the_score_is_saturated() -> None:
    made = _explain(nets.made(Clamped), "secant", image=BRIGHT, link="none")
    assert made.status == "complete"
    assert made.sum_for - made.sum_against == pytest.approx(1 - 0.48, abs=0.01)


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_a_gradient_of_zero_is_no_map(method: str) -> None:
    with pytest.raises(CannotExplainError, match="its gradient is zero") as caught:
        _explain(nets.made(Clamped), method, image=BRIGHT, link="none")
    assert caught.value.reason == "zero gradient"


@pytest.mark.parametrize("method", ["secant", "integrated"])
def test_a_scan_that_is_its_own_reference_has_nothing_to_explain(method: str) -> None:
    made = _explain(nets.made(nets.gated), method, link=None, target=1, reference=SCAN)
    assert made.notices == ("like_reference",)
    assert made.status == "complete"
    assert not made.evidence.any()
    assert (made.score, made.sum_for, made.residual) == (made.reference_score, 0, 0)


def test_a_layer_that_nothing_comes_through_is_told_by_either_way() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nets.conv(1, 6, 2), nets.Pooled(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(torch.relu(self.first(x) - 100))
            return out

    assert _explain(nets.made(Dead), "secant", link=None).notices == ("like_reference",)
    for method in ("gradcam", "hirescam", "integrated"):
        with pytest.raises(CannotExplainError, match="its gradient is zero"):
            _explain(nets.made(Dead), method, link=None)


# ------------------------------------------------------------------------- what quick gives up


class Deep(nn.Module):
    """Three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nets.conv(1, 4), nn.ReLU())
        self.b = nn.Sequential(nets.conv(4, 6, 2), nn.ReLU())
        self.c = nn.Sequential(nets.conv(6, 8, 2), nn.ReLU())
        self.head = nets.Pooled(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.c(self.b(self.a(x))))
        return out


def _quick(made: mg.Explanation) -> list[str]:
    return [words for words in made.warnings if words.startswith("quick:")]


def test_quick_says_what_it_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("the layers were tested")

    monkeypatch.setattr(causal, "choose", never)
    made = mg.explain(nets.volume(), nets.made(Deep), quick=True)
    assert made.layer == "c"
    assert not made.trials
    assert not made.regions
    assert _quick(made) == [
        "quick: the coarsest layer was taken untested, and the scan was not run a second time"
    ]
    assert made.provenance.parameters["quick"] is True


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer": "b"}, ["quick: the scan was not run a second time"]),
        ({"layer": "b", "method": "integrated"}, []),
        ({"layer": "b", "method": "gradcam"}, []),
        ({"method": "integrated"}, ["quick: the coarsest layer was taken untested"]),
        ({"method": "gradcam"}, ["quick: the coarsest layer was taken untested"]),
    ],
)
def test_quick_says_no_more_than_it_gave_up(settings: dict[str, Any], said: list[str]) -> None:
    assert _quick(mg.explain(nets.volume(), nets.made(Deep), quick=True, **settings)) == said
    assert _quick(mg.explain(nets.volume(), nets.made(Deep), **settings)) == []


@pytest.mark.parametrize("quick", [False, True])
def test_a_network_that_answers_differently_each_time_is_seen(quick: bool) -> None:
    class Noisy(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x)
            return out + torch.randn_like(out)

    with pytest.raises(CannotExplainError, match="a different score each time"):
        mg.explain(nets.volume(), nets.made(Noisy), layer="c", quick=quick)
