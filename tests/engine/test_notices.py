"""Is what a picture would hide said: nothing for, nothing against, balanced, saturated, alike?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import explaining, outcome
from med_gradcam.capture import Capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import NOTICE_WORDS, Region
from med_gradcam.methods import Evidence
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
    assert made.notices == ()


def test_a_sure_network_does_not_saturate_secant() -> None:
    """Ten times the weights of the head: the probability is 1 to five digits, the map the same."""
    once, tenfold = nets.made(nets.gated), nets.made(nets.gated)
    for name in ("weight", "bias"):
        nets.weight(once, "rest.3.head", name).mul_(40)
        nets.weight(tenfold, "rest.3.head", name).mul_(400)
    one, ten = (_explain(net, "secant", image=BRIGHT, link=None) for net in (once, tenfold))
    assert one.probability is not None
    assert ten.probability is not None
    assert one.probability < 0.999
    assert ten.probability > 0.99999
    assert ten.notices == one.notices == ()
    np.testing.assert_allclose(ten.evidence, 10 * one.evidence, rtol=1e-4, atol=1e-5)


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


UNTESTED = "quick: the coarsest layer was taken untested, and the scan was not run a second time"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer": "b"}, ["quick: the scan was not run a second time"]),
        ({"layer": "b", "method": "integrated"}, ["quick: the scan was not run a second time"]),
        ({"layer": "b", "method": "gradcam"}, []),
        (
            {"method": "integrated"},
            [UNTESTED],
        ),
        (
            {"method": "gradcam"},
            [UNTESTED],
        ),
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


# --------------------------------------------------------------- near the score of the reference


class Planted(nn.Module):
    """Two regions of one worth and opposite signs, and next to nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.ReLU()), nn.AvgPool3d(2)
        with torch.no_grad():
            self.get_parameter("a.0.weight").fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.b(self.a(x))[:, 0]
        raises, lowers = places[:, :4].sum((1, 2, 3)), places[:, 4:].sum((1, 2, 3))
        return torch.stack([0 * raises, 0.05 * (raises - lowers)], 1)


def _two_blobs() -> mg.Volume:
    array = np.zeros((1, 16, 16, 16), dtype=np.float32)
    array[0, 3:6, 6:10, 6:10] = array[0, 10:13, 6:10, 6:10] = 1.0
    return nets.as_volume(array)


def test_findings_that_cancel_out_are_no_rounding_noise() -> None:
    made = mg.explain(_two_blobs(), nets.made(Planted), target=1)
    assert made.score == pytest.approx(made.reference_score or 0.0, abs=1e-6)
    assert made.sum_for == pytest.approx(made.sum_against, rel=1e-5)
    assert made.sum_for > 0.1
    assert "like_reference" not in made.notices


@pytest.mark.parametrize(
    ("score", "against", "effect", "matters"),
    [
        (1.0, 0.0, 0.0, True),
        (0.3, 0.3, 1.39, True),  # two findings that cancel out
        (0.3, 0.3, 0.001, False),  # a scan without findings
        (0.0, None, 0.0, True),  # nothing to compare with
    ],
)
def test_the_test_of_the_layers_is_told_where_something_moves_the_score(
    score: float, against: float | None, effect: float, *, matters: bool
) -> None:
    first = Capture("a", torch.zeros(1, 1, 1, 1), nets.score_of(), score, None)  # type: ignore[arg-type]
    first.reference_score = against
    region = Region((0.0, 0.0, 0.0), 8.0, "random", 0.0, effect)
    choice = causal.Choice("a", (), (region,), "planted note")
    target = nets.score_of(link="softmax")
    assert explaining._matters(first, target, choice) is matters


def test_rounding_errors_are_no_map() -> None:
    class Flat(Planted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e-8 * super().forward(x) + 1.0

    made = mg.explain(_two_blobs(), nets.made(Flat), target=1, layer="a", link="none")
    assert "like_reference" in made.notices
    assert not made.evidence.any()


def test_a_sum_within_the_least_that_counts_is_said_to_be_no_more() -> None:
    """The bound of `integrated` is 0.02 log-odds where the difference is smaller than that."""
    seen = Capture("a", torch.zeros(1, 1, 1, 1), nets.score_of(), 0.05, None)  # type: ignore[arg-type]
    seen.reference_score = 0.0
    made = [
        outcome.status(
            seen,
            Evidence(torch.full((1, 1, 1), total, dtype=torch.float64), 0.0, converged=True),
            "a",
            promises=True,
        )
        for total in (0.05, 0.049, 0.035)
    ]
    assert [status for status, _, _ in made] == ["complete"] * 3
    assert [len(warnings) for _, _, warnings in made] == [0, 0, 1]
    assert "misses 0.015 of a difference of 0.05" in made[2][2][0]


def test_what_fullgrad_leaves_out_is_not_said_to_flow_past_a_layer() -> None:
    """A network in one line: there is no way past anything; the head's bias has no place."""
    made = mg.explain(nets.volume(), nets.made(nets.pooled_linear), target=1, method="fullgrad")
    assert made.status == "not_a_cut"
    (said,) = [words for words in made.warnings if "leaves that part out" in words]
    assert "of the score has no place in the scan (biases behind pooling" in said
    assert not any("skip" in words or "flows past" in words for words in made.warnings)
