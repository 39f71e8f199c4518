"""One explanation in the making: from a prepared scan to the captures at its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from med_gradcam import (
    _plugins,
    fast,
    gradient_free,
    layers,
    observe,
    outcome,
    reference,
    targeting,
)
from med_gradcam.capture import MEAN_WEIGHTS, Capture, check_norm_trap, check_signal
from med_gradcam.containers.opener import check_same, why_closed
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explanation import Cells, LayerTrial
from med_gradcam.geometry import Geometry
from med_gradcam.geometry import cells as cell_grid
from med_gradcam.graph import LayerInfo, Trace, trace
from med_gradcam.intake import Request
from med_gradcam.methods import Bound, expected_gradients
from med_gradcam.model import Model
from med_gradcam.one_slice import Flat, fitting
from med_gradcam.outputs import item
from med_gradcam.placement import place
from med_gradcam.prepare import Prepared, prepare
from med_gradcam.progress import Step
from med_gradcam.running import MISFIT, network_errors
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from med_gradcam.target import Target
from med_gradcam.volume import Volume

MEASURING = 5.0  # measured cells cost a forward and four backwards of all up to the layer
UNTESTED = "the coarsest layer was taken untested"
ALONE = "the coarsest layer was taken, untested, instead of several"
NO_CUT = (
    "no layer is a cut here: part of the score may flow past each (skip connections); "
    "--layer @input explains all of it"
)
UNREPEATED = "the scan was not run a second time"
CLOSED = "the network is a program that only runs whole ({}), so its input itself is explained"


@dataclass(slots=True, eq=False)
class Case:
    """One explanation in the making; lives for one call of explain()."""

    request: Request
    volume: Volume
    model: Model
    method: Any
    prepared: Prepared
    where: torch.device
    forwards: float = 0.0
    method_name: str = ""
    known: Trace | None = None
    notes: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    x: torch.Tensor | None = None
    others: observe.Known | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        self._settle()
        if gradient_free.why(self.model.net) or why_closed(self.model.net):
            return
        with network_errors(self.model, self.prepared.raw.shape, MISFIT):
            net = fitting(self.model.net, self.prepared.raw.shape)
        if net is not self.model.net:
            self.model = replace(self.model, net=net)

    def begin(self, request: Request) -> None:
        """Forget the last explanation; what is known of the network stays."""
        self.request, self.forwards, self.notes, self.given_up = request, 0.0, [], []
        self._settle()

    def _settle(self) -> None:
        """The method that was asked for; what stands in for it where there are no gradients."""
        self.method_name, said = gradient_free.settled(self.model.net, self.request)
        self.method = _plugins.load("methods", self.method_name)
        self.notes += said

    # -------------------------------------------------------------------------- the steps

    def say(self, done: int, what: str) -> None:
        """Tell who waits what is being done; `done` of six steps are over."""
        self.request.progress(Step(done, 6, what))

    def traced(self) -> tuple[torch.Tensor, Trace]:
        """The network's input (1, C, I, J, K) and its layers for inputs of that size."""
        if not self.uniform:
            reference.check_contrast(self.prepared)
        if self.x is None:
            self.x = self.tensor(self.prepared.network_input())
        if self.known is None and gradient_free.why(self.model.net):
            self.known = Trace((), 0.0)  # nothing of it can be seen
        if self.known is None:
            with network_errors(self.model, self.prepared.raw.shape, MISFIT):
                net = self.model.net
                own = (net.inner, net.image(self.x)) if isinstance(net, Flat) else (net, self.x)
                self.forwards += check_same(*own)
                self.known = trace(net, self.x.shape[1:], self.request.output)
        return self.x, self.known

    def tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy of an array (C, I, J, K) as a batch of one for the network."""
        first = next(self.model.net.parameters(), torch.empty(0))
        return torch.tensor(array[None], dtype=first.dtype, device=self.where)

    def named(self) -> list[str]:
        """The layers that the caller named; none for auto, all and fused."""
        wish = self.request.layer
        if wish in ("auto", "all", "fused"):
            return [INPUT] if why_closed(self.model.net) else []
        return layers.split(self.model, wish)

    def layers(self, traced: Trace) -> list[str]:
        """The module paths of the layers to look at."""
        named = [layers.find_layer(self.model, name)[0] for name in self.named()]
        if why := why_closed(self.model.net):
            if named not in ([], [INPUT]):
                raise CannotExplainError(
                    "never ran",
                    f"the layer {named[0]!r} cannot be seen: the network is a program that only "
                    f"runs whole ({why}); name --layer @input.",
                )
            self.notes += [CLOSED.format(why)]
        if self.method.LEVEL == "input":
            if named not in ([], [INPUT]) and not self.method.BESIDE:
                raise UsageError(
                    f"expected no layer for the method {self.request.method!r}, whose map has the "
                    f"input's own voxels, got {self.request.layer!r}."
                )
            return [INPUT]
        if named:
            if len(named) > 1 and not hasattr(self.method, "INSTEAD"):
                raise UsageError(
                    f"expected one layer for the method {self.request.method!r}, got "
                    f"{len(named)}; only 'secant' shares a score out over a cut of several."
                )
            return [self.info(traced, name).name for name in named]
        return self._untested(
            layers.some(self.model, traced, every=self.request.layer == "all"), traced
        )

    def _untested(self, found: list[LayerInfo], traced: Trace) -> list[str]:
        """The layers that auto looks at; of layers that are no cuts, quick takes the finest one."""
        if all(info.past for info in found) and NO_CUT not in self.notes:
            self.notes.append(NO_CUT)
        if not (self.request.quick and found[0].past and self.request.layer == "auto"):
            return [info.name for info in found]
        self.given_up.append("the finest layer was taken untested")
        return [layers.some(self.model, traced, every=True)[-1].name]

    def info(self, traced: Trace, name: str) -> LayerInfo:
        """What is known of a layer; its output has places."""
        return layers.check_places(traced.find(name), name, dict(traced.unplaced).get(name))

    def cells(self, name: str) -> Cells:
        """Where the cells of a layer lie."""
        x, traced = self.traced()
        if name == INPUT:
            return layers.INPUT_CELLS
        info, shape = self.info(traced, name), self.prepared.raw.shape
        if self.request.alignment == "measured" and name not in self.moved:
            self.moved.add(name)
            self.forwards += MEASURING * (1.0 - traced.tail_share(name))
        return place(self.model.net, info, shape, self.request.alignment, x)

    def background(self, traced: Trace) -> reference.ReferenceInput:
        """The reference input."""
        wish = self.request.reference
        if isinstance(wish, Volume):
            other = prepare(wish, self.model, self.request.at)
            return reference.from_scan(other, self.prepared)
        if not isinstance(wish, str):
            ready = lambda one: prepare(one, self.model, self.request.at)  # noqa: E731
            return expected_gradients.given(self.method_name, wish, ready, self.prepared)
        modality = self.modality()
        found = reference.build(wish, self.prepared, modality, "HU" if modality == "CT" else "a.u.")
        if self.method.USES_REFERENCE and traced.norms:
            return reference.textured(found, self.prepared, self.request.seed)
        return found

    def modality(self) -> str | None:
        """The scan's modality, else the model's."""
        return self.volume.modality or self.model.input.modality

    def _pick(self, output: Any) -> Target:
        return targeting.pick(self.request, output, self.model, self.prepared)

    def hurried(
        self,
        wanted: Sequence[str],
        x: torch.Tensor | None = None,
        against: torch.Tensor | None = None,
        *,
        whole: bool = False,
    ) -> AbstractContextManager[None]:
        """The network with all before these layers run fast, if the request asks for that.

        `x`: inputs of several scans (n, C, I, J, K); `against`: the reference's; `whole`: nothing
        but predictions are wanted.
        """
        if not self.request.fast:
            return nullcontext()
        layers.check_fast(self.traced()[1], wanted)
        x = self.traced()[0] if x is None else x
        pick = lambda out: self._pick(item(out, 0, len(x)))  # noqa: E731
        compare = None if whole else fast.Compare(pick, against)
        made, forwards = fast.part(self.model.net, wanted, x, compare, self.model.weights_sha256)
        self.forwards += forwards
        return fast.standing_in(self.model.net, made, whole=whole)

    def observed(
        self, wanted: list[str], background: reference.ReferenceInput | None
    ) -> observe.Observed:
        """The network run for the scan, and for the reference where the method needs it."""
        net, (x, traced) = self.model.net, self.traced()
        other = None
        if background is not None and self.method.USES_REFERENCE:
            other = self.tensor(self.prepared.network_input(background.raw))
        if hasattr(self.method, "INSTEAD") and other is not None:
            how = observe.Pairing(len(self.named()) > 1, not self.request.quick, self.others)
            try:
                picks = lambda output: [self._pick(output)]  # noqa: E731
                with self.hurried(wanted, x, other):
                    (found,) = observe.paired(net, wanted, (x, other), picks, traced, how)
            except NoRuleError as error:
                self._fall_back(str(error))
            else:
                self.given_up += [] if how.check else [UNREPEATED]
                return found
        if self.method.BESIDE:
            beside = layers.beside(self.model, traced, self.named())
            observed = observe.recorded(net, [*wanted, beside], (x, other), self._pick)
            observed.found[wanted[0]].beside = second = observed.found.pop(beside)
            second.cells = self.cells(beside)
        elif len(wanted) == 1 and not self.method.USES_REFERENCE:
            with self.hurried(wanted):
                observed = observe.direct(net, wanted[0], x, self._pick)
        else:
            check = not self.request.quick
            self.given_up += [] if check else [UNREPEATED]
            with self.hurried(wanted):
                observed = observe.recorded(
                    net, wanted, (x, other), self._pick, check=check, cuts=traced.cuts(wanted)
                )
        for name, capture in observed.found.items():
            capture.seed, capture.cells = self.request.seed, self.cells(name)
            raws = background.every if background else ()
            capture.baselines = tuple(self.tensor(self.prepared.network_input(r))[0] for r in raws)
        return observed

    def passed(
        self, observed: observe.Observed, background: reference.ReferenceInput | None
    ) -> tuple[dict[str, Capture], list[LayerTrial]]:
        """The captures that pass the guards, and what was refused.

        Where none of the candidates is a cut (the deeper levels of a U-Net), the finer ones follow.
        """
        _, traced = self.traced()
        named = bool(self.named()) or self.method.LEVEL == "input"
        passed, refused = self.guarded(observed.found, traced, named=named)
        every = [] if named or self.request.quick else layers.some(self.model, traced, every=True)
        finer = [info.name for info in every if info.name not in observed.found]
        if not finer or not all(capture.passed_by for capture in passed.values()):
            return passed, refused
        again = self.observed(finer, background)
        self.forwards += again.forwards
        observed.found.update(again.found)
        return self.guarded(observed.found, traced, named=False)

    def _fall_back(self, why: str) -> None:
        instead = self.method.INSTEAD
        if len(self.named()) > 1:
            raise CannotExplainError(
                "no rule",
                f"expected a network whose operations all have a rule for a cut of several "
                f"layers, it has {why}; name one layer.",
            )
        self.notes.append(f"{self.method_name} has no rule for {why}; {instead} took over")
        self.method, self.method_name = _plugins.load("methods", instead), instead

    def guarded(
        self, found: Mapping[str, Capture], traced: Trace, *, named: bool
    ) -> tuple[dict[str, Capture], list[LayerTrial]]:
        """The captures that pass the guards; a layer that was named and fails is an error."""
        passed: dict[str, Capture] = {}
        refused: list[LayerTrial] = []
        coarsest_first = sorted(found.items(), key=lambda item: item[1].activation[0].numel())
        for name, capture in coarsest_first:
            try:
                self._guard(name, capture, traced, named=named)
                passed[name] = capture
            except CannotExplainError as error:
                if named or error.reason == "not finite":
                    raise
                refused.append(LayerTrial(name, None, None, error.reason))
        past = [name for name, capture in passed.items() if capture.passed_by]
        if not named and len(past) < len(passed):  # a layer that all paths pass through is there
            refused += [LayerTrial(name, None, None, "not a cut") for name in past]
            passed = {name: c for name, c in passed.items() if name not in past}
        if not named and passed:
            over = layers.passed_over(self.model, traced)
            refused += [LayerTrial(n, None, None, why) for n, why in over if n not in found]
        if not passed:
            reasons = ", ".join(f"{t.layer} ({t.refused})" for t in refused)
            raise CannotExplainError(
                "no layer", f"none of the candidate layers can be explained: {reasons}."
            )
        return passed, refused

    def _guard(self, name: str, capture: Capture, traced: Trace, *, named: bool) -> None:
        try:
            check_signal(capture)
        except CannotExplainError as error:
            if error.reason != "zero gradient" or not self._moves(capture):
                raise
        if capture.beside is not None and self.method_name in MEAN_WEIGHTS:
            beside = self.info(traced, capture.beside.layer)
            check_norm_trap(capture.beside, feeds_norm=beside.feeds_norm)
        if name == INPUT:
            return
        info = self.info(traced, name)
        if self.method_name in MEAN_WEIGHTS:
            check_norm_trap(capture, feeds_norm=info.feeds_norm)
        if not named:  # refuses where the cells' place cannot be told
            self.cells(name)
        elif info.pointwise:
            self.notes.append(layers.OWN_PLACE.format(name))

    def _moves(self, capture: Capture) -> bool:
        """Whether a score without a gradient (a rounding step) differs for an empty input.

        That is enough for methods that only predict.
        """
        if getattr(self.method, "NEEDS_GRADIENT", True):
            return False
        empty = torch.zeros_like(capture.activation)[None]
        return float(capture.input_scores(empty)[0]) != capture.score

    def grid_of(self, cells: Cells, shape: Sequence[int]) -> Geometry:
        """The grid of cells (i, j, k) in the scan's world."""
        return cell_grid(self.prepared.grid, cells.jump, cells.start, tuple(shape))

    def bound(self, target: Target, score: float) -> Bound:
        """How far the sum of this target's evidence may miss."""
        return outcome.bound(target, score, precise=self.request.precise)
