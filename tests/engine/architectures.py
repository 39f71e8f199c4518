"""MONAI's networks, and where the cells of their layers lie: the table of true centres."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn


def monai_networks() -> Any:
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


def _unetr(m: Any) -> Any:
    return m.UNETR(1, 2, (64, 64, 64), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2)


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
    "VNet": lambda m: m.VNet(),
    "SwinUNETR": lambda m: m.SwinUNETR(in_channels=1, out_channels=2, feature_size=12),
    "UNETR": _unetr,
}


@dataclass(frozen=True)
class Row:
    """Centre of cell i at `start` + `jump` * i voxels, on any axis; `peers` err by so much."""

    net: str
    layer: str
    jump: int
    start: float
    peers: float


# The error of peers, who stretch the grid of cells over the scan, is (jump - 1) / 2 - start.
TABLE = [
    *(
        Row(net, f"layer{n}", 2**n, 0.0, peers)
        for net in ("resnet18", "resnet50")
        for n, peers in ((1, 0.5), (2, 1.5), (3, 3.5), (4, 7.5))
    ),
    Row("SEResNet50", "layer4", 32, 2.0, 13.5),
    Row("DenseNet121", "features.denseblock2", 8, 2.0, 1.5),
    Row("DenseNet121", "features.denseblock3", 16, 6.0, 1.5),
    Row("DenseNet121", "class_layers.relu", 32, 14.0, 1.5),
    Row("EfficientNet-b0", "_conv_head", 32, 31.0, -15.5),
    Row("BasicUNet", "down_4", 16, 7.5, 0.0),
    Row("UNet", "model.1.submodule.1.submodule.1.submodule", 8, 0.0, 3.5),
    Row("SegResNet", "down_layers.3", 8, 0.0, 3.5),
    Row("DynUNet", "bottleneck", 8, 0.0, 3.5),
    Row("VNet", "down_tr256", 16, 7.5, 0.0),
    Row("SwinUNETR", "swinViT.patch_embed", 2, 0.5, 0.0),
    Row("SwinUNETR", "swinViT.layers3.0", 16, 7.5, 0.0),
    Row("UNETR", "vit.patch_embedding.patch_embeddings", 16, 7.5, 0.0),
]
_MADE: dict[str, nn.Module] = {}


def made(name: str) -> nn.Module:
    """One network of the table with seeded weights, in eval mode; made once."""
    if name not in _MADE:
        torch.manual_seed(0)
        _MADE[name] = BUILD[name](monai_networks()).eval()
    return _MADE[name]
