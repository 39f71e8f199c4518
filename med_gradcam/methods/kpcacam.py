"""KPCA-CAM: Eigen-CAM with a kernel, so that the common direction may be curved."""

from __future__ import annotations

from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

LANDMARKS = 1024  # cells that the component is fitted on; its matrix is LANDMARKS^2
BLOCK = 8192  # cells projected at a time
ROUNDING = 1e-12  # share of the largest possible eigenvalue that is rounding

TITLE = "KPCA-CAM: the activations along their first kernel principal component; no class, no sign"
SOURCE = (
    "Karmani et al., arXiv:2410.00267, sigmoid kernel tanh(x.y / C + 1) of the centred channels; "
    "above 1024 cells fitted on 1024 of them, drawn with the seed"
)
CANNOT_SHOW = (
    "anything about the class: neither target nor head has a part in it; evidence against; "
    "amounts; and the kernel saturates, so scaling the channels changes the map"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """KPCA-CAM (i, j, k), never negative.

    The component's sign is free; it is the one with which the cells that stand out most (the sum
    of cubes) are positive. The mean activation, as for Eigen-CAM, would not settle it: the
    channels' means are taken away.
    """
    del bound
    activation = capture.activation.double()
    cells = activation.flatten(1).T
    cells = cells - cells.mean(0)
    values = _component(cells, _landmarks(cells, capture.seed)).reshape(activation.shape[1:])
    return Evidence((values if float((values**3).sum()) >= 0 else -values).relu())


def _landmarks(cells: torch.Tensor, seed: int) -> torch.Tensor:
    """All cells (N, C), or LANDMARKS of them drawn without replacement."""
    if len(cells) <= LANDMARKS:
        return cells
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(cells), generator=generator)[:LANDMARKS]
    return cells[picked.to(cells.device)]


def _component(cells: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """The cells (N, C) on the first kernel principal component of the landmarks, (N,).

    Source: Schoelkopf et al., 1998, eq. 3.14 and 4.3: with the centred kernel's largest eigenvalue
    l and eigenvector a, the projection is K a / sqrt(l).
    """
    kernel = _kernel(landmarks, landmarks)
    means, mean = kernel.mean(0), kernel.mean()
    found = torch.linalg.eigh(kernel - means - means[:, None] + mean)
    largest = float(found.eigenvalues[-1])
    if largest <= ROUNDING * len(landmarks):  # all cells alike
        return torch.zeros_like(cells[:, 0])
    direction = found.eigenvectors[:, -1] / largest**0.5
    projected = []
    for block in cells.split(BLOCK):
        near = _kernel(block, landmarks)
        projected.append((near - near.mean(1, keepdim=True) - means + mean) @ direction)
    return torch.cat(projected)


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b.T / a.shape[1] + 1.0)
