"""What layers does a network have for one input: shapes, cells, work, and what they feed into?

One pass on shapes alone (meta tensors) follows every operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from med_gradcam.errors import MedGradcamError
from med_gradcam.outputs import first_tensor
from med_gradcam.receptive import Lattice, follow, lattice, of_input

_NORMS = ("instance_norm", "group_norm", "layer_norm", "rms_norm")
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
    network's output, how often it ran, and whether all that takes its output is an Instance,
    Group or LayerNorm.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    lattice: Lattice | None
    flops: float
    is_output: bool = False
    runs: int = 1
    feeds_norm: bool = False


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
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        else:  # an operation per value put out
            self.flops += sum(t.numel() for t in _tensors(out))
        known = [(t, self.places[t]) for t in _tensors(args) if t in self.places]
        if known:
            for turn, result in enumerate(_tensors(out)):
                places = follow(packet, args, known, result, turn)
                if places is None:
                    self.places.pop(result, None)  # done in place: what it held before is gone
                else:
                    self.places[result] = places
        return out


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
        if owners and name in _PASSED_ON and isinstance(out, torch.Tensor):
            self.owners[out] = tuple(owners)
        elif owners and any(True for _ in _tensors(out)):  # asking for a shape consumes nothing
            (self.norm if name in _NORMS else self.other).update(owners)
        return out

    def only_norms(self, name: str) -> bool:
        """Whether the layer's output went into norms and nothing else."""
        return self.norm[name] > 0 and self.other[name] == 0


@dataclass(slots=True)
class _Recorder:
    mode: _Follow
    consumers: _Consumers
    layers: list[LayerInfo] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)

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
            )
            self.layers.append(info)
            self.last[name] = out
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
            recorder.mode.places[x] = of_input(x.shape)
            out = call()
    finally:
        for handle in handles:
            handle.remove()
    output = _scores(out, place)
    counts = Counter(info.name for info in recorder.layers)
    layers = tuple(
        LayerInfo(
            info.name,
            info.kind,
            info.shape,
            info.lattice,
            info.flops,
            is_output=recorder.last[info.name] is output,
            runs=counts[info.name],
            feeds_norm=recorder.consumers.only_norms(info.name),
        )
        for info in recorder.layers
    )
    return Trace(layers, recorder.mode.flops, recorder.consumers.norms)
