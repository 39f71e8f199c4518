"""What do several networks say together, and where do they disagree: folds, mirror images?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from med_gradcam import intake
from med_gradcam.errors import ModelError, UsageError
from med_gradcam.members import EnsembleExplanation, together
from med_gradcam.model import Model
from med_gradcam.models._averaged import MEANS, UNMIRRORED, Averaged, Axes
from med_gradcam.opening import opened


def mean_of(
    models: object, *, mirrors: Sequence[int] | Sequence[Axes] = (), mean: str = "logits"
) -> Model:
    """Several models, or one on mirrored scans, as one Model: the mean of what they put out.

    `models`: Models of one input and labels, or one. `mirrors`: axes of the network's input, 0 to
    2, all of whose combinations are mirrored, as nnU-Net does; or the combinations themselves, such
    as [(0,), (1, 2)]. `mean`: of the "logits", or of the "probabilities", as logits again.

    Raises:
        ModelError: the models do not go together, or are none.
        UsageError: no such axis or mean.
    """
    given = _listed(models)
    listed = [one for one in given if isinstance(one, Model)]
    if not listed or len(listed) < len(given):
        raise ModelError(
            f"expected one Model or a list of them (med_gradcam.load_model), got "
            f"{', '.join(type(one).__name__ for one in given) or 'none'}."
        )
    first = listed[0]
    for n, other in enumerate(listed[1:], start=2):
        for name in ("input", "labels", "link"):
            if getattr(other, name) != getattr(first, name):
                raise ModelError(
                    f"expected models of the same {name} for one mean, got "
                    f"{getattr(first, name)} and, as number {n}, {getattr(other, name)}."
                )
    nets = [net for one in listed for net in _nets(one.net)]
    shas = "".join(one.weights_sha256 for one in listed)
    return replace(
        first,
        net=_averaged(nets, mirrors, mean, first.link),
        weights_sha256=first.weights_sha256
        if len(listed) == 1
        else hashlib.sha256(shas.encode()).hexdigest(),
        calibration=(),
        notes=tuple(note for note in first.notes if not (mirrors and note == UNMIRRORED)),
    )


def mirrored(model: Model, axes: str | None) -> Model:
    """A model on the scan and its mirror images along `axes`, written as in "0,1,2"; None: as is.

    Raises:
        UsageError: these are no axes.
    """
    if axes is None:
        return model
    parts = [part.strip() for part in axes.split(",")]
    if not all(part in ("0", "1", "2") for part in parts):
        raise UsageError(f"expected axes of the network's input such as 0,1,2, got {axes!r}.")
    return mean_of(model, mirrors=[int(part) for part in parts])


def explain_ensemble(
    image: object,
    models: object,
    *,
    mirrors: Sequence[int] | Sequence[Axes] = (),
    mean: str = "logits",
    **settings: Any,
) -> EnsembleExplanation:
    """The score that several networks deliver together, each one's share, and their disagreement.

    `models`, `mirrors` and `mean` as for mean_of(); bare torch modules do too, with `link` among
    the `settings`, which are those of explain(). Layers are named as in one member.

    Raises:
        ModelError: the models do not go together. Otherwise as explain().
    """
    given = _listed(models)
    bare = [net for one in given if isinstance(one, torch.nn.Module) for net in _nets(one)]
    if any(isinstance(one, Model) for one in given) or not bare:
        model: object = mean_of(given, mirrors=mirrors, mean=mean)
    else:
        model = _averaged(bare, mirrors, mean, str(settings.get("link") or "softmax"))
    with opened(image, model, settings) as case:
        return together(case)


def _listed(models: object) -> list[object]:
    return list(models) if isinstance(models, (list, tuple)) else [models]


def _nets(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The networks in a mean of networks; another one alone."""
    net = intake.plain(net)  # type: ignore[assignment]
    if isinstance(net, Averaged):
        if len(net.mirrors) > 1 or net.mean != "logits":
            raise ModelError("expected single models, or folds; got a mean over mirrored scans.")
        return list(net.members)
    return [net]


def _averaged(
    nets: Sequence[torch.nn.Module],
    mirrors: Sequence[int] | Sequence[Axes],
    mean: str,
    link: str,
) -> Averaged:
    if mean not in MEANS:
        raise UsageError(f"expected a mean of {' or '.join(MEANS)}, got {mean!r}.")
    if mean == "probabilities" and link not in ("softmax", "sigmoid"):
        raise UsageError(f"expected a link of softmax or sigmoid beside probabilities, got {link}.")
    return Averaged(nets, _images(mirrors), mean, link).eval()


def _images(mirrors: Sequence[int] | Sequence[Axes]) -> tuple[Axes, ...]:
    """The mirror images, each as the axes that are flipped."""
    whole = [axis for axis in mirrors if isinstance(axis, int)]
    images: list[Axes] = [tuple(axes) for axes in mirrors if not isinstance(axes, int)]
    mixed = bool(whole and images)
    images += [c for n in range(1, len(whole) + 1) for c in combinations(whole, n)]
    flat = [axis for axes in images for axis in axes]
    odd = len(set(images)) != len(images) or any(len(set(axes)) != len(axes) for axes in images)
    if odd or mixed or not set(flat) <= {0, 1, 2}:
        raise UsageError(
            f"expected mirrors as axes of 0, 1 and 2, or as different groups of them, got "
            f"{list(mirrors)}."
        )
    return tuple(images)
