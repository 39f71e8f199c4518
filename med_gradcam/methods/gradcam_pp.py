"""Grad-CAM++: channels weighted by positive gradients, each place with a share of its own."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "Grad-CAM++: ReLU(sum_k w_k A_k(u)), w_k = sum_v ReLU(g) / (2 + g sum A_k); no sign"
SOURCE = (
    "Chattopadhyay et al., WACV 2018, arXiv:1710.11063, eq. 10, 12 and 19 with Y = exp(z), divided "
    "through by g^2; the factor exp(z), common to all channels, left out"
)
CANNOT_SHOW = (
    "evidence against: it drops every negative gradient; amounts: the sum is no score; in "
    "practice it is little more than Grad-CAM of the positive gradients (arXiv:2205.10838)"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Grad-CAM++ (i, j, k), never negative."""
    del bound
    gradient = capture.gradient().double()
    return Evidence(weighted(capture.activation.double(), gradient, gradient))


def weighted(
    activation: torch.Tensor, gradient: torch.Tensor, cubes_per_square: torch.Tensor
) -> torch.Tensor:
    """ReLU of the channels' weighted sum, (C, i, j, k) float64 each.

    Source: eq. 19, alpha = g^2 / (2 g^2 + sum_v A(v) g^3) = 1 / (2 + sum_v A(v) * g^3 / g^2). No
    eps: with gradients of 1e-5 it would swamp g^2. The denominator is not taken below 1: it has a
    pole where a channel's sum is negative, which the paper's layers, behind a ReLU, do not have.
    """
    places = (1, 2, 3)
    total = activation.sum(dim=places, keepdim=True)
    alpha = 1.0 / (2.0 + total * cubes_per_square).clamp(min=1.0)
    weights = (alpha * gradient.relu()).sum(dim=places, keepdim=True)
    return (weights * activation).sum(0).relu()
