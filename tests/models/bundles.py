"""Small MONAI bundles that the tests write: their forms are those of the model zoo."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from tests.tiny import affine_of

UNET: dict[str, Any] = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
    "num_res_units": 1,
    "norm": "batch",
}
RESNET: dict[str, Any] = {
    "_target_": "monai.networks.nets.resnet10",
    "spatial_dims": 3,
    "n_input_channels": 1,
    "num_classes": 2,
    "widen_factor": 0.0625,
}
CODE = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
LOAD = {"_target_": "LoadImaged", "keys": "image"}
FIRST = {"_target_": "EnsureChannelFirstd", "keys": "image"}
RAS = {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}
TYPE = {"_target_": "EnsureTyped", "keys": "image", "device": "@device"}


def spacing(*pixdim: float, **more: Any) -> dict[str, Any]:
    return {"_target_": "Spacingd", "keys": "image", "pixdim": list(pixdim), **more}


def t(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, "keys": "image", **arguments}


CT = [LOAD, FIRST, RAS, spacing(1.5, 1.5, 2.0, mode="bilinear"),
      t("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
      TYPE]  # fmt: skip


def config(network: Any, transforms: Any = None, **more: Any) -> dict[str, Any]:
    """An inference configuration with the code that those of the zoo have."""
    made: dict[str, Any] = {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "device": CODE,
        "datalist": "$list(sorted(glob.glob(@bundle_root + '/*.nii.gz')))",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "inferer": {"_target_": "SimpleInferer"},
        "evaluating": ["$setattr(torch.backends.cudnn, 'benchmark', True)"],
    }
    if transforms is not None:
        made["preprocessing"] = {"_target_": "Compose", "transforms": transforms}
    return made | more


def metadata(labels: list[str], **image: Any) -> dict[str, Any]:
    ins = {
        "type": "image",
        "modality": "CT",
        "num_channels": 1,
        "spatial_shape": ["8*n", "8*n", "8*n"],
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": {"0": "image"},
    } | image
    named = {str(n): label for n, label in enumerate(labels)}
    outs = {"type": "image", "num_channels": len(labels), "channel_def": named}
    return {
        "version": "0.1.0",
        "name": "tiny bundle",
        "task": "tiny task",
        "copyright": "nobody",
        "intended_use": "tests only",
        "network_data_format": {"inputs": {"image": ins}, "outputs": {"pred": outs}},
    }


def built(definition: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The network of a definition, by MONAI itself."""
    from monai.networks import nets

    torch.manual_seed(seed)
    given = {k: v for k, v in definition.items() if k != "_target_"}
    made = getattr(nets, str(definition["_target_"]).rsplit(".", maxsplit=1)[-1])(**given)
    net: torch.nn.Module = made.eval()
    for module in net.modules():  # running values of a network that has seen something
        if isinstance(module, torch.nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def write(
    folder: Path,
    inference: dict[str, Any] | None,
    meta: dict[str, Any] | None,
    weights: Any = None,
    name: str = "model.pt",
) -> Path:
    """A bundle folder; `weights` are what torch.save writes."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    if inference is not None:
        (folder / "configs/inference.json").write_text(json.dumps(inference))
    if meta is not None:
        (folder / "configs/metadata.json").write_text(json.dumps(meta))
    if weights is not None:
        torch.save(weights, folder / "models" / name)
    return folder


def unet(folder: Path, transforms: Any = CT, **more: Any) -> tuple[Path, torch.nn.Module]:
    """A segmentation bundle, and its network."""
    net = built(UNET)
    made = write(
        folder, config(UNET, transforms, **more), metadata(["background", "spleen"]),
        net.state_dict(),
    )  # fmt: skip
    return made, net


def zipped(folder: Path, path: Path) -> Path:
    """The same bundle as a zip with its folder inside, as the zoo hands it out."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, Path(folder.name) / file.relative_to(folder))
    return path


def scan(path: Path, axes: str = "LPS", turn: tuple[float, float, float] = (4, -3, 6)) -> Path:
    """A scan with unequal voxels, not along the patient's axes, of soft values."""
    random = np.random.default_rng(1)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in (29, 26, 13)), indexing="ij")
    ball = 300 * np.exp(-4 * ((i - 0.2) ** 2 + (j + 0.1) ** 2 + k**2)) - 150
    values = (ball + random.normal(0, 8, ball.shape)).astype(np.float32)
    affine = affine_of(axes, (1.2, 1.7, 3.1), (5, -40, 12), turn)
    nib.Nifti1Image(values, affine).to_filename(path)
    return path
