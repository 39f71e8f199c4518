"""What does a program say of its network: its input channels, and was it made in training mode?

It is read from the operations in the order in which they run; nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from med_gradcam.containers import script

# What a value may pass on its way to the first weights and keep its channels.
_KEEPS = frozenset(
    "_to_copy abs add add_ avg_pool2d avg_pool3d batch_norm clamp clamp_ clip clone contiguous "
    "constant_pad_nd detach div div_ dropout exp float half double leaky_relu log max_pool2d "
    "max_pool3d mul mul_ nan_to_num neg pad pow prelu relu relu_ round sigmoid sqrt sub sub_ tanh "
    "to type_as instance_norm group_norm upsample_nearest3d upsample_trilinear3d".split()
)
_CONV = frozenset(("conv2d", "conv3d"))
_TRANSPOSED = frozenset(("conv_transpose2d", "conv_transpose3d"))
_EITHER = frozenset(("_convolution", "convolution"))
_DROPOUT = frozenset("dropout dropout_ feature_dropout alpha_dropout native_dropout".split())


def input_channels(net: torch.nn.Module) -> int | None:
    """The channels that the first convolution of an opened network's input takes.

    None where no convolution takes the first input as it came, or the network is no program.
    """
    for name, args in _operations(net):
        if name not in _CONV | _TRANSPOSED | _EITHER or not args[0].is_input():
            continue
        channels = _taken(name, args)
        if channels is not None:
            return channels
    return None


def in_training(net: torch.nn.Module) -> bool:
    """Whether a program has dropout that is always on: it was made from a network in train mode."""
    return any(
        name in _DROPOUT and len(args) > 2 and args[2].value() is True
        for name, args in _operations(net)
    )


def _taken(name: str, args: list[_Read]) -> int | None:
    weight = args[1].value()
    at = 8 if name in _EITHER else 6
    groups = args[at].value() if len(args) > at else 1
    turned = name in _TRANSPOSED or (name in _EITHER and bool(args[6].value()))
    known = isinstance(weight, torch.Tensor) and isinstance(groups, int)
    if not known or weight.ndim not in (4, 5):
        return None
    return int(weight.shape[0]) if turned else int(weight.shape[1]) * groups


class _Read(Protocol):
    """What an operation is given, in either kind of program."""

    def value(self) -> Any:
        """A weight or a number that is part of the program; None for what is computed."""

    def is_input(self) -> bool:
        """Whether it is the network's first input, with its channels."""


@dataclass(frozen=True, slots=True)
class _Scripted:
    """A value of a TorchScript graph; the graph is kept, as torch's values do not keep it."""

    graph: Any
    source: Any
    of: Any

    def value(self) -> Any:
        node = self.of.node()
        if node.kind() == "prim::Constant":
            return self.of.toIValue()
        if node.kind() != "prim::GetAttr":
            is_self = self.of.debugName() == next(self.graph.inputs()).debugName()
            return self.source if is_self else None
        owner = _Scripted(self.graph, self.source, next(node.inputs())).value()
        name = node.s("name")
        return owner.getattr(name) if owner is not None and owner.hasattr(name) else None

    def is_input(self) -> bool:
        value, wanted = self.of, [one.debugName() for one in self.graph.inputs()][1:2]
        while value.debugName() not in wanted:
            node = value.node()
            name = node.kind().partition("::")[2]
            if name not in _KEEPS or not any(True for _ in node.inputs()):
                return False
            value = next(node.inputs())
        return True


@dataclass(frozen=True, slots=True)
class _Exported:
    """An argument in a graph of torch.export."""

    program: torch.fx.GraphModule
    of: Any

    def value(self) -> Any:
        if not isinstance(self.of, torch.fx.Node):
            return self.of
        if self.of.op != "get_attr":
            return None
        path, _, name = str(self.of.target).rpartition(".")
        return getattr(self.program.get_submodule(path), name, None)

    def is_input(self) -> bool:
        first = next((one for one in self.program.graph.nodes if one.op == "placeholder"), None)
        one = self.of
        while one is not first:
            packet = getattr(getattr(one, "target", None), "overloadpacket", None)
            if getattr(packet, "__name__", "") not in _KEEPS or not one.args:
                return False
            one = one.args[0]
        return first is not None


def _operations(net: torch.nn.Module) -> Iterator[tuple[str, list[_Read]]]:
    if isinstance(net, script.Mirror):
        yield from _of_script(net._source)
    elif isinstance(program := net.__dict__.get("_program"), torch.fx.GraphModule):
        yield from _of_export(program)


def _of_script(source: Any) -> Iterator[tuple[str, list[_Read]]]:
    # The graph is kept by each of its values: torch's own hold nothing.
    graph = source._get_method("forward").inlined_graph
    for node in _nodes(graph):
        space, _, name = node.kind().partition("::")
        if space == "aten":
            yield name, [_Scripted(graph, source, value) for value in node.inputs()]


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _of_export(program: torch.fx.GraphModule) -> Iterator[tuple[str, list[_Read]]]:
    for node in program.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node.op == "call_function" and packet is not None:
            yield str(packet.__name__), [_Exported(program, value) for value in node.args]
