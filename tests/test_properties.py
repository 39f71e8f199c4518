"""Does every test that docs/properties.md names exist, and does every promise name one?"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "properties.md"
PROMISED = {*(f"P{n}" for n in (*range(1, 24), 26, 27)), *"ABCDEFGHKM"}


def rows(text: str) -> list[list[str]]:
    """The cells of the tables' rows, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in found if cells[-1] != "tolerance"]


@cache
def functions_in(path: str) -> frozenset[str]:
    """The test functions of a file; none where there is no such file."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def missing(text: str) -> list[str]:
    """The tests that a text names and that are not there."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    return [f"{path}::{name}" for path, name in named if name not in functions_in(path)]


def test_every_test_on_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert missing(text) == []
    assert text.count("tests/") == len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", text))


def test_every_promise_names_a_test_and_a_tolerance() -> None:
    found = rows(PAGE.read_text(encoding="utf-8"))
    assert {cells[0] for cells in found} >= PROMISED
    for cells in found:
        assert len(cells) == 4, cells
        assert "::test_" in cells[2], cells[0]
        assert cells[3], cells[0]


def test_a_test_that_is_not_there_would_be_seen() -> None:
    """Planted faults: a name that nobody has, a file that is not there."""
    here = "tests/test_properties.py"
    assert missing(f"`{here}::test_every_test_on_the_page_exists`") == []
    for name in (f"{here}::test_of_nothing", "tests/test_nowhere.py::test_every_test"):
        assert missing(f"`{name}`") == [name]
