"""What share of a function's change is due to its argument, element by element?

The quotient (f(a) - f(a0)) / (a - a0): exact, and where nothing changed the derivative or 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from med_gradcam.secant.rules import Multipliers, Pair, Rule, over_change

Secant = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _first(out: Any) -> torch.Tensor:
    found: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found


def _outputs(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    case, reference = (
        _first(pair.run(entry, [seen.of() for seen in entry.tensors]))
        for entry in (pair.case, pair.reference)
    )
    return case, reference


def _slope(pair: Pair, at: torch.Tensor) -> torch.Tensor:
    rest = [seen.of() for seen in pair.a[1:]]
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(_first(pair.run(pair.case, [point, *rest])).sum(), point)
    return slope


def _rest(pair: Pair, m: torch.Tensor) -> Multipliers:
    return [m, *[None] * (len(pair.a) - 1)]


def kinked(pair: Pair, g: Multipliers) -> Multipliers:
    """Piecewise linear functions: their differences are exact however small.

    Where nothing changed any multiplier is right; it is 0.
    """
    if g[0] is None:
        return [None] * len(pair.a)
    f, f0 = _outputs(pair)
    return _rest(pair, over_change(f - f0, *pair.values()).mul_(g[0]))


def smooth(pair: Pair, g: Multipliers) -> Multipliers:
    """Functions that bend.

    Too close for a good quotient: the slope half-way, which is right to the third order, wherever
    it gives the same change up to the rounding of f.
    """
    if g[0] is None:
        return [None] * len(pair.a)
    f, f0 = _outputs(pair)
    a, b = pair.values()
    d, change = a - b, f - f0
    ratio = change / d
    eps = torch.finfo(d.dtype).eps
    near = d.abs() <= eps ** (1 / 3) / 2
    if bool(near.any()):
        slope = _slope(pair, (a + b) / 2)
        rounding = 4 * eps * torch.maximum(f.abs(), f0.abs())
        same = near & ((slope * d - change).abs() <= rounding)
        ratio = torch.where(same, slope, ratio).masked_fill_((d == 0) & ~slope.isfinite(), 0.0)
    return _rest(pair, ratio.mul_(g[0]))


def closed(secant: Secant) -> Rule:
    """A function whose difference quotient has a closed form without cancellation."""

    def rule(pair: Pair, g: Multipliers) -> Multipliers:
        if g[0] is None:
            return [None] * len(pair.a)
        a, b = pair.values()
        m = g[0] * secant(a, b)
        wrong = ~m.isfinite()
        if bool(wrong.any()):  # at the edge of the domain: no change, or one that does not count
            m = m.masked_fill(wrong & ((a == b) | (g[0] == 0)), 0.0)
        return _rest(pair, m)

    return rule


def exp_secant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(e^a - e^b) / (a - b); 0 where both are -inf."""
    d = (a - b).abs()
    # From the larger one, so that nothing overflows that the network itself did not.
    return torch.exp(torch.maximum(a, b)) * torch.where(a == b, 1.0, -torch.expm1(-d) / d)


def log_secant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(log a - log b) / (a - b)."""
    d = a - b
    return torch.where(d == 0, 1 / b, torch.log1p(d / b) / d)


def root_secant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a^1/2 - b^1/2) / (a - b)."""
    return 1 / (a.sqrt() + b.sqrt())


def rsqrt_secant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a^-1/2 - b^-1/2) / (a - b)."""
    root_a, root_b = a.sqrt(), b.sqrt()
    return -1 / root_a / root_b / (root_a + root_b)


def reciprocal_secant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(1/a - 1/b) / (a - b)."""
    return -1 / a / b


_POWERS: dict[float, Secant] = {
    2: torch.add,
    3: lambda a, b: a * a + a * b + b * b,
    0.5: root_secant,
    -0.5: rsqrt_secant,
    -1: reciprocal_secant,
}


def power(pair: Pair, g: Multipliers) -> Multipliers | None:
    """A to a fixed power."""
    secant = _POWERS.get(float(pair.argument(1, "exponent")))
    return smooth(pair, g) if secant is None else closed(secant)(pair, g)
