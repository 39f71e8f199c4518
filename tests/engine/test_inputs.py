"""Is a network that takes more than the scan explained as the same one of the scan alone?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import extras
from med_gradcam.errors import CannotExplainError, ModelError, UsageError
from med_gradcam.placement import sees_scan
from med_gradcam.tail import at_rest
from tests.engine import nets

METHODS = ("secant", "integrated", "hirescam", "gradcam")
AGE = torch.tensor([[0.3, -1.0, 2.0]])
SCAN = nets.volume()


class Clinical(nn.Module):
    """An image and three clinical values, mixed behind the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU())
        self.mix, self.head = nn.Linear(9, 8), nn.Linear(8, 3)

    def both(self, image: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([self.first(image).mean((2, 3, 4)), age], 1)
        out: torch.Tensor = self.head(torch.relu(self.mix(seen)))
        return out

    def forward(self, image: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        return self.both(image, age)


class AgeFirst(Clinical):
    def forward(self, age: torch.Tensor, image: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.both(image, age)


class ByName(Clinical):
    def forward(self, image: torch.Tensor, *, age: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.both(image, age)


class Branches(nn.Module):
    """Two scans, a branch each; `big` downsamples more."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU())
        self.big = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU(), nets.conv(6, 6, 2), nn.ReLU())
        self.head = nn.Linear(12, 2)

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        seen = [self.small(one).mean((2, 3, 4)), self.big(two).mean((2, 3, 4))]
        out: torch.Tensor = self.head(torch.cat(seen, 1))
        return out


class Alone(nn.Module):
    """The clean model: what else it takes is part of it."""

    def __init__(self, net: nn.Module, call: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.net, x)


def _same(made: mg.Explanation, wanted: mg.Explanation) -> None:
    size = np.abs(wanted.evidence).max()
    assert np.abs(made.evidence - wanted.evidence).max() <= 1e-6 * size
    assert made.score == pytest.approx(wanted.score, rel=1e-6)
    assert (made.target, made.status, made.method) == (wanted.target, wanted.status, wanted.method)
    assert made.grid == wanted.grid


GIVEN: dict[str, tuple[type[nn.Module], Any]] = {
    "by name": (Clinical, {"age": AGE}),
    "by place": (Clinical, (..., AGE)),
    "behind the scan": (Clinical, (AGE,)),
    "a list": (Clinical, [..., AGE]),
    "before the scan": (AgeFirst, (AGE, ...)),
    "by name only": (ByName, {"age": AGE}),
    "an array": (Clinical, {"age": AGE.numpy()}),
    "an array of double precision": (Clinical, {"age": AGE.double().numpy()}),
    "part of a graph": (Clinical, {"age": AGE.clone().requires_grad_()}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", GIVEN)
def test_clinical_values_are_handed_in(method: str, how: str) -> None:
    kind, inputs = GIVEN[how]
    clean = Alone(nets.made(Clinical), lambda net, x: net(x, AGE))
    wanted = mg.explain(SCAN, clean, layer="net.first", method=method)
    made = mg.explain(SCAN, nets.made(kind), layer="first", method=method, inputs=inputs)
    _same(made, wanted)


def test_other_values_give_another_map() -> None:
    """Guards the test above: the clinical values matter."""
    one, other = (
        mg.explain(SCAN, nets.made(Clinical), layer="first", target=1, inputs={"age": age})
        for age in (AGE, -AGE)
    )
    assert np.abs(one.evidence - other.evidence).max() > 0.1 * np.abs(one.evidence).max()


@pytest.mark.parametrize("method", METHODS)
def test_each_branch_has_a_map_of_its_own(method: str) -> None:
    """The scan that is explained goes where the ... stands; the other one is an input."""
    net, size = nets.made(Branches), {"small": 8, "big": 4}
    second = nets.scan(seed=3)[None]
    one = mg.explain(SCAN, net, layer="small", method=method, target=1, inputs=(..., second))
    clean = Alone(net, lambda net, x: net(x, torch.tensor(second)))
    _same(one, mg.explain(SCAN, clean, layer="net.small", method=method, target=1))
    other = mg.explain(
        second, net, layer="big", method=method, target=1, inputs=(SCAN.array[None].copy(), ...)
    )
    clean = Alone(net, lambda net, x: net(torch.tensor(SCAN.array[None].copy()), x))
    _same(other, mg.explain(second, clean, layer="net.big", method=method, target=1))
    assert one.evidence.shape == (size["small"],) * 3
    assert other.evidence.shape == (size["big"],) * 3
    assert one.score == pytest.approx(other.score, rel=1e-6), "one prediction, seen from two sides"


@pytest.mark.parametrize("method", ["secant", "gradcam"])
def test_the_automatic_layer_is_in_the_scan_s_own_branch(method: str) -> None:
    net, second = nets.made(Branches), nets.scan(seed=3)[None]
    one = mg.explain(SCAN, net, method=method, inputs=(..., second))
    other = mg.explain(second, net, method=method, inputs=(SCAN.array[None].copy(), ...))
    assert one.layer.startswith("small")
    assert other.layer.startswith("big")


class Unlinked(Branches):
    """No gradient leads to either branch."""

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().forward(one, two)


@pytest.mark.parametrize("layer", ["big", "big.0"])
@pytest.mark.parametrize("method", [*METHODS, "eigencam", "guided_gradcam"])
def test_the_other_branch_s_layer_does_not_see_the_scan(method: str, layer: str) -> None:
    net, inputs = nets.made(Branches), (..., nets.scan(seed=3)[None])
    says = f"expected a layer that sees the scan, '{layer}' does not.* another input of the network"
    with pytest.raises(CannotExplainError, match=says) as caught:
        mg.explain(SCAN, net, layer=layer, method=method, inputs=inputs)
    assert caught.value.reason == "other input"


@pytest.mark.parametrize("kind", [Branches, Unlinked])
def test_what_a_layer_sees_is_told_without_a_gradient_too(kind: type[nn.Module]) -> None:
    net = nets.made(kind)
    with at_rest(net), extras.joined(net, (..., nets.scan(seed=3)[None]), torch.device("cpu")):
        assert sees_scan(net, "small", (1, 16, 16, 16))
        assert not sees_scan(net, "big", (1, 16, 16, 16))


@pytest.mark.parametrize("linked", [True, False])
def test_a_layer_that_sees_the_scan_somewhere_is_not_called_another_input(linked: bool) -> None:
    class Turned(nn.Module):
        """Each cell of the layer sees all of the scan, by a gradient or without one."""

        def __init__(self) -> None:
            super().__init__()
            self.mix, self.layer, self.head = nn.Linear(512, 216), nets.conv(1, 6), nets.Pooled(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(1) if linked else x.detach().flatten(1)
            seen = torch.relu(self.mix(flat)).reshape(-1, 1, 6, 6, 6)
            out: torch.Tensor = self.head(torch.relu(self.layer(seen)))
            return out

    with pytest.raises(CannotExplainError, match="cannot be told") as caught:
        mg.explain(nets.volume(8), nets.made(Turned), layer="layer", method="gradcam")
    assert caught.value.reason == "placement"


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_scans_shares_them(method: str) -> None:
    scans = [nets.volume(seed=seed) for seed in range(3)]
    settings: dict[str, Any] = {"layer": "first", "method": method, "inputs": {"age": AGE}}
    net = nets.made(Clinical)
    made = mg.explain_many(scans, net, batch=3, **settings)
    for one, scan in zip(made, scans, strict=True):
        _same(one, mg.explain(scan, net, **settings))


def test_half_precision_reaches_the_other_inputs_too() -> None:
    net = nets.made(Clinical)
    wanted = mg.explain(SCAN, net, layer="first", target=1, inputs={"age": AGE})
    made = mg.explain(SCAN, net.half(), layer="first", target=1, inputs={"age": AGE})
    assert np.corrcoef(made.evidence.ravel(), wanted.evidence.ravel())[0, 1] > 0.99


def test_numbers_that_are_none_of_the_network_s_format_stay() -> None:
    class Kind(Clinical):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, image: torch.Tensor, kind: torch.Tensor, how: str) -> torch.Tensor:  # type: ignore[override]
            assert how == "as it is"
            return self.both(image, self.table(kind))

    net = nets.made(Kind)
    made = mg.explain(SCAN, net, layer="first", inputs=(..., torch.tensor([2]), "as it is"))
    assert made.status == "complete"


def test_the_network_and_the_inputs_stay_as_they_were() -> None:
    net, age = nets.made(Clinical), AGE.clone().requires_grad_()
    before = age.detach().clone()
    mg.explain(SCAN, net, layer="first", inputs={"age": age})
    assert "forward" not in net.__dict__
    assert torch.equal(age.detach(), before)
    assert age.grad is None
    own = type(net).forward.__get__(net)
    net.__dict__["forward"] = own
    with pytest.raises(ModelError):
        mg.explain(SCAN, net, layer="first", inputs={"years": age})
    assert net.__dict__["forward"] is own


# ------------------------------------------------------------------------------- what will not do


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        (3, UsageError, r"expected the network's other inputs as a dict .* got int"),
        ("age", UsageError, r"as a dict by name, or as a tuple .* got str"),
        ((..., AGE, ...), UsageError, r"expected one \.\.\. for the scan .* got 2"),
        ({"years": AGE}, ModelError, r"'Clinical' to run .* unexpected keyword argument 'years'"),
        ((AGE, AGE), ModelError, r"'Clinical' to run .* positional arguments"),
        ({"age": AGE[:, :2]}, ModelError, r"'Clinical' to run .* cannot be multiplied"),
        (None, ModelError, r"'Clinical' to run .* missing 1 required positional argument"),
        ({}, ModelError, r"'Clinical' to run .* missing 1 required positional argument"),
    ],
)
def test_inputs_that_do_not_fit_are_told(inputs: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mg.explain(SCAN, nets.made(Clinical), layer="first", inputs=inputs)


def test_the_place_of_the_scan_is_the_first_where_none_is_given() -> None:
    found = extras.check((AGE,))
    assert isinstance(found, tuple)
    assert found[0] is ...
    assert found[1] is AGE
    assert extras.check(None) is None
