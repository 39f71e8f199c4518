"""Path-integrated HiResCAM in feature space: complete, signed, relative to a reference input.

E(u) = sum_k (A_k(u) - A0_k(u)) * integral over t of dz/dA_k(u) at A0 + t (A - A0), tail only.
Sum E = z(x) - z(A0) by the fundamental theorem, for any tail that is differentiable almost
everywhere. Eight Gauss-Legendre nodes; while the sum misses the bound, the part of the path whose
own sum misses the most (known exactly from the scores at its ends) is cut in two, so nodes gather
where max-pools and ReLUs switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence
from med_gradcam.tail import INPUT

TITLE = "path-integrated HiResCAM against a reference input; adds up to the score"
SOURCE = (
    "integrated gradients (Sundararajan et al., ICML 2017, arXiv:1703.01365) of the layer, times "
    "activation (HiResCAM, arXiv:2011.08891): the Aumann-Shapley value of each cell"
)
CANNOT_SHOW = "evidence that flows past the layer; and a map says nothing without its reference"
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "layer"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = True

NODES, MOST_NODES = 8, 256
BATCH_BYTES = 2.5e8  # activations of one tail batch; the tail's own graph is a multiple of it
_AT, _WEIGHT = np.polynomial.legendre.leggauss(NODES)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One stretch of the path: from t0 to t1, the scores there, its map and what it misses."""

    t0: float
    t1: float
    z0: float
    z1: float
    values: torch.Tensor

    @property
    def misses(self) -> float:
        return self.z1 - self.z0 - float(self.values.sum())


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Complete signed evidence (i, j, k) relative to the capture's baseline.

    Raises:
        UsageError: the capture has no baseline.
    """
    base = capture.baseline
    if base is None or capture.reference_score is None:
        raise UsageError("expected a reference input for the method 'integrated', got none.")
    change = capture.activation - base
    start = float(capture.scores(base[None])[0])
    parts = [_part(capture, base, change, (0.0, 1.0, start, capture.score))]
    nodes, allowed = NODES, bound.of(capture.score - capture.reference_score)
    while abs(sum(p.misses for p in parts)) > allowed and nodes + 2 * NODES <= MOST_NODES:
        worst = max(parts, key=lambda p: abs(p.misses))
        middle = (worst.t0 + worst.t1) / 2
        z = float(capture.scores((base + middle * change)[None])[0])
        parts.remove(worst)
        parts.append(_part(capture, base, change, (worst.t0, middle, worst.z0, z)))
        parts.append(_part(capture, base, change, (middle, worst.t1, z, worst.z1)))
        nodes += 2 * NODES
    total = torch.stack([p.values for p in parts]).sum(0)
    missed = abs(capture.score - start - float(total.sum()))
    return Evidence(total, start, missed <= allowed, nodes)


def _part(
    capture: Capture,
    base: torch.Tensor,
    change: torch.Tensor,
    ends: tuple[float, float, float, float],
) -> _Part:
    t0, t1, z0, z1 = ends
    at = [(t0 + t1) / 2 + (t1 - t0) / 2 * float(x) for x in _AT]
    weight = [(t1 - t0) / 2 * float(w) for w in _WEIGHT]
    size = max(1, min(NODES, int(BATCH_BYTES / (change.numel() * change.element_size()))))
    if capture.layer == INPUT:
        size = 1  # the tail's graph is that of the whole network
    total = torch.zeros(change.shape[1:], dtype=torch.float64, device=change.device)
    for first in range(0, NODES, size):
        chunk = slice(first, first + size)
        points = torch.stack([base + t * change for t in at[chunk]])
        gradients = capture.gradients(points)
        for w, gradient in zip(weight[chunk], gradients, strict=True):
            total += w * (gradient * change).sum(0, dtype=torch.float64)
    return _Part(t0, t1, z0, z1, total)
