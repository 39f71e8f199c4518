"""How are the windows of a volume written down, for files and for people?"""

from __future__ import annotations

from typing import Any

from med_gradcam.record import heading
from med_gradcam.whole import Whole
from med_gradcam.whole_ledger import Candidate, WindowRow

FORMAT = "med-gradcam-windows/1"


def as_record(found: Whole) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    e = found.explanation
    return {
        "format": FORMAT,
        **heading(e),
        "kind": found.kind,
        "settings": e.provenance.parameters["windows"],
        "net": found.net,
        "residual": found.residual,
        "status": e.status,
        "ran": found.ran,
        "explained": found.explained,
        "skipped": found.skipped,
        "seconds_per_window": {"run": found.seconds[0], "explain": found.seconds[1]},
        "candidates": [_candidate(one) for one in found.candidates],
        "windows": [_row(one) for one in found.windows],
        "warnings": list(e.warnings),
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "window": one.window,
        "score": one.score,
        "ras_mm": [round(v, 3) for v in one.centre_ras_mm],
        "words": one.words,
        "side": one.side,
        "share": one.share,
        "windows": one.windows,
    }


def _row(one: WindowRow) -> dict[str, Any]:
    return {
        "number": one.number,
        "start": list(one.start),
        "ras_mm": [round(v, 3) for v in one.centre_ras_mm],
        "score": one.score,
        "reference_score": one.reference_score,
        "share": one.share,
        "net": one.net,
        "explained": one.explained,
        "skipped": one.skipped or None,
    }


def notes(found: Whole) -> list[str]:
    """What the windows were, and where to look, for people."""
    e = found.explanation
    size = " x ".join(str(n) for n in found.window)
    skipped = f", {found.skipped} not run" if found.skipped else ""
    run, explain = (_time(seconds) for seconds in found.seconds)
    lines = [
        f"{len(found.windows)} windows of {size} voxels{skipped}, {found.explained} explained; "
        f"{run} to run one, {explain} to explain one"
    ]
    if found.residual is not None:
        lines.append(
            f"the windows' maps add up to the change of the score but for {found.residual:.1g}"
        )
    for n, one in enumerate(found.candidates, start=1):
        share = f", {one.share:+.2f} of the volume's change" if one.share else ""
        lines.append(
            f"candidate {n}: {one.words} ({one.side}), score {one.score:+.2f}{_chance(found, one)}"
            f"{share}"
        )
    if not found.candidates and found.kind == "dense":
        lines += [
            f"window at {row.words}: {row.share:+.3f} of the volume's change"
            for row in sorted(found.windows, key=lambda row: -abs(row.share))[:3]
            if row.explained
        ]
    return [*lines, f"all windows add up to {found.net:+.3f} {e.target.unit}"]


def _chance(found: Whole, one: Candidate) -> str:
    """The window's own probability, where scores are log-odds of a class."""
    chance = found.explanation.target.probability(one.score)
    return "" if chance is None else f" (p {chance:.3f})"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
