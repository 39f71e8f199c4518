"""Functions of arrays that stand for networks nobody can look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import med_gradcam as mg
from tests.engine import nets

Floats = npt.NDArray[np.float32]


class Box:
    """A network as a function of arrays, which counts what it is asked."""

    def __init__(self, net: nn.Module, change: Callable[[torch.Tensor], Any] | None = None) -> None:
        self.net, self.change = net, change
        self.sizes: list[int] = []
        self.seen: set[bytes] = set()
        self.again = 0

    def __call__(self, volumes: Floats) -> Any:
        assert isinstance(volumes, np.ndarray)
        assert volumes.dtype == np.float32
        self.sizes.append(len(volumes))
        for volume in volumes:
            self.again += volume.tobytes() in self.seen
            self.seen.add(volume.tobytes())
        with torch.no_grad():
            scores = self.net(torch.from_numpy(volumes))
        return scores.numpy() if self.change is None else self.change(scores)

    @property
    def asked(self) -> int:
        return sum(self.sizes)


class Precise(nn.Module):
    """A network that works in double precision on single: batches of any size round alike."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = net.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.__dict__["inner"](x.double()).float()
        return out


def net() -> nn.Module:
    return nets.made(nets.gated)


def scores(*values: float) -> Callable[[Floats], Floats]:
    """Scores that go with the mean of each volume, times `values`."""

    def predict(volumes: Floats) -> Floats:
        mean = volumes.mean(axis=(1, 2, 3, 4), dtype=np.float64)
        return np.asarray(mean[:, None] * np.array(values), dtype=np.float32)

    return predict


def far(one: mg.Explanation, other: mg.Explanation) -> float:
    return float(np.abs(one.evidence - other.evidence).max() / np.abs(other.evidence).max())
