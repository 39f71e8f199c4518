"""Is the tail, run alone, the network: same score, same gradient, the model left as it was?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

import med_gradcam as mg
from med_gradcam.capture import capture, captures
from med_gradcam.errors import Cancelled, CannotExplainError
from med_gradcam.progress import Step
from med_gradcam.tail import at_rest, record
from tests.engine import nets
from tests.oracle import papers


class Nested(nn.Module):
    """Sequentials in Sequentials, some of their parts at work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nets.conv(1, 4, 2), nn.Sequential(nn.ReLU(), nets.conv(4, 4)))
        self.layer = nn.Sequential(nets.conv(4, 4), nn.ReLU(inplace=True))
        self.rest = nn.Sequential(nn.ReLU(inplace=True), nets.conv(4, 4), nets.Pooled(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rest(self.layer(self.a(x)))
        return out


class Functional(nn.Module):
    """Bare functions between modules, before and after the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.layer, self.b = nets.conv(1, 4, 2), nets.conv(4, 4), nets.conv(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.elu(self.a(x) * 1.5 - 0.1)
        layer = self.layer(a)
        both = torch.cat([F.relu(layer), torch.sigmoid(a)], dim=1)
        out: torch.Tensor = self.head(F.max_pool3d(self.b(both), 2).mean(dim=(2, 3, 4)))
        return out


class Unet(nn.Module):
    """Skip connections from before the layer to behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2, self.layer = nets.conv(1, 4), nets.conv(4, 4, 2), nets.conv(4, 6, 2)
        self.d2, self.d1 = nets.conv(10, 4), nets.conv(8, 4)
        self.head = nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.relu(self.e1(x))
        two = torch.relu(self.e2(one))
        three = self.layer(two)
        up = self.d2(torch.cat([F.interpolate(three, scale_factor=2.0), two], 1))
        up = self.d1(torch.cat([F.interpolate(torch.relu(up), scale_factor=2.0), one], 1))
        out: torch.Tensor = self.head(torch.relu(up))
        return out


class Repeated(nn.Module):
    """One module at work twice before the layer and once behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.layer = nets.conv(1, 4, 2), nets.conv(4, 4), nets.conv(4, 4)
        self.head = nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.tanh(self.twice(self.a(x)))
        two = torch.tanh(self.twice(one) + one)
        out: torch.Tensor = self.head(self.twice(torch.relu(self.layer(two))) + two)
        return out


class Residual(nn.Module):
    """As in ResNet: `out += shortcut`, then a ReLU in place; the layer is the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.bn = nets.conv(1, 4), nets.conv(4, 4, 2), nn.BatchNorm3d(4)
        self.relu, self.layer = nn.ReLU(inplace=True), nets.conv(4, 4, 2)
        self.head = nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        out = self.bn(self.conv1(x))
        shortcut = self.layer(x)
        out += shortcut
        out = self.relu(out)
        result: torch.Tensor = self.head(out)
        return result


class InPlaceFunctions(nn.Module):
    """Functions that work in place on what modules put out, before and after the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.layer, self.b = nets.conv(1, 4, 2), nets.conv(4, 4), nets.conv(4, 4)
        self.head = nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        a += 0.5
        a = F.relu(a, inplace=True)
        layer = self.layer(a)
        layer *= 2.0
        layer = F.relu(layer, inplace=True)
        out: torch.Tensor = self.head(self.b(layer) + a)
        return out


class OnItsInput(nn.Module):
    """Works in place on the scan itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nets.conv(1, 4, 2), nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.25
        x.mul_(2.0)
        out: torch.Tensor = self.head(torch.relu(self.layer(x)))
        return out


class ByMemory(nn.Module):
    """Hands a feature from a part to another by an attribute, past every call."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nets.conv(1, 4), nets.conv(4, 4, 2)
            self.kept: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = torch.relu(self.one(x))
            out: torch.Tensor = self.two(self.kept)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.layer, self.head = self.Encoder(), nets.conv(4, 4), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = torch.relu(self.layer(self.encoder(x)))
        assert self.encoder.kept is not None
        both = torch.cat([deep.mean(dim=(2, 3, 4)), self.encoder.kept.mean(dim=(2, 3, 4))], 1)
        out: torch.Tensor = self.head(both)
        return out


class Dropped(nn.Module):
    """Dropout in every form, silent in eval mode; a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nets.conv(1, 4, 2), nn.BatchNorm3d(4), nn.Dropout3d(0.5))
        self.rest = nn.Sequential(nn.Dropout(0.5), nets.conv(4, 4), nn.ReLU(), nets.Pooled(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rest(F.dropout(self.layer(x), 0.5, self.training))
        return out


class Wrapped(nn.Module):
    """The score inside a dict or a tuple."""

    def __init__(self, wrap: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.head, self.wrap = nets.conv(1, 4, 2), nets.Pooled(4), wrap

    def forward(self, x: torch.Tensor) -> Any:
        layer = self.layer(x)
        return self.wrap(self.head(torch.relu(layer)), layer)


class Passing(nn.Module):
    """Parts that hand on tuples, lists and dicts."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nets.conv(1, 4, 2), nets.conv(1, 4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return {"maps": [self.one(x), self.two(x)], "count": 2, "none": None}

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.layer, self.head = self.Pair(), nets.conv(4, 4), nets.Pooled(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.pair(x)
        maps = found["maps"]
        maps.append(self.layer(maps.pop()))  # the list itself is changed, too
        out: torch.Tensor = self.head(torch.cat([m * found["count"] for m in maps], 1))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "nested": Nested,
    "functions between": Functional,
    "skip connections": Unet,
    "a module at work three times": Repeated,
    "in place after the layer": Residual,
    "functions in place": InPlaceFunctions,
    "in place on the scan": OnItsInput,
    "a feature kept as attribute": ByMemory,
    "dropout": Dropped,
    "dict": lambda: Wrapped(lambda out, extra: {"logits": out, "extra": extra}),
    "tuple": lambda: Wrapped(lambda out, extra: (out, [extra])),
    "parts that hand on a dict": Passing,
}


@pytest.mark.parametrize("name", NETS)
def test_the_tail_gives_the_whole_network_s_score_and_gradient(name: str) -> None:
    net = nets.made(NETS[name], dtype=torch.float64)
    x, target = nets.batch(nets.scan(), torch.float64), nets.score_of(1, "softmax")
    activation, gradient = papers.full_gradient(net, "layer", x.clone(), target)
    with at_rest(net):
        before = x.clone()
        recorded = record(net, ["layer"], x)
        record(net, ["layer"], x + 1.0)  # as explain() does with the reference
        made = captures(recorded, target, None)["layer"]
        assert torch.allclose(made.activation, activation, rtol=1e-12, atol=1e-14)
        assert torch.allclose(made.gradient(), gradient, rtol=1e-9, atol=1e-14)
        points = torch.stack([t * made.activation for t in (1.0, 0.5, 1.0)])
        scores, gradients = made.scores(points), made.gradients(points)
        assert made.score == pytest.approx(float(scores[0]), rel=1e-12)
        assert torch.allclose(scores[0], scores[2], rtol=1e-12)
        assert torch.allclose(gradients[0], gradient, rtol=1e-9, atol=1e-14)
        assert torch.equal(x, before), "the scan was changed"
        half = papers.gradient_at(net, "layer", x.clone(), target, points[1:2])
        assert torch.allclose(gradients[1], half[0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "alone", "remembers"),
    [
        ("nested", False, True),
        ("functions between", False, True),
        ("skip connections", False, True),
        ("a module at work three times", False, True),
        ("in place after the layer", True, True),  # in place on what is shared by a batch
        ("functions in place", True, True),
        ("a feature kept as attribute", True, False),
    ],
)
def test_the_tail_pays_no_more_than_it_must(name: str, alone: bool, remembers: bool) -> None:
    x, reference = (nets.batch(nets.scan(seed=n)) for n in (0, 5))
    made = nets.captured(nets.made(NETS[name]), "layer", x, None, reference)
    made.gradient()
    assert (made.tail.alone, len(made.tail.memory) > 0) == (alone, remembers)


def test_a_network_that_mixes_the_cases_of_a_batch_is_run_one_by_one() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 4, 2), nets.Pooled(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = torch.relu(self.layer(x))
            out: torch.Tensor = self.head(layer / layer.mean())
            return out

    net = nets.made(Mixing)
    assert not nets.captured(net, "layer", nets.batch(nets.scan())).tail.alone
    made = mg.explain(nets.volume(), net, layer="layer", reference=nets.volume(seed=5))
    assert made.status == "complete"


@pytest.mark.parametrize("name", NETS)
def test_the_direct_capture_gives_the_same(name: str) -> None:
    net = nets.made(NETS[name], dtype=torch.float64)
    x, target = nets.batch(nets.scan(), torch.float64), nets.score_of(1, "softmax")
    activation, gradient = papers.full_gradient(net, "layer", x.clone(), target)
    with at_rest(net):
        before = x.clone()
        _, made = capture(net, "layer", x, lambda _output: target)
    assert torch.equal(x, before), "the scan was changed"
    assert torch.allclose(made.activation, activation, rtol=1e-12, atol=1e-14)
    assert torch.allclose(made.gradient(), gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", NETS)
def test_explain_takes_them_all(name: str) -> None:
    net = nets.made(NETS[name])
    before = nets.scan()
    array = before.copy()
    made = mg.explain(nets.as_volume(array), net, target=1, layer="layer", reference="value:0.4")
    assert made.status in ("complete", "not_a_cut")
    assert (array == before).all(), "the scan itself was changed"
    assert made.score == pytest.approx(
        float(nets.score_of(1, "softmax")(net(nets.batch(before)))[0].detach()), rel=1e-5
    )


def test_a_hook_of_the_user_s_works_once() -> None:
    """A forward hook that changes outputs, on the layer and on a remembered module."""
    net = nets.made(Functional, dtype=torch.float64)
    handles = [
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out: 2.0 * out + 0.1)
        for name in ("a", "layer")
    ]
    x, target = nets.batch(nets.scan(), torch.float64), nets.score_of(1, "softmax")
    made = nets.captured(net, "layer", x, target)
    with torch.no_grad():
        wanted = float(target(net(x))[0])
    assert made.score == pytest.approx(wanted, rel=1e-12)
    assert float(made.scores(made.activation[None])[0]) == pytest.approx(wanted, rel=1e-12)
    with at_rest(net):
        _, direct = capture(net, "layer", x, lambda _output: target)
    assert torch.allclose(direct.gradient(), made.gradient(), rtol=1e-10, atol=1e-14)
    assert torch.equal(direct.activation, made.activation)
    for handle in handles:
        handle.remove()


def test_a_network_that_answers_differently_each_time_is_refused() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 4, 2), nets.Pooled(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(F.dropout(self.layer(x), 0.5, training=True))
            return out

    with pytest.raises(CannotExplainError, match=r"a different score each time") as caught:
        mg.explain(nets.volume(), nets.made(Random), layer="layer")
    assert caught.value.reason == "not repeatable"


# --------------------------------------------------------------------- the model stays as it was


def _photograph(net: nn.Module) -> dict[str, Any]:
    """All that must be the same afterwards, down to each module's attributes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": {n: t.clone() for n, t in net.state_dict().items()},
        "places": {n: t.data_ptr() for n, t in net.state_dict().items()},
        "grad": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "requires": [p.requires_grad for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "hooks": [len(getattr(m, h)) for m in net.modules() for h in hooks],
        "dict": [sorted(m.__dict__) for m in net.modules()],
        "forward": [m.__dict__.get("forward") for m in net.modules()],
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key, was in one.items():
        if key == "state":
            assert all(torch.equal(t, other[key][n]) for n, t in was.items())
        elif key == "grad":
            for a, b in zip(was, other[key], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
        else:
            assert was == other[key], key


@contextmanager
def _unchanged(net: nn.Module) -> Iterator[None]:
    before, grad_mode = _photograph(net), torch.is_grad_enabled()
    try:
        yield
    finally:
        _same(before, _photograph(net))
        assert torch.is_grad_enabled() is grad_mode


def _used() -> nn.Module:
    """A network in the middle of its training: grads, a frozen part, mixed modes, own forward."""
    net = nets.made(Dropped)
    net.train()
    net.get_submodule("rest").eval()
    for parameter in net.get_submodule("rest").parameters():
        parameter.requires_grad_(False)
    for parameter in net.get_submodule("layer").parameters():
        parameter.grad = torch.randn_like(parameter)
    part = net.get_submodule("rest.1")
    part.__dict__["forward"] = type(part).forward.__get__(part)
    net.get_submodule("rest.2").register_forward_hook(lambda _m, _i, _o: None)
    return net


METHODS = ("integrated", "gradcam", "hirescam")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["layer", "auto"])
def test_the_model_is_left_bit_for_bit(method: str, layer: str) -> None:
    net = _used()
    with _unchanged(net):
        made = mg.explain(nets.volume(), net, layer=layer, method=method)
    net.eval()
    again = mg.explain(nets.volume(), net, layer=layer, method=method)
    assert (made.evidence == again.evidence).all(), "batch norm or dropout was in training mode"


def test_the_photograph_sees_a_forgotten_flag() -> None:
    net = _used()
    with pytest.raises(AssertionError, match="modes"), _unchanged(net):
        net.eval()
    with pytest.raises(AssertionError, match="hooks"), _unchanged(net):
        net.get_submodule("layer").register_forward_hook(lambda _m, _i, _o: None)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_bit_for_bit_after_an_error(method: str) -> None:
    net = _used()

    def explode(_m: nn.Module, _i: Any, out: torch.Tensor) -> None:
        if out.requires_grad or out.shape[0] > 1:
            raise KeyError("planted")

    handle = net.get_submodule("rest.3").register_forward_hook(explode)
    with _unchanged(net), pytest.raises(KeyError, match="planted"):
        mg.explain(nets.volume(), net, layer="layer", method=method)
    handle.remove()


@pytest.mark.parametrize("when", [1, 5, 12, 30])
def test_the_model_is_left_bit_for_bit_after_a_stop(when: int) -> None:
    net, calls = _used(), 0

    def progress(_step: Step) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise Cancelled("stopped")

    with _unchanged(net), pytest.raises(Cancelled, match="stopped"):
        mg.explain(nets.volume(), net, layer="layer", progress=progress)
    assert calls == when


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_s_grad_mode_does_not_matter(method: str, mode: Callable[[], Any]) -> None:
    net = nets.made(nets.gated)
    wanted = mg.explain(nets.volume(), net, layer="first", method=method)
    with mode():
        made = mg.explain(nets.volume(), net, layer="first", method=method)
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
    assert (made.evidence == wanted.evidence).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-4), (torch.bfloat16, 0.2)])
def test_other_number_formats_give_the_same_map(
    method: str, dtype: torch.dtype, near: float
) -> None:
    net = nets.made(nets.max_pooled)
    settings: dict[str, Any] = {
        "target": 1,
        "layer": "first",
        "method": method,
        "reference": nets.volume(seed=5),
    }
    wanted = mg.explain(nets.volume(), net, **settings)
    made = mg.explain(nets.volume(), copy.deepcopy(net).to(dtype), **settings)
    a, b = made.evidence.ravel(), wanted.evidence.ravel()
    assert (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5 > 0.99
    assert abs(a - b).max() < near * abs(b).max()
    assert made.provenance.dtype == str(dtype).removeprefix("torch.")


def test_the_scan_s_place_in_a_batch_does_not_matter() -> None:
    net = nets.made(nets.max_pooled)
    made = nets.captured(net, "first", nets.batch(nets.scan()))
    other = torch.randn_like(made.activation)
    alone = made.gradients(made.activation[None])[0]
    with at_rest(net):
        together = made.gradients(torch.stack([other, made.activation, other]))[1]
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-8)


def test_memory_holds_only_what_the_tail_needs() -> None:
    """Inside a Sequential, outputs that only feed remembered modules are let go."""
    net = nets.made(Nested)
    with at_rest(net):
        recorded = record(net, ["rest.1"], nets.batch(nets.scan()))
    kept = [m.output for m in recorded.tails["rest.1"].memory if m.output is not None]
    assert len(kept) == 2, "a and layer; rest.0 only feeds rest.1"


def test_the_tail_computes_nothing_before_the_layer() -> None:
    net = nets.made(Unet)
    made = nets.captured(net, "layer", nets.batch(nets.scan()))
    worked: list[str] = []
    for name in ("e1", "e2", "d2", "d1"):
        module = net.get_submodule(name)
        real: Any = module._conv_forward

        def spy(*args: Any, _name: str = name, _real: Any = real) -> Any:
            worked.append(_name)
            return _real(*args)

        module.__dict__["_conv_forward"] = spy
    made.scores(made.activation[None])
    assert worked == ["d2", "d1"]
