"""How do the multipliers of a score go back over two tapes to the numbers that are wanted?"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from med_gradcam.secant.elementwise import smooth
from med_gradcam.secant.parts import parts_of
from med_gradcam.secant.recorder import recorder as new_recorder
from med_gradcam.secant.rules import Multipliers, NoRuleError, Pair, chosen, outside
from med_gradcam.secant.table import RULES
from med_gradcam.secant.tape import NOTHING, Entry, Seen, Tape, name_of, put, tensors

Known = dict[int, torch.Tensor]


def sweep(
    case: Tape, reference: Tape, known: Known, wanted: Collection[int], within: frozenset[Any]
) -> Known:
    """Multipliers of the wanted numbers, from those of later ones; uses up the tapes' entries.

    `within`: operations that are being taken apart, so that none is taken apart into itself.

    Raises:
        NoRuleError: an operation has no rule, or the two runs did different things.
    """
    same_steps(case, reference)
    found: Known = {}
    while case.entries:
        ours, other = case.entries.pop(), reference.entries.pop()
        g = [known.pop(number, None) for number in ours.outs]
        for number, m in zip(ours.outs, g, strict=True):
            if m is not None and number in wanted:
                found[number] = m
        if all(m is None for m in g):
            continue
        same_values(ours, other, case, reference)
        _still_there(ours, other)
        pair = Pair(ours, other, case.active, case.choices)
        for seen, m in zip(ours.tensors, _shared(pair, g, within), strict=True):
            if m is not None and seen.number in case.active:
                before = known.get(seen.number)
                known[seen.number] = m if before is None else before + m
    return found | {number: known[number] for number in wanted if number in known}


def _shared(pair: Pair, g: Multipliers, within: frozenset[Any]) -> Multipliers:
    """Multipliers of one operation's tensors, by its rule or by those of its parts."""
    if pair.case.known:
        row = RULES[pair.case.func.overloadpacket]
        if row.every or all(m is None for m in g[1:]):
            found = row.rule(pair, g)
            if found is not None:
                return found
    elif _is_curve(pair):
        return smooth(pair, g)
    try:
        return _in_parts(pair, g, within)
    except NoRuleError as error:
        inner = str(error)
        raise NoRuleError(inner if pair.name in inner else f"{pair.name} (in it {inner})") from None


def _is_curve(pair: Pair) -> bool:
    """Whether an operation is some function of one tensor, element by element."""
    func = pair.case.func
    other = torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable  # noqa: SLF001
    return len(pair.a) == 1 and torch.Tag.pointwise in func.tags and not other


def _in_parts(pair: Pair, g: Multipliers, within: frozenset[Any]) -> Multipliers:
    """An operation without a rule as the simpler ones that it is made of, run once more."""
    func = pair.case.func
    places = [n for n in range(len(pair.a)) if pair.counts(n)]
    if func in within:
        raise NoRuleError(pair.name)
    parts = parts_of(func)
    if any(pair.a[n].value is None for n in places):
        raise NoRuleError(pair.name)
    (case, leaves, outs), (reference, _, others) = (
        _run(parts, pair, entry) for entry in (pair.case, pair.reference)
    )
    known: Known = {}
    for n, m in enumerate(g):
        if m is None:
            continue
        if n >= len(outs) or outs[n][0] != others[n][0]:
            raise NoRuleError(pair.name)
        number = outs[n][0]
        if number in case.active:
            known[number] = known[number] + m if number in known else m
        elif not _equal(outs[n][1], others[n][1]):
            raise NoRuleError(pair.name)
    found = sweep(case, reference, known, leaves, within | {func})
    at = dict(zip(places, leaves, strict=True))
    return [found.get(at[n]) if n in at else None for n in range(len(pair.a))]


def _run(
    parts: Callable[..., Any], pair: Pair, entry: Entry
) -> tuple[Tape, list[int], list[tuple[int, torch.Tensor]]]:
    """The tape of an operation's parts; numbers of its active arguments; its outputs and theirs."""
    recorder = new_recorder()
    leaves: list[int] = []

    def value(seen: Any) -> Any:
        if not isinstance(seen, Seen):
            return seen
        tensor = seen.of().detach()  # an object of its own, also where one tensor is given twice
        if seen.number in pair.active:
            leaves.append(recorder.leaf(tensor, active=True))
        elif seen.number != NOTHING:
            recorder.leaf(tensor, active=False)
        return tensor

    args = put(entry.args, value)
    kwargs = {name: put(given, value) for name, given in entry.kwargs.items()}
    with recorder:
        out = parts(*args, **kwargs)
    return recorder.tape, leaves, [(recorder.find(tensor), tensor) for tensor in tensors((out,))]


# ---------------------------------------------------------------------------------- the same


def same_steps(case: Tape, reference: Tape) -> None:
    """The two runs did the same operations on the same numbers.

    Raises:
        NoRuleError: they did not.
    """
    if case.flow == reference.flow and case.output == reference.output:
        return
    pairs = zip(case.flow, reference.flow, strict=False)
    other = [name_of(ours[0]) for ours, theirs in pairs if ours != theirs]
    where = f"first at {other[0]}" if other else "one is longer"
    raise NoRuleError(f"data-dependent control flow ({where}{_read(case, reference)})")


def _read(*tapes: Tape) -> str:
    read = [name for tape in tapes for name in tape.reads]
    return f"; a value was read by {read[0]}" if read else ""


def same_values(ours: Entry, other: Entry, case: Tape, reference: Tape) -> None:
    """All that is not shared out was the same for both.

    Raises:
        NoRuleError: it was not: change would get lost here.
    """
    name = name_of(ours.func)
    if _differ((ours.args, dict(ours.kwargs)), (other.args, dict(other.kwargs))):
        raise NoRuleError(
            f"data-dependent control flow ({name} with other settings{_read(case, reference)})"
        )
    for a, b in zip(ours.tensors, other.tensors, strict=True):
        choice = case.choices.get(a.number)
        floats = a.number != NOTHING and choice is None and a.dtype.is_floating_point
        if floats or a.value is None or b.value is None or _equal(a.value, b.value):
            continue  # floats that descend from the input: shared out, or on a path past the layer
        if a.number == NOTHING:
            raise NoRuleError(outside(name))
        raise NoRuleError(
            chosen(choice, name)
            if choice
            else f"{name} with a mask, places or the like from before the layer that are not the "
            f"same for scan and reference"
        )


def _still_there(*entries: Entry) -> None:
    """The tensors that were kept are those that the operation saw.

    Raises:
        NoRuleError: one was given other memory.
    """
    for entry in entries:
        if any(seen.moved for seen in (*entry.tensors, *entry.kept)):
            raise NoRuleError(
                f"{name_of(entry.func)} with a tensor whose `data` was set to others afterwards"
            )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or torch.equal(a, b):
        return True
    both = a.shape == b.shape and a.is_floating_point()
    return both and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Seen):
        return not isinstance(b, Seen) or a.shape != b.shape
    if isinstance(a, (tuple, list)):
        return len(a) != len(b) or any(map(_differ, a, b))
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(_differ(a[key], b[key]) for key in a)
    return bool(a is not b and a != b)
