"""Expected gradients: integrated gradients, averaged over several references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.methods import Bound, Evidence, integrated
from med_gradcam.methods._noise import textures
from med_gradcam.reference import grain

PAIRS = 2  # references are the reference input plus, and minus, each of these textures

TITLE = "expected gradients: integrated gradients against 4 textured references, signed"
SOURCE = (
    "Erion et al., arXiv:1906.10670, eq. 3; the references are the reference input with seeded "
    "textures of the scan's own voxel-to-voxel noise, added and subtracted"
)
CANNOT_SHOW = (
    "voxels at which scan and references are alike; the evidence adds up to the score less the "
    "mean score of the references, which is not exactly that of the reference input"
)
SIGNED = True
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed evidence per voxel (I, J, K); `start_score` is the references' mean score.

    Raises:
        UsageError: the capture has no baseline.
    """
    found = []
    for baseline in _references(capture):
        one = replace(capture, baseline=baseline, passes=0.0)
        found.append(integrated.evidence(one, bound))
        capture.passes += one.passes
    values = torch.stack([e.values for e in found]).mean(0)
    start = sum(e.start_score or 0.0 for e in found) / len(found)
    converged = all(e.converged for e in found)
    return Evidence(values, start, converged, sum(e.nodes for e in found))


def _references(capture: Capture) -> Iterator[torch.Tensor]:
    """The reference input (C, I, J, K) with each texture, added and subtracted."""
    base = capture.baseline
    if base is None:
        raise UsageError(
            "expected a reference input for the method 'expected_gradients', got none."
        )
    channels = capture.input[0].float().cpu().numpy()
    sd = torch.tensor([grain(channel) for channel in channels], dtype=torch.float64)
    for texture in textures(base.shape, PAIRS, capture.seed):
        step = (sd[:, None, None, None] * texture).to(base)
        yield base + step
        yield base - step
