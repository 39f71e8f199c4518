"""Is the map right where other tools' maps are silently wrong: equality, traps, state, threads?

Each test is a way in which a tool of today was seen to fail (docs/why-not-the-others.md).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import capture, engine, tail
from med_gradcam.errors import CannotExplainError
from med_gradcam.model import InputSpec, Model
from tests.engine import architectures, nets
from tests.engine.work import counted

METHODS = ("secant", "integrated", "hirescam", "gradcam")
Values = npt.NDArray[np.float64]


def _noise(shape: tuple[int, int, int], seed: int = 0) -> mg.Volume:
    return nets.as_volume(
        np.random.default_rng(seed).standard_normal((1, *shape)).astype(np.float32)
    )


# ------------------------------------------------------- equality with the plain gradient of torch


def _plain(net: nn.Module, layer: str, x: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Score of class 1 against 0, activation and gradient by torch alone, no tricks."""
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out)
        return out.clone()

    handle = net.get_submodule(layer).register_forward_hook(note)
    with torch.enable_grad():
        out = net(x.requires_grad_())
    handle.remove()
    margin = out[:, 1] - out[:, 0]
    score = margin.mean() if out.ndim == 2 else margin[out.argmax(1) == 1].mean()
    (gradient,) = torch.autograd.grad(score, seen[0])
    return float(score.detach()), seen[0].detach()[0].double(), gradient[0].double()


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("DenseNet121", "class_layers.relu", (32, 32, 64)),
        ("resnet18", "layer3", (24, 32, 40)),
        ("resnet18", "layer4", (32, 32, 32)),
        ("UNet", "model.1.submodule.1.submodule.1", (16, 32, 48)),
        ("UNet", "model.1.submodule", (32, 32, 32)),
    ],
)
def test_maps_equal_the_plain_gradient_s(name: str, layer: str, shape: Any) -> None:
    net, scan = architectures.made(name), _noise(shape)
    score, activation, gradient = _plain(net, layer, nets.batch(np.asarray(scan.array)))
    weights = gradient.mean(dim=(1, 2, 3), keepdim=True)
    wanted = {"gradcam": weights * activation, "hirescam": gradient * activation}
    for method, product in wanted.items():
        made = mg.explain(scan, net, target=1, layer=layer, method=method)
        values = product.sum(0).numpy()
        assert np.abs(made.evidence - values).max() <= 1e-6 * np.abs(values).max(), method
        assert made.score == pytest.approx(score, rel=1e-5, abs=1e-6)


# ------------------------------------------------------- the model as users really have it


class Plain(nn.Module):
    """A layer that a ReLU follows (`in_place` or not), dropout, batch norm, pooling."""

    def __init__(self, *, in_place: bool = False, wrap: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.first, self.act = nets.conv(1, 6, 2), nn.ReLU(inplace=in_place)
        self.drop, self.mid, self.norm = nn.Dropout(0.5), nets.conv(6, 6), nn.BatchNorm3d(6)
        self.relu, self.pool = nn.ReLU(inplace=in_place), nn.MaxPool3d(2)
        self.head, self.wrap = nets.Pooled(6, 3), wrap
        with torch.no_grad():
            self.norm.running_mean = torch.linspace(-0.2, 0.2, 6)
            self.norm.running_var = torch.linspace(0.5, 1.5, 6)

    def forward(self, x: torch.Tensor) -> Any:
        seen = self.drop(self.act(self.first(x)))
        out = self.head(self.pool(self.relu(self.norm(self.mid(seen)))))
        return out if self.wrap is None else self.wrap(out)


def _net(**kind: Any) -> nn.Module:
    return nets.made(lambda: Plain(**kind))


def _explain(net: object, method: str, **settings: Any) -> mg.Explanation:
    settings = {"target": 1, "layer": "first", **settings}
    return mg.explain(nets.volume(), net, method=method, **settings)


_CLEAN: dict[str, mg.Explanation] = {}


def _clean(method: str) -> mg.Explanation:
    if method not in _CLEAN:
        _CLEAN[method] = _explain(_net(), method)
    return _CLEAN[method]


def _off(made: mg.Explanation, wanted: mg.Explanation) -> float:
    return float(np.abs(made.evidence - wanted.evidence).max() / np.abs(wanted.evidence).max())


def _corr(made: mg.Explanation, wanted: mg.Explanation) -> float:
    return float(np.corrcoef(made.evidence.ravel(), wanted.evidence.ravel())[0, 1])


def _half_frozen() -> nn.Module:
    net = _net()
    net.get_submodule("mid").requires_grad_(False)
    return net


def _channels_last() -> Any:
    net: Any = _net()
    return net.to(memory_format=torch.channels_last_3d)


def _compiled() -> Any:
    return torch.compile(_net(), backend="eager")


def _compiled_in_place() -> nn.Module:
    net = _net()
    net.compile(backend="eager")
    return net


def _compiled_in_part() -> nn.Module:
    net: Any = _net()
    net.first = torch.compile(net.first, backend="eager")
    net.mid = torch.compile(net.mid, backend="eager")
    return net  # type: ignore[no-any-return]


def _with_grad() -> nn.Module:
    net = _net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return net


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "in-place ReLU behind the layer": (lambda: _net(in_place=True), {}),
    "train mode": (lambda: _net().train(), {}),
    "frozen": (lambda: _net().requires_grad_(False), {}),
    "frozen in part": (_half_frozen, {}),
    "gradients of a training": (_with_grad, {}),
    "channels last": (_channels_last, {}),
    "compiled": (_compiled, {}),
    "compiled in place": (_compiled_in_place, {}),
    "compiled in part": (_compiled_in_part, {}),
    "a compiled network in a Model": (
        lambda: Model(_compiled(), InputSpec(), aliases={"mine": "_orig_mod.first"}),
        {"layer": "mine"},
    ),
    "a tuple": (lambda: _net(wrap=lambda out: (out, 2 * out)), {}),
    "a list, as of deep supervision": (lambda: _net(wrap=lambda out: [out, 2 * out]), {}),
    "a dict": (lambda: _net(wrap=lambda out: {"aux": 2 * out, "z": out}), {"output": "z"}),
    "inside another module": (lambda: nn.Sequential(_net()), {"layer": "0.first"}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", MODELS)
def test_the_map_is_that_of_the_clean_model(how: str, method: str) -> None:
    maker, settings = MODELS[how]
    made, wanted = _explain(maker(), method, **settings), _clean(method)
    assert _off(made, wanted) <= 1e-6
    assert made.score == pytest.approx(wanted.score, rel=1e-6)
    assert (made.status, made.method, made.notices) == (wanted.status, method, wanted.notices)
    assert not made.warnings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_map_is_that_of_the_clean_model_whatever_the_mode(
    mode: Callable[[], Any], method: str
) -> None:
    net = _net()
    with mode():
        made = _explain(net, method)
    assert _off(made, _clean(method)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("how", "near"), [("bfloat16", 0.99), ("autocast", 0.99), ("float16", 0.999), ("float64", 1.0)]
)
def test_other_number_formats_tell_the_same(how: str, near: float, method: str) -> None:
    net = _net() if how == "autocast" else _net().to(getattr(torch, how))
    around: Any = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext()
    with around:
        made = _explain(net, method)
    wanted = _clean(method)
    assert made.status == wanted.status
    assert _corr(made, wanted) >= near - 1e-9
    assert made.score == pytest.approx(wanted.score, rel=0.05)


@pytest.mark.parametrize("method", ["secant", "integrated", "gradcam", "hirescam"])
@pytest.mark.parametrize("cells", [16, 32])
def test_float16_keeps_evidence_that_is_far_below_its_smallest_number(
    cells: int, method: str
) -> None:
    """A small weight over 32^3 cells: each gradient is 3e-8, which float16 takes for 0."""
    net = nets.made(nets.pooled_linear)
    nets.weight(net, "rest.head").mul_(1e-3 / nets.weight(net, "rest.head").abs().mean())
    scan = nets.volume(2 * cells)
    settings: dict[str, Any] = {"target": 1, "layer": "first", "method": method}
    wanted = mg.explain(scan, net, **settings)
    made = mg.explain(scan, copy.deepcopy(net).half(), **settings)
    assert _corr(made, wanted) > 0.99
    assert made.sum_for == pytest.approx(wanted.sum_for, rel=0.02)
    assert made.sum_against == pytest.approx(wanted.sum_against, rel=0.02)


def test_float16_would_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: gradients as torch gives them."""

    def plain(score: torch.Tensor, leaves: Any) -> list[torch.Tensor]:
        return [g.float() for g in torch.autograd.grad(score, leaves, retain_graph=True)]

    monkeypatch.setattr(capture, "slopes", plain)
    with pytest.raises(AssertionError):
        test_float16_keeps_evidence_that_is_far_below_its_smallest_number(32, "gradcam")


def test_torch_compile_s_wrapper_stays_as_it_was() -> None:
    wrapped = _compiled()
    inner, before = wrapped._orig_mod, sorted(wrapped.__dict__)
    forward, x = wrapped.forward, nets.batch(nets.scan())
    out = wrapped(x)
    for method in METHODS:
        _explain(wrapped, method)
    assert wrapped._orig_mod is inner
    assert sorted(wrapped.__dict__) == before
    assert wrapped.forward is forward
    assert torch.equal(wrapped(x), out)
    in_place = _compiled_in_place()
    call = in_place.__dict__["_compiled_call_impl"]
    _explain(in_place, "integrated")
    assert in_place.__dict__["_compiled_call_impl"] is call


def test_compiled_parts_would_run_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: compiled parts stay compiled; a layer's exchanged forward is not run."""
    monkeypatch.setattr(engine, "eager", lambda _net: nullcontext())
    with pytest.raises((AssertionError, CannotExplainError)):
        _explain(_compiled_in_part(), "integrated")


# ------------------------------------------------------- what the user had is left as it was


def _photograph(net: nn.Module) -> dict[str, Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "values": [t.clone() for t in net.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "flags": [p.requires_grad for p in net.parameters()],
        "places": [t.data_ptr() for t in net.state_dict().values()],
        "modes": [(m.training, getattr(m, "inplace", None)) for m in net.modules()],
        "hooks": [list(getattr(m, kind).values()) for m in net.modules() for kind in kinds],
        "attributes": [sorted(m.__dict__) for m in net.modules()],
        "forwards": [m.__dict__.get("forward") for m in net.modules()],
        "random": [torch.get_rng_state()],
        "torch": [torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()],
    }


@contextmanager
def _unchanged(net: nn.Module) -> Iterator[None]:
    before = _photograph(net)
    try:
        yield
    finally:
        for name, was in before.items():
            for a, b in zip(was, _photograph(net)[name], strict=True):
                same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                assert same, name


def _in_use() -> nn.Module:
    """In the middle of a training: gradients, frozen parts, mixed modes, hooks of the user's."""
    net = _with_grad()
    net.train()
    net.get_submodule("norm").eval()
    net.get_submodule("relu").inplace = True  # type: ignore[assignment]
    net.get_submodule("mid").requires_grad_(False)
    net.get_submodule("pool").register_forward_hook(lambda _m, _i, _o: None)
    own = net.get_submodule("act")
    own.__dict__["forward"] = type(own).forward.__get__(own)
    return net


CALLS: dict[str, dict[str, Any]] = {
    "one layer": {"layer": "first"},
    "automatic": {"layer": "auto"},
    "all layers and classes": {"layer": "all", "target": "all"},
    "threads": {"layer": "first", "threads": 1, "progress": lambda _step: None},
}


def _many(net: nn.Module, method: str, call: dict[str, Any]) -> Any:
    scans = [nets.volume(seed=seed) for seed in (0, 1)]
    return mg.explain_many(scans, net, method=method, batch=2, **{"target": 1, **call})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", CALLS)
def test_what_the_user_had_is_left_as_it_was(call: str, method: str) -> None:
    net = _in_use()
    with _unchanged(net):
        assert _many(net, method, CALLS[call])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_and_also_after_an_error_in_the_middle(when: int, method: str) -> None:
    """The hook of the user's fails at the n-th run; where it never comes to that, all is well."""
    net, runs = _in_use(), 0

    def explode(_m: nn.Module, _i: Any, out: torch.Tensor) -> None:
        nonlocal runs
        runs += out.device.type != "meta"
        if runs == when:
            raise KeyError("planted")

    net.get_submodule("mid").register_forward_hook(explode)
    with _unchanged(net):
        try:
            _many(net, method, CALLS["one layer"])
        except KeyError:
            assert runs == when
        else:
            assert runs < when


def test_something_left_behind_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the modes are not put back."""
    net = _in_use()
    real = tail.at_rest

    @contextmanager
    def forgetful(module: nn.Module) -> Iterator[None]:
        with real(module):
            yield
        module.eval()

    monkeypatch.setattr(engine, "at_rest", forgetful)
    with pytest.raises(AssertionError, match="modes"), _unchanged(net):
        _many(net, "secant", CALLS["one layer"])


# ------------------------------------------------------- several threads, one model


@pytest.mark.parametrize("method", ["secant", "gradcam"])
@pytest.mark.parametrize("threads", [4, 8])
def test_threads_that_share_a_model_get_their_own_maps(threads: int, method: str) -> None:
    net = nets.made(nets.gated).train()

    def one(number: int) -> mg.Explanation:
        layer = "first" if number % 3 else "rest.0"
        scan = nets.volume(12, seed=number % 5)
        return mg.explain(scan, net, target=number % 2, layer=layer, method=method)

    wanted, interval = [one(number) for number in range(30)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            made = list(pool.map(one, [n % 30 for n in range(10 * threads)]))
    finally:
        sys.setswitchinterval(interval)
    wrong = [
        n for n, e in enumerate(made) if not np.array_equal(e.evidence, wanted[n % 30].evidence)
    ]
    assert wrong == []
    assert all(module.training for module in net.modules())


# ------------------------------------------------------- the default method


@pytest.mark.parametrize("tail_", nets.TAILS)
@pytest.mark.parametrize("layer", ["first", "auto", "@input"])
def test_secant_adds_up_whatever_follows_the_layer(tail_: str, layer: str) -> None:
    made = mg.explain(nets.volume(), nets.made(nets.TAILS[tail_]), target=1, layer=layer)
    assert (made.method, made.status) == ("secant", "complete")
    assert made.reference_score is not None
    assert made.residual is not None
    assert abs(made.residual) <= 1e-4 * abs(made.score - made.reference_score)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet50", "layer3"),
        ("SEResNet50", "layer3"),
        ("EfficientNet-b0", "_conv_head"),
        ("VNet", "up_tr32"),
        ("UNETR", "decoder2"),
    ],
)
def test_secant_adds_up_in_monai_s_networks(name: str, layer: str) -> None:
    size = 64 if name == "UNETR" else 32
    made = mg.explain(nets.volume(size), architectures.made(name), layer=layer)
    assert (made.method, made.status) == ("secant", "complete")
    assert made.reference_score is not None
    assert made.residual is not None
    assert abs(made.residual) <= 1e-4 * abs(made.score - made.reference_score)


def test_the_same_seed_gives_the_same_map_and_another_one_another_texture() -> None:
    net = nets.made(nets.instance_normed)
    made = [_explain(net, "secant", seed=seed) for seed in (3, 3, 4)]
    assert np.array_equal(made[0].evidence, made[1].evidence)
    assert not np.array_equal(made[0].evidence, made[2].evidence)


class Curled(nets.Body):
    """An operation that no rule is known for."""

    def forward(self, x: torch.Tensor) -> Any:
        seen = self.first(x)
        return self.rest(torch.atan2(seen, 1 + seen.flip(1)))


@pytest.mark.parametrize("layer", ["first", "auto"])
def test_where_secant_has_no_rule_integrated_takes_over_and_says_so(layer: str) -> None:
    net = nets.made(lambda: Curled(nets.Pooled()))
    made = _explain(net, "secant", layer=layer)
    assert made.method == "integrated"
    assert made.status == "complete"
    assert made.provenance.parameters["method"] == "secant", "what was asked for"
    (said,) = [words for words in made.warnings if "took over" in words]
    assert said.startswith("secant has no rule for aten::atan2")
    assert np.array_equal(made.evidence, _explain(net, "integrated", layer=layer).evidence)


# ------------------------------------------------------- the reference of networks with norms


@pytest.mark.parametrize("method", ["secant", "integrated"])
@pytest.mark.parametrize("maker", [nets.instance_normed, nets.group_normed])
def test_before_a_norm_the_reference_has_a_texture(
    maker: Callable[[], nn.Module], method: str
) -> None:
    made = _explain(nets.made(maker), method)
    assert made.reference.words == "a uniform input of 0 a.u., with the scan's own noise"
    assert np.isfinite(made.evidence).all()
    assert made.reference_score is not None
    change = made.score - made.reference_score
    # Of for and against, which cancel here: `integrated` is bound to 0.02 log-odds.
    near = 1e-5 if method == "secant" else 0.02
    assert made.sum_for - made.sum_against == pytest.approx(change, abs=near)


@pytest.mark.parametrize("maker", [nets.batch_normed, nets.gated])
def test_without_such_a_norm_it_is_uniform(maker: Callable[[], nn.Module]) -> None:
    assert _explain(nets.made(maker), "secant").reference.words == "a uniform input of 0 a.u."


def test_a_reference_of_the_user_s_is_taken_as_it_is() -> None:
    net, given = nets.made(nets.instance_normed), nets.volume(seed=5)
    made = _explain(net, "secant", reference=given)
    assert made.reference.words == "the given reference scan"
    with torch.no_grad():
        out = net(nets.batch(np.asarray(given.array)))
    assert made.reference_score == pytest.approx(float(out[0, 1] - out[0, 0]), rel=1e-5)


# ------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("name", "layer"),
    [("DenseNet121", "features.denseblock2"), ("resnet18", "layer3"), ("SEResNet50", "layer3")],
)
def test_the_default_explanation_costs_what_it_says_and_little(name: str, layer: str) -> None:
    net, scan = copy.deepcopy(architectures.made(name)), nets.volume(32)
    x = nets.batch(nets.scan(32))
    with torch.no_grad():
        _, forward = counted(lambda: net(x))
    for settings, most in (({"layer": layer}, 6), ({}, 20), ({"quick": True}, 4)):
        made, work = counted(lambda s=settings: mg.explain(scan, net, target=1, **s))  # type: ignore[misc]
        done = work / forward - 1  # less the pass on shapes, which computes nothing
        assert made.method == "secant"
        assert made.status == "complete"
        assert made.cost_in_forwards <= most
        assert 0.85 * made.cost_in_forwards <= done <= 1.15 * made.cost_in_forwards


def test_measured_cells_are_paid_for() -> None:
    net, scan = nets.made(nets.gated), nets.volume()
    plain = mg.explain(scan, net, layer="rest.0", target=1)
    made, work = counted(
        lambda: mg.explain(scan, net, layer="rest.0", target=1, alignment="measured")
    )
    _, forward = counted(lambda: net(nets.batch(nets.scan())))
    assert made.cells.how == "measured"
    assert made.cost_in_forwards > plain.cost_in_forwards + 3
    assert work / forward - 1 == pytest.approx(made.cost_in_forwards, rel=0.15)


def test_a_network_without_any_layer_says_so() -> None:
    """A map is never made up: the last one of a chain of refusals is told."""
    net = nets.made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4096, 2)))
    with pytest.raises(CannotExplainError, match="the network has none for this input"):
        mg.explain(nets.volume(), net)
    made = mg.explain(nets.volume(), net, layer="@input")
    assert made.status == "complete"
