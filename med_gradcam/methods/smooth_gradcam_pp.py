"""Smooth Grad-CAM++: Grad-CAM++ with the powers of the gradient averaged over noisy scans."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.methods._noise import noisy
from med_gradcam.methods.gradcam_pp import weighted

NOISE, SAMPLES = 0.15, 16  # the noise's SD as a share of each input channel's own SD

TITLE = "Smooth Grad-CAM++: Grad-CAM++ of the mean over 16 scans with noise of 0.15 SD; no sign"
SOURCE = (
    "Omeiza et al., arXiv:1908.01224, eq. 8-10 (alpha with the second power on top, without which "
    "no noise would not give Grad-CAM++), noise on the input, seeded"
)
CANNOT_SHOW = (
    "evidence against: it drops every negative gradient; amounts: the sum is no score; and it "
    "describes scans with noise that no scanner made"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Smooth Grad-CAM++ (i, j, k), never negative; the activation is that of the scan itself."""
    del bound
    first, second, third = (torch.zeros_like(capture.activation).double() for _ in range(3))
    for x in noisy(capture.input, NOISE, SAMPLES, capture.seed):
        gradient = capture.at_input(x).gradient().double()
        first += gradient / SAMPLES
        second += gradient**2 / SAMPLES
        third += gradient**3 / SAMPLES
    ratio = torch.where(second > 0, third / second, 0.0)
    return Evidence(weighted(capture.activation.double(), first, ratio))
