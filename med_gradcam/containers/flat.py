"""How does a flat list of operations become modules that have names and hooks?

Each operation is a module of its own. The modules that the source once had come back as marks: a
mark passes the last value of its part on unchanged, under the name that the module had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from med_gradcam.outputs import changed

Path = tuple[str, ...]


class Op(torch.nn.Module):
    """One operation as a module; its class is named after the operation (Conv3d, MaxPool3d).

    `inner`: the source's own modules came back as marks, and this is a part of one: it can be
    named, but is no layer that its author would have called one.
    """

    inner = False

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the operation gives."""
        return self.function(*args, **kwargs)


class Mark(torch.nn.Module):
    """The end of a part of the network that was a module in its source."""

    def forward(self, value: Any) -> Any:
        """The part's output, unchanged."""
        return value


def op(name: str, function: Callable[..., Any]) -> Op:
    """An operation such as conv3d as a module of the class Conv3d."""
    kind = "".join(part[:1].upper() + part[1:] for part in name.strip("_").split("_"))
    made: Op = _named(Op, kind)(function)
    return made


def mark(kind: str) -> Mark:
    """A mark whose class has the name of the class in the source."""
    made: Mark = _named(Mark, kind or "Mark")()
    return made


def _named(base: type[torch.nn.Module], name: str) -> Any:
    return type(name, (base,), {"__doc__": base.__doc__, "__module__": base.__module__})


def attach(root: torch.nn.Module, path: Sequence[str], module: torch.nn.Module) -> str:
    """Put a module at a path below `root`, under a free name; returns its dotted path.

    What is missing on the way becomes a mark; what is there keeps its place.
    """
    owner = root
    for part in path[:-1]:
        if part not in owner._modules:
            owner.add_module(part, mark(""))
        owner = owner.get_submodule(part)
    name, turn = path[-1], 0
    while name in owner._modules or hasattr(owner, name):
        turn += 1
        name = f"{path[-1]}_{turn}"
    owner.add_module(name, module)
    return ".".join((*path[:-1], name))


def attach_marks(root: torch.nn.Module, origin: Sequence[tuple[str, str]]) -> None:
    """Put the marks of an operation's modules, (name, class) outermost first, below `root`."""
    owner = root
    for name, kind in origin:
        if name not in owner._modules:
            owner.add_module(name, mark(kind))
        owner = owner.get_submodule(name)


class Where:
    """Which device a program means where it names one: the network's, should it have moved.

    A program holds the device on which it was made as a constant.
    """

    def __init__(self) -> None:
        self._net: torch.nn.Module | None = None
        self._home = ""

    def watch(self, net: torch.nn.Module) -> None:
        """The network, on the device where its program was made."""
        self._net, self._home = net, self._now(net)

    def __call__(self, named: torch.device) -> torch.device:
        """The device instead of one that the program names."""
        if self._net is None or named.type != torch.device(self._home or named).type:
            return named
        return torch.device(self._now(self._net) or named)

    @staticmethod
    def _now(net: torch.nn.Module) -> str:
        first = next(net.parameters(), None)
        return "" if first is None else str(first.device)


@contextmanager
def listening(net: torch.nn.Module, given: list[Any]) -> Iterator[None]:
    """While an opened network runs, `given` takes what arrives, other inputs included."""
    net.__dict__["_heard"] = given
    try:
        yield
    finally:
        net.__dict__.pop("_heard")


def heard(net: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """Note what arrives at an opened network, where somebody listens."""
    waiting = net.__dict__.get("_heard")
    if waiting is not None:
        waiting.append(changed((args, kwargs), torch.clone))


def within_marks(root: torch.nn.Module) -> None:
    """Say of a network's operations that they are parts, where marks are there to be the layers."""
    modules = [*root.modules()]
    if any(isinstance(module, Mark) for module in modules):
        for module in modules:
            if isinstance(module, Op):
                module.inner = True


def closed(made: Op, marks: Sequence[torch.nn.Module]) -> Callable[..., Any]:
    """An operation that is the last one of some parts, followed by their marks."""
    if not marks:
        return made

    def run(*args: Any, **kwargs: Any) -> Any:
        value = made(*args, **kwargs)
        for one in marks:
            value = one(value)
        return value

    return run


def closing(scopes: Sequence[Path]) -> list[list[Path]]:
    """For each operation, the parts of the network that end with it, innermost first.

    `scopes`: the part that each operation belongs to, in the order in which they run. A part that
    is entered again is ended again: it runs twice, as its module did.
    """
    ends: list[list[Path]] = []
    for n, scope in enumerate(scopes):
        following = scopes[n + 1] if n + 1 < len(scopes) else ()
        same = 0
        for own, other in zip(scope, following, strict=False):
            if own != other:
                break
            same += 1
        ends.append([scope[:depth] for depth in range(len(scope), same, -1)])
    return ends
