"""How does a scan become the array a network expects, and how do its voxels come home?

Axes are permuted and flipped, the spacing changed by one linear interpolation if the model asks
for one, a patch cut out; intensity steps follow, fitted on the scan so that a reference input can
be treated the same. Every step keeps the affine, so maps come home by it alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ImageError, UsageError
from med_gradcam.geometry import Geometry, cells, crop, reorient, reorient_array, reorientation
from med_gradcam.model import InputSpec, Model, Step
from med_gradcam.volume import Volume

Floats = npt.NDArray[np.float32]
SPACING_TOLERANCE = 0.01  # share by which a scan's voxels may differ from the model's unchanged
# Notes that start so change what a map can say: they are warnings.
FLAGGED = ("the scan is smaller", "the values do not look like")
NOT_HU = -200.0  # a CT scan of a patient has air in it; a file with nothing below this is no CT
MOST_PADDING = 2  # a patch may be this many times the scan along an axis
NEARLY_PATCH = 0.10  # a scan this close to a fixed patch is explained whole, around its centre


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The network's view of a scan: `raw` (C, i, j, k) float32 in the scan's own unit on `grid`.

    `steps` are the intensity steps with their quantiles already measured on this scan; `notes`
    say what had to be done. `image` is the scan's own grid. `exact`: what the network takes where
    the steps come before the change of spacing, or a recipe made it, else None; `beside` (i, j, k):
    where the patch lies beside the scan, for every scan alike.
    """

    raw: Floats
    grid: Geometry
    image: Geometry
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    exact: Floats | None = None
    beside: npt.NDArray[np.bool_] | None = None

    def network_input(self, raw: Floats | None = None) -> Floats:
        """The array the network takes: `raw` (this scan's, or a reference's) after the steps."""
        made = self.exact
        if raw is not None or made is None:
            made = apply_steps(self.raw if raw is None else raw, self.steps)
        if raw is None or self.exact is None:
            return made
        same = raw == self.raw  # what was not replaced stays exact
        return np.where(same if self.beside is None else same | self.beside, self.exact, made)


def parse_point(text: str, grid: Geometry) -> npt.NDArray[np.float64]:
    """RAS+ mm of a point given as ras:X,Y,Z, lps:X,Y,Z (mm) or ijk:I,J,K (0-based voxel index).

    Raises:
        UsageError: it is no such point, or lies outside the scan.
    """
    kind, _, rest = text.partition(":")
    try:
        numbers = np.array([float(part) for part in rest.split(",")])
    except ValueError:
        numbers = np.empty(0)
    if kind not in ("ras", "lps", "ijk") or numbers.shape != (3,) or not np.isfinite(numbers).all():
        raise UsageError(
            f"expected a point as ras:X,Y,Z or lps:X,Y,Z in mm or ijk:I,J,K, got {text!r}."
        )
    if kind == "ijk":
        point = grid.world_ras(numbers)
    else:
        point = numbers * (-1, -1, 1) if kind == "lps" else numbers
    index = grid.index_ijk(point)
    if not grid.contains(index):
        corners = grid.world_ras([*product(*[(0, n - 1) for n in grid.shape])])
        low, high = corners.min(axis=0).round().tolist(), corners.max(axis=0).round().tolist()
        raise UsageError(
            f"expected a point inside the scan (voxels 0,0,0 to "
            f"{','.join(str(n - 1) for n in grid.shape)}; RAS about {low} to {high} mm), got "
            f"{text!r}, which is voxel {np.round(index, 1).tolist()}."
        )
    return point


def prepare(volume: Volume, model: Model, at: str | None = None) -> Prepared:
    """The scan as the network of `model` expects it; `at` names the centre of the patch.

    Raises:
        ImageError: modality, channels or size do not fit the network.
        UsageError: a patch must be chosen, or the point is off.
    """
    spec = model.input
    notes = [*volume.source.notes, *_check_fit(volume, spec, model.name)]
    grid, array = volume.grid, np.asarray(volume.array)
    if spec.axes is not None:
        how = reorientation(grid, spec.axes)
        grid, array = reorient(grid, how), reorient_array(array, how)
    grid, before, after, steps = _stepped(grid, array, spec, notes)
    start, shape = _window(grid, volume.grid, spec, at, notes)
    raw = _cut(before, start, shape)
    _check_smallest(raw.shape[1:], spec)
    exact = None if after is None else _cut(after, start, shape, spec.padding)
    beside = None
    if spec.padding is not None:
        beside = _cut(np.zeros((1, *grid.shape), np.float32), start, shape, 1.0)[0] > 0
    cut = crop(grid, start, shape)
    return Prepared(raw, cut, volume.grid, steps, tuple(notes), exact, beside)


def _stepped(
    grid: Geometry, array: npt.NDArray[Any], spec: InputSpec, notes: list[str]
) -> tuple[Geometry, npt.NDArray[Any], npt.NDArray[Any] | None, tuple[Step, ...]]:
    """The whole scan on the network's voxels: grid, in its own unit, as input if known, steps."""
    recipe = spec.recipe if spec.recipe_on is None else spec.recipe_on(grid)
    if recipe is not None:
        made = recipe(array, grid.spacing_mm)
        notes += made.notes
        grid = cells(grid, made.jump, made.start, made.raw.shape[1:])
        return grid, made.raw, made.exact, made.steps
    if not spec.intensity_first:  # measured on the whole scan, not on the patch of it
        if spec.spacing_mm is not None:
            grid, array = _respace(grid, array, spec, notes)
        return grid, array, None, fit_steps(array, spec.intensity)
    steps = fit_steps(array, spec.intensity)
    after = apply_steps(np.ascontiguousarray(array, dtype=np.float32), steps)
    old = grid
    if spec.spacing_mm is not None:
        grid, array = _respace(old, array, spec, notes)
        after = np.asarray(_respace(old, after, spec, [])[1], dtype=np.float32)
    return grid, array, after, steps


def _check_fit(volume: Volume, spec: InputSpec, name: str) -> list[str]:
    if volume.array.shape[0] != spec.channels:
        raise ImageError(
            f"expected {spec.channels} input channel(s) for {name!r}, got {volume.array.shape[0]}; "
            f"give one image per channel, in the model's order."
        )
    if spec.modality is None:
        return []
    if volume.modality is None:
        notes = [f"the file does not say its modality; taken as {spec.modality}, as the model does"]
        if spec.modality == "CT" and float(volume.array.min()) > NOT_HU:
            low = float(volume.array.min())
            notes.append(f"the values do not look like a CT in HU: none is below {low:g}")
        return notes
    if volume.modality != spec.modality:
        raise ImageError(
            f"expected a {spec.modality} scan for {name!r}, got modality {volume.modality}; "
            f"choose a model made for {volume.modality}."
        )
    return []


def _respace(
    grid: Geometry, array: npt.NDArray[Any], spec: InputSpec, notes: list[str]
) -> tuple[Geometry, npt.NDArray[Any]]:
    wanted = zip(spec.spacing_mm or grid.spacing_mm, grid.spacing_mm, grid.shape, strict=True)
    spacing = [old if n == 1 else new for new, old, n in wanted]  # an image keeps its thickness
    jump = [new / old for new, old in zip(spacing, grid.spacing_mm, strict=True)]
    if max(abs(j - 1) for j in jump) <= SPACING_TOLERANCE:
        return grid, array
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    shape = [max(1, round(n / j)) for n, j in zip(grid.shape, jump, strict=True)]
    # The new grid lies in the middle of the old one: no voxel's centre lies beside the scan.
    start = [((n - 1) - (m - 1) * j) / 2 for n, m, j in zip(grid.shape, shape, jump, strict=True)]
    how = sitk.sitkBSpline3 if spec.interpolation == "cubic" else sitk.sitkLinear
    channels = []
    for channel in array:
        image = sitk.GetImageFromArray(np.ascontiguousarray(channel.T, dtype=np.float32))
        out = sitk.Resample(
            image,
            shape,
            sitk.Transform(),
            how,
            start,
            jump,
            image.GetDirection(),
            float(channel.min()),
            sitk.sitkFloat32,
        )
        channels.append(sitk.GetArrayFromImage(out).T)
    have = " x ".join(f"{s:.2f}" for s in grid.spacing_mm)
    notes.append(f"voxels of {have} mm resampled to the model's spacing ({spec.interpolation})")
    return cells(grid, jump, start, shape), np.stack(channels)


def _window(
    grid: Geometry, image: Geometry, spec: InputSpec, at: str | None, notes: list[str]
) -> tuple[list[int], list[int]]:
    """Start (may be negative) and shape of the patch, in voxels of the network's grid."""
    if spec.patch is None:
        if at is not None:
            raise UsageError(
                f"expected no --at, since the model takes the whole scan and no patch; got {at!r}."
            )
        return [0, 0, 0], list(grid.shape)
    patch = list(spec.patch)
    if at is not None:
        centre = [math.floor(c + 0.5) for c in grid.index_ijk(parse_point(at, image)).tolist()]
    elif all(
        abs(n - p) <= NEARLY_PATCH * p or (spec.padding is not None and n <= p)
        for n, p in zip(grid.shape, patch, strict=True)
    ):
        centre = [n // 2 for n in grid.shape]
    else:
        have, want = (" x ".join(str(n) for n in s) for s in (grid.shape, patch))
        raise UsageError(
            f"expected a point --at, since the model takes patches of {want} voxels and the scan "
            f"has {have} (both along {grid.axcodes}); say where to look, for example "
            f"--at ijk:{','.join(str(n // 2) for n in image.shape)}."
        )
    much = any(n > MOST_PADDING * size for size, n in zip(grid.shape, patch, strict=True))
    if much and spec.padding is None:
        raise ImageError(
            f"expected a scan of at least half the model's patch {tuple(patch)} along "
            f"{grid.axcodes}, got {grid.shape} voxels: most of the input would be padding."
        )
    start = []
    for c, n, size in zip(centre, patch, grid.shape, strict=True):
        wanted = c - n // 2
        start.append(-((n - size) // 2) if size < n else min(max(wanted, 0), size - n))
    if any(have < n for have, n in zip(grid.shape, patch, strict=True)):
        how = "at the scan's minimum" if spec.padding is None else f"with {spec.padding:g}"
        notes.append(f"the scan is smaller than the model's patch: padded {how}")
    return start, patch


def _check_smallest(shape: tuple[int, ...], spec: InputSpec) -> None:
    if spec.min_patch is None:
        return
    if any(n < m for n, m in zip(shape, spec.min_patch, strict=True)):
        raise ImageError(
            f"expected a scan of at least {spec.min_patch} voxels along {spec.axes}, got {shape}."
        )


def _cut(
    array: npt.NDArray[Any], start: list[int], shape: list[int], padding: float | None = None
) -> Floats:
    """array[start : start + shape] as float32, padded with a value or each channel's minimum."""
    have = array.shape[1:]
    if start == [0, 0, 0] and tuple(shape) == have:
        return np.ascontiguousarray(array, dtype=np.float32)
    out = np.empty((array.shape[0], *shape), dtype=np.float32)
    out[:] = array.min(axis=(1, 2, 3), keepdims=True) if padding is None else padding
    source, place = [slice(None)], [slice(None)]
    for s, n, h in zip(start, shape, have, strict=True):
        first, last = max(s, 0), min(s + n, h)
        source.append(slice(first, last))
        place.append(slice(first - s, last - s))
    out[tuple(place)] = array[tuple(source)]
    return out


def fit_steps(raw: npt.NDArray[Any], steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps with what they measure on the scan (C, i, j, k) measured.

    So quantile_scale becomes clip, then normalise with the scan's own quantiles, and another array
    can go the same way.
    """
    fitted: list[Step] = []
    array = raw
    for n, step in enumerate(steps):
        new = _measured(array, step)
        fitted += new
        if any(later.name in _MEASURED for later in steps[n + 1 :]):
            array = apply_steps(np.asarray(array, dtype=np.float32), tuple(new))
    return tuple(fitted)


_MEASURED = ("quantile_scale", "minmax_scale", "zscore")


def _measured(array: npt.NDArray[Any], step: Step) -> list[Step]:
    first, second = step.arguments[0], step.arguments[-1]
    if step.name == "quantile_scale":
        low, high = (float(np.quantile(array, q[0])) for q in step.arguments)
        _check_contrast(low, high, f"quantiles at {first[0]:g} and {second[0]:g}")
        return [Step("clip", ((low,), (high,))), Step("normalise", ((low,), (high - low,)))]
    if step.name == "minmax_scale":
        low, high = float(array.min()), float(array.max())
        _check_contrast(low, high, "smallest and largest value")
        share = (high - low) / (second[0] - first[0])
        return [Step("normalise", ((low - first[0] * share,), (share,)))]
    if step.name == "zscore":
        nonzero, parts = bool(first[0]), [array]
        if second[0]:
            parts = [channel[None] for channel in array]
        values = [part[part != 0] if nonzero else part for part in parts]
        means = tuple(float(v.mean(dtype=np.float64)) if v.size else 0.0 for v in values)
        sds = [float(v.std(dtype=np.float64)) if v.size else 0.0 for v in values]
        name = "normalise_nonzero" if nonzero else "normalise"
        return [Step(name, (means, tuple(sd if sd > 0 else 1.0 for sd in sds)))]
    return [step]


def _check_contrast(low: float, high: float, what: str) -> None:
    if high <= low:
        raise ImageError(f"expected a scan with contrast, got equal {what}: {low:g}.")


def apply_steps(raw: Floats, steps: tuple[Step, ...]) -> Floats:
    """Fitted intensity steps on (C, i, j, k), float32."""
    array = raw
    for step in steps:
        if step.name == "clip":
            low, high = (np.array(a, dtype=np.float32)[:, None, None, None] for a in step.arguments)
            array = np.clip(array, low, high)
        elif step.name == "scale":
            array = array * np.float32(step.arguments[0][0])
        elif step.name == "threshold":
            limit, above, value = (np.float32(a[0]) for a in step.arguments)
            array = np.where(array > limit if above else array < limit, array, value)
        elif step.name in ("normalise", "normalise_nonzero"):
            mean, sd = (np.array(a, dtype=np.float32)[:, None, None, None] for a in step.arguments)
            if len(mean) not in (1, len(array)) or len(sd) not in (1, len(array)):
                raise ImageError(
                    f"expected one mean and sd, or one per channel ({len(array)}), got "
                    f"{len(mean)} and {len(sd)}."
                )
            kept = array == 0 if step.name == "normalise_nonzero" else None
            array = (array - mean) / sd
            if kept is not None:
                array[kept] = 0.0
        else:
            raise ImageError(f"expected fitted intensity steps, got {step.name!r}.")
    return np.ascontiguousarray(array, dtype=np.float32)
