"""Do the methods at the input equal their papers, written out slowly over the whole network?"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explanation import Cells
from med_gradcam.methods import (
    Bound,
    expected_gradients,
    fullgrad,
    gradcam,
    guided_backprop,
    guided_gradcam,
    integrated_gradients,
    saliency,
    smoothgrad,
)
from med_gradcam.tail import INPUT, Score, at_rest
from tests.engine import nets
from tests.oracle import cams, inputs, papers
from tests.oracle.papers import Numbers

LOOSE = Bound(float("inf"), 0.0)
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-6)]
RELUS = ("mean + linear", "flatten + linear", "gate", "instance norm", "batch norm", "max pool")


def _far(ours: Numbers, theirs: Numbers) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _x(dtype: torch.dtype = torch.float64, seed: int = 0, channels: int = 1) -> torch.Tensor:
    return nets.batch(nets.scan(seed=seed, channels=channels), dtype)


def _map(
    method: ModuleType, net: nn.Module, x: torch.Tensor, score: Score, seed: int = 0
) -> Numbers:
    capture = nets.captured(net, INPUT, x, score, _x(x.dtype, 5, x.shape[1]))
    capture.seed = seed
    with at_rest(net):
        return np.asarray(method.evidence(capture, LOOSE).values.numpy())


def two_channels() -> nn.Module:
    """A network that takes two channels."""
    return nn.Sequential(nets.conv(2, 4, 2), nn.ReLU(), nets.conv(4, 4), nn.ReLU(), nets.Pooled(4))


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_saliency_equals_its_paper(tail: str, dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1, "softmax")
    theirs = inputs.sizes(inputs.input_gradient(net, _x(dtype), target))
    assert _far(_map(saliency, net, _x(dtype), target), theirs) < near


@pytest.mark.parametrize("tail", ["gate", "SiLU MLP", "max pool"])
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_smoothgrad_equals_its_paper(tail: str, dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1, "softmax")
    noise = (smoothgrad.NOISE, smoothgrad.SAMPLES, 3)
    theirs = inputs.smoothgrad(net, _x(dtype), target, noise)
    assert _far(_map(smoothgrad, net, _x(dtype), target, 3), theirs) < near
    assert _far(_map(smoothgrad, net, _x(dtype), target, 4), theirs) > 100 * near


def test_channels_add_their_sizes_not_their_signs() -> None:
    net, target = nets.made(two_channels, dtype=torch.float64), nets.score_of(1)
    x = _x(channels=2)
    x[:, 1] *= 100.0  # another unit: the noise follows each channel's own SD
    for method, theirs in (
        (saliency, inputs.sizes(inputs.input_gradient(net, x, target))),
        (smoothgrad, inputs.smoothgrad(net, x, target, (0.15, 16, 0))),
    ):
        assert _far(_map(method, net, x, target), theirs) < 1e-10


# ------------------------------------------------------------------------------- the path


def smooth() -> nn.Module:
    """No corners: what the oracle's rule needs."""
    return nn.Sequential(
        nets.conv(1, 4, 2), nn.SiLU(), nets.conv(4, 4), nn.Tanh(), nets.Pooled(4, 3)
    )


@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_integrated_gradients_equal_romberg(dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(smooth, dtype=dtype), nets.score_of(1, "softmax")
    theirs = inputs.integrated(net, _x(dtype), _x(dtype, 5), target)
    assert _far(_map(integrated_gradients, net, _x(dtype), target), theirs) < near


@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_expected_gradients_equal_the_mean_over_references(dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(smooth, dtype=dtype), nets.score_of(1, "softmax")
    others = inputs.references(_x(dtype), _x(dtype, 5), expected_gradients.PAIRS, 2)
    assert len(others) == 4
    theirs = np.mean([inputs.integrated(net, _x(dtype), r, target) for r in others], axis=0)
    assert _far(_map(expected_gradients, net, _x(dtype), target, 2), theirs) < near
    assert _far(_map(expected_gradients, net, _x(dtype), target, 3), theirs) > 100 * near


@pytest.mark.parametrize("maker", [smooth, nets.max_pooled])
def test_expected_gradients_add_up_to_the_references_mean_score(maker: Any) -> None:
    net, target = nets.made(maker, dtype=torch.float64), nets.score_of(1)
    capture = nets.captured(net, INPUT, _x(), target, _x(seed=5))
    found = expected_gradients.evidence(capture, Bound(1e-3 * abs(capture.score), 0.0))
    with torch.no_grad():
        scores = [float(target(net(r))[0]) for r in inputs.references(_x(), _x(seed=5), 2, 0)]
    assert found.start_score == pytest.approx(np.mean(scores), rel=1e-12)
    total = capture.score - np.mean(scores)
    assert float(found.values.sum()) == pytest.approx(total, abs=1e-3 * abs(capture.score))
    assert found.reference_score == found.start_score
    assert found.converged
    assert capture.passes >= 2 * found.nodes


def test_expected_gradients_converge_only_if_their_sum_does() -> None:
    capture = nets.captured(nets.made(smooth), INPUT, _x(torch.float32), nets.score_of(1))
    capture.baseline, capture.reference_score = _x(torch.float32, 5)[0], 0.0
    assert expected_gradients.evidence(capture, LOOSE).converged
    assert not expected_gradients.evidence(capture, Bound(0.0, 0.0)).converged


@pytest.mark.parametrize("method", [integrated_gradients, expected_gradients])
def test_without_a_reference_there_is_no_path(method: ModuleType) -> None:
    capture = nets.captured(nets.made(smooth), INPUT, _x(torch.float32))
    name = method.__name__.rpartition(".")[2]
    with pytest.raises(UsageError, match=f"expected a reference input for the method '{name}'"):
        method.evidence(capture, LOOSE)


# ------------------------------------------------------------------------------- guided backprop


def chain() -> nn.Sequential:
    """Layer after layer, for a rule that is applied by hand."""
    return nn.Sequential(
        nets.conv(1, 4, 2),
        nn.ReLU(),
        nets.conv(4, 6),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Flatten(),
        nn.Linear(6 * 64, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


class Forms(nn.Module):
    """One network, its ReLUs written in one way or another."""

    def __init__(self, relu: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = nets.conv(1, 4, 2), nets.conv(4, 4), nets.Pooled(4)
        self.act = relu if isinstance(relu, nn.Module) else nn.Identity()
        self.does = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.does(self.first(x))
        out: torch.Tensor = self.head(self.does(self.second(stem) + stem))
        return out


def _worked_on(x: torch.Tensor) -> torch.Tensor:
    x.relu_()  # the answer is not taken
    return x


FORMS = {
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "F.relu by name": lambda x: F.relu(input=x),
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "torch.relu_": torch.relu_,
    "answer not taken": _worked_on,
    "clamp": lambda x: x.clamp(min=0),
    "clamp by position": lambda x: torch.clamp(x, 0.0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "clamp_": lambda x: x.clamp_(0),
}


@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_guided_backprop_equals_the_rule_by_hand(dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    net, target = nets.made(chain, dtype=dtype), nets.score_of(1, "softmax")
    layers = list(net.children())
    theirs = inputs.guided_backprop(layers, _x(dtype), target)
    ours = _map(guided_backprop, net, _x(dtype), target)
    assert _far(ours, inputs.sizes(theirs)) < near
    plain = inputs.guided_backprop(layers, _x(dtype), target, guided=False)
    assert _far(plain, inputs.input_gradient(net, _x(dtype), target)) < near
    assert _far(inputs.sizes(plain), inputs.sizes(theirs)) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_relu_is_known_by_what_it_does(form: str) -> None:
    target = nets.score_of(1)
    wanted = _map(
        guided_backprop, nets.made(lambda: Forms(nn.ReLU()), dtype=torch.float64), _x(), target
    )
    net = nets.made(lambda: Forms(FORMS[form]), dtype=torch.float64)
    assert np.array_equal(_map(guided_backprop, net, _x(), target), wanted)
    assert _far(_map(saliency, net, _x(), target), wanted) > 0.1


@pytest.mark.parametrize("tail", RELUS)
def test_guided_backprop_is_never_the_plain_gradient(tail: str) -> None:
    net, target = nets.made(nets.TAILS[tail]), nets.score_of(1, "softmax")
    ours = _map(guided_backprop, net, _x(torch.float32), target)
    plain = inputs.sizes(inputs.input_gradient(net, _x(torch.float32), target))
    assert _far(ours, plain) > 0.01


def test_guided_backprop_acts_on_a_monai_resnet() -> None:
    """Whose ReLUs are called `act`: a search for names finds none."""
    from monai.networks.nets.resnet import ResNet

    torch.manual_seed(0)
    net = ResNet("basic", [1, 1, 1, 1], [4, 4, 8, 8], n_input_channels=1, num_classes=2).eval()
    x, target = _x(torch.float32), nets.score_of(1)
    ours = _map(guided_backprop, net, x, target)
    assert _far(ours, inputs.sizes(inputs.input_gradient(net, x, target))) > 0.1


class Swish(nn.Module):
    """Written out, as in MONAI's EfficientNet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.PReLU(), "prelu"),
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.GELU(), "gelu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(inplace=True), "leaky_relu"),
        (nn.ELU(), "elu"),
        (nn.ReLU6(), "relu6|hardtanh"),
        (nn.Softplus(), "softplus"),
        (nn.Mish(), "mish"),
        (Swish(), "Swish"),
        (F.leaky_relu_, "leaky_relu_"),
        (nn.Tanh(), "none"),
    ],
)
def test_other_rectifiers_are_refused_by_name(activation: Any, name: str) -> None:
    net = nets.made(lambda: Forms(activation))
    with pytest.raises(CannotExplainError, match=f"are ReLUs for guided backprop, got ({name}),"):
        _map(guided_backprop, net, _x(torch.float32), nets.score_of(1))


# ------------------------------------------------------------------------------- guided Grad-CAM


@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_guided_gradcam_equals_the_product(dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(chain, dtype=dtype), nets.score_of(1, "softmax")
    capture = nets.captured(net, INPUT, _x(dtype), target)
    capture.beside = nets.captured(net, "5", _x(dtype), target)  # cells of 4 voxels, centres 1 + 4i
    activation, gradient = papers.full_gradient(net, "5", _x(dtype), target)
    coarse = papers.gradcam(activation.double().numpy(), gradient.double().numpy())
    assert coarse.min() < 0 < coarse.max()
    fine = inputs.sizes(inputs.guided_backprop(list(net.children()), _x(dtype), target))
    theirs = fine * cams.read_between(cams.relu(coarse), (16, 16, 16), 1.0, 4.0)
    ours = guided_gradcam.evidence(capture, LOOSE).values.numpy()
    assert _far(ours, theirs) < near
    shifted = fine * cams.read_between(cams.relu(coarse), (16, 16, 16), 1.5, 4.0)
    assert _far(ours, shifted) > 0.01  # where half-pixel centres would put it


def test_guided_gradcam_needs_a_layer() -> None:
    net = nets.made(chain)
    with pytest.raises(UsageError, match="expected a layer for the Grad-CAM"):
        _map(guided_gradcam, net, _x(torch.float32), nets.score_of(1))


def test_the_cells_of_the_layer_are_taken_where_they_are_known() -> None:
    net, target = nets.made(chain, dtype=torch.float64), nets.score_of(1)
    known = nets.captured(net, INPUT, _x(), target)
    beside = nets.captured(net, "5", _x(), target)
    beside.cells = Cells((4.0,) * 3, (3.0,) * 3, (8.0,) * 3, "exact")
    known.beside = beside
    fine = _map(guided_backprop, net, _x(), target)
    coarse = gradcam.evidence(beside, LOOSE).values.relu().numpy()
    theirs = fine * cams.read_between(coarse, (16, 16, 16), 3.0, 4.0)
    inside = (slice(1, None),) * 3  # further than half a cell outside the first centre it is zero
    assert (
        _far(guided_gradcam.evidence(known, LOOSE).values.numpy()[inside], theirs[inside]) < 1e-10
    )


# ------------------------------------------------------------------------------- FullGrad


GRIDS = {16: (0.0, 1.0), 8: (0.0, 2.0), 4: (1.0, 4.0), 2: (3.0, 8.0)}


@pytest.mark.parametrize(
    "tail",
    ["mean + linear", "flatten + linear", "batch norm", "max pool", "SiLU MLP"],
)
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_fullgrad_equals_the_biases_by_hand(tail: str, dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1, "softmax")
    theirs, no_place = inputs.fullgrad(net, _x(dtype), target, GRIDS)
    found = fullgrad.evidence(nets.captured(net, INPUT, _x(dtype), target), LOOSE)
    assert _far(found.values.numpy(), theirs) < near
    assert found.start_score == pytest.approx(no_place, rel=10 * near)


@pytest.mark.parametrize("tail", ["instance norm", "group norm"])
def test_fullgrad_equals_central_differences_of_norms(tail: str) -> None:
    net, target = nets.made(nets.TAILS[tail], dtype=torch.float64), nets.score_of(1, "softmax")
    theirs, no_place = inputs.fullgrad(net, _x(), target, GRIDS)
    found = fullgrad.evidence(nets.captured(net, INPUT, _x(), target), LOOSE)
    assert _far(found.values.numpy(), theirs) < 1e-6
    assert found.start_score == pytest.approx(no_place, rel=1e-6)
