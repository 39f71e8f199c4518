"""Which windows cover a volume, how much does each count, and where do its cells lie in the whole?

Positions, importance and padding are those of MONAI's sliding_window_inference, so that outputs
stitched here are the ones that MONAI delivers. Source: MONAI 1.6, monai/inferers/utils.py and
compute_importance_map in monai/data/utils.py (Apache-2.0), written anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import CannotExplainError, UsageError

Importance = Literal["constant", "gaussian"]
Three = tuple[int, int, int]
Slices = tuple[slice, slice, slice]
SIGMA_SCALE = 0.125  # of the gaussian, in window sides
LEAST_WEIGHT = 1e-3  # no voxel of a window counts less than this, or than the corner of its map
ALIGNED = 1e-6  # cells: how far from a place of the lattice rounding may put a cell


@dataclass(frozen=True, slots=True)
class Tiles:
    """Windows of one size over a volume of `shape` voxels.

    `starts`: the first voxel of each window, below 0 where the volume is smaller than the window.
    """

    shape: Three
    window: Three
    starts: tuple[Three, ...]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def padded(self) -> bool:
        """Whether windows reach beyond the volume."""
        return any(n > size for n, size in zip(self.window, self.shape, strict=True))

    def places(self, n: int) -> tuple[Slices, Slices]:
        """What window `n` covers of the volume, and which part of the window that is."""
        here, own = [], []
        for start, n_window, size in zip(self.starts[n], self.window, self.shape, strict=True):
            first, last = max(start, 0), min(start + n_window, size)
            here.append(slice(first, last))
            own.append(slice(first - start, last - start))
        return (here[0], here[1], here[2]), (own[0], own[1], own[2])

    def centre(self, n: int) -> tuple[float, float, float]:
        """The centre of window `n`, a fractional voxel of the volume."""
        a, b, c = (s + (w - 1) / 2 for s, w in zip(self.starts[n], self.window, strict=True))
        return a, b, c

    def scaled(self, size: Sequence[int]) -> Tiles:
        """The same windows over an output that has `size` voxels where the window has its own.

        Raises:
            CannotExplainError: the windows would begin between two voxels of the output.
        """
        if tuple(size) == self.window:
            return self
        pairs = list(zip(size, self.window, strict=True))
        numbers = [*self.starts, self.shape]
        if any(n * m % w for row in numbers for n, (m, w) in zip(row, pairs, strict=True)):
            raise CannotExplainError(
                "dense",
                f"expected windows whose outputs fit together voxel by voxel, got outputs of "
                f"{tuple(size)} voxels for windows of {self.window} that begin between them; "
                f"choose a window and an overlap whose step is a multiple of the network's stride.",
            )
        starts = [_times(start, pairs) for start in self.starts]
        return Tiles(_times(self.shape, pairs), _three(size), tuple(starts))


def _three(values: Sequence[int]) -> Three:
    a, b, c = (int(v) for v in values)
    return a, b, c


def _times(values: Sequence[int], pairs: Sequence[tuple[int, int]]) -> Three:
    return _three([n * m // w for n, (m, w) in zip(values, pairs, strict=True)])


def tiles(
    shape: Sequence[int], window: Sequence[int], overlap: float | Sequence[float] = 0.5
) -> Tiles:
    """The windows that MONAI's sliding_window_inference lays over a volume of `shape` voxels.

    They begin every int(window * (1 - overlap)) voxels; the last one is moved back to end with the
    volume. A volume smaller than the window lies in the middle of it.

    Raises:
        UsageError: no such window or overlap.
    """
    size, wanted = list(shape), list(window)
    if len(wanted) != 3 or any(n != int(n) or n < 1 for n in wanted):
        raise UsageError(f"expected a window of three whole numbers of voxels, got {window}.")
    shares = [overlap] * 3 if isinstance(overlap, (int, float)) else list(overlap)
    if len(shares) != 3 or not all(0 <= share < 1 for share in shares):
        raise UsageError(
            f"expected an overlap of at least 0 and below 1, one number or three, got {overlap}."
        )
    axes = [_starts(*given) for given in zip(size, wanted, shares, strict=True)]
    return Tiles(_three(size), _three(wanted), tuple(_three(start) for start in product(*axes)))


def _starts(size: int, window: int, overlap: float) -> list[int]:
    whole = max(size, window)
    step = window if whole == window else max(int(window * (1 - overlap)), 1)
    count = next(n for n in range(whole) if n * step + window >= whole) + 1
    before = (whole - size) // 2
    return [min(n * step, whole - window) - before for n in range(count)]


def importance(window: Sequence[int], kind: Importance) -> npt.NDArray[np.float32]:
    """How much each voxel of a window counts where windows overlap (i, j, k), float32.

    constant: all alike; gaussian: by a bell of sigma 1/8 of each side, never below 0.001.

    Raises:
        UsageError: no such kind.
    """
    if kind not in get_args(Importance):
        raise UsageError(f"expected an importance of constant or gaussian, got {kind!r}.")
    if kind == "constant":
        return np.ones(tuple(window), dtype=np.float32)
    found = np.ones((1, 1, 1), dtype=np.float32)
    for axis, n in enumerate(window):
        at = np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)
        bell = np.exp(at**2 / np.float32(-2 * (n * SIGMA_SCALE) ** 2))
        found = found * bell.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.maximum(found, np.float32(max(float(found.min()), LEAST_WEIGHT)))


def resized(weights: npt.NDArray[np.float32], size: Sequence[int]) -> npt.NDArray[np.float32]:
    """An importance map for outputs of another size, by the nearest voxel."""
    index = [
        np.floor((np.arange(m) + 0.5) * n / m).astype(int)
        for m, n in zip(size, weights.shape, strict=True)
    ]
    return weights[np.ix_(*index)]


def total(tiled: Tiles, weights: npt.NDArray[Any], out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sum of all windows' importance at each voxel (I, J, K), in `out`, zero before."""
    for n in range(len(tiled)):
        here, own = tiled.places(n)
        out[here] += weights[own]
    return out


# ---------------------------------------------------------------------------------- the lattice


@dataclass(slots=True, eq=False)
class Lattice:
    """One grid of cells for all windows: cell i of an axis at voxel start + i * jump of the volume.

    `values` (i, j, k) float64. A window whose cells lie between those of the lattice gives each
    cell's evidence to its neighbours by distance: sum and centre of mass stay; `between` counts
    such windows.
    """

    start: tuple[float, float, float]
    jump: tuple[float, float, float]
    values: npt.NDArray[np.float64] = field(repr=False)
    between: int = 0

    def add(self, evidence: npt.NDArray[Any], first: Sequence[float]) -> None:
        """Add a window's evidence (i, j, k), its first cell being at voxel `first`."""
        ways: list[list[tuple[int, float]]] = []
        for at, start, jump in zip(first, self.start, self.jump, strict=True):
            steps = (at - start) / jump
            low = math.floor(steps + ALIGNED)
            part = max(steps - low, 0.0)
            ways.append([(low, 1.0)] if part < ALIGNED else [(low, 1 - part), (low + 1, part)])
        for corner in product(*ways):
            place = tuple(
                slice(low, low + n) for (low, _), n in zip(corner, evidence.shape, strict=True)
            )
            share = math.prod(weight for _, weight in corner)
            self.values[place] += evidence if share == 1.0 else share * evidence
        self.between += any(len(way) > 1 for way in ways)


def lattice_shape(
    tiled: Tiles, start: Sequence[float], jump: Sequence[float], counts: Sequence[int]
) -> tuple[tuple[float, float, float], Three]:
    """First cell and size of the lattice that holds the cells of all windows.

    `start`, `jump` and `counts` are those of the cells in one window, in voxels.
    """
    firsts = np.array(tiled.starts, dtype=np.float64) + np.array(start)
    low = firsts.min(axis=0)
    steps = np.ceil((firsts.max(axis=0) - low) / np.array(jump) - ALIGNED).astype(int)
    a, b, c = (float(v) for v in low)
    return (a, b, c), _three([int(s) + n for s, n in zip(steps, counts, strict=True)])
