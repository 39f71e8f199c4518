"""How is the network run for one scan, so that a method has what it needs, and no more?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from med_gradcam import gradient_free
from med_gradcam.capture import Capture, capture, captures, outputs
from med_gradcam.graph import Trace
from med_gradcam.secant import pair
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import Tail, check_repeats, record
from med_gradcam.target import Target

Pick = Callable[[Any], Target]
Picks = Callable[[Any], list[Target]]
# Share of the score's change that may get lost where the graph says that none can.
LOST = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """One scan at some layers: a capture each, the target, and what it cost in forwards."""

    found: dict[str, Capture]
    target: Target
    forwards: float


def direct(net: torch.nn.Module, layer: str, x: torch.Tensor, pick: Pick) -> Observed:
    """One prediction, with the gradient at one layer: for methods that look at the scan alone."""
    chosen: list[Target] = []

    def choose(output: Any) -> Target:
        chosen.append(pick(output))
        return chosen[0]

    _, found = capture(net, layer, x, choose)
    found.passes = 1.0  # the backward of the tail
    return Observed({layer: found}, chosen[0], 1.0)


def recorded(
    net: torch.nn.Module,
    layers: Sequence[str],
    inputs: tuple[torch.Tensor, torch.Tensor | None],
    pick: Pick,
    *,
    check: bool = True,
    cuts: Collection[str] = (),
) -> Observed:
    """Predictions of the scan and the reference that remember what the tails need.

    `check` repeats the scan; `cuts`: layers that every path is known to pass through.
    """
    x, reference = inputs
    here = record(net, layers, x, cuts)
    target = pick(here.output)
    if check:  # noise before the layer would hide in what is remembered
        with gradient_free.afresh(net):
            again = target(outputs(net, x))
        check_repeats(x, float(target(here.output)[0]), float(again[0]))
    # Of the reference only activations are asked for.
    there = None if reference is None else record(net, layers, reference, layers)
    return Observed(captures(here, target, there), target, 1.0 + check + (there is not None))


Wanted = tuple[Sequence[str], bool, Sequence[Target]]  # layers, whether they are a cut, targets


@dataclass(slots=True, eq=False)
class Known:
    """What the earlier scans of one call have shown, so that the next need not show it again.

    `repeats`: the network gives one scan the same score twice. `runs`: those of the last reference,
    for what was `wanted` of it, one per target; they hold all that lies behind the layers.
    """

    repeats: bool = False
    reference: torch.Tensor | None = None
    wanted: Wanted = ((), False, ())
    runs: Sequence[pair.Run] = ()

    def of(self, reference: torch.Tensor, wanted: Wanted) -> list[pair.Run]:
        """The runs of a reference, one per target; empty where they are not known."""
        (layers, cut, targets), (names, was_cut, before) = wanted, self.wanted
        if self.reference is None or (list(names), was_cut) != (list(layers), cut):
            return []
        if len(before) != len(targets) or not all(map(same_target, before, targets)):
            return []
        return _copies(self.runs) if torch.equal(self.reference, reference) else []

    def keep(self, reference: torch.Tensor, wanted: Wanted, runs: Sequence[pair.Run]) -> None:
        """Remember the runs of a reference in place of those before."""
        self.reference, self.wanted, self.runs = reference, wanted, _copies(runs)


def _copies(runs: Sequence[pair.Run]) -> list[pair.Run]:
    """A sweep uses up the entries of its tape."""
    return [replace(one, tape=replace(one.tape, entries=[*one.tape.entries])) for one in runs]


def same_target(one: Target, other: Target) -> bool:
    """Whether two targets are known to read the same number; regions may differ by the scan."""
    placed = one.region is not None or other.region is not None
    return one is other or (not placed and one.function is other.function and one == other)


@dataclass(frozen=True, slots=True)
class Pairing:
    """How a pair is run: `cut` takes the layers as one cut together; `check` repeats the scan.

    `known`: what earlier scans have shown; None where there will be no other.
    """

    cut: bool = False
    check: bool = True
    known: Known | None = None


def paired(
    net: torch.nn.Module,
    layers: Sequence[str],
    inputs: tuple[torch.Tensor, torch.Tensor],
    picks: Picks,
    traced: Trace,
    how: Pairing = Pairing(),
) -> list[Observed]:
    """The scan and the reference written down, and each target's change shared out.

    Raises:
        NoRuleError: an operation has no rule; another method must take over.
    """
    x, reference = inputs
    chosen: list[Target] = []

    def choose(output: Any) -> list[Target]:
        if not chosen:
            # Which target is meant is read from the output; that is no part of the network.
            with torch.utils._python_dispatch._disable_current_modes():  # noqa: SLF001
                chosen.extend(picks(output))
        return chosen

    cases = pair.run_all(net, layers, x, choose, cut=how.cut)
    check = how.check and not (how.known and how.known.repeats)
    again = outputs(net, x) if check else None
    others = how.known.of(reference, (layers, how.cut, chosen)) if how.known else []
    forwards = 1.0 + check + (not others)
    if not others:
        others = pair.run_all(net, layers, reference, choose, cut=how.cut)
        if how.known:
            how.known.keep(reference, (layers, how.cut, [*chosen]), others)
    rests = cases[0].rests
    tails = {name: Tail(net, name, x, (), rest=rests.get(name)) for name in layers}
    made = []
    for target in chosen:
        case, other = cases.pop(0), others.pop(0)
        if check:
            check_repeats(x, float(case.score[0]), float(target(again)[0]))
        shared = _shared(case, other, layers, cut=how.cut)
        found = {name: _seen(tail, shared, target, reference) for name, tail in tails.items()}
        backward = max(traced.tail_share(name) for name in layers)
        made.append(Observed(found, target, forwards + backward))
        forwards = 0.0
    if how.known and check:
        how.known.repeats = True
    return made


def _shared(case: pair.Run, other: pair.Run, layers: Sequence[str], *, cut: bool) -> pair.Shared:
    """The change shared out at the layers, and checked to be all of it where it must be."""
    whole = not case.tape.passes_by(layers)
    shared = pair.share(case, other, layers)
    beside = shared.beside
    sums = {name: float(shared.evidence(name).sum()) + beside.get(name, 0.0) for name in layers}
    complete = [total for name, total in sums.items() if not shared.avoided[name]]
    if cut:
        complete = [sum(sums.values())] if whole else []
    _check_nothing_lost(shared, complete)
    return shared


def cost(capture: Capture, traced: Trace) -> float:
    """What a capture's tail and whole runs cost, in forwards."""
    own = capture.passes * traced.tail_share(capture.layer) + capture.forwards
    return own if capture.beside is None else own + cost(capture.beside, traced)


def _seen(tail: Tail, shared: pair.Shared, target: Target, reference: torch.Tensor) -> Capture:
    """The capture of a pair at one layer."""
    case, other = shared.case, shared.reference
    return Capture(
        tail.layer,
        case.activations[tail.layer][0],
        target,
        float(case.score[0]),
        tail,
        other.activations[tail.layer][0],
        float(other.score[0]),
        reference_input=reference,
        shared=shared,
    )


def _check_nothing_lost(shared: pair.Shared, sums: Sequence[float]) -> None:
    """Each of these sums must be the score's change."""
    scores = [float(run.score[0]) for run in (shared.case, shared.reference)]
    change = scores[0] - scores[1]
    rounding = 100 * torch.finfo(shared.case.score.dtype).eps * max(*map(abs, scores), 1.0)
    if any(abs(total - change) > max(LOST * abs(change), rounding) for total in sums):
        raise NoRuleError("an operation that loses part of the change")
