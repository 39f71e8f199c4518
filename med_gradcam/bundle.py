"""What does a writer get: an explanation, its maps and, where it is at hand, the scan?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from med_gradcam.errors import UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.maps import Maps
from med_gradcam.volume import Volume


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """One explanation on its way out. `identified`: the user allows names and paths in outputs."""

    explanation: Explanation
    maps: Maps
    volume: Volume | None = None
    identified: bool = False

    def __post_init__(self) -> None:
        grid = self.maps.signed.grid
        if self.volume is not None and self.volume.grid != grid:
            other = self.volume.grid
            corners = [g.world_ras([[0, 0, 0], [n - 1 for n in g.shape]]) for g in (grid, other)]
            apart = abs(corners[0] - corners[1]).max()
            raise UsageError(
                f"expected the scan on the grid of the maps {grid.shape}, got one of shape "
                f"{other.shape} whose corners lie up to {apart:.3g} mm elsewhere."
            )


class Writer(Protocol):
    """A module in formats/ that can write: TITLE (one line) and save()."""

    TITLE: str

    def save(self, bundle: Bundle, folder: Path) -> list[Path]:
        """Write into an existing, empty-enough folder; returns the files written."""


class Reader(Protocol):
    """A module in formats/ that can read: TITLE, sniff() without exceptions, and read()."""

    TITLE: str

    def sniff(self, path: Path) -> bool:
        """Whether this format would take the path."""

    def read(self, path: Path) -> Volume:
        """The volume at a path.

        Raises:
            ImageError: it cannot be read or is no volume.
        """
