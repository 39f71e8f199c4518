"""SmoothGrad: saliency of the gradient's mean over noisy scans."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.methods._noise import noisy

NOISE, SAMPLES = 0.15, 16  # the noise's SD as a share of each input channel's own SD

TITLE = "SmoothGrad: |mean of dz/dx(v) over 16 scans with noise of 0.15 SD|; no sign"
SOURCE = (
    "Smilkov et al., arXiv:1706.03825, eq. 1 (noise as a share of the channel's SD, not of its "
    "range; the size is taken after the mean), seeded"
)
CANNOT_SHOW = (
    "evidence: it says where a change would matter, not what is there, and neither for nor "
    "against; and it describes scans with noise that no scanner made"
)
SIGNED = False
UNIT: Measure = "score per input unit"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """The size of the mean gradient (I, J, K), score per unit of the input."""
    del bound
    mean = torch.zeros_like(capture.activation).double()
    for x in noisy(capture.input, NOISE, SAMPLES, capture.seed):
        mean += capture.gradients(x)[0].double() / SAMPLES
    return Evidence(mean.abs().sum(0))
