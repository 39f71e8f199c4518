"""What does a trap report, and which traps are there?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Figure = float | str
Verdict = Literal["right", "wrong", "refuses", "fails", "not offered", "-"]
NOT_OFFERED, NOT_RUN = "not offered", "-"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure: what a right map gives, what a tool gives, what ours gives.

    `within`: how far from `right` a figure may be and still be right.
    """

    trap: str
    tool: str
    figure: str
    right: Figure
    theirs: Figure
    ours: Figure = NOT_RUN
    within: float = 0.01

    def verdict(self, value: Figure) -> Verdict:
        """What a figure says of the tool that gave it."""
        if isinstance(value, str) and isinstance(self.right, str) and value == self.right:
            return "right"
        if isinstance(value, str):
            known: tuple[Verdict, ...] = ("refuses", "fails", "not offered", "-")
            return next((k for k in known if value.startswith(k)), "wrong")
        if isinstance(self.right, str):
            return "wrong"
        return "right" if abs(value - self.right) <= self.within else "wrong"


@dataclass(frozen=True, slots=True)
class Trap:
    """A trap: its number, what goes wrong, for whom, and the function that measures it.

    `own_network`: the function takes a Case and says something about that very network. `why_not`:
    why nothing is measured here.
    """

    number: str
    title: str
    tools: tuple[str, ...]
    run: Callable[..., list[Row]] | None = None
    own_network: bool = False
    why_not: str = ""


TRAPS: dict[str, Trap] = {}


def trap(
    number: str, title: str, *tools: str, own_network: bool = False
) -> Callable[[Callable[..., list[Row]]], Callable[..., list[Row]]]:
    """Register a function as the measurement of a trap."""

    def keep(run: Callable[..., list[Row]]) -> Callable[..., list[Row]]:
        TRAPS[number] = Trap(number, title, tools, run, own_network)
        return run

    return keep


def not_run(number: str, title: str, why_not: str, *tools: str) -> None:
    """Register a trap that is known from the tool's source only."""
    TRAPS[number] = Trap(number, title, tools, why_not=why_not)


def tried(call: Callable[..., Any], *given: Any) -> Any:
    """The result of a call, or "fails: ..." with the first line of its error."""
    try:
        return call(*given)
    except Exception as error:  # noqa: BLE001 - what a tool raises is the finding
        lines = str(error).strip().splitlines() or [""]
        return f"fails: {type(error).__name__}: {lines[0]}"
