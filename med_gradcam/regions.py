"""What is each region worth to the score, by the map and by Shapley values beside it?

The map's net adds up cells one by one; a Shapley value averages over all orders in which regions
could appear, so it also counts what regions do together. Behind a linear tail both are the same;
where they part, regions interact and the map has shared that out by a rule of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam import gradient_free, observe
from med_gradcam.capture import Capture
from med_gradcam.case import Case
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explaining import explained
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry, point_words, side_words
from med_gradcam.intake import Request
from med_gradcam.maps import Drawing, draw, drawing
from med_gradcam.metrics import shapley as game
from med_gradcam.opening import check_one_layer, opened
from med_gradcam.progress import Step
from med_gradcam.reference import SAME_PLACE_MM
from med_gradcam.volume import Volume

MOST = game.EXACT  # components that are taken; more cannot be worked out exactly
MOST_LABELS = 256  # of a label map: more is a scan, not a label map

Labels = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RegionValue:
    """One region: what the map says it is worth, and its Shapley value, in the target's unit.

    `number` in the label map, 0 for elsewhere; `standard_error` of the value, 0 where it is exact;
    `ml` its volume in the scan; `ras_mm` its centre of mass in RAS+ mm, None for elsewhere.
    """

    number: int
    name: str
    net: float
    value: float
    standard_error: float
    ml: float
    ras_mm: tuple[float, float, float] | None

    @property
    def deviation(self) -> float:
        """What the map says more than the Shapley value does."""
        return self.net - self.value

    @property
    def words(self) -> str:
        """Where its centre is, for people; empty for elsewhere."""
        return "" if self.ras_mm is None else f"{point_words(self.ras_mm)} ({self.side})"

    @property
    def side(self) -> str:
        """Which side of the scanner's midline its centre lies on; empty for elsewhere."""
        return "" if self.ras_mm is None else side_words(self.ras_mm)


@dataclass(frozen=True, slots=True, eq=False)
class RegionValues:
    """The regions of one map, and elsewhere: all that none of them covers.

    `start_score`: with the layer's activation that of the reference everywhere; `labels` (I, J, K)
    int32 on the scan's grid; `passes` of the network behind the layer were needed; `forwards`: the
    cost of all of it, the map too.
    """

    explanation: Explanation = field(repr=False)
    regions: tuple[RegionValue, ...]
    elsewhere: RegionValue
    start_score: float
    passes: int
    forwards: float
    labels: Labels = field(repr=False)

    @property
    def total(self) -> float:
        """All Shapley values together: score - start_score."""
        return sum(row.value for row in self.regions) + self.elsewhere.value

    @property
    def residual(self) -> float | None:
        """Score - reference_score - total: what flows past the layer, and rounding.

        None where the map's method has no reference.
        """
        e = self.explanation
        return None if e.reference_score is None else e.score - e.reference_score - self.total

    @property
    def exact(self) -> bool:
        """Whether the values are exact, not sampled."""
        return all(row.standard_error == 0 for row in (*self.regions, self.elsewhere))


def shapley(
    image: object,
    model: object,
    *,
    regions: object = "components",
    names: Mapping[int, str] | None = None,
    most: int = MOST,
    **settings: Any,
) -> RegionValues:
    """Shapley values of regions of the map at its layer, beside what the map says of each.

    `regions`: "components", the connected parts of the map as it is coloured, the `most` with the
    largest net evidence; or a label map on the scan's own grid (Volume or array (I, J, K) of whole
    numbers), each number above 0 a region, called by `names`. A coalition of regions is scored
    with the layer's activation inside it and the reference's elsewhere. Up to 10 regions exact in
    at most 2^(regions + 1) runs of what lies behind the layer; beyond, sampled with an error bar.
    Further settings are those of explain(), for one layer and a method in the score's own unit.

    Raises:
        UsageError: no such regions, several layers, a method of another unit.
        CannotExplainError: nothing is coloured; otherwise as explain().
    """
    if not 1 <= most <= MOST:
        raise UsageError(f"expected 1 to {MOST} components, got {most}.")
    with opened(image, model, settings) as case:
        check_one_layer(case, "Shapley values")
        _check_unit(case)
        given = None if _is(regions, "components") else _label_map(regions, case.volume.grid)
        e = explained(case)
        labels = _components(e, most) if given is None else given
        masks = _masks(labels, drawing(e.grid, e.image))
        _, traced = case.traced()
        cost = e.cost_in_forwards
        case.begin(_at(case, e))
        seen = case.observed([e.layer], case.background(traced))
        capture = seen.found[e.layer]
        case.request.progress(Step(5, 6, f"values of {len(masks)} regions"))
        found = _values(capture, masks, case.request.seed)
        cost += case.forwards + seen.forwards + observe.cost(capture, traced)
    rows = list(_rows(e, labels, masks, found, names or {}))
    labels.setflags(write=False)
    passes, start = found.passes, found.start_score
    return RegionValues(e, tuple(rows[:-1]), rows[-1], start, passes, round(cost, 2), labels)


def _is(regions: object, word: str) -> bool:
    """Whether it is that word; any other word is refused."""
    if isinstance(regions, str) and regions != word:
        raise UsageError(f"expected regions of {word!r} or a label map, got {regions!r}.")
    return isinstance(regions, str)


def _check_unit(case: Case) -> None:
    method = case.method
    if not method.SIGNED or method.UNIT != "score":
        raise UsageError(
            f"expected a signed method in the score's own unit, which can be held against Shapley "
            f"values, got {case.method_name!r}."
        )


def _at(case: Case, e: Explanation) -> Request:
    """The request that leaves a layer's activation, its reference's and a tail behind."""
    method = e.method if gradient_free.why(case.model.net) else "integrated"
    return replace(case.request, method=method, layer=e.layer)


# --------------------------------------------------------------------------------- the regions


def _label_map(regions: object, grid: Geometry) -> Labels:
    """A label map of the caller's on the scan's grid, checked."""
    array = np.asarray(regions.array if isinstance(regions, Volume) else regions)
    if isinstance(regions, Volume):
        corners = np.array([[0, 0, 0], [n - 1 for n in grid.shape]])
        apart = np.abs(regions.grid.world_ras(corners) - grid.world_ras(corners)).max()
        if apart > SAME_PLACE_MM:
            raise UsageError(
                f"expected a label map on the scan's own grid, got one that lies {apart:.1f} mm "
                f"off; resample it to the scan first (nearest neighbour)."
            )
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.shape != grid.shape or array.dtype.kind not in "iufb":
        raise UsageError(
            f"expected 'components' or a label map of whole numbers on the scan's grid "
            f"{grid.shape}, got {array.dtype} {array.shape}."
        )
    numbers = np.unique(array)
    if not np.isfinite(numbers).all() or numbers.min() < 0 or (numbers != numbers // 1).any():
        raise UsageError(
            f"expected whole numbers from 0 in a label map, got values from {numbers.min():g} to "
            f"{numbers.max():g}."
        )
    count = int((numbers > 0).sum())
    if not 1 <= count <= MOST_LABELS:
        raise UsageError(f"expected 1 to {MOST_LABELS} regions in a label map, got {count}.")
    return array.astype(np.int32)


def _components(e: Explanation, most: int) -> Labels:
    """The coloured parts of the map, 1 the one with the largest net evidence.

    Parts of opposite sign do not join; voxels join over faces, edges and corners.
    """
    import SimpleITK as sitk  # noqa: N813 - heavy, and only needed here

    signed = draw(e).signed
    parts: list[npt.NDArray[np.intp]] = []
    nets: list[npt.NDArray[Any]] = [np.zeros(1)]
    for sign in (1, -1):
        coloured = (sign * signed.values >= signed.floor) & (signed.values != 0)
        image = sitk.GetImageFromArray(coloured.astype(np.uint8))
        part = sitk.GetArrayFromImage(sitk.ConnectedComponent(image, True))  # noqa: FBT003 - sitk's
        weight = np.bincount(part.ravel(), np.abs(signed.values).ravel())[1:]
        parts.append(np.where(part > 0, part + sum(len(n) for n in nets) - 1, 0))
        nets.append(weight)
    size = np.concatenate(nets)
    if len(size) == 1:
        raise CannotExplainError(
            "no region",
            "expected parts of the map that are coloured, got none: all of it lies below the "
            "scale's floor; hand in a label map as regions.",
        )
    rank = np.zeros(len(size), dtype=np.int32)
    kept = 1 + np.argsort(-size[1:], kind="stable")[:most]
    rank[kept] = np.arange(1, len(kept) + 1)
    labels: Labels = rank[parts[0] + parts[1]]
    return labels


def _masks(labels: Labels, how: Drawing) -> Numbers:
    """Each region's share (R, i, j, k) of the cells, as the map is drawn on the scan's grid."""
    numbers = np.unique(labels[labels > 0])
    covered = how.share()
    masks = np.zeros((len(numbers), *covered.shape))
    for mask, number in zip(masks, numbers, strict=True):
        inside = labels == number
        box = []
        for axis in range(3):
            touched = np.flatnonzero(inside.any(axis=tuple(n for n in range(3) if n != axis)))
            box.append(slice(touched[0], touched[-1] + 1))
        soft = inside[tuple(box)].astype(np.float64).transpose(how.order)
        for axis, weights in enumerate(how.weights):
            own = weights[box[how.order[axis]]]
            soft = np.moveaxis(np.tensordot(own.T, soft, axes=(1, axis)), 0, axis)
        np.divide(soft, covered, out=mask, where=covered > 0)
    # Where regions fill a cell, rounding may leave their sum a hair above one.
    return np.asarray(masks / np.maximum(masks.sum(axis=0), 1.0))


# ---------------------------------------------------------------------------------- the values


def _values(capture: Capture, masks: Numbers, seed: int) -> game.ShapleyValues:
    """The values of all regions and elsewhere; regions that cover no cell are no players."""
    some = masks.reshape(len(masks), -1).max(axis=1) > game.NOTHING
    if not some.any():
        raise UsageError(
            "expected regions in the part of the scan that the network looks at, got none there."
        )
    found = game.shapley(capture, masks[some], seed)
    rows = np.append(some, True)
    full = np.zeros((2, len(rows)))
    full[0, rows], full[1, rows] = found.values, found.standard_errors
    return game.ShapleyValues(full[0], full[1], found.start_score, found.score, found.passes)


def _rows(
    e: Explanation,
    labels: Labels,
    masks: Numbers,
    found: game.ShapleyValues,
    names: Mapping[int, str],
) -> Iterator[RegionValue]:
    """One row per region, and last elsewhere."""
    evidence = e.evidence.astype(np.float64)
    nets = [float((mask * evidence).sum()) for mask in masks]
    values, errors = found.values.tolist(), found.standard_errors.tolist()
    for n, number in enumerate(np.unique(labels[labels > 0]).tolist()):
        at = np.argwhere(labels == number)
        x, y, z = e.image.world_ras(at.mean(axis=0)).tolist()
        name, ml = names.get(number, f"region {number}"), len(at) * e.image.voxel_ml
        yield RegionValue(number, name, nets[n], values[n], errors[n], ml, (x, y, z))
    rest = float(evidence.sum()) - sum(nets)
    ml = float((labels == 0).sum()) * e.image.voxel_ml
    yield RegionValue(0, "elsewhere", rest, values[-1], errors[-1], ml, None)
