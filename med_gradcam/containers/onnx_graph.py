"""How does an ONNX graph become an eager network, with names, hooks and the source's layers?

Each operator that works on tensors becomes a module; the modules of the source come back as marks.
Arithmetic on shapes stays outside of torch. The steps are run one after the other: no code is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from med_gradcam.containers import flat
from med_gradcam.containers.onnx_names import clean
from med_gradcam.containers.onnx_node import Form, Node, Numbers, Run, tensor
from med_gradcam.containers.onnx_numbers import given
from med_gradcam.containers.onnx_ops import call


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A tensor of the file, where it lies in the network."""

    owner: torch.nn.Module
    name: str

    def read(self) -> torch.Tensor:
        """The tensor that is there now."""
        found: torch.Tensor = getattr(self.owner, self.name)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A value that an operator makes, or an input, by its name."""

    name: str


Source = Weight | Made | Numbers | None  # where an argument comes from


@dataclass(frozen=True, slots=True, eq=False)
class OnTensors:
    """An operator in torch."""

    node: Node
    form: Form

    def __call__(self, *args: Any) -> Any:
        """What it gives."""
        return call(self.node, self.form, list(args))


@dataclass(frozen=True, slots=True, eq=False)
class OnNumbers:
    """An operator on plain numbers."""

    node: Node

    def __call__(self, *args: Any) -> Any:
        """What it gives."""
        return given(self.node, args)


@dataclass(slots=True, eq=False)
class Step:
    """One operator of the network in its turn.

    `scope`: the module of the source that it belongs to; `marks`: values that are the end of such
    a module once the step has run; `over`: values that nobody reads after it.
    """

    act: Callable[..., Any]
    sources: Sequence[Source]
    outputs: Sequence[str]
    scope: flat.Path | None = None
    marks: list[tuple[str, torch.nn.Module]] = field(default_factory=list)
    over: list[str] = field(default_factory=list)

    def reads(self) -> list[str]:
        """The values that it takes."""
        return [source.name for source in self.sources if isinstance(source, Made)]

    def run(self, values: dict[str, Any]) -> None:
        """Do it."""
        made = self.act(*[_read(source, values) for source in self.sources])
        several = made if isinstance(made, (tuple, list)) else (made,)
        values.update(zip(self.outputs, several, strict=False))
        for name, mark in self.marks:
            values[name] = mark(values[name])
        for name in self.over:
            values.pop(name, None)


def _read(source: Source, values: Mapping[str, Any]) -> Any:
    if isinstance(source, Made):
        return values[source.name]
    return source.read() if isinstance(source, Weight) else source


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph; `dtype` None: as it comes."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None


class OnnxNetwork(torch.nn.Module):
    """A network from an ONNX file, operator by operator.

    Takes the graph's inputs by their place or their name. Puts out one tensor, or a dict of those
    that the graph puts out.
    """

    def __init__(self, inputs: Sequence[Input], run: Run) -> None:
        super().__init__()
        self._inputs, self._run = tuple(inputs), run
        self._steps: list[Step] = []
        self._outputs: dict[str, Source] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph gives."""
        flat.heard(self, args, kwargs)
        values = self._arguments(args, kwargs)
        for step in self._steps:
            step.run(values)
        out = {
            name: tensor(_read(source, values), self._run.device)
            for name, source in self._outputs.items()
        }
        return next(iter(out.values())) if len(out) == 1 else out

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self._inputs):
            raise TypeError(f"expected {len(self._inputs)} inputs, got {len(args)}")
        by_place = dict(zip((one.name for one in self._inputs), args, strict=False))
        values = {}
        for one in self._inputs:
            value = by_place.get(one.name, kwargs.get(one.name, kwargs.get(clean(one.name))))
            if value is None:
                raise TypeError(f"expected the input {one.name!r}, it was not given")
            same = one.dtype is None or not isinstance(value, torch.Tensor)
            values[one.name] = value if same else value.to(one.dtype)
        first = values[self._inputs[0].name]
        self._run.device = first.device
        self._run.scans = int(first.shape[0]) if first.ndim else 1
        return values

    def finish(self, steps: Sequence[Step], outputs: Mapping[str, Source]) -> None:
        """The steps in their order and the outputs, once all is known; marks are set here."""
        self._steps, self._outputs = list(steps), dict(outputs)
        last = self._last_uses()
        self._set_marks(last)
        kept = {source.name for source in outputs.values() if isinstance(source, Made)}
        for name, n in last.items():
            if name not in kept and 0 <= n < len(steps):
                self._steps[n].over.append(name)

    def _last_uses(self) -> dict[str, int]:
        """For each value the step that reads it last; that of the outputs is behind all."""
        last: dict[str, int] = {}
        for n, step in enumerate(self._steps):
            for name in (*step.outputs, *step.reads()):
                if name:
                    last[name] = n
        for source in self._outputs.values():
            if isinstance(source, Made):
                last[source.name] = len(self._steps)
        return last

    def _set_marks(self, last: Mapping[str, int]) -> None:
        """Let each module of the source end with a mark on the value that leaves it."""
        at = [n for n, step in enumerate(self._steps) if step.scope is not None]
        scopes = [self._steps[n].scope or () for n in at]
        begun: dict[flat.Path, int] = {}
        before: flat.Path = ()
        for turn, (scope, ends) in enumerate(zip(scopes, flat.closing(scopes), strict=True)):
            for depth in range(1, len(scope) + 1):
                if before[:depth] != scope[:depth]:
                    begun[scope[:depth]] = turn
            before = scope
            end = at[turn]
            for path in ends:
                made = [name for n in at[begun[path] : turn + 1] for name in self._steps[n].outputs]
                leaving = [name for name in made if name and last[name] > end]
                if leaving:
                    mark = self.get_submodule(".".join(path))
                    self._steps[end].marks.append((leaving[-1], mark))
