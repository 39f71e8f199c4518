"""A network as torch.export saves it (.pt2).

Loading such a file can run code in it in two ways (pickled sample inputs, symbolic expressions), so
it needs --trust code.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from typing import Any

import torch

from med_gradcam.containers.opener import opened
from med_gradcam.errors import ModelError
from med_gradcam.model import Model
from med_gradcam.models import _archive, _beside, _trust
from med_gradcam.running import first_line

TITLE = "torch.export archive (.pt2): can run code when loaded, needs --trust code"
_OLD = "serialized_exported_program.json"


def sniff(path: str) -> bool:
    """Whether the file is an archive with an exported program in it; its name plays no part."""
    names = _archive.names(path)
    return "models/model.json" in names or _OLD in names or "archive_format" in names


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The network, opened operation by operation, on the CPU.

    Raises:
        UntrustedModelError: the user has not said --trust code.
        ModelError: torch cannot read it.
    """
    archive = _archive.read(path)
    what = (
        f"{archive.name!r} is a torch.export archive, which can run code with your rights while it "
        f"is loaded"
    )
    _trust.need("code", trust, archive.sha256, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.export.load(io.BytesIO(archive.raw))
    except Exception as error:  # whatever the file's code raises
        raise ModelError(
            f"expected an exported network in {archive.name!r}, torch {torch.__version__} cannot "
            f"read it: {first_line(error)}."
        ) from error
    net: Any = opened(program)
    net.eval()
    return _beside.model(net, archive, path)
