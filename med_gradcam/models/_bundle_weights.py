"""Which weights come with a bundle, and do they fit its network?

models/model.safetensors, or models/model.pt read without unpickling anything but tensors and numpy
scalars. The file is looked at before it is read: a packed or an old one is refused.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from med_gradcam.errors import ModelError
from med_gradcam.models import _archive, _state_dict
from med_gradcam.models._bundle_files import Files

_NESTED = ("state_dict", "model_state_dict", "model", "network", "net", "network_weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
SUFFIXES = (".safetensors", ".pt", ".pth")
_NAMED = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights file of a bundle: its name inside it and its size in bytes."""

    name: str
    size: int


def find(files: Files, named: str | None = None) -> Weights | None:
    """The weights file: the one its configuration names (a file of models/), else model.*."""
    stems = [named] if named and _NAMED.fullmatch(named) else []
    stems += ["model.safetensors", "model.pt", "model.pth"]
    for stem in stems:
        name = f"models/{stem}"
        if stem.endswith(SUFFIXES) and files.has(name):
            return Weights(name, files.size(name))
    return None


def load(net: torch.nn.Module, files: Files, weights: Weights) -> tuple[str, tuple[str, ...]]:
    """Fill the network with the weights, all of them and no other; the file's SHA-256 and notes.

    Raises:
        ModelError: they cannot be read as data, or do not fit.
    """
    raw = files.read(weights.name)
    where = f"{files.name}/{weights.name}"
    read = _safetensors if weights.name.endswith(".safetensors") else _pickled
    tensors = _state(read(raw, where), net, where)
    tensors, notes = _matched(tensors, net, where)
    net.load_state_dict(tensors, strict=False)
    return hashlib.sha256(raw).hexdigest(), notes


def _safetensors(raw: bytes, where: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    try:
        return load_tensors(raw)
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"expected safetensors in {where}, got: {error}.") from error


def _pickled(raw: bytes, where: str) -> Any:
    """What torch.save wrote, if it is tensors, numbers and containers of them."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as opened:
            faults = list(_archive._faults(opened.infolist(), len(raw)))  # noqa: SLF001 - the same
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"expected weights as torch.save writes them since torch 1.6 in {where}, got another "
            f"kind of file; load and save them again, best as safetensors."
        ) from error
    if faults:
        raise ModelError(
            f"expected an archive as torch writes it in {where}, it holds {faults[0]}; "
            f"nothing of it was read."
        )
    archive = _archive.Archive(where, raw)
    if "constants.pkl" in archive.sizes:
        raise ModelError(
            f"expected weights in {where}, got a TorchScript program; name it model.ts and pass "
            f"--trust archive."
        )
    return _state_dict.data(archive)


def _state(found: Any, net: torch.nn.Module, where: str) -> dict[str, torch.Tensor]:
    """The state dict in what was read: itself, or under one of the usual names."""
    for _ in range(3):
        if not isinstance(found, dict):
            break
        if found and all(isinstance(v, torch.Tensor) for v in found.values()):
            return {str(k): v for k, v in found.items()}
        inner = next((found[k] for k in _NESTED if isinstance(found.get(k), dict)), None)
        if inner is None:
            known = set(net.state_dict())
            tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
            if known & set(tensors):
                return tensors  # tensors beside counters and the like
            break
        found = inner
    kind = f"the keys {list(found)[:6]}" if isinstance(found, dict) else type(found).__name__
    raise ModelError(
        f"expected a state dict in {where}, itself or under one of {', '.join(_NESTED)}, "
        f"got {kind}."
    )


def _matched(
    tensors: dict[str, torch.Tensor], net: torch.nn.Module, where: str
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors under the network's own names, checked for shape, kind and finite values."""
    wanted = net.state_dict()
    notes: tuple[str, ...] = ()
    for prefix in _PREFIXES:
        if not set(tensors) & set(wanted) and all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
            notes = (f"weights named {prefix}* were taken without that",)
    missing = sorted(set(wanted) - set(tensors))
    # Batch norms saved by old torch have no counter of batches; it plays no part in eval mode.
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    extra = sorted(set(tensors) - set(wanted))
    shapes = [
        f"{k} has {tuple(tensors[k].shape)}, the network {tuple(wanted[k].shape)}"
        for k in sorted(set(wanted) & set(tensors))
        if tensors[k].shape != wanted[k].shape
        or tensors[k].is_floating_point() != wanted[k].is_floating_point()
    ]
    if missing or extra or shapes:
        parts = (
            f"missing: {', '.join(missing[:4])}" if missing else "",
            f"not in the network: {', '.join(extra[:4])}" if extra else "",
            f"other shape or kind: {'; '.join(shapes[:3])}" if shapes else "",
        )
        raise ModelError(
            f"the weights in {where} do not fit network_def "
            f"({'; '.join(p for p in parts if p)}); use the pair that belongs together."
        )
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ModelError(f"expected finite weights in {where}, got NaN or inf in {bad[0]}.")
    return tensors, notes
