"""What is the result: signed evidence per cell, where the cells lie, and what it adds up to?"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from med_gradcam.calibration import Calibration
from med_gradcam.errors import InputError
from med_gradcam.geometry import Geometry
from med_gradcam.provenance import Provenance
from med_gradcam.target import Target

Status = Literal["complete", "not_converged", "not_a_cut", "no_sum"]
How = Literal["exact", "measured", "assumed"]
# What a cell's number is: an amount of the score; how fast the score moves with the network's
# input; or neither: such numbers compare places of one map, and nothing else.
Measure = Literal["score", "score per input unit", "relative units"]
STATUS_WORDS: dict[str, str] = {
    "complete": "the map adds up to the score's difference from the reference",
    "not_converged": "the integral has not converged: the map does not add up",
    "not_a_cut": "part of the score flows past this layer or has no place: it is not in the map",
    "no_sum": "this method does not promise a sum",
}
Notice = Literal[
    "no_positive_evidence",
    "no_negative_evidence",
    "balanced_by_construction",
    "saturated",
    "like_reference",
]
NOTICE_WORDS: dict[str, str] = {
    "no_positive_evidence": "no positive evidence: nothing in this scan raises the score",
    "no_negative_evidence": "no negative evidence: nothing in this scan lowers the score",
    "balanced_by_construction": (
        "for equals against by construction: a normalisation behind the layer makes this method's "
        "sum zero whatever the score; only where they lie says something"
    ),
    "saturated": "saturated: at this scan the score no longer moves with the layer",
    "like_reference": "the model's score is that of the reference: nothing raises or lowers it",
}


@dataclass(frozen=True, slots=True)
class Reference:
    """What the evidence is relative to.

    `kind`: tissue, zero, value, file or none (the method has no reference); `value` in the scan's
    unit where there is one; `words` for people.
    """

    kind: str
    value: float | None
    words: str


@dataclass(frozen=True, slots=True)
class Cells:
    """How a layer's cells lie on the network's voxels: centre of cell i = start + i * jump.

    `jump`, `start` and `receptive_field` in network voxels along the network's axes; `how`:
    exact (recursion, checked by a probe), measured (where the network was seen to look) or assumed.
    `uncertainty_voxels`: how far apart the answers lie, per axis: branches that meet, recursion
    and probe, or nominal and measured place; None where they agree or there is but one.
    """

    jump: tuple[float, float, float]
    start: tuple[float, float, float]
    receptive_field: tuple[float, float, float]
    how: How
    uncertainty_voxels: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """A ball that was replaced by the reference: what the map says and what the model did.

    `net` is the map's sum in the ball, `effect` the score's true change, both in log-odds.
    """

    centre_ras_mm: tuple[float, float, float]
    radius_mm: float
    chosen: str
    net: float
    effect: float


@dataclass(frozen=True, slots=True)
class LayerTrial:
    """How one candidate layer fared: causal slope and r over the regions, or why it was refused."""

    layer: str
    slope: float | None
    r: float | None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One layer of a cut of several: what it carries of the score's change.

    `net` in the target's unit; `jump` its cells' distance in network voxels.
    """

    layer: str
    net: float
    jump: tuple[float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """Signed evidence (i, j, k) float32 per cell of `layer`, in `unit`, which `measure` decides.

    `grid`: where the cells lie (the network's axes); `image`: the scan's own grid; `score` and
    `reference_score` of the model; `bypassed`: the share of their difference that does not pass
    through the layer. Positive cells raise the model's score, negative ones lower it. `parts`: the
    layers of a cut of several, whose maps are added on the finest one's cells; `notices`: what is
    easily misread in a picture of this map. Not `signed`: the method's map has no sign, so it shows
    where it is strong and neither for nor against; no cell is below 0.

    Raises:
        InputError: evidence or score is not finite, the evidence is not on its grid, or a map
            without a sign has one.
    """

    evidence: npt.NDArray[np.float32] = field(repr=False)
    grid: Geometry
    image: Geometry
    score: float
    reference_score: float | None
    target: Target
    method: str
    layer: str
    reference: Reference
    cells: Cells
    status: Status
    cost_in_forwards: float
    provenance: Provenance
    bypassed: float | None = None
    modality: str | None = None
    calibration: Calibration | None = None
    regions: tuple[Region, ...] = ()
    trials: tuple[LayerTrial, ...] = ()
    warnings: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    notices: tuple[Notice, ...] = ()
    measure: Measure = "score"
    signed: bool = True

    def __post_init__(self) -> None:
        evidence = np.array(self.evidence, dtype=np.float32)
        if evidence.shape != self.grid.shape:
            raise InputError(
                f"expected evidence on a grid {self.grid.shape}, got shape {evidence.shape}."
            )
        if not np.isfinite(evidence).all():
            raise InputError(
                f"expected finite evidence, got {int((~np.isfinite(evidence)).sum())} "
                f"NaN or infinite cells."
            )
        if not self.signed and (evidence < 0).any():
            raise InputError(
                f"expected no cell below 0 in a map without a sign, got {int((evidence < 0).sum())}"
                f" of them; say signed=True if they lower the score."
            )
        if self.status not in STATUS_WORDS:
            raise InputError(f"expected a status of {list(STATUS_WORDS)}, got {self.status!r}.")
        if self.measure not in get_args(Measure):
            raise InputError(
                f"expected a measure of {list(get_args(Measure))}, got {self.measure!r}."
            )
        unknown = [notice for notice in self.notices if notice not in NOTICE_WORDS]
        if unknown:
            raise InputError(f"expected notices of {list(NOTICE_WORDS)}, got {unknown[0]!r}.")
        for name in ("score", "reference_score"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value):
                raise InputError(f"expected a finite {name}, got {value}.")
        if self.calibration is not None and self.calibration.of_case:
            raise InputError(
                "expected a colour scale learnt from scans, or None for the case's own, got one "
                "learnt from 0 scans."
            )
        evidence.setflags(write=False)
        object.__setattr__(self, "evidence", evidence)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        return all(
            np.array_equal(self.evidence, other.evidence)
            if f.name == "evidence"
            else bool(getattr(self, f.name) == getattr(other, f.name))
            for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash((self.evidence.tobytes(), self.grid, self.score, self.layer, self.method))

    @property
    def sum_for(self) -> float:
        """Sum of the cells that raise the score (float64)."""
        return float(np.maximum(self.evidence, 0).sum(dtype=np.float64))

    @property
    def sum_against(self) -> float:
        """Sum of the sizes of the cells that lower the score (float64)."""
        return float(np.maximum(-self.evidence, 0).sum(dtype=np.float64))

    @property
    def residual(self) -> float | None:
        """Score - reference_score - (for - against); None where the method promises no sum."""
        if self.status == "no_sum" or self.reference_score is None:
            return None
        return self.score - self.reference_score - (self.sum_for - self.sum_against)

    @property
    def probability(self) -> float | None:
        """The model's probability of the target; None where it gives none."""
        return self.target.probability(self.score)

    @property
    def unit(self) -> str:
        """Unit of the evidence: the score's own, that "per input unit", or "relative units".

        The score's own, of `score` and `reference_score` too, is `target.unit`.
        """
        return self.measure.replace("score", self.target.unit)

    @property
    def cell_mm(self) -> tuple[float, float, float]:
        """Distance between cell centres along the grid's axes, mm."""
        return self.grid.spacing_mm

    @property
    def receptive_field_mm(self) -> tuple[float, float, float]:
        """How far a cell sees along the grid's axes, mm."""
        pairs = zip(self.cells.receptive_field, self.cells.jump, self.cell_mm, strict=True)
        a, b, c = (field * mm / jump for field, jump, mm in pairs)
        return a, b, c

    @property
    def smallest_localisable_mm(self) -> float:
        """Two cells along the coarsest axis, mm: nothing smaller can be told apart (Nyquist)."""
        return 2.0 * max(self.cell_mm)

    def replace(self, **changes: Any) -> Explanation:
        """A copy with some fields changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Explanation(**{**values, **changes})
