"""Small versions of the architectures that hospitals use, and every container they come in."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.explanation import Explanation

CONTAINERS = (
    "script",
    "trace",
    "loaded",
    "frozen script",
    "frozen trace",
    "exported",
    "exported file",
    "compiled",
)
FOLDED = ("frozen script", "frozen trace")
METHODS = ("gradcam", "hirescam", "secant", "integrated")


@dataclass(frozen=True, slots=True)
class Architecture:
    """How it is built, the side of its input, a layer of it, its target.

    `called`: the layer's name in programs, where Python holds the module under two names.
    """

    make: Callable[[Any], torch.nn.Module]
    side: int
    layer: str
    target: object = 0
    called: str = ""


NO_SCRIPT = ("script", "frozen script")  # torch.jit.script does not take its Python
SMALL = {
    "resnet": Architecture(
        lambda n: n.ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 8], n_input_channels=1, num_classes=2),
        32,
        "layer2",
    ),
    "densenet": Architecture(
        lambda n: n.DenseNet(3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2)),
        32,
        "features.transition1.conv",
    ),
    "unet": Architecture(
        lambda n: n.UNet(3, 1, 2, (4, 8), (2,), num_res_units=1), 16, "model.1.submodule", "#1"
    ),
    "vit": Architecture(
        lambda n: n.ViT(
            1,
            (16, 16, 16),
            (8, 8, 8),
            hidden_size=24,
            mlp_dim=48,
            num_layers=2,
            num_heads=2,
            classification=True,
            num_classes=2,
        ),
        16,
        "patch_embedding.patch_embeddings",
    ),
}


def _senet(n: Any) -> torch.nn.Module:
    from monai.networks import blocks

    block = blocks.SEBottleneck  # type: ignore[attr-defined]
    net: torch.nn.Module = n.SENet(3, 1, block, (1, 1, 1, 1), 1, 16, num_classes=2)
    return net


SLOW = {
    "senet": Architecture(_senet, 32, "layer2"),
    "efficientnet": Architecture(
        lambda n: n.EfficientNetBN("efficientnet-b0", False, spatial_dims=3, num_classes=2,
                                   in_channels=1),
        32,
        "_blocks.3",
    ),
    "basicunet": Architecture(
        lambda n: n.BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 8, 4)), 32, "down_2", "#1"
    ),
    "dynunet": Architecture(
        lambda n: n.DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 16)),
        32,
        "downsamples.0",
        "#1",
        "skip_layers.next_layer.downsample",
    ),
    "segresnet": Architecture(lambda n: n.SegResNet(3, 8, 1, 2), 32, "down_layers.1", "#1"),
    "attentionunet": Architecture(
        lambda n: n.AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)),
        32,
        "model.1.submodule.0.conv",
        "#1",
    ),
    "unetr": Architecture(
        lambda n: n.UNETR(1, 2, (32, 32, 32), 4, hidden_size=24, mlp_dim=48, num_heads=2),
        32,
        "encoder2",
        "#1",
    ),
    "swinunetr": Architecture(
        lambda n: n.SwinUNETR(1, 2, feature_size=12), 64, "swinViT.layers1.0.downsample", "#1"
    ),
}  # fmt: skip
ALL = SMALL | SLOW


@cache
def network(name: str) -> torch.nn.Module:
    """The eager network, in eval mode, with seeded weights."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    return ALL[name].make(nets).eval()


@cache
def scan(name: str) -> torch.Tensor:
    side = ALL[name].side
    return torch.rand((side,) * 3, generator=torch.Generator().manual_seed(1))


def contained(net: torch.nn.Module, x: torch.Tensor, container: str) -> torch.nn.Module:
    """The network as it comes in a container; `x` (1, C, I, J, K)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _contained(net, x, container)


def _contained(net: torch.nn.Module, x: torch.Tensor, container: str) -> torch.nn.Module:
    made: Any
    if container.endswith("script"):
        made = torch.jit.script(net)
    elif container.endswith("trace"):
        made = torch.jit.trace(net, x, check_trace=False)
    elif container == "loaded":
        made = _saved(torch.jit.trace(net, x, check_trace=False))
    elif container == "exported":
        made = torch.export.export(net, (x,)).module()
    elif container == "exported file":
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(net, (x,)), buffer)
        buffer.seek(0)
        made = torch.export.load(buffer)
    else:
        made = torch.compile(net, backend="eager")
        made(x)  # from now on no hook on it fires
    if container.startswith("frozen"):
        made = torch.jit.freeze(made)
    return made  # type: ignore[no-any-return]


def _saved(made: Any) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.jit.save(made, buffer)
    buffer.seek(0)
    net: torch.nn.Module = torch.jit.load(buffer)  # noqa: TID251 - our own file
    return net


def explained(name: str, net: object, method: str, layer: str | None = None) -> Explanation:
    one = ALL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mg.explain(
            scan(name), net, target=one.target, layer=layer or one.layer, method=method
        )


@cache
def eager(name: str, method: str, layer: str | None = None) -> Explanation:
    return explained(name, network(name), method, layer)


def apart(one: Explanation, other: Explanation) -> float:
    """The largest difference of two maps as a share of the largest value."""
    assert one.evidence.shape == other.evidence.shape
    return float(np.abs(one.evidence - other.evidence).max() / np.abs(other.evidence).max())
