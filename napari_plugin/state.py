"""What does the dock show? One frozen value, and functions that make the next. No Qt, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry, point_words, side_words
from med_gradcam.progress import Step
from med_gradcam.summary import NO_SIGN, status_words
from med_gradcam.volume import Volume
from napari_plugin.layers import oblique_words, short

Phase = Literal["idle", "opening", "explaining"]
Rows = tuple[tuple[str, str], ...]
_MAX_WORDS = 200
DISCLAIMER = "Research use, not for diagnosis."
READY = "Ready to explain."
NOTHING = "Nothing stands out: no part of the scan reaches the floor of the colour scale."


@dataclass(frozen=True, slots=True)
class DockState:
    """Everything the dock shows.

    `generation` counts the runs: news of an earlier run is stale and dropped. `scan` and `model`
    are words for people, empty while there is none; `rows` is the result table; `error` is the one
    red sentence, `details` what a developer wants to see of it.
    """

    phase: Phase = "idle"
    generation: int = 0
    scan: str = ""
    oblique: str = ""
    model: str = ""
    status: str = "Choose a scan and a model, then explain."
    step: Step | None = None
    error: str = ""
    details: str = ""
    rows: Rows = ()
    warnings: tuple[str, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self.phase != "idle"

    @property
    def can_explain(self) -> bool:
        """Whether Explain would do something."""
        return bool(self.scan and self.model) and not self.busy

    @property
    def missing(self) -> str:
        """What has to come before Explain, for its tooltip; empty when nothing is missing."""
        if self.busy:
            return "A run is under way."
        needs = {"a scan": self.scan, "a model": self.model}
        lacks = [what for what, there in needs.items() if not there]
        return f"Choose {' and '.join(lacks)}, then explain." if lacks else ""


def started(state: DockState, phase: Phase, status: str) -> DockState:
    """A run begins: a new generation, no old error."""
    return replace(
        state,
        phase=phase,
        generation=state.generation + 1,
        status=status,
        step=None,
        error="",
        details="",
    )


def stepped(state: DockState, step: Step) -> DockState:
    """The run says how far it is."""
    return replace(state, step=step, status=step.what)


def stopped(state: DockState, status: str) -> DockState:
    """The run has ended, or nobody waits for it any more; whatever it still sends is stale."""
    return replace(state, phase="idle", generation=state.generation + 1, status=status, step=None)


def failed(state: DockState, error: str, details: str = "") -> DockState:
    """The run ended with an error."""
    return replace(stopped(state, ""), error=error, details=details)


def with_scan(state: DockState, volume: Volume | None) -> DockState:
    """Another scan, or none, is the one to explain; the result of the one before goes."""
    words = scan_words(volume) if volume else ""
    tilt = oblique_words(volume.grid) if volume else ""
    return told(replace(state, scan=words, oblique=tilt, rows=(), warnings=()))


def with_model(state: DockState, name: str) -> DockState:
    """Another model, or none, is the one to explain."""
    return told(replace(state, model=short(name)))


def told(state: DockState) -> DockState:
    """What the user can do next; a run that is under way has its own words."""
    if state.busy:
        return state
    return replace(state, status=state.missing or READY)


def said(state: DockState, status: str) -> DockState:
    """The dock has something to say."""
    return replace(state, status=status)


def warned(state: DockState, warning: str) -> DockState:
    """One more warning beside the result."""
    return replace(state, warnings=(*state.warnings, warning))


def with_result(state: DockState, explanation: Explanation, scale: str, peak: str) -> DockState:
    """The run ended well; `scale` says where the colours come from, `peak` where to look."""
    strongest = "Strongest evidence" if explanation.signed else "The map is strongest"
    return replace(
        stopped(state, f"{strongest} at {peak}." if peak else NOTHING),
        rows=result_rows(explanation, scale),
        warnings=tuple(explanation.warnings),
    )


def scan_words(volume: Volume) -> str:
    """A scan in a few words: "CT, 512 x 512 x 300 voxels of 0.7 x 0.7 x 1.0 mm"."""
    shape = " x ".join(str(n) for n in volume.grid.shape)
    size = " x ".join(f"{mm:.1f}" for mm in volume.grid.spacing_mm)
    channels = volume.array.shape[0]
    extra = f", {channels} channels" if channels > 1 else ""
    return f"{short(volume.modality or 'Scan')}, {shape} voxels of {size} mm{extra}"


def where_words(world_ras: object) -> str:
    """A point with letters and side: "R 34 P 12 S 88 mm, patient's right"."""
    return f"{point_words(world_ras)}, {side_words(world_ras)}"  # type: ignore[arg-type]


def point_text(world_ras: tuple[float, float, float]) -> str:
    """A point as the engine and the command line read it: "ras:34.0,-12.0,88.0"."""
    return "ras:" + ",".join(f"{value:.1f}" for value in world_ras)


def probability_words(probability: float | None) -> str:
    """A probability with as many digits as mean something."""
    if probability is None:
        return "none: this score has no probability"
    if probability > 0.9999:
        return "above 0.9999"
    if probability < 0.0001:
        return "below 0.0001"
    return f"{probability:.4f}"


def number(value: float) -> str:
    """A score with its sign, three decimals below 1 and two above."""
    return f"{value:+.3f}" if abs(value) < 1 else f"{value:+.2f}"


def _residual_words(explanation: Explanation) -> str:
    if explanation.residual is None:
        return status_words(explanation)
    return f"{explanation.residual:+.3f} ({status_words(explanation)})"


def _reference_words(explanation: Explanation) -> str:
    words = short(explanation.reference.words, _MAX_WORDS)
    if explanation.reference_score is None:
        return words
    return f"{words}: {number(explanation.reference_score)} {explanation.target.unit}"


def _cells_words(grid: Geometry) -> str:
    size = " x ".join(f"{mm:.1f}" for mm in grid.spacing_mm)
    return f"{size} mm ({', '.join(grid.axcodes)})"


def _evidence_rows(explanation: Explanation) -> Rows:
    """For, against and net; or that the map has no sign."""
    unit, net = explanation.unit, explanation.sum_for - explanation.sum_against
    if not explanation.signed:
        return (("Map", f"in {unit}, with {NO_SIGN}"),)
    return (
        ("Raises it (for)", f"{number(explanation.sum_for)} {unit}"),
        ("Lowers it (against)", f"{number(-explanation.sum_against)} {unit}"),
        ("Net evidence", f"{number(net)} {unit}"),
    )


def result_rows(explanation: Explanation, scale: str) -> Rows:
    """The result table: what was found, how sure, relative to what, and how it adds up."""
    return (
        ("Finding", short(explanation.target.label)),
        ("Model's score", f"{number(explanation.score)} {explanation.target.unit}"),
        ("Probability", probability_words(explanation.probability)),
        ("Relative to", _reference_words(explanation)),
        *_evidence_rows(explanation),
        ("Residual", _residual_words(explanation)),
        ("Layer", f"{short(explanation.layer)}, {explanation.method}"),
        ("Cells", _cells_words(explanation.grid)),
        ("Smallest visible", f"{explanation.smallest_localisable_mm:.0f} mm"),
        ("Colour scale", scale),
    )
