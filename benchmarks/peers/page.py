"""How do results become a table in a page, between two markers?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.variants import PLAIN


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- NAME:begin --> and <!-- NAME:end -->.

    Raises:
        ValueError: the page has no such pair of markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = page.read_text(encoding="utf-8")
    head, found, rest = whole.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the markers {begin} and {end} in {page.name}, found none.")
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")


def _ratio(value: float) -> str:
    return f"x{value:.2f}" if value < 10 else f"x{value:.0f}"


def _time(cell: Mapping[str, Any]) -> str:
    spread = f"{cell['ratio_min']:.2f}-{cell['ratio_max']:.2f}"
    return f"{_ratio(cell['ratio'])} ({spread})"


def _memory(cell: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    mb, least = cell.get("extra_mb"), plain.get("extra_mb")
    if mb is None or not least:
        return "-"
    return f"{_ratio(mb / least)}"


def _plain(cell: Mapping[str, Any], kind: str) -> str:
    value = cell.get("seconds" if kind == "time" else "extra_mb")
    if value is None:
        return "-"
    return f"{value:.2f} s" if kind == "time" else f"{value:.0f} MB"


def cell_text(cell: Mapping[str, Any] | None, plain: Mapping[str, Any], kind: str) -> str:
    """One cell of the table of `kind` time or memory; a failure is named by its note."""
    if cell is None:
        return "-"
    if "error" in cell:
        return f"fails [{cell['note']}]"
    return _time(cell) if kind == "time" else _memory(cell, plain)


def _numbered(results: Mapping[str, Any]) -> list[str]:
    """The distinct errors, each given its number in the cells."""
    notes: list[str] = []
    for by_variant in results.values():
        for name, cell in by_variant.items():
            if "error" in cell:
                text = f"{name}: `{cell['error']}`"
                if text not in notes:
                    notes.append(text)
                cell["note"] = notes.index(text) + 1
    return notes


def _one(results: Mapping[str, Any], names: Sequence[str], kind: str) -> str:
    head = [f"{kind}, ratio to plain inference", *(column.split(" @ ")[0] for column in results)]
    rows = [[PLAIN, *(_plain(found.get(PLAIN, {}), kind) for found in results.values())]]
    for name in names:
        cells = (cell_text(f.get(name), f.get(PLAIN, {}), kind) for f in results.values())
        rows.append([name, *cells])
    return table(head, rows)


def peers_text(report: Mapping[str, Any]) -> str:
    """The tables of benchmarks/results/peers.json: per input size one for time, one for memory."""
    machine, settings = report["machine"], report["settings"]
    known = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['ram_gib']} GiB, {machine['system']}, Python {machine['python']}; {known}. "
        f"{settings['rounds']} rounds on {settings['date']}: median (least-most).",
    ]
    results = report["results"]  # "NET @ SIDE" -> variant -> figures
    notes = _numbered(results)
    names = list(dict.fromkeys(n for f in results.values() for n in f if n != PLAIN))
    for side in dict.fromkeys(column.split(" @ ")[1] for column in results):
        here = {c: f for c, f in results.items() if c.split(" @ ")[1] == side}
        shown = [n for n in names if any(n in f for f in here.values())]
        parts.append(f"**Input {side}^3**")
        parts.append(_one(here, shown, "time"))
        if any("extra_mb" in cell for f in here.values() for cell in f.values()):
            parts.append(_one(here, shown, "memory"))
    parts += [f"[{number}] {text}" for number, text in enumerate(notes, 1)]
    return "\n\n".join(parts)
