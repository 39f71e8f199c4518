"""Which network does a bundle's network_def name, and is it safe to build?

Only classes that are really defined in monai.networks.nets, for their arguments also in
monai.networks.blocks, and layers of torch.nn. A prefix of the written name proves nothing: what is
looked at is the module a class comes from. Downloads are forced off.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from med_gradcam.errors import ModelError, ResourceError
from med_gradcam.models._bundle_words import Above
from med_gradcam.models.model_folder import _LAYERS
from med_gradcam.running import first_line, is_memory

_NETS, _BLOCKS = "monai.networks.nets", "monai.networks.blocks"
# Functions there that do no more than call a constructor; others download.
_FUNCTIONS = frozenset(
    """
    resnet10 resnet18 resnet34 resnet50 resnet101 resnet152 resnet200 vista3d132
    MedNeXtSmall MedNeXtBase MedNeXtMedium MedNeXtLarge
    MedNeXtS MedNeXtB MedNeXtM MedNeXtL
    """.split()
)
_DETECTION = "monai.apps.detection.networks.retinanet_network"
_DETECTORS = {"RetinaNet": _DETECTION, "resnet_fpn_feature_extractor": _DETECTION}
_REFUSED = {
    "Transchex": "it reads files that its arguments name",
    "BertPreTrainedModel": "it reads files that its arguments name",
    "MultiModal": "it reads files that its arguments name",
    "CellSamWrapper": "it unpickles a file that its arguments name",
}
_OFF: dict[str, Any] = {
    "pretrained": False,
    "pretrained_url": None,
    "pretrained_state_dict_key": None,
    "weights": None,
    "progress": False,
}
_USERS = ("device", "dtype")  # what the user of a network chooses
# What MONAI called an argument before, and what it has taken away without an effect on the network.
_RENAMED = {
    "dimensions": "spatial_dims",
    "num_channels": "channels",
    "n_classes": "num_classes",
    "n_input_channels": "in_channels",
    "pos_embed": "proj_type",
}
_GONE = frozenset({"img_size", "use_flash_attention", "norm_name", "use_checkpointing"})
_BOOKKEEPING = frozenset({"_target_", "_args_", "_disabled_", "_requires_", "_desc_", "_mode_"})


@dataclass(frozen=True, slots=True)
class Plan:
    """How to build the network: `make` builds it, `arguments` are those in the file."""

    name: str
    make: Callable[[], Any]
    arguments: dict[str, Any]
    notes: tuple[str, ...] = ()


def plan(definition: Any, where: str) -> Plan:
    """How to build the network of a resolved network_def.

    Raises:
        ModelError: it names something that is not on the allow-list, or its arguments do not fit.
    """
    if not isinstance(definition, dict) or not isinstance(definition.get("_target_"), str):
        raise ModelError(
            f"expected a network_def with a _target_ in {where}, got "
            f"{type(definition).__name__ if definition else 'none'}."
        )
    notes: list[str] = []
    target = definition["_target_"]
    arguments = {k: v for k, v in definition.items() if k not in _BOOKKEEPING}
    make = _bound(definition, where, notes)
    return Plan(target.rsplit(".", 1)[-1], make, arguments, tuple(notes))


def _bound(definition: dict[str, Any], where: str, notes: list[str]) -> Callable[[], Any]:
    """A call without arguments that builds what a definition says; nothing is built yet."""
    target = definition["_target_"]
    if definition.get("_mode_", "default") != "default":
        raise ModelError(
            f"expected {target} to be built in {where}, got _mode_ {definition['_mode_']!r}."
        )
    make = constructor(target, where)
    signature = inspect.signature(make)
    given = {k: v for k, v in definition.items() if k not in _BOOKKEEPING}
    given |= dict(zip(signature.parameters, definition.get("_args_", ()), strict=False))
    given = _fitting(given, signature, target, where, notes)
    parts = {k: _part(v, where, notes) for k, v in given.items()}
    try:
        signature.bind(**parts)
    except TypeError as error:
        raise ModelError(
            f"the arguments of {target} in {where} do not fit: {first_line(error)}."
        ) from error
    return functools.partial(_called, make, parts, target)


def _called(make: Callable[..., Any], parts: dict[str, Any], target: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(**{k: _built(v) for k, v in parts.items()})
    except (MemoryError, RuntimeError) as error:
        if is_memory(error):
            raise ResourceError(f"not enough memory for the network {target}.") from error
        raise ModelError(f"the arguments of {target} do not fit: {first_line(error)}.") from error
    except ModelError:
        raise
    except Exception as error:  # constructors raise whatever they like
        why = first_line(error)
        if "import" in type(error).__name__.lower():  # MONAI's OptionalImportError
            raise ModelError(
                f"{target} needs a package that is not installed ({why}): install it."
            ) from error
        raise ModelError(f"the arguments of {target} do not fit: {why}.") from error


def _built(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return value()
    if isinstance(value, list):
        return [_built(v) for v in value]
    if isinstance(value, dict):
        return {k: _built(v) for k, v in value.items()}
    return value


def _part(value: Any, where: str, notes: list[str]) -> Any:
    """An argument with the modules in it bound."""
    if isinstance(value, Above):
        raise ModelError(f"expected no function as an argument of a network in {where}.")
    if isinstance(value, dict):
        if "_target_" in value:
            return _bound(value, where, notes)
        return {k: _part(v, where, notes) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_part(v, where, notes) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelError(f"expected finite numbers as arguments of a network in {where}.")
    return value


def _fitting(
    given: dict[str, Any],
    signature: inspect.Signature,
    target: str,
    where: str,
    notes: list[str],
) -> dict[str, Any]:
    """The arguments this MONAI's constructor takes, downloads off."""
    known = signature.parameters
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    name = target.rsplit(".", 1)[-1]
    kept: dict[str, Any] = {}
    for key, value in given.items():
        new = _RENAMED.get(key, key)
        if key in _USERS or (isinstance(value, dict) and value.get("_target_") == "torch.device"):
            continue
        if key in known or free:
            kept[key] = value
        elif new in known and new not in given:
            kept[new] = value
            notes.append(f"the argument {key} of {name} is called {new} in this MONAI")
        elif key in _GONE:
            notes.append(f"the argument {key} of {name} does not exist in this MONAI: left out")
        else:
            raise ModelError(
                f"expected arguments of {target} that this MONAI knows in {where}, got {key!r}; "
                f"install the MONAI that the bundle was made with (metadata.json names it)."
            )
    return kept | {k: v for k, v in _OFF.items() if k in known}


def constructor(target: str, where: str) -> Callable[..., Any]:
    """The class or function that a _target_ names.

    Raises:
        ModelError: it is not on the allow-list; nothing of it has been run.
    """
    *before, name = target.replace("generative.networks.nets", _NETS).split(".")
    path = ".".join(before)
    if name in _REFUSED:
        raise ModelError(
            f"expected a network that only computes in {where}, got {target!r}: {_REFUSED[name]}."
        )
    found = _found(path, name)
    if found is None:
        raise ModelError(
            f"expected a class of monai.networks.nets (or blocks) or a layer of torch.nn as "
            f"_target_ in {where}, got {target!r}; other code of a bundle is not run. "
            f"For a network of your own write a Python factory and pass --trust code."
        )
    return found


def _found(path: str, name: str) -> Callable[..., Any] | None:
    if path in ("torch.nn", "torch.nn.modules") or path.startswith("torch.nn.modules."):
        layer: Callable[..., Any] | None = getattr(torch.nn, name, None)
        return layer if name in _LAYERS else None
    if _DETECTORS.get(name) == (path or _DETECTION):
        detector: Callable[..., Any] = getattr(_monai(_DETECTION), name)
        return detector
    for package in (_NETS, _BLOCKS):
        rest = path.removeprefix(package).removeprefix(".")
        if path and not (path == package or path.startswith(f"{package}.")):
            continue
        holder = _monai(package)
        if rest:
            if rest not in {m.name for m in pkgutil.iter_modules(holder.__path__)}:
                return None
            holder = _monai(f"{package}.{rest}")
        found = getattr(holder, name, None)
        if _really_there(found, name, package):
            return found
    return None


def _really_there(found: Any, name: str, package: str) -> bool:
    """Whether it is a module class, or an allowed function, that `package` itself defines."""
    own = str(getattr(found, "__module__", "")).startswith(f"{package}.")
    if inspect.isclass(found):
        return own and issubclass(found, torch.nn.Module)
    return own and inspect.isfunction(found) and name in _FUNCTIONS


def _monai(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            "the bundle needs MONAI, which is not installed: pip install 'med_gradcam[monai]'."
        ) from error


class _Bounded(TorchDispatchMode):
    """Refuses tensors that a network's weights file could not fill, before they are made."""

    def __init__(self, most: int, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.name, self.made = most, name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in _FACTORIES:
            self.made += math.prod(args[0]) * 4
            if self.made > self.most:
                raise ModelError(
                    f"expected a network {self.name} that its weights file can fill "
                    f"({self.most >> 20} MiB at most), got one that asks for {self.made >> 20} "
                    f"MiB or more; network_def and weights do not belong together."
                )
        return func(*args, **(kwargs or {}))


_ATEN = torch.ops.aten
_FACTORIES = frozenset(
    {
        _ATEN.empty.memory_format,
        _ATEN.zeros.default,
        _ATEN.ones.default,
        _ATEN.full.default,
        _ATEN.randn.default,
        _ATEN.rand.default,
    }
)
_ROOM = 256 << 20  # bytes a network may hold beside its weights: tables, initial values


def build(planned: Plan, weights_bytes: int) -> torch.nn.Module:
    """The network, in eval mode; `weights_bytes`: the size of the file that is to fill it.

    Raises:
        ModelError: it is larger than its weights can be, or its arguments do not fit.
    """
    with _Bounded(4 * weights_bytes + _ROOM, planned.name):  # half precision doubles on loading
        net = planned.make()
    if not isinstance(net, torch.nn.Module):
        raise ModelError(f"expected a network from {planned.name}, got {type(net).__name__}.")
    return net.eval()
