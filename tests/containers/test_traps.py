"""Do programs with odd habits open as they ran, and is nothing of the user's left changed?"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.containers import opener, script_graph
from med_gradcam.containers.opener import opened, why_closed
from med_gradcam.errors import CannotExplainError, ModelError
from tests.containers.test_same_map import hooks

pytestmark = pytest.mark.filterwarnings("ignore")
SCAN = torch.rand(10, 10, 10, generator=torch.Generator().manual_seed(0))
X = SCAN[None, None]
METHODS = ("gradcam", "secant", "integrated")


class Base(torch.nn.Module):
    """Two convolutions, a norm with statistics, one in-place activation shared by both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm3d(4)
        self.second = torch.nn.Conv3d(4, 4, 3, padding=1)
        self.act = torch.nn.ReLU(inplace=True)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4, 2)
        self.norm.running_mean.fill_(0.1)  # type: ignore[union-attr]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.first(x)))
        return self.act(self.second(x))  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.features(x)).mean((2, 3, 4)))  # type: ignore[no-any-return]


class Twice(Base):
    """Calls a module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = torch.nn.Conv3d(4, 4, 3, padding=1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.again(self.first(x))))
        return self.second(torch.relu(x))  # type: ignore[no-any-return]


class Named(Base):
    """Puts out a dict."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        features = self.features(x)
        return {"features": features, "logits": self.head(features.mean((2, 3, 4)))}


class Several(Base):
    """Puts out a list and a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:  # type: ignore[override]
        features = self.features(x)
        return self.head(features.mean((2, 3, 4))), [features]


class Methods(Base):
    """Has methods besides forward, a buffer, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    @torch.jit.export
    def scaled(self, x: torch.Tensor, by: float = 1.5) -> torch.Tensor:
        return x * self.scale * by  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scaled(self.features(x), 1.25)
        if x.shape[0] > 3:
            x = x + 1
        for n in range(2):
            x = x + float(n)
        return self.head(x.mean((2, 3, 4)))  # type: ignore[no-any-return]


class Placed(Base):
    """Makes tensors on a device that it names."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.first(x)))
        x = self.act(self.second(x))
        return x * torch.linspace(0.5, 1.0, x.shape[2], device=x.device)[:, None, None]


class Extra(Base):
    """Takes another input by name."""

    def forward(self, x: torch.Tensor, age: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.head(self.features(x).mean((2, 3, 4))) * age[:, None]  # type: ignore[no-any-return]


def script(net: torch.nn.Module) -> Any:
    return torch.jit.script(net)


def trace(net: torch.nn.Module) -> Any:
    return torch.jit.trace(net, X, check_trace=False, strict=False)


def export(net: torch.nn.Module) -> Any:
    return torch.export.export(net, (X,)).module()


def quiet(make: Callable[[torch.nn.Module], Any], net: torch.nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(net)


def same(made: Any, net: torch.nn.Module, layer: str = "second", **settings: Any) -> None:
    for method in METHODS:
        found = mg.explain(SCAN, made, target=0, layer=layer, method=method, **settings)
        wanted = mg.explain(SCAN, net, target=0, layer=layer, method=method, **settings)
        near = 1e-6 * np.abs(wanted.evidence).max()
        assert near > 0
        assert np.abs(found.evidence - wanted.evidence).max() <= near, method
        assert found.method == wanted.method == method


@pytest.mark.parametrize("make", [script, trace, export])
@pytest.mark.parametrize("kind", [Base, Twice, Named, Several, Methods, Placed])
def test_odd_networks(kind: type[Base], make: Any) -> None:
    net = kind().eval()
    output = "logits" if kind is Named else ""
    same(quiet(make, net), net, output=output)


@pytest.mark.parametrize("make", [script, export])
def test_other_inputs_by_name(make: Any) -> None:
    net, age = Extra().eval(), torch.tensor([1.5])
    given = (X, age)
    made = torch.jit.script(net) if make is script else torch.export.export(net, given).module()
    same(made, net, inputs={"age": age})


def state(net: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("make", [script, trace, export])
def test_nothing_of_the_users_changes(make: Any) -> None:
    made = quiet(make, Base().eval())
    if make is script:
        made.train()
    before, modes, hooked = state(made), [m.training for m in made.modules()], hooks(made)
    mg.explain(SCAN, made, target=0, layer="second")
    after = state(made)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [m.training for m in made.modules()] == modes
    assert hooks(made) == hooked
    assert hooks(opened(made)) == 0


def test_a_network_in_training_mode_is_explained_at_rest() -> None:
    made = quiet(script, Base().train())
    same(made, Base().eval())
    assert made.training
    assert made.drop.training


def test_a_network_traced_in_training_mode_keeps_its_running_means() -> None:
    """Its trace says so for good: each run of the program itself changes them."""
    net = Base().train()
    net.drop.p = 0.0
    made = quiet(trace, net)
    before = state(made)
    mg.explain(SCAN, made, target=0, layer="second")
    after = state(made)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    made(X)
    assert not torch.equal(state(made)["norm.running_mean"], before["norm.running_mean"])


def test_weights_that_were_given_later() -> None:
    net = Base().eval()
    made = quiet(script, net)
    mg.explain(SCAN, made, target=0, layer="second")
    other = Base().eval()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    made.load_state_dict(other.state_dict())
    same(made, other)
    made.second.weight = torch.nn.Parameter(other.second.weight * 2)
    other.second.weight = torch.nn.Parameter(other.second.weight * 2)
    same(made, other)


def test_wrappers() -> None:
    net = Base().eval()
    compiled = torch.compile(net, backend="eager")
    compiled(X)
    same(torch.nn.DataParallel(net), net)
    same(compiled, net)
    same(torch.nn.DataParallel(quiet(script, net)), net)


@pytest.mark.parametrize("make", [script, trace, export])
def test_a_program_as_a_part_of_an_eager_network(make: Any) -> None:
    """Hooks on the part's modules never fire; those on the opened part in a copy do."""

    class Holds(torch.nn.Module):
        def __init__(self, part: torch.nn.Module) -> None:
            super().__init__()
            self.part, self.gain = part, torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) * self.gain  # type: ignore[no-any-return]

    net = Base().eval()
    made, plain = Holds(quiet(make, net)), Holds(net).eval()
    made.training = False  # .eval() of its own is what an exported part refuses
    part = made.part
    same(made, plain, layer="part.second")
    assert made.part is part
    found = mg.explain(SCAN, made, target=0)
    assert found.layer == mg.explain(SCAN, plain, target=0).layer


@pytest.mark.parametrize("make", [script, trace, export])
def test_a_network_that_is_let_go_is_let_go(make: Any) -> None:
    made = quiet(make, Base().eval())
    mg.explain(SCAN, made, target=0, layer="second")
    there = weakref.ref(made)
    del made
    gc.collect()
    assert there() is None


def test_devices_that_a_program_names_move_with_it() -> None:
    for make in (trace, export):
        made = opened(quiet(make, Placed().eval()))
        assert isinstance(made, torch.nn.Module)
        moved = made.to("meta")
        assert moved(X.to("meta")).device.type == "meta"


def test_an_opened_network_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from med_gradcam.containers import ordinary

    monkeypatch.setitem(ordinary._FORMS, "relu_", torch.abs)
    with pytest.raises(ModelError, match=r"its output differs by .* of the largest"):
        mg.explain(SCAN, quiet(script, Base().eval()), target=0)
    assert opener.CLOSE == 1e-4


# ----------------------------------------------------------------------- what cannot be opened


@pytest.fixture
def _no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word aten::mean, were it one that is not known here."""
    known = script_graph._is_known
    monkeypatch.setattr(
        script_graph, "_is_known", lambda node: node.kind() != "aten::mean" and known(node)
    )


CLOSED = r"a program that only runs whole \(its operation 'aten::mean' is not known here\)"


@pytest.mark.usefixtures("_no_mean")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["auto", "@input"])
def test_a_closed_network_is_explained_by_its_input(method: str, layer: str) -> None:
    net = Base().eval()
    made = quiet(script, net)
    made.train()
    found = mg.explain(SCAN, made, target=0, method=method, layer=layer)
    wanted = mg.explain(SCAN, net, target=0, method=method, layer="@input")
    assert found.layer == "@input"
    assert found.method == wanted.method == method
    near = 1e-5 * np.abs(wanted.evidence).max()
    assert np.abs(found.evidence - wanted.evidence).max() <= near
    assert any(
        "only runs whole (its operation 'aten::mean' is not known" in w for w in found.warnings
    )
    assert made.training
    assert hooks(made) == 0
    assert "aten::mean" in why_closed(opened(made))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_no_mean")
def test_a_layer_of_a_closed_network_cannot_be_seen() -> None:
    made = quiet(script, Base().eval())
    with pytest.raises(CannotExplainError, match=f"'second' cannot be seen.*{CLOSED}") as caught:
        mg.explain(SCAN, made, target=0, layer="second")
    assert caught.value.reason == "never ran"


def test_a_program_without_a_forward_is_refused() -> None:
    with pytest.raises(ModelError, match="got one without a forward"):
        mg.explain(SCAN, torch.jit.ScriptModule(), target=0)
