"""What is each region of a map worth, averaged over all orders in which regions could appear?

Shapley values in feature space: a coalition S of regions has the value z(A0 + m_S (A - A0)), the
layer's activation inside S and the reference's elsewhere, so that only the part behind the layer is
run: phi_r = sum_S |S|! (n - |S| - 1)! / n! (z(S + r) - z(S)). What no region covers is a player of
its own, "elsewhere", so the values add up to z - z(A0). Exact up to 10 regions, beyond them sampled
from pairs of opposite orders.
Source: Shapley 1953; Lundberg and Lee, NeurIPS 2017, arXiv:1705.07874; antithetic permutations:
Mitchell et al., JMLR 2022, arXiv:2104.12199.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.capture import Capture
from med_gradcam.errors import InputError, UsageError
from med_gradcam.rerun import Behind, behind

EXACT = 10  # regions; with elsewhere that is 2^11 passes at most
MOST_PASSES = 2048  # of a sample, unless these are fewer than eight pairs of orders
FEWEST_PAIRS = 8  # below, a standard error is itself a guess
NOTHING = 1e-6  # a cell's share that counts as covered

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ShapleyValues:
    """Values of R regions and, last, of elsewhere: shape (R + 1,), in the target's unit.

    They add up to `score` - `start_score`, the scores with every player and with none;
    `standard_errors` are zero where the values are exact. `passes` of the tail were needed.
    """

    values: Numbers = field(repr=False)
    standard_errors: Numbers = field(repr=False)
    start_score: float
    score: float
    passes: int


def shapley(
    capture: Capture, masks: npt.ArrayLike, seed: int, most_passes: int = MOST_PASSES
) -> ShapleyValues:
    """Shapley values of the regions `masks` (R, i, j, k), 0..1, at the capture's layer.

    Masks may be soft and may meet, but may nowhere add up to more than one; what is missing to one
    is elsewhere. `seed` and `most_passes` matter beyond 10 regions only.

    Raises:
        UsageError: the capture has no baseline.
        InputError: masks of another shape, or that add up to more than one.
    """
    if capture.baseline is None:
        raise UsageError("expected a reference input for Shapley values, got none.")
    players = _players(np.asarray(masks, dtype=np.float64), tuple(capture.activation.shape[1:]))
    some = [n for n, mask in enumerate(players) if n < len(players) - 1 or mask.max() > NOTHING]
    game = _Game(behind(capture), players[some])
    if len(players) - 1 <= EXACT:
        values, errors = _exact(game)
    else:
        values, errors = _sampled(game, seed, most_passes)
    full = np.zeros((2, len(players)))
    full[0, some], full[1, some] = values, errors
    start, end = game.values([(), tuple(range(len(some)))])
    return ShapleyValues(full[0], full[1], float(start), float(end), len(game.known))


def _players(masks: Numbers, shape: tuple[int, ...]) -> Numbers:
    """The regions and, last, what they leave."""
    if masks.ndim != 4 or not len(masks) or masks.shape[1:] != shape:
        raise InputError(
            f"expected masks on the layer's cells (R, {', '.join(str(n) for n in shape)}), "
            f"got {masks.shape}."
        )
    left = 1 - masks.sum(axis=0)
    if not np.isfinite(masks).all() or masks.min() < 0 or left.min() < -NOTHING:
        raise InputError(
            f"expected masks of 0 to 1 that nowhere add up to more than 1, got values from "
            f"{masks.min():g} and sums up to {1 - left.min():g}; share out what they overlap in."
        )
    return np.concatenate([masks, left.clip(min=0)[None]])


@dataclass(frozen=True, slots=True, eq=False)
class _Game:
    """The value of coalitions, each computed once."""

    tail: Behind
    players: Numbers
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def values(self, coalitions: Sequence[tuple[int, ...]]) -> Numbers:
        """z(A0 + m_S (A - A0)) for sorted tuples of players."""
        new = [c for c in dict.fromkeys(coalitions) if c not in self.known]
        if new:
            self.known.update(zip(new, self._scored(new), strict=True))
        return np.array([self.known[c] for c in coalitions])

    def _scored(self, coalitions: Sequence[tuple[int, ...]]) -> list[float]:
        here, base = self.tail.capture.activation, self.tail.capture.baseline
        if base is None:
            return []
        masks = torch.tensor(self.players, dtype=here.dtype, device=here.device)

        def mixed(some: slice) -> torch.Tensor:
            share = torch.stack([masks[list(c)].sum(0) for c in coalitions[some]])[:, None]
            return torch.lerp(base, here, share)

        found: list[float] = self.tail.scores(len(coalitions), mixed).tolist()
        return found


def _exact(game: _Game) -> tuple[Numbers, Numbers]:
    n = len(game.players)
    subsets = [tuple(r for r in range(n) if code >> r & 1) for code in range(2**n)]
    z = game.values(subsets)
    codes = np.arange(2**n)
    size = np.array([len(s) for s in subsets])
    values = np.zeros(n)
    for r in range(n):
        without = codes[codes >> r & 1 == 0]
        weight = np.array([1 / (n * math.comb(n - 1, int(s))) for s in size[without]])
        values[r] = (weight * (z[without | 1 << r] - z[without])).sum()
    return values, np.zeros(n)


def _sampled(game: _Game, seed: int, most_passes: int) -> tuple[Numbers, Numbers]:
    """Mean and standard error over pairs of an order and its opposite."""
    n = len(game.players)
    pairs = max(FEWEST_PAIRS, (most_passes - 2) // (2 * (n - 1)))
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(n).tolist() for _ in range(pairs)]
    orders = [way for order in orders for way in (order, order[::-1])]
    steps = [[tuple(sorted(order[:m])) for m in range(n + 1)] for order in orders]
    game.values([step for walk in steps for step in walk])
    gains = np.zeros((len(orders), n))
    for row, order, walk in zip(gains, orders, steps, strict=True):
        row[order] = np.diff(game.values(walk))
    means = gains.reshape(pairs, 2, n).mean(axis=1)
    return means.mean(axis=0), means.std(axis=0, ddof=1) / math.sqrt(pairs)
