"""How is the change of a softmax, or of the logarithm of a sum of exponentials, shared out?

Probabilities p and q sum to one, so sum_j L_j (change of log p_j) = 0 with their logarithmic means
L_j = (p_j - q_j) / (log p_j - log q_j); log p = a - log sum e^a, hence log sum e^a changes by
sum_j (L_j / sum L) (change of a_j), whose weights sum to one: a number added to all a counts once.
Log softmax is a less that, softmax the exponential of log softmax; nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from med_gradcam.secant.rules import Multipliers, Pair, axes, with_axes

BLOCK = 1 << 18  # elements at a time: attention maps are large, and this much stays in the cache
Share = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _log_softmax(a: torch.Tensor) -> torch.Tensor:
    """Log softmax of rows; of rows that are masked (-inf) all over, -inf."""
    top = a.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    a = a - top
    rest = a.exp().sum(-1, keepdim=True).log_()
    rest = torch.where(rest.isfinite(), rest, 0.0)
    return a.sub_(rest)


def _log_mean(p: torch.Tensor, q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """(p - q) / (log p - log q), d being that difference: the secant of exp."""
    near = d.abs() < torch.finfo(d.dtype).eps ** 0.25
    return torch.where(near, (p + q).mul_(d.square().div_(-24).add_(0.5)), (p - q).div_(d))


def _secants(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows: the secant of exp between the two log softmaxes, and that of log sum e^a."""
    a, b = _log_softmax(a), _log_softmax(b)
    p, q = a.exp(), b.exp()
    d = a.sub_(b).nan_to_num_(0.0, posinf=math.inf, neginf=-math.inf)  # both masked
    inner = _log_mean(p, q, d)
    total = inner.sum(-1, keepdim=True)
    return inner, inner / torch.where(total == 0, 1.0, total)


def _of_softmax(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    inner, outer = _secants(a, b)
    inner.mul_(g)
    return inner.sub_(outer.mul_(inner.sum(-1, keepdim=True)))


def _of_log_softmax(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return g - _secants(a, b)[1].mul_(g.sum(-1, keepdim=True))


def _of_log_sum(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return _secants(a, b)[1].mul_(g[:, :1])


def _by_rows(pair: Pair, dims: Sequence[int], g: torch.Tensor, share: Share) -> torch.Tensor:
    """A rule for rows, block by block, where the rows run along `dims`."""
    shape = pair.a[0].shape
    dims = [d % len(shape) for d in dims if len(shape)]
    order = [n for n in range(len(shape)) if n not in dims] + list(dims)
    length = math.prod(shape[d] for d in dims)
    a, b, g = (v.permute(order).reshape(-1, length) for v in (*pair.values(), g.expand(shape)))
    m = torch.empty_like(a)
    step = max(1, BLOCK // max(1, length))
    for n in range(0, len(a), step):
        at = slice(n, n + step)
        m[at] = share(a[at], b[at], g[at])
    back = sorted(range(len(shape)), key=order.__getitem__)
    return m.reshape([shape[n] for n in order]).permute(back)


def log_softmax(pair: Pair, g: Multipliers) -> Multipliers:
    """A - log sum e^a."""
    if g[0] is None:
        return [None]
    return [_by_rows(pair, [pair.case.args[1]], g[0], _of_log_softmax)]


def softmax(pair: Pair, g: Multipliers) -> Multipliers:
    """E to the power of log softmax."""
    if g[0] is None:
        return [None]
    return [_by_rows(pair, [pair.case.args[1]], g[0], _of_softmax)]


def logsumexp(pair: Pair, g: Multipliers) -> Multipliers:
    """Log sum e^a."""
    if g[0] is None:
        return [None]
    dims, keep = axes(pair)
    return [_by_rows(pair, dims, with_axes(g[0], dims, keep=keep), _of_log_sum)]
