"""Grad-CAM before its ReLU: channels weighted by their mean gradient."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "Grad-CAM, signed: sum_k mean_u(dz/dA_k) A_k(u)"
SOURCE = "Selvaraju et al., ICCV 2017, arXiv:1610.02391, eq. 1-2 (their ReLU left out)"
CANNOT_SHOW = (
    "places: the mean over the map forgets where a channel mattered; wrong signs occur before a "
    "non-linear tail; the sum equals the score (less the bias) for global pooling + linear only"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed Grad-CAM (i, j, k); for global average pooling + linear it equals HiResCAM."""
    del bound
    weights = capture.gradient().double().mean(dim=(1, 2, 3), keepdim=True)
    return Evidence((weights * capture.activation.double()).sum(0))
