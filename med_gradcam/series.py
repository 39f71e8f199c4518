"""What does a network say of each time point of a series, on one scale?

One target, one layer, one colour scale for all: what is drawn brighter at one time than at another
is so. Each map is relative to a reference of its own time point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from med_gradcam import _plugins, delivery
from med_gradcam.bundle import Bundle
from med_gradcam.calibration import Calibration, from_case
from med_gradcam.capture import outputs
from med_gradcam.engine import explain
from med_gradcam.errors import CannotExplainError, ImageError, MedGradcamError, UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.maps import Maps, draw
from med_gradcam.opening import opened
from med_gradcam.progress import Progress, Step, silent
from med_gradcam.record import to_json, to_record
from med_gradcam.target import Target
from med_gradcam.targeting import pick
from med_gradcam.volume import Volume, off_words, same_grid, taken_as

INDEX = "series.json"  # of a folder with one explanation per time point
ALL_TIMES = "all time points"  # the layer of a scale that the time points share


@dataclass(frozen=True, slots=True, eq=False)
class SeriesExplanation:
    """One map per time point, in order; None where there is nothing to explain, and `why`.

    `leading`: the time point (from 0) of the highest score, by which class and layer were chosen.
    """

    maps: tuple[Explanation | None, ...]
    why: tuple[str, ...]
    leading: int

    @property
    def scores(self) -> tuple[float | None, ...]:
        """The model's score at each time point."""
        return tuple(None if e is None else e.score for e in self.maps)

    @property
    def scale(self) -> Calibration:
        """The colour scale of all: the model's own, or one to the largest peak of all maps."""
        made = [e for e in self.maps if e is not None]
        known = made[0].calibration
        if known is not None:
            return known
        first, peak = made[0], max(draw(e).signed.peak for e in made)
        return from_case(peak, first.target.label, first.method, ALL_TIMES)

    def draw(self, n: int) -> Maps:
        """The maps of time point n (from 0), drawn on the scale of all.

        Raises:
            UsageError: there is no map of that time point.
        """
        e = self.maps[n] if 0 <= n < len(self.maps) else None
        if e is None:
            told = self.why[n] if 0 <= n < len(self.maps) else f"there are {len(self.maps)}"
            raise UsageError(f"expected a time point with a map, got {n} (from 0): {told}")
        return draw(e).on_scale(self.scale)


def explain_series(images: Sequence[object], model: object, **settings: Any) -> SeriesExplanation:
    """Each time point of a series explained: the same class, the same layer, one scale.

    `images`: as read_series() gives them. The class (target="auto") and the layer (auto) are those
    of the time point with the highest score. Further settings are those of explain(). Time points
    where there is nothing to explain, such as those for which a segmenter predicts no voxel of the
    class, have no map.

    Raises:
        UsageError: no series, or several layers.
        ImageError: its scans do not lie on one grid.
        CannotExplainError: no time point can be explained. Otherwise as explain().
    """
    _check(images, settings)
    progress: Progress = settings.pop("progress", silent)
    looks = [_look(image, model, settings) for image in images]
    leading = max(range(len(images)), key=lambda n: looks[n].score)
    best, given = looks[leading].target, dict(settings)
    if best is None:
        raise looks[leading].error or UsageError("expected a series, got nothing to explain.")
    alone = best.region is None or best.region.kind == "predicted"
    if str(given.get("target", "auto")) == "auto" and alone and len(best.index) == 1:
        given["target"] = f"#{best.index[0]}"
    made: list[Explanation | None] = [None] * len(images)
    why = ["" if look.error is None else str(look.error) for look in looks]
    for done, n in enumerate([leading, *(m for m in range(len(images)) if m != leading)]):
        progress(Step(done, len(images), f"time point {n + 1} of {len(images)}"))
        if looks[n].target is None:
            continue
        try:
            e = made[n] = explain(images[n], model, **given)
        except CannotExplainError as error:
            if n == leading:
                raise
            why[n] = str(error)
        else:
            given["layer"] = e.layer  # of the leading one, which comes first
    return SeriesExplanation(tuple(made), tuple(why), leading)


@dataclass(frozen=True, slots=True)
class _Look:
    """What one prediction says of a time point: its target and score, or why there is none."""

    target: Target | None
    score: float
    error: MedGradcamError | None = None


def _look(image: object, model: object, settings: dict[str, Any]) -> _Look:
    try:
        with opened(image, model, settings) as case:
            output = outputs(case.model.net, case.tensor(case.prepared.network_input()))
            target = pick(case.request, output, case.model, case.prepared)
            return _Look(target, float(target(output)[0]))
    except (CannotExplainError, UsageError) as error:
        return _Look(None, -math.inf, error)


def _check(images: Sequence[object], settings: dict[str, Any]) -> None:
    if isinstance(images, (str, Volume)) or not hasattr(images, "__len__") or len(images) == 0:
        raise UsageError(f"expected a list of time points, got {type(images).__name__}.")
    if settings.get("layer", "auto") in ("all", "fused"):
        raise UsageError(
            f"expected auto or the name of a layer for a series, got {settings['layer']!r}: all "
            f"time points are explained at one layer."
        )
    grids = [image.grid for image in images if isinstance(image, Volume)]
    for n, grid in enumerate(grids[1:], start=2):
        if not same_grid(grids[0], grid):
            raise ImageError(
                f"expected time points on one grid, but number {n} does not lie on that of the "
                f"first: {off_words(grids[0], grid)}; resample it to the first."
            )


# -------------------------------------------------------------------------------------- writing


def write_series(  # noqa: PLR0913 - as delivery.write()
    series: SeriesExplanation,
    directory: str | Path,
    *,
    volumes: Sequence[Volume] = (),
    formats: str | Sequence[str] = ("nifti", "png"),
    overwrite: bool = False,
    identified: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a series' explanations, one sub-folder per time point, all files or none.

    All are drawn on one colour scale. series.json holds the records; series.png, with png among the
    `formats`, shows the time points side by side. `volumes`: the scans, in the same order. The rest
    as write().

    Raises:
        UsageError, ResourceError: as write().
    """
    folder = Path(directory)
    if volumes and len(volumes) != len(series.maps):
        raise UsageError(f"expected {len(series.maps)} scans, got {len(volumes)}.")
    wished = delivery.check_formats(formats, volumes[0] if volumes else None)
    if not (overwrite and (folder / INDEX).is_file()):
        delivery.check_output(folder, overwrite=overwrite)
    bundles = _bundles(series, volumes, identified=identified)
    records: list[dict[str, Any]] = []
    with delivery.staged(folder) as partial:
        for n, bundle in enumerate(bundles):
            progress(Step(n, len(bundles), f"writing time point {n + 1}"))
            name = f"time_{n + 1:0{len(str(len(bundles)))}d}"
            if bundle is None:
                records.append({"folder": None, "why": series.why[n]})
                continue
            (partial / name).mkdir()
            records.append({"folder": name, **_fill(partial / name, bundle, wished)})
        if "png" in wished:
            from med_gradcam.formats import _strip

            _strip.save(bundles, partial / "series.png")
        index = {"format": "med-gradcam-series/1", "leading": series.leading + 1, "times": records}
        (partial / INDEX).write_text(to_json(index), encoding="utf-8")
    return folder


def _bundles(
    series: SeriesExplanation, volumes: Sequence[Volume], *, identified: bool
) -> list[Bundle | None]:
    scale = series.scale
    made: list[Bundle | None] = []
    for n, e in enumerate(series.maps):
        if e is None:
            made.append(None)
            continue
        scan = taken_as(volumes[n], e.modality) if volumes else None
        drawn = draw(e).on_scale(scale)
        made.append(Bundle(e.replace(calibration=None), drawn, scan, identified))
    return made


def _fill(folder: Path, bundle: Bundle, formats: Sequence[str]) -> dict[str, Any]:
    """One time point's files; returns its record."""
    for name in formats:
        _plugins.load("formats", delivery.WRITERS[name]).save(bundle, folder)
    record = to_record(bundle.explanation, bundle.maps)
    (folder / "explanation.json").write_text(to_json(record), encoding="utf-8")
    return record


def as_text(series: SeriesExplanation) -> str:
    """The table for people: one line per time point."""
    rows: list[tuple[str, ...]] = [
        ("time", "target", "score", "reference", "for", "against", "residual", "layer")
    ]
    for n, e in enumerate(series.maps, start=1):
        if e is None:
            rows.append((str(n), f"- ({series.why[n - 1]})", *[""] * 6))
            continue
        sums = (e.sum_for, -e.sum_against) if e.signed else (None, None)
        numbers = [e.score, e.reference_score, *sums, e.residual]
        told = ["-" if v is None else f"{v:+.3f}" for v in numbers]
        rows.append((str(n), e.target.label, *told, e.layer))
    full = [row for row in rows if row[2]]
    widths = [max(len(row[n]) for row in full) for n in range(8)]
    lines = []
    for row in rows:
        words = [row[0].rjust(widths[0]), row[1].ljust(widths[1])]
        words += [c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(words).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def notes(series: SeriesExplanation) -> list[str]:
    """What must be said beside the table."""
    made = [e for e in series.maps if e is not None]
    chosen = f"class and layer are those of time point {series.leading + 1}, of the highest score"
    lines = [f"{chosen}; all maps on one scale"]
    values = {(e.reference.kind, e.reference.value) for e in made}
    compared = dict.fromkeys(e.reference.words for e in made)
    own = "each relative to its own reference" if len(values) > 1 else "all relative to the same"
    lines.append(f"{own}: {next(iter(compared))}" + " and so on" * (len(values) > 1))
    lines.append(f"cost {sum(e.cost_in_forwards for e in made) + len(series.maps):g} forwards")
    told = dict.fromkeys(note for e in made for note in (*e.warnings, *e.provenance.notes))
    return [*lines, *(f"note: {w}" for w in told)]
