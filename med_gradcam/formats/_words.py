"""Which words stand on a picture or a page: score, reference, sums, cells, scale?

Only values of the explanation and fixed words; whatever came from a file goes through `clean`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from med_gradcam.calibration import ALL_LAYERS, Calibration
from med_gradcam.explanation import Explanation
from med_gradcam.maps import Side
from med_gradcam.summary import NO_SIGN, status_words
from med_gradcam.target import Box, Target

RESEARCH_USE = "Research use. Not for diagnostic use."
# What a colour means, on its bar.
MEANS: dict[Side, str] = {
    "for": "raises the model's score",
    "against": "lowers the model's score",
    "strength": "map strength (no sign)",
}
_NOTHING: dict[Side | None, str] = {
    None: "no evidence",
    "for": "no evidence for",
    "against": "no evidence against",
    "strength": "nothing",
}
BOX_WORDS = "thin frame: the part of the scan that was explained"
_LABEL_LIMIT = 48
_SURE, _TINY, _SMALL = 0.9999, 1e-6, 1e-3
# A residual below this is rounding.
_NIL = 0.0001
_HUNDRED, _ONE, _THOUSANDTH = 100.0, 1.0, 1e-3


def tied(text: str) -> str:
    """The text with no-break spaces: it stays on one line."""
    return text.replace(" ", "\u00a0")


def clean(text: str, limit: int = _LABEL_LIMIT) -> str:
    """Text from a file as plain printable ASCII on one line, at most `limit` characters."""
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"\s+", " ", plain).strip()
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in plain)
    return plain if len(plain) <= limit else plain[: limit - 3].rstrip() + "..."


def number(value: float) -> str:
    """A value for people: three figures or so, no exponent where it can be helped."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= _HUNDRED:
        return f"{value:.0f}"
    if size >= _ONE:
        return f"{value:.1f}" if size >= _HUNDRED / 10 else f"{value:.2f}"
    return f"{value:#.2g}" if size >= _THOUSANDTH else f"{value:.1e}"


def _probability(value: float) -> str:
    if value > _SURE:
        return f"above {_SURE}"
    if value < _TINY:
        return "below 0.000001"
    return f"{value:.6f}".rstrip("0") if value < _SMALL else f"{value:.3f}"


def score_at(target: Target, score: float) -> str:
    """A score of the model: "6.79 log-odds (probability 0.999)", or "0.23" of a regression."""
    if target.unit != "log-odds":
        return number(score)
    probability = target.probability(score)
    words = f"{number(score)} log-odds"
    return words if probability is None else f"{words} (probability {_probability(probability)})"


def score(explanation: Explanation) -> str:
    """The model's score for this scan."""
    return f"Model score {score_at(explanation.target, explanation.score)}"


def relative(explanation: Explanation) -> str:
    """What the map is relative to, and what the model says there."""
    if explanation.reference_score is None:
        return "not relative to a reference (this method has none)"
    there = score_at(explanation.target, explanation.reference_score)
    return f"relative to {clean(explanation.reference.words, 80)}, model score there {there}"


def sums(explanation: Explanation) -> str:
    """For, against, net, and what is missing; or that the map has no sign."""
    if not explanation.signed:
        return f"This map, in {explanation.unit}, has {NO_SIGN}"
    up, down = explanation.sum_for, explanation.sum_against
    words = f"Evidence for {number(up)}, against {number(down)}, net {number(up - down)}"
    if explanation.residual is None or explanation.reference_score is None:
        return f"{words} {explanation.unit}"
    change = explanation.score - explanation.reference_score
    unit = " log-odds" if explanation.unit == "log-odds" else ""
    rest = number(explanation.residual)
    residual = f"below {_NIL}" if abs(explanation.residual) < _NIL else rest
    return f"{words} of a score difference of {number(change)}{unit}; residual {residual}"


def status(explanation: Explanation) -> str:
    """Whether the map adds up."""
    words = status_words(explanation)
    if explanation.status == "not_a_cut" and explanation.bypassed is not None:
        words += f" ({explanation.bypassed:.0%})"
    return words[0].upper() + words[1:]


def method(explanation: Explanation) -> str:
    """Method and layer."""
    return f"Method {clean(explanation.method, 24)} at layer {clean(explanation.layer, 60)}"


def cells(explanation: Explanation) -> str:
    """Cell size, receptive field and what that means for small findings, mm."""
    size = " x ".join(f"{mm:.1f}" for mm in explanation.cell_mm)
    sees = " x ".join(f"{mm:.0f}" for mm in explanation.receptive_field_mm)
    return (
        f"cells {size} mm ({explanation.cells.how} positions), each sees {sees} mm; "
        f"smallest localisable finding {explanation.smallest_localisable_mm:.0f} mm"
    )


def scale(calibration: Calibration) -> str:
    """Where the colour scale comes from."""
    if calibration.of_case and calibration.layer == ALL_LAYERS:
        return "colour scale: this case only, the same for all layers"
    if calibration.of_case and calibration.layer.startswith("all "):  # such as all time points
        return f"colour scale: this case only, the same for {calibration.layer}"
    if calibration.of_case:
        return "colour scale: this case only (model not calibrated)"
    return f"colour scale: fixed for this model (learnt from {calibration.volumes} scans)"


def frames(boxes: Sequence[Box]) -> list[str]:
    """What the frames of a detector's boxes are, the explained one first; nothing without any."""
    if not boxes:
        return []
    first, others = boxes[0], len(boxes) - 1
    name = f"box {first.number}" if first.number else "box"
    said = [f"bright green frame: the explained {name} ({clean(first.label, 24)})"]
    if others:
        said.append(f"dark green frames: the detector's {others} other box{'es' * (others > 1)}")
    return said


def nothing(calibration: Calibration, side: Side | None = None) -> str:
    """Said where nothing is coloured, of one side or (None) of both polarities."""
    if calibration.of_case:
        return f"{_NOTHING[side]} above the floor of this case's colour scale"
    return f"{_NOTHING[side]} above the model's noise floor"
