"""MONAI's architectures, small and untrained but with scores that move, and layers of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from med_gradcam.tail import INPUT
from tests.secant.pairs import noise

Score = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """`layers`: early, middle and last ones that every path goes through.

    `beside`: one that paths avoid; `together`: layers that no path avoids all of.
    """

    make: Callable[[int], nn.Module]
    layers: tuple[str, ...]
    beside: str = ""
    together: tuple[str, ...] = ()
    size: int = 32
    quick: bool = True


def _nets() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks import nets
    return nets


def _resnet(name: str) -> Callable[[int], nn.Module]:
    return lambda _: getattr(_nets(), name)(
        spatial_dims=3, n_input_channels=1, num_classes=2, widen_factor=0.25
    )


def _vit(size: int) -> nn.Module:
    net: nn.Module = _nets().ViT(
        1, (size,) * 3, (8,) * 3, hidden_size=48, mlp_dim=96, num_layers=4, num_heads=4,
        classification=True, num_classes=2,
    )  # fmt: skip
    return net


RESNET = ("conv1", "layer2", "layer4")
ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(_resnet("resnet18"), RESNET, "layer2.0.conv1"),
    "resnet50": Architecture(_resnet("resnet50"), RESNET, quick=False),
    "SEResNet50": Architecture(
        lambda _: _nets().SEResNet50(spatial_dims=3, in_channels=1, num_classes=2),
        ("layer0.conv1", "layer2", "layer4"),
        "layer3.2.se_layer",
    ),
    "DenseNet121": Architecture(
        lambda _: _nets().DenseNet121(3, 1, 2),
        ("features.conv0", "features.denseblock3", "class_layers.relu"),
        "features.denseblock2.denselayer3.layers.conv2",
    ),
    "EfficientNet-b0": Architecture(
        lambda _: _nets().EfficientNetBN(
            "efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1, num_classes=2
        ),
        ("_conv_stem", "_blocks.4", "_conv_head"),
        "_blocks.2.4._project_conv",
    ),
    "BasicUNet": Architecture(
        lambda _: _nets().BasicUNet(3, 1, 2, features=(8, 8, 16, 32, 32, 8)),
        ("conv_0.conv_0.conv", "conv_0", "upcat_1"),
        "down_4",
        ("conv_0", "down_1", "down_2", "down_3", "down_4"),
    ),
    "UNet": Architecture(
        lambda _: _nets().UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1),
        ("model.0", "model.2.0", "model.2"),
        "model.1.submodule.1.submodule",
        ("model.0", "model.1.submodule.1.submodule", "model.1.submodule.0"),
    ),
    "SegResNet": Architecture(
        lambda _: _nets().SegResNet(3, 8, 1, 2),
        ("convInit", "down_layers.0", "up_layers.2"),
        "down_layers.3",
        ("down_layers.0", "down_layers.1", "down_layers.2", "down_layers.3"),
    ),
    "DynUNet": Architecture(
        lambda _: _nets().DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
        ("input_block.conv1.conv", "input_block", "upsamples.1"),
        "bottleneck",
        ("input_block", "downsamples.0", "bottleneck"),
    ),
    "ViT": Architecture(_vit, ("patch_embedding", "blocks.1", "norm"), "blocks.2.norm1"),
    "UNETR": Architecture(
        lambda size: _nets().UNETR(
            1, 2, (size,) * 3, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4
        ),
        ("decoder2", "out"),
        "vit.blocks.5",
        ("encoder1", "encoder2", "encoder3", "encoder4", "vit.norm"),
    ),
    "SwinUNETR": Architecture(
        lambda _: _nets().SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=3),
        ("decoder1", "out"),
        "encoder10",
        ("encoder1", "encoder2", "encoder3", "encoder4", "swinViT.layers3.0", "encoder10"),
        size=64,
        quick=False,
    ),
}  # fmt: skip


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def margin(output: Any) -> Score:
    """The second class over the first, in a box of the middle where the output is a map."""
    del output

    def score(output: Any) -> torch.Tensor:
        y = _first(output)
        if y.ndim > 2:
            low, high = y.shape[2] // 2 - 1, y.shape[2] // 2 + 2
            y = y[:, :, low:high, low:high, low:high].mean((2, 3, 4))
        return y[:, 1] - y[:, 0]

    return score


def _scans(n: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    drifting = 0.2 * noise(count, 1, n, n, n, seed=1).cumsum(2)
    return drifting, 0.5 * noise(count, 1, n, n, n, seed=2)


def _statistics(net: nn.Module, size: int) -> None:
    """The statistics that batch norms would have of a first batch."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm3d)]
    if norms:
        for norm in norms:
            norm.momentum = None
        net.train()
        x, r = _scans(size, 2)
        with torch.no_grad():
            net(torch.cat([x, r]).float())


@cache
def made(name: str, size: int = 0) -> nn.Module:
    """The network, whose weights are seeded and whose score moves by more than 0.1."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    net = architecture.make(size or architecture.size)
    _statistics(net, size or architecture.size)
    with torch.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def scans(
    name: str, dtype: torch.dtype, size: int = 0, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two inputs: noise that drifts along one axis, and weaker noise."""
    x, r = _scans(size or ARCHITECTURES[name].size, count)
    return x.to(dtype), r.to(dtype)


def layers(name: str) -> list[str]:
    return [INPUT, *ARCHITECTURES[name].layers]
