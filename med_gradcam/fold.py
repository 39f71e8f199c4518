"""How do the maps of several layers become one map on the finest one's cells, sum kept?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.capture import Capture
from med_gradcam.explanation import Cells, LayerTrial, Part
from med_gradcam.geometry import Geometry
from med_gradcam.maps import drawing
from med_gradcam.methods import Evidence

LEAST_OFF = 0.05  # slopes this near 1 are equally good

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """One layer's evidence `values` (i, j, k) on its `grid`."""

    capture: Capture
    cells: Cells
    values: Values
    grid: Geometry


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """One map (i, j, k) on its grid, the capture and cells it belongs to, and its parts."""

    values: Values
    grid: Geometry
    capture: Capture
    cells: Cells
    total: Evidence
    parts: tuple[Part, ...]


def together(maps: Sequence[Map], evidence: Mapping[str, Evidence]) -> Folded:
    """The layers of a cut as one map on the finest one's cells; a single layer as it is."""
    if len(maps) == 1:
        (one,) = maps
        total = evidence[one.capture.layer]
        return Folded(one.values, one.grid, one.capture, one.cells, total, ())
    values, n = fold([(m.values, m.grid) for m in maps])
    parts = tuple(Part(m.capture.layer, float(m.values.sum()), m.cells.jump) for m in maps)
    finest = maps[n]
    start = finest.capture.score - sum(part.net for part in parts)
    total = Evidence(torch.from_numpy(values), start, converged=True)
    return Folded(values, finest.grid, finest.capture, finest.cells, total, parts)


def blended(evidence: Mapping[str, Evidence], trials: Sequence[LayerTrial]) -> dict[str, Evidence]:
    """Each layer's evidence times a weight >= 0 by its causal slope; the weights sum to 1.

    A sum of complete maps with such weights is complete, a product is not. The weight falls with
    the square of the slope's distance from 1.
    """
    off = {t.layer: abs(t.slope - 1) for t in trials if t.slope is not None}
    weights = {name: 1 / max(off.get(name, np.inf), LEAST_OFF) ** 2 for name in evidence}
    total = sum(weights.values())
    if total == 0:  # no slope is known
        weights, total = dict.fromkeys(evidence, 1.0), float(len(evidence))
    return {
        name: replace(one, values=one.values * (weights[name] / total))
        for name, one in evidence.items()
    }


def fold(parts: Sequence[tuple[Values, Geometry]]) -> tuple[Values, int]:
    """The sum of the parts (evidence per cell, grid) on the finest grid, and which one that is.

    A coarser cell's evidence is spread as it is drawn (maps.py); what lies outside the finest
    layer's cells goes to the nearest of them, so that nothing is lost.
    """
    finest = min(range(len(parts)), key=lambda n: parts[n][1].voxel_ml)
    values, grid = parts[finest]
    total = values.astype(np.float64, copy=True)
    for n, (evidence, cells) in enumerate(parts):
        if n == finest:
            continue
        if cells == grid:
            total += evidence
            continue
        how = drawing(cells, grid)
        share = how.share() > 0
        total += how.spread(np.where(share, evidence, 0.0)).astype(np.float64) * grid.voxel_ml
        for index in np.argwhere(~share & (evidence != 0)):
            nearest = np.rint(grid.index_ijk(cells.world_ras(index))).astype(int)
            place = tuple(np.clip(nearest, 0, np.array(grid.shape) - 1))
            total[place] += evidence[tuple(index)]
    return total, finest
