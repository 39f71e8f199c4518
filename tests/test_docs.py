"""Do the pages say what is true: does their Python run, do links and commands exist?

Python blocks of a page run in one namespace, in a folder with `scan.nii.gz` and the model folder
`nodules`, where the page does not make that itself. Not run: fences marked ```python no-run, and
blocks right after a comment <!-- not run -->. A block that begins with `# NAME.py` is also stored.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import med_gradcam
from med_gradcam import _plugins
from med_gradcam.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_FENCE = re.compile(
    r"(?P<before>[^\n]*)\n*^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE
)
_NOT_RUN = re.compile(r"<!--\s*#?\s*not run\s*-->")
_OWN_COMMANDS = (
    "demo",
    "explain",
    "inspect",
    "whole",
    "components",
    "boxes",
    "concepts",
    "regions",
    "doctor",
    "methods",
    "models",
    "formats",
)


def blocks(text: str, kind: str) -> Iterator[tuple[int, str]]:
    """Line number and body of the fenced blocks of one kind."""
    for found in _FENCE.finditer(text):
        skipped = _NOT_RUN.search(found["before"]) is not None
        if found["kind"].strip() == kind and not skipped:
            yield text[: found.start("body")].count("\n") + 1, found["body"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- Python


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what pages name; imports and paths of the page go afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def lay_out(desk: Path) -> None:
    """A small CT-like scan with a ball in it, and a model folder with seeded weights."""
    import nibabel as nib
    import numpy as np
    import torch
    from safetensors.torch import save_file

    random = np.random.default_rng(1)
    array = random.normal(-820, 20, (24, 24, 20))
    i, j, k = np.ogrid[:24, :24, :20]
    array[(i - 12) ** 2 + (j - 12) ** 2 + (k - 10) ** 2 < 20] = 40
    image = nib.Nifti1Image(array.astype(np.int16), np.diag([1.0, 1.0, 1.5, 1.0]))
    nib.save(image, desk / "scan.nii.gz")

    spec: dict[str, Any] = json.loads(
        next(body for _, body in blocks(read("docs/models.md"), "json"))
    )
    spec["input"] |= {"axes": "RAS", "patch": None}
    torch.manual_seed(2)
    net = torch.nn.Sequential(*(getattr(torch.nn, n)(**given) for n, given in spec["layers"]))
    (desk / "nodules").mkdir()
    (desk / "nodules" / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    save_file(net.state_dict(), desk / "nodules" / "weights.safetensors")


@pytest.mark.parametrize("name", [name for name in NAMES if any(blocks(read(name), "python"))])
def test_the_python_of_a_page_runs(name: str, desk: Path) -> None:
    found = list(blocks(read(name), "python"))
    before = set(sys.modules)
    if not any('"nodules"' in body and "mkdir" in body for _, body in found):
        lay_out(desk)
    space: dict[str, Any] = {"__name__": "page"}
    try:
        for line, body in found:
            if stored := re.match(r"# (\w+\.py)\n", body):
                (desk / stored[1]).write_text(body, encoding="utf-8")
            exec(compile("\n" * line + body, name, "exec"), space)
    finally:
        for module in set(sys.modules) - before:
            place = getattr(sys.modules[module], "__file__", None)
            if place is not None and Path(place).parent == desk:
                del sys.modules[module]


def test_blocks_are_found_and_skipped() -> None:
    text = (
        "a\n```python\nx = 1\n```\n<!-- not run -->\n```python\nboom\n```\n"
        "```python no-run\nboom\n```\n<!-- # not run -->\n\n```python\nboom\n```\n"
    )
    assert list(blocks(text, "python")) == [(3, "x = 1\n")]


@pytest.mark.parametrize("name", NAMES)
def test_the_json_of_a_page_is_json(name: str) -> None:
    for _, body in blocks(read(name), "json"):
        json.loads(body)


# -------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The names that the headings of a page can be linked by."""
    bare = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", bare, re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{name}: no heading for {link}"


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", read("docs/index.md")))
    assert listed == {page.name for page in PAGES[1:]} - {"index.md"}


# ----------------------------------------------------------------------------- command line


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def options(of: argparse.ArgumentParser) -> set[str]:
    return {text for action in of._actions for text in action.option_strings}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `med-gradcam ...` line in code, inline or fenced."""
    fenced = [line for found in _FENCE.finditer(text) for line in found["body"].splitlines()]
    inline = re.findall(
        r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    )
    for line in (*fenced, *inline):
        words = re.match(r"(?:\$ )?med-gradcam (.+)", line.strip().replace("\n", " "))
        if words:
            yield shlex.split(words[1].split("  ")[0].replace("...", ""), comments=True)


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name: str) -> None:
    known = subparsers()
    for words in commands(read(name)):
        first = next((w for w in words if not w.startswith("-")), None)
        given = {w.strip("[]").split("=")[0] for w in words if w.lstrip("[").startswith("-")}
        if first is None:
            assert given <= options(parser()), f"{name}: med-gradcam {' '.join(words)}"
            continue
        assert set(first.split("|")) <= set(known), f"{name}: med-gradcam {' '.join(words)}"
        allowed = set().union(*(options(known[one]) for one in first.split("|")))
        assert given <= allowed, f"{name}: med-gradcam {' '.join(words)}"


@pytest.mark.parametrize("name", NAMES)
def test_options_named_in_the_text_exist(name: str) -> None:
    known = options(parser()).union(*(options(p) for p in subparsers().values()))
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.S | re.M)
    for option in re.findall(r"(?<!`)`(--[\w-]+)[^`]*`(?!`)", text):
        assert option in known, f"{name}: {option}"


def test_every_command_and_option_is_documented() -> None:
    text = read("docs/command_line.md")
    assert tuple(sorted(_OWN_COMMANDS)) == tuple(sorted(subparsers()))
    for command, of in subparsers().items():
        assert f"med-gradcam {command}" in text
        for option in options(of):
            assert f"`{option}`" in text, f"{command} {option}"


# ------------------------------------------------------------------------------------- tables


def test_every_exit_code_is_documented() -> None:
    from med_gradcam import errors

    text = read("docs/command_line.md")
    kinds = [v for v in vars(errors).values() if hasattr(v, "exit_code")]
    for code in {kind.exit_code for kind in kinds}:
        assert f"\n| {code} |" in text


def test_every_key_of_the_record_is_documented() -> None:
    schema = json.loads((ROOT / "med_gradcam/schema/explanation.schema.json").read_text("utf-8"))
    text = read("docs/files.md")
    assert "med-gradcam-explanation/1" in text

    def named(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                if key == "properties":
                    yield from value
                yield from named(value)
        elif isinstance(part, list):
            for value in part:
                yield from named(value)

    for key in set(named(schema)):
        assert f"`{key}`" in text, key
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.M)
    listed = {key for row in rows for key in re.findall(r"\w+", row)}
    assert listed <= set(named(schema)), sorted(listed - set(named(schema)))


def test_every_reason_and_status_is_documented() -> None:
    from med_gradcam.explanation import STATUS_WORDS

    text = read("docs/evidence.md")
    source = "".join(p.read_text("utf-8") for p in (ROOT / "med_gradcam").rglob("*.py"))
    for word in {*re.findall(r'CannotExplainError\(\s*"([a-z ]+)"', source), *STATUS_WORDS}:
        assert f"`{word}`" in text, word


def test_allowed_layers_and_public_names_are_documented() -> None:
    from med_gradcam.models import model_folder

    models, python = read("docs/models.md"), read("docs/python.md")
    for layer in model_folder._LAYERS | model_folder._MONAI:
        assert f"`{layer}`" in models, layer
    for public in med_gradcam.__all__:
        assert f"`{public}`" in python, public
    for method in _plugins.names("methods"):
        assert f'`"{method}"`' in python, method


def test_the_import_order_is_that_of_the_gate() -> None:
    import tomllib

    config = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    gate = [layer.replace("(", "").replace(")", "") for layer in config[0]["layers"]]
    shown = next(b for _, b in blocks(read("docs/architecture.md"), "") if "napari_plugin" in b)
    assert shown.splitlines() == ["napari_plugin", *gate]
