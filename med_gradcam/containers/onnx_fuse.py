"""Which groups of ONNX operators were one function of torch before they were taken apart?

torch's exporter writes a group norm as an instance norm between two reshapes, and GELU by its
formula. Put together again they are what the rest of the package knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from med_gradcam.containers.onnx_file import package
from med_gradcam.containers.onnx_node import Numbers

Constant = Callable[[str], Numbers | None]


class Fuser:
    """The nodes of a graph, with what makes and what takes each value."""

    def __init__(self, graph: Any, constant: Constant) -> None:
        self.nodes = list(graph.node)
        self.constant = constant
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.takers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in {*node.input}:
                self.takers[name].append(node)
        self.kept = {value.name for value in graph.output}
        self.gone: set[int] = set()
        self.instead: dict[int, Any] = {}
        self.made: dict[str, Numbers] = {}

    def fused(self) -> list[Any]:
        """The nodes, some of them put together; `made` has the constants that this needs."""
        for node in self.nodes:
            if node.op_type == "InstanceNormalization":
                self._group_norm(node)
            elif node.op_type == "Erf":
                self._gelu(node)
        return [
            self.instead.get(id(node), node) for node in self.nodes if id(node) not in self.gone
        ]

    def _only_taker(self, node: Any, *kinds: str) -> Any:
        """The node that alone takes what a node makes, if it is of such a kind."""
        out = node.output[0]
        takers = self.takers[out]
        alone = len(takers) == 1 and out not in self.kept and len(node.output) == 1
        return takers[0] if alone and takers[0].op_type in kinds else None

    def _other(self, node: Any, name: str) -> str:
        """The other one of two inputs."""
        first, second = node.input
        return str(second if first == name else first)

    def _replace(self, nodes: list[Any], new: Any) -> None:
        last = nodes[-1]
        self.gone.update(id(node) for node in nodes[:-1])
        new.name = last.name
        new.metadata_props.extend(last.metadata_props)
        self.instead[id(last)] = new

    # -------------------------------------------------------------------------- group norm

    def _group_norm(self, norm: Any) -> None:
        apart: Any = self.maker.get(norm.input[0])
        scale, bias = map(self.constant, norm.input[1:3])
        if apart is None or apart.op_type != "Reshape" or scale is None or bias is None:
            return
        shape, plain = self.constant(apart.input[1]), (scale == 1).all() and (bias == 0).all()
        grouped = shape is not None and len(shape) == 3 and shape[1] == len(scale)
        if not grouped or shape is None or shape[0] not in (0, 1) or not plain:
            return
        back = self._only_taker(norm, "Reshape")
        if self._only_taker(apart, "InstanceNormalization") is None or back is None:
            return
        chain, ends = [apart, norm, back], ["", ""]
        for turn, kind in enumerate(("Mul", "Add")):
            taker = self._only_taker(chain[-1], kind)
            found = None if taker is None else self._other(taker, chain[-1].output[0])
            value = None if found is None else self.constant(found)
            if taker is None or value is None or not _per_channel(value):
                break
            chain.append(taker)
            ends[turn] = f"{taker.output[0]}.per_channel"
            self.made[ends[turn]] = value.reshape(-1)
        if len(chain) == 4:  # a weight without a bias
            self.made.pop(ends[0])
            chain, ends = chain[:3], ["", ""]
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        new = package().helper.make_node(
            "GroupNormalization",
            [apart.input[0], *ends],
            [chain[-1].output[0]],
            num_groups=len(scale),
            epsilon=epsilon,
        )
        self._replace(chain, new)

    # -------------------------------------------------------------------------------- GELU

    def _gelu(self, erf: Any) -> None:
        """The parts of x / 2 (1 + erf(x / sqrt 2))."""
        before = self.maker.get(erf.input[0])
        if before is None or not self._is_scaled(before) or not self._only_taker(before, "Erf"):
            return
        x = before.input[0]
        plus: Any = self._only_taker(erf, "Add")
        times: Any = None if plus is None else self._only_taker(plus, "Mul")
        half = None if times is None else self._only_taker(times, "Mul")
        if half is None:
            return
        fits = (
            self._is(self._other(plus, erf.output[0]), 1.0)
            and self._other(times, plus.output[0]) == x
            and self._is(self._other(half, times.output[0]), 0.5)
        )
        if fits:
            new = package().helper.make_node("Gelu", [x], [half.output[0]])
            self._replace([before, erf, plus, times, half], new)

    def _is_scaled(self, node: Any) -> bool:
        if node.op_type == "Div":
            return self._is(node.input[1], 2**0.5)
        return node.op_type == "Mul" and self._is(node.input[1], 2**-0.5)

    def _is(self, name: str, wanted: float) -> bool:
        value = self.constant(name)
        one = value is not None and value.size == 1
        return bool(one and np.isclose(np.asarray(value, dtype=float), wanted, rtol=1e-5).all())


def _per_channel(value: Numbers) -> bool:
    """Whether a constant has one number per channel, (C, 1, 1, 1) or (1, C, 1, 1, 1)."""
    shape = value.shape[1:] if value.ndim > 2 and value.shape[0] == 1 else value.shape
    return len(shape) > 1 and value.size == shape[0]
