"""The perturbation methods once more, slowly and from their papers: the whole network every time.

Nothing here uses the package. Activations are handed in by a hook on the plain network, inputs are
masked voxel by voxel, masks are laid by scipy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import nn

Numbers = npt.NDArray[np.float64]
Score = Callable[[Any], torch.Tensor]


def activation_of(net: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    """The layer's output (C, i, j, k)."""
    seen: list[torch.Tensor] = []
    keep = net.get_submodule(layer).register_forward_hook(lambda _m, _i, o: seen.append(o.clone()))
    try:
        with torch.no_grad():
            net(x)
    finally:
        keep.remove()
    return seen[0][0]


def score_with(
    net: nn.Module, layer: str, x: torch.Tensor, score: Score, activation: torch.Tensor
) -> float:
    """The score when the layer puts out `activation`; the whole network runs."""
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, _o: activation[None])
    try:
        with torch.no_grad():
            return float(score(net(x))[0])
    finally:
        handle.remove()


def score_of(net: nn.Module, x: torch.Tensor, score: Score) -> float:
    with torch.no_grad():
        return float(score(net(x))[0])


def laid(
    cells: Numbers, shape: Sequence[int], start: Sequence[float], jump: Sequence[float]
) -> Numbers:
    """Cells centred at start + n * jump, linear at the voxels between, held beyond the last."""
    axes = [(np.arange(n) - s) / j for n, s, j in zip(shape, start, jump, strict=True)]
    at = np.stack(np.meshgrid(*axes, indexing="ij"))
    out: Numbers = ndimage.map_coordinates(cells, at, order=1, mode="nearest")
    return out


def ablation_drops(net: nn.Module, layer: str, x: torch.Tensor, score: Score) -> list[float]:
    """Desai and Ramaswamy 2020, eq. 2 before its division: y - y_k for every channel."""
    activation = activation_of(net, layer, x)
    drops = []
    for k in range(len(activation)):
        without = activation.clone()
        without[k] = 0.0
        drops.append(score_of(net, x, score) - score_with(net, layer, x, score, without))
    return drops


def ablationcam(activation: Numbers, drops: Sequence[float]) -> Numbers:
    """Each channel's drop over its cells, by their share of the channel's absolute sum."""
    out = np.zeros(activation.shape[1:])
    for channel, drop in zip(activation, drops, strict=True):
        total = sum(abs(float(v)) for v in channel.ravel())
        for u in np.ndindex(*channel.shape):
            if total > 0:
                out[u] += drop * abs(channel[u]) / total
    return out


def ablationcam_of_the_paper(activation: Numbers, drops: Sequence[float], score: float) -> Numbers:
    """Eq. 2 and 3: ReLU(sum_k (y - y_k) / y A_k)."""
    out = np.zeros(activation.shape[1:])
    for channel, drop in zip(activation, drops, strict=True):
        out += drop / score * channel
    return np.maximum(out, 0)


def reciprocam(net: nn.Module, layer: str, x: torch.Tensor, score: Score) -> Numbers:
    """Byun and Lee 2022, masks of one cell; the log-odds less those of the empty map."""
    activation = activation_of(net, layer, x)
    empty = score_with(net, layer, x, score, torch.zeros_like(activation))
    out = np.zeros(activation.shape[1:])
    for u in np.ndindex(*out.shape):
        mask = torch.zeros_like(activation)
        mask[(slice(None), *u)] = 1.0
        out[u] = score_with(net, layer, x, score, activation * mask) - empty
    return out


def scorecam(
    net: nn.Module,
    layer: str,
    pair: tuple[torch.Tensor, torch.Tensor],
    score: Score,
    lattice: tuple[Sequence[float], Sequence[float]],
) -> Numbers:
    """Wang et al. 2020, algorithm 1, every channel, the scan fading to the reference."""
    x, reference = pair
    activation = activation_of(net, layer, x)
    scores, used = [], []
    for channel in activation.double().numpy():
        if channel.max() == channel.min():
            continue
        mask = laid(channel, x.shape[2:], *lattice)
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        seen = torch.tensor(mask).to(x.dtype) * (x - reference) + reference
        scores.append(score_of(net, seen, score))
        used.append(channel)
    powers = np.exp(np.array(scores) - max(scores))
    out = np.zeros(used[0].shape)
    for weight, channel in zip(powers / powers.sum(), used, strict=True):
        out += weight * channel
    return np.maximum(out, 0)


def occlusion_effect(
    net: nn.Module,
    pair: tuple[torch.Tensor, torch.Tensor],
    score: Score,
    box: Sequence[tuple[int, int]],
) -> float:
    """Zeiler and Fergus 2014: the score less the score without the voxels of one box."""
    x, reference = pair
    without = x.clone()
    for c in range(x.shape[1]):
        for i, j, k in itertools.product(*(range(a, b) for a, b in box)):
            without[0, c, i, j, k] = reference[0, c, i, j, k]
    return score_of(net, x, score) - score_of(net, without, score)


def rise_masks(
    counts: Sequence[int], shape: Sequence[int], shift: Sequence[float]
) -> tuple[Numbers, Numbers]:
    """All 2^cells ways to keep cells (n, cells) and their masks (n, I, J, K)."""
    jump = [v / c for v, c in zip(shape, counts, strict=True)]
    start = [j * s - 0.5 for j, s in zip(jump, shift, strict=True)]
    kept = np.array(list(itertools.product((0.0, 1.0), repeat=int(np.prod(counts)))))
    masks = np.stack([laid(one.reshape(counts), shape, start, jump) for one in kept])
    return kept, masks


def rise_scores(
    net: nn.Module, pair: tuple[torch.Tensor, torch.Tensor], score: Score, masks: Numbers
) -> Numbers:
    x, reference = pair
    seen = [torch.tensor(m).to(x.dtype) * (x - reference) + reference for m in masks]
    return np.array([score_of(net, one, score) for one in seen])


def rise_of_the_paper(scores: Numbers, masks: Numbers) -> Numbers:
    """Petsiuk et al. 2018, eq. 6: sum_i f(x * M_i) M_i / (N E[M]), p = 1/2."""
    out = np.zeros(masks.shape[1:])
    for one, mask in zip(scores, masks, strict=True):
        out += one * mask
    return out / (len(masks) * 0.5)


def rise(scores: Numbers, kept: Numbers, masks: Numbers) -> Numbers:
    """The exact expectation: per cell mean score kept less mean score not kept, as a density."""
    out = np.zeros(masks.shape[1:])
    for g in range(kept.shape[1]):
        own = masks[int(np.flatnonzero((kept.sum(1) == 1) & (kept[:, g] == 1))[0])]
        effect = scores[kept[:, g] == 1].mean() - scores[kept[:, g] == 0].mean()
        out += effect * own / own.sum()
    return out


def shapley(value: Callable[[frozenset[int]], float], players: int) -> Numbers:
    """Shapley 1953: the mean gain over all orders in which the players can come."""
    known: dict[frozenset[int], float] = {}

    def worth(coalition: frozenset[int]) -> float:
        if coalition not in known:
            known[coalition] = value(coalition)
        return known[coalition]

    orders = list(itertools.permutations(range(players)))
    out = np.zeros(players)
    for order in orders:
        for m, player in enumerate(order):
            before = frozenset(order[:m])
            out[player] += worth(before | {player}) - worth(before)
    return out / len(orders)
