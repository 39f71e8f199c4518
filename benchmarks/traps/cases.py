"""On what are the traps measured, and what is the right answer: autograd, without any hook tricks.

The right Grad-CAM is written out here once more, on a copy of the network in eval mode with all
in-place operations switched off: torch.autograd.grad of the score with respect to the layer's
output, channel means, weighted sum, sign kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does

from benchmarks.peers.adapters import peer

Array = npt.NDArray[np.float64]
Score = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A network in eval mode, one of its layers, a scan (1, C, I, J, K) and the class asked for."""

    net: torch.nn.Module
    layer: str
    x: torch.Tensor
    index: int = 1

    def score(self, output: Any) -> torch.Tensor:
        """The logit of the class, (B,)."""
        return torch.as_tensor(output[:, self.index])

    def own(self) -> Case:
        """The same case with a copy of the network, since tools leave hooks behind."""
        return Case(copy.deepcopy(self.net), self.layer, self.x.clone(), self.index)


# -------------------------------------------------------------------------------- the right answer


def activation_and_gradient(case: Case, score: Score | None = None) -> tuple[Any, Any]:
    """The layer's output and the score's gradient there, both (1, C, i, j, k)."""
    net = copy.deepcopy(case.net).eval()
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    kept: list[torch.Tensor] = []
    net.get_submodule(case.layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.enable_grad():
        output = net(case.x.clone().requires_grad_())
        (gradient,) = torch.autograd.grad((score or case.score)(output).sum(), kept[0])
    return kept[0].detach(), gradient


def reference(case: Case, score: Score | None = None) -> Array:
    """The signed Grad-CAM (i, j, k) of the first scan."""
    activation, gradient = activation_and_gradient(case, score)
    weights = gradient.double().mean(dim=(2, 3, 4), keepdim=True)
    return array((weights * activation.double()).sum(1)[0])


def stretched(native: Array, shape: tuple[int, ...]) -> Array:
    """A native map resized to the scan, trilinear, cells tiling the scan."""
    x = torch.from_numpy(native)[None, None]
    return array(F.interpolate(x, size=shape, mode="trilinear", align_corners=False)[0, 0])


def array(values: Any) -> Array:
    """A tensor or array as float64."""
    if isinstance(values, torch.Tensor):
        values = torch.Tensor.numpy(values.detach().double().cpu().as_subclass(torch.Tensor))
    return np.asarray(values, dtype=np.float64)


def correlation(a: Any, b: Any) -> float:
    """Pearson correlation; NaN where one of them is constant."""
    one, other = (array(v).ravel() for v in (a, b))
    if one.size != other.size:
        raise ValueError(f"shapes {np.shape(a)} and {np.shape(b)} differ")
    if not (np.isfinite(one).all() and np.isfinite(other).all() and np.ptp(one) and np.ptp(other)):
        return float("nan")
    return round(float(np.corrcoef(one, other)[0, 1]), 4)


def half_maximum(dense: Array) -> npt.NDArray[np.bool_]:
    """The voxels that reach half of the maximum."""
    return np.asarray(dense >= dense.max() / 2)


def middle(dense: Array) -> Array:
    """Where a map with one hill lies, voxels: per axis the middle of its profile's upper half."""
    axes = range(dense.ndim)
    profiles = [dense.max(axis=tuple(a for a in axes if a != axis)) for axis in axes]
    return np.array([np.flatnonzero(half_maximum(profile)).mean() for profile in profiles])


# --------------------------------------------------------------------------------------- the cases


def noise(*shape: int, batch: int = 1, channels: int = 1, seed: int = 1) -> torch.Tensor:
    """A random scan, the same every time."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *shape, generator=source)


def resnet(side: int = 48, classes: int = 3) -> Case:
    """MONAI's ResNet18 in 3D, untrained."""
    torch.manual_seed(0)
    net = (
        peer("monai.networks.nets")
        .resnet18(spatial_dims=3, n_input_channels=1, num_classes=classes)
        .eval()
    )
    return Case(net, "layer4", noise(side, side, side))


def unet(side: int = 32, classes: int = 3) -> Case:
    """MONAI's UNet in 3D with PReLU, at its bottleneck; it puts out a map per class."""
    torch.manual_seed(0)
    net = (
        peer("monai.networks.nets")
        .UNet(
            spatial_dims=3, in_channels=1, out_channels=classes, channels=(4, 8, 16), strides=(2, 2)
        )
        .eval()
    )
    return Case(net, "model.1.submodule.1.submodule", noise(side, side, side))


def vit(side: int = 32) -> Case:
    """MONAI's ViT in 3D, returning logits alone, at a block's first norm: tokens, not a grid."""

    class Logits(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.net(x)[0])

    torch.manual_seed(0)
    net = peer("monai.networks.nets").ViT(
        in_channels=1, img_size=(side,) * 3, patch_size=(8,) * 3, hidden_size=48, mlp_dim=96,
        num_layers=4, num_heads=4, classification=True, num_classes=2, post_activation="none",
    )  # fmt: skip
    return Case(Logits(net).eval(), "net.blocks.2.norm1", noise(side, side, side))


def small(channels: int = 8, classes: int = 3, gain: float = 1.0) -> torch.nn.Sequential:
    """Two convolutions at full resolution, global average, linear head; `gain` scales the head."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv3d(channels, channels, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(channels, classes),
    ).eval()
    with torch.no_grad():
        net[6].weight.mul_(gain)  # type: ignore[operator]
    return net


def blocks(cell: int = 16) -> torch.nn.Sequential:
    """Averages over blocks of `cell` voxels; bright raises class 1. Its cells tile the scan."""
    net = torch.nn.Sequential(
        torch.nn.AvgPool3d(cell),
        torch.nn.Conv3d(1, 1, 1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(1, 2),
    ).eval()
    with torch.no_grad():
        for parameter, values in zip(net.parameters(), (1.0, 0.0, (-1.0, 1.0), 0.0), strict=True):
            parameter.copy_(torch.tensor(values).reshape(-1, *[1] * (parameter.ndim - 1)))
    return net


def signs() -> torch.nn.Sequential:
    """Bright speaks for class 1, dark against it, each at its own place."""
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(2, 2),
    ).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1, 1))  # type: ignore[operator]
        net[4].weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))  # type: ignore[operator]
        for part in (net[0], net[4]):
            part.bias.zero_()  # type: ignore[operator]
    return net


def lesion(shape: tuple[int, int, int], corner: tuple[int, int, int], side: int) -> torch.Tensor:
    """A dark scan (1, 1, I, J, K) with one bright cube."""
    x = torch.zeros(1, 1, *shape)
    i, j, k = (slice(c, c + side) for c in corner)
    x[0, 0, i, j, k] = 1.0
    return x
