"""Run the traps and write the table: which of the maps people have drawn so far were wrong?

Needs the other tools' environment: `benchmarks/peers/setup.sh`, then
`.venv-peers/bin/python -m benchmarks.traps`. Writes the table in docs/why-not-the-others.md and
benchmarks/results/traps.json; with --print it only prints the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.traps.rows import TRAPS, Figure, Row, Trap, tried

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "traps.json"
PAGE = ROOT / "docs" / "why-not-the-others.md"
THEMES = ("placement", "polarity", "plusplus", "batches", "layers", "pixels", "threads")


def traps() -> dict[str, Trap]:
    """All traps by number, in order."""
    for theme in THEMES:
        importlib.import_module(f"benchmarks.traps.{theme}")
    return dict(sorted(TRAPS.items(), key=lambda item: int(item[0][1:])))


def run(trap: Trap) -> list[Row]:
    """The rows of one trap; one row with the error where it could not be run."""
    assert trap.run is not None
    found = tried(trap.run)
    if isinstance(found, str):
        return [Row(trap.number, ", ".join(trap.tools), "could not be run", "-", found)]
    rows: list[Row] = found
    return rows


def _plain(value: Figure) -> Figure:
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def record(rows: Sequence[Row], versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows ready for JSON, with versions and verdicts."""
    return [
        {
            **{key: _plain(value) for key, value in asdict(row).items()},
            "version": versions.get(row.tool, ""),
            "verdict": row.verdict(row.theirs),
            "our_verdict": row.verdict(row.ours),
        }
        for row in rows
    ]


def figure(value: Figure, verdict: str) -> str:
    """A figure as the table shows it: what is wrong in bold."""
    shown = f"{value:g}" if isinstance(value, (int, float)) else str(value).split(". ")[0]
    shown = f"{shown[:87]}..." if len(shown) > 90 else shown
    return f"**{shown}**" if verdict in ("wrong", "fails") else shown


def text(report: Mapping[str, Any]) -> str:
    """The table in the page."""
    from benchmarks.peers.page import table

    parts = []
    known = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    parts.append(f"Run on {report['date']}, CPU, with {known}. In bold: not what it should be.")
    rows = []
    for row in report["rows"]:
        tool = f"{row['tool']} {row['version']}".strip()
        theirs, mine = (
            figure(row[key], row[verdict])
            for key, verdict in (("theirs", "verdict"), ("ours", "our_verdict"))
        )
        rows.append([row["trap"], tool, row["figure"], figure(row["right"], ""), theirs, mine])
    parts.append(table(["trap", "tool", "figure", "right", "theirs", "ours"], rows))
    ours = [r for r in report["rows"] if r["our_verdict"] in ("wrong", "fails")]
    named = "; ".join(dict.fromkeys(f"{r['trap']} ({r['figure']}: {r['ours']})" for r in ours))
    parts.append(f"Where ours is not right: {named or 'in none of these rows'}.")
    parts += [
        f"{trap['number']}, {', '.join(trap['tools'])}: {trap['why_not']}."
        for trap in report["not_run"]
    ]
    return "\n\n".join(parts)


def measure(wanted: Sequence[str]) -> dict[str, Any]:
    """Run the wanted traps (all by default)."""
    from benchmarks.peers.adapters import versions

    known, found = versions(), []
    chosen = {n: t for n, t in traps().items() if not wanted or n in wanted}
    for number, trap in chosen.items():
        if trap.run is not None:
            print(f"{number} {trap.title} ...", file=sys.stderr, flush=True)
            found += run(trap)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": known,
        "rows": record(found, known),
        "not_run": [
            {"number": t.number, "title": t.title, "tools": list(t.tools), "why_not": t.why_not}
            for t in chosen.values()
            if t.run is None
        ],
    }


def main(arguments: Sequence[str]) -> None:
    """Measure, then write or print; name the rows where ours is not right."""
    import torch

    from benchmarks.peers.page import put

    parser = argparse.ArgumentParser(
        prog="traps", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="S1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # theirs; what matters is what they return
    found = measure(options.only)
    for row in found["rows"]:
        if row["our_verdict"] in ("wrong", "fails"):
            print("OURS:", row["trap"], row["figure"], row["ours"], file=sys.stderr)
    if options.print or options.only:
        print(text(found))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put(PAGE, "traps", text(found))


if __name__ == "__main__":
    main(sys.argv[1:])
