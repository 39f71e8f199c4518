"""How does a graph of TorchScript run as Python, one operation after the other?

A graph is read once and becomes a list of small functions. Nothing of it runs that is not known
here by name: torch's operations on tensors, and the language's own words (script_words.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from med_gradcam.containers import flat, ordinary
from med_gradcam.containers.script_words import ALWAYS, PLAIN, PRIM, holds_tensor
from med_gradcam.errors import ModelError

Values = dict[str, Any]
Find = Callable[[str], Any]
# They write or read files; no network needs them to be run.
FORBIDDEN = frozenset(("aten::save", "aten::from_file"))
# What these are not for: other threads, Python, and the weights.
_NOT_HERE = frozenset(
    "prim::fork aten::wait prim::PythonOp aten::set_data aten::backward prim::rpc_async "
    "prim::rpc_sync prim::rpc_remote prim::awaitable".split()
)
_SPACES = ("aten", "prim")


class UnknownOperationError(ModelError):
    """A word of TorchScript that is not known here; the program can only run whole."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(f"its operation {kind!r} is not known here")


@dataclass(frozen=True, slots=True)
class Graphs:
    """Where functions of a program are found by name, and how an operation is wrapped.

    `wrap(node, function)`: gives another function for an operation on tensors, or the same one;
    `constant(node, tensor)`: how a tensor that is part of the graph is read.
    """

    find: Find
    wrap: Callable[[Any, Callable[..., Any]], Callable[..., Any]] = lambda _, function: function
    constant: Callable[[Any, torch.Tensor], Callable[[], Any]] = lambda _, value: lambda: value
    known: dict[str, Program] = field(default_factory=dict)
    where: flat.Where = field(default_factory=flat.Where)

    def function(self, name: str) -> Program:
        """A free function of the program, read once."""
        if name not in self.known:
            self.known[name] = Program(self.find(name).graph, self)
        return self.known[name]


class Program:
    """A graph or block, ready to run."""

    def __init__(self, block: Any, graphs: Graphs) -> None:
        self.inputs = [value.debugName() for value in block.inputs()]
        self.outputs = [value.debugName() for value in block.outputs()]
        nodes = list(block.nodes())
        self.steps = [(_step(node, graphs), _names(node.outputs())) for node in nodes]
        self.over = _last_uses(nodes, {*self.outputs})

    def run(self, values: Values) -> list[Any]:
        """The outputs, given the inputs by name; values are let go after their last use."""
        for (step, names), over in zip(self.steps, self.over, strict=True):
            values.update(zip(names, step(values), strict=True))
            for name in over:
                values.pop(name, None)
        return [values[name] for name in self.outputs]

    def __call__(self, *args: Any) -> Any:
        """The output for arguments in their order, as a function gives it."""
        out = self.run(dict(zip(self.inputs, args, strict=True)))
        return out[0] if len(out) == 1 else tuple(out)


def _names(values: Iterator[Any]) -> list[str]:
    return [value.debugName() for value in values]


def _read(node: Any) -> Iterator[str]:
    """All that a node reads, its blocks included."""
    yield from _names(node.inputs())
    for block in node.blocks():
        yield from _names(block.outputs())
        for inner in block.nodes():
            yield from _read(inner)


def _last_uses(nodes: Sequence[Any], kept: set[str]) -> list[list[str]]:
    """For each node, what was made in this block and is read for the last time there."""
    own = {name for node in nodes for name in _names(node.outputs())} - kept
    last: dict[str, int] = {}
    for n, node in enumerate(nodes):
        for name in (*_names(node.outputs()), *_read(node)):
            if name in own:
                last[name] = n
    over: list[list[str]] = [[] for _ in nodes]
    for name, n in last.items():
        if nodes[n].kind() != "prim::Constant":
            over[n].append(name)
    return over


Act = Callable[[Values], Sequence[Any]]


def _step(node: Any, graphs: Graphs) -> Act:
    kind = node.kind()
    if kind in FORBIDDEN:
        raise ModelError(
            f"expected a TorchScript network that touches no files, it holds {kind!r}; load the "
            f"network from its weights and its Python class instead."
        )
    special = _SPECIAL.get(kind)
    if special is not None:
        return special(node, graphs)
    if not _is_known(node):  # said when it is to run: many functions have parts that never do
        return _unknown(node)
    ins, count = _names(node.inputs()), node.outputsSize()
    function = _function(node, graphs)
    if count == 1:
        return lambda values: (function(*[values[name] for name in ins]),)
    if count == 0:

        def run(values: Values) -> Sequence[Any]:
            function(*[values[name] for name in ins])
            return ()

        return run
    return lambda values: function(*[values[name] for name in ins])


def _function(node: Any, graphs: Graphs) -> Callable[..., Any]:
    space, _, name = node.kind().partition("::")
    if space == "prim":
        return PRIM[name]
    always, plain = ALWAYS.get(name), PLAIN.get(name)
    if always is not None and not _only_tensors(node):
        return always
    on_tensors = _on_tensors(node, space, name)
    if on_tensors is None:
        known: Any = plain or always  # one of them, as the word is known
        return known  # type: ignore[no-any-return]
    wrapped = graphs.wrap(node, on_tensors)
    if plain is None:
        return wrapped
    return lambda *args: wrapped(*args) if holds_tensor(args) else plain(*args)


def _is_known(node: Any) -> bool:
    space, _, name = node.kind().partition("::")
    if node.kind() in _NOT_HERE or space not in _SPACES:
        return False
    if space == "prim":
        return name in PRIM
    return name in ALWAYS or name in PLAIN or hasattr(torch.ops.aten, name)


def _unknown(node: Any) -> Act:
    kind = node.kind()

    def run(values: Values) -> Sequence[Any]:
        del values
        raise UnknownOperationError(kind)

    return run


def _only_tensors(node: Any) -> bool:
    """Whether a word such as copy, item or values is asked of a tensor in torch's own sense."""
    name = node.kind().partition("::")[2]
    first = next(iter(node.inputs()), None)
    of_tensor = first is not None and first.type().kind() == "TensorType"
    return of_tensor and name in ("copy", "values", "keys")


def _on_tensors(node: Any, space: str, name: str) -> Callable[..., Any] | None:
    """The operation of torch with a node's name, its later arguments given by their names."""
    packet = getattr(getattr(torch.ops, space), name, None)
    if packet is None:
        return None
    function = ordinary.function(name, packet)
    schema = node.schema() if function is packet else ""
    named = _by_name(schema) if schema and schema != "(no schema)" else []
    count = len(list(node.inputs())) - len(named)
    if not named:
        return function
    return lambda *args: function(*args[:count], **dict(zip(named, args[count:], strict=True)))


def _by_name(schema: str) -> list[str]:
    parsed = torch._C.parse_schema(schema)
    return [one.name for one in parsed.arguments if one.kwarg_only]


# ------------------------------------------------------------------------ words with blocks


def _constant(node: Any, graphs: Graphs) -> Act:
    value = node.output()
    if value.type().kind() == "FunctionType":
        made: Any = value.type().annotation_str
    else:
        made = value.toIValue()
    if isinstance(made, torch.Tensor):
        read = graphs.constant(node, made)
        return lambda _: (read(),)
    if isinstance(made, torch.device):
        return lambda _: (graphs.where(made),)
    return lambda _: (made,)


def _call_function(node: Any, graphs: Graphs) -> Act:
    first, *ins = node.inputs()
    name, ins = first.type().annotation_str, _names(ins)
    made: list[Program] = []

    def run(values: Values) -> Sequence[Any]:
        if not made:
            made.append(graphs.function(name))
        return (made[0](*[values[one] for one in ins]),)

    return run


def _call_method(node: Any, graphs: Graphs) -> Act:
    del graphs
    name, (owner, *ins) = node.s("name"), _names(node.inputs())

    def run(values: Values) -> Sequence[Any]:
        one, given = values[owner], [values[i] for i in ins]
        if hasattr(one, "call"):
            return (one.call(name, *given),)
        return (getattr(one, name)(*given),)  # a value of a class of the program's own

    return run


def _get(node: Any, graphs: Graphs) -> Act:
    del graphs
    name, (owner,) = node.s("name"), _names(node.inputs())

    def run(values: Values) -> Sequence[Any]:
        one = values[owner]
        return (one.attribute(name) if hasattr(one, "attribute") else getattr(one, name),)

    return run


def _set(node: Any, graphs: Graphs) -> Act:
    del graphs
    name, (owner, value) = node.s("name"), _names(node.inputs())

    def run(values: Values) -> Sequence[Any]:
        values[owner].assign(name, values[value])
        return ()

    return run


def _if(node: Any, graphs: Graphs) -> Act:
    (condition,) = _names(node.inputs())
    yes, no = (Program(block, graphs) for block in node.blocks())
    return lambda values: (yes if bool(values[condition]) else no).run(values)


def _loop(node: Any, graphs: Graphs) -> Act:
    most, condition, *carried = _names(node.inputs())
    (block,) = node.blocks()
    body = Program(block, graphs)

    def run(values: Values) -> Sequence[Any]:
        go, now = bool(values[condition]), [values[name] for name in carried]
        for turn in range(values[most]):
            if not go:
                break
            values.update(zip(body.inputs, (turn, *now), strict=True))
            going, *now = body.run(values)
            go = bool(going)
        return now

    return run


def _dict(node: Any, graphs: Graphs) -> Act:
    del graphs
    ins = _names(node.inputs())
    keys, items = ins[::2], ins[1::2]
    return lambda values: ({values[k]: values[v] for k, v in zip(keys, items, strict=True)},)


def _isinstance(node: Any, graphs: Graphs) -> Act:
    del graphs
    (name,) = _names(node.inputs())
    kinds = [str(kind) for kind in node.tys("types")] if hasattr(node, "tys") else []
    made = {"int": int, "float": float, "bool": bool, "str": str, "Tensor": torch.Tensor}
    wanted = tuple(made.get(kind.partition("[")[0], list) for kind in kinds)
    return lambda values: (isinstance(values[name], wanted),)


_SPECIAL: dict[str, Callable[[Any, Graphs], Act]] = {
    "prim::Constant": _constant,
    "prim::CallFunction": _call_function,
    "prim::CallMethod": _call_method,
    "prim::GetAttr": _get,
    "prim::SetAttr": _set,
    "prim::If": _if,
    "prim::Loop": _loop,
    "prim::DictConstruct": _dict,
    "prim::isinstance": _isinstance,
}
