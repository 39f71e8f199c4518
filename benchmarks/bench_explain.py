"""What does explain() cost as shipped, in forwards and in time beside a plain prediction?

MONAI's networks in 3D (untrained, fixed seed, 14 outputs), 64^3, the default method `secant`:

    found         --layer auto: candidates tested with six balls
    named         the layer named, as after a first search
    known         one more scan of many (explain_many): layer named, reference known
    quick         --quick: the coarsest admissible layer, untested
    found, fast   --layer auto with --fast, after the first scan
    known, fast   as `known`, with --fast

Forwards are those that the result reports; seconds are medians over turns in which all of them and
plain inference run one after the other, so that a busy machine slows them alike. Run it from the
repository: python -m benchmarks.bench_explain. Writes docs/benchmarks.md and
benchmarks/results/explain.json; with --print it only prints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import med_gradcam as mg
from benchmarks.peers.measure import machine, scan
from benchmarks.peers.nets import NETS, TARGET, Net
from benchmarks.peers.page import put, table
from med_gradcam.errors import MedGradcamError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "explain.json"
SIDE, ROUNDS = 64, 5

Spent = Callable[[], tuple[float, mg.Explanation]]  # seconds, and what was made


def variants(net: Net, built: torch.nn.Module) -> dict[str, Spent]:
    """What takes turns."""
    x = scan((SIDE,) * 3)
    given = {"target": TARGET, "reference": "zero"}

    def one(**more: Any) -> Spent:
        return lambda: _timed(lambda: mg.explain(x, built, **given, **more))

    def second(**more: Any) -> Spent:
        """One more scan: three less one, halved."""
        scans = [x * share for share in (1.0, 0.9, 0.8)]

        def many(count: int) -> tuple[float, Any]:
            return _timed(
                lambda: mg.explain_many(scans[:count], built, layer=net.last, **given, **more)
            )

        def spent() -> tuple[float, mg.Explanation]:
            (alone, _), (three, made) = many(1), many(3)
            return (three - alone) / 2, made[2]

        return spent

    return {
        "found": one(),
        "named": one(layer=net.last),
        "known": second(),
        "quick": one(quick=True),
        "found, fast": one(fast=True),
        "known, fast": second(fast=True),
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = call()
    return time.perf_counter() - start, made


def measured(net: Net, rounds: int) -> dict[str, Any]:
    """Forwards and seconds of each variant of one network, or why it was refused."""
    built = net.built()
    x = scan((SIDE,) * 3)

    def plain() -> None:
        with torch.inference_mode():
            built(x)

    plain()
    calls, found, errors = variants(net, built), {}, {}
    if not rounds:
        calls = {name: call for name, call in calls.items() if "fast" not in name}
    for name, call in list(calls.items()):
        try:
            _, found[name] = call()  # warm: what is looked up once per network is known then
        except MedGradcamError as error:
            errors[name] = f"{type(error).__name__}: {error}"
            del calls[name]
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *calls)}
    for _ in range(rounds):
        seconds["plain"].append(_timed(plain)[0])
        for name, call in calls.items():
            spent, found[name] = call()
            seconds[name].append(spent)
    rows: dict[str, Any] = {"plain_s": median(seconds["plain"]) if rounds else None}
    for name in calls:
        rows[name] = {"forwards": found[name].cost_in_forwards, "layer": found[name].layer}
        if rounds:
            ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            rows[name]["ratio"] = median(ratios)
    return rows | {name: {"error": text} for name, text in errors.items()}


def text(results: dict[str, Any], about: dict[str, Any], rounds: int) -> str:
    """The table as Markdown."""
    names = ["found", "named", "known", "quick"]
    names += ["found, fast", "known, fast"] if rounds else []
    rows = []
    for net, row in results.items():
        cells = []
        for name in names:
            cell = row[name]
            if "error" in cell:
                cells.append("refused")
                continue
            time_ = f" (x{cell['ratio']:.1f})" if rounds else ""
            cells.append(f"{cell['forwards']:.1f}{time_}")
        plain = [f"{row['plain_s']:.2f} s"] if rounds else []
        rows.append([net, *plain, *cells, row["found"].get("layer", "-")])
    head = ["network", *(["plain"] if rounds else []), *names, "layer found"]
    what = f"{rounds} rounds, forwards (time, ratio to plain inference)" if rounds else "forwards"
    line = (
        f"{about['cpu']}, {about['threads']} threads, torch {torch.__version__}; input {SIDE}^3, "
        f"{what}."
    )
    return f"{line}\n\n{table(head, rows)}"


def main() -> None:
    """Measure, then write or print."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), metavar="NET")
    options.add_argument("--rounds", type=int, default=ROUNDS, help="0: forwards only")
    options.add_argument("--print", action="store_true", help="print the table, write nothing")
    given = options.parse_args()
    about = machine(torch.get_num_threads())
    results = {}
    for name in given.nets:
        print(f"{name} ...", flush=True)
        results[name] = measured(NETS[name], given.rounds)
    if given.print:
        print(text(results, about, given.rounds))
        return
    RESULTS.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n", "utf-8")
    put(PAGE, "explain", text(results, about, given.rounds))


if __name__ == "__main__":
    main()
