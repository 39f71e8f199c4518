"""What does a Grad-CAM cost beside plain inference, ours and that of five other tools?

Needs the other tools' environment: `benchmarks/peers/setup.sh`, then
`.venv-peers/bin/python -m benchmarks.bench_peers`. Writes the table in docs/benchmarks.md and
benchmarks/results/peers.json; with --print it only prints the table. Each network is written as
soon as it is measured; with --nets or --variants the figures that were measured before on the same
machine, with the same versions and settings, stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """The result of one figure from a fresh process, or its error."""
    from benchmarks.peers.measure import MEMORY_ENVIRONMENT

    memory = MEMORY_ENVIRONMENT if arguments[0] == "memory" else {}
    run = [sys.executable, "-m", "benchmarks.bench_peers", "--one", *arguments]
    done = subprocess.run(
        run, check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **memory}
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(kind: str, net: str, side: str, threads: str, *rest: str) -> dict[str, Any]:
    """A figure, in this process."""
    import torch

    from benchmarks.peers import measure
    from benchmarks.peers.nets import NETS

    torch.set_num_threads(int(threads))
    if kind == "time":
        return measure.times(NETS[net], rest[1:], int(side), int(rest[0]))
    return {"extra_mb": measure.memory(NETS[net], rest[0], int(side))}


def column(net: str, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one network at one size: variant -> figures."""
    from benchmarks.peers.measure import summary
    from benchmarks.peers.variants import PLAIN, VARIANTS

    names = [n for n in options.variants if net not in VARIANTS[n].not_for]
    shared = (net, str(side), str(options.threads))
    timed = own_process(["time", *shared, str(options.rounds), *names])
    if "error" in timed:
        return {n: {"error": timed["error"]} for n in names}
    found = summary(timed["seconds"], timed["errors"])
    if options.memory_runs == 0 or not Path("/proc/self/clear_refs").exists():
        return found
    for name in dict.fromkeys((PLAIN, *names)):
        runs = [own_process(["memory", *shared, name]) for _ in range(options.memory_runs)]
        failed = next((run["error"] for run in runs if "error" in run), None)
        if failed is None:
            found[name]["extra_mb"] = median(run["extra_mb"] for run in runs)
        elif "error" not in found[name]:
            found[name]["memory_error"] = failed
    return found


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    from benchmarks.peers.adapters import versions
    from benchmarks.peers.measure import machine
    from benchmarks.peers.nets import NETS

    found: dict[str, Any] = {
        "machine": machine(options.threads),
        "versions": versions(),
        "settings": {
            "rounds": options.rounds,
            "memory_runs": options.memory_runs,
            "date": datetime.now(UTC).date().isoformat(),
        },
    }
    known = _known(found)
    for net in options.nets:
        for side in options.sides or [NETS[net].side]:
            print(f"{net} at {side}^3 ...", file=sys.stderr, flush=True)
            name = f"{net} @ {side}"
            known[name] = {**known.get(name, {}), **column(net, side, options)}
            order = {name: n for n, name in enumerate(NETS)}
            columns = sorted(known.items(), key=lambda item: order[item[0].split(" @ ")[0]])
            found["results"] = dict(columns)
            if not options.print:
                _write(found)
    return found


def _known(now: dict[str, Any]) -> dict[str, Any]:
    """Columns measured before with the same machine, versions and settings."""
    if not RESULTS.exists():
        return {}
    before = json.loads(RESULTS.read_text(encoding="utf-8"))
    same = all(before.get(key) == now[key] for key in ("machine", "versions", "settings"))
    return dict(before["results"]) if same else {}


def _write(found: dict[str, Any]) -> None:
    """The results, and their table in the page."""
    from benchmarks.peers.page import peers_text, put

    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put(PAGE, "peers", peers_text(found))


def parser() -> argparse.ArgumentParser:
    """The options; names of networks and variants are checked."""
    from benchmarks.peers.nets import NETS
    from benchmarks.peers.variants import PLAIN, VARIANTS

    names = [name for name in VARIANTS if name != PLAIN]
    found = argparse.ArgumentParser(prog="bench_peers", description=(__doc__ or "").split("\n")[0])
    found.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), metavar="NET")
    found.add_argument("--variants", nargs="+", choices=names, default=names, metavar="VARIANT")
    found.add_argument("--sides", nargs="+", type=int, help="default 96, segmentation networks 64")
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--memory-runs", type=int, default=3, help="0: no memory figures")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    found.add_argument("--print", action="store_true", help="print the table, write nothing")
    return found


def main(arguments: Sequence[str]) -> None:
    """Measure, then write or print."""
    if arguments and arguments[0] == "--one":
        print(json.dumps(one(*arguments[1:])))
        return
    from benchmarks.peers.page import peers_text

    options = parser().parse_args(arguments)
    found = report(options)
    if options.print:
        print(peers_text(found))


if __name__ == "__main__":
    main(sys.argv[1:])
