"""Is nothing painted where there is nothing to see, whichever method is asked, the default too?

P27 of docs/properties.md for every method at a layer and every method at the scan: broken numbers,
a score that does not move, a layer that is dead, a scan that is constant. What each refusal says:
test_guards.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import _plugins, outcome, reference
from med_gradcam.errors import CannotExplainError
from tests.engine import nets

NAMES = tuple(_plugins.names("methods"))
CLASS_FREE = ("eigencam", "kpcacam")  # their map knows no score


def explained(net: nn.Module, method: str, **settings: Any) -> mg.Explanation:
    image = settings.pop("image", nets.volume())
    settings = {"target": 0, "layer": "first", "reference": nets.volume(seed=5), **settings}
    if _plugins.load("methods", method).LEVEL == "input":
        settings["layer"] = "auto"
    return mg.explain(image, net, method=method, **settings)


class Dead(nn.Module):
    """A score that `first` does not reach: times zero, or not used at all."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.first, self.other, self.head = nets.conv(1, 6, 2), nets.conv(1, 6, 2), nets.Pooled()
        self.used = used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        out: torch.Tensor = self.head(self.other(x) + 0.0 * first if self.used else self.other(x))
        return out


def still() -> nn.Module:
    """A score that nothing moves: all weights behind the layer are zero."""
    net = nets.made(nets.pooled_linear)
    nets.weight(net, "rest.head").zero_()
    return net


def silent() -> nn.Module:
    """A layer whose ReLU is shut everywhere, whatever the scan."""
    net = nets.made(nets.pooled_linear)
    nets.weight(net, "first.0").zero_()
    nets.weight(net, "first.0", "bias").fill_(-1.0)
    return net


def broken(value: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = nets.made(nets.gated)
        nets.weight(net, "rest.3.head")[0, 0] = value
        return net

    return make


LAYER = [n for n in NAMES if _plugins.load("methods", n).LEVEL == "layer"]

SCAN = [n for n in NAMES if n not in LAYER]


def refused(net: nn.Module, method: str, **settings: Any) -> str:
    with pytest.raises(CannotExplainError) as caught:
        explained(net, method, **settings)
    return caught.value.reason


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value: float, method: str) -> None:
    assert refused(nets.made(broken(value)), method) == "not finite"


@pytest.mark.parametrize("method", NAMES)
def test_a_constant_scan_is_refused(method: str) -> None:
    flat = nets.as_volume(np.full((1, 16, 16, 16), 40.0, np.float32))
    assert refused(nets.made(nets.gated), method, image=flat) == "constant volume"


@pytest.mark.parametrize("method", LAYER)
@pytest.mark.parametrize("used", [True, False])
def test_a_layer_that_the_score_does_not_depend_on_is_refused(used: bool, method: str) -> None:
    reason = refused(nets.made(lambda: Dead(used=used)), method)
    assert reason == ("zero evidence" if method == "secant" else "zero gradient")


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("maker", [still, silent])
def test_a_score_that_nothing_moves_gives_no_picture(
    maker: Callable[[], nn.Module], method: str
) -> None:
    """Refused; or, by methods that hold the scan against a reference, empty and told as such."""
    try:
        made = explained(maker(), method)
    except CannotExplainError as error:
        assert error.reason in ("zero gradient", "zero evidence")  # noqa: PT017 - one of two ways
        assert method != "secant"
        return
    assert method in ("secant", "integrated", "scorecam")
    assert not made.evidence.any()
    assert made.notices == ("like_reference",)
    assert any("nothing raises or lowers it" in words for words in made.warnings)
    assert mg.draw(made).coloured_share == 0.0


def test_a_guard_that_sleeps_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: constant scans and layers without influence pass."""
    monkeypatch.setattr(reference, "check_contrast", lambda _prepared: None)
    monkeypatch.setattr(outcome, "check_evidence", lambda *_a: None)
    for test in (
        test_a_constant_scan_is_refused,
        lambda method: test_a_layer_that_the_score_does_not_depend_on_is_refused(True, method),
    ):
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            test("secant")
