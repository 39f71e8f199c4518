"""How does long work tell how far it is, and how is it stopped?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """`done` of `total` parts of the work called `what`."""

    done: int
    total: int
    what: str


# A progress function may raise errors.Cancelled: the model is restored and it passes through.
Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """The progress function that says nothing."""
    del step
