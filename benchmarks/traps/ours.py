"""How are our own figures got? By running the package, never by claiming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import med_gradcam as mg
from benchmarks.traps.cases import Array, Case, Score, array, correlation, reference
from benchmarks.traps.rows import NOT_OFFERED
from med_gradcam import _plugins
from med_gradcam.capture import capture
from med_gradcam.errors import MedGradcamError
from med_gradcam.methods import Bound
from med_gradcam.tail import at_rest


def explained(case: Case, method: str = "gradcam", **more: Any) -> Any:
    """mg.explain of the class's logit at the case's layer."""
    given: dict[str, Any] = {"layer": case.layer, "link": "sigmoid", **more}
    return mg.explain(case.x[0], case.net, target=case.index, method=method, **given)


def native(case: Case, score: Score | None = None) -> Array:
    """Our signed Grad-CAM (i, j, k) of any score, by med_gradcam.capture."""
    with at_rest(case.net):
        _, found = capture(case.net, case.layer, case.x, lambda _: score or case.score)
        values = _plugins.load("methods", "gradcam").evidence(found, Bound(0.0, 0.0)).values
    return array(values)


def evidence_of(method: str, case: Case) -> Callable[[], Any] | None:
    """The method alone, on a capture that is already there; None where we do not have it."""
    if method not in _plugins.names("methods"):
        return None
    with at_rest(case.net):
        _, found = capture(case.net, case.layer, case.x, lambda _: case.score)
    return lambda: _plugins.load("methods", method).evidence(found, Bound(0.0, 0.0))


def agreement(case: Case) -> Any:
    """Correlation of our map with the right one, or how we refuse."""
    return said(lambda: correlation(explained(case).evidence, reference(case)))


def said(call: Callable[..., Any], *given: Any) -> Any:
    """The result of a call, or "refuses: ..." with the reason we give."""
    try:
        return call(*given)
    except MedGradcamError as error:
        reason = getattr(error, "reason", type(error).__name__)
        return f"refuses: {reason}"


def if_offered(method: str, call: Callable[..., Any]) -> Any:
    """The result of a call where we have that method."""
    return said(call) if method in _plugins.names("methods") else NOT_OFFERED


def dense(case: Case, **more: Any) -> Array:
    """Our signed map drawn on the scan's grid."""
    return array(mg.draw(explained(case, **more)).signed.values)


def tensor(values: Array) -> torch.Tensor:
    """An array as a tensor."""
    return torch.from_numpy(values)
