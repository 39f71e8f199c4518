"""What can be said of a map: does it add up, does it say anything, what should a reader know?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.capture import Capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import NOTICE_WORDS, Cells, Notice, Status
from med_gradcam.methods import Bound, Evidence
from med_gradcam.target import Target

ROUNDING = 1e-5  # share of a score that single precision cannot resolve
NOT_A_CUT = 0.01  # share that may flow past a layer before the result says so
BALANCED = 1e-4  # for and against this equal, of their sum, are equal by construction
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
    chosen: Capture, evidence: Evidence, layer: str, *, promises: bool
) -> tuple[Status, float | None, list[str]]:
    """The status, the share of the score's difference that passes the layer by, and warnings."""
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
        warnings.append(
            f"{bypassed:.0%} of the score's difference flows past the layer "
            f"{layer!r} (skip connections): the map leaves that part out"
        )
        return "not_a_cut", bypassed, warnings
    return ("complete" if evidence.converged else "not_converged"), bypassed, warnings


def alike(chosen: Capture) -> bool:
    """Whether the scan's score is that of its reference."""
    against = chosen.reference_score
    near = ROUNDING * max(1.0, abs(chosen.score))
    return against is not None and abs(chosen.score - against) <= near


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
    if up + down == 0 and alike(chosen):
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
