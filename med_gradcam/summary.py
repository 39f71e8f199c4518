"""What does a map say in numbers: where it peaks, and what a region is worth?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from med_gradcam.explanation import Explanation
from med_gradcam.geometry import point_words, side_words
from med_gradcam.maps import Heatmap, Polarity


@dataclass(frozen=True, slots=True)
class Peak:
    """A cell that stands out among its neighbours.

    `evidence` in log-odds (>= 0 for both polarities), `per_ml` its density in the cell's own
    volume; `ras_mm` the cell's centre; `words` and `side` say it for people.
    """

    polarity: Polarity
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


def peaks(explanation: Explanation, most: int = 3) -> tuple[Peak, ...]:
    """Up to `most` local maxima of each polarity, strongest first, inside the image."""
    found: list[Peak] = []
    for polarity, sign in (("for", 1.0), ("against", -1.0)):
        values = np.maximum(sign * explanation.evidence.astype(np.float64), 0)
        maxima = _local_maxima(values)
        order = np.argsort(-values[tuple(maxima.T)], kind="stable")
        kept = 0
        for index in maxima[order]:
            ras = explanation.grid.world_ras(index)
            if kept == most or not explanation.image.contains(explanation.image.index_ijk(ras)):
                continue
            kept += 1
            x, y, z = ras.tolist()
            worth = float(values[tuple(index)])
            found.append(
                Peak(
                    "for" if polarity == "for" else "against",
                    worth,
                    worth / explanation.grid.voxel_ml,
                    (x, y, z),
                    point_words(ras),
                    side_words(ras),
                )
            )
    return tuple(found)


def _local_maxima(values: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Indices (n, 3) of positive cells that are no smaller than their 26 neighbours."""
    padded = np.pad(values, 1, constant_values=-1.0)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3))
    return np.argwhere((values > 0) & (values >= windows.max(axis=(-1, -2, -3))))


def evidence_within(signed: Heatmap, mask: npt.ArrayLike) -> float:
    """Net evidence (log-odds) in a soft mask (0..1) on the map's grid."""
    weights = np.asarray(mask, dtype=np.float64)
    return float((signed.values * weights).sum(dtype=np.float64)) * signed.grid.voxel_ml
