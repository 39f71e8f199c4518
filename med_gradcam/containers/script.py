"""How does a TorchScript network become an eager one, with the same names and weights?

A mirror stands for each of its modules and runs that module's own graph in Python. So hooks fire,
any part can be run again, and every operation is seen; TorchScript itself allows none of that.
A frozen network has no modules left: its operations become modules, and where the program still
says which module an operation came from, that module's end is marked under its old name.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from med_gradcam.containers import flat, ordinary
from med_gradcam.containers.script_graph import Graphs, Program, UnknownOperationError
from med_gradcam.errors import ModelError
from med_gradcam.outputs import changed

_OPENED: weakref.WeakKeyDictionary[torch.nn.Module, Mirror] = weakref.WeakKeyDictionary()
_C: Any = torch._C  # typed in part, as is
_JIT: Any = torch.jit
_SCOPE = re.compile(r"([^.()]+)\(([^()]*)\)")


class Mirror(torch.nn.Module):
    """One module of a TorchScript network, run from its graph.

    Its class is named after the class in the source. `closed`: why the program runs whole, as no
    part of it can be seen; empty where it is open.
    """

    closed = ""
    _source: Any

    def __init__(self, source: Any, graphs: Graphs) -> None:
        super().__init__()
        self.__dict__["_source"] = source  # no child: it must not run by itself
        self._graphs = graphs
        self._programs: dict[str, Program] = {}
        self._values: dict[str, Any] = {}
        self._next = "forward"
        self._is_root = self._known = False
        self.training = bool(source.training) if source.hasattr("training") else False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's graph gives."""
        flat.heard(self, args, kwargs)
        name, self._next = self._next, "forward"
        if self.closed:
            return self.whole(*args, **kwargs)
        given = changed(args, torch.clone) if self._is_root and not self._known else args
        try:
            out = self._run(name, args, kwargs)
        except UnknownOperationError as error:
            if not self._is_root:
                raise
            self.closed = str(error)
            return self.whole(*given, **kwargs)
        self._known = True
        return out

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """What the program itself gives, in this module's mode; it is left as it was."""
        mirrors = [one for one in self.modules() if isinstance(one, Mirror)]
        modes = [(one._source, one.training) for one in mirrors if one._source.hasattr("training")]
        before = [(source, source.getattr("training")) for source, _ in modes]
        # A network traced in training mode changes its running means at each run.
        state = [value for one in mirrors for _, value in _C.BufferDict(one._source).items()]
        state += [value for value in self.parameters() if value.ndim == 1]  # frozen ones, too
        kept = [(value, value.detach().clone()) for value in state]
        try:
            for source, mode in modes:
                source.setattr("training", mode)
            with _JIT.optimized_execution(False):  # noqa: FBT003 - what is fused is not seen
                return self._source._get_method("forward")(*args, **kwargs)
        finally:
            for source, mode in before:
                source.setattr("training", mode)
            with torch.no_grad():
                for value, was in kept:
                    if not torch.equal(value, was):
                        value.copy_(was)

    def follow(self) -> None:
        """Take the weights that the source has now, if it was given others.

        Of buffers a copy, since programs may write into them: they are the user's.
        """
        for name, value in _C.ParameterDict(self._source).items():
            own = self._parameters.get(name)
            if own is not None and own.data_ptr() != value.data_ptr():
                own.data = value.detach()
        for name, value in _C.BufferDict(self._source).items():
            if name in self._buffers:
                self._buffers[name] = value.detach().clone()

    def call(self, name: str, *args: Any) -> Any:
        """A method of the module; its forwards (traced twice, it has two) with hooks."""
        if name.rstrip("0123456789") != "forward":
            return self._run(name, args, {})
        self._next = name
        return self(*args)

    def read(self, name: str, graphs: Graphs | None = None) -> None:
        """Make a method of the module ready to run."""
        graph = self._source._get_method(name).graph
        self._programs[name] = Program(graph, graphs or self._graphs)

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self._programs:
            self.read(name)
        given = self._arguments(name, args, kwargs)
        return self._programs[name](self, *given)

    def _arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        wanted = self._source._get_method(name).schema.arguments[1:]
        if len(args) > len(wanted):
            raise TypeError(f"expected {len(wanted)} inputs, got {len(args)}")
        made = list(args)
        for one in wanted[len(args) :]:
            if one.name not in kwargs and not one.has_default_value():
                raise TypeError(f"expected the input {one.name!r}, it was not given")
            made.append(kwargs.get(one.name, one.default_value))
        return made

    def attribute(self, name: str) -> Any:
        """A child, a weight, or any other value that the graph asks for."""
        if name == "training":
            return self.training
        for found in (self._values, self._modules, self._parameters, self._buffers):
            value = found.get(name)
            if name in found and not isinstance(value, flat.Mark):
                return value
        value = self._source.getattr(name)
        if isinstance(value, _C.ScriptModule):  # one that freezing left behind
            value = _mirror(value, self._graphs)
            flat.attach(self, (name,), value)
        self._values[name] = value
        return value

    def assign(self, name: str, value: Any) -> None:
        """A value that the graph keeps."""
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self._values[name] = value


def opened(net: torch.nn.Module) -> Mirror:
    """The mirror of a TorchScript network, made once; it shares the network's weights.

    Raises:
        ModelError: it holds what is not known here, naming it.
    """
    found = _OPENED.get(net)
    if found is None:
        found = _OPENED[net] = _opened(net)
        found._is_root = True
    for module in found.modules():
        if isinstance(module, Mirror):
            module.follow()
    return found


def _opened(net: torch.nn.Module) -> Mirror:
    source: Any = net._c
    if not source._has_method("forward"):
        raise ModelError("expected a TorchScript network, got one without a forward.")
    graphs = Graphs(_units(source))
    if any(True for _ in net.children()) or not _is_flat(source):
        made = _mirror(source, graphs)
    else:
        made = _from_frozen(source, graphs)
    graphs.where.watch(made)
    return made


def _units(source: Any) -> Callable[[str], Any]:
    """How free functions of the program are found by name; a copy is read where they are asked."""
    kept: list[Any] = []

    def find(name: str) -> Any:
        if not kept:
            unit = _C.CompilationUnit()
            _C.import_ir_module_from_buffer(unit, source.save_to_buffer({}), None, {}, False)  # noqa: FBT003
            kept.append(unit)
        function = kept[0].find_function(name)
        if function is None:
            raise ModelError(f"expected the function {name!r} in the TorchScript network.")
        return function

    return find


def _mirror(source: Any, graphs: Graphs) -> Mirror:
    made: Mirror = _class(source)(source, graphs)
    made.read("forward") if source._has_method("forward") else None
    modules = _C.ModuleDict(source)
    for name, child in modules.items():
        made.add_module(name, _mirror(child, graphs))
    for name, value in _C.ParameterDict(source).items():
        made.register_parameter(name, _parameter(value))
    for name, value in _C.BufferDict(source).items():
        made.register_buffer(name, value)
    return made


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    if isinstance(value, torch.nn.Parameter):
        return value
    return torch.nn.Parameter(value.detach(), requires_grad=value.requires_grad)


def _class(source: Any) -> Any:
    name = source._type().name()
    return type(name, (Mirror,), {"__doc__": Mirror.__doc__, "__module__": Mirror.__module__})


# -------------------------------------------------------------------------------- frozen networks


def _is_flat(source: Any) -> bool:
    """Whether the weights are constants of the graph, as freezing leaves them."""
    return any(
        node.kind() == "prim::Constant" and node.output().type().kind() == "TensorType"
        for node in source._get_method("forward").graph.nodes()
    )


def _from_frozen(source: Any, graphs: Graphs) -> Mirror:
    root: Mirror = _class(source)(source, graphs)
    graph = source._get_method("forward").graph
    nodes = [node for node in graph.nodes() if _makes_tensor(node)]
    origins = [[*_origin(node)] for node in nodes]
    scopes = [tuple(name for name, _ in origin) for origin in origins]
    names = [node.output().debugName() for node in nodes]
    scope_of, over = dict(zip(names, scopes, strict=True)), flat.closing(scopes)
    ends = dict(zip(names, over, strict=True))
    for origin in origins:
        flat.attach_marks(root, origin)

    def wrap(node: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        name = node.output().debugName()
        if name not in scope_of or not _makes_tensor(node):
            return function
        word = _word(node)
        made = flat.op(word, function)
        flat.attach(root, (*scope_of[name], word), made)
        marks = [root.get_submodule(".".join(path)) for path in ends[name]]
        return flat.closed(made, marks)

    def constant(node: Any, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        name = re.sub(r"\W", "_", node.output().debugName().removeprefix("self."))
        name = f"weight_{name}"
        if value.is_floating_point() and value.ndim:
            root.register_parameter(name, torch.nn.Parameter(value.detach()))
        else:
            root.register_buffer(name, value)
        return lambda: root.attribute(name)

    root.read("forward", Graphs(graphs.find, wrap, constant, where=graphs.where))
    flat.within_marks(root)
    return root


def _word(node: Any) -> str:
    name, ins = node.kind().partition("::")[2], [*node.inputs()]
    axes, transposed = None, False
    if "convolution" in name and len(ins) > 6:  # its seventh says transposed
        weight, flag = ins[1].toIValue(), ins[6].toIValue()
        axes, transposed = getattr(weight, "ndim", None), bool(flag)
    return ordinary.word(name, axes, transposed=transposed)


def _makes_tensor(node: Any) -> bool:
    """Whether a node is an operation of torch that puts out one tensor and does some work on it."""
    aten = node.kind().startswith("aten::") and node.outputsSize() == 1
    return bool(aten and node.output().type().kind() == "TensorType")


def _origin(node: Any) -> Iterator[tuple[str, str]]:
    """The modules that a node came from, (name, class), outermost first.

    A traced program knows the whole path of each, with the lists that hold modules.
    """
    found = _SCOPE.findall(node.getModuleHierarchy())
    found = [(name, kind) for name, kind in found if name not in ("SELF", "UNKNOWN_INSTANCE")]
    paths = [part.split(".")[1:] for part in node.scopeName().split("/") if part]
    if len(paths) != len(found):
        yield from found
        return
    before = 0
    for path, (_, kind) in zip(paths, found, strict=True):
        for name in path[before:-1]:
            yield name, ""
        yield path[-1], kind
        before = len(path)
