"""What does each command of med-gradcam do? Heavy packages are imported inside the functions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from med_gradcam import _plugins
from med_gradcam.errors import ModelError, UsageError

if TYPE_CHECKING:
    from med_gradcam.explanation import Explanation, Region
    from med_gradcam.model import Model
    from med_gradcam.progress import Progress, Step
    from med_gradcam.volume import Volume


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code."""
    table: dict[str, Callable[[argparse.Namespace], int]] = {
        "explain": _explain,
        "concepts": _concepts,
        "regions": _regions,
        "doctor": _doctor,
        "demo": _demo,
        "inspect": _inspect,
        "methods": _list,
        "models": _list,
        "formats": _list,
    }
    return table[args.command](args)


def say(text: str) -> None:
    """A line of the result, on stdout."""
    print(text)  # noqa: T201


def tell(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr)  # noqa: T201


# ----------------------------------------------------------------------------------- explain


def _explain(args: argparse.Namespace) -> int:
    from med_gradcam import delivery, ensemble, loading

    delivery.check_output(Path(args.output), overwrite=args.overwrite)
    if args.formats is not None:  # a wrong name costs no prediction
        delivery.check_names(args.formats)
    model = ensemble.mirrored(loading.load_model(args.model, args.trust), args.mirrors)
    volume = loading.read_for(args.image, model, time=args.time, resample=args.resample)
    if args.formats is not None:
        delivery.check_formats(args.formats, volume)
    _tell_point(volume, args.at)
    if args.layer == "all":
        return _explain_layers(volume, model, args)
    explanation = explain_case(volume, model, args)
    folder = _deliver(explanation, volume, args)
    if args.json:
        say((folder / "explanation.json").read_text(encoding="utf-8"))
        return 0
    say(table([(explanation.target.label, explanation)]))
    for line in notes(explanation):
        say(line)
    say(f"written to {folder}")
    return 0


def _explain_layers(volume: Volume, model: Model, args: argparse.Namespace) -> int:
    """One map per depth, coarsest first."""
    from med_gradcam import delivery, engine

    with progress_bar(quiet=args.quiet) as progress:
        found = engine.explain_many([volume], model, progress=progress, **settings(args))
    folder = _deliver(found, volume, args)
    if args.json:
        say((folder / delivery.LAYERS).read_text(encoding="utf-8"))
        return 0
    say(table([(e.target.label, e) for e in found]))
    for line in layer_notes(found, delivery.folder_names(found)):
        say(line)
    say(f"written to {folder}")
    return 0


def _tell_point(volume: Volume, at: str | None) -> None:
    """The centre of the patch with letters, before the network runs."""
    if at is None:
        return
    from med_gradcam.geometry import point_words, side_words
    from med_gradcam.prepare import parse_point

    point = parse_point(at, volume.grid)
    tell(f"looking at {point_words(point)}, {side_words(point)}")


def explain_case(volume: Volume, model: Model, args: argparse.Namespace) -> Explanation:
    """One explanation with the settings of a command line, under a progress bar."""
    from med_gradcam import engine

    with progress_bar(quiet=args.quiet) as progress:
        return engine.explain(volume, model, progress=progress, **settings(args))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of explain() that a command line gives; those it has no word for by default."""
    from med_gradcam import loading

    reference: str | Volume = getattr(args, "reference", "auto")
    words = ("auto", "tissue", "zero")
    if isinstance(reference, str) and reference not in words and Path(reference).exists():
        reference = loading.read(reference)
    return {
        "target": getattr(args, "target", "auto"),
        "output": getattr(args, "model_output", ""),
        "layer": getattr(args, "layer", "auto"),
        "method": getattr(args, "method", "secant"),
        "reference": reference,
        "at": getattr(args, "at", None),
        "precise": getattr(args, "precise", False),
        "quick": getattr(args, "quick", False),
        "fast": getattr(args, "fast", False),
        "accept_drift": getattr(args, "accept_drift", False),
        "alignment": getattr(args, "alignment", "nominal"),
        "device": _device(args.device),
        "threads": args.threads,
        "seed": args.seed,
    }


def _device(wish: str) -> str:
    if wish != "auto":
        return wish
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _deliver(
    found: Explanation | Sequence[Explanation], volume: Volume, args: argparse.Namespace
) -> Path:
    """The folder of one explanation, or of one per layer."""
    from med_gradcam import delivery

    wish = getattr(args, "formats", None)
    with progress_bar(quiet=args.quiet) as progress:
        given: dict[str, Any] = {
            "volume": volume,
            "formats": delivery.default_formats(volume) if wish is None else wish,
            "overwrite": args.overwrite,
            "identified": getattr(args, "identified", False),
            "progress": progress,
        }
        if isinstance(found, Sequence):
            return delivery.write_layers(found, args.output, **given)
        return delivery.write(found, args.output, **given)


def table(cases: list[tuple[str, Explanation]]) -> str:
    """Finding, score, reference, for, against and residual, one line per case.

    A map without a sign has neither for nor against.
    """
    head = ("finding", "score", "reference", "for", "against", "residual", "probability", "layer")
    rows: list[tuple[str, ...]] = [head]
    for name, e in cases:
        sums = (e.sum_for, -e.sum_against) if e.signed else (None, None)
        numbers = [e.score, e.reference_score, *sums, e.residual]
        rows.append(
            (
                name,
                *("-" if n is None else f"{n:+.3f}" for n in numbers),
                "-" if e.probability is None else f"{e.probability:.4f}",
                e.layer,
            )
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(len(x) for x in lines), *lines[1:]])


def notes(e: Explanation) -> list[str]:
    """What must be said beside the numbers."""
    lines = [f"{e.target.label}: {e.target.about}"] if e.target.about else []
    lines += [
        f"{_compared(e)}; cost {e.cost_in_forwards:g} forwards",
        f"{_cells(e)}; nothing under {e.smallest_localisable_mm:.0f} mm is told apart",
        *_strongest(e),
    ]
    lines += [_removed(e, region) for region in e.regions if region.chosen != "random"]
    told = dict.fromkeys((*e.warnings, *e.provenance.notes))
    return [*lines, *(f"note: {w}" for w in told)]


def layer_notes(found: Sequence[Explanation], names: Sequence[str]) -> list[str]:
    """What must be said beside the numbers of several layers; `names`: of their folders."""
    first = found[0]
    lines = [f"{first.target.label}: {first.target.about}"] if first.target.about else []
    lines.append(f"cost {sum(e.cost_in_forwards for e in found):g} forwards; no layer was tested")
    said = dict.fromkeys(note for e in found for note in e.provenance.notes)
    for name, e in zip(names, found, strict=True):
        lines += [f"{name}: {_compared(e)}; {_cells(e)}", *(f"  {w}" for w in _strongest(e))]
        lines += [f"  note: {w}" for w in dict.fromkeys(e.warnings)]
    return [*lines, *(f"note: {w}" for w in said)]


def _removed(e: Explanation, region: Region) -> str:
    """What removing a region did, beside what the map says of it where that is an amount too."""
    from med_gradcam.geometry import point_words

    place = f"{point_words(region.centre_ras_mm)} ({region.radius_mm:.0f} mm ball)"
    change = f"changes the score by {-region.effect:+.2f} {e.target.unit}"
    if e.measure != "score":
        return f"removing what lies around {place} {change}"
    return f"around {place} the map says {region.net:+.2f} {e.unit}; removing it {change}"


def _compared(e: Explanation) -> str:
    from med_gradcam.summary import NO_SIGN, status_words

    against = "" if e.reference.kind == "none" else f", relative to {e.reference.words}"
    if not e.signed:
        return f"map in {e.unit}{against}, with {NO_SIGN}; {status_words(e)}"
    return f"evidence in {e.unit}{against}; {status_words(e)}"


def _cells(e: Explanation) -> str:
    return f"cells {' x '.join(f'{mm:.1f}' for mm in e.cell_mm)} mm ({e.cells.how})"


def _strongest(e: Explanation) -> list[str]:
    """Where the evidence of either polarity, or a map without a sign, is strongest."""
    from med_gradcam.maps import draw
    from med_gradcam.summary import peaks

    raises, lowers = e.target.words
    scored = "output" if raises.startswith("pulls") else "score"
    words = {
        "for": f"{raises} the model's {scored} most",
        "against": f"{lowers} the model's {scored} most",
        "strength": "the map is strongest",
    }
    return [
        f"{words[peak.polarity]} at {peak.words} ({peak.side}), {peak.per_ml:.3g} {e.unit} per mL"
        for peak in peaks(e, draw(e), most=1)
    ]


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr for work over a second; says nothing when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield _no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(step: Step) -> None:
            if step.done >= 0:
                bar.update(task, total=step.total, completed=step.done, description=step.what)
            elif step.what:
                bar.update(task, description=step.what)

        yield show


def _no_progress(step: Step) -> None:
    del step


# ---------------------------------------------------------------- concepts, regions, doctor


def _concepts(args: argparse.Namespace) -> int:
    from med_gradcam import channel_table, channels, loading

    model = loading.load_model(args.model, args.trust)
    volume = loading.read_for(args.image, model, time=args.time, resample=args.resample)
    _tell_point(volume, args.at)
    with progress_bar(quiet=args.quiet) as progress:
        found = channels.concepts(
            volume, model, most=args.most, progress=progress, **settings(args)
        )
    if args.json:
        say(json.dumps(channel_table.as_record(found), indent=1))
    else:
        say(channel_table.as_text(found))
    return 0


def _regions(args: argparse.Namespace) -> int:
    from med_gradcam import loading, region_table, regions

    model = loading.load_model(args.model, args.trust)
    volume = loading.read_for(args.image, model, time=args.time, resample=args.resample)
    wish = "components" if args.labels is None else loading.read(args.labels)
    _tell_point(volume, args.at)
    with progress_bar(quiet=args.quiet) as progress:
        found = regions.shapley(
            volume, model, regions=wish, most=args.most, progress=progress, **settings(args)
        )
    record = region_table.as_record(found)
    say(json.dumps(record, indent=1) if args.json else region_table.as_text(found))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from med_gradcam import loading
    from med_gradcam.checkup import report

    model = loading.load_model(args.model, args.trust)
    volume = loading.read_for(args.image, model, time=args.time, resample=args.resample)
    _tell_point(volume, args.at)
    given = settings(args)
    given.pop("method")
    with progress_bar(quiet=args.quiet) as progress:
        found = report.doctor(model, volume, progress=progress, **given)
    say(json.dumps(report.as_record(found), indent=1) if args.json else report.as_text(found))
    return 0


# -------------------------------------------------------------------------------------- demo


def _demo(args: argparse.Namespace) -> int:
    from med_gradcam import delivery, demo

    folder = Path(args.output or "med_gradcam_demo")
    delivery.check_output(folder, overwrite=args.overwrite)
    finished = demo.run(folder, args, explain_case)
    if args.json:
        say(json.dumps([c.record for c in finished.cases], indent=1))
    else:
        say(table([(case.name, case.explanation) for case in finished.cases]))
        say("for raises the model's score, against lowers it; both in log-odds")
        say(f"written to {folder}")
    if args.open:
        demo.show(finished.to_show)
    return 0


# ----------------------------------------------------------------------------------- inspect


def _inspect(args: argparse.Namespace) -> int:
    from med_gradcam import inspection, loading

    try:
        model = loading.load_model(args.model, args.trust)
    except ModelError:
        there = Path(args.model)
        if args.image or not there.exists() or loading.model_format(args.model) is not None:
            raise  # it was meant as a model
        report = inspection.of_scan(loading.read(args.model, time=args.time))
    else:
        scan = None
        if args.image:
            scan = loading.read_for(args.image, model, time=args.time, resample=args.resample)
        if scan is None and args.at is not None:
            raise UsageError("expected an IMAGE with --at: inspect MODEL IMAGE --at POINT.")
        report = inspection.inspect(model, scan, args.at, every=args.all)
    say(json.dumps(report, indent=1) if args.json else inspection.as_text(report))
    return 0


def _list(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for name in _plugins.names(args.command):
        module = _plugins.load(args.command, name)
        rows.append({"name": name, "title": module.TITLE})
        if args.command == "methods":
            rows[-1] |= {
                "unit": module.UNIT,
                "source": module.SOURCE,
                "cannot_show": module.CANNOT_SHOW,
            }
    if args.json:
        say(json.dumps(rows, indent=1))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        say(f"{row['name']:<{width}}  {row['title']}")
    return 0
