"""What is looked at once, before any trap: the layer, its gradients, two maps, one watched run."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam import outputs, targeting
from med_gradcam.capture import Capture, capture_all
from med_gradcam.case import Case
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explaining import explained
from med_gradcam.explanation import Cells, Explanation
from med_gradcam.graph import LayerInfo, Trace
from med_gradcam.model import Model
from med_gradcam.prepare import Prepared
from med_gradcam.running import MISFIT, first_line
from med_gradcam.tail import INPUT
from med_gradcam.target import Kind, Target, class_name

MOST_CLASSES = 16  # whose Grad-CAM is looked at
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One plain prediction, watched.

    The raw `output`; `kept`: what the tensor that the layer put out holds at the end (C, i, j, k);
    `overwritten`: layers whose output a later operation changed in place; `tokens`: modules that
    put out (1, n, C).
    """

    output: Any
    kept: torch.Tensor
    overwritten: tuple[str, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What the traps are judged by.

    `activation` and gradients (C, i, j, k) float64 at the layer: of the `target` (log-odds) and of
    the raw logit, which is what other tools explain; `others`: the largest and smallest value of
    each class's Grad-CAM of its logit; `trap`: of the deepest layer that feeds a norm its name and
    the size of its largest Grad-CAM weight over that of its gradient; `ledger`: the default
    method's map at this layer, `auto`: at the layer of its choice, or why there is none;
    `handed_over_in_training`: which modules were; `trained`: the score in training mode, or why
    there is none.
    """

    model: Model
    prepared: Prepared
    traced: Trace
    info: LayerInfo
    cells: Cells
    named: bool
    target: Target
    score: float
    logit: float
    activation: torch.Tensor
    gradient: torch.Tensor
    logit_gradient: torch.Tensor
    others: tuple[tuple[str, float, float], ...]
    trap: tuple[str, float] | None
    run: Run
    ledger: Explanation | str
    auto: Explanation | str
    handed_over_in_training: tuple[str, ...]
    trained: float | str
    inputs: int = 1

    @property
    def layer(self) -> str:
        """The layer's module path."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """Cells along each axis."""
        i, j, k = self.info.shape[1:]
        return i, j, k

    def name(self, layer: str) -> str:
        """A layer for people: its path, and what the model's author calls it."""
        own = [alias for alias, path in self.model.aliases.items() if path == layer]
        return f"{layer} ({own[0]})" if own and own[0] != layer else layer

    def gradcam(self, *, logit: bool = False) -> Numbers:
        """Signed Grad-CAM (i, j, k) of the target, or of its raw logit."""
        gradient = self.logit_gradient if logit else self.gradient
        return weighted(self.activation, gradient)


def weighted(activation: torch.Tensor, gradient: torch.Tensor) -> Numbers:
    """Channels weighted by their mean gradient and added up (i, j, k), signed.

    Source: Selvaraju et al., arXiv:1610.02391, eq. 1-2 without their ReLU.
    """
    weights = gradient.mean(dim=(1, 2, 3), keepdim=True)
    return (weights * activation).sum(0).cpu().double().numpy()


def raw(target: Target) -> Target:
    """The same number of the output without the link function: the logit of the class."""
    kind: Kind = "regression" if target.kind == "class" else target.kind
    return replace(target, kind=kind, link="none")


def gather(case: Case, training: tuple[str, ...], modes: Sequence[bool], inputs: int) -> Facts:
    """Everything that the traps are judged by, for one opened case.

    `training`: the modules that were in training mode when handed over, `modes` that of all.

    Raises:
        CannotExplainError: the layer cannot be looked at.
        UsageError: the input was named as the layer.
    """
    x, traced = case.traced()
    name, named = _layer(case, traced)
    info = case.info(traced, name)
    trapped = [one.name for one in traced.layers if one.feeds_norm and one.runs == 1]
    seen = _seen(case, x, name, trapped[-1:])
    ledger, auto = _explained(case, name)
    trained: float | str = "the network takes several inputs"
    if inputs == 1:
        trained = _trained(case, x, seen.target, modes if training else ())
    return Facts(
        model=case.model,
        prepared=case.prepared,
        traced=traced,
        info=info,
        cells=case.cells(name),
        named=named,
        target=seen.target,
        score=seen.own.score,
        logit=seen.logit.score,
        activation=seen.own.activation.double(),
        gradient=seen.own.gradient().double(),
        logit_gradient=seen.logit.gradient().double(),
        others=seen.others,
        trap=seen.trap,
        run=watched(case.model.net, name, x),
        ledger=ledger,
        auto=auto,
        handed_over_in_training=training,
        trained=trained,
        inputs=inputs,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """The layer under the target and under its raw logit; `others` and `trap` as in Facts."""

    target: Target
    own: Capture
    logit: Capture
    others: tuple[tuple[str, float, float], ...]
    trap: tuple[str, float] | None


def _seen(case: Case, x: torch.Tensor, name: str, trapped: Sequence[str]) -> _Seen:
    """One prediction, and one gradient for each number that is looked at."""
    picked: list[Target] = []

    def choose(output: Any) -> list[list[Target]]:
        target = targeting.pick(case.request, output, case.model, case.prepared)
        picked.extend([target, raw(target), *_classes(target, output, case.model)])
        return [picked]

    look = list(dict.fromkeys([name, *trapped]))
    _, (found,) = capture_all(case.model.net, look, x, choose)
    own, logit, *rest = [row[name] for row in found]
    maps = [weighted(c.activation, c.gradient()) for c in rest]
    return _Seen(
        picked[0],
        own,
        logit,
        tuple(
            (target.label, float(m.max()), float(m.min()))
            for target, m in zip(picked[2:], maps, strict=True)
        ),
        (trapped[0], _weight_share(found[1][trapped[0]].gradient())) if trapped else None,
    )


def _layer(case: Case, traced: Trace) -> tuple[str, bool]:
    """The layer that was named, else the coarsest of the candidates."""
    if case.request.layer != "auto":
        name = case.layers(traced)[0]
        if name == INPUT:
            raise UsageError("expected a layer inside the network, got its input.")
        return name, True
    name = case.layers(traced)[0]
    if name == INPUT:
        raise UsageError(
            "expected a layer inside the network, auto takes its input: every layer sees single "
            "voxels only; name one with --layer."
        )
    return name, False


def _classes(target: Target, output: Any, model: Model) -> Iterator[Target]:
    """The raw logit of each of the first classes, in the target's own region if it has one."""
    if target.kind == "custom":
        return
    count = outputs.first_tensor(output, target.output).shape[1:2] or (1,)
    for c in range(min(count[0], MOST_CLASSES)):
        kind: Kind = "region" if target.kind == "region" else "regression"
        yield replace(
            target, kind=kind, label=class_name(model.labels, c), index=(c,), link="none",
            rival_weight=1.0,
        )  # fmt: skip


def _weight_share(gradient: torch.Tensor) -> float:
    """The largest channel mean of a gradient (C, i, j, k) over its largest mean size."""
    size = float(gradient.double().abs().mean(dim=(1, 2, 3)).max())
    mean = float(gradient.double().mean(dim=(1, 2, 3)).abs().max())
    return mean / size if size > 0 else 0.0


def _explained(case: Case, name: str) -> tuple[Explanation | str, Explanation | str]:
    """The default method's map at a layer, and at the layer that the causal test chooses."""
    request = case.request

    def one(layer: str) -> Explanation | str:
        case.begin(replace(request, layer=layer))
        try:
            return explained(case)
        except CannotExplainError as error:
            return str(error)

    auto = one("auto")
    if isinstance(auto, Explanation) and auto.layer == name:
        return auto, auto
    return one(name), auto


# ------------------------------------------------------------------------------ a watched run


@dataclass(slots=True)
class _Watch:
    """Follows the tensors that modules put out for as long as they are alive."""

    alive: dict[int, tuple[weakref.ref[torch.Tensor], int, list[str]]] = field(default_factory=dict)
    overwritten: dict[str, None] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)

    def look(self) -> None:
        """Note what has been written over since it was put out; forget what is gone."""
        for key, (ref, version, names) in list(self.alive.items()):
            tensor = ref()
            if tensor is None or tensor._version != version:  # noqa: SLF001 - torch has no other
                del self.alive[key]
                if tensor is not None:
                    self.overwritten.update(dict.fromkeys(names))

    def before(self, *_: Any) -> None:
        """A module is about to run."""
        self.look()

    def after(self, name: str) -> Callable[..., None]:
        """A hook for the module of that name."""

        def hook(module: Any, inputs: Any, out: Any) -> None:
            del module, inputs
            self.look()
            if not isinstance(out, torch.Tensor):
                return
            if out.ndim == 3 and out.shape[0] == 1 and min(out.shape[1:]) > 1:
                self.tokens.append(name)
            if out.ndim == 5:
                known = self.alive.get(id(out))
                names = known[2] if known is not None and known[0]() is out else []
                version = out._version  # noqa: SLF001 - torch has no other
                self.alive[id(out)] = weakref.ref(out), version, [*names, name]

        return hook


def watched(net: torch.nn.Module, layer: str, x: torch.Tensor) -> Run:
    """A plain prediction of x (1, C, I, J, K), with an eye on what is written over."""
    watch = _Watch()
    kept: list[torch.Tensor] = []
    handles = [net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))]
    for name, module in net.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(watch.before))
            handles.append(module.register_forward_hook(watch.after(name)))
    try:
        with torch.no_grad():
            output = net(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    watch.look()
    return Run(output, kept[0].detach()[0].double(), tuple(watch.overwritten), tuple(watch.tokens))


def _trained(case: Case, x: torch.Tensor, target: Target, modes: Sequence[bool]) -> float | str:
    """The score of a copy of the network in training mode, the network itself left alone.

    `modes`: as it was handed over; empty for all modules in training mode.
    """
    try:
        with _seeded(case.request.seed, x.device), torch.no_grad():
            net = copy.deepcopy(case.model.net)
            modules = list(net.modules())
            for module, mode in zip(modules, modes or [True] * len(modules), strict=True):
                module.training = mode
            return float(target(net(x.clone()))[0])
    except (*MISFIT, MemoryError) as error:
        return first_line(error)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout's draws from a seed, the caller's random state left alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def modes_of(net: torch.nn.Module) -> tuple[tuple[str, ...], list[bool]]:
    """The modules in training mode that behave differently in it, and the mode of all modules."""
    kinds = ("Dropout", "BatchNorm")
    acting = tuple(
        name
        for name, m in net.named_modules()
        if m.training and any(kind in type(m).__name__ for kind in kinds)
    )
    return acting, [m.training for m in net.modules()]
