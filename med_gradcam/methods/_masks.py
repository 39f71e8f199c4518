"""How is a coarse mask of cells laid over the voxels of a network's input?

Linear between the centres of the cells, held at the first and the last of them, so that the
weights of every voxel add up to one.
"""

from __future__ import annotations

import torch

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def axis(voxels: int, cells: int, start: float, jump: float) -> torch.Tensor:
    """Weights (voxels, cells) float64 of cells centred at start + n * jump, in voxels."""
    at = ((torch.arange(voxels, dtype=torch.float64) - start) / jump).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells, dtype=torch.float64)).abs()).clamp(min=0)


def laid(cells: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Values (..., I, J, K) at the voxels of values (..., i, j, k) at the cells."""
    out = cells
    for table in weights:
        there = table.to(device=cells.device, dtype=cells.dtype)
        out = torch.tensordot(out, there, dims=([-3], [1]))  # the new axis goes to the end
    return out
