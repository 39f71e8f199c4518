"""Which operations does a TorchScript archive name, and does any of them write, read or send?

Its programs are text in Python's syntax; they are parsed, never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from med_gradcam.errors import ModelError

# Touch files, whatever they are called on.
FILES = frozenset(("save", "from_file"))
SPACES = frozenset(("aten", "prim"))
# Of prim: what leaves the program.
_LEAVES = frozenset(("PythonOp", "rpc_async", "rpc_sync", "rpc_remote", "CudaFusionGroup"))
_CLASSES = "__torch__.torch.classes"
_AT_LOADING = "__setstate__"


def faults(programs: dict[str, bytes], name: str) -> list[str]:
    """What the programs of an archive hold that no network needs, by name; empty if nothing.

    Raises:
        ModelError: one of them cannot be parsed.
    """
    found: dict[str, None] = {}
    for path, text in programs.items():
        try:
            tree = ast.parse(text.decode("utf-8"))
            found.update(dict.fromkeys(_faults(tree)))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ModelError(
                f"expected the programs of TorchScript in {name!r}, {path!r} cannot be read."
            ) from error
    return list(found)


def _faults(tree: ast.AST) -> Iterator[str]:
    based = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == _AT_LOADING:
            yield f"{_AT_LOADING}, which runs while the file is loaded"
        elif isinstance(node, ast.Name) and node.id in ("ops", "torch") and id(node) not in based:
            yield f"{node.id!r} under another name"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from _of_call(node, node.func.id)
        elif isinstance(node, ast.Attribute):
            yield from _of_attribute(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not _is_usual(node):
            yield f"an import, {ast.unparse(node)!r}"


def _of_call(node: ast.Call, name: str) -> Iterator[str]:
    if name in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
        wanted = node.args[1]
        base = node.args[0]
        asked = wanted.value if isinstance(wanted, ast.Constant) else None
        if asked in FILES or (isinstance(base, ast.Name) and base.id in ("ops", "torch")):
            yield f"{ast.unparse(node)!r}"


def _of_attribute(node: ast.Attribute) -> Iterator[str]:
    if node.attr in FILES:
        yield f"the operation {node.attr!r}, which touches files"
    elif isinstance(node.value, ast.Name) and node.value.id == "ops" and node.attr not in SPACES:
        yield f"operations of {node.attr!r}, which are not torch's own"
    elif node.attr in _LEAVES and ast.unparse(node.value) == "ops.prim":
        yield f"the operation {node.attr!r}, which leaves the program"
    elif node.attr == "classes" and ast.unparse(node) == _CLASSES:
        yield "classes of an extension (torch.classes)"


def _is_usual(node: ast.Import | ast.ImportFrom) -> bool:
    """Old archives import their own parts: `import __torch__.torch.nn`, no other."""
    if isinstance(node, ast.ImportFrom):
        return False
    return all(alias.name.startswith("__torch__") for alias in node.names)
