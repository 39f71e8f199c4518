"""Which networks are measured, and at which layers: MONAI's, untrained, with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OUTPUTS = 14  # as many findings as ChestX-ray14 has: what a multi-label chest network puts out
TARGET = 1


class Summed(torch.nn.Module):
    """A segmentation network as a classifier: the logits (B, K, I, J, K) summed over a region.

    The region is the central box of half the side. The same three lines serve every tool, since
    not all of them take a region as their target.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sums (B, K)."""
        out = self.net(x)
        box = tuple(slice(n // 4, n - n // 4) for n in out.shape[2:])
        return torch.as_tensor(out[(slice(None), slice(None), *box)].flatten(2).sum(-1))


@dataclass(frozen=True, slots=True)
class Net:
    """A network: how it is built, its last block and the one before, and its usual side.

    `warm_up` (I, J, K) is a small input on which code and thread pools are loaded.
    """

    name: str
    last: str
    earlier: str
    side: int
    make: Callable[[Any], torch.nn.Module]
    warm_up: tuple[int, int, int] = (32, 32, 32)

    def built(self) -> torch.nn.Module:
        """The network in eval mode, the same weights every time."""
        from monai.networks import nets

        torch.manual_seed(0)
        return self.make(nets).eval()

    def layer(self, which: str) -> str:
        """The module path of the layer "last" or "earlier"."""
        return self.earlier if which == "earlier" else self.last


def _classifier(name: str, **more: Any) -> Callable[[Any], torch.nn.Module]:
    return lambda nets: getattr(nets, name)(spatial_dims=3, **more)


def _summed(name: str, **more: Any) -> Callable[[Any], torch.nn.Module]:
    return lambda nets: Summed(getattr(nets, name)(in_channels=1, out_channels=OUTPUTS, **more))


NETS = {
    net.name: net
    for net in (
        Net(
            "DenseNet121",
            "class_layers.relu",
            "features.denseblock3",
            96,
            _classifier("DenseNet121", in_channels=1, out_channels=OUTPUTS),
        ),
        Net(
            "resnet18",
            "layer4",
            "layer3",
            96,
            _classifier("resnet18", n_input_channels=1, num_classes=OUTPUTS),
        ),
        Net(
            "resnet50",
            "layer4",
            "layer3",
            96,
            _classifier("resnet50", n_input_channels=1, num_classes=OUTPUTS),
        ),
        Net(
            "SEResNet50",
            "layer4",
            "layer3",
            96,
            _classifier("SEResNet50", in_channels=1, num_classes=OUTPUTS),
        ),
        Net("BasicUNet", "net.down_4", "net.down_3", 64, _summed("BasicUNet", spatial_dims=3)),
        Net(
            "SegResNet",
            "net.down_layers.3",
            "net.down_layers.2",
            64,
            _summed("SegResNet", spatial_dims=3),
        ),
        Net(  # its deepest InstanceNorm needs two cells
            "SwinUNETR",
            "net.encoder10",
            "net.encoder4",
            64,
            _summed("SwinUNETR", feature_size=24),
            warm_up=(64, 32, 32),
        ),
    )
}
SEGMENTATION = ("BasicUNet", "SegResNet", "SwinUNETR")
