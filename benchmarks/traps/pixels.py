"""Which maps at the input's own voxels were something else than their name says?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import med_gradcam as mg
from benchmarks.peers.adapters import peer
from benchmarks.traps import ours
from benchmarks.traps.cases import Array, Case, array, correlation, noise, resnet, small, unet
from benchmarks.traps.rows import NOT_OFFERED, NOT_RUN, Figure, Row, trap, tried


def four_sequences() -> torch.nn.Sequential:
    """A network for four MR sequences with one logit."""
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Conv3d(4, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 1),
    ).eval()


def _occluded(net: torch.nn.Module, x: torch.Tensor) -> Array:
    occlusion = peer("monai.visualize").OcclusionSensitivity(
        nn_module=net, mask_size=8, n_batch=4, verbose=False
    )
    return array(occlusion(x)[0])


@trap("S7", "Occlusion takes the activation from the number of input channels", "MONAI")
def wrong_activation() -> list[Row]:
    """Four sequences and one logit: softmax of one. One channel and three classes: sigmoids."""
    x = noise(16, 16, 16, channels=4)
    net = four_sequences()
    flat = tried(lambda: "constant" if np.ptp(_occluded(net, x)) == 0 else "varies")

    def mine() -> str:
        e = mg.explain(x[0], net, target=0, link="sigmoid", method="occlusion")
        return "varies" if np.ptp(e.evidence) > 0 else "constant"

    ct = noise(16, 16, 16)
    total = tried(lambda: round(float(_occluded(small(gain=3.0), ct).sum(1).mean()), 2))
    return [
        Row("S7", "MONAI", "four channels, one logit: the map", "varies", flat,
            ours.if_offered("occlusion", mine)),
        Row("S7", "MONAI", "one channel, three exclusive classes: sum of the probabilities", 1.0,
            total, NOT_RUN),
    ]  # fmt: skip


@trap("S8", "A second call on the same tensor returns twice the gradient", "MONAI",
      own_network=True)  # fmt: skip
def accumulated(case: Case | None = None) -> list[Row]:
    """The second map over the first, and what is left on the caller's tensor."""
    case = case or resnet(32)
    own = case.own()
    saliency = peer("monai.visualize").VanillaGrad(own.net)
    first = array(saliency(own.x, index=own.index).clone())
    second = array(saliency(own.x, index=own.index))
    mine = [ours.explained(case).evidence for _ in range(2)]
    return [
        Row("S8", "MONAI", "second call over first", 1.0,
            round(float(np.abs(second).sum() / np.abs(first).sum()), 2),
            round(float(np.abs(mine[1]).sum() / np.abs(mine[0]).sum()), 2)),
        Row("S8", "MONAI", "requires_grad of the caller's scan afterwards", "False",
            str(own.x.requires_grad), str(case.x.requires_grad)),
    ]  # fmt: skip


def _plain(case: Case, net: torch.nn.Module | None = None) -> Array:
    x = case.x.clone().requires_grad_()
    score = (net or case.own().net)(x)[:, case.index].sum()
    return array(torch.autograd.grad(score, x)[0])


class _Guided(torch.nn.Module):
    """A ReLU that lets positive gradients through only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clamp(min=0)
        if out.requires_grad:
            out.register_hook(lambda g: g.clamp(min=0))
        return out


def _guided(case: Case) -> Array:
    """Guided backpropagation, written out: every ReLU module replaced."""
    net = copy.deepcopy(case.net)
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.ReLU):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, _Guided())
    return _plain(case, net)


@trap("S9", "Guided backpropagation is the plain gradient under another name",
      "MONAI", "captum", "zennit", own_network=True)  # fmt: skip
def not_guided(case: Case | None = None) -> list[Row]:
    """Its correlation with the plain gradient, on ReLU and on PReLU networks."""
    rows = []
    given = (case,) if case else (resnet(32), Case(Mean(unet().net).eval(), "net", unet().x))
    for one in given:
        plain = _plain(one)
        right = _beside(partial(_guided, one), plain)
        mine = ours.if_offered("guided_backprop", partial(_beside, partial(_mine, one), plain))
        name = type(getattr(one.net, "net", one.net)).__name__
        text = f"{name}: guided backpropagation and plain gradient, correlation of sizes"
        for tool, call in _guided_of(one).items():
            theirs = tried(_beside, call, plain)
            wanted = right if right < 0.9999 else "refuses"  # nothing to guide: no ReLU in it
            shown = theirs if wanted == right else "the plain gradient"
            rows.append(Row("S9", tool, text, wanted, shown, mine))
    return rows


def _mine(case: Case) -> Any:
    return ours.explained(case, "guided_backprop", layer="auto").evidence


def _beside(call: Callable[[], Any], right: Array) -> float:
    """Correlation of the sizes: our guided backpropagation has no sign."""
    return correlation(np.abs(array(call())), np.abs(right))


class Mean(torch.nn.Module):
    """A segmentation network's logits, averaged: (B, K)."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The means (B, K)."""
        return torch.as_tensor(self.net(x).flatten(2).mean(-1))


def _guided_of(case: Case) -> dict[str, Callable[[], Any]]:
    own = [case.own() for _ in range(3)]

    def zennit() -> Any:
        composite = peer("zennit.composites").GuidedBackprop()
        gradient = peer("zennit.attribution").Gradient(model=own[2].net, composite=composite)
        with gradient as attribute:
            outputs = own[2].net(own[2].x).shape[1]
            return attribute(own[2].x.requires_grad_(), torch.eye(outputs)[[case.index]])[1]

    return {
        "MONAI": lambda: peer("monai.visualize").GuidedBackpropGrad(own[0].net)(
            own[0].x, index=case.index
        ),
        "captum": lambda: peer("captum.attr").GuidedBackprop(own[1].net).attribute(
            own[1].x.requires_grad_(), target=case.index
        ),
        "zennit": zennit,
    }  # fmt: skip


@trap("S20", "Smoothing by the first component turns the map over at random", "grad-cam",
      own_network=True)  # fmt: skip
def component_sign(case: Case | None = None) -> list[Row]:
    """Correlation of the smoothed map with the tool's own Grad-CAM, before its ReLU."""
    rows = []
    for seed in (1, 2, 3):
        one = case or Case(resnet(48).net, "layer3", noise(48, 48, 48, seed=seed))
        own = one.own()
        cam = peer("pytorch_grad_cam").GradCAM(
            model=own.net, target_layers=[own.net.get_submodule(own.layer)]
        )
        target = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(own.index)
        cam(input_tensor=own.x, targets=[target])
        kept = cam.activations_and_grads
        a, g = kept.activations[0].numpy(), kept.gradients[0].numpy()
        module = own.net.get_submodule(own.layer)
        maps = [cam.get_cam_image(own.x, module, [target], a, g, eigen_smooth=s) for s in (0, 1)]
        theirs = correlation(maps[0], maps[1])
        mine = ours.if_offered("eigengradcam", partial(_component, one))
        rows.append(
            Row("S20", "grad-cam", f"scan {seed}: eigen_smooth against its own Grad-CAM "
                "(correlation, any positive number will do)", 1.0, theirs, mine, within=0.99)
        )  # fmt: skip
        if case:
            break
    return rows


def _component(case: Case) -> float:
    """Our first component of the weighted activations beside our Grad-CAM, both without sign."""
    component = ours.explained(case, "eigengradcam").evidence
    return correlation(component, np.maximum(ours.explained(case).evidence, 0))


@trap("S21", "ROAD is NaN in three dimensions; Eigen-CAM computes a matrix of cells by cells",
      "grad-cam")  # fmt: skip
def flat_metrics() -> list[Row]:
    """The metric's value; and the time of its Eigen-CAM over that of the same by channels."""
    case = Case(small(), "3", noise(14, 14, 14))
    own = case.own()
    target = peer("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(1)
    module = own.net.get_submodule("3")
    cams = peer("pytorch_grad_cam").GradCAM(model=own.net, target_layers=[module])(
        input_tensor=own.x, targets=[target]
    )

    def road() -> str:
        metric = peer("pytorch_grad_cam.metrics.road").ROADMostRelevantFirst(percentile=75)
        value = metric(own.x, cams, [target], own.net)
        return "a number" if np.isfinite(value).all() else str(np.asarray(value).ravel().tolist())

    activation = array(small()[:4](case.x))
    project = peer("pytorch_grad_cam.utils.svd_on_activations").get_2d_projection

    def by_channels() -> Array:
        flat = activation[0].reshape(activation.shape[1], -1).T
        flat = flat - flat.mean(0)
        return np.asarray(flat @ np.linalg.eigh(flat.T @ flat)[1][:, -1])

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    taken = seconds(lambda: project(activation.astype(np.float32)))
    least = min(seconds(by_channels) for _ in range(3))
    method = ours.evidence_of("eigencam", case)
    mine: Figure = NOT_OFFERED
    if method is not None:
        mine = float(f"{min(seconds(method) for _ in range(3)) / least:.1g}")
    theirs: Figure = float(f"{taken / least:.1g}")
    return [
        Row("S21", "grad-cam", "ROAD of its own map", "a number", tried(road), NOT_OFFERED),
        Row("S21", "grad-cam", "Eigen-CAM, 14^3 cells: time over that of the same vector from the "
            "channels' covariance", 1.0, theirs, mine, within=20.0),
    ]  # fmt: skip
