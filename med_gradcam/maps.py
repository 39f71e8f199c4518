"""How is evidence per cell drawn on the image grid so that its sum is kept?

Drawing: w(v, u) = per-axis linear weights at the exact cell centres, clamped at the end cells, zero
outside [start - jump/2, start + (n - 1/2) jump]; density d(u) = E(u) / (voxel_ml * sum_v w(v, u));
dense(v) = sum_u w(v, u) d(u). So sum(dense) * voxel_ml = sum E exactly, and a constant density
stays constant inside the box. Cells that touch no voxel are summed in `outside_image`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from med_gradcam.calibration import Calibration, from_case
from med_gradcam.errors import GeometryError, InputError, UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry

Polarity = Literal["for", "against", "signed", "strength"]
Side = Literal["for", "against", "strength"]  # what is coloured: either polarity, or no sign at all
Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Heatmap:
    """Evidence density `values` (I, J, K) float32 on `grid`, in `unit` (the evidence's per mL).

    for and against are >= 0, signed = for - against; strength, of a map without a sign, is >= 0.
    `scale` is shared by all: its peak is the value of full colour, below its floor nothing is
    coloured. `outside_image` is the evidence (in its own unit) of cells that touch no voxel.
    """

    values: Floats = field(repr=False)
    grid: Geometry
    polarity: Polarity
    unit: str
    scale: Calibration
    outside_image: float = 0.0

    def __post_init__(self) -> None:
        if self.values.shape != self.grid.shape or self.values.dtype != np.float32:
            raise InputError(
                f"expected float32 values on a grid {self.grid.shape}, "
                f"got {self.values.dtype} {self.values.shape}."
            )
        if self.polarity not in get_args(Polarity):
            raise InputError(f"expected for, against, signed or strength, got {self.polarity!r}.")

    @property
    def peak(self) -> float:
        """The density drawn at full colour, the same for both polarities."""
        return self.scale.peak_per_ml

    @property
    def floor(self) -> float:
        """Nothing below this density is coloured."""
        return self.scale.floor_per_ml


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """The maps of one explanation, on one grid and one scale.

    Without a sign there is one map, of the polarity strength: `signed` and `raises` are that one,
    and `lowers`, which it cannot show, is 0 everywhere. `sides` and `written` leave it out.
    """

    signed: Heatmap
    raises: Heatmap
    lowers: Heatmap

    @property
    def has_sign(self) -> bool:
        """Whether there is a for and an against."""
        return self.signed.polarity != "strength"

    @property
    def sides(self) -> dict[Side, Heatmap]:
        """What is coloured: for and against, or the one map without a sign."""
        if self.has_sign:
            return {"for": self.raises, "against": self.lowers}
        return {"strength": self.signed}

    @property
    def written(self) -> tuple[Heatmap, ...]:
        """The maps that become files: signed, for and against, or the one without a sign."""
        return (self.signed, self.raises, self.lowers) if self.has_sign else (self.signed,)

    def on_scale(self, scale: Calibration) -> Maps:
        """The same maps drawn on another scale."""
        shown = (replace(m, scale=scale) for m in (self.signed, self.raises, self.lowers))
        return Maps(*shown)

    @property
    def coloured_share(self) -> float:
        """Share of the image's voxels that reach the floor, in either polarity."""
        shown = [heatmap.values >= heatmap.floor for heatmap in self.sides.values()]
        return float(np.logical_or.reduce(shown).mean())


def axis_weights(voxels: int, cells: int, start: float, jump: float) -> Weights:
    """Weights (voxels, cells) along one axis; start and jump in image voxels (jump > 0).

    A triangle around each centre, as wide as the cells are apart but never narrower than a voxel
    (finer cells then share a voxel), rows scaled to sum 1 inside the box of the cells.
    """
    centre = start + jump * np.arange(cells)
    at = np.arange(voxels, dtype=np.float64)
    width = max(jump, 1.0)
    weights = np.maximum(0.0, 1.0 - np.abs(at[:, None] - centre[None, :]) / width)
    weights[weights < 1e-9] = 0.0  # rounding noise: a cell that only touches a voxel's centre
    inside = (at >= start - jump / 2 - 1e-9) & (at <= start + (cells - 0.5) * jump + 1e-9)
    total = weights.sum(axis=1)
    keep = inside & (total > 0)
    weights[~keep] = 0.0
    weights[keep] /= total[keep, None]
    return weights


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """The per-axis weights that draw one cell grid on one image grid.

    `order[n]` is the image axis of cell axis n.
    """

    weights: tuple[Weights, Weights, Weights]
    order: tuple[int, int, int]
    image: Geometry

    def share(self) -> npt.NDArray[np.float64]:
        """sum_v w(v, u), how many voxels each cell covers, shape of the cells."""
        a, b, c = (w.sum(axis=0) for w in self.weights)
        return np.asarray(a[:, None, None] * b[None, :, None] * c[None, None, :])

    def spread(self, per_cell: npt.ArrayLike) -> Floats:
        """The density per mL (image grid, float32) of evidence given per cell."""
        evidence = np.asarray(per_cell, dtype=np.float64)
        share = self.share()
        density = np.divide(evidence, share, out=np.zeros_like(evidence), where=share > 0)
        back = np.argsort(self.order)
        box = (density / self.image.voxel_ml).transpose(back)
        places = []
        for axis, cell_axis in enumerate(back):
            weights = self.weights[cell_axis]
            touched = np.flatnonzero(weights.any(axis=1))
            place = slice(touched[0], touched[-1] + 1) if touched.size else slice(0, 0)
            places.append(place)
            if axis == 2:  # the last step makes the large array, in single precision
                box = np.matmul(box.astype(np.float32), weights[place].T.astype(np.float32))
            else:
                box = np.moveaxis(np.tensordot(weights[place], box, axes=(1, axis)), 0, axis)
        dense = np.zeros(self.image.shape, dtype=np.float32)
        dense[tuple(places)] = box
        return dense

    def outside(self, per_cell: npt.ArrayLike) -> float:
        """The evidence of the cells that touch no voxel."""
        return float(np.asarray(per_cell, dtype=np.float64)[self.share() <= 0].sum())

    def gather(self, mask: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The share of each cell that lies in a soft mask (image grid, 0..1).

        The adjoint of spread: sum(gather(mask) * E) = sum(spread(E) * mask) * voxel_ml.
        """
        soft = np.asarray(mask, dtype=np.float64).transpose(self.order)
        for axis, weights in enumerate(self.weights):
            soft = np.moveaxis(np.tensordot(weights.T, soft, axes=(1, axis)), 0, axis)
        share = self.share()
        return np.divide(soft, share, out=np.zeros_like(soft), where=share > 0)


def drawing(grid: Geometry, image: Geometry) -> Drawing:
    """How cells on `grid` are drawn on `image`.

    Raises:
        GeometryError: the cells' axes are not parallel to the image's.
    """
    relation = np.linalg.inv(image.affine) @ grid.affine
    steps = relation[:3, :3]
    order = np.abs(steps).argmax(axis=0)
    off = np.abs(steps).copy()
    off[order, np.arange(3)] = 0.0
    if sorted(order.tolist()) != [0, 1, 2] or off.max() > 1e-4 * np.abs(steps).max():
        raise GeometryError(
            "expected cells whose axes are parallel to the image's, got a rotated cell grid; "
            "resample the cells before drawing."
        )
    weights = []
    for axis, world in enumerate(order.tolist()):
        jump, start, count = steps[world, axis], relation[world, 3], grid.shape[axis]
        if jump < 0:  # walk the axis from its other end, then turn the columns round again
            table = axis_weights(image.shape[world], count, start + (count - 1) * jump, -jump)
            weights.append(table[:, ::-1])
        else:
            weights.append(axis_weights(image.shape[world], count, start, jump))
    i, j, k = order.tolist()
    return Drawing((weights[0], weights[1], weights[2]), (i, j, k), image)


def draw(explanation: Explanation, image: Geometry | None = None) -> Maps:
    """For, against and signed density on the scan's grid (or another parallel one).

    For and against are split per cell before drawing, so that they add up to sum_for and
    sum_against; signed is their difference. A map without a sign is drawn as the one it is.

    Raises:
        UsageError: what was given is no explanation or no grid.
        GeometryError: the cells' axes are not parallel to the grid's.
    """
    if not isinstance(explanation, Explanation):
        raise UsageError(f"expected an Explanation to draw, got {type(explanation).__name__}.")
    grid = explanation.image if image is None else image
    if not isinstance(grid, Geometry):
        raise UsageError(
            f"expected a grid (a Geometry, such as volume.grid) to draw on, got "
            f"{type(grid).__name__}; leave it out for the scan's own."
        )
    how = drawing(explanation.grid, grid)
    up = np.maximum(explanation.evidence, 0)
    down = np.maximum(-explanation.evidence, 0)
    raises, lowers = how.spread(up), how.spread(down)
    scale = explanation.calibration or from_case(
        float(max(raises.max(), lowers.max())),
        explanation.target.label,
        explanation.method,
        explanation.layer,
    )
    unit = f"{explanation.unit} per mL"
    out_up, out_down = how.outside(up), how.outside(down)
    if not explanation.signed:
        strength = Heatmap(raises, grid, "strength", unit, scale, out_up)
        return Maps(strength, strength, Heatmap(lowers, grid, "against", unit, scale, 0.0))
    return Maps(
        Heatmap(raises - lowers, grid, "signed", unit, scale, out_up - out_down),
        Heatmap(raises, grid, "for", unit, scale, out_up),
        Heatmap(lowers, grid, "against", unit, scale, out_down),
    )
