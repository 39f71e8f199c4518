"""How are the channels of a layer written down, for files and for people?"""

from __future__ import annotations

from typing import Any

from med_gradcam.channels import Channel, Concepts, Others, Place
from med_gradcam.record import heading

FORMAT = "med-gradcam-concepts/1"


def as_record(found: Concepts) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    e = found.explanation

    def sums(row: Channel | Others) -> dict[str, Any]:
        return {
            "net": row.net,
            "for": row.sum_for,
            "against": row.sum_against,
            "share": row.share,
        }

    def place(one: Place) -> dict[str, Any]:
        ras = [round(v, 3) for v in one.ras_mm]
        return {"ras_mm": ras, "words": one.words, "side": one.side, "evidence": one.evidence}

    return {
        "format": FORMAT,
        **heading(e),
        "channels": [
            {"index": c.index, **sums(c), "places": [place(p) for p in c.places]}
            for c in found.channels
        ],
        "others": {"count": found.others.count, **sums(found.others)},
        "net": found.net,
        "residual": found.residual,
        "warnings": list(e.warnings),
    }


def as_text(found: Concepts) -> str:
    """The table for people."""
    e = found.explanation
    against = "" if e.reference_score is None else f", reference {e.reference_score:+.3f}"
    count = len(found.channels) + found.others.count
    lines = [
        f"{e.target.label} at the layer {e.layer}, {count} channel{'s' * (count > 1)}: "
        f"score {e.score:+.3f}{against}, {e.unit} relative to {e.reference.words}",
        "",
    ]
    head = ("channel", "net", "share", "for", "against", "strongest places")
    rows: list[tuple[str, ...]] = [head]
    for c in found.channels:
        where = [f"{p.words} ({p.side}) {p.evidence:+.3f}" for p in c.places] or ["-"]
        rows.append((str(c.index), *_numbers(c), where[0]))
        rows += [("", "", "", "", "", text) for text in where[1:]]
    if found.others.count:
        rows.append((f"{found.others.count} others", *_numbers(found.others), ""))
    if found.residual is not None and e.reference_score is not None:
        rows.append(("residual", f"{found.residual:+.3f}", "", "", "", ""))
        rows.append(("all", f"{e.score - e.reference_score:+.3f}", "", "", "", ""))
    else:
        rows.append(("all", f"{found.net:+.3f}", "", "", "", ""))
    widths = [max(len(row[n]) for row in rows) for n in range(len(head) - 1)]
    for row in rows:
        cells = [text.rjust(w) for text, w in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    lines += ["", *_footnotes(found)]
    return "\n".join(lines)


def _numbers(row: Channel | Others) -> tuple[str, str, str, str]:
    share = "-" if row.share is None else f"{row.share:.0%}"
    return f"{row.net:+.3f}", share, f"{row.sum_for:+.3f}", f"{-row.sum_against:+.3f}"


def _footnotes(found: Concepts) -> list[str]:
    e = found.explanation
    sums = (
        "the nets and the residual add up to the score's difference from the reference"
        if found.residual is not None
        else "the nets add up to the map; this method promises no sum with the score"
    )
    told = dict.fromkeys((*e.warnings, *e.provenance.notes))
    return [
        f"{sums}; cells {' x '.join(f'{mm:.1f}' for mm in e.cell_mm)} mm",
        "a channel is a number of the network's own; what it stands for is for you to find at its "
        "places",
        *(f"note: {w}" for w in told),
    ]
