"""Which maps came from another layer, another state of the network, or another run?"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

import med_gradcam as mg
from benchmarks.peers.adapters import GRADCAM, peer
from benchmarks.peers.nets import Summed
from benchmarks.traps import ours
from benchmarks.traps.cases import (
    Case,
    array,
    correlation,
    noise,
    reference,
    resnet,
    unet,
    vit,
)
from benchmarks.traps.rows import Row, trap, tried

THE_OUTPUT = "the network's own output"


def _named(net: torch.nn.Module, layer: str, x: torch.Tensor) -> str:
    """The layer, or the words for the output where its tensor is that of the whole network."""
    whole = net.net if isinstance(net, Summed) else net
    kept: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out: kept.append(out))
        for module in (net.get_submodule(layer), whole)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    same = kept[0].shape == kept[-1].shape and torch.equal(kept[0], kept[-1])
    return THE_OUTPUT if same else layer


def _automatic(case: Case) -> str:
    """The layer that ours takes, or how it refuses."""
    e = ours.said(lambda: ours.explained(case, layer="auto"))
    return e if isinstance(e, str) else _named(case.net, e.layer, case.x)


def _chosen(case: Case, tool: str) -> str:
    own = case.own()
    if tool == "medcam":
        inject = peer("medcam.medcam_inject").inject
        net = inject(own.net, backend="gcam", layer="auto", label=own.index)
        net(own.x)
        return _named(case.net, net.medcam_dict["current_layer"], case.x)
    logging.disable(logging.WARNING)
    try:
        with peer("torchcam.methods").GradCAM(own.net, input_shape=tuple(own.x.shape[1:])) as cam:
            return _named(case.net, cam.target_names[0], case.x)
    finally:
        logging.disable(logging.NOTSET)


def _auto_rows(number: str, tool: str, case: Case | None) -> list[Row]:
    inner = "an inner layer"
    kinds = {"the network given": case} if case else {
        "UNet": unet(),
        "UNet, its logits summed over a box by a wrapper": Case(Summed(unet().net).eval(), "",
                                                                unet().x),
    }  # fmt: skip
    rows = []
    for name, one in kinds.items():
        theirs, mine = tried(_chosen, one, tool), _automatic(one)
        shown: list[str] = [
            v if v == THE_OUTPUT or v.startswith(("fails", "refuses")) else inner
            for v in (theirs, mine)
        ]
        rows.append(
            Row(number, tool, f"{name}: layer taken when none is named", inner, shown[0], shown[1])
        )
    return rows


@trap("S11", "The automatic layer is the output itself", "medcam", own_network=True)
def automatic_medcam(case: Case | None = None) -> list[Row]:
    """Which layer is explained when none is named."""
    return _auto_rows("S11", "medcam", case)


@trap("S12", "The automatic layer is the output itself", "torchcam", own_network=True)
def automatic_torchcam(case: Case | None = None) -> list[Row]:
    """Which layer is explained when none is named."""
    return _auto_rows("S12", "torchcam", case)


def _each(number: str, text: str, case: Case, tools: tuple[str, ...]) -> list[Row]:
    """The tools' maps on the layer's own grid (or resized to the scan) beside the right one."""
    right = reference(case)
    mine = ours.agreement(case)
    rows = []
    for tool in tools:
        own = case.own()
        call = GRADCAM[tool](own.net, own.layer, own.index) if tool != "MONAI" else _monai(own)

        def theirs(call: Any = call, own: Case = own, tool: str = tool) -> float:
            found = array(call(own.x)).squeeze()
            wanted = right if tool == "captum" else np.maximum(right, 0)
            return correlation(found, wanted)

        rows.append(Row(number, tool, text, 1.0, tried(theirs), mine))
    return rows


def _monai(own: Case) -> Any:
    def call(x: torch.Tensor) -> Any:  # made inside, where its own complaints are caught
        cam = peer("monai.visualize").GradCAM(nn_module=own.net, target_layers=own.layer)
        return cam.compute_map(x, class_idx=own.index)

    return call


def before_inplace() -> Case:
    """A norm whose output the next layer changes in place; every layer is as large as the scan."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1),
        torch.nn.BatchNorm3d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.Conv3d(8, 8, 3, padding=1),
        torch.nn.ReLU(inplace=True),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    ).eval()
    return Case(net, "1", noise(24, 24, 24))


@trap("S16", "A ReLU that works in place changes the values that were kept",
      "grad-cam", "torchcam", "medcam", "MONAI", own_network=True)  # fmt: skip
def inplace(case: Case | None = None) -> list[Row]:
    """A layer that is followed by an in-place operation."""
    case = case or before_inplace()
    tools = ("grad-cam", "torchcam", "medcam", "MONAI", "captum")
    return _each("S16", "correlation with the right map", case, tools)


@trap("S17", "A network left in training mode is explained in training mode",
      "torchcam", "captum", own_network=True)  # fmt: skip
def training(case: Case | None = None) -> list[Row]:
    """The map of a network in train() beside that of the same network in eval()."""
    case = (case or resnet()).own()
    case.net.train()
    return _each("S17", "network in train(): correlation with the right map", case,
                 ("torchcam", "captum"))  # fmt: skip


@trap("S22", "Tokens are taken for channels: the axes are summed wrongly", "captum", "medcam")
def tokens() -> list[Row]:
    """A transformer's norm puts out (1, tokens, channels): the map over the tokens' grid."""
    case = vit()
    a, g = activation_of_tokens(case)
    side = round((a.shape[1] - 1) ** (1 / 3))
    right = array((g.mean(1, keepdim=True) * a).sum(2)[0, 1:]).reshape((side,) * 3)

    def captum() -> Any:
        own = case.own()
        found = GRADCAM["captum"](own.net, own.layer, 1)(own.x)
        if found.numel() != side**3:
            return f"a map of shape {tuple(found.shape)}"
        return correlation(found, right)

    def medcam() -> Any:
        own = case.own()
        found = array(GRADCAM["medcam"](own.net, own.layer, 1)(own.x)).squeeze()
        wide = torch.nn.functional.interpolate(
            torch.from_numpy(np.maximum(right, 0))[None, None], size=found.shape, mode="trilinear"
        )
        return correlation(found, wide)

    def mine() -> Any:
        found = ours.explained(case).evidence
        return correlation(found, right)

    text = "ViT, blocks.2.norm1: correlation with the right map"
    return [
        Row("S22", "captum", text, 1.0, tried(captum), ours.said(mine)),
        Row("S22", "medcam", text, 1.0, tried(medcam), ours.said(mine)),
    ]


def activation_of_tokens(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (1, n, C) that a layer puts out and the score's gradient there."""
    own, kept = case.own(), []
    own.net.get_submodule(case.layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    output = own.net(case.x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(case.score(output).sum(), kept[0])
    return kept[0].detach().double(), gradient.double()


@trap("S30", "A second call with another layer gives the first one's map", "medcam")
def injected_twice() -> list[Row]:
    """The shape of the second map, asked for at another layer."""
    case = resnet()
    inject = peer("medcam.medcam_inject").inject
    net = inject(case.own().net, layer="layer4", label=1)
    net(case.x)
    again = inject(net, layer="layer3", label=1)
    again(case.x)
    shape = "x".join(str(n) for n in np.shape(again.get_attention_map())[2:])
    first = ours.explained(case)
    second = ours.explained(Case(case.net, "layer3", case.x))
    right = "x".join(str(n) for n in reference(Case(case.net, "layer3", case.x)).shape)
    mine = "x".join(str(n) for n in second.evidence.shape)
    assert first.evidence.shape != second.evidence.shape
    return [
        Row("S30", "medcam", "grid of the map of layer3, after one of layer4", right, shape, mine)
    ]


def _left(net: torch.nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)  # noqa: SLF001 - torch has no public way
        for m in net.modules()
    )


@trap("S33", "The network is not left as it was", "MONAI", "grad-cam", "medcam")
def left_behind() -> list[Row]:
    """Hooks that stay, and what becomes of gradients that a user had gathered in .grad."""
    rows = []
    for tool in (*GRADCAM, "ours"):
        case = resnet(32)
        for p in case.net.parameters():
            p.grad = torch.ones_like(p)
        if tool == "ours":
            mg.explain(case.x[0], case.net, target=1, layer="layer4", method="gradcam")
        else:
            for _ in range(3):
                GRADCAM[tool](case.net, "layer4", 1)(case.x)
        kept = all(p.grad is not None and bool((p.grad == 1).all()) for p in case.net.parameters())
        rows.append((tool, float(_left(case.net)), "kept" if kept else "overwritten"))
    _, hooks, grads = rows.pop()
    return [
        row
        for tool, theirs, theirs_grad in rows
        for row in (
            Row("S33", tool, "hooks left after three maps", 0.0, theirs, hooks),
            Row("S33", tool, "the user's gradients in .grad", "kept", theirs_grad, grads),
        )
    ]
