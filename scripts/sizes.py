"""Name each file over 400 lines and function over 50: scripts/sizes.py FOLDER_OR_FILE [...]."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 50


def too_long(path: Path) -> Iterator[str]:
    """One line of text per violation in a Python file; decorators do not count, docstrings do."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines, at most {FILE_LINES}: does it answer more than one question?"
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                where = f"{path}:{node.lineno}"
                yield f"{where}: {node.name} has {length} lines, at most {FUNCTION_LINES}"


def main(arguments: list[str]) -> int:
    """Print the violations; 1 if there are any, 2 if there is nothing to look at."""
    files: list[Path] = []
    for argument in map(Path, arguments):
        files += sorted(argument.rglob("*.py")) if argument.is_dir() else [argument]
    if not files:
        print("no Python files to measure in:", *arguments, file=sys.stderr)
        return 2
    violations = [line for path in files for line in too_long(path)]
    print(*violations, sep="\n", end="\n" if violations else "")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
