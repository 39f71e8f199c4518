"""Which layer of a network is meant, and which ones are worth trying?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from med_gradcam.errors import CannotExplainError, ModelError, UnknownNameError
from med_gradcam.graph import LayerInfo, Trace
from med_gradcam.model import Model

MOST_CANDIDATES = 4
# Layers that only move or pick values: the layer before them says the same with more places.
_PASSIVE = ("Pool", "Pad", "Dropout", "Identity", "Upsample", "Flatten", "Unflatten")


def find_layer(model: Model, name: str) -> tuple[str, torch.nn.Module]:
    """The module path and module of a layer given by its path or by an alias of the model.

    Raises:
        UnknownNameError: there is no such layer; the near ones are listed.
    """
    path = model.aliases.get(name, name)
    modules = dict(model.net.named_modules())
    if not path or path not in modules:
        known = [*model.aliases, *(n for n in modules if n)]
        raise UnknownNameError("layer", name, known, "`med-gradcam inspect MODEL` lists them all.")
    return path, modules[path]


def check_places(info: LayerInfo | None, path: str) -> LayerInfo:
    """The layer's information, if its output has places to point to.

    Raises:
        CannotExplainError: the output has no places, or is the network's output itself.
    """
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


def check_logits(net: torch.nn.Module, link: str, scores: Sequence[float]) -> None:
    """Refuse a network that ends in the link function itself: log-odds need what comes before it.

    Raises:
        CannotExplainError: its outputs are probabilities.
    """
    if link == "none":
        return
    last = type(list(net.modules())[-1]).__name__
    whole = len(scores) > 1 and min(scores) >= 0 and abs(sum(scores) - 1) < 1e-4
    if last in ("Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid") or (link == "softmax" and whole):
        raise CannotExplainError(
            "output",
            f"expected a network that puts out logits for the link {link!r}, got probabilities "
            f"(it ends in a softmax or sigmoid of its own); leave that last step out.",
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


def check_sparse(trace: Trace) -> None:
    """Refuse a network whose output is a map.

    Raises:
        CannotExplainError: with the shape of the output.
    """
    dense = next((x for x in trace.layers if x.is_output and max(x.shape[1:]) > 1), None)
    if dense is not None:
        raise CannotExplainError(
            "dense",
            f"expected a network with one score vector per scan, got an output of shape "
            f"{(1, *dense.shape)}; maps of a segmentation network cannot be explained yet.",
        )


def candidates(model: Model, trace: Trace) -> list[LayerInfo]:
    """At most four layers worth trying, coarsest first.

    Where the model names layers of its own (aliases) these are taken, else the last layer of each
    resolution; in both cases only layers with more than one cell per axis, and never the output.
    """
    named = [info for path in model.aliases.values() if (info := trace.find(path)) is not None]
    if not named:
        last: dict[tuple[float, ...], LayerInfo] = {}
        for info in trace.layers:
            passive = any(word in info.kind for word in _PASSIVE)
            if not passive and info.lattice is not None and info.runs == 1:
                last[info.lattice.jump] = info
        named = list(last.values())
    usable = [info for info in named if _usable(info)]
    usable.sort(key=lambda info: info.shape[1] * info.shape[2] * info.shape[3])
    return usable[:MOST_CANDIDATES]
