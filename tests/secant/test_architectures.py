"""Does the evidence add up to the score's change on the architectures that people use?"""

from __future__ import annotations

import pytest
import torch

from med_gradcam.secant.pair import share
from med_gradcam.tail import INPUT
from tests.secant.architectures import ARCHITECTURES, layers, made, margin, scans
from tests.secant.pairs import both, off, shared

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MOST = {torch.float32: 1e-4, torch.float64: 1e-9}
QUICK = [name for name, one in ARCHITECTURES.items() if one.quick]
SLOW = [name for name, one in ARCHITECTURES.items() if not one.quick]
NETS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
DTYPES = pytest.mark.parametrize("dtype", MOST, ids=["single", "double"])


def check(name: str, dtype: torch.dtype, size: int = 0) -> None:
    net = made(name, size).to(dtype)
    x, r = scans(name, dtype, size)
    with torch.no_grad():
        plain, plain_r = (margin(None)(net(t.clone())) for t in (x, r))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    found = shared(net, x, r, layers(name), margin)
    for layer in layers(name):
        assert off(found, layer) <= MOST[dtype]
        assert not found.past[layer]
    assert torch.equal(found.case.score, plain)
    assert torch.equal(found.reference.score, plain_r)
    assert float((plain - plain_r).abs()) > 0.02
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not net.training


@DTYPES
@pytest.mark.parametrize("name", NETS)
def test_the_evidence_adds_up(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.slow
@pytest.mark.timeout(900)
@DTYPES
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "SwinUNETR"])
def test_the_evidence_adds_up_at_a_real_size(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, 64)


BESIDE = [name for name in ARCHITECTURES if ARCHITECTURES[name].beside]
TOGETHER = [name for name in ARCHITECTURES if ARCHITECTURES[name].together]


def marked(names: list[str]) -> list[object]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


@pytest.mark.parametrize("name", marked(BESIDE))
def test_a_layer_that_paths_avoid_is_known(name: str) -> None:
    layer = ARCHITECTURES[name].beside
    found = shared(made(name).double(), *scans(name, torch.float64), [layer], margin)
    assert found.past[layer]
    assert off(found, layer) > 0.01  # what flows past is missing


@pytest.mark.parametrize("name", marked(TOGETHER))
def test_layers_that_cut_the_network_together_share_it_all(name: str) -> None:
    together = ARCHITECTURES[name].together
    net = made(name).float()
    x, r = scans(name, torch.float32)
    runs = both(net, x, r, together, margin, cut=True)
    assert torch.equal(runs[0].score, margin(None)(runs[0].output))
    tape = runs[0].tape
    assert not tape.passes_by(together)
    assert tape.passes_by(together[1:])  # the first skip connection
    found = share(*runs, together)
    parts = sum(float(found.evidence(layer).sum()) for layer in together)
    change = float(found.case.score - found.reference.score)
    assert abs(parts - change) <= 1e-4 * abs(change)
    # The deepest one alone, whether cut or not, does not have it all.
    assert found.past[together[-1]]
    alone = shared(net, x, r, [together[-1]], margin)
    assert alone.past[together[-1]]
    assert off(alone, together[-1]) > 0.01


@pytest.mark.parametrize("name", ["ViT", "resnet18"])
def test_streams_beside_a_layer_add_to_it(name: str) -> None:
    """A block's residual branch and the stream beside it: together all of the change."""
    first, second = {
        "ViT": ("blocks.1", "blocks.2.norm1"),
        "resnet18": ("layer1", "layer2.0.conv1"),
    }[name]
    net = made(name).double()
    x, r = scans(name, torch.float64)
    runs = both(net, x, r, [first, second], margin, cut=True)
    assert not runs[0].tape.passes_by([first])
    assert runs[0].tape.passes_by([second])
    found = share(*runs, [first, second])
    change = float(found.case.score - found.reference.score)
    parts = [float(found.evidence(layer).sum()) for layer in (first, second)]
    assert abs(sum(parts) - change) <= 1e-9 * abs(change)
    assert min(map(abs, parts)) > 0.01 * abs(change)


def test_the_input_of_a_cut_gets_what_no_other_layer_has() -> None:
    net = made("BasicUNet").double()
    x, r = scans("BasicUNet", torch.float64)
    names = [INPUT, "down_2"]
    found = share(*both(net, x, r, names, margin, cut=True), names)
    change = float(found.case.score - found.reference.score)
    parts = [float(found.evidence(layer).sum()) for layer in names]
    assert abs(sum(parts) - change) <= 1e-9 * abs(change)
