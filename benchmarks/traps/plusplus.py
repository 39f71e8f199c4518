"""Which Grad-CAM++ maps were not Grad-CAM++?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers.adapters import peer
from benchmarks.traps import ours
from benchmarks.traps.cases import (
    Array,
    Case,
    activation_and_gradient,
    array,
    correlation,
    noise,
    resnet,
    small,
)
from benchmarks.traps.rows import Figure, Row, trap, tried

METHOD = "gradcam_pp"


def exact(case: Case) -> Array:
    """Grad-CAM++ (i, j, k) in float64 without an epsilon, ReLU at the end.

    alpha = g^2 / (2 g^2 + sum(A) g^3) = 1 / (2 + sum(A) g) where g is not 0; the weight of a
    channel is the sum of alpha * ReLU(g).
    Source: Chattopadhay et al., arXiv:1710.11063, eq. 19 and 7, with the exponential score whose
    higher derivatives are powers of the first.
    """
    a, g = (t.double() for t in activation_and_gradient(case))
    total = a.sum(dim=(2, 3, 4), keepdim=True)
    alpha = torch.where(g != 0, 1 / (2 + total * g), torch.zeros_like(g))
    weights = (alpha * g.clamp(min=0)).sum(dim=(2, 3, 4), keepdim=True)
    return np.maximum(array((weights * a).sum(1)[0]), 0)


def _theirs(case: Case, tool: str) -> Callable[[], Array]:
    """A tool's Grad-CAM++ on the layer's own grid, up to scale."""
    own = case.own()
    module = own.net.get_submodule(own.layer)

    def monai() -> Any:
        cam = peer("monai.visualize").GradCAMpp(nn_module=own.net, target_layers=own.layer)
        return cam.compute_map(own.x, class_idx=own.index)

    def grad_cam() -> Any:  # at a layer as large as the scan, where nothing is resized
        cam = peer("pytorch_grad_cam").GradCAMPlusPlus(model=own.net, target_layers=[module])
        target = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(own.index)
        return cam(input_tensor=own.x, targets=[target])

    def torchcam() -> Any:
        with peer("torchcam.methods").GradCAMpp(own.net, own.layer) as cam:
            return cam(own.index, own.net(own.x), normalized=False)[0]

    def medcam() -> Any:
        inject = peer("medcam.medcam_inject").inject
        net = inject(own.net, backend="gcampp", layer=own.layer, label=own.index)
        net(own.x)
        return net.get_attention_map()

    made: dict[str, Callable[[], Any]] = {
        "MONAI": monai, "grad-cam": grad_cam, "torchcam": torchcam, "medcam": medcam
    }  # fmt: skip
    return lambda: array(made[tool]()).squeeze()


def _beside(call: Callable[[], Array], right: Array) -> float:
    return correlation(call(), right)


def _mine(case: Case) -> Figure:
    right = exact(case)
    found: Figure = ours.if_offered(
        METHOD, lambda: correlation(np.maximum(ours.explained(case, METHOD).evidence, 0), right)
    )
    return found


@trap("S3", "The denominator of Grad-CAM++ is computed and thrown away", "torchcam")
def no_denominator() -> list[Row]:
    """The map against the formula without and with its denominator; and its scaled maximum."""
    case = Case(small(), "3", noise(8, 8, 8))
    a, g = (t.double() for t in activation_and_gradient(case))
    weights = (g**2 * g.clamp(min=0)).sum(dim=(2, 3, 4), keepdim=True)
    without = np.maximum(array((weights * a).sum(1)[0]), 0)
    found = _theirs(case, "torchcam")()
    mine = ours.if_offered(METHOD, lambda: correlation(
        np.maximum(ours.explained(case, METHOD).evidence, 0), without))  # fmt: skip
    rows = [
        Row("S3", "torchcam", "correlation with g^2 ReLU(g), the formula without its denominator",
            correlation(exact(case), without), correlation(found, without), mine)
    ]  # fmt: skip
    for n in (4, 16, 32):
        one = Case(small(), "3", noise(n, n, n))

        def scaled(one: Case = one) -> float:
            with peer("torchcam.methods").GradCAMpp(one.own().net, "3") as cam:
                return round(float(cam(1, cam.model(one.x))[0].max()), 4)

        rows.append(
            Row("S3", "torchcam", f"largest value of its scaled map, {n}^3 cells", 1.0,
                tried(scaled), within=0.02)
        )  # fmt: skip
    return rows


@trap("S4", "In three dimensions an epsilon swamps the formula of Grad-CAM++",
      "MONAI", "grad-cam", "torchcam", "medcam", own_network=True)  # fmt: skip
def swamped(case: Case | None = None) -> list[Row]:
    """The map beside the exact formula; a layer as large as the scan where grad-cam takes part."""
    given = (case,) if case else tuple(Case(small(), "3", noise(n, n, n)) for n in (8, 24))
    rows = []
    for one in given:
        right = exact(one)
        mine = _mine(one)
        text = f"correlation with exact Grad-CAM++, {'x'.join(map(str, right.shape))} cells"
        for tool in ("MONAI", "grad-cam", "torchcam", "medcam"):
            call = _theirs(one, tool)
            theirs = tried(_beside, call, right)
            rows.append(Row("S4", tool, text, 1.0, theirs, mine, within=0.001))
    return rows


@trap("S6", "Grad-CAM++ of a batch fails, or mixes the scores of other scans in", "MONAI")
def mixed() -> list[Row]:
    """Each scan's map in a batch over its map alone: the ratio of the maxima."""
    case = resnet(48)
    width = ours.native(case).shape[-1]
    x = noise(48, 48, 48, batch=width) * torch.logspace(-1, 1, width).reshape(-1, 1, 1, 1, 1)
    own = case.own()
    cam = peer("monai.visualize").GradCAMpp(nn_module=own.net, target_layers="layer4")
    alone = [float(cam.compute_map(one[None], class_idx=1).max()) for one in x]
    rows = [
        Row("S6", "MONAI", "Grad-CAM++ of a batch of two", "runs",
            tried(lambda: "runs" if cam.compute_map(x[:2], class_idx=1).shape else ""))
    ]  # fmt: skip

    def ratios() -> str:
        together = cam.compute_map(x, class_idx=1).flatten(1).amax(1)
        return ", ".join(f"{float(t) / a:.2f}" for t, a in zip(together, alone, strict=True))

    rows.append(
        Row("S6", "MONAI", f"batch of {width}, as wide as the map: each scan's maximum over that "
            "of the scan alone", ", ".join(["1.00"] * width), tried(ratios),
            ours.said(lambda: _batch(case, x)))
    )  # fmt: skip
    return rows


def _batch(case: Case, x: torch.Tensor) -> str:
    import med_gradcam as mg

    mg.explain(x, case.net, target=1, layer=case.layer, method="gradcam")
    return "takes it"
