"""A model as Python: `module:function` returns (net, InputSpec or dict, labels, link).

This runs the user's own code, so it needs --trust code; nothing is imported without it.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Collection
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from med_gradcam.errors import InputError, ModelError
from med_gradcam.model import InputSpec, Model, parse_steps
from med_gradcam.models import _trust

TITLE = "Python factory module:function (runs code: needs --trust code)"
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def sniff(path: str) -> bool:
    """Whether the text looks like module:function."""
    return _NAME.fullmatch(path) is not None and not Path(path).exists()


def load(path: str, trust: Collection[str] = ()) -> Model:
    """Call the factory and check what it returns.

    Raises:
        UntrustedModelError: the user has not said --trust code.
        ModelError: the factory cannot be found, fails, or returns something else.
    """
    module_name, function_name = path.split(":")
    what = f"{path!r} is Python code that would run with your rights"
    _trust.need("code", trust, _digest(module_name), what)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
        returned = factory()
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"expected {path!r} to build a model, got {type(error).__name__}: {why}."
        ) from error
    if isinstance(returned, Model):
        digest = returned.weights_sha256 or weights_digest(returned.net)
        return replace(returned, net=returned.net.eval(), weights_sha256=digest)
    if not (isinstance(returned, tuple) and len(returned) == 4):
        raise ModelError(
            f"expected {path!r} to return (net, input spec, labels, link) or a Model, "
            f"got {type(returned).__name__}."
        )
    net, spec, labels, link = returned
    if not isinstance(net, torch.nn.Module):
        raise ModelError(f"expected a torch module from {path!r}, got {type(net).__name__}.")
    if not isinstance(labels, (list, tuple)) or not all(isinstance(x, str) for x in labels):
        raise ModelError(f"expected a list of texts as labels from {path!r}, got {labels!r}.")
    return Model(
        net=net.eval(),
        input=spec if isinstance(spec, InputSpec) else _spec(spec, path),
        labels=tuple(labels),
        link=link,
        name=function_name,
        weights_sha256=weights_digest(net),
    )


def _digest(module_name: str) -> str:
    """SHA-256 of a module's own file, which is looked for without importing anything."""
    where, found = [str(Path.cwd()), *sys.path], None
    for part in module_name.split("."):
        found = PathFinder.find_spec(part, where)
        if found is None:
            return ""
        where = [*(found.submodule_search_locations or ())]
    origin = Path(found.origin) if found is not None and found.origin else None
    return _trust.digest(origin.read_bytes()) if origin is not None and origin.is_file() else ""


def _spec(spec: Any, path: str) -> InputSpec:
    try:
        return InputSpec(**{**spec, "intensity": parse_steps(spec.get("intensity", ()))})
    except (TypeError, AttributeError, InputError) as error:
        raise ModelError(f"the input spec of {path!r} does not fit: {error}.") from error


def weights_digest(net: torch.nn.Module) -> str:
    """SHA-256 over the names and values of all parameters and buffers; "" where there are none."""
    if not net.state_dict():
        return ""
    sha = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            sha.update(name.encode())
            value = tensor.detach().cpu().contiguous().reshape(-1)
            sha.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return sha.hexdigest()
