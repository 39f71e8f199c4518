"""Which layer of a network is meant, and which ones are worth trying?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from med_gradcam.errors import CannotExplainError, UnknownNameError
from med_gradcam.explanation import Cells
from med_gradcam.graph import LayerInfo, Trace
from med_gradcam.model import Model
from med_gradcam.tail import INPUT

MOST_CANDIDATES = 4
INPUT_CELLS = Cells((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "exact")
# Layers that only move or pick values: the layer before them says the same with more places.
_PASSIVE = ("Pool", "Pad", "Dropout", "Identity", "Upsample", "Flatten", "Unflatten", "Rearrange")
_VECTOR = 2  # dims of a row of numbers
OWN_PLACE = (
    "behind the layer {!r} each cell only sees itself, but for what norms and gates take of all: "
    "its map is the target's own region, whatever the model looked at; choose an earlier layer"
)
HALF = 0.5  # the least share of what a voxel of a map sees that is gathered behind a candidate


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


def check_places(
    info: LayerInfo | None, path: str, shape: Sequence[int] | None = None
) -> LayerInfo:
    """The layer's information, if its output has places to point to.

    `shape`: of what it puts out, where that cannot be seen as cells.

    Raises:
        CannotExplainError: the output has no places, or is the network's output itself.
    """
    if info is None and path == INPUT:
        return LayerInfo(INPUT, "Input", (), None, 0.0)
    if info is None and shape is not None and len(shape) > _VECTOR:
        raise CannotExplainError(
            "no grid",
            f"expected a layer whose output can be followed to cells of the scan, that of "
            f"{path!r} {tuple(shape)} cannot: an operation before it mixes, drops or reorders "
            f"tokens or places; choose an earlier layer, or the block that holds this one.",
        )
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
    if info.silent:
        raise CannotExplainError(
            "class token",
            f"behind the layer {path!r} only tokens without a place (a class token) are read, so "
            f"its cells say nothing; choose the block before, which the last attention reads.",
        )
    if info.is_output:
        raise CannotExplainError(
            "logits",
            f"the layer {path!r} is the network's output itself, so there is nothing to explain "
            f"it by; choose an earlier layer.",
        )
    return info


def _usable(info: LayerInfo) -> bool:
    wanted = not info.is_output and not info.logits and not info.silent
    return wanted and info.runs == 1 and info.spread


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
    near = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    between = float(logits.min()) >= 0 and 0 < float(logits.max()) <= 1 + near
    whole = several and between and float((logits.double().sum(dim=1) - 1).abs().max()) < near
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


def check_fast(trace: Trace, names: Sequence[str]) -> None:
    """Refuse --fast for layers with tokens that have no place, which the fast part does not keep.

    Raises:
        CannotExplainError: with the layer.
    """
    found = (trace.find(name) for name in names)
    beside = [info.name for info in found if info and info.form and info.form.rest]
    if beside:
        raise CannotExplainError(
            "not fast",
            f"expected layers whose output is all cells for --fast, that of {beside[0]!r} has "
            f"tokens without a place (a class token); run it without --fast.",
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


def _tried(trace: Trace) -> list[LayerInfo]:
    """The layers worth trying of each resolution: cuts, with half the context behind, if any.

    Never one behind which each cell only sees itself: like the logits, its map is the target's own
    region. Nor, if there is another, one behind which little of the context is gathered: its map
    is that region with a margin.
    """
    pool = [
        info
        for info in _without_logits(trace.layers)
        if _usable(info)
        and info.lattice is not None
        and not info.pointwise
        and not any(word in info.kind for word in _PASSIVE)
    ]
    pool = [info for info in pool if info.context >= HALF] or pool
    return [info for info in pool if not info.past] or pool


def _whole_layers(model: Model, trace: Trace) -> Trace:
    """Without the single operations of a layer, which programs that were opened show as well."""
    inner = {name for name, m in model.net.named_modules() if getattr(m, "inner", False) is True}
    return replace(trace, layers=tuple(i for i in trace.layers if i.name not in inner))


def candidates(model: Model, trace: Trace, *, every: bool = False) -> list[LayerInfo]:
    """At most four layers worth trying (or `every` one), coarsest first.

    Where the model names layers of its own (aliases) these are taken, else the last layer of each
    resolution; in both cases only layers with more than one cell per axis, never the output or what
    says no more than it, and where some are cuts, no layer that a path leads past.
    """
    named = [info for path in model.aliases.values() if (info := trace.find(path)) is not None]
    kept = [info for info in named if _usable(info) and not info.pointwise]
    kept = [info for info in kept if not info.past] or kept
    if not named:
        tried = _tried(_whole_layers(model, trace)) or _tried(trace)
        kept = _with_depths(_last_of_each(tried), tried, trace)
    kept.sort(key=_cells)
    return kept if every else kept[:MOST_CANDIDATES]


def passed_over(model: Model, trace: Trace) -> list[tuple[str, str]]:
    """The coarsest layers that would be candidates but for what is behind or beside them, and why.

    Only of resolutions that no candidate has.
    """
    found = candidates(model, trace, every=True)
    trace = _whole_layers(model, trace)
    paths = model.aliases.values()
    own = [info for info in trace.layers if info.name in paths] or [
        info
        for info in _without_logits(trace.layers)
        if info.lattice is not None and not any(word in info.kind for word in _PASSIVE)
    ]
    left = _last_of_each([info for info in own if _usable(info)])
    have = {_jump(info) for info in found}
    left = [info for info in left if _jump(info) not in have]
    left.sort(key=_cells)
    return [(info.name, _why(info)) for info in left[:MOST_CANDIDATES]]


def _with_depths(
    kept: list[LayerInfo], tried: Sequence[LayerInfo], trace: Trace
) -> list[LayerInfo]:
    """Where tokens keep their resolution from block to block: the last, and earlier ones beside it.

    The one before it, the middle and the first one; deepest first.
    """
    number = dict(zip((info.name for info in trace.layers), trace.values, strict=True))
    more: list[LayerInfo] = []
    for last in kept:
        if last.form is None or not last.form.sequence or len(kept) >= MOST_CANDIDATES:
            more.append(last)
            continue
        same = [i for i in tried if _jump(i) == _jump(last)]
        row = list({number[info.name]: info for info in same}.values())
        picks = {len(row) - 1, max(len(row) - 2, 0), (len(row) - 1) // 2, 0}
        more += [row[n] for n in sorted(picks, reverse=True)]
    return more


def _why(info: LayerInfo) -> str:
    if info.pointwise:
        return "pointwise"
    return "not a cut" if info.past else "little context"


def _last_of_each(infos: Sequence[LayerInfo]) -> list[LayerInfo]:
    return list({_jump(info): info for info in infos}.values())


def _jump(info: LayerInfo) -> object:
    return info.name if info.lattice is None else info.lattice.jump


def _cells(info: LayerInfo) -> int:
    return info.shape[1] * info.shape[2] * info.shape[3]


def some(model: Model, trace: Trace, *, every: bool = False) -> list[LayerInfo]:
    """The candidates; the input itself where all layers are no more than the output.

    Raises:
        CannotExplainError: there is none.
    """
    found = candidates(model, trace, every=every)
    if found:
        return found
    if any(info.pointwise and _usable(info) for info in trace.layers):
        return [check_places(None, INPUT)]
    shared = [i.name for i in trace.layers if i.runs > 1 and _usable(replace(i, runs=1))]
    if shared:
        raise CannotExplainError(
            "shared layer",
            f"expected a layer with more than one cell along each axis that runs once per scan, "
            f"all of the network's run several times (shared, such as {shared[-1]!r}); name "
            f"--layer @input.",
        )
    raise CannotExplainError(
        "no layer",
        "expected a layer with more than one cell along each axis, the network has none "
        "for this input; name a layer with --layer.",
    )


def beside(model: Model, trace: Trace, named: Sequence[str]) -> str:
    """The layer beside the input: the one that was named, else the coarsest candidate.

    Raises:
        CannotExplainError: none was named, and there is no candidate.
    """
    found = [name for name in (find_layer(model, one)[0] for one in named) if name != INPUT]
    if found:
        return check_places(trace.find(found[0]), found[0]).name
    first = some(model, trace)[0].name
    if first == INPUT:
        raise CannotExplainError(
            "no layer",
            "expected a layer with more behind it than single cells, the network has none; name "
            "the layer beside the input with --layer.",
        )
    return first
