"""What can be said of a map: does it add up, does it say anything, what should a reader know?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.capture import Capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import NOTICE_WORDS, Cells, Notice, Reference, Status
from med_gradcam.methods import Bound, Evidence
from med_gradcam.reference import ReferenceInput
from med_gradcam.target import Target

ROUNDING = 1e-5  # share of a score that single precision cannot resolve
NOT_A_CUT = 0.01  # share that may flow past a layer before the result says so
BALANCED = 1e-4  # for and against this equal, of their sum, are equal by construction
REFERENCE_FREE = Reference("none", None, "no reference: this method looks at the scan alone")
FLAT = 1e-6  # a gradient this small beside what the way to the reference shows is none

NORMAL, PRECISE = 0.05, 0.01  # share of the score's difference that a sum may miss
ABSOLUTE = 0.02  # and never less than this, in log-odds

Values = npt.NDArray[np.float64]


def least(target: Target) -> float:
    """The smallest amount that counts, in the target's unit."""
    return 0.0 if target.link == "none" else ABSOLUTE


def bound(target: Target, score: float, *, precise: bool) -> Bound:
    """How far the sum of a target's evidence may miss."""
    rounding = ROUNDING * max(1.0, abs(score))
    if precise:
        return Bound(rounding, PRECISE)
    return Bound(max(least(target), rounding), NORMAL)


def status(
    chosen: Capture, evidence: Evidence, where: str, *, promises: bool
) -> tuple[Status, float | None, list[str]]:
    """The status, the share of the score's difference that is not in the map, and warnings.

    `where`: what that share does, such as to flow past the layer.
    """
    if not promises or evidence.start_score is None:
        return "no_sum", None, []
    against = chosen.reference_score if chosen.reference_score is not None else 0.0
    difference = chosen.score - against
    past = evidence.start_score - against
    bypassed = past / difference if difference else 0.0
    warnings = []
    if not evidence.converged:
        warnings.append(
            f"the integral has not converged after {evidence.nodes} nodes: the map misses "
            f"the score by more than the bound"
        )
    if abs(past) > max(NOT_A_CUT * abs(difference), 1e-3 * max(1.0, abs(chosen.score))):
        whole = "score" if chosen.reference_score is None else "score's difference"
        warnings.append(f"{bypassed:.0%} of the {whole} {where}: the map leaves that part out")
        return "not_a_cut", bypassed, warnings
    missed = chosen.score - evidence.start_score - float(evidence.values.sum())
    small = NORMAL * abs(difference) < abs(missed) and not alike(chosen)
    if evidence.converged and small and abs(missed) > ROUNDING * max(1.0, abs(chosen.score)):
        warnings.append(
            f"the map misses {abs(missed):.2g} of a difference of {abs(difference):.2g}: it adds "
            f"up to within {ABSOLUTE:g} only"
        )
    return ("complete" if evidence.converged else "not_converged"), bypassed, warnings


def past(chosen: Capture, layer: str) -> str:
    """What the share of the score does that is not in a map of this layer."""
    if chosen.has_rest and not chosen.passed_by:
        return f"belongs to tokens of {layer!r} without a place (a class token)"
    return f"flows past the layer {layer!r} (skip connections)"


def compared(chosen: Capture, evidence: Evidence) -> Capture:
    """The capture with the score that this evidence is relative to."""
    if evidence.reference_score is None:
        return chosen
    return replace(chosen, reference_score=evidence.reference_score)


def named(method: Any, background: ReferenceInput | None) -> Reference:
    """What the evidence is relative to, as the result says it; the method may add to its words."""
    if background is None or not method.USES_REFERENCE:
        return REFERENCE_FREE
    more = "" if background.every else getattr(method, "REFERENCES", "")
    said = background.reference
    return replace(said, words=f"{said.words} {more}") if more else said


def alike(chosen: Capture) -> bool:
    """Whether the scan's score is that of its reference."""
    against = chosen.reference_score
    near = ROUNDING * max(1.0, abs(chosen.score))
    return against is not None and abs(chosen.score - against) <= near


def without_noise(values: Values, chosen: Capture) -> Values:
    """The evidence; none where the score is the reference's and all there is are rounding errors.

    Findings that cancel out are larger than what single precision cannot resolve of the score.
    """
    if chosen.reference_score is None:
        return values
    unresolved = ROUNDING * abs(chosen.score)
    apart = abs(chosen.score - chosen.reference_score)
    nothing = max(apart, float(np.abs(values).sum())) <= unresolved
    return np.zeros_like(values) if nothing else values


def check_evidence(values: npt.NDArray[Any], chosen: Capture) -> None:
    """Refuse evidence that says nothing, unless the scan is like its reference.

    Raises:
        CannotExplainError: it is zero everywhere, or not finite.
    """
    if np.isfinite(values).all() and (values.any() or alike(chosen)):
        return
    raise CannotExplainError(
        "zero evidence",
        f"the evidence at {chosen.layer!r} is zero or not finite everywhere; choose another "
        f"layer or target.",
    )


def notices(
    values: npt.NDArray[Any], chosen: Capture, *, signed: bool, promises: bool
) -> tuple[Notice, ...]:
    """What is true of this map and easily misread in a picture."""
    up, down = float(values[values > 0].sum()), float(-values[values < 0].sum())
    found: list[Notice] = []
    if up + down <= ROUNDING * max(1.0, abs(chosen.score)) and alike(chosen):
        return ("like_reference",)
    if up <= ROUNDING * down:
        found.append("no_positive_evidence")
    if signed and down <= ROUNDING * up:
        found.append("no_negative_evidence")
    if signed and not promises and abs(up - down) <= BALANCED * (up + down):
        found.append("balanced_by_construction")
    if _saturated(values, chosen):
        found.append("saturated")
    return tuple(found)


def _saturated(values: npt.NDArray[Any], chosen: Capture) -> bool:
    """Whether the score no longer moves at the scan, though it did from the reference on."""
    if chosen.known_gradient is None or chosen.baseline is None:
        return False
    change = (chosen.activation - chosen.baseline).double()
    local = float((chosen.known_gradient.double() * change).abs().sum())
    return local <= FLAT * float(np.abs(values).sum())


def words(found: tuple[Notice, ...], cells: Cells) -> list[str]:
    """The notices, and the cells' place where it is not exact, as warnings for people."""
    off = max(cells.uncertainty_voxels or (0.0,))
    span = f" (up to {off:.1f} voxels)" if off else ""
    inexact = []
    if cells.how != "exact":
        inexact = [f"the place of the cells is {cells.how}, not exact{span}"]
    elif off > max(cells.jump) / 2:
        inexact = [f"neighbouring cells lie unevenly, by up to {off:.1f} voxels"]
    return [*(NOTICE_WORDS[notice] for notice in found), *inexact]
