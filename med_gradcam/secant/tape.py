"""What is written down of a network's run: its operations, what each took in and put out.

A value has a number from 0 (the network's input) upwards. Operations behind a layer are active:
they also keep the values that their rules will need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

aten = torch.ops.aten
NOTHING = -1  # the number of a tensor that does not depend on the input
Step = tuple[Any, tuple[int, ...], tuple[int, ...]]


def where_in_memory(tensor: torch.Tensor) -> Any:
    """Where a tensor's elements lie; None for tensors that have no plain memory."""
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride()
    except (RuntimeError, NotImplementedError):  # sparse, nested
        return None


class Seen:
    """A tensor argument as it was: its number, shape and, where kept, its value."""

    __slots__ = ("__weakref__", "_where", "device", "dtype", "number", "shape", "value")

    def __init__(
        self,
        number: int,
        of: tuple[torch.Size, torch.dtype, torch.device],
        value: torch.Tensor | None = None,
    ) -> None:
        self.number = number
        self.shape, self.dtype, self.device = of
        self.keep(value)

    @classmethod
    def like(cls, number: int, tensor: torch.Tensor, *, keep: bool = False) -> Seen:
        """A tensor that is there."""
        # Nested tensors have no one shape; no rule takes them, so none is missed.
        one = cls.__new__(cls)
        one.number, one.dtype, one.device = number, tensor.dtype, tensor.device
        one.shape = torch.Size(()) if tensor.is_nested else tensor.shape
        one.keep(tensor if keep else None)
        return one

    def keep(self, value: torch.Tensor | None) -> None:
        """This is the value."""
        self.value = value
        self._where = None if value is None else where_in_memory(value)

    @property
    def moved(self) -> bool:
        """Whether the tensor that was kept has been given other memory (`a.data = b`)."""
        return self.value is not None and self._where != where_in_memory(self.value)

    @property
    def working(self) -> torch.dtype:
        """What a rule computes in: half precision is too coarse for differences."""
        return torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype

    def of(self) -> torch.Tensor:
        """The value, or zeros of its shape where only that counts."""
        if self.value is not None:
            return self.value.to(self.working)
        return torch.zeros((), dtype=self.working, device=self.device).expand(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One operation behind a layer: its overload and arguments, the numbers of what it put out.

    Tensors among the arguments are Seen; `tensors` are these in order, `kept` the outputs for a
    rule that asks for them. `known`: the operation has a rule for these arguments.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[Seen, ...]
    outs: tuple[int, ...]
    known: bool = True
    kept: tuple[Seen, ...] = ()


def put(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with each leaf changed; lists and tuples keep their form."""
    if not isinstance(value, (tuple, list)):
        return change(value)
    if _sizes(value):
        return value
    return type(value)([put(item, change) for item in value])


def _sizes(value: Any) -> bool:
    """Whether this is a list of sizes or the like, with no tensor among them."""
    return type(value) is list and bool(value) and type(value[0]) is int


def tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among arguments or outputs, in order."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)) and not _sizes(value):
            found.extend(tensors(value))
    return found


def name_of(func: Any) -> str:
    """An operation's name as a message says it: aten::add."""
    return str(getattr(func, "overloadpacket", func)).replace(".", "::")


@dataclass(slots=True)
class Tape:
    """What was written down.

    `flow`: every operation that depends on the input, with the numbers of its tensors in and out;
    `entries`: the active ones with their values. `roots`: the numbers of the layers' outputs;
    `output`: that of the score. `choices`: numbers of masks, places and the like that an active
    value was turned into, and the operation that did so; `reads`: operations that handed a value
    to Python.
    """

    flow: list[Step] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    roots: dict[str, int] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)
    choices: dict[int, str] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    numbers: int = 0
    output: int = NOTHING

    def number(self, *, active: bool) -> int:
        """A number for a new value."""
        self.numbers += 1
        if active:
            self.active.add(self.numbers - 1)
        return self.numbers - 1

    def step(self, func: Any, ins: Sequence[int], floats: Sequence[bool]) -> tuple[int, ...]:
        """One more operation; the numbers of what it puts out (`floats`: which ones are floats)."""
        active = not self.active.isdisjoint(ins)
        first, self.numbers = self.numbers, self.numbers + len(floats)
        outs = tuple(range(first, self.numbers))
        if active:
            self.active.update(n for n, is_float in zip(outs, floats, strict=True) if is_float)
        if not (active and all(floats)):
            choice = name_of(func) if active else self._choice(ins)
            if choice is not None:
                self.choices.update((n, choice) for n in outs if n not in self.active)
        if not outs and func._schema.returns:  # noqa: SLF001 - an assertion gives nothing back
            self.reads.append(name_of(func))
        self.flow.append((func, tuple(ins), outs))
        return outs

    def _choice(self, ins: Sequence[int]) -> str | None:
        if not self.choices:
            return None
        return next((self.choices[n] for n in ins if n in self.choices), None)

    def passes_by(self, layers: Sequence[str]) -> bool:
        """Whether a path leads from the input to the score that avoids all these layers."""
        blocked = {self.roots[name] for name in layers}
        reached = {0} - blocked
        for _, ins, outs in self.flow:
            if not reached.isdisjoint(ins):
                reached.update(n for n in outs if n not in blocked)
        return self.output in reached
