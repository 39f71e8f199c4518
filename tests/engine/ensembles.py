"""Two small networks, Models of them, and one scan, for the tests of ensembles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from med_gradcam.geometry import Geometry
from med_gradcam.model import InputSpec, Model
from med_gradcam.volume import Volume
from tests.tiny import affine_of

SHAPE = (12, 14, 10)


class UNet(nn.Module):
    """A small U-Net with instance norms that puts out a map of three classes."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1), nn.InstanceNorm3d(width), nn.LeakyReLU()
        )
        self.down = nn.Sequential(nn.Conv3d(width, width, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose3d(width, width, 2, stride=2)
        self.last = nn.Sequential(nn.Conv3d(2 * width, width, 3, padding=1), nn.ReLU())
        self.head = nn.Conv3d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.first(x)
        both = torch.cat([fine, self.up(self.down(fine))], 1)
        out: torch.Tensor = self.head(self.last(both))
        return out


class Classifier(nn.Module):
    """Two resolutions, a row of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv3d(5, 6, 3, stride=2, padding=1), nn.ReLU())
        self.c = nn.Sequential(nn.Conv3d(6, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(48, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.c(self.b(self.a(x))))
        return out


def models(kind: type[nn.Module], count: int, link: Any = "softmax", first: int = 0) -> list[Model]:
    made = []
    for n in range(count):
        torch.manual_seed(first + n)
        labels = ("air", "lesion", "organ")
        made.append(Model(kind().eval(), InputSpec(), labels, link, weights_sha256=str(n) * 64))
    return made


def volume() -> Volume:
    generator = np.random.default_rng(4)
    array = generator.normal(size=(1, *SHAPE)).astype(np.float32)
    array[0, 3:7, 4:9, 2:6] += 3.0
    return Volume(array, Geometry(SHAPE, affine_of("LPS", (1.0, 1.4, 2.0), turn=(5, -7, 4))))
