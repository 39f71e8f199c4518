"""How is a case opened for questions other than explain(): settings in, network at rest?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from med_gradcam import extras, layers, targeting
from med_gradcam.case import Case
from med_gradcam.engine import explain, prepared_cases
from med_gradcam.errors import UnknownNameError, UsageError
from med_gradcam.intake import Request


@contextmanager
def opened(image: object, model: object, settings: Mapping[str, Any]) -> Iterator[Case]:
    """One scan and a network, with settings as explain() takes them; afterwards all as it was.

    Raises:
        UnknownNameError: a setting that explain() does not have.
    """
    known = dict(explain.__kwdefaults__ or {})
    for name in settings:
        if name not in known:
            raise UnknownNameError("setting", name, known)
    given = {**known, **settings}
    given["target"] = targeting.asked(given["target"])
    given["layer"] = str(given["layer"])
    request = Request(**{f.name: given[f.name] for f in fields(Request)})
    own = given["affine"], given["link"], extras.check(given["inputs"])
    with prepared_cases([image], model, request, own) as (case,):
        yield case


def check_one_layer(case: Case, what: str) -> None:
    """Refuse "all", "fused", and a cut of several layers.

    Raises:
        UsageError: `what` looks at one layer.
    """
    wish = case.request.layer
    if wish in ("all", "fused") or len(layers.split(case.model, wish)) > 1:
        raise UsageError(f"expected one layer for {what}, got {wish!r}.")
