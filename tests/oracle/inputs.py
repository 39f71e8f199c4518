"""The methods at the input once more, slowly and from their papers.

Nothing here uses the package. Networks run as they are, with all their parameters in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tests.oracle.cams import handed_out, noisy_scans
from tests.oracle.papers import Numbers, Score


def input_gradient(net: nn.Module, x: torch.Tensor, score: Score) -> Numbers:
    """d score / d input, (C, I, J, K), through the plain network."""
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(net(leaf))[0], leaf)
    return np.asarray(gradient[0].double().numpy())


def sizes(gradient: Numbers) -> Numbers:
    """The sum over channels of absolute values."""
    out = np.zeros(gradient.shape[1:])
    for channel in gradient:
        for v in np.ndindex(*out.shape):
            out[v] += abs(channel[v])
    return out


def smoothgrad(
    net: nn.Module, x: torch.Tensor, score: Score, noise: tuple[float, int, int]
) -> Numbers:
    """Smilkov et al. 2017, equation 1, then the size."""
    share, count, seed = noise
    scans = noisy_scans(x, share, count, seed)
    return sizes(np.mean([input_gradient(net, one, score) for one in scans], axis=0))


def integrated(
    net: nn.Module, x: torch.Tensor, baseline: torch.Tensor, score: Score, doublings: int = 6
) -> Numbers:
    """Sundararajan et al. 2017 by Romberg's rule, for networks without corners; (I, J, K)."""

    def at(t: float) -> Numbers:
        return input_gradient(net, baseline + t * (x - baseline), score)

    rows = [[(at(0.0) + at(1.0)) / 2]]
    for n in range(1, doublings + 1):
        step = 0.5**n
        middles = sum(at(step * (2 * m + 1)) for m in range(2 ** (n - 1)))
        row = [rows[-1][0] / 2 + step * middles]
        for p in range(1, n + 1):
            row.append(row[-1] + (row[-1] - rows[-1][p - 1]) / (4**p - 1))
        rows.append(row)
    change = (x - baseline)[0].double().numpy()
    return np.asarray((rows[-1][-1] * change).sum(axis=0))


def grain(channel: npt.NDArray[np.float32]) -> float:
    """1.4826 times the median absolute deviation of neighbours' differences, by sqrt(2)."""
    step = np.diff(channel, axis=-1).ravel()
    return float(1.4826 * np.median(np.abs(step - np.median(step))) / np.sqrt(2.0))


def references(
    x: torch.Tensor, baseline: torch.Tensor, pairs: int, seed: int
) -> list[torch.Tensor]:
    """The reference input with textures of the scan's grain, added and subtracted."""
    generator = torch.Generator().manual_seed(seed)
    sd = np.array([grain(channel) for channel in x[0].float().numpy()])[:, None, None, None]
    out = []
    for _ in range(pairs):
        texture = sd * torch.randn(x.shape[1:], generator=generator).double().numpy()
        step = torch.from_numpy(texture).to(x.dtype)[None]
        out += [baseline + step, baseline - step]
    return out


def guided_backprop(
    layers: Sequence[nn.Module], x: torch.Tensor, score: Score, *, guided: bool = True
) -> Numbers:
    """Springenberg et al. 2015: back through a chain of layers, the rule by hand at each ReLU."""
    inputs = [x]
    for layer in layers:
        inputs.append(layer(inputs[-1]).detach())
    last = inputs[-1].clone().requires_grad_(True)
    (signal,) = torch.autograd.grad(score(last)[0], last)
    for layer, given in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        if isinstance(layer, nn.ReLU):
            signal = signal * (given > 0)
            signal = signal * (signal > 0) if guided else signal
        else:
            leaf = given.clone().requires_grad_(True)
            (signal,) = torch.autograd.grad(layer(leaf), leaf, signal)
    return np.asarray(signal[0].double().numpy())


# ------------------------------------------------------------------------------------ FullGrad


def bias_of(module: nn.Module, given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What a layer adds to its own slope: the formula of each kind, or central differences."""
    if isinstance(module, (nn.Conv3d, nn.Linear)):
        assert module.bias is not None
        places = (1,) * (out.ndim - 2)
        return module.bias.reshape(1, -1, *places).expand_as(out)
    if isinstance(module, nn.BatchNorm3d):
        assert module.running_mean is not None
        assert module.running_var is not None
        factor = module.weight / torch.sqrt(module.running_var + module.eps)
        return (module.bias - factor * module.running_mean)[:, None, None, None].expand_as(out)
    if isinstance(module, nn.SiLU):
        s = torch.sigmoid(given)
        return given * s - given * (s + given * s * (1 - s))
    if isinstance(module, (nn.InstanceNorm3d, nn.GroupNorm)):
        h = 1e-5
        slope: torch.Tensor = (module(given * (1 + h)) - module(given * (1 - h))) / (2 * h)
        return out - slope
    return torch.zeros_like(out)


def fullgrad(
    net: nn.Module, x: torch.Tensor, score: Score, grids: dict[int, tuple[float, float]]
) -> tuple[Numbers, float]:
    """Srinivas and Fleuret 2019, proposition 1: the map, and what has no place.

    For networks made of layers. `grids`: by number of cells along an axis, where these lie.
    """
    seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        watched = out.clone()
        seen.append((module, given[0].detach(), watched))
        return watched.clone()

    kinds = (nn.Conv3d, nn.Linear, nn.BatchNorm3d, nn.SiLU, nn.InstanceNorm3d, nn.GroupNorm)
    handles = [m.register_forward_hook(keep) for m in net.modules() if isinstance(m, kinds)]
    leaf = x.clone().requires_grad_(True)
    try:
        z = score(net(leaf))[0]
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(z, [leaf, *(out for _, _, out in seen)])
    values = (gradients[0] * x)[0].sum(0).double().numpy()
    no_place = 0.0
    for (module, given, out), gradient in zip(seen, gradients[1:], strict=True):
        with torch.no_grad():
            amounts = (gradient * bias_of(module, given, out.detach()))[0].double().numpy()
        if amounts.ndim == 1:
            no_place += float(amounts.sum())
        else:
            start, jump = grids[amounts.shape[1]]
            values = values + handed_out(amounts.sum(axis=0), values.shape, start, jump)
    return values, no_place
