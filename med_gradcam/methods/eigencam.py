"""Eigen-CAM: what the channels have in common, whatever the class."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "Eigen-CAM: the activations along their first principal direction; knows no class, no sign"
SOURCE = "Bany Muhammad and Yeasin, IJCNN 2020, arXiv:2008.00299, eq. 1-3 (not centred)"
CANNOT_SHOW = (
    "anything about the class: neither target nor head has a part in it, and a network with a "
    "random head gives the same map; evidence against; amounts"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Eigen-CAM (i, j, k), never negative, in units of the activation.

    The direction's sign is free; it is the one with which the map goes along with the mean
    activation of the channels.
    """
    del bound
    activation = capture.activation.double()
    return Evidence(first_component(activation, activation.mean(0)))


def first_component(stack: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """A stack (C, i, j, k) along its first principal direction, ReLU of it, (i, j, k).

    The sign is that of `along` (i, j, k), by the sum of products. From C x C products: the cells'
    own matrix, N x N, would be 256 GiB for 64^3 cells.
    """
    rows = stack.flatten(1)
    direction = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -1]
    values = torch.einsum("c,cijk->ijk", direction, stack)
    return (values if float((values * along).sum()) >= 0 else -values).relu()
