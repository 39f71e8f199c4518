"""What share of an operation's change is due to each of its inputs: the exact rules of `secant`.

An operation took in a (the case) and a0 (the reference) and put out f and f0. For multipliers g of
its outputs a rule gives multipliers m of its inputs with sum m (a - a0) = sum g (f - f0), exactly:

- linear: the transpose of the operation;
- elementwise f: (f(a) - f(a0)) / (a - a0) (elementwise.py);
- product a b: m_a = g (b + b0) / 2, m_b = g (a + a0) / 2, for matrix products likewise; quotient
  f = a / b: the same for the product f b = a;
- maximum over a window, with cross = max(max a, max a0): cross - max a0 goes to the place where a
  is largest, max a - cross to the place where a0 is.

Norms, softmax and the like are written in these (reductions.py, softmax.py).

Source: the rescale and linear rules of DeepLIFT (Shrikumar et al., ICML 2017, arXiv:1704.02685)
carried to feature space, and completed for maxima, products and norms; the symmetric product rule
is Shapley's value for two players. Two networks that compute the same function by other operations
may get other multipliers (compare AttnLRP, arXiv:2402.05602).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from med_gradcam.secant.tape import NOTHING, Entry, Seen, aten, name_of, put

Multipliers = list[torch.Tensor | None]
Rule = Callable[["Pair", Multipliers], Multipliers | None]  # None: by its parts, please


# How a message ends where change came in by another way than the input.
FROM_OUTSIDE = (
    "with a value that no operation on the input has made and that is not the same for scan and "
    "reference (noise, or numbers that left the network and came back)"
)


def outside(name: str) -> str:
    """The message for an operation where change came in by another way than the input."""
    return f"{name} {FROM_OUTSIDE}"


def chosen(choice: str, name: str) -> str:
    """The message for an operation that takes in what an operation before it has chosen."""
    return (
        f"{choice}, whose result (a mask, a place or the like) is not the same for scan "
        f"and reference and goes into {name}"
    )


class NoRuleError(Exception):
    """An operation whose change cannot be shared out; the message names it."""


@dataclass(slots=True, eq=False)
class Pair:
    """One operation as it ran for the case and for the reference."""

    case: Entry
    reference: Entry
    active: Collection[int]
    choices: Mapping[int, str] = field(default_factory=dict)
    a: tuple[Seen, ...] = field(init=False)
    b: tuple[Seen, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.a, self.b = self.case.tensors, self.reference.tensors

    @property
    def name(self) -> str:
        """The operation's name."""
        return name_of(self.case.func)

    @property
    def packet(self) -> str:
        """The operation's bare name."""
        return str(self.case.func.overloadpacket.__name__)

    def counts(self, place: int) -> bool:
        """Whether the tensor argument at a place descends from the layer."""
        return self.a[place].number in self.active

    def values(self, place: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor argument of the case and of the reference."""
        return self.a[place].of(), self.b[place].of()

    def mean(self, place: int) -> torch.Tensor:
        """The mean of a factor in case and reference; itself where it is the same in both."""
        a = self.a[place].of()
        if self.a[place].number == NOTHING or not self.a[place].dtype.is_floating_point:
            return a
        return (a + self.b[place].of()) / 2

    def sides(self) -> list[tuple[int | None, Any]]:
        """The first two arguments: the place among the tensors, or None and the number."""
        places = {id(seen): n for n, seen in enumerate(self.a)}
        return [
            (places[id(arg)], None) if isinstance(arg, Seen) else (None, arg)
            for arg in self.case.args[:2]
        ]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument that is no tensor, by its place or name."""
        args = self.case.args
        return args[place] if place < len(args) else self.case.kwargs.get(name, default)

    def run(self, entry: Entry, tensors: Sequence[torch.Tensor]) -> Any:
        """The operation once more with other tensors in place of its own."""
        given = iter(tensors)

        def change(value: Any) -> Any:
            return next(given) if isinstance(value, Seen) else value

        args = put(entry.args, change)
        return entry.func(*args, **{k: put(v, change) for k, v in entry.kwargs.items()})


# ---------------------------------------------------------------------------------- linear


def linear(pair: Pair, g: Multipliers) -> Multipliers:
    """The operation's own transpose, by autograd at any point."""
    places = [n for n in range(len(pair.a)) if pair.counts(n)]
    values = [seen.of() for seen in pair.a]
    with torch.enable_grad():
        for n in places:
            values[n] = values[n].detach().requires_grad_()
        out = pair.run(pair.case, values)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        known = [(o, w) for o, w in zip(outs, g, strict=True) if w is not None and o.requires_grad]
        found: Multipliers = [None] * len(pair.a)
        if known:
            try:
                transposed = torch.autograd.grad(
                    [o for o, _ in known],
                    [values[n] for n in places],
                    [w.to(o.dtype) for o, w in known],
                    allow_unused=True,
                )
            except RuntimeError as error:  # torch has no transpose of it, or not for these shapes
                raise NoRuleError(f"{pair.name} ({error})") from None
            for n, m in zip(places, transposed, strict=True):
                found[n] = m
    return found


def ordered(pair: Pair, g: Multipliers) -> Multipliers:
    """A sort, or the largest few, where the order is the same for case and reference."""
    if not torch.equal(pair.case.kept[1].of(), pair.reference.kept[1].of()):
        raise NoRuleError(f"{pair.name}, whose order is not the same for scan and reference")
    return linear(pair, g)


def placed(pair: Pair, g: Multipliers) -> Multipliers | None:
    """Values put into places of a tensor; what is fixed of the two must not have changed.

    Fixed are constants and what a choice has made. Only where it counts: a new buffer holds
    whatever was in its memory until it is filled.
    """
    if pair.case.kept and g[0] is not None:
        (a,), (b,) = ((seen.of().flatten() for seen in e.kept) for e in (pair.case, pair.reference))
        changed = (g[0].flatten() != 0) & (a != b)
        inside = torch.zeros_like(changed)
        inside[pair.a[1].of()] = True
        for seen, where in ((pair.a[0], ~inside), (pair.a[2], inside)):
            choice = pair.choices.get(seen.number)
            if (seen.number == NOTHING or choice) and bool((changed & where).any()):
                raise NoRuleError(chosen(choice, pair.name) if choice else outside(pair.name))
    return written(2)(pair, g)


def written(place: int) -> Rule:
    """Values (at `place` among the tensors, or the last one) written to places that an index names.

    Linear, but torch's transpose takes no notice of two values that go to one place.
    """

    def rule(pair: Pair, g: Multipliers) -> Multipliers:
        n = place % len(pair.a)
        if pair.counts(n) and pair.argument(3, "accumulate") is not True:
            _once(pair, n)
        # The transpose of max_unpool takes no other layout.
        return linear(pair, [None if m is None else m.contiguous() for m in g])

    return rule


def _once(pair: Pair, place: int) -> None:
    """Each value that is written stays.

    Raises:
        NoRuleError: one overwrites another.
    """
    given = [seen.of() for seen in pair.a]
    given = [v.new_zeros(v.shape).double() if v.is_floating_point() else v for v in given]
    count = given[place].numel()
    numbers = torch.arange(1.0, count + 1, dtype=torch.float64, device=given[place].device)
    given[place] = numbers.reshape(given[place].shape)
    landed = torch.bincount(pair.run(pair.case, given).flatten().long(), minlength=count + 1)[1:]
    with torch.enable_grad():
        given[place] = torch.ones_like(given[place]).requires_grad_()
        out = pair.run(pair.case, given)
        (sent,) = torch.autograd.grad(out, given[place], torch.ones_like(out))
    if not torch.equal(landed.double(), sent.flatten()):
        raise NoRuleError(f"{pair.name}, which writes several values to one place")


def reshaped(pair: Pair, g: Multipliers) -> Multipliers:
    """Views and copies that keep the order of the values."""
    return [None if g[0] is None else g[0].reshape(pair.a[0].shape).to(pair.a[0].working)]


def permuted(pair: Pair, g: Multipliers) -> Multipliers:
    """A permutation of axes."""
    order = pair.case.args[1]
    back = sorted(range(len(order)), key=lambda n: order[n] % len(order))
    return [None if g[0] is None else g[0].permute(back)]


def summed_to(g: torch.Tensor, like: Seen) -> torch.Tensor:
    """The multiplier of a tensor that was broadcast."""
    return (g if g.shape == like.shape else g.sum_to_size(like.shape)).to(like.working)


def added(pair: Pair, g: Multipliers) -> Multipliers:
    """A + alpha b, a - alpha b, b - alpha a: broadcast undone."""
    if g[0] is None:
        return [None] * len(pair.a)
    alpha = pair.argument(2, "alpha", default=1)
    weights = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}
    found: Multipliers = [None] * len(pair.a)
    for (n, _), weight in zip(pair.sides(), weights[pair.packet], strict=True):
        if n is not None and pair.counts(n):
            found[n] = summed_to(g[0] if weight == 1 else g[0] * weight, pair.a[n])
    return found


def copied(pair: Pair, g: Multipliers) -> Multipliers:
    """copy(a, b), fill(a, b): b in a's place, broadcast."""
    found: Multipliers = [None] * len(pair.a)
    if g[0] is not None and len(pair.a) > 1:
        found[1] = summed_to(g[0], pair.a[1])
    return found


# ---------------------------------------------------------------------------------- products


def product(pair: Pair, g: Multipliers) -> Multipliers:
    """A b, elementwise with broadcasting: each side at the other's mean of case and reference."""
    if g[0] is None:
        return [None] * len(pair.a)
    found: Multipliers = [None] * len(pair.a)
    sides = pair.sides()
    for (n, _), (other, number) in (sides, sides[::-1]):
        if n is not None and pair.counts(n):
            factor = number if other is None else pair.mean(other)
            found[n] = summed_to(g[0] * factor, pair.a[n])
    return found


def quotient(pair: Pair, g: Multipliers) -> Multipliers:
    """A / b.

    For b of one sign f = a / b is what solves the product f b = a, whose rule, with the means of f
    and b, gives change(f) = (change(a) - mean(f) change(b)) / mean(b): no small b alone makes it
    large. Otherwise: the product of a and 1 / b.
    """
    if g[0] is None:
        return [None] * len(pair.a)
    found: Multipliers = [None] * len(pair.a)
    (upper, above), (lower, below) = pair.sides()
    if lower is None:
        return [g[0] / below]
    (b, b0), middle = pair.values(lower), pair.mean(lower)
    same = (b > 0) == (b0 > 0)
    if upper is not None and pair.counts(upper):
        m = torch.where(same, g[0] / middle, (g[0] / b + g[0] / b0) / 2)
        found[upper] = summed_to(m, pair.a[upper])
    if pair.counts(lower):
        a, a0 = (above, above) if upper is None else pair.values(upper)
        slope = torch.where(same, (a / b + a0 / b0) / 2 / middle, (a + a0) / 2 / b / b0)
        found[lower] = summed_to(-g[0] * slope, pair.a[lower])
    return found


def matrix_product(first: int) -> Rule:
    """A @ b; `first` is the place of a (behind a bias)."""

    def rule(pair: Pair, g: Multipliers) -> Multipliers:
        found: Multipliers = [None] * len(pair.a)
        if g[0] is None:
            return found
        beta, alpha = pair.case.kwargs.get("beta", 1), pair.case.kwargs.get("alpha", 1)
        scaled = g[0] if alpha == 1 else g[0] * alpha
        if pair.counts(first):
            found[first] = scaled @ pair.mean(first + 1).transpose(-1, -2)
        if pair.counts(first + 1):
            found[first + 1] = pair.mean(first).transpose(-1, -2) @ scaled
        if first and pair.counts(0):
            found[0] = summed_to(g[0] if beta == 1 else g[0] * beta, pair.a[0])
        return found

    return rule


def convolution(pair: Pair, g: Multipliers) -> Multipliers:
    """A convolution: a product of input and weights, each at the other's mean."""
    found: Multipliers = [None] * len(pair.a)
    if g[0] is None:
        return found
    wanted = [n < len(pair.a) and pair.counts(n) for n in range(3)]
    x, weight = (
        pair.mean(n) if wanted[1 - n] else g[0].new_empty(1).expand(pair.a[n].shape) for n in (0, 1)
    )
    sizes = [pair.a[1].shape[0]] if wanted[2] else None
    args = pair.case.args[3:9]
    all_three = aten.convolution_backward(g[0], x, weight, sizes, *args, wanted)
    return list(all_three)[: len(pair.a)]


# ---------------------------------------------------------------------------------- choices


def larger(pair: Pair, g: Multipliers) -> Multipliers:
    """maximum(a, b), minimum(a, b): a maximum over a window of two."""
    if g[0] is None:
        return [None] * len(pair.a)
    sign = -1 if "min" in pair.packet else 1
    a, b = (
        sign * torch.stack(torch.broadcast_tensors(*[one.of() for one in seen]))
        for seen in (pair.a, pair.b)
    )
    m = cross(a, b, (a.max(0, keepdim=True), b.max(0, keepdim=True)), (g[0][None], 0))
    return [summed_to(m[n], pair.a[n]) if pair.counts(n) else None for n in (0, 1)]


def cross(
    a: torch.Tensor, b: torch.Tensor, best: tuple[Any, Any], what: tuple[torch.Tensor, int]
) -> torch.Tensor:
    """Multipliers (shape of a) of a maximum over one axis or over windows that may overlap.

    `best`: (values, places along the axis) of the case and of the reference; `what`: (g, axis).
    Values, places and g have the axis in the length of what was put out.
    """
    g, axis = what
    (top, at), (top0, at0) = best
    high = torch.maximum(top, top0)
    share = torch.zeros_like(a)
    share.scatter_add_(axis, at, g * (high - top0))
    share.scatter_add_(axis, at0, g * (top - high))
    return over_change(share, a, b)


def over_change(share: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Share / (a - b), 0 where nothing changed; `share` is used up and is 0 there."""
    # The least normal number changes no difference that matters, and spares a mask.
    m = share.div_((a - b).add_(torch.finfo(a.dtype).tiny))
    return m.masked_fill_(a == b, 0.0) if bool(m.sum().isnan()) else m  # inf - inf


# ---------------------------------------------------------------------------------- axes


def axes(pair: Pair) -> tuple[list[int], bool]:
    """The axes that are reduced, and whether they stay as axes of length 1."""
    ndim = len(pair.a[0].shape)
    given = pair.argument(1, "dim")
    dims = [given] if isinstance(given, int) else list(given or range(ndim))
    keep = pair.argument(2, "keepdim", default=False)
    return sorted(d % ndim for d in dims if ndim), bool(keep)


def with_axes(g: torch.Tensor, dims: Sequence[int], *, keep: bool) -> torch.Tensor:
    """The multipliers of what was put out, with the reduced axes as axes of length 1."""
    for d in () if keep else dims:
        g = g.unsqueeze(d)
    return g
