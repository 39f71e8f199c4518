"""How does a case become an explanation: its layer chosen, its evidence added up and told?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from med_gradcam import gradient_free, observe, outcome, reference
from med_gradcam.capture import Capture, outputs
from med_gradcam.case import ALONE, UNTESTED, Case
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import Explanation, LayerTrial
from med_gradcam.fold import Folded, Map, blended, together
from med_gradcam.intake import provenance
from med_gradcam.methods import Bound, Evidence
from med_gradcam.metrics import causal
from med_gradcam.prepare import FLAGGED
from med_gradcam.target import Target

SMALL_EFFECT = 0.02  # share of the difference under which a region's effect says nothing


def explained(case: Case) -> Explanation:
    """The whole path: trace, captures, guards, layer choice, evidence, placement."""
    case.say(0, "following the network")
    _, traced = case.traced()
    wanted = case.layers(traced)
    case.say(1, "running the network")
    background = case.background(traced) if _compares(case, wanted) else None
    observed = case.observed(wanted, background)
    case.forwards += observed.forwards
    passed, refused = case.passed(observed, background)
    case.say(2, "computing the evidence")
    choice = None
    cut = len(case.named()) > 1
    if len(passed) > 1 and not cut and case.request.quick:
        case.given_up.insert(0, ALONE if case.request.layer == "fused" else UNTESTED)
    elif len(passed) > 1 and background is not None and not cut:
        choice = _choose(case, passed, background, observed.target, refused)
    fused = case.request.layer == "fused" and choice is not None
    one = choice.layer if choice else next(iter(passed))
    told = [t.layer for t in choice.trials] if choice and fused else list(passed)
    names = told if cut or fused else [one]
    case.say(4, "adding up")
    bound = case.bound(observed.target, passed[names[0]].score)
    with case.hurried(wanted, whole=True) if case.method.LEVEL == "input" else nullcontext():
        evidence = {name: case.method.evidence(passed[name], bound) for name in names}
    if fused and choice is not None:
        evidence = blended(evidence, choice.trials)
    case.forwards += sum(observe.cost(c, traced) for c in observed.found.values())
    case.say(5, "placing the cells")
    chosen = [passed[name] for name in names]
    return result(case, chosen, evidence, observed.target, background, (choice, refused))


def _compares(case: Case, wanted: Sequence[str]) -> bool:
    """Whether a reference is needed: for the method, or to choose among layers."""
    return bool(case.method.USES_REFERENCE) or (len(wanted) > 1 and not case.request.quick)


def _choose(
    case: Case,
    passed: Mapping[str, Capture],
    background: reference.ReferenceInput,
    target: Target,
    refused: list[LayerTrial],
) -> causal.Choice:
    maps = []
    for name, capture in passed.items():
        try:
            evidence = case.method.evidence(capture, Bound(float("inf"), 0.0))
        except CannotExplainError as error:  # a rule that one layer's tail lacks
            refused.append(LayerTrial(name, None, None, error.reason))
            continue
        grid = case.grid_of(case.cells(name), evidence.values.shape)
        maps.append(causal.CandidateMap(name, evidence.values.cpu().numpy(), grid))
    if not maps:
        raise CannotExplainError(
            "no layer",
            f"none of the candidate layers can be explained by {case.method_name!r}: "
            f"{', '.join(f'{t.layer} ({t.refused})' for t in refused)}.",
        )
    case.say(3, "choosing the layer")
    first = next(iter(passed.values()))
    against = first.reference_score if first.reference_score is not None else 0.0

    def score(array: np.ndarray[Any, Any]) -> float:
        case.forwards += 1
        with case.hurried(wanted, whole=True):
            return float(target(outputs(case.model.net, case.tensor(array)))[0])

    wanted = case.layers(case.traced()[1])

    least = Bound(outcome.least(target), SMALL_EFFECT).of(first.score - against)
    scores = (score, first.score, least)
    kind = causal.Kind(case.method.UNIT == "score", bool(case.method.SIGNED))
    return causal.choose(maps, case.prepared, background, scores, case.request.seed, kind)


def result(
    case: Case,
    chosen: Sequence[Capture],
    evidence: Mapping[str, Evidence],
    target: Target,
    background: reference.ReferenceInput | None,
    tried: tuple[causal.Choice | None, list[LayerTrial]],
) -> Explanation:
    """The explanation of one layer, or of several that are a cut together."""
    drawn = _folded(case, chosen, evidence)
    signed, promises = bool(case.method.SIGNED), bool(case.method.PROMISES_SUM)
    first = outcome.compared(drawn.capture, drawn.total)
    values = outcome.without_noise(drawn.values, first)
    outcome.check_evidence(values, first)
    choice, refused = tried
    fused = case.request.layer == "fused" and len(chosen) > 1
    layer = "fused: " * fused + " + ".join(c.layer for c in chosen)
    past = getattr(case.method, "REST", outcome.past(first, layer))
    status, bypassed, warnings = outcome.status(first, drawn.total, past, promises=promises)
    notices = outcome.notices(values, first, signed=signed, promises=promises)
    return Explanation(
        evidence=values.astype(np.float32),
        grid=drawn.grid,
        image=case.volume.grid,
        score=first.score,
        reference_score=first.reference_score,
        target=target,
        method=case.method_name,
        layer=layer,
        reference=outcome.named(case.method, background),
        cells=drawn.cells,
        status=status,
        cost_in_forwards=round(case.forwards, 2),
        provenance=provenance(case.request, case.volume, case.model, case.prepared, case.where),
        bypassed=bypassed,
        modality=case.modality(),
        calibration=case.model.scale_for(target.label, case.method_name, layer),
        regions=choice.regions if choice and not fused else (),
        trials=(*(choice.trials if choice else ()), *refused),
        warnings=(
            *outcome.words(notices, drawn.cells),
            *warnings,
            *_said(case, first, target, choice, refused),
        ),
        parts=drawn.parts,
        notices=notices,
        measure=case.method.UNIT,
        signed=signed,
    )


def _folded(case: Case, chosen: Sequence[Capture], evidence: Mapping[str, Evidence]) -> Folded:
    """The layers' evidence as one map: a single layer's own, or on the finest one's cells."""
    maps = []
    for capture in chosen:
        values = evidence[capture.layer].values.cpu().numpy()
        cells = case.cells(capture.layer)
        maps.append(Map(capture, cells, values, case.grid_of(cells, values.shape)))
    return together(maps, evidence)


def _matters(first: Capture, target: Target, choice: causal.Choice) -> bool:
    """Whether the test of the layers says something: not where nothing moves the score at all.

    A scan without findings has its reference's score, and then no region of it is worth anything.
    """
    least = outcome.least(target)
    against = first.reference_score
    differs = against is None or abs(first.score - against) > least
    return differs or any(abs(region.effect) > least for region in choice.regions)


def _said(
    case: Case,
    first: Capture,
    target: Target,
    choice: causal.Choice | None,
    refused: Sequence[LayerTrial],
) -> list[str]:
    """What must be said beside the numbers."""
    notes = [*case.model.notes, *case.notes, *gradient_free.remarks(case.model.net)]
    notes += [choice.note] if choice and choice.note and _matters(first, target, choice) else []
    notes += [n for n in case.prepared.notes if n.startswith(FLAGGED)]
    notes += [f"layer {t.layer!r} was passed over: {t.refused}" for t in refused]
    return [*notes, f"quick: {', and '.join(case.given_up)}"] if case.given_up else notes
