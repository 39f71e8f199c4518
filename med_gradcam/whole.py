"""Why does a network say so of a whole volume, window by window, as one map that adds up?

The volume's score is a function of all windows' outputs. Its change from the reference, run by the
same windows, is shared out over these outputs (whole_score.py), and each window is explained for
its part (whole_maps.py). Source: tiling by summation of importance-weighted window targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam import _plugins, gradient_free, members, outcome, reference
from med_gradcam.capture import MEAN_WEIGHTS
from med_gradcam.case import Case
from med_gradcam.detection import Detector
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry
from med_gradcam.geometry import cells as cell_grid
from med_gradcam.intake import provenance
from med_gradcam.model import Model
from med_gradcam.opening import check_one_layer, opened
from med_gradcam.prepare import FLAGGED
from med_gradcam.tail import INPUT
from med_gradcam.target import Target, is_map
from med_gradcam.target_region import output_grid
from med_gradcam.tiling import Importance, tiles
from med_gradcam.volume import Volume
from med_gradcam.whole_ledger import Candidate, WindowRow, candidates
from med_gradcam.whole_maps import Painter, Part, Row, together
from med_gradcam.whole_scan import (
    AIR,
    Plan,
    Room,
    Scan,
    by_maps,
    by_scores,
    room_for_results,
    scan_of,
)
from med_gradcam.whole_score import Dense, Pooled
from med_gradcam.whole_target import Aggregate

_NOT_HERE = {"at": "the windows lie everywhere", "fast": "each window is an input of its own"}


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A volume explained by windows: one map, and what each window has to do with it.

    `explanation`: on one lattice of cells over the volume. `kind`: dense (output maps, stitched) or
    pooled (scores of windows, aggregated). `windows`: all of them, in their order; `candidates`: of
    pooled ones those that score highest, apart. `net`: what all maps add up to, in float64.
    `seconds`: of running one window, and of explaining one. `output` (K, I, J, K') the stitched
    map on the network's grid `grid`, if it was asked for.
    """

    explanation: Explanation
    kind: str
    window: tuple[int, int, int]
    windows: tuple[WindowRow, ...]
    candidates: tuple[Candidate, ...]
    net: float
    grid: Geometry
    ran: int
    seconds: tuple[float, float]
    output: npt.NDArray[Any] | None = field(default=None, repr=False)

    @property
    def skipped(self) -> int:
        """Windows of air, or outside the mask, that were not run."""
        return sum(row.skipped != "" for row in self.windows)

    @property
    def explained(self) -> int:
        """Windows that the score owes something to, which were explained."""
        return sum(row.explained for row in self.windows)

    @property
    def residual(self) -> float | None:
        """Score - reference_score - net; None where the method promises no sum."""
        e = self.explanation
        if e.status == "no_sum" or e.reference_score is None:
            return None
        return e.score - e.reference_score - self.net


def explain_whole(  # noqa: PLR0913 - as explain(); each setting is a key of the JSON
    image: object,
    model: object,
    *,
    target: object = "auto",
    window: Sequence[int] | None = None,
    overlap: float | Sequence[float] = 0.5,
    importance: Importance = "gaussian",
    aggregate: Aggregate = "max",
    temperature: float = 1.0,
    batch: int = 1,
    skip_air: bool = True,
    within: Volume | None = None,
    padding: float | None = None,
    most: int = 10,
    apart_mm: float | None = None,
    keep_output: bool = False,
    **settings: Any,
) -> Whole:
    """One map of a whole volume for a network that sees it through windows; its sum is exact.

    A network that puts out a map is stitched as MONAI's sliding_window_inference does it
    (`overlap`, `importance` constant or gaussian, `padding` the value beside a volume smaller than
    the window, 0), and `target` reads the stitched map. Of one that puts out scores the windows'
    log-odds of `target` are aggregated: max, mean, lse (with `temperature`), noisy-or, or a
    function of the raw outputs (W, K), such as attention. `window`: voxels along the network's
    axes, default its patch, else the whole volume. `batch`: windows run at a time. `skip_air`:
    windows of air (CT below -900 HU, or one value) are not run; `within`: a mask, of the windows
    those whose centre lies in it. `most` and `apart_mm`: candidates to list, and their least
    distance (default: windows that do not overlap). Further settings are those of explain().

    Raises:
        UsageError: a setting that is none, or does not go with windows.
        Otherwise as explain().
    """
    for name in settings:
        if name in _NOT_HERE:
            raise UsageError(f"expected no {name!r} with windows: {_NOT_HERE[name]}.")
    _check_kinds(batch, most, importance, within)
    plan = Plan(
        window, overlap, importance, aggregate, temperature, batch, skip_air, within, padding,
        most, apart_mm, keep_output,
    )  # fmt: skip
    given = {**settings, "target": target}
    with opened(image, _whole_sized(model), given) as case, room_for_results() as room:
        _check(case)
        return _explained(case, plan, _patch(model, case, plan), room)


def _check_kinds(batch: object, most: object, importance: object, within: object) -> None:
    """Refuse settings of another kind before anything is run."""
    if not all(isinstance(n, (int, np.integer)) and n >= 1 for n in (batch, most)):
        raise UsageError(
            f"expected whole numbers, at least 1, as batch and most, got {batch!r} and {most!r}."
        )
    if importance not in ("gaussian", "constant"):
        raise UsageError(f"expected an importance of gaussian or constant, got {importance!r}.")
    if within is not None and not isinstance(within, Volume):
        raise UsageError(f"expected a Volume as the mask within, got {type(within).__name__}.")


def _whole_sized(model: object) -> object:
    """A Model that takes the whole scan instead of a patch of it."""
    if not isinstance(model, Model):
        return model
    return replace(model, input=replace(model.input, patch=None, min_patch=None))


def _patch(model: object, case: Case, plan: Plan) -> tuple[int, int, int]:
    """The window: the one that was asked for, the network's patch, or the volume."""
    own = model.input.patch if isinstance(model, Model) else None
    least = model.input.min_patch if isinstance(model, Model) else None
    wish = plan.window if plan.window is not None else own or case.prepared.raw.shape[1:]
    if own is not None and plan.window is not None and tuple(plan.window) != tuple(own):
        raise UsageError(
            f"expected the network's own patch {tuple(own)} as window, got {tuple(plan.window)}."
        )
    made = tiles(case.prepared.raw.shape[1:], wish, plan.overlap).window
    if least is not None and any(n < m for n, m in zip(made, least, strict=True)):
        raise UsageError(f"expected a window of at least {tuple(least)} voxels, got {made}.")
    return made


def _check(case: Case) -> None:
    """Refuse networks, methods and layers whose maps cannot be added up over windows."""
    if isinstance(case.model.net, Detector):
        raise UsageError(
            "expected a classifier or a segmentation network with windows, got a detector, which "
            "runs on the whole scan; explain it with a target such as box:1."
        )
    if members.is_one(case) and case.request.layer not in (INPUT, "input"):
        raise UsageError(
            f"expected the layer '@input' for the mean of several networks with windows, got "
            f"{case.request.layer!r}: a layer belongs to one member only."
        )
    check_one_layer(case, "windows")
    module = _plugins.load("methods", case.request.method)
    adds = module.UNIT == "score" and module.SIGNED and module.LEVEL == "layer"
    if not adds or module.BESIDE:
        raise UsageError(
            f"expected a method whose map is an amount of the score at a layer, so that windows "
            f"add up, such as secant, integrated or hirescam, got {case.request.method!r}."
        )
    if not isinstance(case.request.reference, (str, Volume)):
        raise UsageError("expected one reference for all windows, got several.")


def _explained(case: Case, plan: Plan, window: tuple[int, int, int], room: Room) -> Whole:
    reference.check_contrast(case.prepared)
    scan = scan_of(case, plan, tiles(case.prepared.raw.shape[1:], window, plan.overlap), room)
    first = scan.first()
    found = by_maps(scan, first) if is_map(first[None]) else by_scores(scan)
    score, target, stitched = found
    scores = score.score, score.reference_score
    bound = outcome.bound(target, scores[0], precise=case.request.precise)
    parts, sizes = _parts(score, scan)
    painter = Painter(case, scan.windows, scan.background, parts, bound, room=room)
    painter.change = scores[0] - (scores[1] or 0.0)
    painter.choose(max(sizes, key=lambda n: sizes[n]))
    rows = painter.paint(lambda count: scan.clock(count, "explaining windows"))
    made = _explanation(scan, painter, target, rows, scores)
    ledger = _ledger(scan, score, rows)
    listed = _candidates(scan, score, ledger) if isinstance(score, Pooled) else ()
    grid = case.prepared.grid
    if stitched is not None:
        grid = output_grid(grid, stitched.tiled.shape)
    return Whole(
        made,
        "pooled" if stitched is None else "dense",
        window,
        ledger,
        listed,
        float(sum(row.net for row in rows.values())),
        grid,
        scan.runs.ran,
        (scan.runs.seconds / max(scan.runs.ran, 1), painter.seconds / max(len(rows), 1)),
        np.array(stitched.values) if stitched is not None and plan.keep_output else None,
    )


def _parts(
    score: Pooled | Dense, scan: Scan
) -> tuple[dict[int, Callable[[], Part | None]], dict[int, float]]:
    """What each window is explained for, and how much it matters; only those that count at all."""
    parts: dict[int, Callable[[], Part | None]] = {}
    sizes: dict[int, float] = {}
    if isinstance(score, Dense):
        for n in range(len(scan.windows.tiled)):
            size = score.size(n)
            if size > 0:
                parts[n], sizes[n] = partial(score.weights_of, n), size
        return parts, sizes
    shares = score.shares().abs().tolist()
    for row, n in enumerate(scan.wanted):
        weights = score.weights[row]
        if bool(weights.any()):
            parts[n], sizes[n] = partial(_whole_output, weights), shares[row]
    return parts, sizes


def _whole_output(weights: torch.Tensor) -> Part:
    return None, weights


def _explanation(
    scan: Scan,
    painter: Painter,
    target: Target,
    rows: Mapping[int, Row],
    scores: tuple[float, float | None],
) -> Explanation:
    """The map of the volume, and what can be said of it."""
    case, layer, cells, lattice = scan.case, painter.layer, painter.cells, painter.lattice
    if cells is None or lattice is None:
        raise UsageError("expected windows that the score depends on, there are none.")
    capture, evidence = together(painter, rows, scores)
    values = outcome.without_noise(lattice.values, capture)
    outcome.check_evidence(values, capture)
    signed, promises = bool(case.method.SIGNED), bool(case.method.PROMISES_SUM)
    past = f"flows past the layer {layer!r} (skip connections)"
    status, bypassed, warnings = outcome.status(capture, evidence, past, promises=promises)
    notices = outcome.notices(values, capture, signed=signed, promises=promises)
    own = replace(cells, start=lattice.start)
    told = (*outcome.words(notices, own), *warnings, *_said(scan, painter))
    settings = provenance(case.request, case.volume, case.model, case.prepared, case.where)
    window = {"window": list(scan.windows.tiled.window), **scan.plan.record}
    return Explanation(
        evidence=values.astype(np.float32),
        grid=cell_grid(case.prepared.grid, cells.jump, lattice.start, lattice.values.shape),
        image=case.volume.grid,
        score=scores[0],
        reference_score=scores[1],
        target=target,
        method=case.method_name,
        layer=layer,
        reference=outcome.named(case.method, scan.background),
        cells=own,
        status=status,
        cost_in_forwards=round(scan.runs.ran + painter.forwards, 2),
        provenance=replace(settings, parameters={**settings.parameters, "windows": window}),
        bypassed=bypassed,
        modality=case.modality(),
        calibration=case.model.scale_for(target.label, case.method_name, layer),
        regions=painter.regions,
        trials=painter.trials,
        warnings=told,
        notices=notices,
        measure=case.method.UNIT,
        signed=signed,
    )


def _said(scan: Scan, painter: Painter) -> list[str]:
    """What must be said beside the numbers."""
    case, every = scan.case, len(scan.windows.tiled)
    notes = [*case.model.notes, *gradient_free.remarks(case.model.net)]
    notes += [*painter.warnings, *painter.notes]
    notes += [n for n in case.prepared.notes if n.startswith(FLAGGED)]
    air = sum(why == AIR for why in scan.skipped.values())
    other = len(scan.skipped) - air
    if air:
        notes.append(f"{air} of {every} windows hold air alone: not run, and no part of the score")
    if other:
        notes.append(
            f"{other} of {every} windows lie outside the mask and are no part of the score"
        )
    if painter.lattice is not None and painter.lattice.between:
        notes.append(
            f"the cells of {painter.lattice.between} windows lie between those of the map: their "
            f"evidence is given to the cells on either side by distance"
        )
    if case.method_name in MEAN_WEIGHTS:
        notes.append(f"the channels' weights of {case.method_name} are each window's own")
    if scan.runs.alone:
        notes.append("the network mixes the windows of a batch, so they were run one by one")
    return notes


def _ledger(scan: Scan, score: Pooled | Dense, rows: Mapping[int, Row]) -> tuple[WindowRow, ...]:
    """Every window of the volume, in order."""
    tiled, grid = scan.windows.tiled, scan.case.prepared.grid
    own: dict[int, tuple[float, float | None, float]] = {}
    if isinstance(score, Pooled):
        here, there = score.scores()
        shares = score.shares().tolist()
        own = dict(zip(scan.wanted, zip(here, there, shares, strict=True), strict=True))
    made = []
    for n in range(len(tiled)):
        row = rows.get(n)
        known = own.get(n, (None, None, 0.0) if row is None else _of_row(row))
        made.append(
            WindowRow(
                number=n,
                start=tiled.starts[n],
                centre_ras_mm=_point(grid, tiled.centre(n)),
                score=known[0],
                reference_score=known[1],
                share=known[2],
                net=0.0 if row is None else row.net,
                explained=row is not None,
                skipped=scan.skipped.get(n, ""),
            )
        )
    return tuple(made)


def _of_row(row: Row) -> tuple[float, float | None, float]:
    """Score, reference score and share of a window as it was explained."""
    if row.reference_score is None:
        return row.score, None, row.net
    return row.score, row.reference_score, row.score - row.reference_score


def _point(grid: Geometry, index: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = grid.world_ras(index).tolist()
    return x, y, z


def _candidates(scan: Scan, score: Pooled, ledger: Sequence[WindowRow]) -> tuple[Candidate, ...]:
    """The windows that score highest, apart; by share where a function takes them together."""
    run = [row for row in ledger if not row.skipped]
    by_share = not isinstance(scan.plan.aggregate, str)
    values = [row.share if by_share else row.score or 0.0 for row in run]
    least = 0.0 if score.unit == "log-odds" and not by_share else None
    return candidates(
        run,
        values,
        scan.windows.tiled.window,
        most=scan.plan.most,
        least=least,
        apart_mm=scan.plan.apart_mm,
    )
