"""Which value does a tensor hold now, when its memory may have been written to in place?

Each memory that was written to has a log of the writes. A tensor's value is the one it was made
with, with the later writes that overlap it put on top; it is worked out when the tensor is used.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from med_gradcam.secant.tape import NOTHING, where_in_memory

Place = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """A value of this number was written into part of a memory."""

    place: Place
    dtype: torch.dtype
    number: int


@dataclass(slots=True, eq=False)
class _Log:
    """The writes to one memory. `memory`, a weak reference, keeps its address from being reused."""

    memory: StorageWeakRef
    writes: list[Write] = field(default_factory=list)


def _start(tensor: torch.Tensor) -> int | None:
    """Where a tensor's memory begins: all that most tensors, the weights, are asked for."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


def place(tensor: torch.Tensor) -> Place:
    """Where a tensor's elements lie in its memory."""
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def address(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in; 0 for tensors that have none of the plain kind."""
    try:
        return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - which memory, no more
    except NotImplementedError:  # sparse
        return 0


def overlap(base: Place, view: Place) -> torch.Tensor:
    """For each element of `view` its place in the flattened `base`, -1 where it lies outside."""
    if base == view:
        return torch.arange(base_count(base)).reshape(view[0])
    where, at = _offsets(base), _offsets(view)
    size = int(max([0, *(int(o.max()) + 1 for o in (where, at) if o.numel())]))
    places = torch.full((size,), -1, dtype=torch.long)
    places[where] = torch.arange(where.numel())
    return places[at].reshape(view[0])


def base_count(base: Place) -> int:
    """How many elements lie there."""
    return int(torch.Size(base[0]).numel())


def _offsets(where: Place) -> torch.Tensor:
    shape, strides, offset = where
    at = torch.full((1,), offset, dtype=torch.long)
    for size, stride in zip(shape, strides, strict=True):
        at = (at[:, None] + stride * torch.arange(size)).flatten()
    return at


def reads_over(given: Sequence[torch.Tensor], target: torch.Tensor) -> bool:
    """Whether an operation that writes to `target` may read what it has already written there."""
    others = list(given)
    del others[next(n for n, tensor in enumerate(others) if tensor is target)]
    if others:
        where = address(target)
        if any(address(tensor) == where for tensor in others):
            return True
    return not target.is_contiguous() and _may_repeat(target)


def _may_repeat(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie in one place."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


class _Number(weakref.ref[torch.Tensor]):
    """A tensor's number, where it lay and how many writes to its memory came before it."""

    __slots__ = ("key", "number", "version", "where")
    key: int
    number: int
    version: int
    where: Any


class Memory:
    """The numbers of tensors and the writes to their memory."""

    def __init__(self) -> None:
        self._numbers: dict[int, _Number] = {}  # by the tensor's id, as long as it lives
        self._at: dict[int, _Number] = {}  # by the place where its memory begins
        self._logs: dict[int, _Log] = {}

    def _forget(self, gone: Any) -> None:
        key: int = gone.key
        if self._numbers.get(key) is gone:
            del self._numbers[key]
        if gone.where is not None:
            start: int = gone.where[0]
            if self._at.get(start) is gone:
                del self._at[start]

    def set(self, tensor: torch.Tensor, number: int) -> None:
        """The tensor holds this value as of now."""
        log = self._logs.get(address(tensor)) if self._logs else None
        one = _Number(tensor, self._forget)
        one.key, one.number, one.version = id(tensor), number, len(log.writes) if log else 0
        one.where = where_in_memory(tensor)
        self._numbers[one.key] = one
        if one.where is not None:
            self._at[one.where[0]] = one

    def find(self, tensor: torch.Tensor) -> tuple[int | None, Sequence[Write]]:
        """The value that the tensor was made with, and what was written to its memory since.

        None: another one with a number may lie there (`a.data` is a tensor of its own, and
        `a.data = b` gives a tensor another one's memory).
        """
        known = self._numbers.get(id(tensor))
        if (
            (_start(tensor) in self._at)
            if known is None
            else (known.where != where_in_memory(tensor))
        ):
            return None, ()
        log = self._logs.get(address(tensor)) if self._logs else None
        if known is None:
            return NOTHING, log.writes if log else ()
        return known.number, log.writes[known.version :] if log else ()

    def write(self, tensor: torch.Tensor, number: int) -> None:
        """The tensor was written to in place and holds this value now."""
        where = address(tensor)
        if where not in self._logs:
            self._logs[where] = _Log(StorageWeakRef(tensor.untyped_storage()))
        self._logs[where].writes.append(Write(place(tensor), tensor.dtype, number))
        self.set(tensor, number)

    def other(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The largest tensor with a number in the same memory."""
        where, found = address(tensor), []
        for known in list(self._numbers.values()):
            one = known()
            if one is not None:
                torch.Tensor._fix_weakref(one)  # type: ignore[attr-defined]  # noqa: SLF001
                if address(one) == where and known.where == where_in_memory(one):
                    found.append(one)
        return max(found, key=torch.Tensor.numel, default=None)
