"""FullGrad before its absolute values: the score, shared out to the input and to every bias.

z = sum_v x(v) dz/dx(v) + sum over operations of sum_u b(u) dz/dy(u), for any network; `_biases`
says what b is. Each part is brought from its cells onto the voxels without changing its sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from med_gradcam.capture import Capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.methods._biases import Biases
from med_gradcam.methods._voxels import spread

TITLE = "FullGrad, signed: input x gradient + every bias x its gradient, in place; adds up"
SOURCE = (
    "Srinivas and Fleuret, NeurIPS 2019, arXiv:1905.00780, proposition 1 with implicit biases; "
    "their absolute values and rescaling left out"
)
CANNOT_SHOW = (
    "what has no place: biases behind pooling or flatten, of tokens and of the log-odds are left "
    "out (their share is `bypassed`); saturated evidence; and an input of 0 counts as nothing"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = True
REST = "has no place in the scan (biases behind pooling or flatten, of tokens, of the log-odds)"


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed evidence per voxel (I, J, K); `start_score` is the part of the score without a place.

    Raises:
        CannotExplainError: an operation cannot be followed, so that the parts do not add up.
    """
    net, biases = capture.tail.net, Biases()
    # Fused attention has no forward-mode derivative; its plain form has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaf = capture.input.detach().clone()
        leaf.requires_grad = True
        biases.begin(leaf)
        with biases:
            score = capture.target(net(leaf.clone())).sum()  # it may work in place on its input
        (gradient,) = torch.autograd.grad(score, leaf)
    capture.passes += 2.0 + biases.more
    values = (gradient.double() * capture.input.double())[0].sum(0)
    for ((start, jump), _), amounts in biases.placed.items():
        values = values + spread(amounts, start, jump, values.shape)
    missed = capture.score - biases.no_place - float(values.sum())
    if not abs(missed) <= bound.of(capture.score):
        raise CannotExplainError(
            "no rule",
            f"expected the parts that fullgrad finds to add up to the score {capture.score:.6g}, "
            f"they miss it by {missed:.3g}; does the network hold code that torch cannot follow "
            f"(TorchScript, an autograd.Function)?",
        )
    return Evidence(values, biases.no_place, converged=True)
