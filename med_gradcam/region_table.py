"""How are the values of regions written down, for files and for people?"""

from __future__ import annotations

from typing import Any

from med_gradcam.record import heading
from med_gradcam.regions import RegionValue, RegionValues

FORMAT = "med-gradcam-regions/1"


def as_record(found: RegionValues) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    e = found.explanation

    def row(one: RegionValue) -> dict[str, Any]:
        return {
            "number": one.number,
            "name": one.name,
            "net": one.net,
            "value": one.value,
            "standard_error": one.standard_error,
            "deviation": one.deviation,
            "ml": one.ml,
            "ras_mm": None if one.ras_mm is None else [round(v, 3) for v in one.ras_mm],
            "words": one.words,
        }

    return {
        "format": FORMAT,
        **heading(e),
        "regions": [row(one) for one in found.regions],
        "elsewhere": row(found.elsewhere),
        "start_score": found.start_score,
        "total": found.total,
        "residual": found.residual,
        "exact": found.exact,
        "passes": found.passes,
        "cost_in_forwards": found.forwards,
        "warnings": list(e.warnings),
    }


def as_text(found: RegionValues) -> str:
    """The table for people."""
    e = found.explanation
    against = "" if e.reference_score is None else f", reference {e.reference_score:+.3f}"
    lines = [
        f"{e.target.label} at the layer {e.layer}: score {e.score:+.3f}{against}, "
        f"{e.unit} relative to {e.reference.words}",
        "",
    ]
    head = ("region", "map", "shapley", "error", "map - shapley", "mL", "centre")
    rows: list[tuple[str, ...]] = [head]
    for one in (*found.regions, found.elsewhere):
        error = f"{one.standard_error:.3f}" if one.standard_error else "exact"
        numbers = (f"{one.net:+.3f}", f"{one.value:+.3f}", error, f"{one.deviation:+.3f}")
        rows.append((one.name, *numbers, f"{one.ml:.2f}", one.words))
    net = e.sum_for - e.sum_against
    rows.append(("all", f"{net:+.3f}", f"{found.total:+.3f}", "", "", "", ""))
    widths = [max(len(row[n]) for row in rows) for n in range(len(head) - 1)]
    for row in rows:
        cells = [text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
    return "\n".join([*lines, "", *_footnotes(found)])


def _footnotes(found: RegionValues) -> list[str]:
    e = found.explanation
    past = found.residual
    told = dict.fromkeys((*e.warnings, *e.provenance.notes))
    sums = f"the Shapley values add up to the score less {found.start_score:+.3f}"
    return [
        f"{sums}, the score with the reference's activation at the whole layer",
        *([] if past is None else [f"{past:+.3f} flows past the layer, or is rounding"]),
        "where map and Shapley value differ, what regions do together is shared out otherwise, or "
        "the map is wrong",
        f"{found.passes} runs of what lies behind the layer; cost {found.forwards:g} forwards in "
        f"all",
        *(f"note: {w}" for w in told),
    ]
