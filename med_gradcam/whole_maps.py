"""How do the maps of single windows become one map of the volume?

Each window that the score owes something to is explained at one layer for the weighted sum of its
outputs (whole_score.py), and its evidence is added to one lattice of cells. No window's map is
averaged, weighed or scaled again, so that the volume's map adds up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam import observe
from med_gradcam.capture import Capture
from med_gradcam.case import Case
from med_gradcam.errors import UsageError
from med_gradcam.explaining import explained
from med_gradcam.explanation import Cells, LayerTrial, Region
from med_gradcam.graph import Trace
from med_gradcam.intake import Asked, Request
from med_gradcam.methods import Bound, Evidence
from med_gradcam.outputs import first_tensor
from med_gradcam.reference import ReferenceInput
from med_gradcam.tail import Tail
from med_gradcam.target import Target
from med_gradcam.tiling import Lattice, Slices, lattice_shape
from med_gradcam.whole_windows import Clock, Windows, give_back

Part = tuple[Slices | None, torch.Tensor]  # of an output: where, and what each number counts
Room = Callable[[Sequence[int], str], npt.NDArray[Any]]


@dataclass(slots=True, eq=False)
class WindowCase(Case):
    """The explanation of one window, against the reference of the whole scan."""

    given: ReferenceInput | None = None

    def traced(self) -> tuple[torch.Tensor, Trace]:
        """The window's input and the network's layers; a window may be the same everywhere."""
        self.uniform = True  # the volume is not, which is looked at once
        return Case.traced(self)

    def background(self, traced: Trace) -> ReferenceInput:
        """The reference of the window: its part of the whole scan's."""
        return Case.background(self, traced) if self.given is None else self.given


@dataclass(frozen=True, slots=True)
class Row:
    """What explaining one window gave: its weighted output for scan and reference, and its net.

    `past`: what of their difference flows past the layer.
    """

    score: float
    reference_score: float | None
    net: float
    past: float | None
    converged: bool | None


@dataclass(slots=True, eq=False)
class Painter:
    """Explains windows of one scan and adds up their maps.

    `parts`: for each window that counts what of its output does; `bound` of the volume's sum.
    """

    case: Case
    windows: Windows
    background: ReferenceInput
    parts: dict[int, Callable[[], Part | None]]
    bound: Bound
    room: Room
    change: float = 0.0
    layer: str = ""
    cells: Cells | None = None
    trace: Trace | None = None
    lattice: Lattice | None = None
    trials: tuple[LayerTrial, ...] = ()
    regions: tuple[Region, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    forwards: float = 0.0
    seconds: float = 0.0

    # ------------------------------------------------------------------------- one window

    def window(self, n: int, target: Target, request: Request) -> WindowCase:
        """Window `n` as a case of its own."""
        base = self.case
        asked = replace(request, target=Asked("", target=target), output="")
        made = WindowCase(
            asked, base.volume, base.model, base.method, self.windows.one(n), base.where,
            given=self.windows.background(n, self.background),
        )  # fmt: skip
        made.known = self.trace
        return made

    def target(self, part: Part) -> Target:
        """The weighted sum of a window's output as a target."""
        place, weights = part
        path = self.case.request.output

        def weighted(output: Any) -> torch.Tensor:
            found = first_tensor(output, path)[0]
            if place is not None:
                found = found[(slice(None), *place)]
            counts = weights.to(device=found.device, dtype=found.dtype)
            return (found.reshape(counts.shape) * counts).sum()

        return Target("custom", "weighted window", (), "none", function=weighted)

    # ------------------------------------------------------------------------- the layer

    def choose(self, first: int) -> None:
        """The layer for all windows, by the causal test on window `first` unless it is named."""
        request = self.case.request
        part = self.parts[first]()
        if part is None:
            raise UsageError("expected a window that counts, got one that does not.")
        case = self.window(first, self.target(part), request)
        _, self.trace = case.traced()
        names = case.layers(self.trace)
        if request.layer == "auto" and len(names) > 1:
            found = explained(case)
            self.layer, self.trials, self.regions = found.layer, found.trials, found.regions
            tested = found.warnings
            self.warnings = tuple(w for w in tested if "regions are removed" in w or "tested" in w)
        else:
            self.layer = names[0]
            observed = case.observed(names, case.background(self.trace))
            case.guarded(observed.found, self.trace, named=request.layer != "auto")
            case.forwards += observed.forwards
        if case.method_name != request.method:
            self._change_method(case)
        self.forwards += case.forwards
        self.cells = case.cells(self.layer)

    def _change_method(self, case: Case) -> None:
        """A method that stands in for the one that was asked for does so for all windows."""
        self.notes += [note for note in case.notes if "took over" in note]
        self.case.request = replace(self.case.request, method=case.method_name)
        self.case.method, self.case.method_name = case.method, case.method_name

    # ------------------------------------------------------------------------- all of them

    def paint(self, told: Callable[[int], Clock]) -> dict[int, Row]:
        """Explain all windows that count; `told` makes the clock for so many of them.

        Where a window needs another method than those before it, all begin again with that.
        """
        while True:
            rows = self._all(told(len(self.parts)))
            if rows is not None:
                return rows

    def _all(self, clock: Clock) -> dict[int, Row] | None:
        rows: dict[int, Row] = {}
        self.lattice, self.seconds = None, 0.0
        quick = replace(self.case.request, layer=self.layer, quick=True)
        for done, (n, part_of) in enumerate(self.parts.items()):
            clock.tell(done)
            part = part_of()
            if part is None:
                continue
            case = self.window(n, self.target(part), quick)
            began = time.perf_counter()
            capture, evidence = self._evidence(case)
            self.seconds += time.perf_counter() - began
            if case.method_name != self.case.method_name:
                self._change_method(case)
                return None
            self.forwards += case.forwards
            rows[n] = self._add(n, capture, evidence)
            del case, capture, evidence
            give_back()
        return rows

    def _evidence(self, case: WindowCase) -> tuple[Capture, Evidence]:
        _, traced = case.traced()
        background = case.background(traced) if case.method.USES_REFERENCE else None
        observed = case.observed([self.layer], background)
        capture = observed.found[self.layer]
        share = self.bound.of(self.change) / max(len(self.parts), 1)
        evidence = case.method.evidence(capture, Bound(share, self.bound.share))
        case.forwards += observed.forwards + observe.cost(capture, traced)
        return capture, evidence

    def _add(self, n: int, capture: Capture, evidence: Evidence) -> Row:
        values = evidence.values.cpu().numpy()
        if self.lattice is None:
            self.lattice = self._empty(values.shape)
        start = self.windows.tiled.starts[n]
        cells = self.cells
        if cells is not None:
            first = [s + c for s, c in zip(start, cells.start, strict=True)]
            self.lattice.add(values, first)
        against = capture.reference_score
        past = None if evidence.start_score is None else evidence.start_score - (against or 0.0)
        return Row(capture.score, against, float(values.sum()), past, evidence.converged)

    def _empty(self, counts: Sequence[int]) -> Lattice:
        cells = self.cells
        if cells is None:
            raise UsageError("expected a layer, none was chosen.")
        start, shape = lattice_shape(self.windows.tiled, cells.start, cells.jump, counts)
        return Lattice(start, cells.jump, self.room(shape, "float64"))


def together(
    painter: Painter, rows: Mapping[int, Row], scores: tuple[float, float | None]
) -> tuple[Capture, Evidence]:
    """All windows as one capture and its evidence, for what is said of a map (outcome.py)."""
    score, against = scores
    values = np.zeros((1, 1, 1)) if painter.lattice is None else painter.lattice.values
    promises = bool(painter.case.method.PROMISES_SUM) and against is not None
    past = math.fsum(row.past for row in rows.values() if row.past is not None)
    start = (against or 0.0) + past if promises else None
    converged = all(row.converged for row in rows.values()) if promises else None
    nothing = torch.zeros(1)
    tail = Tail(painter.case.model.net, painter.layer, nothing, ())
    capture = Capture(
        painter.layer, nothing, lambda _: nothing, score, tail, reference_score=against
    )
    return capture, Evidence(torch.from_numpy(values), start, converged)
