"""RISE in 3D: which voxels go with a high score when random parts of the scan are left?

The paper: S(v) = sum_i f(x * M_i) M_i(v) / (N E[M]) with masks M linear between coarse random
cells, each kept with p = 1/2, on a randomly shifted grid. Here what is not kept is the reference
input, f is the log-odds z, and S is centred: per cell b_g = E[z | g kept] - E[z | g not kept]
= Cov(z, m_g) / (p (1 - p)), laid over the cell's voxels as a density, E(v) = sum_g b_g T_g(v) /
sum_u T_g(u) with the mask's own weights T, and averaged over the shifts. E is unbiased for that;
where effects add it is the true evidence smoothed, and sums to the score less the reference's.

Masks come in blocks of one shift: the +-1 rows of a Hadamard matrix (random columns and signs) and
their opposites, so that within a block no cell's own effect leaks into another's, which a Sobol
sequence, cut at 1/2, does not give. Blocks are added until the standard error of no fifth of the
scan is above the bound, at least 2 (512 masks), at most 8 (2048).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence, _masks
from med_gradcam.rerun import input_scores

TITLE = "RISE in 3D against a reference input: scores of the scan seen through random masks"
SOURCE = "Petsiuk et al., BMVC 2018, arXiv:1806.07421, eq. 6 (log-odds, centred, balanced masks)"
CANNOT_SHOW = (
    "anything finer than a fifth of the scan; half of the scan is missing in every mask, so "
    "evidence that needs the whole shows too little; the sum is no promise"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = False
NEEDS_GRADIENT = False

CELLS = 5  # cells along an axis; fewer where it has fewer voxels
FEWEST, MOST = 2, 8  # blocks

Signs = npt.NDArray[np.float64]


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed evidence per voxel (I, J, K) of the network's input; `nodes` counts the masks.

    Raises:
        UsageError: the capture has no reference input.
    """
    if capture.reference_input is None:
        raise UsageError("expected a reference input for the method 'rise', got none.")
    shape = [int(n) for n in capture.input.shape[2:]]
    generator = np.random.default_rng(capture.seed)
    strata = np.stack([generator.permutation(MOST) for _ in shape], axis=1)
    total = torch.zeros(shape, dtype=torch.float64, device=capture.input.device)
    allowed = bound.of(capture.score - (capture.reference_score or 0.0))
    fifths, nodes = [], 0
    for stratum in strata:
        shift = (stratum + generator.random(3)) / MOST
        signs = balanced(int(np.prod([min(CELLS, n) for n in shape])), generator)
        density = block(capture, axes(shape, shift), signs)
        total += density
        fifths.append(_fifths(density))
        nodes += 2 * len(signs)
        if len(fifths) >= FEWEST and float(_errors(fifths).max()) <= allowed:
            break
    return Evidence(total / len(fifths), nodes=nodes)


def axes(shape: Sequence[int], shift: npt.ArrayLike) -> _masks.Weights:
    """The masks' weights per axis: cells as wide as V / CELLS, shifted by 0..1 of a cell."""
    tables = []
    for voxels, part in zip(shape, np.asarray(shift).tolist(), strict=True):
        cells = min(CELLS, voxels)
        wide = voxels / cells
        tables.append(_masks.axis(voxels, cells, wide * part - 0.5, wide))
    return tables[0], tables[1], tables[2]


def balanced(cells: int, generator: np.random.Generator) -> Signs:
    """Rows of +1 (kept) and -1 per cell: any two cells agree in half of the rows.

    Sylvester's Hadamard matrix with random columns, each with a random sign, so that every row
    taken alone is a fair toss of coins.
    """
    rows = np.ones((1, 1))
    while len(rows) < cells:
        rows = np.block([[rows, rows], [rows, -rows]])
    columns = generator.choice(len(rows), cells, replace=False)
    signs: Signs = rows[:, columns] * generator.choice([-1.0, 1.0], cells)
    return signs


def block(capture: Capture, weights: _masks.Weights, signs: Signs) -> torch.Tensor:
    """Density (I, J, K) from the masks in `signs` and their opposites, on one grid of cells."""
    scan, fill = capture.input, capture.reference_input
    if fill is None:
        raise UsageError("expected a reference input for the method 'rise', got none.")
    counts = [table.shape[1] for table in weights]
    both = torch.tensor(np.concatenate([signs, -signs])).to(scan.device, scan.dtype)

    def seen(some: slice) -> torch.Tensor:
        kept = ((both[some] + 1) / 2).reshape(-1, 1, *counts)
        return torch.lerp(fill, scan, _masks.laid(kept, weights))

    scores = input_scores(capture, len(both), seen)
    change = scores[: len(signs)] - scores[len(signs) :]
    effect = (change[:, None] * both[: len(signs)].double()).mean(0).reshape(counts)
    for n, table in enumerate(weights):  # per voxel: divided by the cell's own voxels
        size = table.sum(0).to(effect.device)
        effect = effect / size.reshape([-1 if m == n else 1 for m in range(3)])
    return _masks.laid(effect, weights)


def _fifths(density: torch.Tensor) -> torch.Tensor:
    """Sums over CELLS x CELLS x CELLS boxes."""
    sums = density
    for n in density.shape:
        cells = min(CELLS, n)
        owner = torch.arange(n, device=density.device) * cells // n
        table = torch.nn.functional.one_hot(owner, cells).to(density.dtype)
        sums = torch.tensordot(sums, table, dims=([0], [0]))
    return sums


def _errors(fifths: Sequence[torch.Tensor]) -> torch.Tensor:
    """Standard error of each box's mean over the blocks."""
    return torch.stack(list(fifths)).std(0) / math.sqrt(len(fifths))
