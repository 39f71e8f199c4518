"""One explanation in the making: from a prepared scan to evidence at a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from med_gradcam import _plugins, layers, observe, outcome, reference, targeting
from med_gradcam.capture import Capture, check_norm_trap, check_signal, outputs
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explanation import Cells, Explanation, LayerTrial, Reference
from med_gradcam.fold import Folded, Map, blended, together
from med_gradcam.geometry import Geometry
from med_gradcam.geometry import cells as cell_grid
from med_gradcam.graph import LayerInfo, Trace, trace
from med_gradcam.intake import Request, provenance
from med_gradcam.methods import Bound, Evidence
from med_gradcam.metrics import causal
from med_gradcam.model import Model
from med_gradcam.placement import place
from med_gradcam.prepare import FLAGGED, Prepared, prepare
from med_gradcam.progress import Step
from med_gradcam.running import MISFIT, network_errors
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from med_gradcam.target import Target
from med_gradcam.volume import Volume

MEASURING = 5.0  # measured cells cost a forward and four backwards of all up to the layer
SMALL_EFFECT = 0.02  # share of the difference under which a region's effect says nothing
REFERENCE_FREE = Reference("none", None, "no reference: this method looks at the scan alone")
UNTESTED = "the coarsest layer was taken untested"
UNREPEATED = "the scan was not run a second time"


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

    def __post_init__(self) -> None:
        self.method_name = self.request.method

    def begin(self, request: Request) -> None:
        """Forget the last explanation; what is known of the network stays."""
        self.request, self.forwards, self.notes, self.given_up = request, 0.0, [], []
        self.method, self.method_name = _plugins.load("methods", request.method), request.method

    def explained(self) -> Explanation:
        """The whole path: trace, captures, guards, layer choice, evidence, placement."""
        self._say(0, "following the network")
        _, traced = self.traced()
        wanted = self.layers(traced)
        self._say(1, "running the network")
        background = self.background(traced) if self._compares(wanted) else None
        observed = self.observed(wanted, background)
        self.forwards += observed.forwards
        passed, refused = self._passed(observed, background)
        self._say(2, "computing the evidence")
        choice = None
        cut = len(self.named()) > 1
        if len(passed) > 1 and not cut and self.request.quick:
            self.given_up.insert(0, UNTESTED)
        elif len(passed) > 1 and background is not None and not cut:
            choice = self._choose(passed, background, observed.target, refused)
        fused = self.request.layer == "fused" and choice is not None
        one = choice.layer if choice else next(iter(passed))
        told = [t.layer for t in choice.trials] if choice and fused else list(passed)
        names = told if cut or fused else [one]
        self._say(4, "adding up")
        bound = self.bound(observed.target, passed[names[0]].score)
        evidence = {name: self.method.evidence(passed[name], bound) for name in names}
        if fused and choice is not None:
            evidence = blended(evidence, choice.trials)
        self.forwards += sum(observe.cost(c, traced) for c in observed.found.values())
        self._say(5, "placing the cells")
        chosen = [passed[name] for name in names]
        return self.result(chosen, evidence, observed.target, background, (choice, refused))

    # -------------------------------------------------------------------------- the steps

    def _say(self, done: int, what: str) -> None:
        self.request.progress(Step(done, 6, what))

    def traced(self) -> tuple[torch.Tensor, Trace]:
        """The network's input (1, C, I, J, K) and its layers for inputs of that size."""
        reference.check_contrast(self.prepared)
        layers.check_volumetric(self.model.net)
        if self.x is None:
            self.x = self.tensor(self.prepared.network_input())
        if self.known is None:
            with network_errors(self.model, self.prepared.raw.shape, MISFIT):
                self.known = trace(self.model.net, self.x.shape[1:], self.request.output)
        return self.x, self.known

    def tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy of an array (C, I, J, K) as a batch of one for the network."""
        first = next(self.model.net.parameters(), torch.empty(0))
        return torch.tensor(array[None], dtype=first.dtype, device=self.where)

    def named(self) -> list[str]:
        """The layers that the caller named; none for auto, all and fused."""
        wish = self.request.layer
        return [] if wish in ("auto", "all", "fused") else layers.split(self.model, wish)

    def layers(self, traced: Trace) -> list[str]:
        """The module paths of the layers to look at."""
        named = [layers.find_layer(self.model, name)[0] for name in self.named()]
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
        every = self.request.layer == "all"
        return [info.name for info in layers.some(self.model, traced, every=every)]

    def info(self, traced: Trace, name: str) -> LayerInfo:
        """What is known of a layer; its output has places."""
        return layers.check_places(traced.find(name), name)

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

    def _compares(self, wanted: Sequence[str]) -> bool:
        """Whether a reference is needed: for the method, or to choose among layers."""
        return bool(self.method.USES_REFERENCE) or (len(wanted) > 1 and not self.request.quick)

    def background(self, traced: Trace) -> reference.ReferenceInput:
        """The reference input."""
        wish = self.request.reference
        if isinstance(wish, Volume):
            other = prepare(wish, self.model, self.request.at)
            return reference.from_scan(other, self.prepared)
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

    def observed(
        self, wanted: list[str], background: reference.ReferenceInput | None
    ) -> observe.Observed:
        """The network run for the scan, and for the reference where the method needs it."""
        net, (x, traced) = self.model.net, self.traced()
        other = None
        if background is not None and self.method.USES_REFERENCE:
            other = self.tensor(self.prepared.network_input(background.raw))
        if hasattr(self.method, "INSTEAD") and other is not None:
            how = observe.Pairing(cut=len(self.named()) > 1, check=not self.request.quick)
            try:
                picks = lambda output: [self._pick(output)]  # noqa: E731
                (found,) = observe.paired(net, wanted, (x, other), picks, traced, how)
            except NoRuleError as error:
                self._fall_back(str(error))
            else:
                self.given_up += [] if how.check else [UNREPEATED]
                return found
        if self.method.BESIDE:
            beside = self._beside(traced)
            observed = observe.recorded(net, [*wanted, beside], x, other, self._pick)
            observed.found[wanted[0]].beside = second = observed.found.pop(beside)
            second.cells = self.cells(beside)
        elif len(wanted) == 1 and not self.method.USES_REFERENCE:
            observed = observe.direct(net, wanted[0], x, self._pick)
        else:
            observed = observe.recorded(net, wanted, x, other, self._pick)
        for name, capture in observed.found.items():
            capture.seed, capture.cells = self.request.seed, self.cells(name)
        return observed

    def _passed(
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

    def _beside(self, traced: Trace) -> str:
        """The layer beside the input: the one that was named, else the coarsest candidate."""
        named = [layers.find_layer(self.model, name)[0] for name in self.named()]
        found = [name for name in named if name != INPUT]
        return (
            self.info(traced, found[0]).name if found else layers.some(self.model, traced)[0].name
        )

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
        if not passed:
            reasons = ", ".join(f"{t.layer} ({t.refused})" for t in refused)
            raise CannotExplainError(
                "no layer", f"none of the candidate layers can be explained: {reasons}."
            )
        return passed, refused

    def _guard(self, name: str, capture: Capture, traced: Trace, *, named: bool) -> None:
        check_signal(capture)
        if name == INPUT:
            return
        info = self.info(traced, name)
        check_norm_trap(capture, feeds_norm=info.feeds_norm)
        if not named:  # refuses where the cells' place cannot be told
            self.cells(name)

    def _choose(
        self,
        passed: Mapping[str, Capture],
        background: reference.ReferenceInput,
        target: Target,
        refused: list[LayerTrial],
    ) -> causal.Choice:
        maps = []
        for name, capture in passed.items():
            try:
                evidence = self.method.evidence(capture, Bound(float("inf"), 0.0))
            except CannotExplainError as error:  # a rule that one layer's tail lacks
                refused.append(LayerTrial(name, None, None, error.reason))
                continue
            grid = self._grid(self.cells(name), evidence.values.shape)
            maps.append(causal.CandidateMap(name, evidence.values.cpu().numpy(), grid))
        if not maps:
            raise CannotExplainError(
                "no layer",
                f"none of the candidate layers can be explained by {self.method_name!r}: "
                f"{', '.join(f'{t.layer} ({t.refused})' for t in refused)}.",
            )
        self._say(3, "choosing the layer")
        first = next(iter(passed.values()))
        against = first.reference_score if first.reference_score is not None else 0.0

        def score(array: np.ndarray[Any, Any]) -> float:
            self.forwards += 1
            return float(target(outputs(self.model.net, self.tensor(array)))[0])

        least = Bound(outcome.least(target), SMALL_EFFECT).of(first.score - against)
        scores = (score, first.score, least)
        return causal.choose(maps, self.prepared, background, scores, self.request.seed)

    def _grid(self, cells: Cells, shape: Sequence[int]) -> Geometry:
        return cell_grid(self.prepared.grid, cells.jump, cells.start, tuple(shape))

    def bound(self, target: Target, score: float) -> Bound:
        """How far the sum of this target's evidence may miss."""
        return outcome.bound(target, score, precise=self.request.precise)

    # -------------------------------------------------------------------------- the result

    def result(
        self,
        chosen: Sequence[Capture],
        evidence: Mapping[str, Evidence],
        target: Target,
        background: reference.ReferenceInput | None,
        tried: tuple[causal.Choice | None, list[LayerTrial]],
    ) -> Explanation:
        """The explanation of one layer, or of several that are a cut together."""
        drawn = self._folded(chosen, evidence)
        signed, promises = bool(self.method.SIGNED), bool(self.method.PROMISES_SUM)
        first = drawn.capture
        outcome.check_evidence(drawn.values, first)
        choice, refused = tried
        fused = self.request.layer == "fused" and len(chosen) > 1
        layer = " + ".join(c.layer for c in chosen)
        layer = f"fused: {layer}" if fused else layer
        status, bypassed, warnings = outcome.status(first, drawn.total, layer, promises=promises)
        notices = outcome.notices(drawn.values, first, signed=signed, promises=promises)
        with_reference = self.method.USES_REFERENCE and background is not None
        return Explanation(
            evidence=drawn.values.astype(np.float32),
            grid=drawn.grid,
            image=self.volume.grid,
            score=first.score,
            reference_score=first.reference_score,
            target=target,
            method=self.method_name,
            layer=layer,
            reference=background.reference if with_reference and background else REFERENCE_FREE,
            cells=drawn.cells,
            status=status,
            cost_in_forwards=round(self.forwards, 2),
            provenance=provenance(self.request, self.volume, self.model, self.prepared, self.where),
            bypassed=bypassed,
            modality=self.modality(),
            calibration=self.model.scale_for(target.label, self.method_name, layer),
            regions=choice.regions if choice and not fused else (),
            trials=(*(choice.trials if choice else ()), *refused),
            warnings=(
                *outcome.words(notices, drawn.cells),
                *warnings,
                *self._said(first, target, choice, refused),
            ),
            parts=drawn.parts,
            notices=notices,
        )

    def _folded(self, chosen: Sequence[Capture], evidence: Mapping[str, Evidence]) -> Folded:
        """The layers' evidence as one map: a single layer's own, or on the finest one's cells."""
        maps = []
        for capture in chosen:
            values = evidence[capture.layer].values.cpu().numpy()
            cells = self.cells(capture.layer)
            maps.append(Map(capture, cells, values, self._grid(cells, values.shape)))
        return together(maps, evidence)

    def _said(
        self,
        first: Capture,
        target: Target,
        choice: causal.Choice | None,
        refused: Sequence[LayerTrial],
    ) -> list[str]:
        """What must be said beside the numbers."""
        differs = abs(first.score - (first.reference_score or 0.0)) > outcome.least(target)
        notes = [*self.notes]
        notes += [choice.note] if choice and choice.note and differs else []
        notes += [n for n in self.prepared.notes if n.startswith(FLAGGED)]
        notes += [f"layer {t.layer!r} was passed over: {t.refused}" for t in refused]
        return [*notes, f"quick: {', and '.join(self.given_up)}"] if self.given_up else notes
