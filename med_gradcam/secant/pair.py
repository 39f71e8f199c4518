"""How is a score's change from the reference shared out over the cells of a layer, exactly?

The network runs for the case and for the reference; one sweep backwards over both tapes applies
each operation's rule (rules.py). At every layer that all paths pass through, the sum over
cells of activation change times multiplier is the score's change, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from med_gradcam.errors import CannotExplainError
from med_gradcam.forms import Form, form_of
from med_gradcam.secant.recorder import recorder as new_recorder
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.secant.sweep import sweep
from med_gradcam.secant.tape import NOTHING, Tape
from med_gradcam.tail import INPUT, Score


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One forward written down: raw output, score (n,), each layer's activation, the tape.

    `forms`: how layers' outputs are seen as cells, and `rests` what of them has no place, where
    they are not (n, C, i, j, k) themselves.
    """

    output: Any
    score: torch.Tensor
    activations: dict[str, torch.Tensor]
    tape: Tape
    forms: Mapping[str, Form] = field(default_factory=dict)
    rests: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """A case and its reference at some layers.

    `multipliers[layer]` has the shape of the activations (n, C, i, j, k); evidence is their product
    with the change of the activation. `avoided` says of each layer whether a path avoids it, `past`
    whether part of the change is not in its cells: for that, or for tokens without a place, whose
    change `beside` has. Where all layers cut the network together, only the sum over all of them is
    the score's change.
    """

    case: Run
    reference: Run
    multipliers: dict[str, torch.Tensor]
    past: dict[str, bool]
    avoided: dict[str, bool]
    beside: dict[str, float]

    def evidence(self, layer: str) -> torch.Tensor:
        """Signed evidence (n, i, j, k) float64 at a layer."""
        change = self.case.activations[layer].double() - self.reference.activations[layer].double()
        return (change * self.multipliers[layer].double()).sum(1)


def run(
    net: torch.nn.Module,
    layers: Sequence[str],
    x: torch.Tensor,
    choose: Callable[[Any], Score],
    *,
    cut: bool = False,
) -> Run:
    """One forward of x (n, C, I, J, K), written down from the input on.

    Behind the layers the values are kept. `cut`: each layer is cut off from what comes before it,
    so that several together share the change between them.

    Raises:
        CannotExplainError: a layer never runs, or runs twice.
    """
    return run_all(net, layers, x, lambda output: [choose(output)], cut=cut)[0]


def run_all(
    net: torch.nn.Module,
    layers: Sequence[str],
    x: torch.Tensor,
    choose: Callable[[Any], Sequence[Score]],
    *,
    cut: bool = False,
) -> list[Run]:
    """As `run`, for several scores of one forward: a run for each."""
    recorder = new_recorder()
    activations: dict[str, torch.Tensor] = {}
    forms = {name: form for name in layers if (form := form_of(net, name, x)) is not None}
    rests: dict[str, torch.Tensor] = {}

    def mark(name: str, module: Any, inputs: Any, output: Any) -> None:
        del module, inputs
        if not isinstance(output, torch.Tensor) or name in activations:
            raise CannotExplainError(
                "shared layer",
                f"expected the layer {name!r} to run once and put out one tensor, it did not; "
                f"choose another layer.",
            )
        recorder.root(name, output, fresh=cut and name != INPUT)
        with torch.utils._python_dispatch._disable_current_modes():  # noqa: SLF001 - unseen
            form = forms.get(name)
            activations[name] = (output if form is None else form.cells(output)).clone()
            if form is not None and (rest := form.beside(output)) is not None:
                rests[name] = rest.clone()

    with ExitStack() as stack:
        for name in layers:
            if name != INPUT:
                module = net.get_submodule(name)
                handle = module.register_forward_hook(partial(mark, name), prepend=True)
                stack.callback(handle.remove)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        given = x.clone()  # the network may work in place on it
        recorder.leaf(given, active=False)
        if INPUT in layers:
            mark(INPUT, net, x, given)
        output = net(given)
        scores = [score(output) for score in choose(output)]
        numbers = [recorder.find(score) for score in scores]
    _check_ran(layers, activations)
    # A sweep uses up the entries of its tape, so each run has a list of its own.
    tapes = [replace(recorder.tape, output=n, entries=[*recorder.tape.entries]) for n in numbers]
    pairs = zip(scores, tapes, strict=True)
    return [Run(output, score, activations, own, forms, rests) for score, own in pairs]


def _check_ran(layers: Sequence[str], activations: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in layers if name not in activations]
    if missing:
        raise CannotExplainError("never ran", f"the layer {missing[0]!r} never ran.")


def share(case: Run, reference: Run, layers: Sequence[str]) -> Shared:
    """The change of the score shared out at the layers, in one sweep backwards.

    The tapes' entries are used up.

    Raises:
        NoRuleError: an operation has no rule, or the two runs did different things.
    """
    tape = case.tape
    avoided = {name: tape.passes_by([name]) for name in layers}
    _written_down(case, reference)
    known = {}
    if tape.output in tape.active:
        known[tape.output] = torch.ones_like(case.score)
    kind = case.score.device.type
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(kind, enabled=False):
        wanted = frozenset(tape.roots[name] for name in layers)
        found = sweep(tape, reference.tape, known, wanted, frozenset())
    multipliers: dict[str, torch.Tensor] = {}
    beside: dict[str, float] = {}
    for name in layers:
        raw, form, rest = found.get(tape.roots[name]), case.forms.get(name), case.rests.get(name)
        if raw is None:
            multipliers[name] = torch.zeros_like(case.activations[name])
            continue
        multipliers[name] = raw if form is None else form.cells(raw)
        if form is not None and rest is not None and (m := form.beside(raw)) is not None:
            change = rest.double() - reference.rests[name].double()
            beside[name] = float((change * m.double()).sum())
    past = {name: by or name in case.rests for name, by in avoided.items()}
    return Shared(case, reference, multipliers, past, avoided, beside)


def _written_down(case: Run, reference: Run) -> None:
    """The score was made by operations on the input.

    Raises:
        NoRuleError: it changed by other means.
    """
    tape = case.tape
    if tape.output in tape.active or torch.equal(case.score, reference.score):
        return
    if tape.output in tape.choices:
        raise NoRuleError(f"{tape.choices[tape.output]}, on the way to the score")
    if tape.output == NOTHING:
        raise NoRuleError("a score that no operation on the input has made")
