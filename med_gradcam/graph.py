"""What layers does a network have for one input: shapes, cells, work, and what they feed into?

One pass on shapes alone (meta tensors) follows every operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from med_gradcam import forms
from med_gradcam.consumers import Consumers, tensors_in
from med_gradcam.errors import MedGradcamError
from med_gradcam.flow import Flow
from med_gradcam.forms import Form
from med_gradcam.one_slice import Flat
from med_gradcam.outputs import first_tensor
from med_gradcam.receptive import LOST, RULES, Lattice, of_input
from med_gradcam.shapes import CANNOT, attributes_kept, for_real, on_meta
from med_gradcam.tokens import Followed, Known, follow, picks
from med_gradcam.windows import WINDOWS

# Operations that let each token look at all of them.
_ATTENTION = frozenset(
    """
    _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
    _native_multi_head_attention _transformer_encoder_layer_fwd
    """.split()
)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer as it ran.

    Module path and class, shape of its output as cells (C, i, j, k), these cells (None where an
    operation without a rule came before), the work done up to and including it in flops, whether
    its output is the network's output, how often it ran, and whether all that takes its output are
    norms that remove each channel's mean over the places. `past`: a path from the input to the
    output avoids it. For a network that puts out a map, `context` is the share of what a voxel of
    the map sees that is gathered behind the layer, and `pointwise` says that behind it each cell
    only sees itself.
    `weighted`: the part of the work that is convolutions and matrix products; `logits`: none of it
    comes behind the layer, which has a channel per score, so they are its sums or means. `form`:
    how its raw output is seen as cells, None where it is (1, C, i, j, k); `silent`: behind it
    nothing is read but tokens without a place (a class token); `sides`: the input's, in voxels.
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
    form: Form | None = None
    silent: bool = False
    sides: tuple[int, ...] = ()

    @property
    def spread(self) -> bool:
        """Whether there is more than one cell along each axis that the scan has voxels along."""
        sides = self.sides or (2, 2, 2)
        return all(n > 1 or side == 1 for n, side in zip(self.shape[1:], sides, strict=True))


@dataclass(frozen=True, slots=True)
class Trace:
    """All layers whose output is seen as cells, in the order in which they finished; all the work.

    `norms`: whether Instance, Group or Layer norms were met; `values`: the number of the value that
    each layer puts out (flow.py), the same for modules that pass it on; `unplaced`: layer and raw
    shape of the other tensors that were put out.
    """

    layers: tuple[LayerInfo, ...]
    flops: float
    norms: bool = False
    values: tuple[int | None, ...] = ()
    unplaced: tuple[tuple[str, tuple[int, ...]], ...] = ()

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
            self.flops += sum(t.numel() for t in tensors_in(out))
        known = [(t, self.places[t]) for t in tensors_in(args) if t in self.places]
        aside = []
        for turn, result in enumerate(tensors_in(out)):
            places = follow(packet, args, known, result, turn) if known else None
            aside.append(_aside(packet, known, places, result) if known else 0.0)
            if places is not None:
                self.places[result] = places
            elif known:
                self.places.pop(result, None)  # done in place: what it held before is gone
        ins = [*tensors_in(args), *tensors_in(kwargs or {})]
        self.flow.step(func, ins, [*tensors_in(out)], aside)
        if picks(packet, known):
            for result in tensors_in(out):
                if result not in self.places and result in self.flow.numbers:
                    self.flow.picked.add(self.flow.numbers[result])
        return out


def _aside(packet: Any, known: Known, places: Followed | None, out: torch.Tensor) -> float:
    """How much further a result sees than what it was made of, voxels, summed over the axes.

    One number for all places (a gate, a statistic) is none: it tells no place from another.
    """
    if packet in LOST or packet.__name__ in _ATTENTION:
        return math.inf
    if packet not in RULES or max(out.shape[2:], default=1) == 1:
        return 0.0  # where branches meet each gives an element its own
    if places is None:
        return math.inf if packet in WINDOWS else 0.0
    before = [max(own.field[n] for _, own in known) for n in range(3)]
    return sum(max(after - b, 0.0) for after, b in zip(places.field, before, strict=True))


@dataclass(slots=True)
class _Recorder:
    mode: _Follow
    consumers: Consumers
    layers: list[LayerInfo] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, int | None] = field(default_factory=dict)
    unplaced: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    extent: tuple[int, ...] = ()

    def hook(self, name: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, inputs: Any, out: Any) -> None:
            del inputs
            if not isinstance(out, torch.Tensor):
                return
            seen = forms.derived(out.shape, self.mode.places.get(out), self.extent)
            if seen is None:
                self.unplaced.append((name, tuple(out.shape)))
                return
            form, cells = seen
            info = LayerInfo(
                name,
                type(module).__name__,
                tuple(out.shape[1:]) if form is None else form.counts,
                cells,
                self.mode.flops,
                weighted=self.mode.weighted,
                form=form,
                sides=self.extent,
            )
            self.layers.append(info)
            self.last[name] = out
            self.values[name] = self.mode.flow.number(out)
            self.consumers.own(name, out, form)

        return record


def trace(net: torch.nn.Module, shape: Sequence[int], place: str = "") -> Trace:
    """The layers of `net` for one input of `shape` (C, I, J, K), without computing any value.

    `place`: where in the output the scores are, "" for its first tensor.

    The pass runs on shapes alone (meta tensors); networks that cannot do that are run once for
    real on zeros. The network is left as it was.
    """
    whole = (1, *shape)
    try:
        inner = net.inner if isinstance(net, Flat) else net
        with attributes_kept(net), attributes_kept(inner):  # what is kept of this has no values
            made = _run(net, on_meta(net, whole), place)
    except CANNOT:
        made = _run(net, for_real(net, whole), place)
    forms.remember(net, shape, {info.name: info.form for info in made.layers})
    return made


def _scores(out: object, place: str) -> torch.Tensor | None:
    """The tensor that scores are read from; None where it is not there, which pick() tells."""
    try:
        return first_tensor(out, place)
    except MedGradcamError:
        return None


def _run(net: torch.nn.Module, what: tuple[torch.Tensor, Callable[[], Any]], place: str) -> Trace:
    x, call = what
    recorder = _Recorder(_Follow(), Consumers(), extent=tuple(x.shape[2:]))
    handles = [
        module.register_forward_hook(recorder.hook(name))
        for name, module in net.named_modules()
        if name
    ]
    plain: list[Any] = []  # what the network for images puts out, before its axis is put back
    if isinstance(net, Flat):
        handles.append(net.inner.register_forward_hook(lambda _m, _i, out: plain.append(out)))
    try:
        with torch.no_grad(), recorder.mode, recorder.consumers:
            recorder.mode.begin(x)
            out = call()
    finally:
        for handle in handles:
            handle.remove()
    output = _scores(out, place)
    raw = _scores(plain[-1], place) if plain else output
    counts = Counter(info.name for info in recorder.layers)
    weighted = recorder.mode.weighted
    ours = [replace(i, logits=_are_logits(i, output, weighted)) for i in recorder.layers]
    paths = _Paths.of(recorder.mode.flow, _map_of(ours, recorder, output, out), x)
    layers = tuple(
        replace(
            info,
            is_output=recorder.last[info.name] is raw,
            runs=counts[info.name],
            feeds_norm=recorder.consumers.only_norms(info.name),
            past=paths.past(recorder.values[info.name]),
            context=paths.context(recorder.values[info.name]),
            pointwise=paths.pointwise(recorder.values[info.name], info.shape),
            silent=recorder.values[info.name] in paths.silent,
        )
        for info in ours
    )
    values = tuple(recorder.values[info.name] for info in layers)
    norms, unplaced = recorder.consumers.norms, tuple(recorder.unplaced)
    return Trace(layers, recorder.mode.flops, norms, values, unplaced)


def _are_logits(info: LayerInfo, output: torch.Tensor | None, weighted: float) -> bool:
    """Whether a row of scores is made of a layer's channels without any weights."""
    row = output is not None and output.ndim == 2 and output.shape[1] == info.shape[0]
    return row and info.weighted == weighted and max(info.shape[1:]) > 1


def _map_of(
    infos: Sequence[LayerInfo], recorder: _Recorder, output: torch.Tensor | None, out: Any
) -> tuple[Any, tuple[int, ...]]:
    """The map whose region the scores are read from, and its cells; the whole output for none.

    A map of logits with a cell per voxel of the input, which the network sums over a region.
    """
    fine = [i for i in infos if i.logits and i.lattice is not None and set(i.lattice.jump) == {1.0}]
    if fine:
        return recorder.last[fine[0].name], fine[0].shape[1:]
    if output is None:
        return out, ()
    return output, tuple(output.shape[2:]) if output.ndim == 5 else ()


@dataclass(frozen=True, slots=True)
class _Paths:
    """What the paths to the output say of a value.

    The values that all of them pass through; how far the output looks beyond each value that leads
    to it, at most `extent` (the sides of the input, summed); its cells if it is a map, else none;
    the values of which it reads nothing but tokens without a place.
    """

    cuts: frozenset[int]
    silent: frozenset[int]
    behind: Mapping[int, float]
    extent: float
    cells: tuple[int, ...]

    @classmethod
    def of(cls, flow: Flow, what: tuple[Any, tuple[int, ...]], x: torch.Tensor) -> _Paths:
        """Those of an output of the network, with its cells."""
        out, cells = what
        ends = [n for n in map(flow.number, tensors_in(out)) if n is not None]
        cells = cells if max(cells, default=1) > 1 else ()
        far = float(sum(x.shape[2:]))
        return cls(flow.cuts(ends), flow.silent(ends), flow.behind(ends), far, cells)

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
