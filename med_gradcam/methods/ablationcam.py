"""Ablation-CAM: what each channel is worth when it alone is set to zero, behind the layer only.

The paper: ReLU(sum_k w_k A_k) with w_k = (z - z_without_k) / z, whose signs turn over where z < 0
and whose numbers have no unit. Here the drop d_k = z - z_without_k is laid over the channel's cells
by their share: E(u) = sum_k d_k |A_k(u)| / sum_v |A_k(v)|. So each channel adds exactly its drop,
and after a ReLU, global pooling and one linear layer E is CAM.
"""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.rerun import behind

TITLE = "Ablation-CAM, signed: each channel's drop of the score, where the channel is active"
SOURCE = "Desai and Ramaswamy, WACV 2020, eq. 2-3 (the difference, not divided by the score)"
CANNOT_SHOW = (
    "places: a channel's drop is spread over all the cells where it is active; channels that "
    "stand in for each other lose nothing one by one; the sum is no promise"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed Ablation-CAM (i, j, k); its sum is the sum of the channels' drops."""
    del bound
    activation = capture.activation
    sizes = activation.abs().sum(dim=(1, 2, 3), dtype=torch.float64)
    alive = torch.nonzero(sizes > 0).flatten()  # a channel of zeros loses nothing
    drops = _drops(capture, alive)
    shares = drops / sizes[alive]
    return Evidence(torch.einsum("k,kxyz->xyz", shares, activation[alive].abs().double()))


def _drops(capture: Capture, channels: torch.Tensor) -> torch.Tensor:
    """The score less the score without the channel, float64, for each of `channels`."""
    tail, activation = behind(capture), capture.activation

    def without(some: slice) -> torch.Tensor:
        count = some.stop - some.start
        batch = activation.expand(count, *activation.shape).clone()
        for row, n in zip(batch, range(some.start, some.stop), strict=True):
            if n:  # the first is the activation as it is: the tail's own score, its own rounding
                row[channels[n - 1]] = 0
        return batch

    scores = tail.scores(len(channels) + 1, without)
    return scores[0] - scores[1:]
