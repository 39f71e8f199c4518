"""Every gate fires: a violation of each is planted, and the tool must name it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def fails(*command: str | Path, cwd: Path, stdin: str = "") -> str:
    """What a command that must fail said, both streams together."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, f"expected exit code 1, got {done.returncode}: {said}"
    return said


def ruff(code: str, path: str, root: Path) -> str:
    """What ruff says about code, as if it stood at that path."""
    return fails(
        BIN / "ruff", "check", "--no-cache", "--stdin-filename", path, "-", cwd=root, stdin=code
    )


@pytest.mark.parametrize(
    "package",
    ["torch", "monai", "nibabel", "pydicom", "highdicom", "SimpleITK", "scipy", "napari", "qtpy"],
)
def test_a_heavy_import_at_the_top_of_geometry_is_refused(package: str, root: Path) -> None:
    said = ruff(
        f'"""Where."""\n\nimport {package}\n\nprint({package})\n', "med_gradcam/geometry.py", root
    )
    assert "TID253" in said


def test_torch_is_at_home_in_methods(root: Path) -> None:
    code = '"""A method."""\n\nimport torch\n\nprint(torch)\n'
    said = ruff(code, "med_gradcam/methods/gradcam.py", root)  # T20: the print
    assert "TID253" not in said
    assert "T201" in said


@pytest.mark.parametrize(
    "path", ["med_gradcam/models/bundle.py", "tests/test_x.py", "benchmarks/bench_x.py"]
)
def test_torch_load_is_refused_everywhere(path: str, root: Path) -> None:
    assert "TID251" in ruff(
        '"""Load."""\n\nimport torch\n\nnet = torch.load("net.pt")\n', path, root
    )


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("def f(a, b, c, d, e, f, g):\n    return a\n", "PLR0913"),
        ("def f(a):\n" + "".join(f"    if a == {n}:\n        a += 1\n" for n in range(11)), "C901"),
        ("def f():\n    return 1\n", "D103"),
        ("try:\n    f()\nexcept Exception:\n    g()\n", "BLE001"),
        ("from .errors import MedGradcamError\n", "TID252"),
    ],
)
def test_the_style_of_the_package_is_held(code: str, rule: str, root: Path) -> None:
    assert rule in ruff(f'"""A module."""\n\n{code}', "med_gradcam/maps.py", root)


def test_layout_is_held(root: Path) -> None:
    fails(
        BIN / "ruff",
        "format",
        "--check",
        "--stdin-filename",
        "med_gradcam/x.py",
        "-",
        cwd=root,
        stdin="a=1\n",
    )


def house(folder: Path, files: dict[str, str]) -> Path:
    """A house of empty modules, but for the given ones."""
    for package in ("med_gradcam", "napari_plugin"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("")
    for path, code in files.items():
        (folder / path).write_text(code)
    return folder


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("geometry", "from med_gradcam import cli\n"),
        ("geometry", "def late():\n    import med_gradcam.cli\n"),
        ("maps", "import napari_plugin\n"),
    ],
)
def test_an_upward_import_is_refused(module: str, code: str, root: Path, tmp_path: Path) -> None:
    house(tmp_path, {"med_gradcam/cli.py": "", f"med_gradcam/{module}.py": code})
    said = fails(
        BIN / "lint-imports", "--no-cache", "--config", root / "pyproject.toml", cwd=tmp_path
    )
    assert "BROKEN" in said
    assert f"med_gradcam.{module} ->" in said


def test_a_module_without_a_place_in_the_order_is_refused(root: Path, tmp_path: Path) -> None:
    house(tmp_path, {"med_gradcam/helpers.py": ""})
    said = fails(
        BIN / "lint-imports", "--no-cache", "--config", root / "pyproject.toml", cwd=tmp_path
    )
    assert "med_gradcam.helpers" in said


def test_a_file_of_401_lines_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * 401)
    (tmp_path / "fine.py").write_text("x = 1\n" * 400)
    said = fails(sys.executable, root / "scripts/sizes.py", tmp_path, cwd=root)
    assert "401 lines" in said
    assert "fine.py" not in said


def test_a_function_of_51_lines_is_refused(root: Path, tmp_path: Path) -> None:
    body = "    x = 1\n"
    (tmp_path / "f.py").write_text("def long():\n" + body * 50 + "def fine():\n" + body * 49)
    said = fails(sys.executable, root / "scripts/sizes.py", tmp_path / "f.py", cwd=root)
    assert "long has 51 lines" in said
    assert "fine has" not in said


def test_a_wrong_type_and_a_missing_one_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        'def wrong() -> int:\n    return "1"\n\n\ndef bare(x):\n    return x\n'
    )
    said = fails(
        BIN / "mypy",
        "--config-file",
        root / "pyproject.toml",
        "--cache-dir",
        tmp_path / "cache",
        "bad.py",
        cwd=tmp_path,
    )
    assert "[return-value]" in said
    assert "[no-untyped-def]" in said


def test_warnings_doctests_and_unexpected_passes_are_errors(root: Path, tmp_path: Path) -> None:
    (tmp_path / "test_bad.py").write_text(
        '"""Planted.\n\n>>> 1 + 1\n3\n"""\n'
        "import warnings\n\nimport pytest\n\n\n"
        'def test_warns():\n    warnings.warn("old")\n\n\n'
        "@pytest.mark.xfail\ndef test_passes():\n    pass\n"
    )
    said = fails(
        sys.executable, "-m", "pytest", "-c", root / "pyproject.toml", "--rootdir", tmp_path,
        "-p", "no:cacheprovider", "--no-xvfb", tmp_path / "test_bad.py", cwd=tmp_path,
    )  # fmt: skip
    assert "3 failed" in said
