"""What does each of several scans that a network takes say, all of them compared at once?

The scans, on one grid, become the channels of one; all are replaced by their references together,
and `secant` shares the score's difference out at one layer per input's branch, a cut of several. So
the maps add up to the difference together. One map per input against a network that keeps the
others (explain() with inputs=) adds up to another difference, that of replacing this input alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from med_gradcam import gradient_free, intake
from med_gradcam.case import Case
from med_gradcam.errors import ModelError, UsageError
from med_gradcam.explaining import result
from med_gradcam.explanation import Explanation
from med_gradcam.opening import opened
from med_gradcam.tail import record
from med_gradcam.volume import Volume

SAME = 1e-5  # of a layer's largest activation: less than that is no change
TOGETHER = "this map is one input's share: with the maps of the others it adds up"


@dataclass(frozen=True, slots=True, eq=False)
class JointExplanation:
    """One map per input, in their order; together they add up to score - reference_score.

    The reference score is that of all inputs replaced. Each map's own `bypassed` is the share that
    the other inputs have, and what flows past all the layers.
    """

    maps: tuple[Explanation, ...]
    names: tuple[str, ...]

    @property
    def nets(self) -> tuple[float, ...]:
        """What each input's map says in all, in the target's unit."""
        return tuple(e.sum_for - e.sum_against for e in self.maps)

    @property
    def residual(self) -> float:
        """Score - reference_score - all nets: what flows past the layers, and rounding."""
        e = self.maps[0]
        return e.score - (e.reference_score or 0.0) - sum(self.nets)


class _Joined(torch.nn.Module):
    """The network of one scan whose channels are those of all its inputs."""

    def __init__(self, net: torch.nn.Module, counts: Sequence[int], names: Sequence[str]) -> None:
        super().__init__()
        self.net, self.counts, self.names = net, list(counts), list(names)
        self.train(net.training)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = torch.split(x, self.counts, dim=1)
        if self.names:
            return self.net(*args, **dict(zip(self.names, parts, strict=True)), **kwargs)
        return self.net(*parts, *args, **kwargs)


def explain_inputs(
    images: Sequence[object] | Mapping[str, object],
    model: object,
    *,
    layers: Sequence[str],
    reference: object = "auto",
    **settings: Any,
) -> JointExplanation:
    """One `secant` map per scan that the network takes; together they add up.

    `images`: scans on one grid, in the order of the network's inputs, or by name; `layers`: for
    each a layer of its own branch, before the branches meet. `reference`: as for explain(), or one
    Volume per scan. `inputs` holds what else the network takes, behind the scans; further settings
    are those of explain().

    Raises:
        UsageError: fewer than two scans, not one layer for each, a layer of another input's branch.
        ModelError: no torch module. Otherwise as explain().
    """
    _check_kinds(images, reference)
    names = list(images) if isinstance(images, Mapping) else []
    scans = list(images.values()) if isinstance(images, Mapping) else list(images)
    if len(scans) < 2 or isinstance(layers, str) or len(layers) != len(scans):
        raise UsageError(
            f"expected two scans or more and one layer for each, got {len(scans)} scans and "
            f"{layers!r}."
        )
    net = intake.plain(model)
    if not isinstance(net, torch.nn.Module):
        raise ModelError(f"expected a torch module of several inputs, got {type(model).__name__}.")
    gradient_free.check_gradient(net, "maps of several inputs")
    if settings.get("method", "secant") != "secant":
        raise UsageError(f"expected the method 'secant', got {settings['method']!r}.")
    if "layer" in settings:
        raise UsageError("expected no layer beside layers, one for each scan.")
    affine = settings.pop("affine", None)
    volume, counts = _stacked(scans, net, affine)
    if isinstance(reference, (list, tuple)):
        reference = _stacked(reference, net, affine)[0]
    wish = "+".join(f"net.{layer}" for layer in layers)
    given = {**settings, "layer": wish, "reference": reference}
    with opened(volume, _Joined(net, counts, names), given) as case:
        maps = _maps(case, counts)
    titles = names or [f"input {n + 1}" for n in range(len(scans))]
    return JointExplanation(tuple(maps), tuple(titles))


def _check_kinds(images: object, reference: object) -> None:
    """Refuse what is no list of scans, or no reference."""
    if not isinstance(images, (Mapping, list, tuple)):
        raise UsageError(f"expected a list of scans, or a dict, got {type(images).__name__}.")
    if not isinstance(reference, (str, Volume, list, tuple)):
        raise UsageError(
            f"expected a reference of auto, tissue, zero, value:X, a Volume or one for each scan, "
            f"got {type(reference).__name__}."
        )


def _stacked(scans: Sequence[object], net: torch.nn.Module, affine: object) -> tuple[Volume, Any]:
    """The scans as the channels of one, and how many each has."""
    plain = intake.as_model(net, scans[0], None)
    volumes = [
        intake.as_volume(scan, None if isinstance(scan, Volume) else affine, plain)
        for scan in scans
    ]
    first = volumes[0]
    for other in volumes[1:]:
        if other.grid != first.grid:
            raise UsageError(
                f"expected scans on one grid, got {first.grid.shape} and {other.grid.shape} or "
                f"other places; resample them to the first."
            )
    array = np.concatenate([v.array.astype(np.float32) for v in volumes])
    whole = Volume(array, first.grid, first.modality, first.unit)
    return whole, [v.array.shape[0] for v in volumes]


def _maps(case: Case, counts: Sequence[int]) -> list[Explanation]:
    """One pair of runs, one sweep, one map per layer."""
    x, traced = case.traced()
    wanted = case.layers(traced)
    background = case.background(traced)
    observed = case.observed(wanted, background)
    passed, refused = case.guarded(observed.found, traced, named=True)
    other = case.tensor(case.prepared.network_input(background.raw))
    _check_own(case, wanted, counts, (x, other))
    bound = case.bound(observed.target, passed[wanted[0]].score)
    case.forwards += observed.forwards + len(counts) + 1
    made = []
    for name in wanted:
        capture = passed[name]
        evidence = {name: case.method.evidence(capture, bound)}
        tried = (None, refused)
        e = result(case, [capture], evidence, observed.target, background, tried)
        told = (TOGETHER, *(w for w in e.warnings if "flows past the layer" not in w))
        made.append(e.replace(layer=name.removeprefix("net."), warnings=told))
        case.forwards = 0.0
    return made


def _check_own(
    case: Case, names: Sequence[str], counts: Sequence[int], pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Each layer changes with its own input only.

    Raises:
        UsageError: with the layer and the input that it sees.
    """
    x, other = pair
    net = case.model.net
    before = record(net, names, x, names).activations
    start = 0
    for n, count in enumerate(counts):
        changed = x.clone()
        changed[:, start : start + count] = other[:, start : start + count]
        start += count
        after = record(net, names, changed, names).activations
        for m, name in enumerate(names):
            size = float(before[name].abs().max())
            moved = float((after[name] - before[name]).abs().max()) > SAME * size
            if moved and m != n:
                raise UsageError(
                    f"expected layers that see one input each, {name.removeprefix('net.')!r} for "
                    f"input {m + 1}, but it changes with input {n + 1}; give the layers in the "
                    f"order of the scans, before the branches meet."
                )
