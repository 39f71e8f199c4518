"""What does a map say in numbers: where it peaks, and what a region is worth?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from med_gradcam.explanation import STATUS_WORDS, Explanation
from med_gradcam.geometry import Geometry, point_words, side_words
from med_gradcam.maps import Heatmap, Maps, Side

PLATEAU = 1e-6  # voxels this near the strongest are as strong
NO_SIGN = "no sign: it shows where it is strong, not what raises or lowers the score"


@dataclass(frozen=True, slots=True)
class Peak:
    """A cell that stands out among its neighbours.

    `evidence` in the map's unit (>= 0 for both polarities), `per_ml` the density at `ras_mm`, its
    place; `words` and `side` say it for people.
    """

    polarity: Side
    evidence: float
    per_ml: float
    ras_mm: tuple[float, float, float]
    words: str
    side: str

    @property
    def lps_mm(self) -> tuple[float, float, float]:
        """The same point in DICOM's coordinates."""
        x, y, z = self.ras_mm
        return -x, -y, z


def status_words(explanation: Explanation) -> str:
    """Whether the map adds up, and to what: the score itself where there is no reference."""
    if explanation.status == "complete" and explanation.reference_score is None:
        return "the map adds up to the score"
    return STATUS_WORDS[explanation.status]


def peaks(explanation: Explanation, maps: Maps | None = None, most: int = 3) -> tuple[Peak, ...]:
    """Up to `most` local maxima of each polarity among the cells, strongest first.

    A map without a sign has those of its strength.

    Each lies at its cell's centre; with `maps`, at the strongest voxel of that cell as drawn, with
    the density drawn there. Cells whose centre lies beside the image are left out.
    """
    found: list[Peak] = []
    sides: tuple[Side, ...] = ("for", "against") if explanation.signed else ("strength",)
    for polarity in sides:
        sign = -1.0 if polarity == "against" else 1.0
        values = np.maximum(sign * explanation.evidence.astype(np.float64), 0)
        maxima = _local_maxima(values)
        order = np.argsort(-values[tuple(maxima.T)], kind="stable")
        kept = 0
        for index in maxima[order]:
            ras = explanation.grid.world_ras(index)
            if kept == most or not explanation.image.contains(explanation.image.index_ijk(ras)):
                continue
            kept += 1
            worth = float(values[tuple(index)])
            per_ml = worth / explanation.grid.voxel_ml
            if maps is not None:
                ras, per_ml = _strongest_voxel(maps.sides[polarity], explanation.grid, ras)
            x, y, z = ras.tolist()
            place = (x, y, z)
            found.append(Peak(polarity, worth, per_ml, place, point_words(ras), side_words(ras)))
    return tuple(found)


def _strongest_voxel(
    drawn: Heatmap, cells: Geometry, centre_ras: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], float]:
    """Place (RAS mm) and density of the strongest voxel of the cell around a centre."""
    half = np.abs(np.linalg.inv(drawn.grid.affine)[:3, :3] @ cells.affine[:3, :3]).sum(1) / 2
    middle = drawn.grid.index_ijk(centre_ras)
    low = np.clip(np.floor(middle - half), 0, None).astype(int)
    high = np.minimum(np.ceil(middle + half).astype(int) + 1, drawn.grid.shape)
    box = drawn.values[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    top = np.argwhere(box >= box.max() * (1 - PLATEAU)) + low
    best = top[((top - middle) ** 2).sum(1).argmin()]  # an outermost cell is drawn as a plateau
    return drawn.grid.world_ras(best), float(drawn.values[tuple(best)])


def _local_maxima(values: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Indices (n, 3) of positive cells that are no smaller than their 26 neighbours."""
    padded = np.pad(values, 1, constant_values=-1.0)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3))
    return np.argwhere((values > 0) & (values >= windows.max(axis=(-1, -2, -3))))


def evidence_within(signed: Heatmap, mask: npt.ArrayLike) -> float:
    """Net evidence, in its own unit, in a soft mask (0..1) on the map's grid."""
    weights = np.asarray(mask, dtype=np.float64)
    return float((signed.values * weights).sum(dtype=np.float64)) * signed.grid.voxel_ml
