"""ShapleyCAM: Grad-CAM with the score's curvature taken into account."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from med_gradcam.capture import Capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "ShapleyCAM, signed: sum_k mean_v(g - H A / 2)_k A_k(u), H the second derivatives"
SOURCE = (
    "Cai, arXiv:2501.06261, ShapleyCAM: the Shapley values of the channels to second order; of the "
    "log-odds here, not of the paper's utility; their ReLU left out"
)
CANNOT_SHOW = (
    "places: the mean over the map forgets where a channel mattered; the step to an empty layer is "
    "a long one for a second-order formula, and between ReLUs it is Grad-CAM (H is zero there)"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed ShapleyCAM (i, j, k).

    Raises:
        CannotExplainError: an operation behind the layer has no second derivative.
    """
    del bound
    gradient = capture.gradient()  # makes sure of the tail, too
    weights = (gradient.double() - _curvature(capture) / 2).mean(dim=(1, 2, 3), keepdim=True)
    return Evidence((weights * capture.activation.double()).sum(0))


def _curvature(capture: Capture) -> torch.Tensor:
    """H A, the Hessian of the score times the activation, (C, i, j, k) float64."""
    known = bool(capture.tail.memory)
    capture.passes += 4.0 if known else 3.0  # two passes with their backwards
    capture.forwards += 0.0 if known else 1.0  # nothing remembered: the whole network runs
    # Fused attention has no second derivative; its plain form has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaf = capture.activation[None].detach().clone()
        leaf.requires_grad = True
        score = capture.target(capture.tail.run(leaf)).sum()
        (slope,) = torch.autograd.grad(score, leaf, create_graph=True)
        if not slope.requires_grad:  # one linear layer follows
            return torch.zeros_like(capture.activation).double()
        _check_twice(slope.grad_fn, capture.layer)
        (bent,) = torch.autograd.grad(
            slope, leaf, leaf.detach(), allow_unused=True, materialize_grads=True
        )
    return bent[0].double()


def _check_twice(last: Any, layer: str) -> None:
    """Refuse a graph with a dead end: torch may take its second derivative for zero.

    Raises:
        CannotExplainError: an operation behind the layer has no second derivative.
    """
    seen, todo = set(), [last]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().rpartition(":")[2] in ("Error", "NotImplemented"):
            raise CannotExplainError(
                "no rule",
                f"expected second derivatives of all that follows the layer {layer!r} for "
                f"shapleycam, an operation there has none; choose gradcam or integrated.",
            )
        todo += [before for before, _ in node.next_functions]
