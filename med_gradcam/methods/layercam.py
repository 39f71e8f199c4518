"""LayerCAM: the activation of each cell, weighted by its own positive gradient."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "LayerCAM: ReLU(sum_k ReLU(dz/dA_k(u)) A_k(u)); no sign"
SOURCE = "Jiang et al., IEEE TIP 2021, 10.1109/TIP.2021.3089943, eq. 4-6"
CANNOT_SHOW = (
    "evidence against: it drops every negative gradient; amounts: the sum is no score; early "
    "layers give noise"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """LayerCAM (i, j, k), never negative."""
    del bound
    weights = capture.gradient().double().relu()
    return Evidence((weights * capture.activation.double()).sum(0).relu())
