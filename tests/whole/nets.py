"""Small networks and scans that are explained by windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from med_gradcam.model import InputSpec, Model


def segmenter(seed: int = 0, classes: int = 3) -> nn.Sequential:
    """Padded convolutions and a map of logits as large as the input."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 8, 3, padding=1), nn.ReLU(),
        nn.Conv3d(8, classes, 1),
    ).eval()  # fmt: skip
    return _undecided(net, net[4])


def _undecided(net: nn.Sequential, last: nn.Module) -> nn.Sequential:
    """No class of the last layer is ahead of the others, so that each wins somewhere."""
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = last.register_forward_hook(lambda _m, _i, out: seen.append(out))
        net(torch.from_numpy(noise((24, 24, 24)))[None, None])
        handle.remove()
        assert isinstance(last.bias, torch.Tensor)
        last.bias -= seen[0].mean(dim=(0, 2, 3, 4))
    return net


def patchwise(seed: int = 0, classes: int = 3) -> nn.Sequential:
    """A map of logits that sees blocks of 4 voxels: nothing crosses a block's border."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 2, stride=2), nn.ReLU(), nn.Conv3d(6, 8, 2, stride=2), nn.SiLU(),
        nn.Conv3d(8, classes, 1), nn.Upsample(scale_factor=4.0),
    ).eval()  # fmt: skip
    return _undecided(net, net[4])


def classifier(seed: int = 0, outputs: int = 3) -> nn.Sequential:
    """A patch classifier of any size of patch."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1), nn.SiLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, outputs),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in net[7].parameters():
            parameter.mul_(8)
    return net


def noise(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float32]:
    """Noise with a bright block in it."""
    array = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    array[tuple(slice(n // 3, n // 2) for n in shape)] += 3
    return array


def patched(net: nn.Module, patch: tuple[int, int, int], **changes: Any) -> Model:
    """A Model that takes patches of one size."""
    return Model(net, InputSpec(patch=patch), **{"link": "softmax", **changes})
