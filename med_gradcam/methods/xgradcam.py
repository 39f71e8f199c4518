"""XGrad-CAM, which is Respond-CAM: channels weighted by their activation-weighted gradient."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

# Below this share of sum |A| a channel's sum is no divisor: what cancels in it would come back as
# evidence for and against, ten times as large as what the channel does.
CANCELS = 0.1

TITLE = "XGrad-CAM = Respond-CAM, signed: sum_k w_k A_k(u), w_k = sum_v g A_k / sum_v A_k"
SOURCE = (
    "Zhao et al., MICCAI 2018, arXiv:1806.00102 (Respond-CAM); Fu et al., BMVC 2020, "
    "arXiv:2008.02312, eq. 8 (XGrad-CAM); their ReLU left out"
)
CANNOT_SHOW = (
    "places: a channel's evidence goes where the channel is active, wherever its gradient was; the "
    "sum is HiResCAM's, so it equals the score (less the bias) for the same special networks only"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed XGrad-CAM (i, j, k).

    A channel whose activations cancel (|sum A| < 0.1 sum |A|; never behind a ReLU) has no such
    weight. It is added cell by cell (g A, HiResCAM), which keeps its sum, and so the papers'
    conservation and sum-to-score.
    """
    del bound
    activation, gradient = capture.activation.double(), capture.gradient().double()
    places = (1, 2, 3)
    product = gradient * activation
    total = activation.sum(dim=places, keepdim=True)
    whole = total.abs() > CANCELS * activation.abs().sum(dim=places, keepdim=True)
    weights = product.sum(dim=places, keepdim=True) / total  # not finite where it is not taken
    return Evidence(torch.where(whole, weights * activation, product).sum(0))
