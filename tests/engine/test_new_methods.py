"""Do the gradient methods keep the identities of their papers and of algebra?

Sums, signs, classes, shifted logits, renamed, remixed and rescaled channels; tolerances as
measured for float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from med_gradcam import _plugins
from med_gradcam.capture import Capture
from med_gradcam.methods import Bound, hirescam, layercam, xgradcam
from med_gradcam.tail import INPUT, Score, at_rest
from med_gradcam.target import Link
from tests.engine import nets

LOOSE = Bound(float("inf"), 0.0)
Values = npt.NDArray[np.float64]
Maker = Callable[[], nn.Module]
LAYER = (
    "gradcam_pp",
    "smooth_gradcam_pp",
    "xgradcam",
    "layercam",
    "eigencam",
    "eigengradcam",
    "kpcacam",
    "shapleycam",
    "seg_xres_cam",
)
VOXELS = ("saliency", "smoothgrad", "integrated_gradients", "expected_gradients", "fullgrad")
GUIDED = ("guided_backprop", "guided_gradcam")
LINEAR = (
    "xgradcam",
    "shapleycam",
    "seg_xres_cam",
    "integrated_gradients",
    "expected_gradients",
    "fullgrad",
)
CLASS_FREE = ("eigencam", "kpcacam")


def capture_for(name: str, net: nn.Module, score: Score, layer: str = "first") -> Capture:
    """A capture as the engine hands it to a method, float64 or float32 by the network."""
    dtype = next(net.parameters()).dtype
    x, reference = (nets.batch(nets.scan(seed=s), dtype) for s in (0, 5))
    if _plugins.load("methods", name).LEVEL == "layer":
        return nets.captured(net, layer, x, score, reference)
    found = nets.captured(net, INPUT, x, score, reference)
    found.beside = nets.captured(net, layer, x, score, reference)
    return found


def made_map(name: str, net: nn.Module, score: Score, layer: str = "first") -> Values:
    capture = capture_for(name, net, score, layer)
    with at_rest(net):
        return np.asarray(_plugins.load("methods", name).evidence(capture, LOOSE).values.numpy())


def _double(maker: Maker) -> nn.Module:
    return nets.made(maker, dtype=torch.float64)


def _far(one: Values, other: Values) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


def bias_free() -> nn.Module:
    """Behind `first`, and before it, nothing but slopes and maxima."""
    tail = nn.Sequential(
        nets.conv(6, 6, bias=False),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nets.conv(6, 8, bias=False),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 1, bias=False),
    )
    net = nets.Body(tail)
    net.first[0] = nets.conv(1, 6, 2, bias=False)
    return net


def _rectified(net: nn.Module) -> nn.Module:
    """The same network without leaks: what guided backprop has a rule for."""
    for module in net.modules():
        for key, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, key, nn.ReLU())
    return net


# ------------------------------------------------------------------------------------ P1 to P5


@pytest.mark.parametrize("name", ["xgradcam", "shapleycam", "seg_xres_cam"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_before_pooling_and_one_linear_layer_it_is_cam(
    name: str, dtype: torch.dtype, near: float
) -> None:
    net = nets.made(nets.pooled_linear, dtype=dtype)
    capture = capture_for(name, net, nets.score_of(1))
    weight = nets.weight(net, "rest.head")[1].double()
    cam = torch.einsum("k,kxyz->xyz", weight, capture.activation.double()).numpy()
    assert _far(cam / 512, made_map(name, net, nets.score_of(1))) < near


def test_before_pooling_and_one_linear_layer_layercam_is_cam_of_the_positive_weights() -> None:
    net = _double(nets.pooled_linear)
    capture = capture_for("layercam", net, nets.score_of(1))
    weight = nets.weight(net, "rest.head")[1].relu()
    cam = torch.einsum("k,kxyz->xyz", weight, capture.activation).numpy() / 512
    assert _far(cam, layercam.evidence(capture, LOOSE).values.numpy()) < 1e-12


@pytest.mark.parametrize("maker", [nets.pooled_linear, nets.flat_linear])
@pytest.mark.parametrize("name", ["xgradcam", "shapleycam", "seg_xres_cam"])
def test_sums_and_the_bias_give_the_score(name: str, maker: Maker) -> None:
    net, score = _double(maker), nets.score_of(0)
    total = made_map(name, net, score).sum() + capture_for(name, net, score).target(
        torch.stack(
            [nets.weight(net, "rest.head" if maker is nets.pooled_linear else "rest.1", "bias")]
        )
    )
    z = capture_for(name, net, score).score
    if name == "xgradcam" or maker is nets.pooled_linear:
        assert float(total) == pytest.approx(z, rel=1e-12)
    else:  # the mean over places forgets what the weights there were
        assert abs(float(total) - z) > 1e-3 * abs(z)


@pytest.mark.parametrize("name", ["xgradcam", "fullgrad"])
def test_sums_are_the_score_without_biases(name: str) -> None:
    net, score = _double(bias_free), nets.score_of(0)
    z = capture_for(name, net, score).score
    assert made_map(name, net, score).sum() == pytest.approx(z, rel=1e-10)


@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize("layer", ["first", "first.0"])
def test_xgradcam_has_the_sum_of_hirescam_at_any_layer(tail: str, layer: str) -> None:
    """`first.0` is a convolution without ReLU: some channels there nearly cancel."""
    net, score = _double(nets.TAILS[tail]), nets.score_of(1, "softmax")
    capture = capture_for("xgradcam", net, score, layer)
    parts = hirescam.evidence(capture, LOOSE).values
    ours = xgradcam.evidence(capture, LOOSE).values
    assert float(ours.sum() - parts.sum()) == pytest.approx(0, abs=1e-12 * float(parts.abs().sum()))
    gross = (capture.gradient() * capture.activation).sum(dim=(1, 2, 3)).abs().sum()
    bound = float((capture.gradient() * capture.activation).abs().sum() + 10 * gross)
    assert float(ours.abs().sum()) <= bound  # what cancels does not come back enlarged


# ------------------------------------------------------------------------------------ P7 to P10


@pytest.mark.parametrize("maker", [nets.gated, nets.max_pooled, nets.batch_normed])
@pytest.mark.parametrize("name", LINEAR)
def test_the_map_of_the_negated_score_is_the_negated_map_bit_for_bit(
    name: str, maker: Maker
) -> None:
    net, plain = nets.made(maker), nets.score_of(1)
    ours = made_map(name, net, plain)
    assert np.array_equal(ours, -made_map(name, net, lambda out: -plain(out)))
    assert ours.any()


@pytest.mark.parametrize("maker", [nets.gated, nets.max_pooled, nets.group_normed])
@pytest.mark.parametrize("name", LINEAR)
def test_maps_are_linear_in_the_score(name: str, maker: Maker) -> None:
    net = _double(maker)
    parts = [made_map(name, net, nets.score_of(c)) for c in (0, 1)]
    both = made_map(name, net, lambda out: 2.0 * out[:, 0] - 3.0 * out[:, 1])
    assert _far(2.0 * parts[0] - 3.0 * parts[1], both) < 1e-10


@pytest.mark.parametrize("name", [n for n in (*LAYER, *VOXELS, *GUIDED) if n not in LINEAR])
def test_the_others_are_not_linear_and_say_that_they_have_no_sign(name: str) -> None:
    """Guards the two tests above: a method that belongs in them must not hide here."""
    net = _double(nets.gated)
    parts = [made_map(name, net, nets.score_of(c)) for c in (0, 1)]
    both = made_map(name, net, lambda out: 2.0 * out[:, 0] - 3.0 * out[:, 1])
    assert _far(2.0 * parts[0] - 3.0 * parts[1], both) > 0.01
    assert not _plugins.load("methods", name).SIGNED


@pytest.mark.parametrize("name", [*LAYER, *VOXELS, *GUIDED])
def test_a_class_has_its_own_map_or_the_method_says_that_it_knows_none(name: str) -> None:
    net = _double(lambda: nets.flat_linear(3))
    one, other = (made_map(name, net, nets.score_of(c)) for c in (0, 2))
    assert np.array_equal(one, other) == (name in CLASS_FREE)
    cannot = str(_plugins.load("methods", name).CANNOT_SHOW)
    assert ("anything about the class" in cannot) == (name in CLASS_FREE)


@pytest.mark.parametrize("name", [*LAYER, *VOXELS, *GUIDED])
def test_a_number_added_to_all_logits_changes_nothing(name: str) -> None:
    net = _double(lambda: nets.flat_linear(3))
    moved = copy.deepcopy(net)
    head = nets.weight(moved, "rest.1")  # h(x): the same function of the scan on every logit
    head.add_(0.05 * torch.randn(1, head.shape[1], dtype=torch.float64))
    nets.weight(moved, "rest.1", "bias").add_(7.0)

    def maps(link: Link) -> tuple[Values, Values]:
        score = nets.score_of(2, link)
        return made_map(name, net, score), made_map(name, moved, score)

    one, other = maps("softmax")
    assert _far(one, other) < 1e-9
    assert (_far(*maps("none")) > 0.01) == (name not in CLASS_FREE)


# ------------------------------------------------------------------------------------ P11 to P13


@pytest.mark.parametrize("name", [*LAYER, *VOXELS, *GUIDED])
def test_channels_may_be_renamed(name: str) -> None:
    net = _double(nets.gated)
    other = copy.deepcopy(net)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for part in ("weight", "bias"):
        stem = nets.weight(other, "first.0", part)
        stem.copy_(stem[order].clone())
    tail = nets.weight(other, "rest.0")
    tail.copy_(tail[:, order].clone())
    score = nets.score_of(1)
    assert _far(made_map(name, net, score), made_map(name, other, score)) < 1e-10


@pytest.mark.parametrize("name", ["shapleycam", "seg_xres_cam", *VOXELS])
def test_net_evidence_does_not_depend_on_the_basis_of_the_channels(name: str) -> None:
    net, other = nets.remixed()
    score = nets.score_of(1)
    assert _far(made_map(name, net, score, "0"), made_map(name, other, score, "0")) < 1e-8


@pytest.mark.parametrize("name", ["gradcam_pp", "layercam", "eigencam", "eigengradcam"])
def test_maps_of_single_channels_do_depend_on_the_basis(name: str) -> None:
    """So does the weight of XGrad-CAM in general; before mean + linear it is the gradient."""
    net, other = nets.remixed()
    score = nets.score_of(1)
    assert _far(made_map(name, net, score, "0"), made_map(name, other, score, "0")) > 0.01


@pytest.mark.parametrize("name", [*LAYER, *VOXELS, *GUIDED])
def test_rescaled_channels_with_a_rescaled_tail_change_nothing(name: str) -> None:
    net = _rectified(_double(bias_free))
    other = copy.deepcopy(net)
    nets.weight(other, "first.0").mul_(16.0)
    nets.weight(other, "rest.0").div_(16.0)
    score = nets.score_of(0)
    one, two = made_map(name, net, score), made_map(name, other, score)
    assert (_far(one, two) < 1e-10) == (name not in CLASS_FREE)  # these are in units of A
