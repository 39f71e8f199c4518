"""How is the part of a network up to its layers run faster than the network's own code runs it?

That part is traced once; batch norms go into convolutions, operations are fused and laid out for
the machine (torch.jit.freeze, optimize_for_inference). While it stands in, the network's modules
before the layers answer from what it put out, and everything from the layers on is the network
itself: gradients, tapes and hooks there are as ever. Its maps are compared with the plain ones
before its first use, and it is refused where they differ.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from med_gradcam.capture import Capture, capture_all
from med_gradcam.errors import CannotExplainError
from med_gradcam.secant.pair import run_all, share
from med_gradcam.secant.recorder import Recorder
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT, Memory, Score, Tail, record, stand_in

PROMISE = 1e-4  # how far a map may be from the plain one, as a share of its peak
CLOSE = 2e-5  # how far a HiResCAM map may be: room for methods that magnify what is off
KEPT = 4  # parts remembered per network; each holds a copy of the weights
BUILDING = 10.0  # what building a part costs, in forwards: two traces, eight runs

Run = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
# Each with the kinds of maps that were found equal.
_Parts = dict[Any, tuple["Part", set[bool | None]]]
_PARTS: weakref.WeakKeyDictionary[torch.nn.Module, _Parts] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A network's part up to the first of its layers, and its plain prediction, for one input size.

    `upto` gives the layer's output and then what else the rest needs of the modules before it;
    `memory` has these modules in the order in which they answer, with stand-ins of the right shape
    where the rest needs nothing of them (`needed` is False). `layer` is "" where the layer is the
    input itself.
    """

    shape: torch.Size
    layer: str
    upto: Run
    memory: tuple[Memory, ...]
    needed: tuple[bool, ...]
    whole: Run
    form: TreeSpec
    fixed: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Compare:
    """Which maps are compared before the first use.

    `choose` gives a target from the raw output; with a `reference` input maps of `secant`, whose
    multipliers do not jump where a ReLU opens, else of HiResCAM, whose gradients do: at an early
    layer rounding alone then moves a map by a percent at single voxels.
    """

    choose: Callable[[Any], Score]
    reference: torch.Tensor | None = None


class _Upto(torch.nn.Module):
    """What a trace is made of: the outputs of modules up to a layer."""

    def __init__(self, net: torch.nn.Module, layer: str, needed: Sequence[bool]) -> None:
        super().__init__()
        self.net, self.layer, self.needed = net, layer, needed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layer's output first."""
        found = record(self.net, [self.layer], x)
        memory = found.tails[self.layer].memory
        used = [m.output for m, needed in zip(memory, self.needed, strict=True) if needed]
        return (found.activations[self.layer], *_tensors(used))


class _Whole(torch.nn.Module):
    """What a trace is made of: the tensors of the raw output."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In the order of the output's leaves."""
        return tuple(_tensors(self.net(x.clone())))


def part(
    net: torch.nn.Module,
    layers: Sequence[str],
    x: torch.Tensor,
    compare: Compare | None = None,
    digest: str = "",
) -> tuple[Part, float]:
    """The fast part for inputs like `x` (n, C, I, J, K), and what it cost to make, in forwards.

    It is remembered as long as the network lives and its weights are untouched: `digest` is theirs,
    since not all that changes them leaves a trace in torch's version counters. `compare` says
    which maps must be the network's own; None where only predictions are wanted.

    Raises:
        CannotExplainError: the network cannot be traced, or its maps would differ.
    """
    parts = _PARTS.setdefault(net, {})
    state = tuple((t.data_ptr(), t._version) for t in net.state_dict(keep_vars=True).values())  # noqa: SLF001
    key = (digest, state, tuple(layers), x.shape, x.dtype, x.device)
    names = [name for name in layers if name != INPUT]
    spent = 0.0
    if key not in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trace warns of each shape that it takes as constant
            made = _made(net, layers, x)
        other = x.flip(2) * 0.7  # in case the trace has taken a decision for granted
        for given in (x, other):
            _same(_values(net, names, given, None), _values(net, names, given, made))
        parts[key] = made, set()
        spent += BUILDING
    made, proved = parts[key]
    kind = None if compare is None else compare.reference is None
    if compare is not None and names and kind not in proved:
        plain = _maps(net, names, x, compare)
        with standing_in(net, made):
            _same(plain, _maps(net, names, x, compare))
        proved.add(kind)
        spent += 2.0 if kind else 4.0
    for old in list(parts)[:-KEPT]:
        del parts[old]
    return made, spent


def _made(net: torch.nn.Module, layers: Sequence[str], x: torch.Tensor) -> Part:
    try:
        with torch.no_grad():
            output = net(x.clone())
            whole = _optimised(_Whole(net), x)
        leaves, form = tree_flatten(output)
        fixed = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        if INPUT in layers:
            return Part(x.shape, "", lambda _: (), (), (), whole, form, fixed)
        found = record(net, layers, x)
        first = next(iter(found.activations))
        tail = found.tails[first]
        needed = _needed(tail, found.activations[first])
        memory = tuple(
            m if used else replace(m, output=stand_in(m.output))
            for m, used in zip(tail.memory, needed, strict=True)
        )
        upto = _optimised(_Upto(net, first, needed), x)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotExplainError(
            "not fast",
            f"expected a network that can be traced for --fast, torch said: "
            f"{lines[0].strip().rstrip('.')}; run it without --fast.",
        ) from error
    return Part(x.shape, first, upto, memory, needed, whole, form, fixed)


def _optimised(module: torch.nn.Module, x: torch.Tensor) -> Run:
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), x, check_trace=False, strict=False)
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _needed(tail: Tail, activation: torch.Tensor) -> tuple[bool, ...]:
    """Which remembered outputs the rest of the network takes in, by autograd's own graph.

    What only decides (a mask, a place) has no gradient; the comparison of maps would show it.
    """
    tied = [replace(m, output=_tied(m.output)) for m in tail.memory]
    with torch.enable_grad():
        output = replace(tail, memory=tuple(tied)).run(activation)
        total = [t.sum() for t in _tensors(output) if t.requires_grad]
        leaves = [[t for t in _tensors(m.output) if t.requires_grad] for m in tied]
        flat = [t for several in leaves for t in several]
        grads: Sequence[Any] = [None] * len(flat)
        if total and flat:
            grads = torch.autograd.grad(torch.stack(total).sum(), flat, allow_unused=True)
    found = iter(grads)
    used = [sum(next(found) is not None for _ in several) > 0 for several in leaves]
    others = [any(not t.is_floating_point() for t in _tensors(m.output)) for m in tied]
    return tuple(a or b for a, b in zip(used, others, strict=True))


def _tied(value: Any) -> Any:
    """Each tensor as a leaf of a graph."""
    leaves, form = tree_flatten(value)
    made = [
        v.detach().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in leaves
    ]
    return tree_unflatten(made, form)


# ------------------------------------------------------------------------------- standing in


@contextmanager
def standing_in(net: torch.nn.Module, made: Part, *, whole: bool = False) -> Iterator[None]:
    """Within it, a call of the network runs the fast part; `whole`: nothing but the prediction."""
    real, missing = net.forward, object()
    before = net.__dict__.get("forward", missing)

    def forward(x: torch.Tensor) -> Any:
        if x.shape != made.shape or torch.is_grad_enabled():
            return real(x)
        return _predicted(made, x) if whole else _handed_over(net, made, x, real)

    if made.layer or whole:
        net.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            net.__dict__.pop("forward", None)
        else:
            net.__dict__["forward"] = before


def _predicted(made: Part, x: torch.Tensor) -> Any:
    """The raw output, its tensors from the fast part."""
    tensors = iter(made.whole(x))
    leaves = [next(tensors) if value is None else value for value in made.fixed]
    return tree_unflatten(leaves, made.form)


def _handed_over(net: torch.nn.Module, made: Part, x: torch.Tensor, real: Run) -> Any:
    """The raw output: the fast part up to the layer, the network's own code from there."""
    recorders = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, Recorder)]
    with _disable_current_modes():
        activation, *others = made.upto(x)
    for recorder in recorders:  # there is a path from the input to each of them
        for tensor in (activation, *others):
            recorder.derived(tensor, x)
    handed = iter(others)
    memory = []
    for m, needed in zip(made.memory, made.needed, strict=True):
        leaves, form = tree_flatten(m.output)
        if needed:
            leaves = [next(handed) if isinstance(v, torch.Tensor) else v for v in leaves]
        memory.append(replace(m, output=tree_unflatten(leaves, form)))
    with Tail(net, made.layer, x, tuple(memory)).replay(activation):
        return real(x)


def _same(plain: Mapping[str, torch.Tensor], fast: Mapping[str, torch.Tensor]) -> None:
    for name, values in plain.items():
        peak = float(values.abs().max())
        off = float((values - fast[name]).abs().max())
        if not off <= CLOSE * peak:
            raise CannotExplainError(
                "not fast",
                f"expected --fast to give the network's own maps within {PROMISE:g} of their "
                f"peak, which takes {CLOSE:g} in a first map, at {name} it is "
                f"{off / max(peak, 1e-30):.1e} off; run it without --fast.",
            )


def _values(
    net: torch.nn.Module, names: Sequence[str], x: torch.Tensor, made: Part | None
) -> dict[str, torch.Tensor]:
    """Activations at the layers, and the output's tensors."""
    with standing_in(net, made) if made else nullcontext():
        found = record(net, names, x, names)
    output = found.output
    if made:
        with standing_in(net, made, whole=True), torch.no_grad():
            output = net(x)
    rows = {f"the layer {name!r}": found.activations[name] for name in names}
    return rows | {f"output {n}": t for n, t in enumerate(_tensors(output))}


def _maps(
    net: torch.nn.Module, names: Sequence[str], x: torch.Tensor, compare: Compare
) -> dict[str, torch.Tensor]:
    """Maps (n, i, j, k) at the layers: of `secant` against a reference, else of HiResCAM."""
    made: dict[str, torch.Tensor]
    if compare.reference is not None:
        with suppress(NoRuleError):
            made = _secant_maps(net, names, (x, compare.reference), compare.choose)
            return {f"the layer {name!r}": made[name] for name in names}
    _, found = capture_all(net, names, x, lambda output: [[compare.choose(output)]] * len(x))
    return {
        f"the layer {name!r}": torch.stack([_hirescam(one[0][name]) for one in found])
        for name in names
    }


def _secant_maps(
    net: torch.nn.Module,
    names: Sequence[str],
    inputs: tuple[torch.Tensor, torch.Tensor],
    choose: Callable[[Any], Score],
) -> dict[str, torch.Tensor]:
    chosen: list[Score] = []

    def same(output: Any) -> list[Score]:
        if not chosen:
            with _disable_current_modes():  # which target is meant is no part of the network
                chosen.append(choose(output))
        return chosen

    (case,), (other,) = (run_all(net, names, given, same) for given in inputs)
    shared = share(case, other, names)
    return {name: shared.evidence(name) for name in names}


def _hirescam(seen: Capture) -> torch.Tensor:
    return (seen.activation * seen.gradient()).sum(0)
