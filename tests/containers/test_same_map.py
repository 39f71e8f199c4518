"""Does one network give one map, in whatever container it comes?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from med_gradcam.containers.opener import opened
from tests.containers import architectures
from tests.containers.architectures import ALL, CONTAINERS, FOLDED, METHODS, NO_SCRIPT, SLOW

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = 1e-6  # of the largest value of a map
# Freezing folds each batch norm into its convolution's weights, rounded to float32 once more.
ROUNDED = 5e-6
NEVER = {
    "vit": NO_SCRIPT,
    "swinunetr": NO_SCRIPT,
    "unetr": NO_SCRIPT,
    "segresnet": ("frozen script",),  # its layers run in a loop: freezing leaves no name of them
}


def cells() -> Iterator[object]:
    for name in ALL:
        for container in CONTAINERS:
            if container not in NEVER.get(name, ()):
                marks = [pytest.mark.slow] if name in SLOW else []
                yield pytest.param(name, container, marks=marks, id=f"{name}-{container}")


def hooks(net: object) -> int:
    if not isinstance(net, torch.nn.Module):
        return 0
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(m.__dict__.get(kind, ())) for m in net.modules() for kind in kinds)


@pytest.mark.parametrize(("name", "container"), [*cells()])
def test_the_map_of_the_eager_network(name: str, container: str) -> None:
    net, x = architectures.network(name), architectures.scan(name)
    made = architectures.contained(net, x[None, None], container)
    hooked = hooks(made)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        before = net(x[None, None])
        runs: Any = made.module() if container == "exported file" else made  # type: ignore[operator]
        logits = runs(x[None, None])
    near = ROUNDED if container in FOLDED else EXACT
    assert first(logits) == pytest.approx(first(before), rel=0, abs=1e-5)
    layer = (ALL[name].called if container != "compiled" else "") or ALL[name].layer
    for method in METHODS:
        found = architectures.explained(name, made, method, layer)
        wanted = architectures.eager(name, method)
        assert architectures.apart(found, wanted) <= near, method
        assert (found.method, found.layer) == (wanted.method, layer)
        assert found.score == pytest.approx(wanted.score, abs=1e-5)
        assert found.cells == wanted.cells
    assert hooks(made) == hooked  # torch.export puts one of its own on a program
    assert hooks(opened(made)) == hooks(net) == 0
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())


def first(output: object) -> object:
    while isinstance(output, (tuple, list)):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output.detach().numpy()


@pytest.mark.parametrize(("name", "container"), [*cells()])
def test_the_layer_that_auto_takes(name: str, container: str) -> None:
    net, x = architectures.network(name), architectures.scan(name)
    made = architectures.contained(net, x[None, None], container)
    found = architectures.explained(name, made, "secant", "auto")
    wanted = architectures.eager(name, "secant", "auto")
    if (
        container not in FOLDED and not ALL[name].called
    ):  # there a norm is a part of its convolution, which is taken for it
        # In a program the end of a module is named, too, that puts out more than one tensor.
        assert found.layer == wanted.layer or wanted.layer.startswith(f"{found.layer}.")
    assert architectures.apart(found, wanted) <= (ROUNDED if container in FOLDED else EXACT)


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_a_frozen_file_has_no_names_left_but_the_same_layers(name: str) -> None:
    """Its operations are called conv3d_3 and the like; the one with the layer's values is taken."""
    net, x = architectures.network(name), architectures.scan(name)[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = architectures._saved(torch.jit.freeze(torch.jit.trace(net, x, check_trace=False)))
    wanted = values(net, ALL[name].layer, x)
    ours = opened(made)
    assert isinstance(ours, torch.nn.Module)
    same = [
        path
        for path, value in every(ours, x).items()
        if value.shape == wanted.shape and torch.allclose(value, wanted, atol=1e-4)
    ]
    assert same
    for method in ("gradcam", "secant"):
        found = architectures.explained(name, made, method, same[-1])
        assert architectures.apart(found, architectures.eager(name, method)) <= ROUNDED
    assert architectures.explained(name, made, "secant", "auto").status == "complete"


def values(net: torch.nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    return every(net, x)[layer]


def every(net: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def note(path: str) -> object:
        def look(_: object, __: object, out: object) -> None:
            if isinstance(out, torch.Tensor):
                seen[path] = out.clone()

        return look

    handles = [m.register_forward_hook(note(p)) for p, m in net.named_modules() if p]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return seen
