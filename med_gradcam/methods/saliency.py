"""Saliency: how strongly each voxel of the input moves the score."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "saliency: sum over channels of |dz/dx(v)|; no sign"
SOURCE = "Simonyan et al., arXiv:1312.6034, section 3.1 (the sum over channels, not the largest)"
CANNOT_SHOW = (
    "evidence: it says where a change would matter, not what is there, and neither for nor "
    "against; saturated evidence; it is noisy voxel by voxel"
)
SIGNED = False
UNIT: Measure = "score per input unit"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """The size of the input's gradient (I, J, K), score per unit of the input."""
    del bound
    return Evidence(capture.gradient().double().abs().sum(0))
