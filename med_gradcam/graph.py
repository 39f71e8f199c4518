"""What layers does a network have for one input: shapes, cells, work, and what they feed into?

One pass on shapes alone (meta tensors) follows every operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from med_gradcam.errors import MedGradcamError
from med_gradcam.flow import Flow
from med_gradcam.outputs import first_tensor
from med_gradcam.places import Places
from med_gradcam.receptive import LOST, RULES, Known, Lattice, follow, lattice, of_input
from med_gradcam.windows import WINDOWS

_NORMS = ("instance_norm", "group_norm", "layer_norm", "rms_norm")
_BY_THE_INPUT = {"instance_norm": "use_input_stats", "batch_norm": "training"}
_PASSED_ON = (
    "clone",
    "contiguous",
    "dropout",
    "dropout3d",
    "feature_dropout",
    "detach",
    "alpha_dropout",
)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer as it ran.

    Module path and class, output shape (C, i, j, k), its cells (None where an operation without a
    rule came before), the work done up to and including it in flops, whether its output is the
    network's output, how often it ran, and whether all that takes its output are norms that remove
    each channel's mean over the places. `past`: a path from the input to the output avoids it. For
    a network that puts out a map, `context` is the share of what a voxel of the map sees that is
    gathered behind the layer, and `pointwise` says that behind it each cell only sees itself.
    `weighted`: the part of the work that is convolutions and matrix products; `logits`: none of it
    comes behind the layer, which has a channel per score, so they are its sums or means.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    lattice: Lattice | None
    flops: float
    is_output: bool = False
    runs: int = 1
    feeds_norm: bool = False
    past: bool = False
    context: float = 1.0
    pointwise: bool = False
    weighted: float = 0.0
    logits: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """All layers with a 5-D output, in the order in which they finished, and the whole work.

    `norms`: whether Instance, Group or Layer norms were met.
    """

    layers: tuple[LayerInfo, ...]
    flops: float
    norms: bool = False

    def find(self, name: str) -> LayerInfo | None:
        """The layer of that module path, if its output has places."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def cuts(self, names: Sequence[str]) -> list[str]:
        """Those of the layers that every path to the scores passes through."""
        found = ((name, self.find(name)) for name in names)
        return [name for name, info in found if info is not None and not info.past]

    def tail_share(self, name: str) -> float:
        """Share of a forward's work that comes after a layer, 0..1."""
        layer = self.find(name)
        return 1.0 if layer is None or self.flops == 0 else 1.0 - layer.flops / self.flops


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


class _Follow(TorchDispatchMode):
    """Follows places through every operation, and counts the work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.flow = Flow()
        self.flops = 0.0
        self.weighted = 0.0

    def begin(self, x: torch.Tensor) -> None:
        """The network's input."""
        self.places[x] = of_input(x.shape)
        self.flow.begin(x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            work = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.flops += work
            self.weighted += work
        else:  # an operation per value put out
            self.flops += sum(t.numel() for t in _tensors(out))
        known = [(t, self.places[t]) for t in _tensors(args) if t in self.places]
        aside = []
        for turn, result in enumerate(_tensors(out)):
            places = follow(packet, args, known, result, turn) if known else None
            aside.append(_aside(packet, known, places, result) if known else 0.0)
            if places is not None:
                self.places[result] = places
            elif known:
                self.places.pop(result, None)  # done in place: what it held before is gone
        ins = [*_tensors(args), *_tensors(kwargs or {})]
        self.flow.step(func, ins, [*_tensors(out)], aside)
        return out


def _aside(packet: Any, known: Known, places: Places | None, out: torch.Tensor) -> float:
    """How much further a result sees than what it was made of, voxels, summed over the axes.

    One number for all places (a gate, a statistic) is none: it tells no place from another.
    """
    if packet in LOST:
        return math.inf
    if packet not in RULES or max(out.shape[2:], default=1) == 1:
        return 0.0  # where branches meet each gives an element its own
    if places is None:
        return math.inf if packet in WINDOWS else 0.0
    before = [max(own.field[n] for _, own in known) for n in range(3)]
    return sum(max(after - b, 0.0) for after, b in zip(places.field, before, strict=True))


class _Consumers(TorchFunctionMode):
    """Notes which functions take each layer's output as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.norms = False
        self.norm: Counter[str] = Counter()
        self.other: Counter[str] = Counter()

    def own(self, name: str, output: torch.Tensor) -> None:
        """A layer's output; inner and outer modules may share one tensor."""
        self.owners[output] = (*self.owners.get(output, ()), name)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        given = (*args, *(kwargs or {}).values())
        owners = {n for t in _tensors(given) if t in self.owners for n in self.owners[t]}
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        self.norms |= name in _NORMS
        trap = _takes_the_mean(name, args, kwargs or {})
        if owners and name in _PASSED_ON and isinstance(out, torch.Tensor):
            self.owners[out] = tuple(owners)
        elif owners and any(True for _ in _tensors(out)):  # asking for a shape consumes nothing
            (self.norm if trap else self.other).update(owners)
        return out

    def only_norms(self, name: str) -> bool:
        """Whether the layer's output went into norms that take its mean, and nothing else."""
        return self.norm[name] > 0 and self.other[name] == 0


def _takes_the_mean(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function takes each channel's own mean over places away from its input.

    Stored statistics take none, an RMSNorm neither; a group of several channels, or a norm over
    channels, takes one mean from all of them.
    """

    def given(position: int, word: str, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(word, default)

    x = given(0, "input", None)
    if name in ("instance_norm", "batch_norm"):  # by name or by place, the sixth
        return bool(given(5, _BY_THE_INPUT[name], name == "instance_norm"))
    if name == "group_norm":
        return bool(given(1, "num_groups", 1) == x.shape[1])
    return name == "layer_norm" and len(given(1, "normalized_shape", ())) <= x.ndim - 2


@dataclass(slots=True)
class _Recorder:
    mode: _Follow
    consumers: _Consumers
    layers: list[LayerInfo] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, int | None] = field(default_factory=dict)

    def hook(self, name: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, inputs: Any, out: Any) -> None:
            del inputs
            if not isinstance(out, torch.Tensor) or out.ndim != 5:
                return
            info = LayerInfo(
                name,
                type(module).__name__,
                tuple(out.shape[1:]),
                lattice(self.mode.places.get(out)),
                self.mode.flops,
                weighted=self.mode.weighted,
            )
            self.layers.append(info)
            self.last[name] = out
            self.values[name] = self.mode.flow.number(out)
            self.consumers.own(name, out)

        return record


def trace(net: torch.nn.Module, shape: Sequence[int], place: str = "") -> Trace:
    """The layers of `net` for one input of `shape` (C, I, J, K), without computing any value.

    `place`: where in the output the scores are, "" for its first tensor.

    The pass runs on shapes alone (meta tensors); networks that cannot do that are run once for
    real on zeros. The network is left as it was.
    """
    first = next(net.parameters(), torch.empty(0))
    state = {n: t.to("meta") for n, t in (*net.named_parameters(), *net.named_buffers())}

    def on_meta() -> Any:
        x = torch.empty((1, *shape), device="meta", dtype=first.dtype)
        return x, lambda: torch.func.functional_call(net, state, (x,))

    def for_real() -> Any:
        x = torch.zeros((1, *shape), device=first.device, dtype=first.dtype)
        return x, lambda: net(x)

    try:
        with _attributes_kept(net):  # what a network keeps of this pass has no values
            return _run(net, on_meta(), place)
    except (RuntimeError, NotImplementedError, TypeError):
        return _run(net, for_real(), place)


@contextmanager
def _attributes_kept(net: torch.nn.Module) -> Iterator[None]:
    """Each module's attributes, and the dicts, lists and sets among them, as they were."""
    kept = [(m.__dict__, dict(m.__dict__)) for m in net.modules()]
    plain = [v for _, before in kept for v in before.values() if type(v) in (dict, list, set)]
    inside = [(value, value.copy()) for value in plain]
    try:
        yield
    finally:
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)
        for value, copy in inside:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(copy)


def _scores(out: object, place: str) -> torch.Tensor | None:
    """The tensor that scores are read from; None where it is not there, which pick() tells."""
    try:
        return first_tensor(out, place)
    except MedGradcamError:
        return None


def _run(net: torch.nn.Module, what: tuple[torch.Tensor, Callable[[], Any]], place: str) -> Trace:
    x, call = what
    recorder = _Recorder(_Follow(), _Consumers())
    handles = [
        module.register_forward_hook(recorder.hook(name))
        for name, module in net.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), recorder.mode, recorder.consumers:
            recorder.mode.begin(x)
            out = call()
    finally:
        for handle in handles:
            handle.remove()
    output = _scores(out, place)
    counts = Counter(info.name for info in recorder.layers)
    weighted = recorder.mode.weighted
    ours = [replace(i, logits=_are_logits(i, output, weighted)) for i in recorder.layers]
    end = _map_of(ours, recorder, out if output is None else output)
    paths = _Paths.of(recorder.mode.flow, end, x)
    layers = tuple(
        replace(
            info,
            is_output=recorder.last[info.name] is output,
            runs=counts[info.name],
            feeds_norm=recorder.consumers.only_norms(info.name),
            past=paths.past(recorder.values[info.name]),
            context=paths.context(recorder.values[info.name]),
            pointwise=paths.pointwise(recorder.values[info.name], info.shape),
        )
        for info in ours
    )
    return Trace(layers, recorder.mode.flops, recorder.consumers.norms)


def _are_logits(info: LayerInfo, output: torch.Tensor | None, weighted: float) -> bool:
    """Whether a row of scores is made of a layer's channels without any weights."""
    row = output is not None and output.ndim == 2 and output.shape[1] == info.shape[0]
    return row and info.weighted == weighted and max(info.shape[1:]) > 1


def _map_of(infos: Sequence[LayerInfo], recorder: _Recorder, out: Any) -> Any:
    """The map whose region the scores are read from; the output itself where there is none.

    A map of logits with a cell per voxel of the input, which the network sums over a region.
    """
    fine = [i for i in infos if i.logits and i.lattice is not None and set(i.lattice.jump) == {1.0}]
    return recorder.last[fine[0].name] if fine else out


@dataclass(frozen=True, slots=True)
class _Paths:
    """What the paths to the output say of a value.

    The values that all of them pass through; how far the output looks beyond each value that leads
    to it, at most `extent` (the sides of the input, summed); its cells if it is a map, else none.
    """

    cuts: frozenset[int]
    behind: Mapping[int, float]
    extent: float
    cells: tuple[int, ...]

    @classmethod
    def of(cls, flow: Flow, out: Any, x: torch.Tensor) -> _Paths:
        """Those of an output of the network."""
        ends = [n for n in map(flow.number, _tensors(out)) if n is not None]
        cells = tuple(out.shape[2:]) if isinstance(out, torch.Tensor) and out.ndim == 5 else ()
        cells = cells if max(cells, default=1) > 1 else ()
        return cls(flow.cuts(ends), flow.behind(ends), float(sum(x.shape[2:])), cells)

    def past(self, value: int | None) -> bool:
        """Whether a path avoids a value; not said where no path is known at all."""
        return bool(self.behind) and value not in self.cuts

    def _beyond(self, value: int | None) -> float:
        return min(self.behind.get(-1 if value is None else value, 0.0), self.extent)

    def context(self, value: int | None) -> float:
        """The share of what a voxel of the map sees that is gathered behind a value, 0..1."""
        whole = self._beyond(0)
        return self._beyond(value) / whole if self.cells and whole else 1.0

    def pointwise(self, value: int | None, shape: Sequence[int]) -> bool:
        """Whether behind a value with the cells of the map each of them only sees itself."""
        own = bool(self.cells) and tuple(shape[1:]) == self.cells and value in self.behind
        return own and self._beyond(value) == 0.0
