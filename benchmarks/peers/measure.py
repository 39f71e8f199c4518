"""How long does a variant take and how much memory does it need, beside plain inference?

Time: all variants of a network take turns in one process, each with a copy of the network of its
own, so that a busy machine slows them alike and no tool's hooks are in another's way. Memory: one
process per figure, growth of the peak resident size over the first call at full size, after a
warm-up on a small input (Linux).
"""

from __future__ import annotations

import copy
import gc
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers.nets import Net
from benchmarks.peers.variants import PLAIN, VARIANTS, Variant

# Freed blocks go back to the system at once, so that the warm-up leaves no room to hide in.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def first_line(error: BaseException) -> str:
    """The kind and the first line of an error, as people paste it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def scan(shape: Sequence[int]) -> torch.Tensor:
    """A random scan (1, 1, I, J, K), the same every time."""
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1))


def _timed(net: Net, variant: Variant, built: torch.nn.Module, x: torch.Tensor) -> float:
    call = variant.made(net, built)
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def times(net: Net, names: Sequence[str], side: int, rounds: int) -> dict[str, Any]:
    """Seconds per round of each variant, or its error; `plain inference` is always among them."""
    x = scan((side,) * 3)
    mother = net.built()
    chosen = {name: VARIANTS[name] for name in dict.fromkeys((PLAIN, *names))}
    built = {name: copy.deepcopy(mother) for name in chosen}
    calls = {}
    seconds: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, variant in chosen.items():
        try:
            calls[name] = variant.made(net, built[name])
            calls[name](x)  # warm; the first call's own price is what `fresh` variants measure
            seconds[name] = []
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is its entry in the table
            errors[name] = first_line(error)
    for turn in range(rounds):
        order = list(seconds)
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            if chosen[name].fresh:
                seconds[name].append(_timed(net, chosen[name], built[name], x))
                continue
            start = time.perf_counter()
            calls[name](x)
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "errors": errors}


def high_water_mb() -> float:
    """The peak resident size of this process so far, MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(row for row in status if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(net: Net, name: str, side: int) -> float:
    """MB by which the peak resident size grows over the first call at full size."""
    variant, built = VARIANTS[name], net.built()
    call = variant.made(net, built)
    call(scan(net.warm_up))
    if variant.fresh:
        call = variant.made(net, built)
    x = scan((side,) * 3)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts again here
    before = high_water_mb()
    call(x)
    return high_water_mb() - before


def summary(
    seconds: Mapping[str, Sequence[float]], errors: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Per variant the ratio to plain in the same round: min, median, max; or its error."""
    plain = seconds[PLAIN]
    found: dict[str, dict[str, Any]] = {name: {"error": text} for name, text in errors.items()}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, plain, strict=True)]
        found[name] = {
            "seconds": median(values),
            "ratio_min": min(ratios),
            "ratio": median(ratios),
            "ratio_max": max(ratios),
        }
    return found


def machine(threads: int) -> dict[str, Any]:
    """What kind of machine this is; nothing that names it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model
        )
    ram = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        ram = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "ram_gib": ram,
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
    }
