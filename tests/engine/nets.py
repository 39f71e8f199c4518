"""Small networks and scans for the engine's tests, each the least that shows one behaviour."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from med_gradcam.capture import Capture, captures
from med_gradcam.geometry import Geometry
from med_gradcam.tail import Score, at_rest, record
from med_gradcam.target import Link, Target
from med_gradcam.volume import Volume

Floats = npt.NDArray[np.float32]


def scan(size: int = 16, seed: int = 0, channels: int = 1) -> Floats:
    """Noise with a bright blob, (C, i, j, k)."""
    generator = np.random.default_rng(seed)
    array = 0.5 * generator.standard_normal((channels, size, size, size))
    at = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    centre = generator.uniform(0.3, 0.7, 3)[:, None, None, None] * size
    array += 2.0 * np.exp(-((at - centre) ** 2).sum(0) / (0.1 * size**2))
    return array.astype(np.float32)


def volume(size: int = 16, seed: int = 0, channels: int = 1) -> Volume:
    return as_volume(scan(size, seed, channels))


def as_volume(array: Floats) -> Volume:
    i, j, k = array.shape[1:]
    return Volume(array, Geometry((i, j, k), np.eye(4)))


def batch(array: Floats, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(array[None]).to(dtype)


def conv(inside: int, out: int, stride: int = 1, *, bias: bool = True) -> nn.Conv3d:
    return nn.Conv3d(inside, out, 3, stride=stride, padding=1, bias=bias)


class Body(nn.Module):
    """`first` (the layer) then `rest`; the rest is what is being tested."""

    def __init__(self, rest: nn.Module, channels: int = 6, stride: int = 2) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(1, channels, stride), nn.ReLU())
        self.rest = rest

    def forward(self, x: torch.Tensor) -> Any:
        return self.rest(self.first(x))


class Pooled(nn.Module):
    """Mean over places, then one linear layer."""

    def __init__(self, channels: int = 6, outputs: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x.mean(dim=(2, 3, 4)))
        return out


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 3), nn.Linear(3, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean(dim=(2, 3, 4))))))
        return x * gate[:, :, None, None, None]


class Skip(nn.Module):
    """Two paths from the input to the score: through `layer`, and past it, times `past`."""

    def __init__(self, past: float = 1.0) -> None:
        super().__init__()
        self.stem, self.layer, self.side = conv(1, 4, 2), conv(4, 4), conv(4, 4)
        self.head, self.past = nn.Linear(4, 1), past

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.stem(x))
        both = torch.relu(self.layer(stem)) + self.past * torch.relu(self.side(stem))
        out: torch.Tensor = self.head(both.mean(dim=(2, 3, 4)))
        return out


def pooled_linear(outputs: int = 2) -> nn.Module:
    return Body(Pooled(outputs=outputs))


def flat_linear(outputs: int = 2, size: int = 16) -> nn.Module:
    return Body(nn.Sequential(nn.Flatten(), nn.Linear(6 * (size // 2) ** 3, outputs)))


def gated() -> nn.Module:
    return Body(nn.Sequential(conv(6, 6), Gate(6), nn.ReLU(), Pooled()))


def group_normed() -> nn.Module:
    return Body(nn.Sequential(conv(6, 6), nn.GroupNorm(2, 6), nn.ReLU(), Pooled()))


def instance_normed() -> nn.Module:
    norm = nn.InstanceNorm3d(6, affine=True)
    return Body(nn.Sequential(conv(6, 6), norm, nn.ReLU(), conv(6, 6), nn.ReLU(), Pooled()))


def batch_normed() -> nn.Module:
    norm = nn.BatchNorm3d(6)
    with torch.no_grad():
        norm.running_mean = 0.1 * torch.randn(6)
        norm.running_var = torch.rand(6) + 0.5
    return Body(nn.Sequential(conv(6, 6), norm, nn.ReLU(), Pooled()))


def silu_mlp() -> nn.Module:
    mlp = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 2))
    return Body(nn.Sequential(conv(6, 6), nn.SiLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), mlp))


def max_pooled() -> nn.Module:
    pooled = nn.Sequential(nn.MaxPool3d(2), conv(6, 8), nn.ReLU(), nn.MaxPool3d(2))
    return Body(nn.Sequential(pooled, nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)))


def remixed() -> tuple[nn.Module, nn.Module]:
    """A convolution straight before mean + linear, and the same with its channels remixed."""
    torch.manual_seed(2)
    net = nn.Sequential(conv(1, 6, 2), Pooled()).double().eval()
    other = copy.deepcopy(net)
    mix = torch.randn(6, 6, dtype=torch.float64) + 2 * torch.eye(6, dtype=torch.float64)
    stem, bias = weight(other, "0"), weight(other, "0", "bias")
    stem.copy_(torch.einsum("ab,bcxyz->acxyz", mix, stem.clone()))
    bias.copy_(mix @ bias)
    head = weight(other, "1.head")
    head.copy_(head @ torch.linalg.inv(mix))
    return net, other


TAILS: dict[str, Callable[[], nn.Module]] = {
    "mean + linear": pooled_linear,
    "flatten + linear": flat_linear,
    "gate": gated,
    "group norm": group_normed,
    "instance norm": instance_normed,
    "batch norm": batch_normed,
    "SiLU MLP": silu_mlp,
    "max pool": max_pooled,
}


def made(
    maker: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network with seeded weights, biases away from zero, in eval mode."""
    torch.manual_seed(seed)
    net = maker()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("head.weight"):
                parameter.mul_(4.0)
    return net.to(dtype).eval()


def weight(net: nn.Module, path: str, name: str = "weight") -> torch.Tensor:
    """A parameter, to be read or set under torch.no_grad()."""
    found = net.get_submodule(path).get_parameter(name)
    return found.data


def score_of(index: int = 0, link: Link = "none") -> Target:
    return Target("regression" if link == "none" else "class", str(index), (index,), link)


def captured(
    net: nn.Module,
    layer: str,
    x: torch.Tensor,
    target: Score | None = None,
    reference: torch.Tensor | None = None,
) -> Capture:
    """The engine's own capture of one layer, recorded as explain() does it."""
    with at_rest(net):
        here = record(net, [layer], x)
        there = None if reference is None else record(net, [layer], reference)
    return captures(here, target or score_of(), there)[layer]
