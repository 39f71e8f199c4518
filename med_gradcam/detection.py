"""What is a detector: a network with two heads, and the rules that make boxes of their maps?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from med_gradcam.anchors import BOXES, CLASSES, Rules
from med_gradcam.errors import CannotExplainError, ModelError, UsageError
from med_gradcam.model import Model
from med_gradcam.outputs import tensors, what

_ANCHORS = (
    "an AnchorGenerator of MONAI, a dict with its sizes and aspect_ratios (or feature_map_scales "
    "and base_anchor_shapes), or for each level a list of shapes in voxels"
)


class Detector(torch.nn.Module):
    """A network with two heads and the rules that make boxes of what they put out."""

    def __init__(self, network: torch.nn.Module, rules: Rules) -> None:
        super().__init__()
        self.network, self.rules = network, rules
        self.train(network.training)

    def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """The heads' maps, one per level: classification (B, A * K, ...), box_regression."""
        over = [-n % d for n, d in zip(x.shape[2:], self.rules.divisible, strict=True)]
        if any(over):
            x = torch.nn.functional.pad(x, [v for n in reversed(over) for v in (0, n)])
        return _heads(self.network(x), self.rules.keys)


def _heads(output: object, keys: tuple[str, str]) -> dict[str, list[torch.Tensor]]:
    """Both heads' maps, of a dict of lists, or of one list with half of it each."""
    if isinstance(output, (list, tuple)) and len(output) % 2 == 0 and len(output) > 0:
        half = len(output) // 2
        parts: tuple[Any, Any] = (list(output[:half]), list(output[half:]))
    elif isinstance(output, Mapping) and all(key in output for key in keys):
        parts = (output[keys[0]], output[keys[1]])
    else:
        raise CannotExplainError(
            "output",
            f"expected a detector's network that puts out {keys[0]!r} and {keys[1]!r}, got "
            f"{what(output)}.",
        )
    listed = [[t for _, t in tensors(part)] for part in parts]
    return dict(zip((CLASSES, BOXES), listed, strict=True))


def detector(  # noqa: PLR0913 - the settings of MONAI's box selector, under short names
    network: torch.nn.Module,
    anchors: object = None,
    *,
    threshold: float = 0.05,
    nms: float = 0.5,
    most: int = 300,
    per_level: int = 1000,
    weights: Sequence[float] = (1.0,) * 6,
    divisible: Sequence[int] | None = None,
) -> Detector:
    """A detector whose boxes can be explained.

    `network`: MONAI's RetinaNetDetector, which brings all the rest; or a bare RetinaNet (or what
    puts out the same: a dict of lists "classification" and "box_regression", or one list) with its
    `anchors`: an AnchorGenerator of MONAI, a dict with its sizes and aspect_ratios (or
    feature_map_scales and base_anchor_shapes), or for each level a list of shapes (3 lengths in
    voxels of the network's input). The further settings are those of MONAI's detector.

    Raises:
        UsageError: no anchors, or some beside a detector that has its own.
        ModelError: a detector whose rules are not those of RetinaNet.
    """
    if isinstance(network, Detector):
        return network
    if is_retina(network):
        if anchors is not None:
            raise UsageError("expected no anchors beside a detector that has its own.")
        return Detector(network.network, _rules_of(network))  # type: ignore[arg-type]
    if not isinstance(network, torch.nn.Module):
        raise ModelError(f"expected a torch module as detector, got {type(network).__name__}.")
    if anchors is None:
        raise UsageError(f"expected the anchors of the detector: {_ANCHORS}.")
    size = getattr(network, "size_divisible", 1) if divisible is None else divisible
    rules = Rules(
        _shapes(anchors),
        tuple(float(w) for w in weights),
        threshold,
        per_level,
        nms,
        most,
        _three(size),
        (getattr(network, "cls_key", CLASSES), getattr(network, "box_reg_key", BOXES)),
        crossed=getattr(anchors, "indexing", "ij") == "xy",
    )
    return Detector(network, _checked(rules))


def is_retina(net: object) -> bool:
    """Whether this is a RetinaNetDetector, without importing MONAI for it."""
    parts = ("network", "anchor_generator", "box_coder", "box_selector")
    return isinstance(net, torch.nn.Module) and all(hasattr(net, part) for part in parts)


def wrapped(model: object) -> object:
    """A RetinaNetDetector, bare or in a Model, as a Detector; anything else as it is."""
    if isinstance(model, Model):
        return replace(model, net=detector(model.net)) if is_retina(model.net) else model
    return detector(model) if is_retina(model) and isinstance(model, torch.nn.Module) else model


def _rules_of(net: Any) -> Rules:
    chosen, coder = net.box_selector, net.box_coder
    if not chosen.apply_sigmoid or net.spatial_dims != 3:
        raise ModelError(
            f"expected a detector for volumes that puts out logits (apply_sigmoid=True), got "
            f"{net.spatial_dims} dimensions and apply_sigmoid={chosen.apply_sigmoid}."
        )
    plain = getattr(net.box_overlap_metric, "__name__", "") == "box_iou"
    return Rules(
        _shapes(net.anchor_generator),
        tuple(float(w) for w in coder.weights),
        float(chosen.score_thresh),
        int(chosen.topk_candidates_per_level),
        float(chosen.nms_thresh),
        int(chosen.detections_per_img),
        _three(net.size_divisible),
        (net.cls_key, net.box_reg_key),
        float(coder.boxes_xform_clip),
        getattr(net.anchor_generator, "indexing", "ij") == "xy",
        None if plain else net.box_overlap_metric,
    )


def _three(size: Any) -> tuple[int, ...]:
    return (int(size),) * 3 if isinstance(size, int) else tuple(int(n) for n in size)


def _shapes(anchors: Any) -> tuple[torch.Tensor, ...]:
    """The anchors of each level (A, 6) around a cell's centre, rounded as MONAI does."""
    if hasattr(anchors, "cell_anchors"):
        return tuple(torch.as_tensor(a).detach().cpu().float() for a in anchors.cell_anchors)
    try:
        if isinstance(anchors, Mapping):
            levels = _from_ratios(anchors) if "sizes" in anchors else _from_scales(anchors)
        else:
            levels = [np.asarray(level, dtype=np.float64).reshape(-1, 3) for level in anchors]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"expected anchors as {_ANCHORS}, got {anchors!r}.") from error
    halves = [torch.as_tensor(level, dtype=torch.float32) / 2 for level in levels]
    return tuple(torch.cat([-half, half], dim=1).round() for half in halves)


def _from_ratios(given: Mapping[str, Any]) -> list[Any]:
    """Shapes of sizes s and aspect ratios 1 : p : q, of the volume s cubed."""
    sizes = [np.atleast_1d(np.asarray(s, dtype=np.float64)) for s in given["sizes"]]
    ratios = np.asarray(given["aspect_ratios"], dtype=np.float64)
    if ratios.ndim == 2:
        ratios = np.repeat(ratios[None], len(sizes), axis=0)
    if len(ratios) != len(sizes):
        raise ValueError
    made = []
    for level, pairs in zip(sizes, ratios, strict=True):
        sides = np.concatenate([np.ones((len(pairs), 1)), pairs], axis=1)
        sides = sides / np.prod(pairs, axis=1, keepdims=True) ** (1 / 3)
        made.append((sides[:, None] * level[None, :, None]).reshape(-1, 3))
    return made


def _from_scales(given: Mapping[str, Any]) -> list[Any]:
    shapes = np.asarray(given["base_anchor_shapes"], dtype=np.float64).reshape(-1, 3)
    return [float(scale) * shapes for scale in given["feature_map_scales"]]


def _checked(rules: Rules) -> Rules:
    sizes = len(rules.weights) == 6 and len(rules.divisible) == 3
    if not (sizes and rules.anchors and 0 <= rules.threshold < 1 and 0 < rules.nms <= 1):
        raise UsageError(
            f"expected a detector for volumes: 6 weights, 3 axes, a threshold of 0 to 1 and an "
            f"overlap above 0, got {rules.weights}, {rules.divisible}, {rules.threshold:g} and "
            f"{rules.nms:g}."
        )
    return rules
