"""How does a network of torch.export become an eager one, with names and hooks?

Its graph calls functions and no modules, so that hooks on its modules never fire. Here each
operation that puts out a tensor becomes a module, and the modules of the source come back as
marks, by the stack of modules that torch.export noted for each operation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from med_gradcam.containers import flat, ordinary

_OPENED: weakref.WeakKeyDictionary[torch.nn.Module, torch.nn.Module] = weakref.WeakKeyDictionary()


def is_exported(net: object) -> bool:
    """Whether it is a graph of torch's inner operations (ExportedProgram.module() gives one)."""
    if not isinstance(net, torch.fx.GraphModule):
        return False
    return any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        for node in net.graph.nodes
    )


def opened(net: torch.fx.GraphModule) -> torch.nn.Module:
    """The same network, operation by operation, with the same weights; made once."""
    if net not in _OPENED:
        _OPENED[net] = made = _opened(net)
        # Not the source itself, which would then live as long as this module does.
        made.__dict__["_program"] = torch.fx.GraphModule(net, net.graph)
    _follow(_OPENED[net], net)
    return _OPENED[net]


def _follow(made: torch.nn.Module, net: torch.nn.Module) -> None:
    """Take the weights that the source has now; of buffers a copy, as programs write into them."""
    for name, own in made.named_parameters():
        value: Any = _attribute(net, name)
        if isinstance(value, torch.Tensor) and own.data_ptr() != value.data_ptr():
            own.data = value.detach()
    for name, buffer in made.named_buffers():
        value = _attribute(net, name)
        if isinstance(value, torch.Tensor) and buffer.shape == value.shape:
            buffer.copy_(value)


def _attribute(net: torch.nn.Module, name: str) -> Any:
    *path, last = name.split(".")
    return getattr(net.get_submodule(".".join(path)), last, None)


def _opened(net: torch.fx.GraphModule) -> torch.nn.Module:
    graph = copy.deepcopy(net.graph)
    root, where = torch.nn.Module(), flat.Where()
    _take_weights(net, graph, root)
    nodes = [node for node in graph.nodes if _is_step(node)]
    origins = [[*_origin(node)] for node in nodes]
    scopes = [tuple(name for name, _ in origin) for origin in origins]
    for origin in origins:
        flat.attach_marks(root, origin)
    for node, scope, ends in zip(nodes, scopes, flat.closing(scopes), strict=True):
        _as_module(node, scope, root, where)
        after = node
        for path in ends:
            with graph.inserting_after(after):
                marked = graph.call_module(".".join(path), (after,))
            after.replace_all_uses_with(marked, lambda user, own=marked: user is not own)
            after = marked
    made = torch.fx.GraphModule(root, graph, class_name=type(net).__name__)
    made.train(net.training)
    flat.within_marks(made)
    where.watch(made)
    kind: Any = type(made)  # a class of its own, as torch makes one for each graph
    generated = kind.forward

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        flat.heard(self, args, kwargs)
        return generated(self, *args, **kwargs)

    kind.forward = forward
    return made


def _take_weights(net: torch.fx.GraphModule, graph: torch.fx.Graph, root: torch.nn.Module) -> None:
    """Each weight under its old name, and each module that the graph calls as it is."""
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        *path, name = str(node.target).split(".")
        owner = net.get_submodule(".".join(path))
        value = getattr(owner, name)
        flat.attach_marks(root, [(part, "") for part in path])
        here = root.get_submodule(".".join(path))
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            here.register_buffer(name, value.detach().clone())
        elif not hasattr(here, name):
            setattr(here, name, value)


def _is_step(node: torch.fx.Node) -> bool:
    made = isinstance(node.meta.get("val"), torch.Tensor)
    return made and node.op == "call_function" and _packet(node) is not None


def _packet(node: torch.fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _as_module(
    node: torch.fx.Node, scope: flat.Path, root: torch.nn.Module, where: flat.Where
) -> None:
    """Let a node call a module that does what its function did."""
    packet = _packet(node)
    name = str(packet.__name__)
    function: Callable[..., Any] = ordinary.function(name, packet)
    if isinstance(named := node.kwargs.get("device"), torch.device):
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "device"}
        function = _placed(function, lambda: where(named))
    weight = node.args[1] if len(node.args) > 6 else None
    axes = (
        weight.meta["val"].ndim if isinstance(weight, torch.fx.Node) and "convol" in name else None
    )
    word = ordinary.word(name, axes, transposed=axes is not None and bool(node.args[6]))
    made = flat.op(word, function)
    node.op, node.target = "call_module", flat.attach(root, (*scope, word), made)


def _placed(function: Callable[..., Any], device: Callable[[], torch.device]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, device=device(), **kwargs)


def _origin(node: torch.fx.Node) -> Iterator[tuple[str, str]]:
    """The modules that an operation came from, (name, class), outermost first."""
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    before: tuple[str, ...] = ()
    for path, kind in stack:
        parts = tuple(part for part in str(path).split(".") if part)
        new = parts[len(before) :]
        for name in new[:-1]:
            yield name, ""
        if new:
            word = kind if isinstance(kind, str) else kind.__name__
            yield new[-1], word.rpartition(".")[2]
        before = parts
