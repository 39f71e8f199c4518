"""What does `med-gradcam whole` do: a whole volume by windows, and where to look in it?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from med_gradcam.commands import notes, progress_bar, say, settings, table
from med_gradcam.errors import UsageError

WINDOWS = "windows.json"


def add_options(sub: argparse.ArgumentParser) -> None:
    """The options of the windows."""
    add = sub.add_argument
    add("--window", metavar="I,J,K", help="voxels of a window (default: the model's patch)")
    add("--overlap", type=float, default=0.5, help="share of a window, 0 to 1 (default: 0.5)")
    add("--importance", default="gaussian", choices=["gaussian", "constant"], help="of map voxels")
    add("--aggregate", default="max", help="of scores: max, mean, lse or noisy-or (default: max)")
    add("--temperature", type=float, default=1.0, help="of lse (default: 1)")
    add("--window-batch", type=int, default=1, metavar="N", help="windows run at a time")
    add("--keep-air", action="store_true", help="run windows of air, too")
    add("--within", metavar="MASK", help="only windows whose centre lies in this mask")
    add("--most", type=int, default=10, help="candidates to list (default: 10)")


def takes(args: argparse.Namespace) -> bool:
    """Whether a parsed command is this one."""
    return bool(args.command == "whole")


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code."""
    from med_gradcam import delivery, loading, whole, whole_table
    from med_gradcam.record import to_json

    folder = Path(args.output)
    delivery.check_output(folder, overwrite=args.overwrite)
    if args.formats is not None:
        delivery.check_names(args.formats)
    model = loading.load_model(args.model, args.trust)
    volume = loading.read_for(args.image, model, time=args.time, resample=args.resample)
    with progress_bar(quiet=args.quiet) as progress:
        found = whole.explain_whole(volume, model, progress=progress, **_given(args))
        wish, text = args.formats, to_json(whole_table.as_record(found))
        delivery.write(
            found.explanation,
            folder,
            volume=volume,
            formats=delivery.default_formats(volume) if wish is None else wish,
            overwrite=args.overwrite,
            identified=args.identified,
            beside={WINDOWS: text},
            progress=progress,
        )
    if args.json:
        say(text)
        return 0
    e = found.explanation
    say(table([(e.target.label, e)]))
    for line in (*whole_table.notes(found), *notes(e)):
        say(line)
    say(f"written to {folder}")
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of explain_whole() that a command line gives."""
    from med_gradcam import loading

    given = settings(args)
    for name in ("at", "fast"):  # which this command does not have
        given.pop(name)
    return given | {
        "window": None if args.window is None else _three(args.window),
        "overlap": args.overlap,
        "importance": args.importance,
        "aggregate": args.aggregate,
        "temperature": args.temperature,
        "batch": args.window_batch,
        "skip_air": not args.keep_air,
        "within": None if args.within is None else loading.read(args.within),
        "most": args.most,
    }


def _three(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"expected a window as three whole numbers I,J,K of voxels, got {text!r}.")
    return tuple(int(part) for part in parts)
