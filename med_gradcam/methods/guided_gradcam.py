"""Guided Grad-CAM: guided backprop where Grad-CAM says that evidence for lies."""

from __future__ import annotations

from typing import Literal

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Cells, Measure
from med_gradcam.graph import trace
from med_gradcam.layers import check_places
from med_gradcam.methods import Bound, Evidence, gradcam
from med_gradcam.methods._voxels import interpolated
from med_gradcam.methods.guided_backprop import guided
from med_gradcam.placement import place

TITLE = "Guided Grad-CAM: guided backprop x ReLU(Grad-CAM), at exact centres; mostly edges"
SOURCE = "Selvaraju et al., ICCV 2017, arXiv:1610.02391, section 3.2"
CANNOT_SHOW = (
    "what the network has learnt: the fine structure is guided backprop's, the image's edges "
    "whatever the weights (arXiv:1810.03292, 1805.07039, 1912.09818); evidence against; amounts"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = True
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """The product per voxel (I, J, K), never negative.

    Raises:
        UsageError: the capture has no second one, at a layer, beside it.
        CannotExplainError: the network has other rectifiers than ReLU, or none.
    """
    beside = capture.beside
    if beside is None:
        raise UsageError("expected a layer for the Grad-CAM in 'guided_gradcam', got none.")
    shape = capture.activation.shape[1:]
    coarse = gradcam.evidence(beside, bound).values.relu()
    cells = _cells(capture, beside)
    fine = guided(capture).double().abs().sum(0)
    return Evidence(interpolated(coarse, cells.start, cells.jump, shape) * fine)


def _cells(capture: Capture, beside: Capture) -> Cells:
    """Where the layer's cells lie, as the engine knows it or else found here."""
    if capture.beside_cells is not None:
        return capture.beside_cells
    shape, net = capture.activation.shape, capture.tail.net
    info = check_places(trace(net, shape).find(beside.layer), beside.layer)
    return place(net, info, shape)
