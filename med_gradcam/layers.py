"""Which layer of a network is meant, and which ones are worth trying?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from med_gradcam.errors import CannotExplainError, ModelError, UnknownNameError
from med_gradcam.explanation import Cells
from med_gradcam.graph import LayerInfo, Trace
from med_gradcam.model import Model
from med_gradcam.tail import INPUT

MOST_CANDIDATES = 4
INPUT_CELLS = Cells((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "exact")
# Layers that only move or pick values: the layer before them says the same with more places.
_PASSIVE = ("Pool", "Pad", "Dropout", "Identity", "Upsample", "Flatten", "Unflatten")


def find_layer(model: Model, name: str) -> tuple[str, torch.nn.Module]:
    """The module path and module of a layer given by its path or by an alias of the model.

    "@input" (or "input", where no layer is called so) is the network's input, whole network behind.

    Raises:
        UnknownNameError: there is no such layer; the near ones are listed.
    """
    path = model.aliases.get(name, name)
    modules = dict(model.net.named_modules())
    if path == INPUT or (path == "input" and path not in modules):
        return INPUT, model.net
    if not path or path not in modules:
        known = [*model.aliases, *(n for n in modules if n)]
        raise UnknownNameError("layer", name, known, "`med-gradcam inspect MODEL` lists them all.")
    return path, modules[path]


def split(model: Model, text: str) -> list[str]:
    """The layers of a cut "a+b+c"; a name that holds a + of its own stays whole."""
    if text in model.aliases or text in dict(model.net.named_modules()):
        return [text]
    return [part.strip() for part in text.split("+")]


def check_places(info: LayerInfo | None, path: str) -> LayerInfo:
    """The layer's information, if its output has places to point to.

    Raises:
        CannotExplainError: the output has no places, or is the network's output itself.
    """
    if info is None and path == INPUT:
        return LayerInfo(INPUT, "Input", (), None, 0.0)
    if info is None:
        raise CannotExplainError(
            "logits",
            f"expected a layer whose output has places (C, i, j, k), but the output of {path!r} "
            f"has none (it is a vector, or it never ran); choose an earlier layer.",
        )
    if info.runs > 1:
        raise CannotExplainError(
            "shared layer",
            f"expected a layer that runs once per scan, {path!r} runs {info.runs} times (shared); "
            f"choose another layer.",
        )
    if info.is_output:
        raise CannotExplainError(
            "logits",
            f"the layer {path!r} is the network's output itself, so there is nothing to explain "
            f"it by; choose an earlier layer.",
        )
    return info


def _usable(info: LayerInfo) -> bool:
    return not info.is_output and info.runs == 1 and min(info.shape[1:]) > 1


def check_logits(
    net: torch.nn.Module, link: str, logits: torch.Tensor, *, named: bool = True
) -> None:
    """Refuse a network that ends in the link function itself: log-odds need what comes before it.

    `logits` (1, K) or a map (1, K, i, j, k); `named`: the network's last module tells as well. A
    map of numbers that all lie within 0..1 is taken for probabilities, a row of scores only if its
    softmax sums to 1.

    Raises:
        CannotExplainError: its outputs are probabilities.
    """
    if link == "none":
        return
    last = type(list(net.modules())[-1]).__name__
    several = link == "softmax" and logits.shape[1] > 1
    total = logits.double().sum(dim=1)
    near = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    between = float(logits.min()) >= 0 and 0 < float(logits.max()) <= 1 + near
    whole = several and between and float((total - 1).abs().max()) < near
    squashed = logits.ndim > 2 and not several and between
    words = ("Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid")
    if (named and last in words) or whole or squashed:
        how = (
            "all numbers of its map lie within 0..1"
            if squashed
            else "it ends in a softmax or sigmoid of its own"
        )
        raise CannotExplainError(
            "output",
            f"expected a network that puts out logits for the link {link!r}, got probabilities "
            f"({how}); leave that last step out.",
        )


def check_volumetric(net: torch.nn.Module) -> None:
    """Refuse a network for two-dimensional images.

    Raises:
        ModelError: all its convolutions are two-dimensional.
    """
    kinds = {type(m).__name__ for m in net.modules()}
    if "Conv2d" in kinds and not kinds & {"Conv3d", "ConvTranspose3d"}:
        raise ModelError(
            "expected a network for volumes, got one with two-dimensional convolutions only; "
            "networks for two-dimensional images cannot be explained yet."
        )


def _without_logits(found: Sequence[LayerInfo]) -> list[LayerInfo]:
    """The layers before the convolution that makes the map a network puts out; else all."""
    maps = (info.shape for info in found if info.is_output and max(info.shape[1:]) > 1)
    channels = next((shape[0] for shape in maps), None)
    kept = list(found)
    while kept and kept[-1].shape[0] == channels:
        if kept.pop().kind in ("Conv3d", "ConvTranspose3d"):  # what holds it finished after it
            break
    return kept


def candidates(model: Model, trace: Trace, *, every: bool = False) -> list[LayerInfo]:
    """At most four layers worth trying (or `every` one), coarsest first.

    Where the model names layers of its own (aliases) these are taken, else the last layer of each
    resolution; in both cases only layers with more than one cell per axis, and never the output.
    Of a network that puts out a map, nor the last convolution, whose output are logits, too.
    """
    named = [info for path in model.aliases.values() if (info := trace.find(path)) is not None]
    if not named:
        last: dict[tuple[float, ...], LayerInfo] = {}
        for info in _without_logits(trace.layers):
            passive = any(word in info.kind for word in _PASSIVE)
            if not passive and info.lattice is not None and info.runs == 1:
                last[info.lattice.jump] = info
        named = list(last.values())
    usable = [info for info in named if _usable(info)]
    usable.sort(key=lambda info: info.shape[1] * info.shape[2] * info.shape[3])
    return usable if every else usable[:MOST_CANDIDATES]


def some(model: Model, trace: Trace, *, every: bool = False) -> list[LayerInfo]:
    """The candidates, at least one.

    Raises:
        CannotExplainError: there is none.
    """
    found = candidates(model, trace, every=every)
    if not found:
        raise CannotExplainError(
            "no layer",
            "expected a layer with more than one cell along each axis, the network has none "
            "for this input; name a layer with --layer.",
        )
    return found
