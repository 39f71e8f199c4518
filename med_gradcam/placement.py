"""Where do a layer's cells lie, and how sure are we: recursion and probe side by side."""

from __future__ import annotations

import hashlib
import math
import statistics
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from med_gradcam.errors import CannotExplainError, InputError
from med_gradcam.explanation import Cells
from med_gradcam.graph import LayerInfo
from med_gradcam.probe import Point, cell_centres, effective_centres
from med_gradcam.receptive import Lattice

Alignment = Literal["nominal", "measured"]
TOLERANCE_VOXELS = 0.01
# What a placement depends on: layer, recursion, input shape, and for a measured one the input.
_Key = tuple[LayerInfo, tuple[int, ...], str]
_PLACED: weakref.WeakKeyDictionary[torch.nn.Module, dict[_Key, Cells]] = weakref.WeakKeyDictionary()
# Four corners of a cube of cells: along each axis two are before the middle and two behind.
_CORNERS = ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0))


def place(
    net: torch.nn.Module,
    info: LayerInfo,
    shape: Sequence[int],
    alignment: Alignment = "nominal",
    x: torch.Tensor | None = None,
) -> Cells:
    """The cells of a layer on an input of `shape` (C, I, J, K); found once per network and layer.

    nominal: exact where the recursion has a rule for every operation and the probe agrees to 0.01
    voxels; assumed where the probe has no answer or another; measured where branches that meet lie
    apart, or an operation has no rule, and the probe decides. `uncertainty_voxels` holds how far
    branches, or recursion and probe, lie apart, or how unevenly cells lie that were made from one.

    measured: moved to where the trained network really looks on `x` (1, C, I, J, K; seeded noise
    without one), by the mean over four cells about the middle; `uncertainty_voxels` holds how far
    that is from the nominal place. Costs a forward and four backwards of all up to the layer.

    Raises:
        CannotExplainError: neither can say where the cells lie, or the layer does not see the scan.
        InputError: no such alignment, or `x` is not of `shape`.
    """
    if alignment not in get_args(Alignment):
        raise InputError(f"expected alignment nominal or measured, got {alignment!r}.")
    known = _PLACED.setdefault(net, {})
    key = (info, tuple(shape), "")
    if key not in known:
        known[key] = _nominal(net, info, shape)
    if alignment == "nominal":
        return known[key]
    there = _noise(net, shape) if x is None else x
    if tuple(there.shape) != (1, *shape):
        raise InputError(f"expected an input {(1, *shape)}, got {tuple(there.shape)}.")
    own = (*key[:2], _digest(there))
    if own not in known:
        known[own] = _moved(net, info, known[key], there)
    return known[own]


def _nominal(net: torch.nn.Module, info: LayerInfo, shape: Sequence[int]) -> Cells:
    cells = _neighbours(info.shape[1:])
    centres = cell_centres(net, info.name, shape, cells)
    if info.lattice is not None:
        return _checked(info.lattice, cells, centres)
    if not any(centres) and not sees_scan(net, info.name, shape):
        raise CannotExplainError(
            "other input",
            f"expected a layer that sees the scan, {info.name!r} does not: nothing leads from the "
            f"scan to it, it gets another input of the network; choose a layer behind the scan.",
        )
    measured = _measured(info, shape, cells, centres)
    if measured is not None:
        return measured
    raise CannotExplainError(
        "placement",
        f"the place of the cells of the layer {info.name!r} cannot be told: an operation before "
        f"it moves voxels in a way that is not known; choose an earlier layer.",
    )


def sees_scan(net: torch.nn.Module, layer: str, shape: Sequence[int]) -> bool:
    """Whether the scan has a part in a layer's output: by a gradient, or by its values."""
    noise, seen = _noise(net, shape), []
    scan = torch.zeros_like(noise, requires_grad=True)

    def look(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        seen.append(output)

    handle = net.get_submodule(layer).register_forward_hook(look)
    try:
        with torch.enable_grad():
            net(scan.clone())
            (first,) = seen
            led = first.requires_grad and any(
                g is not None for g in torch.autograd.grad(first.sum(), scan, allow_unused=True)
            )
            net(noise)
    finally:
        handle.remove()
    return led or not torch.equal(first, seen[-1])


def _neighbours(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The middle cell, and the one before it along each axis and along all three."""
    middle = [n // 2 for n in counts]
    steps = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    return [tuple(max(m - s, 0) for m, s in zip(middle, step, strict=True)) for step in steps]


def _three(values: Iterable[float]) -> Point:
    a, b, c = values
    return a, b, c


def _centre(cells: Cells, cell: Sequence[int]) -> Point:
    return _three(s + j * i for s, j, i in zip(cells.start, cells.jump, cell, strict=True))


def _offsets(
    made: Cells, cells: Sequence[Sequence[int]], centres: Sequence[Point | None]
) -> list[list[float]]:
    """How far the centres found lie from where `made` has these cells, voxels (n, 3)."""
    return [
        [f - s for f, s in zip(found, _centre(made, cell), strict=True)]
        for cell, found in zip(cells, centres, strict=True)
        if found is not None
    ]


def _mean(offsets: Sequence[Sequence[float]]) -> Point:
    return _three(statistics.fmean(axis) for axis in zip(*offsets, strict=True))


def _most(offsets: Sequence[Sequence[float]]) -> Point:
    return _three(max(abs(v) for v in axis) for axis in zip(*offsets, strict=True))


def _shifted(made: Cells, offset: Sequence[float], off_by: Point) -> Cells:
    start = _three(s + o for s, o in zip(made.start, offset, strict=True))
    return replace(made, start=start, how="measured", uncertainty_voxels=off_by)


def _checked(
    lattice: Lattice, cells: Sequence[Sequence[int]], centres: Sequence[Point | None]
) -> Cells:
    """The recursion's cells, beside what the probe says about some of them."""
    doubt = lattice.uneven if max(lattice.uneven) > TOLERANCE_VOXELS else None
    made = Cells(lattice.jump, lattice.start, lattice.field, "exact", doubt)
    offsets = _offsets(made, cells, centres)
    if not lattice.agreed:  # branches that meet lie apart: the probe's mean is between them
        off_by = _three(a + u for a, u in zip(lattice.apart, lattice.uneven, strict=True))
        if offsets:
            return _shifted(made, _mean(offsets), off_by)
        return replace(made, how="assumed", uncertainty_voxels=off_by)
    if not offsets:
        return replace(made, how="assumed")
    off = _most(offsets)
    within = all(o < u + TOLERANCE_VOXELS for o, u in zip(off, lattice.uneven, strict=True))
    if len(offsets) == len(cells) and within:
        return made
    return replace(made, how="assumed", uncertainty_voxels=off)


def _measured(
    info: LayerInfo,
    shape: Sequence[int],
    cells: Sequence[Sequence[int]],
    centres: Sequence[Point | None],
) -> Cells | None:
    """Start and spacing from the probe alone; None where its answers make no grid of cells.

    One step along an axis of the cells must move the centre along that axis of the scan alone, one
    along all by the sum of these, and the cells must fit the scan.
    """
    counts, sizes = info.shape[1:], _three(float(n) for n in shape[1:])
    if max(counts) == 1:  # one cell stands for all of the scan
        return Cells(sizes, _three((n - 1) / 2 for n in sizes), sizes, "assumed")
    if any(centre is None for centre in centres):
        return None
    here, *others = [centre for centre in centres if centre is not None]
    jump = [
        here[axis] - others[axis][axis] if counts[axis] > 1 else sizes[axis] for axis in range(3)
    ]
    spans = zip(jump, counts, sizes, strict=True)
    if any(j <= 0 or j * (n - 1) > 1.5 * size for j, n, size in spans):
        return None
    start = _three(h - i * j for h, i, j in zip(here, cells[0], jump, strict=True))
    made = Cells(_three(jump), start, sizes, "measured")  # what a cell sees: all, at most
    off = _most(_offsets(made, cells, centres))
    if any(o > j / 2 for o, j in zip(off, jump, strict=True)):
        return None
    return made if max(off) < TOLERANCE_VOXELS else replace(made, uncertainty_voxels=off)


# ------------------------------------------------------------- where a trained network looks


def _moved(net: torch.nn.Module, info: LayerInfo, nominal: Cells, x: torch.Tensor) -> Cells:
    """The cells where four about the scan's middle really look.

    Borders, and norms and gates that see everything, draw a cell's centroid to the scan's middle,
    as much from one side as from the other. So what is taken is the offset at the middle, linear
    between the cells on either side of it.
    """
    about = [
        _about((size - 1) / 2, start, jump, count)
        for size, start, jump, count in zip(
            x.shape[2:], nominal.start, nominal.jump, info.shape[1:], strict=True
        )
    ]
    ends = [(low, high) for low, high, _ in about]
    cells = [tuple(end[s] for end, s in zip(ends, side, strict=True)) for side in _CORNERS]
    centres = effective_centres(net, info.name, x, cells)
    offsets = _offsets(nominal, cells, centres)
    if not offsets:
        raise CannotExplainError(
            "placement",
            f"expected the middle cells of the layer {info.name!r} to depend on the scan, their "
            f"gradient is zero; use the alignment nominal.",
        )
    spoke = [side for side, centre in zip(_CORNERS, centres, strict=True) if centre is not None]

    def moved(axis: int, share: float) -> float:
        before, behind = (
            [o[axis] for o, side in zip(offsets, spoke, strict=True) if side[axis] == end]
            for end in (0, 1)
        )
        if not before or not behind:  # silent cells: the others stand for all
            return statistics.fmean(before or behind)
        return statistics.fmean(before) * (1 - share) + statistics.fmean(behind) * share

    offset = _three(moved(axis, share) for axis, (_, _, share) in enumerate(about))
    return _shifted(nominal, offset, _three(abs(o) for o in offset))


def _about(middle: float, start: float, jump: float, count: int) -> tuple[int, int, float]:
    """The cells before and behind a place along an axis, and its share of the way between them."""
    at = min(max((middle - start) / jump, 0.0), count - 1.0)
    low, high = math.floor(at + 1e-6), math.ceil(at - 1e-6)
    if low == high and 0 < low < count - 1:
        return low - 1, low + 1, 0.5
    return low, high, at - low


def _noise(net: torch.nn.Module, shape: Sequence[int]) -> torch.Tensor:
    first = next(net.parameters(), torch.empty(0))
    drawn = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    return drawn.to(device=first.device, dtype=first.dtype)


def _digest(x: torch.Tensor) -> str:
    values = x.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()
