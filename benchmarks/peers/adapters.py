"""How is each of the other tools asked for a Grad-CAM, in the way its own pages show?

The tools are imported on use, since they live in an environment of their own (setup.sh).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Call = Callable[[torch.Tensor], Any]
PACKAGES = {
    "MONAI": "monai",
    "grad-cam": "grad-cam",
    "torchcam": "torchcam",
    "medcam": "medcam",
    "captum": "captum",
    "zennit": "zennit",
    "nnunetv2-cam": "nnunetv2-cam",
    "med_gradcam": "med-gradcam",
}


def peer(module: str) -> Any:
    """A module of another tool; typed Any, since it is not there in the main environment."""
    return importlib.import_module(module)


def versions() -> dict[str, str]:
    """The installed version of each tool, and of torch; a tool that is missing is left out."""
    found = {"torch": str(torch.__version__)}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def monai(net: torch.nn.Module, layer: str, index: int) -> Call:
    """MONAI's GradCAM: upsampled to the input, normalised as it does by default."""
    cam = peer("monai.visualize").GradCAM(nn_module=net, target_layers=layer)
    return lambda x: cam(x, class_idx=index)


def grad_cam(net: torch.nn.Module, layer: str, index: int) -> Call:
    """pytorch-grad-cam's GradCAM: upsampled to the input, numpy (B, I, J, K)."""
    cam = peer("pytorch_grad_cam").GradCAM(model=net, target_layers=[net.get_submodule(layer)])
    targets = peer("pytorch_grad_cam.utils.model_targets")
    return lambda x: cam(
        input_tensor=x, targets=[targets.ClassifierOutputTarget(index) for _ in range(len(x))]
    )


def torchcam(net: torch.nn.Module, layer: str, index: int) -> Call:
    """torchcam's GradCAM (B, i, j, k): it stays on the layer's own grid."""
    extractor = peer("torchcam.methods").GradCAM

    def call(x: torch.Tensor) -> Any:
        with extractor(net, layer) as cam:
            return cam(index, net(x))[0]

    return call


def medcam(net: torch.nn.Module, layer: str, index: int) -> Call:
    """M3d-Cam's Grad-CAM: the network's output is replaced by the map, upsampled to the input."""
    inject = peer("medcam.medcam_inject").inject
    injected = inject(net, backend="gcam", layer=layer, label=index, replace=True)
    found: Call = injected
    return found


def captum(net: torch.nn.Module, layer: str, index: int) -> Call:
    """captum's LayerGradCam (B, 1, i, j, k): signed, on the layer's own grid."""
    cam = peer("captum.attr").LayerGradCam(net, net.get_submodule(layer))
    return lambda x: cam.attribute(x, target=index).detach()


GRADCAM: dict[str, Callable[[torch.nn.Module, str, int], Call]] = {
    "MONAI": monai,
    "grad-cam": grad_cam,
    "torchcam": torchcam,
    "medcam": medcam,
    "captum": captum,
}
