"""What is this model, or this scan: layers, cells in mm, guards, labels, licence?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from med_gradcam import gradient_free
from med_gradcam.errors import CannotExplainError, ModelError
from med_gradcam.geometry import point_words
from med_gradcam.graph import LayerInfo, Trace, trace
from med_gradcam.intake import as_model, eager
from med_gradcam.layers import candidates
from med_gradcam.model import InputSpec, Model
from med_gradcam.models._averaged import Averaged
from med_gradcam.one_slice import fitting
from med_gradcam.outcome import NORMAL
from med_gradcam.placement import place
from med_gradcam.prepare import prepare
from med_gradcam.running import MISFIT, network_errors
from med_gradcam.tail import at_rest
from med_gradcam.volume import Volume

_TRY = (96, 96, 96)  # voxels, for networks that take any size and no scan was given
OWN_RECIPE = "the model's own recipe"


def of_scan(volume: Volume) -> dict[str, Any]:
    """Shape, place, unit and notes of a scan; no names."""
    grid = volume.grid
    low, high = grid.world_ras([0, 0, 0]), grid.world_ras([n - 1 for n in grid.shape])
    return {
        "kind": "scan",
        "channels": int(volume.array.shape[0]),
        "shape": list(grid.shape),
        "axes": grid.axcodes,
        "spacing_mm": [round(s, 4) for s in grid.spacing_mm],
        "oblique_degrees": round(grid.oblique_degrees, 2),
        "modality": volume.modality,
        "unit": volume.unit,
        "range": [float(volume.array.min()), float(volume.array.max())],
        "first_voxel": point_words(low),
        "last_voxel": point_words(high),
        "notes": list(volume.source.notes),
    }


def inspect(
    model: Model, volume: Volume | None = None, at: str | None = None, *, every: bool = False
) -> dict[str, Any]:
    """What a model expects and which of its layers can be explained, with cells in mm.

    `volume` and `at` try it on a scan; without one the model's own patch and spacing are used.
    A compiled network is looked at as the one that it was made from, as explain does.
    """
    if not isinstance(model, Model):
        raise ModelError(f"expected a Model (med_gradcam.load_model), got {type(model).__name__}.")
    model = as_model(model, volume, None)
    count = len(model.net.members) if isinstance(model.net, Averaged) else 1
    if isinstance(model.net, Averaged):  # explained one by one, by a layer's name in each of them
        model = replace(model, net=model.net.members[0])
    spec = model.input
    if volume is not None:
        prepared = prepare(volume, model, at)
        shape, spacing = prepared.raw.shape, prepared.grid.spacing_mm
    else:
        shape = (spec.channels, *(spec.patch or spec.min_patch or _TRY))
        spacing = spec.spacing_mm or (1.0, 1.0, 1.0)
    with at_rest(model.net), eager(model.net), network_errors(model, shape, MISFIT):
        blind = gradient_free.why(model.net)
        model = model if blind else replace(model, net=fitting(model.net, shape))
        traced = Trace((), 0.0) if blind else trace(model.net, shape)
        chosen = candidates(model, traced)
        shown = traced.layers if every else chosen
        rows = [_layer(model, info, traced, shape, spacing) for info in shown]
    return {
        "kind": "model",
        "name": model.name,
        "task": model.task,
        "labels": list(model.labels),
        "link": model.link,
        "licence": model.licence,
        "weights_sha256": model.weights_sha256,
        "input": _input(spec),
        **({"drift": list(model.drift)} if model.drift else {}),
        **({"members": count} if count > 1 else {}),
        "tried_on": {"shape": list(shape), "spacing_mm": [round(s, 4) for s in spacing]},
        "spacing_known": volume is not None or spec.spacing_mm is not None,
        "candidates": [info.name for info in chosen],
        "layers": rows,
        "calibrated": sorted({f"{c.target} / {c.method} / {c.layer}" for c in model.calibration}),
        "bound": NORMAL,
        **({"gradient_free": blind} if blind else {}),
    }


def _input(spec: InputSpec) -> dict[str, Any]:
    return {
        "modality": spec.modality,
        "channels": spec.channels,
        "axes": spec.axes,
        "patch": None if spec.patch is None else list(spec.patch),
        "spacing_mm": None if spec.spacing_mm is None else list(spec.spacing_mm),
        "intensity": _intensity(spec),
    }


def _intensity(spec: InputSpec) -> str | list[list[Any]]:
    if spec.recipe is not None or spec.recipe_on is not None:
        return OWN_RECIPE
    return [[s.name, *(list(a) for a in s.arguments)] for s in spec.intensity]


def _layer(
    model: Model,
    info: LayerInfo,
    traced: Trace,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
) -> dict[str, Any]:
    names = [alias for alias, path in model.aliases.items() if path == info.name]
    row: dict[str, Any] = {
        "layer": info.name,
        "alias": names[0] if names else None,
        "kind": info.kind,
        "shape": list(info.shape),
        "tail_share": round(traced.tail_share(info.name), 4),
        "guard": _guard(info),
    }
    try:
        cells = place(model.net, info, shape)
    except CannotExplainError as error:
        return {**row, "guard": error.reason}
    cell_mm = [j * s for j, s in zip(cells.jump, spacing, strict=True)]
    field_mm = [f * s for f, s in zip(cells.receptive_field, spacing, strict=True)]
    return {
        **row,
        "cell_mm": [round(c, 3) for c in cell_mm],
        "uncertainty_voxels": cells.uncertainty_voxels and list(cells.uncertainty_voxels),
        "first_centre_voxels": [round(c, 3) for c in cells.start],
        "receptive_field_mm": [round(f, 2) for f in field_mm],
        "smallest_localisable_mm": round(2 * max(cell_mm), 2),
        "placed": cells.how,
    }


def _guard(info: LayerInfo) -> str:
    if info.is_output:
        return "logits"
    if info.runs > 1:
        return "shared layer"
    if info.silent:
        return "class token"
    if info.pointwise:
        return "pointwise"
    if info.feeds_norm:
        return "norm trap"
    return "not a cut" if info.past else "ok"


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    if report["kind"] == "scan":
        shown = {k: "not stated" if v is None else v for k, v in report.items() if k != "kind"}
        return "\n".join(f"{k}: {_plain(v)}" for k, v in shown.items())
    first = [f"{k}: {_plain(report[k])}" for k in ("name", "task", "labels", "link", "licence")]
    takes = ", ".join(f"{k} {_plain(v)}" for k, v in report["input"].items())
    tried = "x".join(str(n) for n in report["tried_on"]["shape"])
    mm = "mm" if report["spacing_known"] else "mm at voxels of 1 mm"
    lines = [*first, f"input: {takes}"]
    if "drift" in report:
        lines.append(f"steps of its own that are not done here: {'; '.join(report['drift'])}")
    if "members" in report:
        lines.append(f"members: {report['members']}, the layers are the first one's")
    lines.append("")
    if "gradient_free" in report:
        ways = ", ".join(gradient_free.methods())
        return "\n".join([*lines, f"no layers ({report['gradient_free']}); methods: {ways}"])
    lines += [f"layers, for an input of {tried}:"]
    head = ("layer", "kind", "shape", f"cell {mm}", "sees mm", "smallest mm", "placed", "guard")
    rows = [head]
    for row in report["layers"]:
        known = "cell_mm" in row
        rows.append(
            (
                row["layer"] + (f" ({row['alias']})" if row["alias"] else ""),
                row["kind"],
                "x".join(str(n) for n in row["shape"]),
                "x".join(f"{c:.1f}" for c in row["cell_mm"]) if known else "-",
                "x".join(f"{f:.0f}" for f in row["receptive_field_mm"]) if known else "-",
                f"{row['smallest_localisable_mm']:.0f}" if known else "-",
                row.get("placed", "-"),
                row["guard"],
            )
        )
    widths = [max(len(r[n]) for r in rows) for n in range(len(head))]
    lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value) if value else "none"
    return (
        "as the scan" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    )
