"""A pickled checkpoint (.pt, .pth, .ckpt): refused with a sentence that says what is in it.

Reading a pickle can run any code. With --trust code a network that was pickled whole is loaded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from med_gradcam.errors import ModelError
from med_gradcam.model import Model
from med_gradcam.models import _archive, _beside, _pickles, _trust
from med_gradcam.running import first_line

TITLE = "pickled network (.pt, .pth, .ckpt): can run code when loaded, needs --trust code"
_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHOWN = 6
_AS_FOLDER = (
    "put them as weights.pt beside a spec.json that says what the network is, and name that folder"
)


def sniff(path: str) -> bool:
    """Whether the file is a checkpoint of torch.save, or has a name that pickles have."""
    names = _archive.names(path)
    if names:
        return "data.pkl" in names and "constants.pkl" not in names
    there = Path(path)
    return there.is_file() and there.suffix.lower() in _SUFFIXES


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The network that was pickled whole, if the user trusts it as code.

    Raises:
        UntrustedModelError: the user has not said --trust code.
        ModelError: it holds weights without their network, or something else.
    """
    there = Path(path)
    zipped = bool(_archive.names(path))
    archive = _archive.read(path) if zipped else _archive.plain(path)
    strange = _strange(archive) if zipped else _loose(archive)
    if not strange:
        raise ModelError(
            f"expected a network, {there.name!r} holds weights, or other plain data, without one: "
            f"{_AS_FOLDER}."
        )
    more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
    what = (
        f"{there.name!r} is a pickle, which can run any code with your rights while it is loaded; "
        f"it names {', '.join(strange[:_SHOWN])}{more}. Pickles can run code and are not read as "
        f"data: save the network's state_dict() as safetensors, or as weights.pt beside a spec.json"
    )
    _trust.need("code", trust, archive.sha256, what)
    net = _unpickled(archive)
    return _beside.model(net.eval(), archive, path)


def _strange(archive: _archive.Archive) -> list[str]:
    sizes = {
        name.removeprefix("data/"): size
        for name, size in archive.sizes.items()
        if name.startswith("data/")
    }
    return _pickles.globals_of(archive.text("data.pkl"), sizes, archive.name, _pickles.is_data)


def _loose(archive: _archive.Archive) -> list[str]:
    """What a pickle that is no archive names; torch before 1.6 wrote several in a row."""
    try:
        found = _pickles.globals_of(archive.raw, {}, archive.name, _pickles.is_data)
    except ModelError:
        found = []
    return found or ["what cannot be told without running it"]


def _unpickled(archive: _archive.Archive) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net: Any = torch.load(  # noqa: TID251 - the user trusts it as code
                io.BytesIO(archive.raw), map_location="cpu", weights_only=False
            )
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"expected a pickled network in {archive.name!r}, got {type(error).__name__}: "
            f"{first_line(error)}."
        ) from error
    if not isinstance(net, torch.nn.Module):
        raise ModelError(
            f"expected a network pickled whole in {archive.name!r}, got {type(net).__name__}; if "
            f"it holds weights: {_AS_FOLDER}."
        )
    return net
