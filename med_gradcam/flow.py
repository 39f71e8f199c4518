"""Which paths lead from a network's input to its output, and how far do they look on the way?

Every value gets a number, 0 for the input; an operation leads from what it took in to what it put
out, so a value comes after all that it was made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


class Flow:
    """What each value was made of, and by how many voxels its operation looked aside.

    `made[n]`: the numbers of the values that value n was made of; `aside[n]`: how much further than
    they its elements see, in voxels, summed over the three axes; `picked`: values that are nothing
    but tokens without a place, picked out of others.
    """

    def __init__(self) -> None:
        self.numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.written: dict[StorageWeakRef, int] = {}
        self.made: list[tuple[int, ...]] = []
        self.aside: list[float] = []
        self.picked: set[int] = set()

    def begin(self, x: torch.Tensor) -> None:
        """The network's input."""
        self.numbers[x] = self._new((), 0.0)

    def _new(self, made: Iterable[int], aside: float) -> int:
        self.made.append(tuple(made))
        self.aside.append(aside)
        return len(self.made) - 1

    def number(self, tensor: torch.Tensor) -> int | None:
        """The number of what a tensor holds now; None if that does not depend on the input."""
        return max(self._held(tensor), default=None)

    def _held(self, tensor: torch.Tensor) -> set[int]:
        """Its own value, and what was written into its memory later, by it or by a view."""
        own = self.numbers.get(tensor)
        later = self.written.get(_memory(tensor), -1) if self.written else -1
        held = set() if own is None else {own}
        return held | ({later} if later > (-1 if own is None else own) else set())

    def step(
        self,
        func: Any,
        ins: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        aside: Sequence[float],
    ) -> None:
        """One operation; `aside`: how far each result looks."""
        made: set[int] = set().union(*map(self._held, ins))
        if not made or _only_asks_for_a_shape(func):
            return
        writes = func._schema.is_mutable  # noqa: SLF001 - no public way to ask
        for result, far in zip(outs, aside, strict=True):
            self.numbers[result] = number = self._new(made, far)
            if writes:
                self.written[_memory(result)] = number

    def cuts(self, ends: Iterable[int]) -> frozenset[int]:
        """The values that every path from the input to any of `ends` passes through.

        They are the dominators of the ends. Source: Cooper, Harvey, Kennedy, "A Simple, Fast
        Dominance Algorithm", 2001; without cycles one pass is enough.
        """
        above = [0]  # the nearest value that all paths to this one pass through
        for made in self.made[1:]:
            above.append(_common(made, above))
        found = {0}
        here = _common(ends, above)
        while here:
            found.add(here)
            here = above[here]
        return frozenset(found)

    def behind(self, ends: Iterable[int]) -> dict[int, float]:
        """How far the ends look beyond each value that leads to them: the widest path, voxels."""
        found = dict.fromkeys(ends, 0.0)
        for n in range(len(self.made) - 1, -1, -1):
            if n in found:
                for before in self.made[n]:
                    found[before] = max(found.get(before, 0.0), found[n] + self.aside[n])
        return found

    def silent(self, ends: Iterable[int]) -> frozenset[int]:
        """The values of which the ends read nothing but tokens without a place.

        Behind them no operation looks aside, so that the other tokens do not get into these.
        """
        ends = [*ends]
        read, left = set(ends), [*ends]
        while left:
            n = left.pop()
            fresh = set() if n in self.picked else {*self.made[n]} - read
            read |= fresh
            left += fresh
        return frozenset(n for n, far in self.behind(ends).items() if far == 0 and n not in read)


def _common(numbers: Iterable[int], above: Sequence[int]) -> int:
    """The nearest value that all paths to any of these pass through."""
    left = set(numbers) or {0}
    while len(left) > 1:
        last = max(left)
        left = (left - {last}) | {above[last]}
    return left.pop()


def _only_asks_for_a_shape(func: Any) -> bool:
    """Whether an operation makes a tensor like another one, whose values it does not read."""
    name = func._schema.name.rpartition("::")[2]  # noqa: SLF001 - no public way to ask
    return bool(name.endswith("_like") or name.startswith("new_"))


def _memory(tensor: torch.Tensor) -> Any:
    """What a tensor shares with its views; its own object where it has no plain memory."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, nested
        return id(tensor)
