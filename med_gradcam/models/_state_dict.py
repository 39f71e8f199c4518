"""How are weights read from a checkpoint of torch.save without running anything in it?"""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from med_gradcam.errors import ModelError
from med_gradcam.models import _archive, _pickles
from med_gradcam.running import first_line

_SHOWN = 4


def _numpy() -> list[Any]:
    """What numpy's own numbers (a loss, an epoch) are pickled as, by numpy 1 and numpy 2."""
    scalar = np.float64(0).__reduce__()[0]
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    plain = [kind for kind in kinds if kind is not np.dtypes.ObjectDType]
    return [*named, np.dtype, codecs.encode, *plain]


def data(archive: _archive.Archive, where: str = "") -> Any:
    """What a checkpoint holds, if that is tensors, numbers, texts and containers of them.

    `where`: what an error calls the file; its name, if nothing is said.

    Raises:
        ModelError: it names anything else, or its tensors do not fit the bytes that are there.
    """
    sizes = {
        name.removeprefix("data/"): size
        for name, size in archive.sizes.items()
        if name.startswith("data/")
    }
    where = where or archive.name
    strange = _pickles.globals_of(archive.text("data.pkl"), sizes, where, _pickles.is_data)
    if strange:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise ModelError(
            f"expected plain tensors and numbers in {where!r}, it names "
            f"{', '.join(strange[:_SHOWN])}{more}, which could run code; nothing of it was read; "
            f"save the weights (state_dict()) and plain numbers alone."
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy()):
            warnings.simplefilter("ignore")
            return torch.load(archive.anew(), map_location="cpu", weights_only=True)  # noqa: TID251 - nothing runs
    except Exception as error:
        raise ModelError(
            f"expected plain tensors and numbers in {where!r}, torch cannot read them: "
            f"{first_line(error)}."
        ) from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a state dict by name, and the file's SHA-256.

    A checkpoint that holds the state dict under "state_dict" or "model" will do as well.

    Raises:
        ModelError: it holds anything else.
    """
    if not _archive.names(str(path)):
        raise ModelError(
            f"expected weights saved by torch 1.6 or later in {path.name!r}, it is no such "
            f"archive; load and save them again, or use safetensors."
        )
    archive = _archive.read(str(path))
    found = data(archive)
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = found if isinstance(found, Mapping) else {}
    if not tensors or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise ModelError(
            f"expected a state dict (names and tensors) in {path.name!r}, got "
            f"{type(found).__name__}."
        )
    return {str(name): value for name, value in tensors.items()}, archive.sha256
