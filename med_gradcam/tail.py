"""How is the part of a network behind a layer run alone, many times, at its own price only?

One recording pass keeps, at the moment the layer has run, the outputs of the outermost modules that
finished before it. A replay runs the network again with those modules answering from memory and
the layer answering with a given activation, so only the operations behind the layer (and bare
functions between modules, which are cheap) are computed. Inside a plain Sequential an output that
only feeds another remembered module is not kept.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from med_gradcam.errors import CannotExplainError, ModelError
from med_gradcam.forms import Form, form_of
from med_gradcam.outputs import changed, tensors

Score = Callable[[Any], torch.Tensor]
INPUT = "@input"  # the scan itself, taken as a layer: its cells are the network's voxels
_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def at_rest(net: torch.nn.Module) -> Iterator[None]:
    """The network in eval mode with frozen parameters, to itself; afterwards as it was.

    Threads that explain with one network wait for each other, since hooks and patched modules
    belong to the network and not to the thread.
    """
    if any(p.is_inference() for p in net.parameters()):
        raise ModelError(
            "expected a network whose weights can be part of a gradient, got one made inside "
            "torch.inference_mode(); make or copy it outside."
        )
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(net, threading.RLock())
    with lock, torch.inference_mode(mode=False):  # no gradients exist in inference mode
        modes = [(m, m.training) for m in net.modules()]
        grads = [(p, p.requires_grad) for p in net.parameters()]
        held = [(m, n, b, b.clone()) for m in net.modules() for n, b in _own_buffers(m)]
        try:
            for module, _ in modes:
                module.training = False
            for parameter, _ in grads:
                parameter.requires_grad = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, grad in grads:
                parameter.requires_grad = grad
            for module, name, buffer, before in held:  # counters, running statistics
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
                module._buffers[name] = buffer  # noqa: SLF001 - it may have been put aside


def _own_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]  # noqa: SLF001


@dataclass(slots=True)
class _Call:
    """A module at work during the recording pass: whose child it is, and what was done before."""

    module: torch.nn.Module
    parent: _Call | None
    first_record: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What a finished module answered; `output` is None where only remembered modules need it."""

    module: torch.nn.Module
    parent: _Call | None
    output: Any


@dataclass(slots=True)
class _Recording:
    wanted: dict[torch.nn.Module, str]
    slim: bool = False
    stack: list[_Call] = field(default_factory=list)
    records: list[Memory] = field(default_factory=list)
    memories: dict[str, tuple[Memory, ...]] = field(default_factory=dict)
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    forms: dict[str, Form | None] = field(default_factory=dict)
    rests: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def begin(self, module: torch.nn.Module, inputs: Any) -> None:
        del inputs
        parent = self.stack[-1] if self.stack else None
        self.stack.append(_Call(module, parent, len(self.records)))

    def end(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        del inputs
        call = self.stack.pop()
        records = self.records[: call.first_record]
        if records and call.parent is not None and type(call.parent.module) is torch.nn.Sequential:
            before = records[-1]
            if before.parent is call.parent:  # its output only feeds this module
                records[-1] = Memory(before.module, before.parent, None)
        self.records = records
        name = self.wanted.get(module)
        if name is not None:
            if name in self.memories:
                raise CannotExplainError(
                    "shared layer",
                    f"expected the layer {name!r} to run once per scan, it ran twice or more "
                    f"(shared weights); choose another layer.",
                )
            self.memories[name] = tuple(records)
            form = self.forms.get(name)
            self.activations[name] = as_cells(output, name, form).detach().clone()
            self.rests[name] = None if form is None else form.beside(output.detach())
        # A copy: what follows may work in place on the output.
        kept = stand_in(output) if self.slim else _copies(output, 1)
        self.records.append(Memory(module, call.parent, kept))


def as_cells(output: Any, name: str, form: Form | None) -> torch.Tensor:
    """A layer's raw output as cells (n, C, i, j, k); as it is where it has that form.

    Raises:
        CannotExplainError: it cannot be seen so.
    """
    if form is not None and isinstance(output, torch.Tensor):
        return form.cells(output)
    if not isinstance(output, torch.Tensor) or output.ndim != 5:
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise CannotExplainError(
            "logits",
            f"expected the layer {name!r} to put out (1, C, i, j, k), got {got}; "
            f"choose an earlier layer.",
        )
    return output


def _copies(value: Any, count: int, *, scans: int = 1, solid: bool = False) -> Any:
    """What was remembered, for a batch of `count`; for one: a copy to be worked on in place.

    `scans`: of how many it was remembered. `solid`: what stands in for a value can be worked on in
    place, too.
    """
    times = max(count // scans, 1)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if _stands_in(tensor):
            shape = (times * len(tensor), *tensor.shape[1:])
            return tensor.new_zeros(shape) if solid else tensor.expand(shape)
        if times > 1 and len(tensor) > 1:  # slices or windows of each scan, in the batch
            return tensor.repeat(times, *[1] * (tensor.ndim - 1))
        if count == 1:
            return tensor.clone()
        return tensor.expand(times * len(tensor), *tensor.shape[1:])

    return changed(value, copy)


def stand_in(value: Any) -> Any:
    """Of the same form and shape, but of one number: nothing that counts is made of it."""
    return changed(value, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))


def _stands_in(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 0 and not any(tensor.stride())


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """The network behind one layer, for one input `x` (1, C, I, J, K).

    `alone`: activations are run one by one, for networks that cannot be run, or answer otherwise,
    as a batch. `solid`: what stands in for an output that is not needed has memory of its own, for
    networks that work in place on it. `rest`: what of the layer's output has no place (class
    tokens); it stays as it is.
    """

    net: torch.nn.Module
    layer: str
    x: torch.Tensor
    memory: tuple[Memory, ...]
    alone: bool = False
    solid: bool = False
    rest: torch.Tensor | None = None

    @property
    def form(self) -> Form | None:
        """How the layer's output is seen as cells; None where it is (n, C, i, j, k)."""
        return form_of(self.net, self.layer, self.x)

    def raw(self, activations: torch.Tensor) -> torch.Tensor:
        """What the layer puts out with these cells (n, C, i, j, k), in new memory."""
        form = self.form
        return activations.clone() if form is None else form.whole(activations, self.rest)

    def run(self, activations: torch.Tensor) -> Any:
        """The network's output when the layer puts out `activations` (n, C, i, j, k)."""
        if self.layer == INPUT:
            return self.net(activations.clone())
        with self.replay(activations):
            return self.net(_copies(self.x, len(activations), scans=len(self.x)))

    @contextmanager
    def replay(self, activations: torch.Tensor) -> Iterator[None]:
        """Within it, a call of the network computes only what lies behind the layer."""
        answers: dict[torch.nn.Module, deque[Any]] = defaultdict(deque)
        for memory in self.memory:
            answers[memory.module].append(memory.output)
        module = self.net.get_submodule(self.layer)
        missing = object()
        before = {m: m.__dict__.get("forward", missing) for m in (*answers, module)}
        count = len(activations)

        def answer(owner: torch.nn.Module) -> Callable[..., Any]:
            queue, real = answers[owner], owner.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                if not queue:
                    return real(*args, **kwargs)
                value = queue.popleft()
                if value is None:
                    return activations.new_zeros(1)
                return _copies(value, count, scans=len(self.x), solid=self.solid)

            return forward

        try:
            for owner in list(answers):
                owner.__dict__["forward"] = answer(owner)
            # A clone: what follows may work in place, the activation itself must stay.
            module.__dict__["forward"] = lambda *_a, **_k: self.raw(activations)
            yield
        finally:
            for owner, forward in before.items():
                if forward is missing:
                    owner.__dict__.pop("forward", None)
                else:
                    owner.__dict__["forward"] = forward

    def scores(self, activations: torch.Tensor, score: Score) -> torch.Tensor:
        """Scores (n,) of the target for activations (n, C, i, j, k); no gradient."""
        with torch.no_grad():
            return self._scored(activations, score)

    def gradients(self, activations: torch.Tensor, score: Score) -> torch.Tensor:
        """Gradients d score / d activation for each of n activations, shape (n, C, i, j, k)."""
        with torch.enable_grad():
            leaf = activations.detach()
            leaf.requires_grad = True
            total = self._scored(leaf, score).sum()
            if not total.requires_grad:
                raise CannotExplainError("zero gradient", no_gradient(self.layer))
            return slopes(total, [leaf])[0]

    def _scored(self, activations: torch.Tensor, score: Score) -> torch.Tensor:
        if len(activations) == 1 or self.alone:
            return torch.cat([score(self.run(one[None])) for one in activations])
        return score(self.run(activations))

    def faithful(self, activations: torch.Tensor, score: Score, known: float) -> Tail:
        """A tail that gives the `known` score of the first of two activations.

        It is this one, else one that runs activations one by one, else one that also remembers
        nothing and runs the whole network.

        Raises:
            CannotExplainError: the network gives another score each time.
        """
        whole = replace(self, alone=True, memory=())
        for solid, alone in ((False, False), (True, False), (False, True), (True, True)):
            if solid and not any(_stands_in(t) for m in self.memory for _, t in tensors(m.output)):
                continue
            tail = replace(self, alone=alone, solid=solid)
            try:
                found = float(tail.scores(activations, score)[0])
            except (
                RuntimeError,
                IndexError,
                AssertionError,
            ):  # a batch, or a memory, that does not fit
                continue
            if not math.isfinite(known) or abs(found - known) <= _near(activations, known):
                return tail
        check_repeats(activations, known, float(whole.scores(activations, score)[0]))
        return whole


def slopes(score: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a scalar score; those of float16 in float32, raised above its underflow.

    Behind a mean over 64^3 cells a gradient is weight / 262144, which float16 rounds away.
    """
    half = any(leaf.dtype == torch.float16 for leaf in leaves)
    found: Sequence[torch.Tensor] = ()
    gain = 1.0
    for gain in (2.0**12, 2.0**6, 1.0) if half else (1.0,):
        found = torch.autograd.grad(score * gain, leaves, retain_graph=True, materialize_grads=True)
        if gain == 1.0 or all(bool(torch.isfinite(g).all()) for g in found):
            break
    return [g.float() / gain if half else g for g in found]


def check_repeats(activations: torch.Tensor, known: float, found: float) -> None:
    """Refuse a network whose two scores for one input differ by more than rounding.

    Raises:
        CannotExplainError: with both scores.
    """
    if math.isfinite(known) and not abs(found - known) <= _near(activations, known):
        raise CannotExplainError(
            "not repeatable",
            f"expected the network to give the same score twice, it gave {known:.6g} and "
            f"{found:.6g}, a different score each time; is dropout or noise at work in it?",
        )


def _near(activations: torch.Tensor, score: float) -> float:
    """How far apart two scores of the same activation may be by rounding alone."""
    exact = activations.device.type == "cpu"  # elsewhere convolutions may round to TF32
    wide = 1e-6 if activations.dtype == torch.float64 else 1e-4 if exact else 5e-3
    return max(wide, 4 * torch.finfo(activations.dtype).eps) * max(1.0, abs(score))


def no_gradient(layer: str) -> str:
    """What to say when the score does not depend on a layer."""
    return (
        f"the score does not depend on the layer {layer!r} for this scan (its gradient is zero "
        f"everywhere), so a map of it would show nothing; choose another layer or target."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One forward: the raw output, and for each layer its activation (1, C, i, j, k) and tail."""

    output: Any
    activations: dict[str, torch.Tensor]
    tails: dict[str, Tail]


def record(
    net: torch.nn.Module, layers: Sequence[str], x: torch.Tensor, cuts: Collection[str] = ()
) -> Recorded:
    """Run the network once without gradients and remember what its tails need.

    `cuts`: layers that every path to the score is known to pass through. If all layers are cuts,
    what came before them is needed for its shape only, and no copy of it is kept.

    Raises:
        CannotExplainError: a layer never runs, runs twice or puts out no (1, C, i, j, k).
    """
    wanted = {net.get_submodule(name): name for name in layers if name != INPUT}
    recording = _Recording(wanted, slim=set(wanted.values()) <= set(cuts))
    recording.forms = {name: form_of(net, name, x) for name in layers}
    handles = []
    for module in net.modules():
        if module is not net:
            handles.append(module.register_forward_pre_hook(recording.begin))
            # First: the hooks of the user's run again in a replay, on what the module put out.
            handles.append(module.register_forward_hook(recording.end, prepend=True))
    try:
        with torch.no_grad():
            output = net(x.clone())  # which may work in place on it
    finally:
        for handle in handles:
            handle.remove()
    if INPUT in layers:
        recording.activations[INPUT] = x.detach().clone()
        recording.memories[INPUT] = ()
    for name in layers:
        if name not in recording.activations:
            raise CannotExplainError(
                "never ran",
                f"expected the layer {name!r} to run for this scan, it never did; "
                f"choose a layer that `med-gradcam inspect MODEL` lists.",
            )
    tails = {
        name: Tail(net, name, x, recording.memories[name], rest=recording.rests.get(name))
        for name in layers
    }
    return Recorded(output, recording.activations, tails)
