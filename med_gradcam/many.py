"""How do many explanations cost little: several scans, targets and layers from one forward?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from med_gradcam import intake, outputs, targeting
from med_gradcam.capture import Capture, capture_all
from med_gradcam.capture import outputs as plain
from med_gradcam.case import UNREPEATED, Case
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explaining import result
from med_gradcam.explanation import Explanation
from med_gradcam.forms import form_of
from med_gradcam.intake import Asked
from med_gradcam.observe import Observed, Pairing, cost, paired, same_target
from med_gradcam.reference import ReferenceInput
from med_gradcam.tail import check_repeats
from med_gradcam.target import Target


def targets_of(wish: object) -> list[Asked] | None:
    """What is to be explained; None for all of the model's outputs."""
    if wish == "all":
        return None
    several = wish if isinstance(wish, list) else [wish]
    return [targeting.asked(one) for one in several]


def from_one_forward(cases: Sequence[Case], wanted: list[Asked] | None) -> list[Explanation]:
    """Scans of one size, all targets, all layers: one forward and one backward per target.

    For methods that look at the scan alone. In the order scan, target, layer.
    """
    first = cases[0]
    inputs = [case.traced() for case in cases]
    names = first.layers(inputs[0][1])
    x = torch.cat([one for one, _ in inputs])
    forms = (form_of(first.model.net, name, x) for name in names)
    if len(cases) > 1 and any(form is not None and form.folded for form in forms):
        return [one for case in cases for one in from_one_forward([case], wanted)]
    asked: list[list[Asked]] = []

    def choose(output: Any) -> list[list[Target]]:
        picked = []
        for n, case in enumerate(cases):
            own = outputs.item(output, n, len(cases))
            asked.append(wanted if wanted is not None else _all(case, own))
            picked.append([_pick(case, one, own) for one in asked[-1]])
        return _agreed(picked)

    with first.hurried(names, x):
        _, found = capture_all(first.model.net, names, x, choose)
    if len(cases) > 1 and not _alone_the_same(cases[-1], found[-1][0][names[0]]):
        return [one for case in cases for one in from_one_forward([case], wanted)]
    shares = 1.0 / len(cases) if len(cases) > 1 else 0.0  # the scan that ran alone, too
    made, built = [], first.forwards
    for case, rows, wishes in zip(cases, found, asked, strict=True):
        forwards, built = 1.0 + shares + built, 0.0
        for row, wish in zip(rows, wishes, strict=True):
            case.begin(replace(case.request, target=wish))
            case.forwards, forwards = forwards, 0.0
            made.extend(_explained(case, row))
    return made


def _alone_the_same(case: Case, capture: Capture) -> bool:
    """Whether a scan of a batch has the score that it has alone.

    Batch norms without statistics of their own, or a maximum over all, mix the scans of a batch.
    """
    x, _ = case.traced()
    with torch.no_grad():
        alone = float(capture.target(plain(case.model.net, x))[0])
    try:
        check_repeats(x, alone, capture.score)
    except CannotExplainError:
        return False
    return True


def from_one_pair(case: Case, wanted: list[Asked] | None) -> list[Explanation]:
    """All targets and all layers of one scan: one run of scan and reference, one sweep per target.

    For layers that were named, and for all. In the order target, layer.

    Raises:
        NoRuleError: an operation has no rule.
    """
    x, traced = case.traced()
    background = case.background(traced)
    other = case.tensor(case.prepared.network_input(background.raw))
    wishes: list[Asked] = []

    def choose(output: Any) -> list[Target]:
        wishes.extend(wanted if wanted is not None else _all(case, output))
        return [_pick(case, one, output) for one in wishes]

    how = Pairing(len(case.named()) > 1, not case.request.quick, case.others)
    names = case.layers(traced)
    with case.hurried(names, x, other):
        found = paired(case.model.net, names, (x, other), choose, traced, how)
    made, built = [], case.forwards
    for observed, wish in zip(found, wishes, strict=True):
        case.begin(replace(case.request, target=wish))
        case.forwards, built = built, 0.0
        case.given_up += [] if how.check else [UNREPEATED]
        made += _told(case, observed, background)
    return made


def each(case: Case) -> list[Explanation]:
    """One explanation per depth, coarsest first, none of them tested; refused ones left out."""
    _, traced = case.traced()
    background = case.background(traced) if case.method.USES_REFERENCE else None
    return _told(case, case.observed(case.layers(traced), background), background)


def _told(case: Case, observed: Observed, background: ReferenceInput | None) -> list[Explanation]:
    """What was observed, one explanation per layer; a cut of several layers is one map."""
    _, traced = case.traced()
    named = case.named()
    passed, refused = case.guarded(observed.found, traced, named=bool(named))
    made: list[Explanation] = []
    for names in [list(passed)] if len(named) > 1 else [[name] for name in passed]:
        chosen = [passed[name] for name in names]
        bound = case.bound(observed.target, chosen[0].score)
        evidence = {c.layer: case.method.evidence(c, bound) for c in chosen}
        case.forwards += sum(cost(c, traced) for c in chosen) + (0.0 if made else observed.forwards)
        made.append(result(case, chosen, evidence, observed.target, background, (None, refused)))
        case.forwards = 0.0
    return made


def _pick(case: Case, asked: Asked, output: Any) -> Target:
    request = replace(case.request, target=asked)
    return targeting.pick(request, output, case.model, case.prepared)


def all_outputs(case: Case) -> list[Asked]:
    """Every output of the network as a target."""
    x, _ = case.traced()
    return _all(case, plain(case.model.net, x))


def _all(case: Case, output: Any) -> list[Asked]:
    first = outputs.first_tensor(output, case.request.output)
    return [intake.asked(f"#{n}") for n in range(first.shape[1] if first.ndim > 1 else 1)]


def _agreed(picked: list[list[Target]]) -> list[list[Target]]:
    """Equal targets as one object, so that each is computed once for all scans."""
    seen: list[Target] = []
    for row in picked:
        for n, target in enumerate(row):
            same = next((t for t in seen if t is target or same_target(t, target)), None)
            if same is None:
                seen.append(target)
            else:
                row[n] = same
    return picked


def _explained(case: Case, row: dict[str, Capture]) -> list[Explanation]:
    """One explanation per layer that can be explained."""
    _, traced = case.traced()
    for name, capture in row.items():
        capture.seed, capture.cells = case.request.seed, case.cells(name)
    several = len(row) > 1
    passed, refused = case.guarded(row, traced, named=not several)
    made, done = [], 0.0
    for name, capture in passed.items():
        bound = case.bound(capture.target, capture.score)  # type: ignore[arg-type]
        evidence = {name: case.method.evidence(capture, bound)}
        share = traced.tail_share(name)  # one backward passes all layers, the coarsest first
        case.forwards += max(share - done, 0.0) + cost(capture, traced)
        done = max(done, share)
        made.append(result(case, [capture], evidence, capture.target, None, (None, refused)))  # type: ignore[arg-type]
        case.forwards = 0.0
    return made


def check_one_size(cases: Sequence[Case]) -> None:
    """Refuse a batch of scans that the network sees at different sizes.

    Raises:
        UsageError: with both sizes.
    """
    shapes = [case.prepared.raw.shape for case in cases]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise UsageError(
            f"expected scans of one size in a batch, got {shapes[0]} and {other}; use batch=1."
        )
