"""Secant back-propagation: exact, complete evidence relative to a reference, in one sweep.

E(u) = sum_k (A_k(u) - A0_k(u)) m_k(u), with multipliers m from the score back to the layer by the
exact finite-difference rules of med_gradcam/secant: sum E = z(x) - z(reference) to rounding, for
every network and any layer that all paths pass through.
"""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "secant back-propagation against a reference input; adds up exactly (default)"
SOURCE = (
    "the rescale and linear rules of DeepLIFT (Shrikumar et al., ICML 2017, arXiv:1704.02685) in "
    "feature space, completed for maxima, products and norms (med_gradcam/secant/rules.py)"
)
CANNOT_SHOW = (
    "evidence that flows past the layer; nothing without its reference; and two networks that "
    "compute the same by other operations may get other maps"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = True
INSTEAD = "integrated"  # takes over where an operation has no rule


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Complete signed evidence (i, j, k) relative to the capture's baseline.

    Raises:
        UsageError: the capture was not made from a pair.
    """
    del bound  # the sum is exact
    if capture.shared is None or capture.reference_score is None:
        raise UsageError("expected a reference input for the method 'secant', got none.")
    values = capture.shared.evidence(capture.layer)[0]
    start = capture.reference_score
    if capture.shared.past[capture.layer]:
        start = capture.score - float(values.sum())
    return Evidence(values, start, converged=True)
