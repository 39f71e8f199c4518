"""Which network is inside what the caller handed in, as eager modules?"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from med_gradcam.containers import exported, flat, program_facts, script
from med_gradcam.errors import ModelError
from med_gradcam.outputs import tensors

_COMPILED = "OptimizedModule"  # what torch.compile returns; by name, its own module loads slowly
_WRAPPERS = {
    _COMPILED: "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}
_PROGRAM = "ExportedProgram"
CLOSE = 1e-4  # share of the largest output by which an opened network may differ from its source
# The input shapes for which an opened network gave the same as its source.
_CHECKED: weakref.WeakKeyDictionary[torch.nn.Module, set[Any]] = weakref.WeakKeyDictionary()
_PROGRAMS: weakref.WeakKeyDictionary[Any, torch.nn.Module] = weakref.WeakKeyDictionary()


def opened(net: object) -> object:
    """The network as eager modules, whose hooks fire; anything else as it is.

    Inside torch.compile's and DataParallel's wrappers, TorchScript, torch.export; also where such a
    program is a part of an eager network.
    """
    inner = _unwrapped(net)
    if not isinstance(inner, torch.nn.Module):
        return inner
    if _is_program(inner):
        return _opened(inner)
    return _with_parts_opened(inner)


def _unwrapped(net: object) -> object:
    kind = type(net).__name__
    while isinstance(net, torch.nn.Module) and kind in _WRAPPERS:
        net = net.get_submodule(_WRAPPERS[kind])
        kind = type(net).__name__
    if kind == _PROGRAM and hasattr(net, "module"):
        if net not in _PROGRAMS:
            _PROGRAMS[net] = net.module()
        return _PROGRAMS[net]
    return net


def _is_program(net: torch.nn.Module) -> bool:
    return isinstance(net, torch.jit.ScriptModule) or exported.is_exported(net)


def _opened(net: torch.nn.Module) -> torch.nn.Module:
    if isinstance(net, torch.jit.ScriptModule):
        return script.opened(net)
    return exported.opened(net)  # type: ignore[arg-type]


def _with_parts_opened(net: torch.nn.Module) -> torch.nn.Module:
    """An eager network whose programs, if it has any among its parts, are opened in a copy.

    The copy shares everything else with the network, which stays as it is.
    """
    if not any(_is_program(module) for module in net.modules()):
        return net
    made = copy.copy(net)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        made.__dict__[name] = copy.copy(net.__dict__[name])
    made.__dict__["_modules"] = {name: _part(child) for name, child in net._modules.items()}
    return made


def _part(child: torch.nn.Module | None) -> torch.nn.Module | None:
    if child is None:
        return None
    return _opened(child) if _is_program(child) else _with_parts_opened(child)


def why_closed(net: torch.nn.Module) -> str:
    """Why a program cannot be opened and runs whole; empty for every other network.

    It is known after the first run; nothing but the input of such a network can be explained.
    """
    return net.closed if isinstance(net, script.Mirror) else ""


def check_same(net: torch.nn.Module, x: torch.Tensor) -> float:
    """Make sure that an opened network gives what its source gives for `x`; once per shape.

    Where a network holds programs as parts, each is looked at, with what arrives at it. After this
    each program is known to be open or closed, so that every later run of it is the same.
    Returns the forwards that this took.

    Raises:
        ModelError: their outputs differ.
    """
    shape = tuple(x.shape)
    parts = [p for p in _programs(net) if shape not in _CHECKED.setdefault(p, set())]
    if not parts:
        return 0.0
    heard: list[list[Any]] = [[] for _ in parts]
    gave: list[list[Any]] = [[] for _ in parts]
    with torch.no_grad(), contextlib.ExitStack() as listens:
        for part, given, out in zip(parts, heard, gave, strict=True):
            listens.enter_context(flat.listening(part, given))
            listens.callback(part.register_forward_hook(_keeping(out)).remove)
        net(x.clone())
    for part, given, out in zip(parts, heard, gave, strict=True):
        if given and not why_closed(part):
            args, kwargs = given[0]
            _check_part(part, args, kwargs, out[0])
            _CHECKED[part].add(shape)
    return 2.0


def _programs(net: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The opened programs in a network, not those within one another."""
    if _has_source(net):
        yield net
        return
    for child in net.children():
        yield from _programs(child)


def _keeping(out: list[Any]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: Any, made: Any) -> None:
        del module, args
        out.append([t.clone() for _, t in tensors(made)])  # a later part may write into it

    return hook


def _check_part(part: torch.nn.Module, args: Any, kwargs: Any, ours: list[torch.Tensor]) -> None:
    with torch.no_grad():
        theirs = [t for _, t in tensors(_source_gives(part, args, kwargs))]
    far = max(map(_apart, ours, theirs), default=0.0) if len(ours) == len(theirs) else 1.0
    if far <= max([CLOSE, *map(_rounding, theirs)]):
        return
    if program_facts.in_training(part):
        raise ModelError(
            "expected a program of a network in eval mode, it was made in training mode: its "
            "dropout is always on; call net.eval() and export or trace it again."
        )
    raise ModelError(
        f"expected the opened network to give what its program gives, its output differs by "
        f"{far:.2g} of the largest; load the network from its weights and its Python class."
    )


def _rounding(value: torch.Tensor) -> float:
    """What the steps of a coarse dtype may add up to: 0.02 for float16."""
    return 20 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0


def _has_source(net: torch.nn.Module) -> bool:
    return isinstance(net, script.Mirror) or "_program" in net.__dict__


def _source_gives(net: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    if isinstance(net, script.Mirror):
        return net.whole(*args, **kwargs)
    return net.__dict__["_program"](*args, **kwargs)


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return 1.0
    size = float(theirs.double().abs().max()) if theirs.numel() else 0.0
    return float((ours.double() - theirs.double()).abs().max()) / max(size, 1e-12) if size else 0.0
