"""Do the identities of class activation maps hold through explain(), in MONAI's networks too?

P1, P2 and P5 to P13 of docs/properties.md. The same identities method by method, at the capture:
test_methods.py and test_new_methods.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.errors import CannotExplainError
from tests.engine import architectures, nets
from tests.oracle import papers
from tests.secant import architectures as small

Values = npt.NDArray[np.float32]
LINEAR = ("secant", "integrated", "gradcam", "hirescam", "xgradcam", "shapleycam", "seg_xres_cam")
ONE_PASS = ("secant", "gradcam", "hirescam", "xgradcam")  # no quadrature that adapts to the score


def far(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def explained(net: nn.Module, method: str, layer: str, **settings: Any) -> mg.Explanation:
    settings = {"target": 1, "reference": nets.volume(16, seed=5), **settings}
    image = settings.pop("image", nets.volume(16))
    return mg.explain(image, net, layer=layer, method=method, **settings)


# --------------------------------------------------------------- P1, P2: mean + one linear layer


def class_map(net: nn.Module, layer: str, head: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """CAM of class 1 against 0 over the number of cells: weights times activations, float64."""
    seen: list[torch.Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: seen.append(out.detach().clone())
    )
    with torch.no_grad():
        net(nets.batch(array))
    handle.remove()
    weight = nets.weight(net, head).double()
    activation = seen[0][0].double()
    cam = torch.einsum("k,kxyz->xyz", weight[1] - weight[0], activation)
    return np.asarray(cam / activation[0].numel())


POOLED = [
    pytest.param(lambda: small.made("resnet18").float(), "layer4", "fc", 32, id="small resnet18"),
    *(
        pytest.param(
            lambda name=name: architectures.made(name), layer, head, 64, id=name,
            marks=pytest.mark.slow,
        )
        for name, layer, head in (
            ("resnet18", "layer4", "fc"),
            ("resnet50", "layer4", "fc"),
            ("DenseNet121", "class_layers.relu", "class_layers.out"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("maker", "layer", "head", "size"), POOLED)
def test_before_pooling_and_one_linear_layer_all_maps_are_cam(
    maker: Callable[[], nn.Module], layer: str, head: str, size: int
) -> None:
    """P1 and P2. `secant` and `integrated` are the CAM of the scan less that of the reference."""
    net, scan, other = maker(), nets.volume(size), nets.volume(size, seed=5)
    here, there = (class_map(net, layer, head, np.asarray(v.array)) for v in (scan, other))
    bias = nets.weight(net, head, "bias").double()
    for method in ("gradcam", "hirescam", "xgradcam", "secant", "integrated"):
        made = explained(net, method, layer, image=scan, reference=other)
        against_reference = method in ("secant", "integrated")
        wanted = here - there if against_reference else here
        assert far(made.evidence, wanted) < 1e-5, method
        start = made.reference_score if against_reference else float(bias[1] - bias[0])
        assert start is not None
        total = float(made.evidence.sum(dtype=np.float64)) + start
        assert abs(total - made.score) <= 1e-5 * abs(made.score) + 1e-5, method


# --------------------------------------------------------------------------- P6: the norm trap


def margin(output: Any) -> torch.Tensor:
    """The second class over the first, the mean over places where there are any."""
    y: torch.Tensor = output[0] if isinstance(output, (list, tuple)) else output
    return (y[:, 1] - y[:, 0]).reshape(len(y), -1).mean(1)


def opposite(output: Any) -> torch.Tensor:
    return -margin(output)


TRAPS = [
    ("UNet", "model.1.submodule.0.conv.unit0.conv"),
    ("DynUNet", "downsamples.0.conv1"),
    ("BasicUNet", "down_2.convs.conv_0.conv"),
]


@pytest.mark.parametrize(("name", "layer"), TRAPS)
def test_convolutions_straight_before_a_norm_are_refused(name: str, layer: str) -> None:
    """P6: there HiResCAM's sum and Grad-CAM's weights are zero but for rounding."""
    net = small.made(name).float()
    activation, gradient = papers.full_gradient(net, layer, nets.batch(nets.scan(32)), margin)
    slopes, product = (t.double().flatten(1) for t in (gradient, gradient * activation))
    assert float(slopes.mean(1).abs().max()) < 1e-6 * float(slopes.abs().mean(1).max())
    assert float(product.sum().abs()) < 1e-4 * float(product.abs().sum())
    for method in ("gradcam", "xgradcam", "shapleycam"):
        with pytest.raises(CannotExplainError, match="Instance, Group or LayerNorm") as caught:
            mg.explain(nets.volume(32), net, target=margin, layer=layer, method=method)
        assert caught.value.reason == "norm trap"


# ------------------------------------------------------------------------- P7, P8, P9: signs


NETS = [("resnet18", "layer2"), ("UNet", "model.1.submodule.1.submodule")]


@pytest.mark.parametrize(("name", "layer"), NETS)
@pytest.mark.parametrize("method", LINEAR)
def test_what_raises_a_score_lowers_its_opposite_bit_for_bit(
    method: str, name: str, layer: str
) -> None:
    """P7."""
    net = small.made(name).float()
    one, other = (
        explained(net, method, layer, target=score, image=nets.volume(32),
                  reference=nets.volume(32, seed=5))
        for score in (margin, opposite)
    )  # fmt: skip
    assert one.evidence.any()
    assert np.array_equal(one.evidence, -other.evidence)
    assert (one.sum_for, one.sum_against) == (other.sum_against, other.sum_for)


@pytest.mark.parametrize("method", LINEAR)
def test_of_two_logits_what_is_for_one_is_against_the_other_bit_for_bit(method: str) -> None:
    """P9."""
    net = small.made("resnet18").float()
    settings: dict[str, Any] = {"image": nets.volume(32), "reference": nets.volume(32, seed=5)}
    one, other = (explained(net, method, "layer2", target=t, **settings) for t in (0, 1))
    assert np.array_equal(one.evidence, -other.evidence)
    assert (one.sum_for, one.sum_against) == (other.sum_against, other.sum_for)
    assert one.score == -other.score


@pytest.mark.parametrize(
    ("name", "layer", "dtype", "near"),
    [
        ("resnet18", "layer2", torch.float32, 1e-5),
        # The float32 gradient of torch itself is linear to 1.3e-5 behind five instance norms.
        ("UNet", "model.1.submodule.1.submodule", torch.float64, 1e-6),
    ],
)
@pytest.mark.parametrize("method", ONE_PASS)
def test_maps_are_linear_in_the_score(
    method: str, name: str, layer: str, dtype: torch.dtype, near: float
) -> None:
    """P8. `integrated` chooses its nodes by the score; at equal nodes: test_methods.py."""
    net = small.made(name).to(dtype)

    def score(a: float, b: float) -> Callable[[Any], torch.Tensor]:
        return lambda out: (a * out[:, 0] + b * out[:, 1]).reshape(len(out), -1).mean(1)

    one, other, both = (
        explained(net, method, layer, target=score(*weights), image=nets.volume(32),
                  reference=nets.volume(32, seed=5)).evidence
        for weights in ((1, 0), (0, 1), (2, -3))
    )  # fmt: skip
    assert far(2.0 * one - 3.0 * other, both) < near


# ------------------------------------------------------------------------- P10: a shift of all


class Shifted(nn.Module):
    """Three logits, to each of which h(x) is added, a function of the layer's activation."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU())
        self.rest = nn.Sequential(nets.conv(6, 6), nn.SiLU(), nets.Pooled(6, 3))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        h = self.size * (first**2).mean((1, 2, 3, 4))
        out: torch.Tensor = self.rest(first) + h[:, None]
        return out


@pytest.mark.parametrize("method", ["secant", *ONE_PASS[1:]])
def test_a_number_added_to_all_logits_leaves_the_evidence(method: str) -> None:
    """P10: the log-odds of a softmax do not see it; one logit alone does."""
    plain, moved = (
        nets.made(lambda size=size: Shifted(size), dtype=torch.float64)  # type: ignore[misc]
        for size in (0.0, 3.0)
    )
    for link, same in (("softmax", True), ("none", False)):
        one, other = (
            explained(net, method, "first", target=2, link=link).evidence for net in (plain, moved)
        )
        assert (far(other, one) < 1e-6) is same, link


# ------------------------------------------------------------------------- P11, P12, P13: channels


@pytest.mark.parametrize("method", LINEAR)
def test_channels_may_be_renamed(method: str) -> None:
    """P11."""
    net = nets.made(nets.gated)
    other = copy.deepcopy(net)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for part in ("weight", "bias"):
        stem = nets.weight(other, "first.0", part)
        stem.copy_(stem[order].clone())
    behind = nets.weight(other, "rest.0")
    behind.copy_(behind[:, order].clone())
    one, two = (explained(n, method, "first", target=0).evidence for n in (net, other))
    assert far(two, one) < 1e-6


@pytest.mark.parametrize("method", ["secant", "integrated", "gradcam", "hirescam"])
def test_net_evidence_does_not_depend_on_the_basis_of_the_channels(method: str) -> None:
    """P12, and that LayerCAM, which sums what is positive of each channel, does."""
    net, other = nets.remixed()
    one, two = (explained(n, method, "0").evidence for n in (net, other))
    assert far(two, one) < 1e-5
    gross, mixed = (explained(n, "layercam", "0").evidence for n in (net, other))
    assert far(mixed, gross) > 0.01


@pytest.mark.parametrize("method", LINEAR)
def test_rescaled_channels_with_a_rescaled_head_change_nothing(method: str) -> None:
    """P13: twelve times the activation, a twelfth of the weights behind it."""
    net = nets.made(nets.max_pooled)
    other = copy.deepcopy(net)
    for part in ("weight", "bias"):
        nets.weight(other, "first.0", part).mul_(12.0)
    nets.weight(other, "rest.0.1").div_(12.0)
    one, two = (explained(n, method, "first", target=0).evidence for n in (net, other))
    assert far(two, one) < 1e-5
