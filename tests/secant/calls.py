"""What is a call of an operation, to which tensors, and what is fixed in it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.secant.pairs import noise

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """`function` of tensors of these shapes; `positive`: they are above 0."""

    function: Callable[..., Any]
    shapes: tuple[Shape, ...] = ((2, 3, 4),)
    positive: bool = False


def one(function: Callable[..., Any], *shapes: Shape, positive: bool = False) -> list[Case]:
    return [Case(function, shapes or ((2, 3, 4),), positive)]


def several(*cases: list[Case]) -> list[Case]:
    return [case for group in cases for case in group]


FLAT, VOLUME, PLANE, LINE = (2, 3, 4), (2, 4, 5, 6, 4), (2, 3, 6, 5), (2, 3, 8)
INDEX = torch.tensor([2, 0, 0, 1])
MASK = torch.tensor([True, False, True, True])
SCALE, SHIFT, MEAN = (noise(4, seed=n) for n in range(3))
VARIANCE = noise(4, seed=3).abs() + 0.5
