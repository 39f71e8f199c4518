"""The model formats: one file each, with TITLE, sniff(path) and load(path, trust)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    from med_gradcam.model import Model


class Format(Protocol):
    """What a module in this folder must have."""

    TITLE: str

    def sniff(self, path: str) -> bool:
        """Whether this format would take what the user named."""

    def load(self, path: str, trust: Collection[str] = ()) -> Model:
        """The model, in eval mode on the CPU."""
