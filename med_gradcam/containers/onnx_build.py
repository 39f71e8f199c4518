"""How is each ONNX operator read: as arithmetic on shapes, a constant, or a module?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from med_gradcam.containers import flat, onnx_ops
from med_gradcam.containers.onnx_file import OPSETS, OnnxFile, graphs_of, nodes_of, numbers_of
from med_gradcam.containers.onnx_fuse import Fuser
from med_gradcam.containers.onnx_graph import (
    Input,
    Made,
    OnNumbers,
    OnnxNetwork,
    OnTensors,
    Source,
    Step,
    Weight,
)
from med_gradcam.containers.onnx_names import Names, clean, snake
from med_gradcam.containers.onnx_node import Node, NoFormError, Numbers, Run, scalar
from med_gradcam.containers.onnx_numbers import MOST, NUMBERS, given
from med_gradcam.errors import ModelError

FEW = 4096  # whole numbers up to here are kept out of torch: indices, shapes
_SHAPES = ("Shape", "Size")
_WINDOWED = ("Conv", "ConvTranspose")


def network(file: OnnxFile) -> OnnxNetwork:
    """The network in a file, operator by operator.

    Raises:
        NoFormError: an operator has no form in torch, or no gradient comes through.
        ModelError: the file does not go together.
    """
    if file.opset not in OPSETS:
        raise NoFormError(
            f"its operators are of opset {file.opset}, those of {OPSETS[0]} to {OPSETS[-1]} are "
            f"known here"
        )
    return _Builder(file).built()


def inputs_of(graph: Any) -> list[Input]:
    """The inputs of a graph that are no weights, with what it says of their shapes."""
    own = {tensor.name for tensor in graph.initializer}
    found = []
    for value in graph.input:
        if value.name in own:
            continue
        kind = value.type.tensor_type
        sides = tuple(
            int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in kind.shape.dim
        )
        shape = sides if kind.HasField("shape") else None
        found.append(Input(value.name, shape, onnx_ops.KINDS.get(kind.elem_type)))
    return found


class _Builder:
    """Reads a graph once, from its first operator to its last."""

    def __init__(self, file: OnnxFile) -> None:
        self.graph, self.opset = file.proto.graph, file.opset
        self.inputs = inputs_of(self.graph)
        first = self.inputs[0].shape if self.inputs else None
        self.run = Run(fixed=first is not None and first[:1] == (1,))
        self.net = OnnxNetwork(self.inputs, self.run)
        self.values: dict[str, Source] = {one.name: Made(one.name) for one in self.inputs}
        self.constants: dict[str, Numbers] = {}
        self.hosts: set[str] = set()  # values that are plain numbers each time
        self.smooth = {one.name for one in self.inputs if _is_real(one.dtype)}
        self.stopped = ""  # the last operator that a gradient did not come through
        self.steps: list[Step] = []
        self.folded = 0  # elements of constants that the graph makes of others
        self.turns: Counter[tuple[str, ...]] = Counter()
        every = [*nodes_of(self.graph.node)]
        self.used = _used(self.graph, every)
        self.wanted = _wanted(every)
        self.measured = _measured(every)
        self.names = Names(every, [tensor.name for tensor in self.graph.initializer])

    def built(self) -> OnnxNetwork:
        """The network."""
        if not self.inputs:
            raise NoFormError("it has no input")
        self._take(self.graph)
        outputs = {value.name: self.values[value.name] for value in self.graph.output}
        smooth = [s for s in outputs.values() if isinstance(s, Made) and s.name in self.smooth]
        if not smooth:
            why = f"its operator {self.stopped!r} has" if self.stopped else "its output has"
            raise NoFormError(f"{why} no gradient")
        self.net.finish(self.steps, outputs)
        self.net.eval()
        return self.net

    def _take(self, graph: Any) -> None:
        for tensor in graph.initializer:
            self._constant(tensor.name, numbers_of(tensor), weight=True)
        if graph.sparse_initializer:
            raise NoFormError("it has sparse weights")
        fuser = Fuser(graph, self._known_numbers)
        fused = fuser.fused()
        for name, value in fuser.made.items():
            self._constant(name, value, weight=True)
        for node in fused:
            self._node(node)

    def _known_numbers(self, name: str) -> Numbers | None:
        if name not in self.constants:  # constants that are nodes have not been read yet
            maker = self._makers().get(name)
            return None if maker is None else numbers_of(maker)
        return self.constants[name]

    def _makers(self) -> dict[str, Any]:
        if not hasattr(self, "_found"):
            self._found = {
                node.output[0]: attribute.t
                for node in nodes_of(self.graph.node)
                if node.op_type == "Constant"
                for attribute in node.attribute
                if attribute.name == "value"
            }
        return self._found

    # ------------------------------------------------------------------------------ constants

    def _constant(self, name: str, value: Numbers, *, weight: bool, scope: str = "") -> None:
        """Keep a constant: as plain numbers, or as a tensor of the network."""
        self.constants[name] = value
        few = value.dtype.kind in "iub" and value.size <= FEW
        if value.ndim == 0 or few or name in self.wanted or value.dtype.kind not in "iubfV":
            self.values[name] = value
            return
        made = _as_tensor(value)
        path = name.split(".") if weight and tuple(name.split(".")[:-1]) in self.names.known else []
        *inside, last = [clean(part) for part in path] or [scope, clean(f"weight_{name}")]
        origin_of = [(part, "") for part in inside if part]
        flat.attach_marks(self.net, origin_of)
        owner = self.net.get_submodule(".".join(part for part, _ in origin_of))
        turn, called = 0, last
        while hasattr(owner, called):
            turn += 1
            called = f"{last}_{turn}"
        if weight and made.is_floating_point() and name not in self.measured:
            owner.register_parameter(called, torch.nn.Parameter(made))
        else:
            owner.register_buffer(called, made)
        self.values[name] = Weight(owner, called)

    # ------------------------------------------------------------------------------ operators

    def _node(self, proto: Any) -> None:
        attributes = _attributes(proto)
        if proto.op_type == "Constant":
            self._constant(proto.output[0], _value(attributes), weight=False)
            return
        if proto.op_type == "If":
            self._if(proto)
            return
        names = list(proto.input)
        if proto.op_type == "Identity" and names[0] not in self.smooth:
            self._same(proto.output[0], names[0])
            return
        node = self._described(proto, attributes)
        sources = [self.values[name] if name else None for name in names]
        shape = proto.op_type in _SHAPES
        if shape and isinstance(sources[0], Weight):
            sources = [self.constants[names[0]]]
        plain = [s is None or isinstance(s, np.ndarray) for s in sources]
        host = [p or name in self.hosts for p, name in zip(plain, names, strict=True)]
        if all(plain) and proto.op_type in NUMBERS:
            self._fold(proto, node, sources)
        elif shape or (all(host) and proto.op_type in NUMBERS):
            self._add(Step(OnNumbers(node), sources, list(proto.output)), host=True)
        else:
            self._operator(proto, node, sources)

    def _described(self, proto: Any, attributes: Mapping[str, Any]) -> Node:
        kinds = {n: self.values.get(name) for n, name in enumerate(proto.input)}
        weights = {n for n, s in kinds.items() if isinstance(s, Weight)}
        constant = weights | {n for n, s in kinds.items() if isinstance(s, np.ndarray)}
        last = max((n for n, name in enumerate(proto.output) if name in self.used), default=0)
        present = tuple(n for n, name in enumerate(proto.input) if name)
        return Node(
            proto.op_type,
            {**attributes, "_present": present},
            self.opset,
            self.run,
            last + 1,
            frozenset(weights),
            frozenset(constant),
        )

    def _same(self, new: str, old: str) -> None:
        self.values[new] = self.values[old]
        if old in self.constants:
            self.constants[new] = self.constants[old]
        if old in self.hosts:
            self.hosts.add(new)

    def _fold(self, proto: Any, node: Node, sources: list[Source]) -> None:
        made = given(node, sources)
        several = made if isinstance(made, tuple) else (made,)
        self.folded += sum(np.size(value) for value in several)
        if self.folded > MOST:
            raise ModelError(
                f"expected an ONNX network whose constants have at most {MOST} elements, got one "
                f"that makes more."
            )
        for name, value in zip(proto.output, several, strict=False):
            if name:
                self._constant(name, np.asarray(value), weight=False)

    def _if(self, proto: Any) -> None:
        condition = self.values[proto.input[0]]
        if not isinstance(condition, np.ndarray):
            raise NoFormError("its operator 'If' has a condition that depends on the scan")
        word = "then_branch" if bool(scalar(condition)) else "else_branch"
        branch = next(a.g for a in proto.attribute if a.name == word)
        self._take(branch)
        for new, old in zip(proto.output, branch.output, strict=True):
            self.values[new] = self.values[old.name]
            for known in (self.hosts, self.smooth):
                if old.name in known:
                    known.add(new)
            if old.name in self.constants:
                self.constants[new] = self.constants[old.name]

    def _operator(self, proto: Any, node: Node, sources: list[Source]) -> None:
        form = onnx_ops.FORMS.get(proto.op_type)
        if form is None or any(True for _ in graphs_of(proto)):
            raise NoFormError(f"its operator {proto.op_type[:60]!r} has no form in torch here")
        if why := onnx_ops.refusal(node):
            raise node.no_form(why)
        self._follow_gradient(proto, node)
        found = self.names.origin(proto)
        flat.attach_marks(self.net, found)
        scope = tuple(name for name, _ in found)
        word = self._word(proto)
        module = flat.op(word, OnTensors(node, form))
        turn = self.turns[(*scope, word)]
        self.turns[(*scope, word)] += 1
        called = f"{word}_{turn}" if turn else word  # at once: flat.attach tries one by one
        flat.attach(self.net, (*scope, called), module)
        outputs = list(proto.output)[: node.outputs]
        self._add(Step(module, sources, outputs, scope), host=False)

    def _word(self, proto: Any) -> str:
        """What torch calls an operator, conv3d; it becomes a class and a module's name."""
        word = snake(proto.op_type)
        if proto.op_type in _WINDOWED and proto.input[1] in self.constants:
            return f"{word}{self.constants[proto.input[1]].ndim - 2}d"
        return word

    def _follow_gradient(self, proto: Any, node: Node) -> None:
        reached = any(name in self.smooth for name in proto.input)
        to_whole = node.op == "Cast" and not _is_real(onnx_ops.KINDS.get(int(node.get("to", 1))))
        if node.op in onnx_ops.NO_GRADIENT or to_whole:
            self.stopped = node.op if reached else self.stopped
        elif reached:
            self.smooth.update(name for name in proto.output if name)

    def _add(self, step: Step, *, host: bool) -> None:
        self.steps.append(step)
        for name in step.outputs:
            if name:
                self.values[name] = Made(name)
                if host:
                    self.hosts.add(name)


def _is_real(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.is_floating_point


def _as_tensor(value: Numbers) -> torch.Tensor:
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
    try:
        return torch.from_numpy(np.array(value))
    except TypeError as error:
        raise NoFormError(f"it has weights of the kind {value.dtype.name}") from error


def _attributes(proto: Any) -> dict[str, Any]:
    return {attribute.name: _attribute(attribute) for attribute in proto.attribute}


def _attribute(attribute: Any) -> Any:
    """An attribute as Python has it; graphs stay what they are."""
    kind = attribute.type
    if kind == 4:
        return numbers_of(attribute.t)
    if kind == 3:
        return attribute.s.decode(errors="replace")
    if kind == 8:
        return [one.decode(errors="replace") for one in attribute.strings]
    single = {1: "f", 2: "i", 5: "g"}
    several = {6: "floats", 7: "ints"}
    if kind in single:
        return getattr(attribute, single[kind])
    return list(getattr(attribute, several[kind])) if kind in several else attribute


def _value(attributes: Mapping[str, Any]) -> Numbers:
    """What a Constant holds."""
    if "value" in attributes:
        return np.asarray(attributes["value"])
    for name, kind in (("value_int", np.int64), ("value_ints", np.int64)):
        if name in attributes:
            return np.asarray(attributes[name], dtype=kind)
    for name in ("value_float", "value_floats"):
        if name in attributes:
            return np.asarray(attributes[name], dtype=np.float32)
    raise NoFormError("its operator 'Constant' holds texts or sparse numbers")


def _used(graph: Any, every: list[Any]) -> set[str]:
    """The values that anything reads."""
    found = {value.name for value in graph.output}
    for node in every:
        found.update(node.input)
        for inner in graphs_of(node):
            found.update(value.name for value in inner.output)
    return found


def _measured(every: list[Any]) -> set[str]:
    """Means and variances of batch norms, which torch does not learn."""
    norms = [node for node in every if node.op_type == "BatchNormalization"]
    return {name for node in norms for name in node.input[3:]}


def _wanted(every: list[Any]) -> set[str]:
    """The values that are asked for as plain numbers, however far back they come from."""
    wanted: set[str] = set()
    for node in reversed(every):
        if node.op_type in onnx_ops.HOSTS and node.op_type not in onnx_ops.EITHER:
            at = onnx_ops.HOSTS[node.op_type]
            wanted.update(name for n, name in enumerate(node.input) if n in at)
        if wanted.intersection(node.output):
            wanted.update(_leading_to(node))
    return wanted


def _leading_to(node: Any) -> Iterator[str]:
    if node.op_type in NUMBERS and node.op_type not in _SHAPES:
        yield from node.input
    for inner in graphs_of(node):
        yield from (value.name for value in inner.output)
