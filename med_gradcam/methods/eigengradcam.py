"""EigenGrad-CAM: what gradient times activation has in common over the channels."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.methods.eigencam import first_component

TITLE = "EigenGrad-CAM: gradient x activation along its first principal direction; no sign"
SOURCE = (
    "Eigen-CAM (arXiv:2008.00299) of gradient times activation, as in pytorch-grad-cam; no paper "
    "of its own (not centred here, as in Eigen-CAM's)"
)
CANNOT_SHOW = (
    "evidence against: channels enter with the sign of the direction, so a cell's sign says "
    "nothing; what lies off the first direction; amounts"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """EigenGrad-CAM (i, j, k), never negative; its free sign is that of HiResCAM."""
    del bound
    product = capture.gradient().double() * capture.activation.double()
    return Evidence(first_component(product, product.sum(0)))
