"""What is run over a volume: its windows, those of its reference, and what they are taken for?

Windows that hold nothing are left out, outputs become one score (whole_score.py), and arrays of
results that are large lie in a temporary folder that goes at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.case import Case
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.graph import trace
from med_gradcam.reference import ReferenceInput
from med_gradcam.target import Target
from med_gradcam.tiling import Importance, Tiles, importance, resized, total
from med_gradcam.volume import Volume
from med_gradcam.whole_score import Dense, Pooled, Stitched, box_of, dense, pooled
from med_gradcam.whole_target import Aggregate, of_map, of_scores, place_is_given
from med_gradcam.whole_windows import Clock, Runs, Windows, uniform

MEMORY_BYTES = 2**30  # arrays of results beyond this lie in a temporary folder, not in memory
AIR, OUTSIDE = "air", "outside the mask"

Room = Callable[[Sequence[int], str], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of one call."""

    window: Sequence[int] | None
    overlap: float | Sequence[float]
    importance: Importance
    aggregate: Aggregate
    temperature: float
    batch: int
    skip_air: bool
    within: Volume | None
    padding: float | None
    most: int
    apart_mm: float | None
    keep_output: bool

    @property
    def record(self) -> dict[str, Any]:
        """The settings as plain values."""
        how = self.aggregate if isinstance(self.aggregate, str) else "function"
        overlap = self.overlap if isinstance(self.overlap, (int, float)) else list(self.overlap)
        return {
            "overlap": overlap,
            "importance": self.importance,
            "aggregate": how,
            "temperature": self.temperature,
            "batch": self.batch,
            "skip_air": self.skip_air,
            "within": self.within is not None,
            "padding": self.padding,
        }


@contextmanager
def room_for_results() -> Iterator[Callable[[Sequence[int], str], npt.NDArray[Any]]]:
    """Makes arrays of zeros: in memory, or large ones in a folder that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="med-gradcam-") as folder:
        count = iter(range(10**6))

        def made(shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
            if float(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize <= MEMORY_BYTES:
                return np.zeros(tuple(shape), dtype=dtype)
            where = Path(folder) / f"{next(count)}.bin"
            return np.memmap(where, dtype=dtype, mode="w+", shape=tuple(shape))

        yield made


@dataclass(slots=True, eq=False)
class Scan:
    """The windows of one scan, and how they are run."""

    case: Case
    plan: Plan
    windows: Windows
    runs: Runs
    room: Room
    skipped: dict[int, str]
    background: ReferenceInput
    compares: bool

    @property
    def wanted(self) -> list[int]:
        """The windows that are run."""
        return [n for n in range(len(self.windows.tiled)) if n not in self.skipped]

    def clock(self, count: int, what: str) -> Clock:
        """A clock for so many windows."""
        return Clock(self.case.request.progress, count, what)

    def first(self) -> torch.Tensor:
        """The output of one window (K, ...); says whether the network puts out scores or maps."""
        (out,) = (
            out for _, out in self.runs.outputs(self.wanted[:1], None, self.clock(1, "a window"))
        )
        return out

    def outputs(self, wanted: Sequence[int], *, scan: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """The outputs of windows of the scan, or of its reference."""
        what = "running windows" if scan else "running windows of the reference"
        whole = None if scan else self.background
        return self.runs.outputs(wanted, whole, self.clock(len(wanted), what))


def scan_of(case: Case, plan: Plan, tiled: Tiles, room: Room) -> Scan:
    """The windows of a prepared scan, and which of them are not worth a run.

    Raises:
        CannotExplainError: none is.
    """
    windows = Windows(case.prepared, tiled, plan.padding)
    background = _background(case, windows)
    runs = Runs(case.model.net, windows, plan.batch, case.request.output, case.where)
    skipped: dict[int, str] = {}
    ct = case.modality() == "CT"
    for n in range(len(tiled)):
        if plan.within is not None and not _inside(
            case.prepared.grid, tiled.centre(n), plan.within
        ):
            skipped[n] = OUTSIDE
        elif plan.skip_air and windows.empty(n, ct=ct):
            skipped[n] = AIR
    if len(skipped) == len(tiled):
        raise CannotExplainError(
            "constant volume",
            "expected a window with something in it, all are air or outside the mask; check the "
            "scan and the mask.",
        )
    return Scan(
        case, plan, windows, runs, room, skipped, background, bool(case.method.USES_REFERENCE)
    )


def _background(case: Case, windows: Windows) -> ReferenceInput:
    """The reference of the whole scan; textured where a norm behind a layer needs that."""
    shape = (case.prepared.raw.shape[0], *windows.tiled.window)
    return uniform(case.background(trace(case.model.net, shape, case.request.output)))


def _inside(grid: Geometry, centre: Sequence[float], mask: Volume) -> bool:
    index = np.floor(mask.grid.index_ijk(grid.world_ras(centre)) + 0.5).astype(int)
    inside = (index >= 0).all() and (index < mask.grid.shape).all()
    return bool(inside and mask.array[(0, *index)] > 0)


def by_scores(scan: Scan) -> tuple[Pooled, Target, None]:
    """Scores of windows, aggregated."""
    wanted = scan.wanted
    here = [out.flatten() for _, out in scan.outputs(wanted, scan=True)]
    target, how, own = of_scores(
        scan.case, torch.stack(here), scan.plan.aggregate, scan.plan.temperature
    )
    there = None
    if scan.compares:
        there = [out.flatten() for _, out in scan.outputs(wanted, scan=False)]
    return pooled(own, how, here, there), target, None


def by_maps(scan: Scan, first: torch.Tensor) -> tuple[Dense, Target, Stitched]:
    """Output maps, stitched; the reference's only where the target reads it.

    Where the target's place is given, the scan's too.

    Raises:
        UsageError: a mask of windows: a stitched map needs all of them.
    """
    if scan.plan.within is not None:
        raise UsageError("expected no mask for the windows of a network that puts out a map.")
    scan.skipped.clear()
    if scan.windows.pad is None:  # as MONAI does
        scan.windows = replace(scan.windows, pad=0.0)
        scan.runs = replace(scan.runs, windows=scan.windows, known={})
    tiled = scan.windows.tiled.scaled(first.shape[1:])
    weights = resized(importance(scan.windows.tiled.window, scan.plan.importance), tiled.window)
    blend = total(tiled, weights, scan.room(tiled.shape, "float32"))
    a, b, c = (slice(0, n) for n in tiled.shape)
    target, box = None, (a, b, c)
    if place_is_given(scan.case) and not scan.plan.keep_output:
        # Where it is read does not depend on the map: nothing else is run.
        target = of_map(scan.case, np.zeros((len(first), *tiled.shape), dtype=np.float32))
        box = box_of(target, tiled.shape)
    like = first.to(torch.float64 if first.dtype == torch.float64 else torch.float32).numpy()
    stitched = _stitched(scan, Stitched(like, tiled, weights, blend, box), is_scan=True)
    if target is None:
        target = of_map(scan.case, stitched.values)
        box = box_of(target, tiled.shape)
    other = None
    if scan.compares:
        other = _stitched(scan, replace(stitched, box=box), is_scan=False)
    return dense(target, stitched, other, box), target, stitched


def _stitched(scan: Scan, like: Stitched, *, is_scan: bool) -> Stitched:
    """The output maps of the scan or of its reference, in a box of the volume."""
    exact = like.values.dtype == np.float64
    size = [len(like.values), *(s.stop - s.start for s in like.box)]
    made = replace(like, values=scan.room(size, "float64" if exact else "float32"))
    wanted = [n for n in range(len(like.tiled)) if made.touches(n)]
    for n, out in scan.outputs(wanted, scan=is_scan):
        made.add(n, out.to(torch.float64 if exact else torch.float32).numpy())
    made.finish()
    return made
