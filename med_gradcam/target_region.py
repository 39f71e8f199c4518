"""Which voxels of a network's output map count for the score, and how much each?

The predicted region of a class, one connected part of it, a mask, a voxel or a box; always on the
grid of the output. Source: Vinogradova et al., Seg-Grad-CAM, AAAI 2020, arXiv 2002.11434.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.geometry import Geometry, cells, point_words
from med_gradcam.prepare import parse_point
from med_gradcam.target import Link, TargetRegion, Weights
from med_gradcam.volume import Volume

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
KINDS = ("mask", "component", "voxel", "box")
_FINEST = 4  # sampling points per output voxel and axis, where a mask is finer than the output
_NOISE = 1e-6  # weights below are rounding of the interpolation


# ---------------------------------------------------------------------------- where the voxels lie


def output_grid(grid: Geometry, shape: Sequence[int]) -> Geometry:
    """The grid of an output map of `shape` (i, j, k) over the network's input on `grid`.

    The output is spread over the input in proportion, which is where strided and upsampled heads
    have their voxels, to half a voxel of the input.

    Raises:
        CannotExplainError: it is no whole fraction or multiple of the input.
    """
    for n, m in zip(grid.shape, shape, strict=True):
        stride = max(1, round(n / m))
        if m not in (math.ceil(n / stride), n // stride) and m % n != 0:
            raise CannotExplainError(
                "dense",
                f"expected an output map as large as the network's input {grid.shape}, or a whole "
                f"fraction or multiple of it, got {tuple(shape)}: where its voxels lie cannot be "
                f"told (convolutions without padding?); explain a number of your own with a "
                f"function as target.",
            )
    jump = [n / m for n, m in zip(grid.shape, shape, strict=True)]
    return cells(grid, jump, [(j - 1) / 2 for j in jump], shape)


# --------------------------------------------------------------------------- what the net predicts


def predicted(logits: torch.Tensor, link: Link, c: int) -> Bools:
    """Which voxels (i, j, k) the network takes for class `c`, from its logits (1, K, i, j, k).

    Softmax: the largest logit wins. Sigmoid, or one output: logits above 0.
    """
    rivals = link == "softmax" and logits.shape[1] > 1
    found = logits[0].argmax(dim=0) == c if rivals else logits[0, c] > 0
    mask: Bools = found.cpu().numpy()
    return mask


def counts(logits: torch.Tensor, link: Link, inside: Bools | None) -> list[int]:
    """How many voxels the network takes for each class, `inside` a mask or everywhere."""
    if link != "softmax" or logits.shape[1] == 1:
        masks = (predicted(logits, link, c) for c in range(logits.shape[1]))
        return [int((m if inside is None else m & inside).sum()) for m in masks]
    winner = logits[0].argmax(dim=0).cpu().numpy()
    taken = winner.ravel() if inside is None else winner[inside]
    return [int(n) for n in np.bincount(taken, minlength=logits.shape[1])]


def parts(mask: Bools) -> tuple[npt.NDArray[np.int32], list[int]]:
    """A mask's connected parts (26 neighbours) as numbers from 1, the largest first; their sizes.

    Parts of one size come in the order of their first voxel.
    """
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    found = sitk.GetArrayFromImage(sitk.ConnectedComponent(image, True))  # noqa: FBT003 - sitk's own
    sizes = np.bincount(found.ravel())[1:]
    order = np.argsort(-sizes, kind="stable")
    rank = np.zeros(len(sizes) + 1, dtype=np.int32)
    rank[1 + order] = np.arange(1, len(sizes) + 1)
    return rank[found], [int(n) for n in sizes[order]]


def component(mask: Bools, n: int) -> tuple[Bools, int]:
    """The `n`-th largest connected part (26 neighbours, from 1) of a mask, and how many there are.

    The mask is empty for n too large.
    """
    numbered, sizes = parts(mask)
    return numbered == n if n > 0 else np.zeros_like(mask), len(sizes)


# -------------------------------------------------------------------------------- where users point


def from_mask(mask: Volume, grid: Geometry) -> Floats:
    """A mask's share 0..1 of each voxel of an output `grid`, in one linear interpolation.

    Values of the mask above 1 count as 1, so every label of a label map is inside. Where the mask
    is finer than the output, each output voxel is sampled at several points.

    Raises:
        UsageError: several channels, or values below 0.
    """
    if mask.array.shape[0] != 1 or float(mask.array.min()) < 0:
        raise UsageError(
            f"expected a mask of one channel and no value below 0, got {mask.array.shape[0]} "
            f"channel(s) and {float(mask.array.min()):g}."
        )
    ratio = np.linalg.solve(mask.grid.affine[:3, :3], grid.affine[:3, :3])  # in the mask's voxels
    times = [min(max(1, round(float(r))), _FINEST) for r in np.abs(ratio).max(axis=0)]
    fine = cells(
        grid,
        [1 / t for t in times],
        [(1 / t - 1) / 2 for t in times],
        [n * t for n, t in zip(grid.shape, times, strict=True)],
    )
    values = _sampled(np.minimum(mask.array[0], 1).astype(np.float32), mask.grid, fine)
    (i, j, k), (a, b, c) = grid.shape, times
    share = values.reshape(i, a, j, b, k, c).mean(axis=(1, 3, 5), dtype=np.float64)
    share[share < _NOISE] = 0
    share[share > 1 - _NOISE] = 1
    weights: Floats = share.astype(np.float32)
    return weights


def _sampled(array: Floats, own: Geometry, grid: Geometry) -> Floats:
    """An array on its `own` grid at the voxels of another, linear; 0 beside it."""
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    step = np.linalg.solve(own.affine, grid.affine)  # index of `grid` -> index of `own`
    move = sitk.AffineTransform(3)
    move.SetMatrix(step[:3, :3].ravel().tolist())
    move.SetTranslation(step[:3, 3].tolist())
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    unit = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), image.GetDirection())
    out = sitk.Resample(image, grid.shape, move, sitk.sitkLinear, *unit, 0.0, sitk.sitkFloat32)
    found: Floats = sitk.GetArrayFromImage(out).T
    return found


def from_voxel(text: str, grid: Geometry, image: Geometry) -> tuple[Floats, str]:
    """The output voxel that holds a point ras:X,Y,Z, lps:X,Y,Z or ijk:I,J,K; and its words."""
    point = parse_point(text, image)
    index = np.floor(grid.index_ijk(point) + 0.5).astype(int)
    weights = np.zeros(grid.shape, dtype=np.float32)
    if grid.contains(index):
        weights[tuple(index)] = 1
    return weights, f"the voxel at {point_words(point)}"


def parse_box(text: str, image: Geometry) -> tuple[npt.NDArray[np.float64], tuple[float, ...]]:
    """Centre (RAS+ mm) and sides in mm of a box POINT:SIZE or POINT:X,Y,Z along the patient's axes.

    Raises:
        UsageError: it is no such box.
    """
    where, _, length = text.rpartition(":")
    try:
        sides = tuple(float(part) for part in length.split(","))
    except ValueError:
        sides = ()
    sides = sides * 3 if len(sides) == 1 else sides
    if not (":" in where and len(sides) == 3 and all(0 < side < math.inf for side in sides)):
        raise UsageError(
            f"expected a box as ras:X,Y,Z:SIZE_MM (or lps:, ijk:) with its side in mm, or its "
            f"three sides X,Y,Z, got {text!r}."
        )
    return parse_point(where, image), sides


def from_box(text: str, grid: Geometry, image: Geometry) -> tuple[Floats, str]:
    """The output voxels whose centres lie in a box along the patient's axes, and its words.

    Raises:
        UsageError: it is no such box.
    """
    point, sides = parse_box(text, image)
    half = np.array(sides) / 2
    corners = np.array(np.meshgrid(*[(-h, h) for h in half])).reshape(3, -1).T
    index = grid.index_ijk(point + corners)
    low = np.clip(np.floor(index.min(axis=0)), 0, grid.shape).astype(int)
    high = np.clip(np.ceil(index.max(axis=0)) + 1, 0, grid.shape).astype(int)
    axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    centres = grid.world_ras(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1))
    inside = (np.abs(centres - point) <= half + 1e-6).all(axis=-1)
    weights = np.zeros(grid.shape, dtype=np.float32)
    weights[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = inside
    size = " x ".join(f"{side:g}" for side in (sides if len(set(sides)) > 1 else sides[:1]))
    return weights, f"a box of {size} mm around {point_words(point)}"


# ------------------------------------------------------------------------------------- the region


def region(kind: str, words: str, weights: npt.NDArray[Any]) -> tuple[TargetRegion, Weights]:
    """What is remembered of a region, and the box of its weights (i, j, k), which hold some."""
    import torch

    kept = [np.flatnonzero(weights.any(axis=tuple({0, 1, 2} - {n}))) for n in range(3)]
    start = [int(found[0]) for found in kept]
    inside = tuple(slice(int(found[0]), int(found[-1]) + 1) for found in kept)
    values = np.ascontiguousarray(weights[inside], dtype=np.float32)
    sha = hashlib.sha256(repr((weights.shape, start)).encode())
    sha.update(values.tobytes())
    total, count = float(values.sum(dtype=np.float64)), int(np.count_nonzero(values))
    i, j, k = weights.shape
    box = Weights((i, j, k), (start[0], start[1], start[2]), torch.from_numpy(values))
    return TargetRegion(kind, words, count, total, sha.hexdigest()), box
