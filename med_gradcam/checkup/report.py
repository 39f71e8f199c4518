"""What does a check-up of a network and a scan say, row by row, for people and for files?"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from med_gradcam import gradient_free
from med_gradcam.checkup import maps, network, places
from med_gradcam.checkup.facts import Facts, gather, modes_of
from med_gradcam.checkup.rows import VERDICTS, Row, mm
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.model import Model
from med_gradcam.opening import check_one_layer, opened

FORMAT = "med-gradcam-doctor/1"
ORDER = (*places.ROWS[:1], *maps.ROWS, *network.ROWS, *places.ROWS[1:])
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was looked at, and a row for each trap.

    `layer_name`: with what the model's author calls it; `named`: whether the caller named the
    layer; otherwise it is the coarsest of those worth trying. `shape` and `spacing_mm` are the
    network's own view of the scan.
    """

    model: str
    weights_sha256: str
    target: str
    unit: str
    score: float
    reference: str | None
    layer: str
    layer_name: str
    named: bool
    cells: tuple[int, int, int]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    axes: str
    rows: tuple[Row, ...]


def doctor(model: object, image: object, **settings: Any) -> Checkup:
    """The traps of Grad-CAM tools, worked out on one network and one scan.

    `settings` are those of explain() (target, layer, at, reference, output, inputs, affine, link,
    device, threads, seed, progress); the method is always the default one. Costs some twenty-five
    predictions. The network comes back bit for bit as it was.

    Raises:
        UsageError: a method, or several layers.
        MedGradcamError: as explain(), where the network or the scan cannot be looked at.
    """
    if "method" in settings:
        raise UsageError("expected no method for a check-up, which compares with the default one.")
    net = model.net if isinstance(model, Model) else model
    training, modes = modes_of(net) if isinstance(net, torch.nn.Module) else ((), [])
    others = settings.get("inputs")
    inputs = 1 if not others else 1 + sum(value is not ... for value in others)
    gradient_free.check_gradient(net, "a check-up")
    with opened(image, model, settings) as case:
        check_one_layer(case, "a check-up")
        facts = gather(case, training, modes, inputs)
    return _report(facts)


def _report(f: Facts) -> Checkup:
    e = f.ledger if isinstance(f.ledger, Explanation) else f.auto
    return Checkup(
        model=f.model.name,
        weights_sha256=f.model.weights_sha256,
        target=f.target.label,
        unit=f.target.unit,
        score=f.score,
        reference=e.reference.words if isinstance(e, Explanation) else None,
        layer=f.layer,
        layer_name=f.name(f.layer),
        named=f.named,
        cells=f.shape,
        shape=f.prepared.raw.shape,
        spacing_mm=f.prepared.grid.spacing_mm,
        axes=f.prepared.grid.axcodes,
        rows=tuple(row(f) for row in ORDER),
    )


def counts(checkup: Checkup) -> dict[str, int]:
    """How many rows have each verdict."""
    found = Counter(row.verdict for row in checkup.rows)
    return {verdict: found[verdict] for verdict in VERDICTS}


def as_record(checkup: Checkup) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    c = checkup
    return {
        "format": FORMAT,
        "model": c.model,
        "weights_sha256": c.weights_sha256,
        "input": {
            "shape": list(c.shape),
            "spacing_mm": [round(s, 4) for s in c.spacing_mm],
            "axes": c.axes,
        },
        "target": c.target,
        "unit": c.unit,
        "score": c.score,
        "reference": c.reference,
        "layer": c.layer,
        "layer_named": c.named,
        "cells": list(c.cells),
        "counts": counts(c),
        "wrong_by_tool": by_tool(c),
        "rows": [
            {
                "key": row.key,
                "traps": list(row.traps),
                "verdict": row.verdict,
                "finding": row.finding,
                "meaning": row.meaning,
                "advice": row.advice,
                "tools": list(row.tools),
                "note": row.note,
                "figures": dict(row.figures),
            }
            for row in c.rows
        ],
    }


def as_text(checkup: Checkup) -> str:
    """The report for people: what was wrong first, what does not apply last."""
    c = checkup
    why = "as named" if c.named else "the coarsest worth trying, since none was named"
    lines = [f"{c.model}: {c.target}, score {c.score:+.3f} {c.unit}"]
    lines += textwrap.wrap(
        f"layer {c.layer_name}, {why}: {_by(c.cells)} cells; the network sees {_by(c.shape)} "
        f"voxels of {mm(c.spacing_mm)}, axes {c.axes}",
        WIDTH,
    )
    lines += [
        f"exact map relative to {c.reference}" if c.reference else "no exact map could be made"
    ]
    for verdict, meaning in VERDICTS.items():
        found = [row for row in c.rows if row.verdict == verdict]
        lines += ["", f"{verdict.upper()}: {meaning}"] if found else []
        for row in found:
            lines += _full(row) if verdict in ("wrong", "check") else _brief(row)
    lines += ["", "WRONG BY TOOL"]
    for tool, keys in by_tool(c).items():
        lines += _wrapped(f"{tool}: ", ", ".join(keys))
    total = ", ".join(f"{n} {verdict}" for verdict, n in counts(c).items())
    rule = "Each is the tool's own rule, worked out on this network and scan."
    lines += ["", *textwrap.wrap(f"{total}. {rule}", WIDTH)]
    return "\n".join(lines)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(n) for n in sizes)


def by_tool(checkup: Checkup) -> dict[str, list[str]]:
    """The keys of what is wrong, by tool."""
    found: dict[str, list[str]] = {}
    for row in checkup.rows:
        for tool in row.tools if row.verdict == "wrong" else ():
            found.setdefault(tool, []).append(row.key)
    return found


def _full(row: Row) -> list[str]:
    numbers = f" ({', '.join(row.traps)})" if row.traps else ""
    lines = ["", f"  {row.key}{numbers}"]
    tools = "; ".join(text for text in (", ".join(row.tools), row.note) if text)
    for name, text in (
        ("found", row.finding),
        ("earlier maps", row.meaning),
        ("do", row.advice),
        ("tools", tools),
    ):
        lines += _wrapped(f"  {name:<13}", text)
    return lines


def _brief(row: Row) -> list[str]:
    return _wrapped(f"{row.key}: ", row.finding)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {name}",
        subsequent_indent=" " * (2 + min(len(name), 15)),
        break_on_hyphens=False,
    )
