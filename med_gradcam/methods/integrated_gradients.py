"""Integrated gradients: `integrated` with the voxels of the input as its cells."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence, integrated

TITLE = "integrated gradients of the input against the reference input, signed; adds up"
SOURCE = (
    "Sundararajan et al., ICML 2017, arXiv:1703.01365, eq. 1-2, summed over channels; nodes as in "
    "`integrated`"
)
CANNOT_SHOW = (
    "voxels at which scan and reference are alike, whatever they mean to the model; it is noisy "
    "voxel by voxel; and a map says nothing without its reference"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = True


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Complete signed evidence per voxel (I, J, K) relative to the reference input.

    Raises:
        UsageError: the capture has no baseline.
    """
    if capture.baseline is None:
        raise UsageError(
            "expected a reference input for the method 'integrated_gradients', got none."
        )
    return integrated.evidence(capture, bound)
