"""Importing the package and asking for help stay quick: each figure from a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

IMPORT_MS = 100.0
HELP_MS = 300.0
HEAVY = {"numpy", "torch", "monai", "nibabel", "pydicom", "PyQt6", "qtpy", "napari"}


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(code: str) -> str:
    return run(sys.executable, "-c", code)


def best_ms(measure: Callable[[], float], budget: float) -> float:
    """The best of five; on a busy machine up to twenty, until one is within the budget."""
    best = float("inf")
    for attempt in range(20):
        best = min(best, measure())
        if attempt >= 4 and best < budget:
            break
    return best


def loaded(module: str) -> set[str]:
    """Heavy packages in memory after importing a module in a fresh process."""
    return set(python(f"import sys, {module}; print(*{HEAVY!r} & sys.modules.keys())").split())


def test_importing_the_package_takes_under_100_ms() -> None:
    code = (
        "import time; t = time.perf_counter(); import med_gradcam; print(time.perf_counter() - t)"
    )
    assert best_ms(lambda: 1000 * float(python(code)), IMPORT_MS) < IMPORT_MS


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("med_gradcam") == set()


def test_help_takes_under_300_ms() -> None:
    command = Path(sys.executable).with_name("med-gradcam")

    def measure() -> float:
        start = time.perf_counter()
        assert "explain" in run(str(command), "--help")
        return 1000 * (time.perf_counter() - start)

    assert best_ms(measure, HELP_MS) < HELP_MS


@pytest.mark.parametrize("module", ["napari_plugin", "napari_plugin.layers"])
def test_the_plugin_shows_its_layers_without_torch_or_qt(module: str) -> None:
    assert loaded(module) <= {"numpy"}
