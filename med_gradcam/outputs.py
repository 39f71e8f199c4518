"""Which part of what a network puts out is meant: its first tensor, or the one at a path?

A path is written as in Python: `logits`, `[0]`, `a[1].b`, `["a key"]`. Keys are those of a dict, a
named tuple or a dataclass, numbers those of a tuple or list; a tensor is never indexed.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError

if TYPE_CHECKING:
    import torch

_STEP = re.compile(r"""\.?([A-Za-z_]\w*)|\[(-?\d+)\]|\[(["'])(.*?)\3\]""")
_SHOWN = 8  # tensors that an error lists
_NOTHING = object()


def select(output: object, path: str) -> object:
    """The part of a raw output at a path; the whole output for the empty path.

    Raises:
        UsageError: it is no path.
        UnknownNameError: nothing is there; the tensors that are there are named.
    """
    found, at = output, 0
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            raise UsageError(
                f"expected the place of an output such as logits, [0] or a[1].b, got {path!r}."
            )
        key = step[1] or step[4] if step[2] is None else int(step[2])
        found = _taken(found, key)
        if found is _NOTHING:
            known = [name for name, _ in tensors(output) if name]
            raise UnknownNameError("output", path, known, f"The network puts out {what(output)}.")
        at = step.end()
    return found


def _taken(value: object, key: str | int) -> object:
    if isinstance(value, Mapping):
        return value.get(key, _NOTHING)
    if isinstance(key, int):
        inside = isinstance(value, (tuple, list)) and -len(value) <= key < len(value)
        return value[key] if inside and isinstance(value, (tuple, list)) else _NOTHING
    return getattr(value, key) if key in _fields(value) else _NOTHING


def _fields(value: object) -> tuple[str, ...]:
    """The names of a named tuple or a dataclass; none for anything else."""
    if dataclasses.is_dataclass(value):
        return tuple(f.name for f in dataclasses.fields(value))
    return tuple(getattr(value, "_fields", ())) if isinstance(value, tuple) else ()


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """What a container holds, each with its step of a path."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            plain = isinstance(key, str) and key.isidentifier()
            yield (f".{key}" if plain else f"[{key!r}]"), part
    elif _fields(value):
        for name in _fields(value):
            yield f".{name}", getattr(value, name)
    elif isinstance(value, (tuple, list)):
        for n, part in enumerate(value):
            yield f"[{n}]", part


def tensors(output: object) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a raw output with their paths, in order."""
    for path, tensor in _walk(output):
        yield path.removeprefix("."), tensor


def _walk(output: object) -> Iterator[tuple[str, torch.Tensor]]:
    if is_tensor(output):
        yield "", output  # type: ignore[misc]
    for step, part in _parts(output):
        for rest, tensor in _walk(part):
            yield step + rest, tensor


def is_tensor(value: object) -> bool:
    """Whether this is a tensor, without importing torch for it."""
    return hasattr(value, "logsumexp")


def what(output: object) -> str:
    """The tensors of a raw output for people: "logits (1, 2), features[0] (1, 64, 4, 4, 4)"."""
    found = [(name, tuple(tensor.shape)) for name, tensor in tensors(output)]
    if [name for name, _ in found] == [""]:
        return f"one tensor {found[0][1]} and nothing else"
    listed = ", ".join(f"{name} {shape}" for name, shape in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return listed + more if listed else f"no tensor, but {type(output).__name__}"


def first_tensor(output: object, path: str = "") -> torch.Tensor:
    """The tensor at a path of a raw output, or the first of the tuple, list or dict there.

    Of maps of one kind and several sizes it is the largest.

    Raises:
        CannotExplainError: there is no tensor.
        UsageError: there is no such path.
    """
    first = select(output, full_resolution(output, path))
    while isinstance(first, (tuple, list, dict)) and len(first) > 0:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    if not is_tensor(first):
        raise CannotExplainError(
            "output",
            f"expected the network to return a tensor, got {type(output).__name__} that begins "
            f"with {type(first).__name__}; it holds {what(output)}. Name an output by its place.",
        )
    tensor: torch.Tensor = first  # type: ignore[assignment]
    return tensor


def full_resolution(output: object, path: str = "") -> str:
    """The path of what is meant by one that leads to several maps: deep supervision.

    A list of maps (B, K, i, j, k) of one K and of several sizes: that of the largest, the first of
    them where several are as large. Anything else: the path itself.
    """
    part, at = select(output, path), path
    while isinstance(part, (tuple, list, dict)) and len(part) > 0 and not _heads(part):
        step, part = next(_parts(part))
        at += step
    if not _heads(part):
        return path
    sizes = [(step, one.numel()) for step, one in _parts(part) if is_tensor(one)]  # type: ignore[attr-defined]
    step = max(sizes, key=lambda pair: pair[1])[0]
    return (at + step).removeprefix(".")


def _heads(value: object) -> bool:
    """Whether this holds maps of one number of channels and of several sizes, and nothing else."""
    if not isinstance(value, (tuple, list, dict)) or len(value) < 2:
        return False
    parts: list[Any] = [part for _, part in _parts(value)]
    if not all(is_tensor(part) and part.ndim == 5 for part in parts):
        return False
    one_kind = len({part.shape[:2] for part in parts}) == 1
    return one_kind and len({part.shape[2:] for part in parts}) > 1


def batch_size(output: object) -> int:
    """Items of a raw output: the length of its first tensor; 1 where there is none."""
    first = next(tensors(output), None)
    return 1 if first is None or first[1].ndim == 0 else int(first[1].shape[0])


def changed(output: Any, change: Callable[[Any], Any]) -> Any:
    """A raw output with every tensor changed; what holds them stays of its kind."""
    if is_tensor(output):
        return change(output)
    if isinstance(output, Mapping):
        one: Any = copy.copy(output)
        for key, part in output.items():
            one[key] = changed(part, change)
        return one
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = {name: changed(getattr(output, name), change) for name in _fields(output)}
        return dataclasses.replace(output, **parts)
    if isinstance(output, (tuple, list)):
        listed = [changed(part, change) for part in output]
        return type(output)(*listed) if hasattr(output, "_fields") else type(output)(listed)
    return output


def item(output: Any, n: int, count: int) -> Any:
    """Item `n` of a raw output of `count` items, as the network would give it for that one."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[n : n + 1] if tensor.ndim > 0 and tensor.shape[0] == count else tensor

    return changed(output, one)
