"""Seg-XRes-CAM: HiResCAM with gradients pooled over small windows."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

WINDOW = 2  # cells along each axis; 1 is HiResCAM, the whole map is Grad-CAM

TITLE = "Seg-XRes-CAM, signed: sum_k (mean of dz/dA_k over u's window of 2 x 2 x 2 cells) A_k(u)"
SOURCE = (
    "Hasany et al., CVPR Workshops 2023, pp. 3733-3738, mean pooling and nearest upsampling; their "
    "ReLU left out"
)
CANNOT_SHOW = (
    "places within a window, whose size is a free choice; saturated evidence: the gradient is "
    "taken at the scan alone; the sum equals the score (less the bias) for global pooling + linear "
    "only"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed Seg-XRes-CAM (i, j, k)."""
    del bound
    weights = pooled(capture.gradient().double(), WINDOW)
    return Evidence((weights * capture.activation.double()).sum(0))


def pooled(gradient: torch.Tensor, window: int) -> torch.Tensor:
    """Each number of (C, i, j, k) replaced by the mean of its window of `window`^3 cells.

    Windows start at cell 0; the last ones are as small as what is left.
    """
    sides = [min(window, n) for n in gradient.shape[1:]]
    means = torch.nn.functional.avg_pool3d(
        gradient[None], sides, ceil_mode=True, count_include_pad=False
    )[0]
    for axis, side in enumerate(sides, 1):
        means = means.repeat_interleave(side, axis).narrow(axis, 0, gradient.shape[axis])
    return means
