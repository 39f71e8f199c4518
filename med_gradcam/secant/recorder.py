"""Which operations lie between a network's input and its score, and what did each one take in?

The network runs once, without a graph of autograd; a dispatch mode writes down every operation
that depends on the input, at the level where eager, scripted, traced and exported networks are all
the same few operations. In-place operations are written down as what they do: a new value takes
the tensor's place.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from med_gradcam.secant.memory import Memory, Write, address, overlap, place, reads_over
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.secant.table import Kept, needs
from med_gradcam.secant.tape import NOTHING, Entry, Seen, Tape, aten, put, tensors

# What these put out depends on the shape of their argument only.
_SHAPE_ONLY = frozenset(
    """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones
    new_empty new_full new_empty_strided
    """.split()
)
# What was in their first argument before does not matter.
_OVERWRITE = frozenset("copy fill zero uniform normal random".split())


@dataclass(frozen=True, slots=True)
class _Traits:
    """What an operation does beside computing.

    `targets`: the arguments (place, name) that it writes to; `plain`: the same operation out of
    place, or None.
    """

    targets: tuple[tuple[int, str], ...]
    plain: Any
    shape_only: bool
    overwrites: bool


@cache
def _traits(func: Any) -> _Traits:
    name = func.overloadpacket.__name__
    targets = tuple(
        (n, argument.name)
        for n, argument in enumerate(func._schema.arguments)  # noqa: SLF001 - its own description
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    plain = _out_of_place(func) if len(targets) == 1 else None
    return _Traits(targets, plain, name in _SHAPE_ONLY, name.rstrip("_") in _OVERWRITE)


def _out_of_place(func: Any) -> Any:
    """The form of an in-place operation that takes the same arguments and writes to none."""
    name = func.overloadpacket.__name__
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    if packet is None or func.namespace != "aten":
        return None
    wanted = _arguments(func)
    forms = [getattr(packet, form) for form in packet.overloads()]
    return next((form for form in forms if _arguments(form) == wanted), None)


def _arguments(func: Any) -> list[tuple[str, str]]:
    return [(one.name, str(one.type)) for one in func._schema.arguments]  # noqa: SLF001


Draft = tuple[tuple[Any, ...], dict[str, Any], tuple[Seen, ...], Kept | None]


class Recorder(TorchDispatchMode):
    """Writes the operations on tensors that descend from the input on a tape.

    Behind a layer it keeps what the rules need.
    """

    supports_higher_order_operators = True  # to name them; none has a rule

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be wrapped for torch.compile, which takes two seconds to load."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self._memory = Memory()
        self._kept: dict[int, list[weakref.ref[Seen]]] = {}

    # ------------------------------------------------------------------ what the caller marks

    def leaf(self, tensor: torch.Tensor, *, active: bool) -> int:
        """A value of which nothing before it is written down."""
        number = self.tape.number(active=active)
        self._memory.set(tensor, number)
        return number

    def root(self, name: str, tensor: torch.Tensor, *, fresh: bool) -> None:
        """A layer's output: what follows it keeps its values.

        `fresh`: it is cut off from what came before it, as the leaf of a gradient is.
        """
        before = self.find(tensor)
        # A number of its own: what used the value before the layer ran passes it by.
        if fresh:  # a step for who asks for paths, but no entry that multipliers could go through
            number = self.tape.number(active=True)
            self.tape.flow.append((aten.alias.default, (before,), (number,)))
        else:
            number = self._enter(aten.alias.default, [Seen.like(before, tensor)])
            self.tape.active.add(number)
        self._memory.set(tensor, number)
        self.tape.roots[name] = number

    def derived(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """A value made of another one, before any layer, by what cannot be written down."""
        floats = [tensor.is_floating_point()]
        (number,) = self.tape.step(aten.alias.default, [self.find(source)], floats)
        self._memory.set(tensor, number)

    # ------------------------------------------------------------------ numbers of tensors

    def find(self, tensor: torch.Tensor) -> int:
        """The number of a tensor as it is now, also when its memory was written to meanwhile."""
        number, writes = self._memory.find(tensor)
        if number is None:
            number = self._by_other_name(tensor)
            self._memory.set(tensor, number)
        if not writes:
            return number
        here = place(tensor)
        for write in writes:
            if write.place == here and write.dtype == tensor.dtype:
                number = write.number
            elif number != NOTHING or write.number != NOTHING:
                number = self._merged(tensor, number, write)
        self._memory.set(tensor, number)
        return number

    def _merged(self, tensor: torch.Tensor, number: int, write: Write) -> int:
        """The number of a tensor's value after a write to its memory."""
        old = Seen.like(number, tensor)
        written = Seen(write.number, (torch.Size(write.place[0]), write.dtype, tensor.device))
        if write.dtype != tensor.dtype:  # the same bits taken for other numbers
            return self._enter(aten.view.dtype, [old, written], known=False)
        at = overlap(write.place, place(tensor)).to(tensor.device)
        if bool((at < 0).all()):
            return number
        if bool((at >= 0).all()):
            if write.number == NOTHING:
                return NOTHING
            return self._enter(aten.take.default, [written, _constant(at)])
        index = (at.flatten() >= 0).nonzero().flatten()
        source = Seen(NOTHING, (index.shape, tensor.dtype, tensor.device))
        if write.number != NOTHING:
            picked = _constant(at.flatten()[index])
            source.number = self._enter(aten.take.default, [written, picked])
        fixed = any(n == NOTHING or n in self.tape.choices for n in (number, source.number))
        now = self._keep(_constant(tensor)) if fixed else None
        return self._enter(aten.put.default, [old, _constant(index), source], now=now)

    def _enter(
        self, func: Any, seen: Sequence[Seen], *, known: bool = True, now: Seen | None = None
    ) -> int:
        """One operation that the network did not call; the number of its result.

        `now`: what is there, where part of it is a constant or a choice for the rule to look at.
        """
        ins = [one.number for one in seen]
        (number,) = self.tape.step(func, ins, [seen[0].dtype.is_floating_point])
        if not self.tape.active.isdisjoint(ins):
            given = tuple(seen)
            kept = () if now is None else (now,)
            self.tape.entries.append(Entry(func, given, {}, given, (number,), known, kept))
        return number

    # ------------------------------------------------------------------ the operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        given = tensors((*args, *kwargs.values()) if kwargs else args)
        if not isinstance(func, torch._ops.OpOverload):  # noqa: SLF001
            raise NoRuleError(f"data-dependent control flow ({func})")
        ins = [self.find(tensor) for tensor in given]
        traits = _traits(func)
        if traits.targets:
            return self._in_place(func, args, kwargs, (given, ins))
        out = func(*args, **kwargs)
        if traits.shape_only or not ins or max(ins) == NOTHING:
            return out
        if func is aten.as_strided.default:  # a view that may look beyond what its argument holds
            self._memory.set(out, self._by_other_name(out))
            return out
        made = [out] if isinstance(out, torch.Tensor) else tensors((out,))
        outs = self._note(func, self._draft(func, args, kwargs, ins), ins, made)
        for tensor, number in zip(made, outs, strict=True):
            self._memory.set(tensor, number)
        return out

    def _draft(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ins: Sequence[int]
    ) -> Draft | None:
        """The arguments of an active operation with their tensors as Seen; None where it is not.

        Kept are what the rule needs and all that must be the same for case and reference.
        """
        active = tuple(n in self.tape.active for n in ins)
        if True not in active:
            return None
        needed = None if func is None else needs(func, active, args)
        following = iter(
            zip(ins, [True] * len(ins) if needed is None else needed.inputs, strict=True)
        )
        seen: list[Seen] = []

        def change(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            number, keep = next(following)
            keep = keep or number == NOTHING or not value.is_floating_point()
            keep = keep or number in self.tape.choices
            seen.append(self._keep(Seen.like(number, value, keep=keep)))
            return seen[-1]

        new_args = put(args, change)
        new_kwargs = {name: put(value, change) for name, value in kwargs.items()}
        return new_args, new_kwargs, tuple(seen), needed

    def _keep(self, seen: Seen) -> Seen:
        if seen.value is not None:
            self._kept.setdefault(address(seen.value), []).append(weakref.ref(seen))
        return seen

    def _note(
        self, func: Any, draft: Draft | None, ins: Sequence[int], made: Sequence[torch.Tensor]
    ) -> tuple[int, ...]:
        """One more operation on the tape; the numbers of what it put out."""
        outs = self.tape.step(func, ins, [tensor.is_floating_point() for tensor in made])
        if draft is not None:
            args, kwargs, seen, needed = draft
            kept: tuple[Seen, ...] = ()
            if needed is not None and needed.outputs:
                kept = tuple(self._keep(Seen.like(NOTHING, t, keep=True)) for t in made)
            known = needed is not None
            self.tape.entries.append(Entry(func, args, kwargs, seen, outs, known, kept))
        return outs

    # ------------------------------------------------------------------ in place

    def _in_place(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        what: tuple[list[torch.Tensor], list[int]],
    ) -> Any:
        """An operation that writes to some of its arguments."""
        given, ins = what
        traits = _traits(func)
        targets = _targets(traits, args, kwargs)
        written = {id(tensor) for tensor in targets}
        ins = [
            self._by_other_name(tensor) if n == NOTHING and id(tensor) in written else n
            for n, tensor in zip(ins, given, strict=True)
        ]
        was_known = max(ins) != NOTHING
        if traits.overwrites:
            ins[0] = NOTHING
        draft = self._draft(traits.plain, args, kwargs, ins)
        if draft is not None and (traits.overwrites or traits.plain is None):
            _blank(draft[2], [id(tensor) in written for tensor in given])
        for target in targets:
            self._part(target)
        check = None
        if draft is not None and traits.plain is not None and reads_over(given, targets[0]):
            check = _elsewhere(func, args, kwargs)
        out = func(*args, **kwargs)
        done = traits.plain or func
        if check is not None and draft is not None and not _close(targets[0], check):
            done, draft = func, (*draft[:3], None)
        if was_known and max(ins) == NOTHING:  # overwritten with a constant
            self._memory.write(targets[0], NOTHING)
        elif was_known:
            made = tensors((out,))
            put_out = {id(tensor) for tensor in made}
            made += [tensor for tensor in targets if id(tensor) not in put_out]
            outs = self._note(done, draft, ins, made)
            for tensor, number in zip(made, outs, strict=True):
                (self._memory.write if id(tensor) in written else self._memory.set)(tensor, number)
        return out

    def _by_other_name(self, tensor: torch.Tensor) -> int:
        """The number of a tensor without one that lies in the memory of one with."""
        other = self._memory.other(tensor)
        if other is None:
            return NOTHING
        write = Write(place(other), other.dtype, self.find(other))
        return self._merged(tensor, NOTHING, write)

    def _part(self, target: torch.Tensor) -> None:
        """What was kept of this memory becomes a copy of its own."""
        for reference in self._kept.pop(address(target), ()):
            seen = reference()
            if seen is not None and seen.value is not None and not seen.moved:
                seen.keep(seen.value.clone())


class _BesideDynamo(Recorder):
    """A recorder that torch.compile leaves alone; the first one loads all of torch.compile."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True


def recorder() -> Recorder:
    """A new recorder."""
    return _BesideDynamo() if "torch._dynamo" in sys.modules else Recorder()


def _targets(traits: _Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    places = traits.targets
    return tensors(args[n] if n < len(args) else kwargs.get(name) for n, name in places)


def _elsewhere(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What an operation writes where its arguments share no memory."""

    def apart(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    args, kwargs = put(args, apart), {name: put(value, apart) for name, value in kwargs.items()}
    func(*args, **kwargs)
    return _targets(_traits(func), args, kwargs)[0]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    share = 1e3 * torch.finfo(a.dtype).eps
    size = share * float(b.abs().nan_to_num(0.0, 0.0, 0.0).mean())
    return torch.allclose(a, b, rtol=share, atol=size, equal_nan=True)


def _blank(seen: Sequence[Seen], written: Sequence[bool]) -> None:
    """What was in a buffer before it is overwritten counts for nothing."""
    for one, is_written in zip(seen, written, strict=True):
        if is_written and one.number == NOTHING:
            one.keep(None)


def _constant(tensor: torch.Tensor) -> Seen:
    return Seen.like(NOTHING, tensor, keep=True)
