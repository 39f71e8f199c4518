"""Which default is better, `secant` or `integrated`: on planted truth and on a real network?

For every scan of the samples with a finding, and where MED_GRADCAM_REAL_DATA is set for the three
lesions of real_ct.py. At every candidate layer both methods meet the same balls, picked from the
mean of both methods' maps and filled with reference tissue, two textures each:
    slope, r   of what the map says about the balls on what the score really loses
    near/true  net evidence at the finding over its true effect, for each finding
    residual   what the map misses of score - reference score, log-odds
    forwards   price at this layer, the choice of a layer not counted
    alike      r between the two methods' evidence, cell by cell
Then the whole call, with the layer that each method takes for itself. Samples: near is the net
evidence within the finding's outer radius and one cell, true what the score loses when the
finding's voxels become those of the twin, which is the same scan without findings.
Run it from the repository: python -m benchmarks.compare_methods [--samples]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import med_gradcam as mg
from benchmarks import real_ct
from med_gradcam import reference, samples
from med_gradcam.metrics import causal
from med_gradcam.prepare import Prepared, prepare
from med_gradcam.summary import evidence_within

METHODS = ("secant", "integrated")
NETS = {"ct_nodule": "ct", "ct_nodule_instnorm": "ct", "mr_lesion": "mr"}
SEED = 0

Region = Callable[[mg.Explanation], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a scan whose effect is known: the voxels around it, its effect in log-odds."""

    kind: str
    around: Region
    true: float


@dataclass(frozen=True, slots=True)
class Case:
    """One scan with findings, and the network that is asked about it."""

    group: str
    name: str
    volume: mg.Volume
    model: mg.Model
    target: str
    at: str | None
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """What one method says at one layer of one case; `alike`: r between both methods' cells."""

    case: Case
    method: str
    layer: str
    slope: float | None
    r: float | None
    near: tuple[float, ...]
    residual: float
    forwards: float
    alike: float = float("nan")


# ---------------------------------------------------------------------------------- the cases


def sphere(ras_mm: Sequence[float], radius_mm: float) -> Region:
    """The voxels within a radius and one cell of a point."""

    def around(e: mg.Explanation) -> npt.NDArray[np.bool_]:
        index = np.moveaxis(np.indices(e.image.shape), 0, -1)
        offset = index @ e.image.affine[:3, :3].T + e.image.affine[:3, 3] - np.asarray(ras_mm)
        return np.asarray((offset**2).sum(-1) <= (radius_mm + max(e.cell_mm)) ** 2)

    return around


def sample_cases(net: str) -> Iterator[Case]:
    """The scans of the samples that hold findings, for one of the networks."""
    home = samples.folder()
    modality = NETS[net]
    model = mg.load_model(home / "nets" / net)
    target = "malignant" if modality == "ct" else "tumour"
    truth = json.loads((home / modality / "truth.json").read_text(encoding="utf-8"))
    for case in truth["cases"]:
        planted = case.get("findings", [])
        if not planted:
            continue
        volume = mg.read(home / modality / case["file"])
        twin = mg.read(home / modality / case["twin"])
        here = score_of(volume, model, target)
        lost = [here - score_of(one, model, target) for one in without_each(volume, twin, planted)]
        findings = tuple(
            Finding(one["kind"], sphere(one["ras_mm"], one["outer_radius_mm"]), effect)
            for one, effect in zip(planted, lost, strict=True)
        )
        yield Case(net, case["file"].split(".")[0], volume, model, target, None, findings)


def without_each(
    volume: mg.Volume, twin: mg.Volume, planted: Sequence[Mapping[str, Any]]
) -> Iterator[mg.Volume]:
    """The scan with one finding at a time as it is in the twin, which differs at findings only."""
    index = np.moveaxis(np.indices(volume.grid.shape), 0, -1)
    places = volume.grid.world_ras(index)
    away = [np.linalg.norm(places - np.asarray(one["ras_mm"]), axis=-1) for one in planted]
    nearest = np.argmin(away, axis=0)
    for n in range(len(planted)):
        own = (volume.array != twin.array) & (nearest == n)
        yield replace(volume, array=np.where(own, twin.array, volume.array))


def real_cases() -> Iterator[Case]:
    """The three lesions of real_ct.py."""
    volume, model = real_ct.scan_and_net()
    for lesion in real_ct.LESIONS:

        def around(e: mg.Explanation, lesion: str = lesion) -> npt.NDArray[np.bool_]:
            del e
            return real_ct.within(volume, lesion)

        true = real_ct.true_effect(volume, model, lesion)
        found = (Finding("lesion", around, true),)
        yield Case("real CT", lesion, volume, model, "nodule", real_ct.at(lesion), found)


def score_of(volume: mg.Volume, model: mg.Model, target: str) -> float:
    """The model's score of a scan."""
    e = mg.explain(volume, model, target=target, method="hirescam", layer=next(iter(model.aliases)))
    return e.score


# ------------------------------------------------------------------------------- measuring


def maps_of(case: Case) -> dict[str, list[mg.Explanation]]:
    """Each method's explanations at the layers that the model names, coarsest first."""
    return {
        method: sorted(
            (_explained(case, method, layer) for layer in case.model.aliases),
            key=lambda e: e.evidence.size,
        )
        for method in METHODS
    }


def _explained(case: Case, method: str, layer: str) -> mg.Explanation:
    return mg.explain(
        case.volume,
        case.model,
        target=case.target,
        at=case.at,
        method=method,
        layer=layer,
        seed=SEED,
    )


def tested(case: Case, found: Mapping[str, list[mg.Explanation]]) -> list[Row]:
    """All methods and layers of a case against the same balls."""
    prepared = prepare(case.volume, case.model, case.at)
    modality = case.volume.modality or case.model.input.modality
    background = reference.build("auto", prepared, modality, "")
    maps = {m: [candidate(e) for e in some] for m, some in found.items()}
    both = [one for some in maps.values() for one in some]
    radius = causal.radius_for(prepared.grid, maps[METHODS[0]][-1].grid)
    balls = causal.pick_regions(both, prepared.grid, radius, SEED)
    here, score = scores(case, prepared, found[METHODS[0]][0])
    without = causal.effects(prepared, background, balls, score, SEED)
    masks = [causal.ball(prepared.grid, one.centre, one.radius_mm) for one in balls]
    rows = []
    for method, some in found.items():
        for e, one in zip(some, maps[method], strict=True):
            says = [causal.ledger(one, prepared.grid, mask) for mask in masks]
            slope, r = causal.slope_and_r(says, [here - z for z in without])
            rows.append(replace(row(case, e, (slope, r)), alike=alike(found, e.layer)))
    return rows


def alike(found: Mapping[str, list[mg.Explanation]], layer: str) -> float:
    """How alike the two methods' maps of a layer are: r over the cells."""
    a, b = (next(e.evidence for e in found[m] if e.layer == layer).ravel() for m in METHODS)
    return float(np.corrcoef(a, b)[0, 1])


def candidate(e: mg.Explanation) -> causal.CandidateMap:
    """An explanation as the layer choice sees it."""
    return causal.CandidateMap(e.layer, e.evidence.astype(np.float64), e.grid)


def scores(
    case: Case, prepared: Prepared, e: mg.Explanation
) -> tuple[float, Callable[[npt.NDArray[np.float32]], float]]:
    """The scan's score and the function that scores another input."""

    def score(array: npt.NDArray[np.float32]) -> float:
        with torch.no_grad():
            return float(e.target(case.model.net(torch.from_numpy(array)[None]))[0])

    return score(prepared.network_input()), score


def row(case: Case, e: mg.Explanation, fitted: tuple[float | None, float | None]) -> Row:
    """One explanation beside the truth."""
    signed = mg.draw(e).signed
    near = tuple(evidence_within(signed, f.around(e)) for f in case.findings)
    return Row(case, e.method, e.layer, *fitted, near, e.residual or 0.0, e.cost_in_forwards)


def automatic(case: Case) -> list[Row]:
    """Each method with the layer that it takes for itself, and the slope there."""
    rows = []
    for method in METHODS:
        e = _explained(case, method, "auto")
        fitted = next(((t.slope, t.r) for t in e.trials if t.layer == e.layer), (None, None))
        rows.append(row(case, e, fitted))
    return rows


# ------------------------------------------------------------------------------- printing


def shares(row: Row) -> str:
    """The near/true of every finding."""
    return ", ".join(f"{n / f.true:.2f}" for n, f in zip(row.near, row.case.findings, strict=True))


def line(row: Row) -> str:
    """One row of a table, as Markdown."""
    names = {path: alias for alias, path in row.case.model.aliases.items()}
    slope = "-" if row.slope is None else f"{row.slope:.2f}"
    r = "-" if row.r is None else f"{row.r:.2f}"
    return (
        f"| {row.case.group} {row.case.name} | {row.method} | {names[row.layer]} | {slope} | {r} | "
        f"{shares(row)} | {row.residual:.1g} | {row.forwards:.1f} |"
    )


HEAD = (
    "| case | method | layer | slope | r | near / true | residual | forwards |\n"
    "|---|---|---|---|---|---|---|---|"
)


def summary(rows: Sequence[Row], *, own: bool) -> Iterator[str]:
    """Means over a network's scans, `secant | integrated`: per layer, or with each one's `own`."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for one in rows:
        names = {path: alias for alias, path in one.case.model.aliases.items()}
        key = one.case.group, "its own" if own else names[one.layer]
        groups.setdefault(key, {}).setdefault(one.method, []).append(one)
    for (group, layer), found in sorted(groups.items()):
        both = zip(*(means(found[method]) for method in METHODS), strict=True)
        same = "-" if own else f"{np.mean([one.alike for one in found[METHODS[0]]]):.2f}"
        yield f"| {group} | {layer} | " + " | ".join(f"{a}, {b}" for a, b in both) + f" | {same} |"


def means(rows: Sequence[Row]) -> list[str]:
    """The columns of a summary."""
    slopes = [abs(r.slope - 1) for r in rows if r.slope is not None]
    found = [(n, f.true) for r in rows for n, f in zip(r.near, r.case.findings, strict=True)]
    return [
        f"{np.mean(slopes):.2f}",
        f"{np.mean([r.r for r in rows if r.r is not None]):.2f}",
        f"{np.mean([abs(n / true - 1) for n, true in found]):.2f}",
        f"{np.mean([abs(n - true) for n, true in found]):.2f}",
        f"{max(abs(r.residual) for r in rows):.1g}",
        f"{np.mean([r.forwards for r in rows]):.1f}",
    ]


SUMMARY = (
    "| network | layer | size of slope - 1 | r | size of near / true - 1 | error, log-odds | "
    "largest residual | forwards | maps alike: r |\n|---|---|---|---|---|---|---|---|---|"
)


def planted(own: Sequence[Row]) -> Iterator[str]:
    """Every finding: its true effect and what each method's whole call says."""
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for one in own:
        by_case.setdefault((one.case.group, one.case.name), {})[one.method] = one
    yield "| scan | finding | true effect | " + " | ".join(METHODS) + " |"
    yield "|---|---|---|" + "---|" * len(METHODS)
    for (group, name), rows in by_case.items():
        case = rows[METHODS[0]].case
        names = {path: alias for alias, path in case.model.aliases.items()}
        for n, finding in enumerate(case.findings):
            said = [f"{r.near[n]:+.2f} ({names[r.layer]})" for r in rows.values()]
            yield (
                f"| {group} `{name}` | {finding.kind} | {finding.true:+.2f} | "
                + " | ".join(said)
                + " |"
            )


def main(arguments: Sequence[str]) -> None:
    """Print the tables as Markdown."""
    cases: list[Any] = [lambda net=net: sample_cases(net) for net in NETS]
    if os.environ.get("MED_GRADCAM_REAL_DATA") and "--samples" not in arguments:
        cases.append(real_cases)
    same, own = [], []
    print(HEAD)
    for some in cases:
        for case in some():
            same += tested(case, maps_of(case))
            own += automatic(case)
            for one in (*same[-2 * len(case.model.aliases) :], *own[-2:]):
                print(line(one), flush=True)
    print(f"\nMeans over the scans, secant, integrated:\n\n{SUMMARY}")
    print("\n".join([*summary(same, own=False), *summary(own, own=True)]))
    print("\nNet evidence at each finding, each method with its own layer:\n")
    print("\n".join(planted(own)))


if __name__ == "__main__":
    main(sys.argv[1:])
