"""What would the network see if nothing were there: the input an explanation is relative to?

Built in the scan's own unit, before the intensity steps. CT: one value everywhere, the median of
the patch's voxels in -980..-600 HU where these are at least 20 % of it (lung), else the median of
-150..150 HU (soft tissue). MR: the median of the foreground inside the foreground (holes included:
dark fluid and lesions are patient), outside unchanged. The choice is part of every statement, so
its kind and value go into the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explanation import Reference
from med_gradcam.prepare import Prepared

Floats = npt.NDArray[np.float32]
SAME_PLACE_MM = 0.1
LUNG_HU, SOFT_HU, LUNG_SHARE = (-980.0, -600.0), (-150.0, 150.0), 0.2


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceInput:
    """The reference as an array `raw` (C, i, j, k), with its description.

    `noise`: the SD per channel of the texture with which a region is filled when it is removed;
    `every`: all of them where several scans were given, `raw` being the first.
    """

    raw: Floats
    reference: Reference
    noise: tuple[float, ...]
    every: tuple[Floats, ...] = ()


def textured(reference: ReferenceInput, prepared: Prepared, seed: int) -> ReferenceInput:
    """The same reference with the scan's own noise where it replaces the scan.

    A norm over places divides by the spread of its input, which a constant has none of.
    """
    if reference.reference.kind in ("file", "none"):
        return reference
    generator = np.random.default_rng(seed)
    sd = np.array(reference.noise, dtype=np.float32)[:, None, None, None]
    noise = generator.standard_normal(reference.raw.shape, dtype=np.float32) * sd
    raw = np.where(reference.raw == prepared.raw, reference.raw, reference.raw + noise)
    words = f"{reference.reference.words}, with the scan's own noise"
    return replace(reference, raw=raw, reference=replace(reference.reference, words=words))


def check_contrast(prepared: Prepared) -> None:
    """Refuse a scan that is the same everywhere.

    Raises:
        CannotExplainError: with its value.
    """
    low, high = float(prepared.raw.min()), float(prepared.raw.max())
    if low == high:
        raise CannotExplainError(
            "constant volume",
            f"the scan is constant ({high:g} everywhere the network looks), so there is nothing "
            f"to explain; check the file or the point.",
        )


def build(kind: str, prepared: Prepared, modality: str | None, unit: str) -> ReferenceInput:
    """The reference input "auto", "tissue", "zero" or "value:X" for a prepared scan.

    "auto" is tissue for CT and MR and zero where the modality is not known.

    Raises:
        UsageError: no such reference, or tissue for a modality without a rule.
        CannotExplainError: the scan is constant.
    """
    check_contrast(prepared)
    raw = prepared.raw
    if kind == "auto":
        kind = "tissue" if modality in ("CT", "MR") else "zero"
    if kind == "tissue":
        if modality == "CT":
            return _ct(raw)
        if modality == "MR":
            return _mr(raw)
        raise UsageError(
            f"expected CT or MR for --reference tissue, got modality {modality}; "
            f"use zero, value:X or a file."
        )
    value = 0.0 if kind == "zero" else value_of(kind)
    words = f"a uniform input of {value:g} {unit}"
    noise = tuple(grain(channel) for channel in raw)
    return ReferenceInput(
        np.full_like(raw, value), Reference(kind.partition(":")[0], value, words), noise
    )


def from_scan(scan: Prepared, prepared: Prepared) -> ReferenceInput:
    """A reference scan of the user's, prepared like the scan that is explained.

    Raises:
        UsageError: it has another size or lies elsewhere (more than 0.1 mm).
    """
    if scan.raw.shape != prepared.raw.shape:
        raise UsageError(
            f"expected a reference scan of the same size as the scan {prepared.raw.shape}, "
            f"got {scan.raw.shape}."
        )
    corners = np.array([[0, 0, 0], [n - 1 for n in prepared.grid.shape]])
    apart = np.abs(scan.grid.world_ras(corners) - prepared.grid.world_ras(corners)).max()
    if apart > SAME_PLACE_MM:
        raise UsageError(
            f"expected a reference scan in the same place as the scan, got one that lies "
            f"{apart:.1f} mm off; register and resample it to the scan first."
        )
    noise = tuple(grain(channel) for channel in prepared.raw)
    return ReferenceInput(scan.raw, Reference("file", None, "the given reference scan"), noise)


def value_of(text: str) -> float:
    """The number of "value:X".

    Raises:
        UsageError: it is none.
    """
    kind, _, number = text.partition(":")
    try:
        if kind == "value" and math.isfinite(float(number)):
            return float(number)
    except ValueError:
        pass
    raise UsageError(
        f"expected a reference of auto, tissue, zero, value:X or a file, got {text!r}, "
        f"and there is no such file."
    )


def _ct(raw: Floats) -> ReferenceInput:
    filled, noise, values = np.empty_like(raw), [], []
    tissue = "tissue"
    for n, channel in enumerate(raw):
        lung = channel[(channel >= LUNG_HU[0]) & (channel <= LUNG_HU[1])]
        soft = channel[(channel >= SOFT_HU[0]) & (channel <= SOFT_HU[1])]
        if lung.size >= LUNG_SHARE * channel.size:
            chosen, tissue = lung, "lung"
        elif soft.size:
            chosen, tissue = soft, "soft tissue"
        else:
            chosen, tissue = channel.ravel(), "tissue"
        filled[n] = np.median(chosen)
        values.append(float(np.median(chosen)))
        noise.append(float(chosen.std()))
    words = f"uniform {tissue} ({values[0]:.0f} HU)"
    return ReferenceInput(filled, Reference("tissue", values[0], words), tuple(noise))


def _mr(raw: Floats) -> ReferenceInput:
    filled, noise, values = raw.copy(), [], []
    for n, channel in enumerate(raw):
        inside = foreground(channel)
        values.append(float(np.median(channel[inside] if inside.any() else channel)))
        filled[n][without_holes(inside)] = values[-1]
        noise.append(grain(channel, inside))
    words = f"uniform foreground tissue (median {values[0]:.3g} a.u., outside unchanged)"
    return ReferenceInput(filled, Reference("tissue", values[0], words), tuple(noise))


def foreground(channel: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """The voxels of an MR channel that are patient.

    Not the constant background where there is one (skull-stripped), else those above Otsu's
    threshold.
    """
    low = channel.min()
    if float((channel == low).mean()) >= 0.1:
        return np.asarray(channel > low)
    counts, edges = np.histogram(channel, bins=256)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    weighted = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = weighted / below - (weighted[-1] - weighted) / above
        between = np.nan_to_num(below * above * gap**2, nan=0.0, posinf=0.0)
    return np.asarray(channel >= edges[int(between.argmax()) + 1])


def without_holes(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask with its holes closed: what is dark inside the head (fluid, a lesion) is patient."""
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    closed = sitk.BinaryFillhole(sitk.GetImageFromArray(mask.astype(np.uint8)))
    return np.asarray(sitk.GetArrayFromImage(closed) > 0)


def grain(channel: Floats, inside: npt.NDArray[np.bool_] | None = None) -> float:
    """SD of voxel-to-voxel noise: robust spread of neighbour differences along the last axis."""
    step = np.diff(channel, axis=-1)
    if inside is not None:
        step = step[inside[..., 1:] & inside[..., :-1]]
    if step.size == 0:
        return 0.0
    return float(1.4826 * np.median(np.abs(step - np.median(step))) / np.sqrt(2.0))
