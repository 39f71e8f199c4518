"""Do the engine's methods equal their papers, written out slowly over the whole network?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.methods import Bound, gradcam, hirescam, integrated
from med_gradcam.tail import at_rest
from tests.engine import nets
from tests.oracle import papers

LOOSE = Bound(float("inf"), 0.0)
SMOOTH = ("gate", "group norm", "instance norm", "batch norm", "SiLU MLP", "max pool")


def _far(ours: papers.Numbers, theirs: papers.Numbers) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_gradcam_and_hirescam_equal_the_papers(tail: str, dtype: torch.dtype, near: float) -> None:
    net = nets.made(nets.TAILS[tail], dtype=dtype)
    x, target = nets.batch(nets.scan(), dtype), nets.score_of(1, "softmax")
    activation, gradient = papers.full_gradient(net, "first", x, target)
    capture = nets.captured(net, "first", x, target)
    a, g = activation.double().numpy(), gradient.double().numpy()
    assert _far(gradcam.evidence(capture, LOOSE).values.numpy(), papers.gradcam(a, g)) < near
    assert _far(hirescam.evidence(capture, LOOSE).values.numpy(), papers.hirescam(a, g)) < near


@pytest.mark.parametrize("tail", ["gate", "SiLU MLP", "group norm"])
def test_gradients_equal_central_differences_of_the_plain_network(tail: str) -> None:
    net = nets.made(nets.TAILS[tail], dtype=torch.float64)
    x, target = nets.batch(nets.scan(6), torch.float64), nets.score_of(0, "softmax")
    activation, gradient = papers.difference_gradient(net, "first", x, target)
    capture = nets.captured(net, "first", x, target)
    assert _far(capture.activation.numpy(), activation) == 0.0
    assert _far(capture.gradient().numpy(), gradient) < 1e-6
    ours = hirescam.evidence(capture, LOOSE).values.numpy()
    assert _far(ours, papers.hirescam(activation, gradient)) < 1e-6


@pytest.mark.parametrize("tail", SMOOTH)
def test_integrated_equals_a_sum_of_many_nodes(tail: str) -> None:
    net = nets.made(nets.TAILS[tail], dtype=torch.float64)
    pair = (
        nets.batch(nets.scan(seed=0), torch.float64),
        nets.batch(nets.scan(seed=5), torch.float64),
    )
    target = nets.score_of(1, "softmax")
    theirs = papers.integrated(net, "first", pair, target, 150)
    capture = nets.captured(net, "first", pair[0], target, pair[1])
    ours = integrated.evidence(capture, Bound(0.0, 0.0))  # all the nodes it may take
    missed = np.abs(ours.values.numpy() - theirs).sum() / np.abs(theirs).sum()
    assert missed < (1e-4 if tail == "SiLU MLP" else 3e-2)  # ReLUs and max-pools bend the path


def test_integrated_in_float32_equals_float64() -> None:
    maps = []
    for dtype in (torch.float64, torch.float32):
        net = nets.made(nets.gated, dtype=dtype)
        pair = (nets.batch(nets.scan(seed=0), dtype), nets.batch(nets.scan(seed=5), dtype))
        capture = nets.captured(net, "first", pair[0], None, pair[1])
        maps.append(integrated.evidence(capture, LOOSE).values.numpy())
    assert _far(maps[1], maps[0]) < 1e-4


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "integrated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_explain_hands_out_the_paper_s_map(method: str, dtype: torch.dtype) -> None:
    net = nets.made(nets.gated, dtype=dtype)
    scan, other = nets.scan(seed=0), nets.scan(seed=5)
    x, reference, target = (
        nets.batch(scan, dtype),
        nets.batch(other, dtype),
        nets.score_of(1, "softmax"),
    )
    activation, gradient = papers.full_gradient(net, "first", x, target)
    a, g = activation.double().numpy(), gradient.double().numpy()
    oracle: dict[str, Callable[[], papers.Numbers]] = {
        "gradcam": lambda: papers.gradcam(a, g),
        "hirescam": lambda: papers.hirescam(a, g),
        "integrated": lambda: papers.integrated(net, "first", (x, reference), target, 100),
    }
    made = mg.explain(
        nets.as_volume(scan),
        net,
        target=1,
        layer="first",
        method=method,
        reference=nets.as_volume(other),
        precise=True,
    )
    near = 2e-2 if method == "integrated" else 1e-4
    assert _far(made.evidence.astype(np.float64), oracle[method]()) < near
    assert made.score == pytest.approx(float(target(net(x))[0].detach()), rel=1e-5)


def test_the_oracle_itself_sees_a_wrong_map() -> None:
    """Planted faults: the mean of the map for the sum, the gradient at the reference, no A - A0."""
    net = nets.made(nets.silu_mlp, dtype=torch.float64)
    pair = (
        nets.batch(nets.scan(seed=0), torch.float64),
        nets.batch(nets.scan(seed=5), torch.float64),
    )
    theirs = papers.integrated(net, "first", pair, nets.score_of(), 100)
    capture = nets.captured(net, "first", pair[0], None, pair[1])
    assert capture.baseline is not None
    change = capture.activation - capture.baseline
    with at_rest(net):
        at_reference = capture.gradients(capture.baseline[None])[0]
    mean = integrated.evidence(capture, LOOSE).values / change[0].numel()
    wrong = (mean, (at_reference * change).sum(0), (capture.gradient() * capture.activation).sum(0))
    assert all(_far(w.numpy(), theirs) > 0.05 for w in wrong)


def test_oracle_and_engine_see_the_same_layer_in_a_nested_sequential() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nets.conv(1, 3, 2), nn.Sequential(nn.ReLU(inplace=True), nets.conv(3, 4))),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 512, 3),
    ).eval()
    x, target = nets.batch(nets.scan()), nets.score_of(2, "softmax")
    for layer in ("0.0", "0.1.1", "0", "1"):
        activation, gradient = papers.full_gradient(net, layer, x, target)
        capture = nets.captured(net, layer, x, target)
        assert torch.allclose(capture.activation, activation, atol=1e-6), layer
        assert torch.allclose(capture.gradient(), gradient, atol=1e-6), layer
