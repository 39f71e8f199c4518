"""How bright is bright for this model and target: the fixed colour scale and the null floor?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from med_gradcam.errors import ModelError


@dataclass(frozen=True, slots=True)
class Calibration:
    """Colour scale learnt from a reference set, for one (target, method, layer) of one model.

    `peak_per_ml`: log-odds per mL drawn at full colour. `floor_per_ml`: below this size of
    log-odds per mL a map stays transparent (scans without a finding stay below it). `volumes`:
    how many scans it was learnt from; 0 means it comes from the case itself.
    """

    target: str
    method: str
    layer: str
    peak_per_ml: float
    floor_per_ml: float
    volumes: int

    def __post_init__(self) -> None:
        peak, floor = self.peak_per_ml, self.floor_per_ml
        if not (math.isfinite(peak) and math.isfinite(floor) and 0 <= floor <= peak and peak > 0):
            raise ModelError(
                f"expected 0 <= floor <= peak (log-odds per mL) and peak > 0 in a calibration, "
                f"got floor {floor}, peak {peak}."
            )

    @property
    def of_case(self) -> bool:
        """Whether the scale is this case's own and not the model's."""
        return self.volumes == 0


# A case without a calibrated model: the floor is this share of the case's own peak.
CASE_FLOOR = 0.1
ALL_LAYERS = "all"  # the layer of a scale that several layers of a case share


def from_case(peak: float, target: str, method: str, layer: str) -> Calibration:
    """The scale of a model that was never calibrated: the case's own maximum."""
    peak = peak if peak > 0 else 1.0
    return Calibration(target, method, layer, peak, CASE_FLOOR * peak, 0)
