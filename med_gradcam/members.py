"""How is the mean of several networks explained: each by its share of the score, all added up?

The change of the delivered score from the reference is shared out among the members' raw outputs,
exactly, through the mean and the target (secant back-propagation on these alone). That fixes one
linear function of each member's output; each member is explained by it, on the scan as it sees it,
mirrored or not, and the maps are brought back and added. One member is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from med_gradcam import outcome, targeting
from med_gradcam.capture import outputs
from med_gradcam.case import Case
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explaining import explained as alone
from med_gradcam.explanation import Explanation, LayerTrial, Part, Status
from med_gradcam.fold import Values, fold
from med_gradcam.geometry import Geometry, Reorientation, reorient, reorient_array
from med_gradcam.metrics import causal
from med_gradcam.models._averaged import Averaged, Axes, mirrored
from med_gradcam.outputs import first_tensor
from med_gradcam.prepare import FLAGGED, Prepared
from med_gradcam.progress import Step, silent
from med_gradcam.reference import ReferenceInput
from med_gradcam.secant import pair
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from med_gradcam.target import Target

_PREFIX = re.compile(r"(?<![\w.])members\.\d+\.")  # a member's layer in the whole
SAME_MM = 1e-6  # cells this close to each other are the same
NO_SHARE = 0.01  # of the score's change that may be missing before the result says so


@dataclass(frozen=True, slots=True, eq=False)
class EnsembleExplanation:
    """The delivered score's explanation, the members' own, and where they disagree.

    `members` add up to `total`; `disagreement` holds, per cell of it, the standard deviation over
    the members of what each would say alone (its own evidence times their number).
    """

    total: Explanation
    members: tuple[Explanation, ...]
    disagreement: Explanation
    names: tuple[str, ...]

    @property
    def nets(self) -> tuple[float, ...]:
        """What each member's map says in all, in the target's unit."""
        return tuple(float(e.evidence.sum(dtype=np.float64)) for e in self.members)


def is_one(case: Case) -> bool:
    """Whether a case's network is the mean of several."""
    return isinstance(case.model.net, Averaged)


def check_alone(net: torch.nn.Module, others: object) -> None:
    """Refuse other inputs beside the scan, which each member would have to be given.

    Raises:
        UsageError: there are some.
    """
    if isinstance(net, Averaged) and others:
        raise UsageError("expected no other inputs for the mean of several networks.")


def explained(case: Case) -> Explanation:
    """The explanation of the mean, as that of one network."""
    return together(case).total


def together(case: Case) -> EnsembleExplanation:
    """All members explained by their shares of the delivered score.

    Raises:
        UsageError: all layers at once.
        CannotExplainError: the target has no rule, or a member cannot be explained.
    """
    net = case.model.net
    assert isinstance(net, Averaged)  # noqa: S101 - for who reads types; is_one() was asked
    if case.request.layer == "all":
        raise UsageError("expected one layer, or auto, for the mean of several networks, got all.")
    case.request = replace(case.request, layer=_PREFIX.sub("", case.request.layer))
    case.say(0, "running the members")
    first = _Member(**_fields(case, net.members[0], case.prepared))
    background = first.background(first.traced()[1]) if case.method.USES_REFERENCE else None
    delivered = _delivered(case, net, background)
    members = net.pairs()
    seen: list[Explanation] = []
    for n, (own, axes) in enumerate(members):
        case.request.progress(Step(n, len(members), f"member {n + 1} of {len(members)}"))
        fields = _fields(case, own, turned(case.prepared, axes))
        member = _Member(**fields)
        member.ready = None if background is None else _turned_reference(background, axes)
        member.target = _target(delivered, n, axes)
        if seen:
            member.request = replace(case.request, layer=_layer(case, own, seen[0]))
        one = alone(member)
        seen.append(_back(one, axes))
    names = tuple(_name(net, n, axes) for n, (_, axes) in enumerate(members))
    return _summed(case, delivered, seen, names, background)


# ------------------------------------------------------------------------------- one member


@dataclass(slots=True, eq=False)
class _Member(Case):
    """One member's case: the reference and the target come from the ensemble's."""

    ready: ReferenceInput | None = None
    target: Target | None = None

    def background(self, traced: Any) -> ReferenceInput:
        return Case.background(self, traced) if self.ready is None else self.ready

    def _pick(self, output: Any) -> Target:
        return (
            targeting.pick(self.request, output, self.model, self.prepared)
            if (self.target is None)
            else self.target
        )


def _fields(case: Case, net: torch.nn.Module, prepared: Prepared) -> dict[str, Any]:
    model = replace(case.model, net=net, notes=())
    return {
        "request": replace(case.request, progress=silent),
        "volume": case.volume,
        "model": model,
        "method": case.method,
        "prepared": prepared,
        "where": case.where,
    }


def _layer(case: Case, net: torch.nn.Module, first: Explanation) -> str:
    """The layer of the next member: the first one's, where it has it too."""
    wish = case.request.layer
    paths = dict(net.named_modules())
    found = all(part in paths or part == INPUT for part in first.layer.split(" + "))
    return first.layer if wish == "auto" and found else wish


def _turn(axes: Axes) -> Reorientation:
    return Reorientation((0, 1, 2), (0 in axes, 1 in axes, 2 in axes))


def turned(prepared: Prepared, axes: Axes) -> Prepared:
    """The scan mirrored along some of its axes, and where its voxels then lie."""
    if not axes:
        return prepared
    how = _turn(axes)
    return replace(
        prepared,
        raw=_flipped(prepared.raw, how),
        grid=reorient(prepared.grid, how),
        exact=None if prepared.exact is None else _flipped(prepared.exact, how),
        beside=None if prepared.beside is None else _flipped(prepared.beside, how),
    )


def _flipped(array: Any, how: Reorientation) -> Any:
    return np.ascontiguousarray(reorient_array(array, how))


def _turned_reference(background: ReferenceInput, axes: Axes) -> ReferenceInput:
    how = _turn(axes)
    every = tuple(_flipped(raw, how) for raw in background.every)
    return replace(background, raw=_flipped(background.raw, how), every=every)


def _back(one: Explanation, axes: Axes) -> Explanation:
    """A member's map with its cells in the scan's own order again; their places stay."""
    if not axes:
        return one
    how = _turn(axes)
    return one.replace(evidence=_flipped(one.evidence, how), grid=reorient(one.grid, how))


def _name(net: Averaged, n: int, axes: Axes) -> str:
    which = f"member {n // len(net.mirrors) + 1} of {len(net.members)}"
    return f"{which}, mirrored along {', '.join(map(str, axes))}" if axes else which


# ----------------------------------------------------------------------- the delivered score


@dataclass(frozen=True, slots=True, eq=False)
class _Delivered:
    """The mean's target, scores, and the multipliers of each member's output (members, K, ...)."""

    target: Target
    score: float
    reference_score: float | None
    weights: Callable[[int], torch.Tensor]
    forwards: float


def _delivered(case: Case, net: Averaged, background: ReferenceInput | None) -> _Delivered:
    x = case.tensor(case.prepared.network_input())
    here = _collected(net, x)
    joined = net.rejoined(here)
    target = targeting.pick(case.request, joined, case.model, case.prepared)
    score = float(target(joined)[0])
    aggregate = _Rejoined(net)
    if background is None:
        weights = _slopes(aggregate, here, target)
        return _Delivered(target, score, None, net.weights(weights), 1.0)
    there = _collected(net, case.tensor(case.prepared.network_input(background.raw)))
    against = float(target(net.rejoined(there))[0])
    try:
        runs = [pair.run(aggregate, [INPUT], one, lambda _: target) for one in (here, there)]
        weights = pair.share(runs[0], runs[1], [INPUT]).multipliers[INPUT]
    except NoRuleError as error:
        raise CannotExplainError(
            "no rule",
            f"expected a target whose change can be shared out among the members, this one has "
            f"{error}; name a class or a place in the map.",
        ) from error
    return _Delivered(target, score, against, net.weights(weights), 2.0)


class _Rejoined(torch.nn.Module):
    """The mean of outputs that are there already."""

    def __init__(self, net: Averaged) -> None:
        super().__init__()
        self.net = [net]  # not a module of this one: its weights do not matter here

    def forward(self, made: torch.Tensor) -> torch.Tensor:
        return self.net[0].rejoined(made)


def _collected(net: Averaged, x: torch.Tensor) -> torch.Tensor:
    """What the members put out, as far as the mean needs it apart."""
    with torch.no_grad():
        return net.collected(first_tensor(call(x.clone())) for call in net.calls())


def _slopes(aggregate: torch.nn.Module, made: torch.Tensor, target: Target) -> torch.Tensor:
    with torch.enable_grad():
        leaf = made.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(target(aggregate(leaf)).sum(), leaf)
    return found


def _target(delivered: _Delivered, n: int, axes: Axes) -> Target:
    """A member's share: one linear function of its output."""
    weights = mirrored(delivered.weights(n), axes)

    def share(output: Any) -> torch.Tensor:
        return (first_tensor(output) * weights).sum()

    return Target("custom", delivered.target.label, (), "none", function=share)


# ------------------------------------------------------------------------------ added up


def _summed(
    case: Case,
    delivered: _Delivered,
    seen: Sequence[Explanation],
    names: Sequence[str],
    background: ReferenceInput | None,
) -> EnsembleExplanation:
    each = _on_one_grid(seen)
    count, grid = len(seen), each[0][1]
    total = np.sum([values for values, _ in each], axis=0)
    apart = np.std([values * count for values, _ in each], axis=0)
    finest = min(seen, key=lambda e: e.grid.voxel_ml)
    layers = list(dict.fromkeys(e.layer for e in seen))
    target, score, against = delivered.target, delivered.score, delivered.reference_score
    status, bypassed, said = _status(seen, score, against, float(total.sum()))
    regions, trials, note = _tested(case, delivered, (layers[0], total, grid), seen[0], background)
    cost = sum(e.cost_in_forwards for e in seen) / count + delivered.forwards + case.forwards
    parts = tuple(
        Part(f"{name}: {e.layer}", float(e.evidence.sum(dtype=np.float64)), e.cells.jump)
        for name, e in zip(names, seen, strict=True)
    )
    warnings = list(dict.fromkeys(w for e in seen for w in _kept(e)))
    made = finest.replace(
        evidence=total.astype(np.float32),
        grid=grid,
        score=score,
        reference_score=against,
        target=target,
        layer=" | ".join(layers),
        status=status,
        bypassed=bypassed,
        cost_in_forwards=round(cost, 2),
        regions=regions,
        trials=(*trials, *(t for t in seen[0].trials if t.refused)),
        warnings=(*said, *case.model.notes, *warnings, *([note] if note else [])),
        parts=parts,
        calibration=case.model.scale_for(target.label, seen[0].method, layers[0]),
    )
    return EnsembleExplanation(made, tuple(seen), _disagreement(made, apart), tuple(names))


def _disagreement(made: Explanation, apart: Values) -> Explanation:
    """The spread of the members' evidence as a map of its own, without a sign."""
    return made.replace(
        evidence=apart.astype(np.float32),
        signed=False,
        status="no_sum",
        bypassed=None,
        regions=(),
        trials=(),
        notices=(),
        parts=(),
        calibration=None,
        warnings=("standard deviation over the members of what each would say alone",),
    )


def _on_one_grid(seen: Sequence[Explanation]) -> list[tuple[Values, Geometry]]:
    """Each member's evidence on the finest one's cells, its sum kept."""
    finest = min(seen, key=lambda e: e.grid.voxel_ml).grid
    nothing = np.zeros(finest.shape)
    made = []
    for e in seen:
        values = e.evidence.astype(np.float64)
        same = e.grid.shape == finest.shape
        if not (same and np.allclose(e.grid.affine, finest.affine, rtol=0, atol=SAME_MM)):
            values = fold([(nothing, finest), (values, e.grid)])[0]
        made.append((values, finest))
    return made


def _status(
    seen: Sequence[Explanation], score: float, against: float | None, total: float
) -> tuple[Status, float | None, list[str]]:
    kinds = [e.status for e in seen]
    if against is None or "no_sum" in kinds:
        return "no_sum", None, []
    missing = score - against - total
    share = missing / (score - against) if score != against else 0.0
    if "not_a_cut" in kinds or "not_converged" in kinds:
        worst: Status = "not_a_cut" if "not_a_cut" in kinds else "not_converged"
        words = f"{share:.0%} of the score's difference is in no member's map"
        return worst, share, [words] if abs(share) > NO_SHARE else []
    return "complete", share, []


def _kept(one: Explanation) -> list[str]:
    """What is said of a member that also holds for all."""
    return [w for w in one.warnings if w.startswith((*FLAGGED, "layer ", "the place of"))]


def _tested(
    case: Case,
    delivered: _Delivered,
    drawn: tuple[str, Values, Geometry],
    first: Explanation,
    background: ReferenceInput | None,
) -> tuple[tuple[Any, ...], tuple[LayerTrial, ...], str]:
    """The delivered score's test of the sum, where the first member's layer was chosen by one."""
    if not first.regions or background is None or case.request.quick:
        return (), (), ""
    case.say(3, "testing the sum")

    def score(array: np.ndarray[Any, Any]) -> float:
        case.forwards += 1
        net = case.model.net
        return float(delivered.target(outputs(net, case.tensor(array)))[0])

    least = outcome.least(delivered.target)
    kind = causal.Kind(case.method.UNIT == "score", bool(case.method.SIGNED))
    choice = causal.choose(
        [causal.CandidateMap(*drawn)],
        case.prepared,
        background,
        (score, delivered.score, least),
        case.request.seed,
        kind,
    )
    tried = f"{len(first.trials)} layers were tried on the first member"
    return choice.regions, choice.trials, "; ".join(n for n in (tried, choice.note) if n)
