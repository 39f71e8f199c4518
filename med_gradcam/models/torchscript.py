"""A network as TorchScript: traced, scripted or frozen, saved by torch.jit.save.

Its operations are listed first, from the archive's text; what touches files, or runs while the file
is loaded, is refused. The rest can compute but not act, yet it is a program of its own, so it needs
--trust archive.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch

from med_gradcam.containers.opener import opened
from med_gradcam.containers.script_graph import FORBIDDEN
from med_gradcam.errors import ModelError
from med_gradcam.model import Model
from med_gradcam.models import _archive, _beside, _pickles, _script_code, _trust
from med_gradcam.running import first_line

TITLE = "TorchScript archive (.ts, .pt): needs --trust archive, operations are listed first"
_PICKLES = ("data.pkl", "constants.pkl")
_OF_JIT = ("torch.jit._pickle.", "__torch__.")


def sniff(path: str) -> bool:
    """Whether the file is an archive with programs in it; its name plays no part."""
    names = _archive.names(path)
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The network, opened into eager modules, in eval mode on the CPU.

    Raises:
        UntrustedModelError: the user has not said --trust archive.
        ModelError: the archive is damaged, or holds what touches files or runs when loaded.
    """
    archive = _archive.read(path)
    _check_layout(archive)
    _check_programs(archive)
    _check_pickles(archive)
    what = (
        f"{archive.name!r} is a program in TorchScript; no operation in it touches files, but a "
        f"program can still fill the memory or never end"
    )
    _trust.need("archive", trust, archive.sha256, what)
    source = _read(archive)
    for kind in _kinds(source):
        if kind in FORBIDDEN or kind.partition("::")[0] not in _script_code.SPACES:
            raise _refused(archive.name, f"the operation {kind!r}")
    net: Any = opened(source)
    net.eval()
    return _beside.model(net, archive, path)


def _refused(name: str, what: str) -> ModelError:
    return ModelError(
        f"expected a TorchScript network that only computes in {name!r}, it holds {what}; it was "
        f"not loaded, and no --trust lets it in: load the network from its weights and its Python "
        f"class."
    )


def _check_layout(archive: _archive.Archive) -> None:
    names = set(archive.sizes)
    for odd in ("model.json", "attributes.pkl"):  # read in another way, which nothing writes now
        if odd in names:
            raise ModelError(
                f"expected a TorchScript archive of torch 1.4 or later in {archive.name!r}, it "
                f"holds {odd!r}; save the network again with torch.jit.save."
            )
    if not {*_PICKLES} <= names or len(archive.folders) != 1:
        raise ModelError(
            f"expected one folder with {' and '.join(_PICKLES)} in {archive.name!r}, it has other "
            f"members; save the network again with torch.jit.save."
        )


def _check_programs(archive: _archive.Archive) -> None:
    paths = [path for path in archive.sizes if path.startswith("code/") and path.endswith(".py")]
    found = _script_code.faults({path: archive.text(path) for path in paths}, archive.name)
    if found:
        raise _refused(archive.name, ", ".join(found[:4]))


def _check_pickles(archive: _archive.Archive) -> None:
    for pickle in _PICKLES:
        folder = pickle.removesuffix(".pkl") + "/"
        sizes = {
            path.removeprefix(folder): size
            for path, size in archive.sizes.items()
            if path.startswith(folder)
        }
        strange = _pickles.globals_of(archive.text(pickle), sizes, archive.name, _is_plain)
        if strange:
            raise _refused(archive.name, f"{', '.join(strange[:4])} in its {pickle}")


def _is_plain(path: str) -> bool:
    if path.startswith("__torch__.torch.classes"):
        return False
    return path.startswith(_OF_JIT) or path in _pickles.TENSORS or _pickles.is_data(path)


def _read(archive: _archive.Archive) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            return torch.jit.load(archive.anew(), map_location="cpu")  # noqa: TID251 - here only
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ModelError(
            f"expected a TorchScript network in {archive.name!r}, torch cannot read it: "
            f"{first_line(error)}."
        ) from error


def _kinds(source: Any) -> Iterator[str]:
    """All operations of a network that was loaded and has not run yet."""
    for module in source.modules():
        for name in module._c._method_names():  # noqa: SLF001 - torch has no public list of them
            yield from _within(module._c._get_method(name).inlined_graph)  # noqa: SLF001


def _within(block: Any) -> Iterator[str]:
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _within(inner)
