"""Small MONAI networks, written as ONNX by both of torch's exporters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks import nets as monai_nets

nets: Any = monai_nets  # typed in part


@dataclass(frozen=True)
class Net:
    """How a network is made, the side of its input, and a layer of it.

    `newer`: what the newer exporter calls the layer, where modules have two names.
    """

    make: Callable[[], torch.nn.Module]
    side: int
    layer: str
    newer: str = ""


NETS = {
    "resnet10": Net(
        lambda: nets.resnet10(n_input_channels=1, num_classes=2, widen_factor=0.125), 16, "layer3"
    ),
    "densenet": Net(
        lambda: nets.DenseNet(3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2)),
        16,
        "features.denseblock2",
    ),
    "unet": Net(
        lambda: nets.UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1), 16, "model.1.submodule.0"
    ),
    "basicunet": Net(lambda: nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 4, 4)), 32, "down_2"),
    "segresnet": Net(
        lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        16,
        "down_layers.1",
    ),
    "vit": Net(
        lambda: nets.ViT(
            1,
            (16, 16, 16),
            (8, 8, 8),
            hidden_size=24,
            mlp_dim=32,
            num_layers=2,
            num_heads=2,
            classification=True,
            num_classes=2,
            post_activation="",
        ),
        16,
        "blocks.1.norm1",
    ),
    "unetr": Net(
        lambda: nets.UNETR(
            1, 2, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2
        ),
        32,
        "encoder3",
    ),
    "attentionunet": Net(lambda: nets.AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)), 16, "model.0"),
    "dynunet": Net(
        lambda: nets.DynUNet(
            3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 8), norm_name="instance"
        ),
        16,
        "downsamples.0",
        "skip_layers.next_layer.downsample",
    ),
}


def network(name: str) -> torch.nn.Module:
    """One of them with weights that are not small."""
    torch.manual_seed(0)
    net = NETS[name].make().eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return net


def scan(name: str) -> np.ndarray[Any, Any]:
    """An input of it."""
    side = NETS[name].side
    return np.random.default_rng(0).normal(size=(side,) * 3).astype(np.float32)


def exported(
    net: torch.nn.Module, side: int, path: Path, *, dynamo: bool = False, free: bool = False
) -> Path:
    """The network written to a file; `free`: the number of scans is left open."""
    x = torch.zeros(1, 1, side, side, side)
    more: dict[str, Any] = {"opset_version": 17}
    if dynamo:
        more = {"verbose": False}
    elif free:
        more["dynamic_axes"] = {"x": {0: "n"}}
        more["input_names"] = ["x"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), str(path), dynamo=dynamo, **more)
    return path
