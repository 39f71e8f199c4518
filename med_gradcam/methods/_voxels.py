"""How does a map on a layer's cells get onto the voxels of the network's input?

Both ways use the weights with which maps are drawn (`maps.axis_weights`): linear between the exact
centres of the cells, constant beyond the last centre, nothing more than half a cell outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from med_gradcam.maps import axis_weights
from med_gradcam.methods._masks import laid

Three = tuple[float, float, float]


def interpolated(
    values: torch.Tensor, start: Three, jump: Three, shape: Sequence[int]
) -> torch.Tensor:
    """A map (i, j, k) float64 read at every voxel of `shape`: a weighted mean of the cells near.

    `start` and `jump` in voxels: the centre of cell i lies at start + i * jump.
    """
    tables = [
        axis_weights(n, cells, at, step)
        for n, cells, at, step in zip(shape, values.shape, start, jump, strict=True)
    ]
    return _applied(values, tables)


def spread(values: torch.Tensor, start: Three, jump: Three, shape: Sequence[int]) -> torch.Tensor:
    """Amounts per cell (i, j, k) float64 handed out to the voxels of `shape`: the sum is kept.

    A cell that touches no voxel (its centre lies in the padding) gives all to the nearest one.
    """
    tables = []
    for n, cells, at, step in zip(shape, values.shape, start, jump, strict=True):
        table = axis_weights(n, cells, at, step)
        for cell in np.flatnonzero(table.sum(axis=0) == 0):
            table[int(np.clip(round(at + step * cell), 0, n - 1)), cell] = 1.0
        tables.append(table / table.sum(axis=0))
    return _applied(values, tables)


def _applied(
    values: torch.Tensor, tables: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]
) -> torch.Tensor:
    """One axis after the other: no array is larger than the largest of the two grids."""
    a, b, c = (torch.from_numpy(table) for table in tables)
    return laid(values, (a, b, c))
