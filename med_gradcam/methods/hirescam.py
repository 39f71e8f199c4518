"""HiResCAM: gradient times activation, cell by cell."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "HiResCAM, signed: sum_k dz/dA_k(u) A_k(u)"
SOURCE = "Draelos and Carin, arXiv:2011.08891, eq. 3"
CANNOT_SHOW = (
    "saturated evidence: the gradient is taken at the scan alone; the sum equals the score (less "
    "the bias) only when one linear layer, or a bias-free ReLU network, follows"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed HiResCAM (i, j, k)."""
    del bound
    return Evidence((capture.gradient().double() * capture.activation.double()).sum(0))
