"""How does one scan become one explanation: the only place where everything meets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from med_gradcam import _plugins, causal, layers, reference
from med_gradcam.capture import Capture, capture, captures, check_norm_trap, check_signal, outputs
from med_gradcam.errors import CannotExplainError, ModelError
from med_gradcam.explanation import Cells, Explanation, LayerTrial, Reference, Region, Status
from med_gradcam.geometry import cells as cell_grid
from med_gradcam.graph import Trace, trace
from med_gradcam.intake import Request, as_model, as_volume, provenance
from med_gradcam.methods import Bound, Evidence
from med_gradcam.model import Model
from med_gradcam.placement import place
from med_gradcam.prepare import FLAGGED, Prepared, prepare
from med_gradcam.progress import Progress, Step, silent
from med_gradcam.running import MISFIT, network_errors, stoppable
from med_gradcam.tail import at_rest, check_repeats, record
from med_gradcam.target import Target, output_matrix, parse_target
from med_gradcam.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Mapping

NORMAL, PRECISE = 0.05, 0.01  # share of the score's difference that a sum may miss
SMALL_EFFECT = 0.02  # share of the difference under which a region's effect says nothing
ABSOLUTE = 0.02  # and never less than this, in log-odds
ROUNDING = 1e-5  # share of a score that single precision cannot resolve
NOT_A_CUT = 0.01  # share that may flow past a layer before the result says so
REFERENCE_FREE = Reference("none", None, "no reference: this method looks at the scan alone")


def explain(  # noqa: PLR0913 - the one door; each setting is a key of the JSON
    image: object,
    model: object,
    *,
    target: str | int = "auto",
    layer: str = "auto",
    method: str = "integrated",
    reference: str | Volume = "auto",
    at: str | None = None,
    precise: bool = False,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    affine: object = None,
    link: str | None = None,
    progress: Progress = silent,
) -> Explanation:
    """Signed evidence per cell of one layer for one scan; for = raises the score, against = lowers.

    `image`: a Volume, or a bare array or tensor (I, J, K), (C, I, J, K) or (1, C, I, J, K) with an
    optional `affine` (index -> RAS+ mm; voxels of 1 mm otherwise). `model`: a Model or a bare torch
    module (`link` softmax, sigmoid or none says what its outputs mean). `target`: "auto", a label,
    an index or "A-vs-B"; `layer`: "auto", a module path or an alias; `at`: the centre of the patch;
    `precise`: sums within 1 % instead of 5 %. The model comes back bit for bit as it was.

    Raises:
        UsageError: an unknown target, layer or method, or a missing point.
        ImageError, ModelError: scan and network do not fit.
        CannotExplainError: no honest map exists; `reason` says why.
        ResourceError: out of memory.
        Cancelled: `progress` raised it.
    """
    request = Request(
        str(target), str(layer), method, reference, at, precise, device, threads, seed, progress
    )
    with at_rest(model) if isinstance(model, torch.nn.Module) else nullcontext():
        found_model = as_model(model, image, link)  # reads the weights: no other thread at work
    volume = as_volume(image, affine, found_model)
    module = _plugins.load("methods", method)
    prepared = prepare(volume, found_model, at)
    with (
        request.threads_set(),
        at_rest(found_model.net),
        request.on_device(found_model) as where,
        stoppable(found_model.net, progress),
        network_errors(found_model, prepared.raw.shape),
    ):
        return Case(request, volume, found_model, module, prepared, where).explained()


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

    def explained(self) -> Explanation:
        """The whole path: trace, capture, method, layer choice, placement."""
        self._say(0, "following the network")
        reference.check_contrast(self.prepared)
        x = self._tensor(self.prepared.network_input())
        layers.check_volumetric(self.model.net)
        with network_errors(self.model, self.prepared.raw.shape, MISFIT):
            traced = trace(self.model.net, x.shape[1:])
        wanted = self._layers(traced)
        alone = len(wanted) == 1 and not self.method.USES_REFERENCE
        self._say(1, "running the network")
        background: reference.ReferenceInput | None = None
        if alone:
            found, target = self._direct(wanted[0], x)
        else:
            background = self._background()
            found, target = self._recorded(wanted, x, background)
        passed, refused = self._guarded(found, traced)
        self._say(2, "computing the evidence")
        choice = None
        if len(passed) > 1 and background is not None:
            choice = self._choose(passed, background, traced, target)
        chosen = passed[choice.layer if choice else next(iter(passed))]
        bound = self._bound(target, chosen.score)
        self._say(4, "adding up")
        evidence = self.method.evidence(chosen, bound)
        for name, capture_ in found.items():
            self.forwards += capture_.passes * traced.tail_share(name)
        self._say(5, "placing the cells")
        return self._explanation(chosen, evidence, traced, target, background, (choice, refused))

    # -------------------------------------------------------------------------- the steps

    def _say(self, done: int, what: str) -> None:
        self.request.progress(Step(done, 6, what))

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        first = next(self.model.net.parameters(), torch.empty(0))
        return torch.tensor(array[None], dtype=first.dtype, device=self.where)  # a copy of its own

    def _layers(self, traced: Trace) -> list[str]:
        if self.request.layer != "auto":
            path, _ = layers.find_layer(self.model, self.request.layer)
            return [layers.check_places(traced.find(path), path).name]
        layers.check_sparse(traced)
        found = layers.candidates(self.model, traced)
        if not found:
            raise CannotExplainError(
                "no layer",
                "expected a layer with more than one cell along each axis, the network has none "
                "for this input; name a layer with --layer.",
            )
        return [info.name for info in found]

    def _pick_target(self, output: Any) -> Target:
        logits = output_matrix(output)
        if len(logits) != 1:
            raise CannotExplainError(
                "output",
                f"expected one row of scores per scan (1, K), got {tuple(logits.shape)} for one "
                f"scan; does the network squeeze away its batch axis?",
            )
        if not bool(torch.isfinite(logits).all()):
            raise CannotExplainError(
                "not finite",
                "the network's output holds NaN or infinite values for this scan; check the "
                "weights and the intensity steps.",
            )
        scores = [float(v) for v in logits[0].detach()]
        layers.check_logits(self.model.net, self.model.link, scores)
        labels, link = self.model.labels, self.model.link
        if labels and len(labels) != len(scores):
            raise ModelError(
                f"expected {len(labels)} outputs ({', '.join(labels[:6])}), the network of "
                f"{self.model.name!r} gives {len(scores)}."
            )
        return parse_target(self.request.target, labels, link, scores)

    def _background(self) -> reference.ReferenceInput:
        wish = self.request.reference
        if isinstance(wish, Volume):
            other = prepare(wish, self.model, self.request.at)
            return reference.from_scan(other, self.prepared)
        return reference.build(wish, self.prepared, self._modality(), self._unit())

    def _modality(self) -> str | None:
        return self.volume.modality or self.model.input.modality

    def _unit(self) -> str:
        return "HU" if self._modality() == "CT" else "a.u."

    def _direct(self, layer: str, x: torch.Tensor) -> tuple[dict[str, Capture], Target]:
        chosen: list[Target] = []

        def choose(output: Any) -> Target:
            chosen.append(self._pick_target(output))
            return chosen[0]

        _, found = capture(self.model.net, layer, x, choose)
        self.forwards += 1
        found.passes = 1.0  # the backward of the tail
        return {layer: found}, chosen[0]

    def _recorded(
        self, wanted: Sequence[str], x: torch.Tensor, background: reference.ReferenceInput
    ) -> tuple[dict[str, Capture], Target]:
        net = self.model.net
        here = record(net, wanted, x)
        target = self._pick_target(here.output)
        again = target(outputs(net, x))  # noise before the layer would hide in what is remembered
        check_repeats(x, float(target(here.output)[0]), float(again[0]))
        there = None
        self.forwards += 2
        if self.method.USES_REFERENCE:
            raw = self._tensor(self.prepared.network_input(background.raw))
            there = record(net, wanted, raw)
            self.forwards += 1
        return captures(here, target, there), target

    def _guarded(
        self, found: Mapping[str, Capture], traced: Trace
    ) -> tuple[dict[str, Capture], list[LayerTrial]]:
        """The captures that pass the guards; a named layer that fails is an error."""
        passed, refused = {}, []
        named = self.request.layer != "auto"
        coarsest_first = sorted(found.items(), key=lambda item: item[1].activation[0].numel())
        for name, capture_ in coarsest_first:
            try:
                check_signal(capture_)
                info = traced.find(name)
                check_norm_trap(capture_, feeds_norm=info is not None and info.feeds_norm)
                if not named:  # refuses where the cells' place cannot be told
                    place(self.model.net, layers.check_places(info, name), self.prepared.raw.shape)
                passed[name] = capture_
            except CannotExplainError as error:
                if named or error.reason == "not finite":
                    raise
                refused.append(LayerTrial(name, None, None, error.reason))
        if not passed:
            reasons = ", ".join(f"{t.layer} ({t.refused})" for t in refused)
            raise CannotExplainError(
                "no layer", f"none of the candidate layers can be explained: {reasons}."
            )
        return passed, refused

    def _choose(
        self,
        passed: Mapping[str, Capture],
        background: reference.ReferenceInput,
        traced: Trace,
        target: Target,
    ) -> causal.Choice:
        maps = []
        for name, capture_ in passed.items():
            info = layers.check_places(traced.find(name), name)
            cells = place(self.model.net, info, self.prepared.raw.shape)
            evidence = self.method.evidence(capture_, Bound(float("inf"), 0.0))
            grid = cell_grid(self.prepared.grid, cells.jump, cells.start, info.shape[1:])
            maps.append(causal.CandidateMap(name, evidence.values.cpu().numpy(), grid))
        self._say(3, "choosing the layer")
        first = next(iter(passed.values()))
        against = first.reference_score if first.reference_score is not None else 0.0

        def score(array: np.ndarray[Any, Any]) -> float:
            self.forwards += 1
            return float(target(outputs(self.model.net, self._tensor(array)))[0])

        return causal.choose(
            maps,
            self.prepared,
            background,
            (
                score,
                first.score,
                Bound(self._least(target), SMALL_EFFECT).of(first.score - against),
            ),
            self.request.seed,
        )

    def _least(self, target: Target) -> float:
        return 0.0 if target.link == "none" else ABSOLUTE

    def _bound(self, target: Target, score: float) -> Bound:
        share = PRECISE if self.request.precise else NORMAL
        rounding = ROUNDING * max(1.0, abs(score))
        coarse = not self.request.precise
        return Bound(max(self._least(target), rounding) if coarse else rounding, share)

    # -------------------------------------------------------------------------- the result

    def _explanation(
        self,
        chosen: Capture,
        evidence: Evidence,
        traced: Trace,
        target: Target,
        background: reference.ReferenceInput | None,
        tried: tuple[causal.Choice | None, list[LayerTrial]],
    ) -> Explanation:
        values = evidence.values.cpu().numpy()
        silent_map = self._check_evidence(values, chosen)
        info = layers.check_places(traced.find(chosen.layer), chosen.layer)
        cells = place(self.model.net, info, self.prepared.raw.shape)
        status, bypassed, warnings = self._status(chosen, evidence, cells)
        choice, refused = tried
        differs = abs(chosen.score - (chosen.reference_score or 0.0)) > self._least(target)
        notes = [*silent_map, *warnings]
        notes += [choice.note] if choice and choice.note and differs else []
        notes += [n for n in self.prepared.notes if n.startswith(FLAGGED)]
        notes += [f"layer {t.layer!r} was passed over: {t.refused}" for t in refused]
        regions: tuple[Region, ...] = choice.regions if choice else ()
        with_reference = self.method.USES_REFERENCE and background is not None
        return Explanation(
            evidence=values.astype(np.float32),
            grid=cell_grid(self.prepared.grid, cells.jump, cells.start, values.shape),
            image=self.volume.grid,
            score=chosen.score,
            reference_score=chosen.reference_score,
            target=target,
            method=self.request.method,
            layer=chosen.layer,
            reference=background.reference if with_reference and background else REFERENCE_FREE,
            cells=cells,
            status=status,
            cost_in_forwards=round(self.forwards, 2),
            provenance=provenance(self.request, self.volume, self.model, self.prepared, self.where),
            bypassed=bypassed,
            modality=self._modality(),
            calibration=self.model.scale_for(target.label, self.request.method, chosen.layer),
            regions=regions,
            trials=(*(choice.trials if choice else ()), *refused),
            warnings=tuple(notes),
        )

    def _check_evidence(self, values: np.ndarray[Any, Any], chosen: Capture) -> list[str]:
        """Refuse evidence that says nothing; a scan like its reference has none, and says so."""
        against = chosen.reference_score
        if np.isfinite(values).all() and values.any():
            return []
        alike = against is not None and abs(chosen.score - against) <= ROUNDING * max(
            1.0, abs(chosen.score)
        )
        if np.isfinite(values).all() and alike:
            return ["the model's score is that of the reference: nothing raises or lowers it"]
        raise CannotExplainError(
            "zero evidence",
            f"the evidence at {chosen.layer!r} is zero or not finite everywhere; choose another "
            f"layer or target.",
        )

    def _status(
        self, chosen: Capture, evidence: Evidence, cells: Cells
    ) -> tuple[Status, float | None, list[str]]:
        warnings = []
        if cells.how != "exact":
            warnings.append(f"the place of the cells is {cells.how}, not exact")
        if not self.method.PROMISES_SUM or evidence.start_score is None:
            return "no_sum", None, warnings
        against = chosen.reference_score if chosen.reference_score is not None else 0.0
        difference = chosen.score - against
        past = evidence.start_score - against
        bypassed = past / difference if difference else 0.0
        if not evidence.converged:
            warnings.append(
                f"the integral has not converged after {evidence.nodes} nodes: the map misses "
                f"the score by more than the bound"
            )
        if abs(past) > max(NOT_A_CUT * abs(difference), 1e-3 * max(1.0, abs(chosen.score))):
            warnings.append(
                f"{bypassed:.0%} of the score's difference flows past the layer "
                f"{chosen.layer!r} (skip connections): the map leaves that part out"
            )
            return "not_a_cut", bypassed, warnings
        if not evidence.converged:
            return "not_converged", bypassed, warnings
        return "complete", bypassed, warnings
