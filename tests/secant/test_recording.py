"""Is what a network does in place, on views and with buffers written down as what it does?"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from med_gradcam.secant.memory import overlap, place
from med_gradcam.secant.pair import share
from med_gradcam.secant.recorder import Recorder
from med_gradcam.tail import INPUT
from tests.secant.in_place import IN_PLACE, Made, views_of_views
from tests.secant.pairs import Function, both, noise, off, shared

EXACT = 1e-9
X, R = noise(2, 4, 6, seed=1), noise(2, 4, 6, seed=2)


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_work_in_place_is_followed(function: Made) -> None:
    found = shared(Function(function), X, R)
    assert off(found) <= EXACT
    assert not found.past[INPUT]
    # Behind a layer, so that what comes first is followed without its values.
    net = nn.Sequential(Function(lambda x: views_of_views(x) + x), nn.Tanh(), Function(function))
    found = shared(net, X, R, ["1"])
    assert off(found, "1") <= EXACT
    assert not found.past["1"]


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_the_forward_is_the_plain_one(function: Made) -> None:
    net = Function(function)
    with torch.no_grad():
        plain = net(X.clone())
    case, _ = both(net, X, R)
    assert torch.equal(case.output, plain)


class Late(nn.Module):
    """A layer whose output the next one overwrites, and a path around the layer."""

    def __init__(self, *, around: bool) -> None:
        super().__init__()
        self.first, self.act, self.around = nn.Linear(6, 6), nn.ReLU(inplace=True), around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.act(y) * 2  # y is gone, and z made of what took its place
        out: torch.Tensor = z + y + (x if self.around else 0)
        return out


@pytest.mark.parametrize("cut", [False, True])
def test_a_layer_that_is_overwritten_keeps_its_own_activation(cut: bool) -> None:
    torch.manual_seed(0)
    net = Late(around=False).double()
    found = share(*both(net, X, R, ["first"], cut=cut), ["first"])
    assert torch.equal(found.case.activations["first"], net.first(X))
    assert off(found, "first") <= EXACT
    assert not found.past["first"]
    found = share(*both(net, X, R, ["act"], cut=cut), ["act"])
    assert off(found, "act") <= EXACT
    assert not found.past["act"]


def test_a_path_around_an_overwritten_layer_is_seen() -> None:
    torch.manual_seed(0)
    assert shared(Late(around=True).double(), X, R, ["act"]).past["act"]


class Early(nn.Module):
    """A value that is used before it goes through the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        early = y.exp()
        out: torch.Tensor = self.layer(y).sin() + early
        return out


def test_a_use_before_the_layer_ran_passes_it_by() -> None:
    found = shared(Early(), X, R, ["layer"])
    assert found.past["layer"]
    assert off(found, "layer") > 0.01


class Viewed(nn.Module):
    """A layer that puts out a view; the network goes on with that and with what it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        flat = self.layer(y)
        y.sigmoid_()  # so that the view changes, too, by a path past the layer
        out: torch.Tensor = flat * 3 + y.flatten(1)
        return out


@pytest.mark.parametrize("cut", [False, True])
def test_what_a_view_looks_at_goes_past_the_layer(cut: bool) -> None:
    found = share(*both(Viewed(), X, R, ["layer"], cut=cut), ["layer"])
    assert found.past["layer"]
    assert float(found.multipliers["layer"].abs().max()) == 0.0


def test_two_layers_with_one_tensor_both_get_it_all() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Dropout(), nn.Linear(24, 3)).double()
    found = shared(net, X, R, ["0", "1", "2"])
    for layer in ("0", "1", "2"):
        assert off(found, layer) <= EXACT
        assert not found.past[layer]


@pytest.mark.parametrize(
    ("base", "view"),
    [
        (torch.zeros(4, 6), lambda b: b[1:3, ::2]),
        (torch.zeros(4, 6), lambda b: b.t()[2:]),
        (torch.zeros(4, 6), lambda b: b.view(-1)[5:]),
        (torch.zeros(4, 6)[:, 1:5], lambda b: b.as_strided((4, 6), (6, 1), 0)),
        (torch.zeros(4, 6)[::2], lambda b: b.as_strided((2,), (12,), 0)),
        (torch.zeros(3, 1).expand(3, 4), lambda b: b[1]),
        (torch.zeros(2, 3)[:0], lambda b: b.t()),
    ],
)
def test_places_of_a_view_in_its_base(base: torch.Tensor, view: Any) -> None:
    inside = view(base)
    found = overlap(place(base), place(inside))
    assert found.shape == inside.shape
    # By force: write each element's number, one by one, and look where it shows.
    for at in range(base.numel()):
        if base.stride()[-1] == 0:
            break
        base.zero_()
        base[tuple(int(v) for v in torch.unravel_index(torch.tensor(at), base.shape))] = 1.0
        assert torch.equal(found == at, inside == 1.0)


def test_an_address_used_again_is_another_memory() -> None:
    recorder = Recorder()
    x = noise(1000)
    number = recorder.leaf(x, active=True)
    with torch.no_grad(), recorder:
        seen = set()
        for _ in range(50):
            y = x + 1
            y.relu_()
            seen.add(y.data_ptr())
            del y
            other = torch.ones(1000, dtype=torch.float64)
            assert recorder.find(other) == -1
    assert len(seen) < 50  # addresses were used again, or this proves nothing
    assert recorder.find(x) == number


def test_nothing_is_left_behind() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    shared(net, X, R, [INPUT, "0"])
    assert net.training
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert torch.equal(X, noise(2, 4, 6, seed=1))


def test_tensors_live_no_longer_than_without() -> None:
    """The recorder keeps no value before the layer alive."""
    gone: list[bool] = []

    def first(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        memory = weakref.ref(y.untyped_storage())
        y.relu_()
        z: torch.Tensor = y[:, :2] * 3
        del y
        gone.append(memory() is None)
        return z

    both(nn.Sequential(Function(first), nn.Tanh()), X, R, ["1"])
    assert gone == [True, True]
