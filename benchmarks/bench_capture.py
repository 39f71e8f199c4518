"""What does a Grad-CAM cost beside a plain prediction, in time and in peak memory?

96^3 input, MONAI DenseNet121 and ResNet18 in 3D, last block. Each figure has a process of its own;
inside it plain inference and ours take turns, so that a busy machine slows both alike. Time: ratio
of the medians. Memory: growth of the process's peak resident size over the first call, measured in
one process per variant after a warm-up on a small input.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETS = {"DenseNet121": "class_layers.relu", "ResNet18": "layer4"}
SIDE, ROUNDS, THREADS = 96, 7, 2


def build(name: str) -> Any:
    """The untrained network, fixed seed, in eval mode."""
    import torch
    from monai.networks import nets

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if name == "DenseNet121":
        return nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2).eval()
    return nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2).eval()


def variants(name: str, net: Any) -> dict[str, Callable[[Any], Any]]:
    """Plain inference, our capture with Grad-CAM, and the whole of explain()."""
    import torch

    import med_gradcam as mg
    from med_gradcam.capture import capture
    from med_gradcam.methods import Bound, gradcam
    from med_gradcam.tail import at_rest
    from med_gradcam.target import Target

    layer, target = NETS[name], Target("class", "1", (1,), "softmax")

    def plain(x: Any) -> Any:
        with torch.inference_mode():
            return net(x)

    def ours(x: Any) -> Any:
        with at_rest(net):
            _, found = capture(net, layer, x, lambda _: target)
            return gradcam.evidence(found, Bound(0.02, 0.05)).values

    def whole(x: Any) -> Any:
        return mg.explain(x, net, target=1, layer=layer, method="gradcam")

    return {"plain": plain, "capture": ours, "explain": whole}


def time_one(name: str, side: int) -> dict[str, float]:
    """Median seconds of each variant, taking turns."""
    import torch

    net = build(name)
    x = torch.randn(1, 1, side, side, side)
    calls = variants(name, net)
    for call in calls.values():
        call(x)
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            start = time.perf_counter()
            call(x)
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _high_water_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(row for row in status if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory_one(name: str, variant: str, side: int) -> dict[str, float]:
    """MB by which the peak resident size grows over one call (Linux)."""
    import gc

    import torch

    net = build(name)
    call = variants(name, net)[variant]
    call(torch.randn(1, 1, 32, 32, 32))  # code and thread pools are loaded
    x = torch.randn(1, 1, side, side, side)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts again here
    before = _high_water_mb()
    call(x)
    return {"extra_mb": _high_water_mb() - before}


def in_own_process(*arguments: str) -> dict[str, float]:
    """The result of one figure, from a fresh process."""
    run = [sys.executable, __file__, *arguments]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print both tables as Markdown."""
    print(f"input {SIDE}^3, {THREADS} threads, medians of {ROUNDS} turns\n")
    print("| network | plain s | capture + Grad-CAM | explain() whole | plain MB | capture MB |")
    print("|---|---|---|---|---|---|")
    for name in NETS:
        t = in_own_process("time", name, str(SIDE))
        memory = {
            v: statistics.median(
                in_own_process("memory", name, v, str(SIDE))["extra_mb"] for _ in range(3)
            )
            for v in ("plain", "capture")
        }
        print(
            f"| {name} | {t['plain']:.2f} | x{t['capture'] / t['plain']:.2f} | "
            f"x{t['explain'] / t['plain']:.2f} | {memory['plain']:.0f} | "
            f"{memory['capture']:.0f} (x{memory['capture'] / memory['plain']:.2f}) |"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "time":
        print(json.dumps(time_one(sys.argv[2], int(sys.argv[3]))))
    elif len(sys.argv) > 1:
        print(json.dumps(memory_one(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
