"""The wheel holds both packages, their data and the samples, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no build folder is left in the repository."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("med_gradcam", "napari_plugin", "sample_volumes", "tests"):
        shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, tree)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "-w", str(out), str(tree)],
        check=True,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_both_packages_and_nothing_else(wheel: zipfile.ZipFile, root: Path) -> None:
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "med_gradcam",
        "napari_plugin",
    }
    for package in ("med_gradcam", "napari_plugin"):
        modules = {path.relative_to(root).as_posix() for path in (root / package).rglob("*.py")}
        assert modules == {n for n in names if n.startswith(package) and n.endswith(".py")}


def test_data_files(wheel: zipfile.ZipFile, root: Path) -> None:
    names = set(wheel.namelist())
    schemas = {
        f"med_gradcam/schema/{path.name}" for path in (root / "med_gradcam/schema").glob("*.json")
    }
    assert schemas | {"med_gradcam/py.typed", "napari_plugin/napari.yaml"} <= names


def test_samples_are_carried_without_the_scripts_that_make_them(
    wheel: zipfile.ZipFile, root: Path
) -> None:
    prefix = "med_gradcam/_samples/"
    carried = {n.removeprefix(prefix) for n in wheel.namelist() if n.startswith(prefix)}
    source = root / "sample_volumes"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    assert carried == {name for name in files if not name.endswith((".py", ".pyc"))}


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "med-gradcam = med_gradcam.cli:main" in text
    assert "med-gradcam = napari_plugin:napari.yaml" in text


def test_the_demo_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "installed")
    code = "import sys, med_gradcam.cli as cli; print(cli.__file__); sys.exit(cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert any((tmp_path / "out").iterdir())
