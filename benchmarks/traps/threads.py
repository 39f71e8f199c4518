"""Which maps were wrong because several threads shared one network?

`python -m benchmarks.traps.threads TOOL` counts in a process of its own, since one of the tools can
end it.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.peers.adapters import GRADCAM
from benchmarks.traps.rows import Figure, Row, trap

THREADS, CALLS = 4, 40
ROOT = Path(__file__).resolve().parent.parent.parent


def wrong(tool: str) -> int:
    """How many of the calls gave a map that differs from that of the same scan alone, or failed."""
    from benchmarks.traps import ours
    from benchmarks.traps.cases import Array, Case, array, noise, small

    net = small(channels=16)
    scans = [noise(16, 16, 16, seed=s) for s in range(THREADS)]

    def call(n: int) -> Array:
        case = Case(net, "3", scans[n % THREADS])
        if tool == "ours":
            return array(ours.explained(case).evidence)
        return array(GRADCAM[tool](net, "3", 1)(case.x))

    alone = [call(n) for n in range(THREADS)]

    def differs(n: int) -> bool:
        try:
            return not np.allclose(call(n), alone[n % THREADS], rtol=1e-4, atol=1e-7)
        except Exception:  # noqa: BLE001 - a crash is no right map either
            return True

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(differs, range(CALLS)))


def _counted(tool: str) -> Figure:
    run = [sys.executable, "-m", "benchmarks.traps.threads", tool]
    done = subprocess.run(run, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        return float(done.stdout.splitlines()[-1])
    return f"fails: the process ended with {done.returncode}"


@trap("S32", "Threads that share a network get each other's maps",
      "MONAI", "grad-cam", "torchcam", "captum")  # fmt: skip
def shared() -> list[Row]:
    """Four threads, forty calls, one network: calls whose map is not that of the scan alone."""
    mine = _counted("ours")
    text = f"{THREADS} threads, {CALLS} calls, one network: wrong or failed (varies by run)"
    return [
        Row("S32", tool, text, 0.0, _counted(tool), mine)
        for tool in ("MONAI", "grad-cam", "torchcam", "captum")
    ]


if __name__ == "__main__":
    print(wrong(sys.argv[1]))
