"""A function and two inputs: how far is the change shared out from the change there was?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from med_gradcam.secant.pair import Run, Shared, run, share
from med_gradcam.secant.recorder import Recorder
from med_gradcam.secant.sweep import sweep
from med_gradcam.secant.tape import tensors
from med_gradcam.tail import INPUT, at_rest

Tensors = Sequence[torch.Tensor]


# ---------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Sums:
    """Of one function: the change that was given to its arguments, and that of its outputs.

    `scale` is the sum of the sizes of the output's changes, `size` that of the outputs; `called`
    are the operations written down.
    """

    shared: float
    changed: float
    scale: float
    size: float
    called: frozenset[str]
    multipliers: list[torch.Tensor | None]

    def off(self) -> float:
        """How far the sums are apart, as a share of the change, beyond the outputs' rounding."""
        beyond = abs(self.shared - self.changed) - 1e-14 * self.size
        return max(0.0, beyond) / self.scale if self.scale else max(0.0, beyond)


def sums(function: Callable[..., Any], case: Tensors, reference: Tensors, seed: int = 0) -> Sums:
    """`function` on two lists of tensors, for random multipliers of all that it puts out."""
    tapes, numbers, outs = [], [], []
    for given in (case, reference):
        recorder = Recorder()
        mine = [tensor.detach() for tensor in given]
        numbers = [recorder.leaf(tensor, active=True) for tensor in mine]
        with torch.no_grad(), recorder:
            made = [t for t in tensors((function(*mine),)) if t.is_floating_point()]
            places = [recorder.find(tensor) for tensor in made]
        tapes.append(recorder.tape)
        outs.append([tensor.clone() for tensor in made])
    torch.manual_seed(seed)
    g = [torch.randn_like(tensor) for tensor in outs[0]]
    called = frozenset(entry.func.overloadpacket.__name__ for entry in tapes[0].entries)
    known: dict[int, torch.Tensor] = {}
    for place, one in zip(places, g, strict=True):
        if place in tapes[0].active:
            known[place] = known[place] + one if place in known else one
    with torch.no_grad():
        found = sweep(tapes[0], tapes[1], known, numbers, frozenset())
    shared = sum(
        float((found[n].double() * (a.double() - b.double())).sum())
        for n, a, b in zip(numbers, case, reference, strict=True)
        if n in found
    )
    changes = [
        w.double() * (a.double() - b.double()) for w, a, b in zip(g, outs[0], outs[1], strict=True)
    ]
    sizes = [w * (a.abs() + b.abs()) for w, a, b in zip(g, outs[0], outs[1], strict=True)]
    changed, scale, size = (
        sum(float(torch.where(t.isfinite(), t, 0.0).sum()) for t in several)  # -inf that stays
        for several in (changes, [c.abs() for c in changes], [s.abs() for s in sizes])
    )
    return Sums(shared, changed, scale, size, called, [found.get(n) for n in numbers])


# ---------------------------------------------------------------------------------- networks


class Function(nn.Module):
    """A function of the input and of some modules, as a network."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.parts)


def weighted(output: Any) -> Callable[[Any], torch.Tensor]:
    """A score (n,): all floats that the network puts out, each times a fixed random number."""
    del output

    def score(output: Any) -> torch.Tensor:
        found = [t for t in tensors((output,)) if t.is_floating_point()]
        generator = torch.Generator().manual_seed(5)
        total = torch.zeros(len(found[0]), dtype=torch.float64)
        for t in found:
            weights = torch.randn(t.shape[1:], dtype=torch.float64, generator=generator)
            total = total + (t.double() * weights).flatten(1).sum(1)
        return total

    return score


def both(
    net: nn.Module,
    x: torch.Tensor,
    reference: torch.Tensor,
    layers: Sequence[str] = (INPUT,),
    choose: Callable[[Any], Callable[[Any], torch.Tensor]] = weighted,
    *,
    cut: bool = False,
) -> tuple[Run, Run]:
    """The network run for both, written down."""
    with at_rest(net):
        return (
            run(net, layers, x, choose, cut=cut),
            run(net, layers, reference, choose, cut=cut),
        )


def shared(
    net: nn.Module,
    x: torch.Tensor,
    reference: torch.Tensor,
    layers: Sequence[str] = (INPUT,),
    choose: Callable[[Any], Callable[[Any], torch.Tensor]] = weighted,
) -> Shared:
    """The score's change shared out at some layers."""
    return share(*both(net, x, reference, layers, choose), layers)


def off(found: Shared, layer: str = INPUT) -> float:
    """How far the evidence at a layer is from the score's change, relative to that; at worst.

    Fails where the score has hardly moved, for then it proves nothing.
    """
    z, z0 = found.case.score.double(), found.reference.score.double()
    change = z - z0
    half = found.case.activations[layer].dtype in (torch.float16, torch.bfloat16)
    rounding = 1e-2 if half else 1e-4
    assert bool((change.abs() > rounding * torch.maximum(z.abs(), z0.abs())).all()), (z, z0)
    assert bool(found.multipliers[layer].isfinite().all())
    sums = found.evidence(layer).reshape(len(z), -1).sum(1)
    return float(((sums - change).abs() / change.abs()).max())


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
