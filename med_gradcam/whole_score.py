"""What is a volume's score made of its windows' outputs, and what does each output owe to it?

The score is a function of all windows' raw outputs. Its change from the reference is shared out
over them by the same exact rules as inside a network (secant/), or by its gradient for methods
that look at the scan alone. So every window gets fixed weights of its outputs, and the sum of its
weighted outputs is what it is explained for.
Aggregation of W windows' log-odds z: mean; max; lse: T (logsumexp(z / T) - log W), between the
two; noisy-or: the log-odds of 1 - prod(1 - p). Source: Ilse et al., ICML 2018, arXiv:1802.04712
(pooling over instances, attention among them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.secant.pair import run, share
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from med_gradcam.target import Target, Weights
from med_gradcam.tiling import Slices, Tiles

Pool = Literal["max", "mean", "lse", "noisy-or"]
Score = Callable[[torch.Tensor], torch.Tensor]
NODES = 256  # of the path from the reference's outputs to the scan's, where there is no rule
MISSED = 0.01  # share of the change that this path may miss
TIE = 1e-9  # scores this near to each other, as a share, are one
SLAB = 2**22  # numbers of an output map that are worked on at a time

_Array = npt.NDArray[Any]


def pool(kind: str, temperature: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The aggregation of log-odds (W,) to one number.

    Raises:
        UsageError: no such aggregation, or no such temperature.
    """
    if kind not in get_args(Pool):
        raise UsageError(
            f"expected an aggregation of {', '.join(get_args(Pool))} or a function, got {kind!r}."
        )
    if not 0 < temperature < math.inf:
        raise UsageError(f"expected a temperature above 0, got {temperature}.")
    if kind == "max":
        return largest
    if kind == "mean":
        return lambda z: z.mean()
    if kind == "lse":
        return lambda z: temperature * (torch.logsumexp(z / temperature, dim=0) - math.log(len(z)))
    return _noisy_or


def _noisy_or(z: torch.Tensor) -> torch.Tensor:
    """log-odds of 1 - prod(1 - p): with L = -sum log(1 - p) it is log(e^L - 1)."""
    total = torch.nn.functional.softplus(z).sum()
    return total + torch.log(-torch.expm1(-total))


def multipliers(
    score: Score, outputs: torch.Tensor, reference: torch.Tensor | None
) -> torch.Tensor:
    """What a score owes to each of some outputs: both of one shape.

    With a reference: the change of the score is the sum of multiplier times change, exactly where
    all operations of the score have a rule, else by its path integral. Without: the gradient.

    Raises:
        CannotExplainError: the score does not follow from the outputs in a way that can be shared.
    """
    if reference is None:
        return _slopes(score, outputs)
    net = torch.nn.Identity()
    try:
        case = run(net, [INPUT], outputs, lambda _: score)
        other = run(net, [INPUT], reference, lambda _: score)
        return share(case, other, [INPUT]).multipliers[INPUT]
    except NoRuleError:
        pass
    total = torch.zeros_like(outputs)
    for node in range(NODES):
        t = (node + 0.5) / NODES
        total += _slopes(score, reference + t * (outputs - reference)) / NODES
    with torch.no_grad():
        change = float(score(outputs).sum() - score(reference).sum())
    missed = abs(float((total * (outputs - reference)).sum()) - change)
    if missed > MISSED * abs(change) + 1e-6:
        raise CannotExplainError(
            "no rule",
            f"expected an aggregation whose change can be shared out over the windows, it misses "
            f"{missed:.3g} of {change:.3g}; use functions of torch that are smooth.",
        )
    return total


def _slopes(score: Score, outputs: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        value = score(leaf).sum()
        if not value.requires_grad:
            raise UsageError(
                "expected an aggregation that computes its number from the windows' outputs with "
                "torch, but no gradient leads back to them; leave out item(), numpy() and detach()."
            )
        (found,) = torch.autograd.grad(value, leaf)
    return found


# ----------------------------------------------------------------------------- patch classifiers


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """The score of a patch classifier's windows taken together.

    `outputs` and `reference` (W, K) float64; `each`: a window's own scores (W,) of (W, K); `all`:
    the score of all, (1,); `weights` (W, K): what it owes to each output.
    """

    outputs: torch.Tensor
    reference: torch.Tensor | None
    each: Score
    whole: Score
    weights: torch.Tensor = field(repr=False)
    unit: str = "log-odds"

    def shares(self) -> torch.Tensor:
        """What each window has of the score's change (W,); of the score, without a reference."""
        change = self.outputs if self.reference is None else self.outputs - self.reference
        return (self.weights * change).sum(1)

    @property
    def score(self) -> float:
        """The score of the scan."""
        return float(self.whole(self.outputs)[0])

    @property
    def reference_score(self) -> float | None:
        """The score of the reference, run by the same windows."""
        return None if self.reference is None else float(self.whole(self.reference)[0])

    def scores(self) -> tuple[list[float], list[float | None]]:
        """Each window's own score, and that of its reference."""
        here = [float(z) for z in self.each(self.outputs)]
        if self.reference is None:
            return here, [None] * len(here)
        return here, [float(z) for z in self.each(self.reference)]


def pooled(
    target: Target,
    how: Score | None,
    outputs: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
) -> Pooled:
    """The score of all windows: `how` of their own scores, or the target's own function of all."""
    here = torch.stack(list(outputs)).double()
    other = None if reference is None else torch.stack(list(reference)).double()
    if how is None:
        function = target.function

        def whole(rows: torch.Tensor) -> torch.Tensor:
            return _number(function(rows) if function is not None else None)

        each: Score = lambda rows: rows[:, 0]  # noqa: E731
        return Pooled(here, other, each, whole, multipliers(whole, here, other), target.unit)
    each = target
    whole = lambda rows: how(each(rows)).reshape(1)  # noqa: E731
    shared = whole
    if how is largest:
        n = _highest(each, here, other)
        shared = whole if n is None else lambda rows: each(rows[n : n + 1])
    return Pooled(here, other, each, whole, multipliers(shared, here, other), target.unit)


def largest(z: torch.Tensor) -> torch.Tensor:
    """The largest of some scores (W,)."""
    return z.max()


def _highest(each: Score, here: torch.Tensor, other: torch.Tensor | None) -> int | None:
    """The window that has the scan's maximum, where it has the reference's too; else None.

    All windows of a uniform reference have its maximum, so whose change it is must not be left to
    which comes first.
    """
    n = int(each(here).argmax())
    if other is None:
        return n
    z = each(other)
    return n if bool(z[n] >= z.max() - TIE * (1 + z.max().abs())) else None


def _number(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UsageError(f"expected the aggregation to return one number as a tensor, got {got}.")
    return value.reshape(1)


# --------------------------------------------------------------------------------- output maps


@dataclass(frozen=True, slots=True, eq=False)
class Stitched:
    """The windows' output maps as one map (K, I, J, K'), each weighted by its importance.

    `box`: the part of the volume that is kept; `tiled` over the whole; `weights` (i, j, k) of one
    window; `total` the sum of all windows' weights (whole volume).
    """

    values: _Array = field(repr=False)
    tiled: Tiles
    weights: npt.NDArray[np.float32] = field(repr=False)
    total: _Array = field(repr=False)
    box: Slices

    def touches(self, n: int) -> bool:
        """Whether window `n` has a part in what is kept."""
        here, _ = self.tiled.places(n)
        return _common(here, self.box) is not None

    def add(self, n: int, output: _Array) -> None:
        """Add the output map (K, i, j, k) of window `n`."""
        part = _common(self.tiled.places(n)[0], self.box)
        if part is None:
            return
        start = self.tiled.starts[n]
        own = _moved(part, start)
        place = _moved(part, [s.start for s in self.box])
        self.values[(slice(None), *place)] += output[(slice(None), *own)] * self.weights[own]

    def finish(self) -> None:
        """Divide by the sum of the weights, a slab at a time."""
        for n in range(self.values.shape[1]):
            row = self.box[0].start + n
            self.values[:, n] /= self.total[(row, *self.box[1:])]


def _common(a: Slices, b: Slices) -> Slices | None:
    low = [max(x.start, y.start) for x, y in zip(a, b, strict=True)]
    high = [min(x.stop, y.stop) for x, y in zip(a, b, strict=True)]
    if any(h <= lo for lo, h in zip(low, high, strict=True)):
        return None
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def _moved(part: Slices, by: Sequence[int]) -> Slices:
    a, b, c = (slice(s.start - n, s.stop - n) for s, n in zip(part, by, strict=True))
    return a, b, c


def box_of(target: Target, shape: Sequence[int]) -> Slices:
    """The part of an output map that a target reads."""
    if target.weights is None:
        a, b, c = (slice(0, n) for n in shape)
        return a, b, c
    pairs = zip(target.weights.start, target.weights.values.shape, strict=True)
    a, b, c = (slice(s, s + n) for s, n in pairs)
    return a, b, c


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """The score of a stitched output map, and what it owes to each window's output.

    `scan` is stitched over the whole volume, `reference` over the target's box, or None.
    """

    target: Target
    scan: Stitched
    reference: Stitched | None
    box: Slices
    fixed: torch.Tensor | None = field(default=None, repr=False)

    @property
    def score(self) -> float:
        """The score of the scan."""
        return self.score_of(self.scan)

    @property
    def reference_score(self) -> float | None:
        """The score of the reference, stitched from the same windows."""
        return None if self.reference is None else self.score_of(self.reference)

    def size(self, n: int) -> float:
        """How much of what the target reads window `n` has; 0 if it counts for nothing."""
        place = _common(self.scan.tiled.places(n)[0], self.box)
        if place is None:
            return 0.0
        if self.fixed is not None:
            counts = self.fixed[(slice(None), *place)].abs().sum(0)
        elif self.target.weights is not None:
            counts = self.target.weights.values[_moved(place, self.target.weights.start)]
        own = _moved(place, self.scan.tiled.starts[n])
        return float((counts.cpu().numpy() * self._blend(own, place)).sum())

    def _blend(self, own: Slices, place: Slices) -> npt.NDArray[np.float64]:
        """A window's part in the stitched map: its importance among that of all."""
        part: npt.NDArray[np.float64] = self.scan.weights[own].astype(np.float64)
        return part / self.scan.total[place]

    def score_of(self, stitched: Stitched) -> float:
        """The target's score of a stitched map; a region's is added up slab by slab."""
        region = self.target.weights
        if region is None:
            return float(self.target(_tensor(stitched.values)[None])[0])
        _, j, k = (s.stop - s.start for s in self.box)
        rows = max(1, SLAB // (j * k * stitched.values.shape[0]))
        total = 0.0
        for first in range(self.box[0].start, self.box[0].stop, rows):
            last = min(first + rows, self.box[0].stop)
            place: Slices = (slice(first, last), self.box[1], self.box[2])
            local = self._local(place)
            if local is not None:
                part = self._of(stitched, place)
                total += local[1] * float(local[0](part[None])[0])
        return total

    def _of(self, stitched: Stitched, place: Slices) -> torch.Tensor:
        """A part of a stitched map (K, i, j, k), float64."""
        own = _moved(place, [s.start for s in stitched.box])
        return _tensor(stitched.values[(slice(None), *own)]).double()

    def _local(self, place: Slices) -> tuple[Target, float] | None:
        """The target over a part of its region, and that part's share of all; None if empty."""
        region = self.target.weights
        if region is None:
            return None
        own = _moved(place, region.start)
        values = region.values[own]
        total = float(values.sum(dtype=torch.float64))
        if total == 0:
            return None
        shape = (values.shape[0], values.shape[1], values.shape[2])
        local = replace(self.target, output="", weights=Weights(shape, (0, 0, 0), values))
        return local, total / float(region.values.sum(dtype=torch.float64))

    def weights_of(self, n: int) -> tuple[Slices, torch.Tensor] | None:
        """What the score owes to window `n`'s output: a part of it, and weights (K, i, j, k).

        None where it owes nothing to it.
        """
        place = _common(self.scan.tiled.places(n)[0], self.box)
        if place is None:
            return None
        owed = self._owed(place)
        if owed is None:
            return None
        own = _moved(place, self.scan.tiled.starts[n])
        weights = owed * torch.from_numpy(self._blend(own, place))
        return (own, weights) if bool(weights.any()) else None

    def _owed(self, place: Slices) -> torch.Tensor | None:
        """What the score owes to the stitched map (K, i, j, k) at a part of it."""
        if self.fixed is not None:
            return self.fixed[(slice(None), *place)]
        local = self._local(place)
        if local is None:
            return None
        here = self._of(self.scan, place)[None]
        other = None if self.reference is None else self._of(self.reference, place)[None]
        return multipliers(local[0], here, other)[0] * local[1]


def dense(target: Target, scan: Stitched, reference: Stitched | None, box: Slices) -> Dense:
    """The score of a stitched map; what a function of all of it owes is found at once."""
    if target.weights is not None:
        return Dense(target, scan, reference, box)
    other = None if reference is None else _tensor(reference.values)[None].double()
    own = replace(target, output="")
    fixed = multipliers(own, _tensor(scan.values)[None].double(), other)[0]
    return Dense(own, scan, reference, box, fixed)


def _tensor(array: _Array) -> torch.Tensor:
    return torch.from_numpy(array)
