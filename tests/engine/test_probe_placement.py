"""MONAI's networks: do their cells lie where the table says, are their tails the whole network?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from med_gradcam.graph import trace
from med_gradcam.placement import place
from med_gradcam.tail import at_rest
from tests.engine import nets
from tests.oracle import papers


@pytest.fixture(scope="module")
def monai_nets() -> Any:
    """monai.networks.nets, with the warnings of its own imports kept away."""
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("monai.networks.nets")


def _resnet(name: str) -> Callable[[Any], nn.Module]:
    return lambda m: getattr(m, name)(
        spatial_dims=3, n_input_channels=1, num_classes=2, conv1_t_stride=1
    )


def _unet(m: Any) -> Any:
    return m.UNet(3, 1, 2, channels=(4, 8, 16, 32), strides=(2, 2, 2), num_res_units=2)


def _dynunet(m: Any) -> Any:
    return m.DynUNet(
        3,
        1,
        2,
        kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[4, 8, 16, 32],
    )


BUILD: dict[str, Callable[[Any], Any]] = {
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
    "SEResNet50": lambda m: m.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2),
    "DenseNet121": lambda m: m.DenseNet121(3, 1, 2),
    "EfficientNet-b0": lambda m: m.EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1, num_classes=2
    ),
    "BasicUNet": lambda m: m.BasicUNet(3, 1, 2, features=(4, 4, 8, 16, 32, 4)),
    "UNet": _unet,
    "SegResNet": lambda m: m.SegResNet(3, 8, 1, 2),
    "DynUNet": _dynunet,
}
# Network, layer, distance of cells, centre of cell 0 (voxels of the input), for any axis.
TABLE = [
    ("resnet18", "layer1", 2, 0.0),
    ("resnet18", "layer2", 4, 0.0),
    ("resnet18", "layer3", 8, 0.0),
    ("resnet18", "layer4", 16, 0.0),
    ("resnet50", "layer4", 16, 0.0),
    ("SEResNet50", "layer4", 32, 2.0),
    ("DenseNet121", "features.denseblock2", 8, 2.0),
    ("DenseNet121", "features.denseblock3", 16, 6.0),
    ("DenseNet121", "class_layers.relu", 32, 14.0),
    ("EfficientNet-b0", "_conv_head", 32, 31.0),
    ("BasicUNet", "down_4", 16, 7.5),
    ("UNet", "model.1.submodule.1.submodule.1.submodule", 8, 0.0),
    ("SegResNet", "down_layers.3", 8, 0.0),
    ("DynUNet", "bottleneck", 8, 0.0),
]
_MADE: dict[str, nn.Module] = {}


def _net(name: str, monai_nets: Any) -> nn.Module:
    if name not in _MADE:
        torch.manual_seed(0)
        _MADE[name] = BUILD[name](monai_nets).eval()
    return _MADE[name]


@pytest.mark.parametrize(("name", "layer", "jump", "start"), TABLE)
def test_cells_of_monai_networks(
    name: str, layer: str, jump: int, start: float, monai_nets: Any
) -> None:
    net, shape = _net(name, monai_nets), (1, 64, 64, 64)
    info = trace(net, shape).find(layer)
    assert info is not None
    with at_rest(net):
        made = place(net, info, shape)
    assert list(made.jump) == [jump] * 3
    assert list(made.start) == [start] * 3
    assert made.how == "exact"


def test_the_size_of_the_scan_does_not_move_the_cells(monai_nets: Any) -> None:
    net = _net("resnet18", monai_nets)
    for size in (48, 57, 64):
        info = trace(net, (1, size, size, size)).find("layer3")
        assert info is not None
        assert info.lattice is not None
        assert (info.lattice.start, info.lattice.jump) == ((0.0,) * 3, (8.0,) * 3)


TAILS = [
    ("resnet18", "layer2.0.downsample", True),  # what is added to it is shared by a batch
    ("EfficientNet-b0", "_blocks.4", False),
    ("BasicUNet", "down_3", False),
    ("UNet", "model.1.submodule.0", False),
    ("SegResNet", "down_layers.2", False),
    ("DynUNet", "bottleneck", False),
]
SLOW_TAILS = [
    ("resnet18", "layer2", False),
    ("resnet18", "layer3.1.conv1", False),
    ("resnet50", "layer3", False),
    ("SEResNet50", "layer3", False),
    ("DenseNet121", "features.denseblock3", False),
    ("DenseNet121", "features.denseblock2.denselayer4.layers.conv1", False),
]


@pytest.mark.parametrize(
    ("name", "layer", "alone"),
    [*TAILS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_TAILS)],
)
def test_tails_of_monai_networks_are_the_whole_network(
    name: str, layer: str, alone: bool, monai_nets: Any
) -> None:
    net = _net(name, monai_nets)
    torch.manual_seed(1)
    x, reference = torch.randn(1, 1, 32, 32, 32), torch.randn(1, 1, 32, 32, 32)

    def score(output: Any) -> torch.Tensor:
        first: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return first.flatten(2).mean(2)[:, 0] if first.ndim == 5 else first[:, 0]

    activation, gradient = papers.full_gradient(net, layer, x, score)
    made = nets.captured(net, layer, x, score, reference)
    size = float(gradient.abs().max())
    assert torch.allclose(made.activation, activation, rtol=1e-5, atol=1e-6)
    assert float((made.gradient() - gradient).abs().max()) < 1e-3 * size
    assert made.tail.alone is alone
    assert len(made.tail.memory) > 0
