"""The methods once more, slowly and from their papers: the whole network, every gradient.

Nothing here uses the package. A network is run as it is, with all its parameters in the graph; the
layer is watched by a hook that replaces nothing, or (for the path) by one that hands in a point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Numbers = npt.NDArray[np.float64]
Score = Callable[[Any], torch.Tensor]


def activation_of(net: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, part of the whole network's graph."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out)
        return out.clone()  # what follows in place does not change what was seen

    handle = net.get_submodule(layer).register_forward_hook(keep)
    try:
        net(x)
    finally:
        handle.remove()
    return seen[0]


def score_at(
    net: nn.Module, layer: str, x: torch.Tensor, score: Score, activation: torch.Tensor
) -> torch.Tensor:
    """The score when the layer puts out `activation`; everything else runs as usual."""
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, _o: activation.clone())
    try:
        return score(net(x))[0]
    finally:
        handle.remove()


def gradient_at(
    net: nn.Module, layer: str, x: torch.Tensor, score: Score, activation: torch.Tensor
) -> torch.Tensor:
    point = activation.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score_at(net, layer, x, score, point), point)
    return gradient


def full_gradient(
    net: nn.Module, layer: str, x: torch.Tensor, score: Score
) -> tuple[torch.Tensor, torch.Tensor]:
    """(activation, d score / d activation) through the plain network's own full graph."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out)
        return out.clone()

    handle = net.get_submodule(layer).register_forward_hook(keep)
    try:
        z = score(net(x))[0]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(z, seen[0])
    return seen[0].detach()[0], gradient[0]


def difference_gradient(
    net: nn.Module, layer: str, x: torch.Tensor, score: Score, step: float = 1e-5
) -> tuple[Numbers, Numbers]:
    """(activation, gradient by central differences), one number at a time; float64 networks."""
    with torch.no_grad():
        activation = activation_of(net, layer, x).clone()
        gradient = torch.zeros_like(activation)
        for index in np.ndindex(*activation.shape):
            up, down = activation.clone(), activation.clone()
            up[index] += step
            down[index] -= step
            change = score_at(net, layer, x, score, up) - score_at(net, layer, x, score, down)
            gradient[index] = change / (2 * step)
    return activation[0].numpy(), gradient[0].numpy()


def gradcam(activation: Numbers, gradient: Numbers) -> Numbers:
    """Selvaraju et al. 2017, equations 1 and 2, without the ReLU."""
    channels, *places = activation.shape
    cells = np.prod(places)
    out = np.zeros(places)
    for k in range(channels):
        alpha = gradient[k].sum() / cells
        out += alpha * activation[k]
    return out


def hirescam(activation: Numbers, gradient: Numbers) -> Numbers:
    """Draelos and Carin 2020, equation 3."""
    channels, *places = activation.shape
    out = np.zeros(places)
    for u in np.ndindex(*places):
        for k in range(channels):
            out[u] += gradient[(k, *u)] * activation[(k, *u)]
    return out


def integrated(
    net: nn.Module,
    layer: str,
    pair: tuple[torch.Tensor, torch.Tensor],
    score: Score,
    nodes: int = 400,
) -> Numbers:
    """Integrated gradients (Sundararajan et al. 2017) of the layer from the reference's activation
    to the scan's, by a midpoint sum of many nodes; `pair` is (scan, reference).
    """
    x, reference = pair
    here = activation_of(net, layer, x).detach()
    there = activation_of(net, layer, reference).detach()
    total = torch.zeros_like(here)
    for n in range(nodes):
        t = (n + 0.5) / nodes
        total += gradient_at(net, layer, x, score, there + t * (here - there)) / nodes
    return ((here - there) * total)[0].sum(0).double().numpy()
