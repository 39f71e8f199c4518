"""Which plug-ins are installed, without importing any of them?"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from med_gradcam.errors import UnknownNameError

_HERE = Path(__file__).parent


@cache
def names(folder: str) -> tuple[str, ...]:
    """The plug-in modules in a folder of the package ("methods", "models", "formats"), sorted."""
    found = (_HERE / folder).glob("*.py")
    return tuple(sorted(p.stem for p in found if not p.stem.startswith("_")))


def load(folder: str, name: str) -> ModuleType:
    """Import one plug-in.

    Raises:
        UnknownNameError: there is no such plug-in.
    """
    if name not in names(folder):
        raise UnknownNameError(folder.rstrip("s"), name, names(folder))
    return importlib.import_module(f"med_gradcam.{folder}.{name}")
