"""How does an Explanation become JSON, and how does it come back equal?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.calibration import Calibration
from med_gradcam.errors import ImageError
from med_gradcam.explanation import Cells, Explanation, LayerTrial, Part, Reference, Region
from med_gradcam.geometry import Geometry
from med_gradcam.maps import Maps
from med_gradcam.provenance import Provenance
from med_gradcam.summary import Peak, peaks
from med_gradcam.target import Target, TargetRegion

FORMAT = "med-gradcam-explanation/1"


def to_record(explanation: Explanation, maps: Maps | None = None) -> dict[str, Any]:
    """The contents of explanation.json. With `maps`, also what depends on the drawing."""
    e = explanation
    return {
        "format": FORMAT,
        "unit": e.unit,
        "score_unit": e.target.unit,
        "signed": e.signed,
        "score": e.score,
        "reference_score": e.reference_score,
        "probability": e.probability,
        "sum_for": e.sum_for if e.signed else None,
        "sum_against": e.sum_against if e.signed else None,
        "residual": e.residual,
        "bypassed": e.bypassed,
        "outside_image": None if maps is None else maps.signed.outside_image,
        "coloured_share": None if maps is None else maps.coloured_share,
        "status": e.status,
        "target": _target_record(e.target, signed=e.signed),
        "method": e.method,
        "layer": e.layer,
        "reference": asdict(e.reference),
        "cells": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(e.cells).items()},
        "cell_axes": e.grid.axcodes,
        "cell_mm": list(e.cell_mm),
        "receptive_field_mm": list(e.receptive_field_mm),
        "smallest_localisable_mm": e.smallest_localisable_mm,
        "cost_in_forwards": e.cost_in_forwards,
        "peaks": [_peak_record(p) for p in peaks(e, maps)],
        "verdict": None,
        "regions": [{**asdict(r), "centre_ras_mm": list(r.centre_ras_mm)} for r in e.regions],
        "layer_trials": [asdict(t) for t in e.trials],
        "colour_scale": _scale(e, maps),
        "modality": e.modality,
        "cell_grid": _grid_record(e.grid),
        "image_grid": _grid_record(e.image),
        "parts": [{**asdict(p), "jump": list(p.jump)} for p in e.parts],
        "notices": list(e.notices),
        "warnings": list(e.warnings),
        "provenance": _provenance_record(e.provenance),
        "notice": "Research use. Not for diagnostic use. Describes the model, not the disease.",
    }


def heading(e: Explanation) -> dict[str, Any]:
    """What a table that belongs to an explanation says of it first."""
    return {
        "target": e.target.label,
        "unit": e.unit,
        "score": e.score,
        "reference_score": e.reference_score,
        "reference": {"kind": e.reference.kind, "words": e.reference.words},
        "method": e.method,
        "layer": e.layer,
        "cell_mm": list(e.cell_mm),
    }


def to_json(record: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """UTF-8 JSON text without NaN."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_record(record: Mapping[str, Any], evidence: npt.ArrayLike) -> Explanation:
    """The Explanation a record and its evidence (i, j, k) stand for.

    Raises:
        ImageError: the record is not of this format or lacks a key.
    """
    if record.get("format") != FORMAT:
        raise ImageError(
            f"expected an explanation of format {FORMAT!r}, got {record.get('format')!r}."
        )
    try:
        return _from_record(record, np.asarray(evidence, dtype=np.float32))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # our own errors of values among them
        raise ImageError(f"the explanation's record is damaged: {error}.") from error


def _from_record(r: Mapping[str, Any], evidence: npt.NDArray[np.float32]) -> Explanation:
    scale = r["colour_scale"]
    fixed = scale is not None and scale["volumes"] > 0
    return Explanation(
        evidence=evidence,
        grid=_grid(r["cell_grid"]),
        image=_grid(r["image_grid"]),
        score=r["score"],
        reference_score=r["reference_score"],
        target=_target(r["target"]),
        method=r["method"],
        layer=r["layer"],
        reference=Reference(**r["reference"]),
        cells=_cells(r["cells"]),
        status=r["status"],
        cost_in_forwards=r["cost_in_forwards"],
        provenance=_provenance(r["provenance"]),
        bypassed=r["bypassed"],
        modality=r["modality"],
        calibration=Calibration(**scale) if fixed else None,
        regions=tuple(
            Region(**{**x, "centre_ras_mm": tuple(x["centre_ras_mm"])}) for x in r["regions"]
        ),
        trials=tuple(LayerTrial(**t) for t in r["layer_trials"]),
        warnings=tuple(r["warnings"]),
        # Results of before 0.2 have none of these.
        parts=tuple(Part(**{**x, "jump": tuple(x["jump"])}) for x in r.get("parts", ())),
        notices=tuple(r.get("notices", ())),
        measure=r["unit"].replace("log-odds", "score"),
        signed=r.get("signed", True),
    )


def _peak_record(p: Peak) -> dict[str, Any]:
    return {
        "polarity": p.polarity,
        "evidence": p.evidence,
        "per_ml": p.per_ml,
        "ras_mm": list(p.ras_mm),
        "lps_mm": list(p.lps_mm),
        "words": p.words,
        "side": p.side,
    }


def _target_record(t: Target, *, signed: bool) -> dict[str, Any]:
    """A target without what only works in memory: a region's weights, a user's function."""
    raises, lowers = t.words
    return {
        "kind": t.kind,
        "label": t.label,
        "index": list(t.index),
        "link": t.link,
        "rival_weight": t.rival_weight if len(t.index) == 2 else None,
        "output": t.output or None,
        "region": None if t.region is None else asdict(t.region),
        "words": {"for": raises, "against": lowers} if signed else None,
    }


def _target(record: Mapping[str, Any]) -> Target:
    """The target of a record; the keys after `link` came later, older files are without."""
    region, weight = record.get("region"), record.get("rival_weight")
    return Target(
        record["kind"],
        record["label"],
        tuple(record["index"]),
        record["link"],
        1.0 if weight is None else weight,
        record.get("output") or "",
        None if region is None else TargetRegion(**region),
    )


def _cells(record: Mapping[str, Any]) -> Cells:
    places = {k: tuple(record[k]) for k in ("jump", "start", "receptive_field")}
    off_by = record.get("uncertainty_voxels")  # results of before have none
    return Cells(
        **places, how=record["how"], uncertainty_voxels=None if off_by is None else tuple(off_by)
    )


def _scale(e: Explanation, maps: Maps | None) -> dict[str, Any] | None:
    if e.calibration is not None:
        return asdict(e.calibration)
    if maps is not None:
        return asdict(maps.signed.scale)
    return None


def _grid_record(grid: Geometry) -> dict[str, Any]:
    return {
        "shape": list(grid.shape),
        "affine_ras": grid.affine.tolist(),
        "frame": grid.frame,
        "frame_uid": grid.frame_uid,
    }


def _grid(record: Mapping[str, Any]) -> Geometry:
    i, j, k = record["shape"]
    affine = np.array(record["affine_ras"], dtype=np.float64)
    return Geometry((i, j, k), affine, record["frame"], record["frame_uid"])


def _provenance_record(p: Provenance) -> dict[str, Any]:
    return {**asdict(p), "input_sha256": list(p.input_sha256), "notes": list(p.notes)}


def _provenance(record: Mapping[str, Any]) -> Provenance:
    return Provenance(
        **{
            **record,
            "input_sha256": tuple(record["input_sha256"]),
            "notes": tuple(record["notes"]),
        }
    )
