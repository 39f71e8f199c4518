"""Score-CAM: each channel weighted by the score of the scan seen through that channel alone.

M_k = A_k laid over the input (linear, at the exact centres of the cells), scaled to 0..1 by its own
extremes; x_k = x0 + M_k (x - x0), x0 the reference input, never air; z_k the log-odds of x_k, whole
predictions. E = ReLU(sum_k a_k A_k), a = softmax over the channels of z_k. The paper takes x0 = 0
and every channel; here at most 64 channels, those with the largest |mean gradient|.
"""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence, _masks
from med_gradcam.rerun import input_scores

TITLE = "Score-CAM: channels weighted by the score of the scan masked by each"
SOURCE = "Wang et al., CVPR workshops 2020, arXiv:1910.01279, alg. 1 (masked towards a reference)"
CANNOT_SHOW = (
    "evidence against; amounts (its numbers are activations, not log-odds); nearly the same map "
    "comes out for another class or a re-drawn classifier"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = False

MOST_CHANNELS = 64


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Score-CAM (i, j, k), nowhere below zero."""
    del bound
    chosen = capture.activation[_channels(capture)]
    if not len(chosen):
        return Evidence(torch.zeros_like(capture.activation[0], dtype=torch.float64))
    scan = capture.input
    fill = torch.zeros_like(scan) if capture.reference_input is None else capture.reference_input
    weights = _weights(capture)

    def seen(some: slice) -> torch.Tensor:
        mask = _masks.laid(chosen[some], weights)[:, None]
        low, high = mask.amin(dim=(2, 3, 4), keepdim=True), mask.amax(dim=(2, 3, 4), keepdim=True)
        mask = (mask - low) / (high - low).clamp(min=torch.finfo(mask.dtype).tiny)
        return torch.lerp(fill, scan, mask.to(scan.dtype))

    share = torch.softmax(input_scores(capture, len(chosen), seen), dim=0)
    return Evidence(torch.einsum("k,kxyz->xyz", share, chosen.double()).clamp(min=0))


def _channels(capture: Capture) -> torch.Tensor:
    """The channels that are no constant, those with the largest |mean gradient| first."""
    activation = capture.activation
    varies = activation.amax(dim=(1, 2, 3)) > activation.amin(dim=(1, 2, 3))
    matter = capture.gradient().double().mean(dim=(1, 2, 3)).abs()
    order = torch.argsort(matter, descending=True, stable=True)
    return order[varies[order]][:MOST_CHANNELS]


def _weights(capture: Capture) -> _masks.Weights:
    """How cells lie over the input: at their centres, or evenly where these are not known."""
    cells = capture.cells
    tables = []
    voxels, counts = capture.input.shape[2:], capture.activation.shape[1:]
    for n, (v, c) in enumerate(zip(voxels, counts, strict=True)):
        jump = v / c if cells is None else cells.jump[n]
        start = (jump - 1) / 2 if cells is None else cells.start[n]
        tables.append(_masks.axis(v, c, start, jump))
    return tables[0], tables[1], tables[2]
