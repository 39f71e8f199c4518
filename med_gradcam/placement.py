"""Where do a layer's cells lie, and how sure are we: recursion and probe side by side."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import Cells
from med_gradcam.graph import LayerInfo
from med_gradcam.probe import Point, cell_centres
from med_gradcam.receptive import Lattice

TOLERANCE_VOXELS = 0.01
# The probe's answer per network, layer, input shape and recursion: it depends on nothing else.
_Key = tuple[LayerInfo, tuple[int, ...]]
_PROBED: weakref.WeakKeyDictionary[torch.nn.Module, dict[_Key, Cells]] = weakref.WeakKeyDictionary()


def place(net: torch.nn.Module, info: LayerInfo, shape: Sequence[int]) -> Cells:
    """The cells of a layer on an input of `shape` (C, I, J, K); found once per network and layer.

    Exact where the recursion has a rule for every operation and the probe agrees to 0.01 voxels
    at the middle cell and its neighbour; assumed where the probe has no answer or another;
    measured where branches that meet lie apart, or an operation has no rule, and the probe decides.

    Raises:
        CannotExplainError: neither can say where the cells lie.
    """
    known = _PROBED.setdefault(net, {})
    key = (info, tuple(shape))
    if key not in known:
        known[key] = _place(net, info, shape)
    return known[key]


def _place(net: torch.nn.Module, info: LayerInfo, shape: Sequence[int]) -> Cells:
    middle = [n // 2 for n in info.shape[1:]]
    near = [m - 1 if n > 1 else m for m, n in zip(middle, info.shape[1:], strict=True)]
    cells = (middle, near)
    centres = cell_centres(net, info.name, shape, [tuple(middle), tuple(near)])
    lattice = info.lattice
    if lattice is not None and lattice.agreed:
        says = [_centre(lattice, cell) for cell in cells]
        agree = all(_close(a, b) for a, b in zip(says, centres, strict=True))
        return Cells(lattice.jump, lattice.start, lattice.field, "exact" if agree else "assumed")
    if lattice is not None:
        return _shifted(lattice, cells, centres)
    measured = _measured(info, shape, centres, middle)
    if measured is not None:
        return measured
    raise CannotExplainError(
        "placement",
        f"the place of the cells of the layer {info.name!r} cannot be told: an operation before "
        f"it moves voxels in a way that is not known; choose an earlier layer.",
    )


def _centre(lattice: Lattice, cell: Sequence[int]) -> Sequence[float]:
    return [s + j * i for s, j, i in zip(lattice.start, lattice.jump, cell, strict=True)]


def _close(says: Sequence[float], probed: Point | None) -> bool:
    return probed is not None and all(
        abs(a - b) < TOLERANCE_VOXELS for a, b in zip(says, probed, strict=True)
    )


def _shifted(
    lattice: Lattice, cells: Sequence[Sequence[int]], centres: Sequence[Point | None]
) -> Cells:
    """Branches that meet lie apart: the recursion's spacing, at the probe's mean offset."""
    offsets = [
        [p - s for p, s in zip(probed, _centre(lattice, cell), strict=True)]
        for cell, probed in zip(cells, centres, strict=True)
        if probed is not None
    ]
    if not offsets:
        return Cells(lattice.jump, lattice.start, lattice.field, "assumed")
    a, b, c = (
        s + sum(o) / len(o) for s, o in zip(lattice.start, zip(*offsets, strict=True), strict=True)
    )
    return Cells(lattice.jump, (a, b, c), lattice.field, "measured")


def _measured(
    info: LayerInfo,
    shape: Sequence[int],
    centres: Sequence[Point | None],
    middle: Sequence[int],
) -> Cells | None:
    here, near = centres
    if here is None or near is None:
        return None
    jump = tuple(
        a - b if n > 1 else float(size)
        for a, b, n, size in zip(here, near, info.shape[1:], shape[1:], strict=True)
    )
    if min(jump) <= 0:
        return None
    start = tuple(a - m * j for a, m, j in zip(here, middle, jump, strict=True))
    a, b, c = (float(n) for n in shape[1:])  # what a cell sees is not known: all, at most
    return Cells((jump[0], jump[1], jump[2]), (start[0], start[1], start[2]), (a, b, c), "measured")
