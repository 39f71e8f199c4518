"""What does a small expression of a bundle's configuration mean, as data?

Zoo configurations hold expressions such as "$len(@labels) + 1". Those made of literals, references,
arithmetic, indexing and a few harmless functions are worked out here from their syntax tree, by an
allow-list; anything else is refused. Nothing is ever handed to eval.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from med_gradcam.errors import ModelError

MOST_TEXT, MOST_NODES, MOST_ITEMS, MOST_BITS = 4000, 500, 100_000, 256
_REFERENCE = re.compile(r"@(\w+(?:(?:::|#)\w+)*)")
_RELATIVE = re.compile(r"@(?:::|#)")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "len": len, "int": int, "float": float, "bool": bool, "list": list, "tuple": tuple,
    "min": min, "max": max, "sum": sum, "abs": abs, "round": round, "sorted": sorted,
}  # fmt: skip
# Arrays written as lists stay lists; the network's builder makes tensors of them where it must.
_ARRAYS = frozenset({"torch.from_numpy", "torch.tensor", "torch.as_tensor", "np.array",
                     "numpy.array", "np.asarray", "numpy.asarray"})  # fmt: skip
_DTYPE = re.compile(r"(?:torch|np|numpy)\.(u?int(?:8|16|32|64)|float(?:16|32|64)?|bool)")
_NAMED = {
    f"{package}CommonKeys.{key.upper()}": key
    for package in ("monai.utils.", "")
    for key in ("image", "label", "pred")
}
_MADE = re.compile(r"(?:monai|torch\.nn)(?:\.\w+)+")


@dataclass(frozen=True, slots=True)
class Above:
    """A function of voxels: those above `limit`, as in "lambda x: x > 0"."""

    limit: float


@dataclass(frozen=True, slots=True)
class Code:
    """An expression that is no data: it would have to be run."""

    text: str


def evaluated(text: str, look_up: Callable[[str], Any]) -> Any:
    """The value of an expression (without its "$"); `look_up` gives what a reference names.

    Raises:
        ModelError: it is more than data.
    """
    try:
        return _parsed(text, look_up)
    except ModelError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise _refused(text, f"{type(error).__name__}: {error}") from error


def _refused(text: str, why: str) -> ModelError:
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return ModelError(
        f"expected an expression of literals, references and arithmetic, got {short!r} ({why}); "
        f"code in a bundle is not run."
    )


def _parsed(text: str, look_up: Callable[[str], Any]) -> Any:
    if len(text) > MOST_TEXT or _RELATIVE.search(text):
        raise _refused(text, "too long" if len(text) > MOST_TEXT else "a relative reference")
    names: dict[str, str] = {}

    def placed(found: re.Match[str]) -> str:
        name = f"reference_{len(names)}"
        names[name] = found[1]
        return name

    plain = _REFERENCE.sub(placed, text.strip())
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise _refused(text, "not one expression") from error
    if sum(1 for _ in ast.walk(tree)) > MOST_NODES:
        raise _refused(text, "too many parts")
    return _Reader(text, names, look_up).value(tree.body)


@dataclass(frozen=True, slots=True)
class _Reader:
    text: str
    names: dict[str, str]
    look_up: Callable[[str], Any]

    def value(self, node: ast.expr) -> Any:
        read = _NODES.get(type(node))
        if read is None:
            raise _refused(self.text, type(node).__name__)
        return _sane(read(self, node), self.text)

    def constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, (int, float, str, bool, type(None))):
            raise _refused(self.text, "a literal of another kind")
        return node.value

    def listed(self, node: ast.List | ast.Tuple) -> Any:
        items = [self.value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)

    def mapped(self, node: ast.Dict) -> Any:
        pairs = zip(node.keys, node.values, strict=True)
        return {self.value(k): self.value(v) for k, v in pairs if k is not None}

    def name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise _refused(self.text, f"the name {node.id!r}")
        return self.look_up(self.names[node.id])

    def dotted(self, node: ast.Attribute) -> Any:
        if _path(node) in _NAMED:
            return _NAMED[_path(node)]
        found = _DTYPE.fullmatch(_path(node))
        if found is None:
            raise _refused(self.text, f"the attribute {node.attr!r}")
        return found[1]

    def unary(self, node: ast.UnaryOp) -> Any:
        if type(node.op) not in _UNARY:
            raise _refused(self.text, type(node.op).__name__)
        return _UNARY[type(node.op)](self.value(node.operand))

    def binary(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        if type(node.op) not in _BINARY:
            raise _refused(self.text, type(node.op).__name__)
        _check_growth(type(node.op), left, right, self.text)
        return _BINARY[type(node.op)](left, right)

    def compared(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        for op, other in zip(node.ops, node.comparators, strict=True):
            if type(op) not in _COMPARE:
                raise _refused(self.text, type(op).__name__)
            right = self.value(other)
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True

    def either(self, node: ast.BoolOp) -> Any:
        found: Any = None
        for part in node.values:
            found = self.value(part)
            if bool(found) is isinstance(node.op, ast.Or):
                return found
        return found

    def chosen(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.value(node.test) else node.orelse)

    def indexed(self, node: ast.Subscript) -> Any:
        holder = self.value(node.value)
        if not isinstance(holder, (list, tuple, dict, str)):
            raise _refused(self.text, "an index of something else than a list")
        if isinstance(node.slice, ast.Slice):
            parts = (node.slice.lower, node.slice.upper, node.slice.step)
            return holder[slice(*(None if p is None else self.value(p) for p in parts))]
        return holder[self.value(node.slice)]

    def called(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return self.value(node.func.value)  # where a network shall run is the user's choice
        path = _path(node.func)
        positional = [self.value(argument) for argument in node.args]
        named = {str(k.arg): self.value(k.value) for k in node.keywords if k.arg is not None}
        if any(k.arg is None for k in node.keywords):
            raise _refused(self.text, "**")
        if path == "range":
            return _counted(positional, self.text)
        if path in _CALLS and not named:
            return _CALLS[path](*positional)
        if path in _ARRAYS and len(positional) == 1:
            return positional[0]
        if _MADE.fullmatch(path):  # whether it may be built is the builder's question
            return {"_target_": path, "_args_": positional, **named}
        raise _refused(self.text, f"the call of {path or 'something'}")

    def function(self, node: ast.Lambda) -> Any:
        """Voxels above a number; no other function is understood."""
        body, arguments = node.body, node.args
        one = [a.arg for a in arguments.args]
        plain = not (arguments.vararg or arguments.kwarg or arguments.kwonlyargs)
        if (
            plain
            and isinstance(body, ast.Compare)
            and isinstance(body.left, ast.Name)
            and [body.left.id] == one
            and [type(op) for op in body.ops] == [ast.Gt]
        ):
            limit = self.value(body.comparators[0])
            if isinstance(limit, (int, float)):
                return Above(float(limit))
        raise _refused(self.text, "a function")


_NODES: dict[type[ast.expr], Callable[[_Reader, Any], Any]] = {
    ast.Constant: _Reader.constant,
    ast.List: _Reader.listed,
    ast.Tuple: _Reader.listed,
    ast.Dict: _Reader.mapped,
    ast.Name: _Reader.name,
    ast.Attribute: _Reader.dotted,
    ast.UnaryOp: _Reader.unary,
    ast.BinOp: _Reader.binary,
    ast.Compare: _Reader.compared,
    ast.BoolOp: _Reader.either,
    ast.IfExp: _Reader.chosen,
    ast.Subscript: _Reader.indexed,
    ast.Call: _Reader.called,
    ast.Lambda: _Reader.function,
}


def _path(node: ast.expr) -> str:
    """The dotted name of an attribute or a name; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _path(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _counted(bounds: list[Any], text: str) -> list[int]:
    found = range(*bounds)
    if len(found) > MOST_ITEMS:
        raise _refused(text, "too many items")
    return list(found)


def _check_growth(op: type[ast.operator], left: Any, right: Any, text: str) -> None:
    """Refuse what would fill the memory: powers of large numbers, long repeats, "%" of texts."""
    if isinstance(left, str) and op is not ast.Add:
        raise _refused(text, "arithmetic on text")
    if op is ast.Pow and (abs(right) > MOST_BITS or abs(left) > 1 << MOST_BITS):
        raise _refused(text, "a large power")
    if op is ast.Mult:
        for many, times in ((left, right), (right, left)):
            repeated = isinstance(many, (list, tuple, str))
            if repeated and isinstance(times, int) and len(many) * times > MOST_ITEMS:
                raise _refused(text, "too many items")


def _sane(value: Any, text: str) -> Any:
    if isinstance(value, (list, tuple, str, dict)) and len(value) > MOST_ITEMS:
        raise _refused(text, "too many items")
    if isinstance(value, int) and value.bit_length() > 8 * MOST_BITS:
        raise _refused(text, "a large number")
    return value
