"""How does one scan become one explanation: the only place where everything meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from med_gradcam import _plugins, detection, drift, extras, gradient_free, many, members, targeting
from med_gradcam.capture import outputs
from med_gradcam.case import Case
from med_gradcam.errors import UnknownNameError, UsageError
from med_gradcam.explaining import explained
from med_gradcam.explanation import Explanation
from med_gradcam.intake import (
    Asked,
    Request,
    as_model,
    as_volume,
    asked,
    check_progress,
    eager,
    plain,
)
from med_gradcam.observe import Known
from med_gradcam.prepare import prepare
from med_gradcam.progress import Progress, Step, silent
from med_gradcam.running import network_errors, stoppable
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import at_rest
from med_gradcam.volume import Volume


def explain(  # noqa: PLR0913 - the one door; each setting is a key of the JSON
    image: object,
    model: object,
    *,
    target: object = "auto",
    output: str = "",
    layer: str = "auto",
    method: str = "secant",
    reference: str | Volume | Sequence[Volume] = "auto",
    at: str | None = None,
    precise: bool = False,
    quick: bool = False,
    alignment: Literal["nominal", "measured"] = "nominal",
    fast: bool = False,
    accept_drift: bool = False,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    affine: object = None,
    link: str | None = None,
    inputs: object = None,
    progress: Progress = silent,
) -> Explanation:
    """Signed evidence per cell of one layer for one scan; for = raises the score, against = lowers.

    `image`: a Volume, or a bare array or tensor (I, J), (I, J, K), (C, I, J, K) or (1, C, I, J, K)
    with an optional `affine` (index -> RAS+ mm; else 1 mm). `model`: a Model or any torch network
    (`link` softmax, sigmoid or none says what its outputs mean). `target`: "auto", a label, an
    index, "A-vs-B", for maps with a place ("A@component:1", "A@voxel:ras:X,Y,Z", "A@mask:FILE" or
    the pair ("A", mask)), for detectors "box:1"; or a function of the raw output. `output`: where
    in it the scores are, such as "logits" or "[0]"; "": its first tensor. `layer`: "auto", a module
    path, an alias, "@input" (the voxels themselves) or, for secant, "a+b+c", a cut whose maps are
    added; `at`: the centre of the patch; `precise`: integrals within 1 % instead of 5 %; `quick`:
    the coarsest layer, untested, in about two forwards; `alignment`: "nominal" cells as the network
    is built, or "measured" by what they see; `fast`: what comes before the layers fused and checked
    once; `accept_drift`: go on where the model's own preprocessing would give another input;
    `inputs`: what else the network takes, by name, or a tuple with ... where the scan goes. The
    model comes back bit for bit as it was.

    Raises:
        UsageError, ImageError, ModelError: a setting that is none; scan and network do not fit.
        CannotExplainError: no honest map exists; `reason` says why.
        ResourceError, Cancelled: out of memory; `progress` raised it.
    """
    request = Request(
        targeting.asked(target), _one(layer), method, reference, at, precise, device, threads, seed,
        progress, output, quick, alignment, fast, accept_drift,
    )  # fmt: skip
    with prepared_cases([image], model, request, (affine, link, extras.check(inputs))) as (case,):
        return _explained(case)


def _one(layer: object) -> str:
    if layer == "all":
        raise UsageError("expected one layer, or explain_many(..., layer='all') for all of them.")
    return str(layer)


def explain_many(
    images: Sequence[object],
    model: object,
    *,
    target: object = "auto",
    layer: str = "auto",
    method: str = "secant",
    batch: int = 1,
    **settings: Any,
) -> tuple[Explanation, ...]:
    """Several scans, targets and layers; in the order scan, target, layer.

    `target`: as for explain(), a list of such, or "all" outputs; `layer`: as for explain(), or
    "all" for one map per depth; `batch`: how many scans of one size go through the network at
    once; further settings are those of explain(). Methods that look at the scan alone share one
    forward among the scans of a batch, all targets and all layers; `secant` shares one run of scan
    and reference among all targets and layers, where the layer is not tested for each target (auto,
    fused). Each result equals its single run.

    Raises:
        UsageError: scans of several sizes in a batch; otherwise as explain().
        UnknownNameError: a setting that explain() does not have.
    """
    if isinstance(images, (str, Volume, torch.Tensor)) or not hasattr(images, "__len__"):
        raise UsageError(f"expected a list of scans, got {type(images).__name__}.")
    if batch < 1:
        raise UsageError(f"expected a batch of at least one scan, got {batch}.")
    if isinstance(target, list) and not target:
        raise UsageError("expected at least one target, got an empty list.")
    progress = settings.get("progress", silent)
    check_progress(progress)
    made: list[Explanation] = []
    known = Known() if len(images) > 1 else None
    for first in range(0, len(images), batch):
        some = images[first : first + batch]
        progress(Step(first, len(images), f"scan {first + 1} of {len(images)}"))
        made += _some(some, model, (target, str(layer), method), settings, known)
    return tuple(made)


def _some(
    images: Sequence[object],
    model: object,
    what: tuple[object, str, str],
    settings: dict[str, Any],
    known: Known | None,
) -> list[Explanation]:
    """One batch: from one forward where the method allows it, else one after the other."""
    target, layer, method = what
    given = dict(explain.__kwdefaults__ or {})
    for name in settings:
        if name not in given:
            raise UnknownNameError("setting", name, list(given))
    given |= settings
    wanted = many.targets_of(target)
    request = Request(
        asked("auto") if wanted is None else wanted[0],
        layer,
        method,
        **{f.name: given[f.name] for f in fields(Request)[3:]},
    )
    own = given["affine"], given["link"], extras.check(given["inputs"])
    with prepared_cases(images, model, request, own) as cases:
        for case in cases:
            case.others = known
        module = cases[0].method
        # By each target of its own; members have shares of their own.
        tested = layer in ("auto", "fused") or members.is_one(cases[0])
        if not module.USES_REFERENCE and module.LEVEL == "layer" and not tested:
            many.check_one_size(cases)
            return many.from_one_forward(cases, wanted)
        shared = hasattr(module, "INSTEAD") and not tested and (wanted is None or len(wanted) > 1)
        return [one for case in cases for one in _one_scan(case, wanted, shared=shared)]


def _explained(case: Case) -> Explanation:
    """One case as that of one network, or of the mean of several."""
    return members.explained(case) if members.is_one(case) else explained(case)


def _one_scan(case: Case, wanted: list[Asked] | None, *, shared: bool) -> list[Explanation]:
    """All targets of one scan: from one pair of runs, or one target after the other."""
    request = case.request
    if shared:
        with suppress(NoRuleError):
            return many.from_one_pair(case, wanted)
    made = []
    for one in many.all_outputs(case) if wanted is None else wanted:
        case.begin(replace(request, target=one))
        made += many.each(case) if request.layer == "all" else [_explained(case)]
    return made


@contextmanager
def prepared_cases(
    images: Sequence[object], model: object, request: Request, own: tuple[Any, Any, extras.Extras]
) -> Iterator[list[Case]]:
    """The scans prepared, the network at rest on its device; afterwards all as it was."""
    affine, link, others = own
    if request.fast and others:
        raise UsageError(
            "expected no other inputs beside fast, which traces the scan's path alone."
        )
    model = plain(model)
    with at_rest(model) if isinstance(model, torch.nn.Module) else nullcontext():
        found = as_model(model, images[0], link)  # reads the weights: no other thread at work
    gradient_free.check_alone(found.net, others)
    members.check_alone(found.net, others)
    volumes = [as_volume(image, affine, found) for image in images]
    module = _plugins.load("methods", request.method)
    prepared = [prepare(volume, found, request.at) for volume in volumes]
    with (
        request.threads_set(),
        at_rest(found.net),
        eager(found.net),
        request.on_device(found) as where,
        extras.joined(found.net, others, where),
        gradient_free.remembering(found.net),
        stoppable(found.net, request.progress),
        network_errors(found, prepared[0].raw.shape),
    ):
        accept = request.accept_drift
        cases = [
            Case(request, v, found, module, drift.checked(found, v, p, accept=accept), where)
            for v, p in zip(volumes, prepared, strict=True)
        ]
        for case in cases:
            if isinstance(found.net, detection.Detector):
                _find_boxes(case)
        yield cases


def _find_boxes(case: Case) -> None:
    """Which output of a detector is explained, and so which layers are, follows from its boxes."""
    wish = case.request.target
    if wish.function is not None or wish.target is not None:
        return
    output = outputs(case.model.net, case.tensor(case.prepared.network_input()))
    made = targeting.pick(case.request, output, case.model, case.prepared)
    case.request = replace(case.request, target=Asked("", target=made), output=made.output)
    case.forwards += 1.0
