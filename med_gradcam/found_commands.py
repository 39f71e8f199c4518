"""What do components, boxes and explain --each-time do on the command line?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from med_gradcam.commands import progress_bar, say, settings
from med_gradcam.errors import UsageError

if TYPE_CHECKING:
    from med_gradcam.model import Model
    from med_gradcam.volume import Volume


def takes(args: argparse.Namespace) -> bool:
    """Whether a parsed command is one of these."""
    return args.command in ("components", "boxes") or bool(getattr(args, "each_time", False))


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code."""
    return _each_time(args) if args.command == "explain" else _found(args)


def _found(args: argparse.Namespace) -> int:
    from med_gradcam import findings, loading

    if args.most < 1:
        raise UsageError(f"expected at least one row for --most, got {args.most}.")
    model = loading.load_model(args.model, args.trust)
    volume = loading.read_for(args.image, model, time=args.time, resample=args.resample)
    given = settings(args)
    with progress_bar(quiet=args.quiet) as progress:
        given["progress"] = progress
        if args.command == "boxes":
            target = given.pop("target")
            found = findings.boxes(volume, model, **given)
            found = tuple(b for b in found if target in ("auto", b.label))
        else:
            found = findings.components(volume, model, **given)  # type: ignore[assignment]
    if args.json:
        say(json.dumps(findings.as_record(found), indent=1))
    else:
        say(findings.as_text(found, args.command, args.most))
    return 0


def _each_time(args: argparse.Namespace) -> int:
    """One map per time point, on one scale."""
    from med_gradcam import delivery, loading, series

    if args.time is not None or args.resample:
        raise UsageError("expected no --time and no --resample-to-first beside --each-time.")
    folder = Path(args.output)
    if not (args.overwrite and (folder / series.INDEX).is_file()):
        delivery.check_output(folder, overwrite=args.overwrite)
    if args.formats is not None:
        delivery.check_names(args.formats)
    model = loading.load_model(args.model, args.trust)
    volumes = loading.read_series(args.image)
    _check_several(volumes, model)
    with progress_bar(quiet=args.quiet) as progress:
        made = series.explain_series(volumes, model, progress=progress, **settings(args))
        wish = args.formats
        series.write_series(
            made,
            folder,
            volumes=volumes,
            formats=delivery.default_formats(volumes[0]) if wish is None else wish,
            overwrite=args.overwrite,
            identified=args.identified,
            progress=progress,
        )
    if args.json:
        say((folder / series.INDEX).read_text(encoding="utf-8"))
        return 0
    say(series.as_text(made))
    for line in series.notes(made):
        say(line)
    say(f"written to {folder}")
    return 0


def _check_several(volumes: list[Volume], model: Model) -> None:
    if len(volumes) == 1:
        raise UsageError("expected several volumes with --each-time, got one; leave it out.")
    if model.input.channels > 1:
        raise UsageError(
            f"expected a network of one channel with --each-time, got {model.input.channels} for "
            f"{model.name!r}; a network over time takes the whole file without --each-time."
        )
