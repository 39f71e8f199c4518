"""What do the single channels of a layer say: how much evidence has each, and where?

E_k(u), the evidence of channel k in cell u, is the term that the map adds up over k. So the nets of
all channels add up to the map's sum, and with the residual to the score's difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam import _plugins, gradient_free
from med_gradcam.capture import Capture
from med_gradcam.case import Case
from med_gradcam.errors import UsageError
from med_gradcam.explaining import explained
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import point_words, side_words
from med_gradcam.methods import Bound, Evidence
from med_gradcam.opening import check_one_layer, opened
from med_gradcam.summary import peaks
from med_gradcam.volume import Volume

MOST = 8  # channels that are listed
PLACES = 3  # strongest places of a channel, strongest scans of a cohort
FAINT = 0.05  # places with less than this share of the strongest one are not listed
MOST_PIECES = 32  # of the path from the reference, eight nodes each
Terms = torch.Tensor  # (C, i, j, k) float64


@dataclass(frozen=True, slots=True)
class Place:
    """A cell where a channel stands out: RAS+ mm, in words, and its signed evidence there."""

    ras_mm: tuple[float, float, float]
    words: str
    side: str
    evidence: float


@dataclass(frozen=True, slots=True)
class Channel:
    """One channel's evidence, in the target's unit.

    `net` = `sum_for` - `sum_against`; `share` of the score's difference from the reference (None
    without one); `places` strongest first, of either sign.
    """

    index: int
    net: float
    sum_for: float
    sum_against: float
    share: float | None
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Others:
    """All channels that are not listed, together: how many, and their evidence."""

    count: int
    net: float
    sum_for: float
    sum_against: float
    share: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Concepts:
    """The channels of a layer with the most net evidence, and the others together.

    `explanation` is the map that they add up to, with its score, reference, target and layer.
    """

    explanation: Explanation = field(repr=False)
    channels: tuple[Channel, ...]
    others: Others

    @property
    def net(self) -> float:
        """The net of all channels: the sum of the map."""
        return sum(c.net for c in self.channels) + self.others.net

    @property
    def residual(self) -> float | None:
        """Score - reference_score - net: what flows past the layer, and rounding.

        None where there is no reference.
        """
        e = self.explanation
        return None if e.reference_score is None else e.score - e.reference_score - self.net


@dataclass(frozen=True, slots=True)
class Sighting:
    """A channel in one scan of a list: which scan, the net there, the strongest place."""

    scan: int
    net: float
    place: Place | None


@dataclass(frozen=True, slots=True)
class CohortChannel:
    """A channel over several scans: mean net, mean size of it, where it is strongest."""

    index: int
    mean_net: float
    mean_size: float
    scans: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True)
class CohortConcepts:
    """The channels of a layer with the most evidence over several scans, largest first.

    `nets` holds the net of all channels for each scan (scans, C).
    """

    layer: str
    target: str
    unit: str
    method: str
    scores: tuple[float, ...]
    channels: tuple[CohortChannel, ...]
    nets: tuple[tuple[float, ...], ...] = field(repr=False)


def concepts(
    image: object,
    model: object,
    *,
    target: object = "auto",
    layer: str = "auto",
    method: str = "secant",
    most: int = MOST,
    **settings: Any,
) -> Concepts:
    """The `most` channels of one layer by the size of their net evidence for one scan.

    `method`: "secant", "integrated", "hirescam" or "gradcam", whose maps are sums over channels;
    only the first two have a reference, so only with them the rows add up to the score's
    difference. Further settings are those of explain(). The layer "@input" gives the channels of
    the scan itself, such as the sequences of an MR study.

    Raises:
        UsageError: another method, several layers, `most` below 1.
        MedGradcamError: as explain().
    """
    if most < 1:
        raise UsageError(f"expected at least one channel to list, got {most}.")
    given = {"target": target, "layer": layer, "method": method, **settings}
    explanation, terms = _terms(image, model, given)
    nets, up, down = _sums(terms)
    order = np.argsort(-np.abs(nets), kind="stable")
    share = _Share(explanation)
    listed = [
        Channel(
            int(k),
            float(nets[k]),
            float(up[k]),
            float(down[k]),
            share.of(float(nets[k])),
            _places(terms[k].cpu().numpy(), explanation),
        )
        for k in order[:most]
    ]
    rest = order[most:]
    net = float(nets[rest].sum())
    others = Others(len(rest), net, float(up[rest].sum()), float(down[rest].sum()), share.of(net))
    return Concepts(explanation, tuple(listed), others)


def concepts_of(
    images: Sequence[object],
    model: object,
    *,
    target: object = "auto",
    layer: str = "auto",
    method: str = "secant",
    most: int = MOST,
    **settings: Any,
) -> CohortConcepts:
    """The `most` channels with the largest mean size of net evidence over several scans.

    Each with the three scans where it is strongest. Layer and target are chosen on the first scan
    where they are "auto", and kept; further settings are those of concepts().

    Raises:
        UsageError: no list of scans; otherwise as concepts().
    """
    if isinstance(images, (str, Volume, torch.Tensor)) or not hasattr(images, "__len__"):
        raise UsageError(f"expected a list of scans, got {type(images).__name__}.")
    if not len(images) or most < 1:
        raise UsageError(f"expected at least one scan and one channel, got {len(images)}, {most}.")
    given = {"target": target, "layer": layer, "method": method, **settings}
    found: list[tuple[Explanation, npt.NDArray[np.float64], list[Place | None]]] = []
    for image in images:
        explanation, terms = _terms(image, model, given)
        found.append((explanation, _sums(terms)[0], _strongest(terms, explanation)))
        if len(found) == 1:
            given["layer"] = explanation.layer
            if target == "auto" and explanation.target.kind in ("class", "regression"):
                given["target"] = explanation.target
    first = found[0][0]
    nets = np.stack([row for _, row, _ in found])
    size = np.abs(nets).mean(0)
    made = []
    for k in np.argsort(-size, kind="stable")[:most].tolist():
        scans = np.argsort(-np.abs(nets[:, k]), kind="stable")[:PLACES].tolist()
        seen = tuple(Sighting(n, float(nets[n, k]), found[n][2][k]) for n in scans)
        made.append(CohortChannel(k, float(nets[:, k].mean()), float(size[k]), seen))
    return CohortConcepts(
        first.layer,
        first.target.label,
        first.unit,
        first.method,
        tuple(e.score for e, _, _ in found),
        tuple(made),
        tuple(tuple(row) for row in nets.tolist()),
    )


# ------------------------------------------------------------------------ evidence per channel


class _Watched:
    """A method that also keeps what it was asked about, by layer."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.seen: dict[str, tuple[Capture, Bound]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def evidence(self, capture: Capture, bound: Bound) -> Evidence:
        """The method's own evidence."""
        self.seen[capture.layer] = capture, bound
        found: Evidence = self.method.evidence(capture, bound)
        return found


def _terms(image: object, model: object, settings: dict[str, Any]) -> tuple[Explanation, Terms]:
    """The explanation, and its evidence per channel."""
    method = settings["method"]
    _plugins.load("methods", method)  # refuses unknown names
    if method not in _TERMS:
        raise UsageError(
            f"expected a method whose map is a sum over channels ({', '.join(sorted(_TERMS))}), "
            f"got {method!r}."
        )
    with opened(image, model, settings) as case:
        gradient_free.check_gradient(case.model.net, "concepts")
        check_one_layer(case, "concepts")
        explanation, seen = _watched(case)
        if explanation.method != method:  # an operation without a rule: another took over
            case.begin(replace(case.request, method=explanation.method, layer=explanation.layer))
            seen = _watched(case)[1]
        return explanation, _TERMS[explanation.method](*seen[explanation.layer])


def _watched(case: Case) -> tuple[Explanation, dict[str, tuple[Capture, Bound]]]:
    watched = _Watched(case.method)
    case.method = watched
    return explained(case), watched.seen


def _secant(capture: Capture, bound: Bound) -> Terms:
    """Change of the activation from the reference, times the multipliers."""
    del bound
    return _change(capture) * capture.sensitivity().double()


def _hirescam(capture: Capture, bound: Bound) -> Terms:
    del bound
    return capture.activation.double() * capture.gradient().double()


def _gradcam(capture: Capture, bound: Bound) -> Terms:
    del bound
    weights = capture.gradient().double().mean(dim=(1, 2, 3), keepdim=True)
    return weights * capture.activation.double()


def _integrated(capture: Capture, bound: Bound) -> Terms:
    """Change of the activation times its mean gradient on the straight path from the reference.

    The path is cut into ever more equal pieces of eight Gauss-Legendre nodes, until the sum meets
    the bound.
    """
    base, change = capture.baseline, _change(capture)
    assert base is not None  # noqa: S101 - _change has looked
    start = float(capture.scores(base[None])[0])
    at, weight = np.polynomial.legendre.leggauss(8)
    allowed = bound.of(capture.score - start)
    pieces = 1
    while True:
        mean = torch.zeros_like(change)
        for piece in range(pieces):
            for x, w in zip(at, weight, strict=True):
                t = (piece + (float(x) + 1) / 2) / pieces
                point = base + t * (capture.activation - base)
                mean += float(w) / 2 / pieces * capture.gradients(point[None])[0].double()
        terms = change * mean
        missed = abs(capture.score - start - float(terms.sum()))
        if missed <= allowed or pieces == MOST_PIECES:
            return terms
        pieces *= 2


def _change(capture: Capture) -> Terms:
    if capture.baseline is None:
        raise UsageError("expected a reference input for evidence per channel, got none.")
    return capture.activation.double() - capture.baseline.double()


_TERMS = {
    "secant": _secant,
    "integrated": _integrated,
    "hirescam": _hirescam,
    "gradcam": _gradcam,
}


# --------------------------------------------------------------------------- sums and places


@dataclass(frozen=True, slots=True)
class _Share:
    """How large evidence is beside the score's difference from the reference."""

    explanation: Explanation

    def of(self, net: float) -> float | None:
        against = self.explanation.reference_score
        difference = 0.0 if against is None else self.explanation.score - against
        return net / difference if difference else None


Numbers = npt.NDArray[np.float64]


def _sums(terms: Terms) -> tuple[Numbers, Numbers, Numbers]:
    """Net, for and against of each channel (C,)."""
    flat = terms.flatten(1)
    up, down = flat.clamp(min=0).sum(1), (-flat).clamp(min=0).sum(1)
    return (up - down).cpu().numpy(), up.cpu().numpy(), down.cpu().numpy()


def _places(values: Numbers, explanation: Explanation) -> tuple[Place, ...]:
    """The strongest cells of either sign that are local maxima, and whose centre is in the scan."""
    found = sorted(
        peaks(explanation.replace(evidence=values), most=PLACES), key=lambda peak: -peak.evidence
    )
    return tuple(
        Place(p.ras_mm, p.words, p.side, p.evidence if p.polarity == "for" else -p.evidence)
        for p in found[:PLACES]
        if p.evidence >= FAINT * found[0].evidence
    )


def _strongest(terms: Terms, explanation: Explanation) -> list[Place | None]:
    """Each channel's strongest cell whose centre is in the scan; None for a silent channel."""
    grid, image = explanation.grid, explanation.image
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)
    voxels = image.index_ijk(grid.world_ras(index))
    last = np.array(image.shape) - 0.5
    inside = ((voxels >= -0.5) & (voxels <= last)).all(axis=-1).ravel()
    flat = terms.flatten(1).cpu().numpy()
    best = np.where(inside, np.abs(flat), 0.0).argmax(1)
    made: list[Place | None] = []
    for row, n in zip(flat, best.tolist(), strict=True):
        worth = float(row[n]) if inside[n] else 0.0
        if worth == 0:
            made.append(None)
            continue
        ras = grid.world_ras(np.unravel_index(n, grid.shape))
        x, y, z = ras.tolist()
        made.append(Place((x, y, z), point_words(ras), side_words(ras), worth))
    return made
