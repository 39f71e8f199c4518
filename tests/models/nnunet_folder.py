"""Result folders of nnU-Net v2 with random weights, written by the real architecture package."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.tiny import affine_of

UNET = "dynamic_network_architectures.architectures.unet."
ARGUMENTS: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 12],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
RESIDUAL = {k: v for k, v in ARGUMENTS.items() if k != "n_conv_per_stage"} | {
    "n_blocks_per_stage": [1, 2, 2]
}
CT = {"mean": 30.0, "std": 120.0, "percentile_00_5": -900.0, "percentile_99_5": 400.0}
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset900_Phantom",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "foreground_intensity_properties_per_channel": {"0": CT},
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "patch_size": [12, 28, 28],
            "spacing": [3.0, 1.1, 1.1],
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {
                "is_seg": False,
                "order": 3,
                "order_z": 0,
                "force_separate_z": None,
            },
            "architecture": {
                "network_class_name": UNET + "PlainConvUNet",
                "arch_kwargs": ARGUMENTS,
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    },
}
DATASET: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "lesion": 1, "organ": 2},
    "file_ending": ".nii.gz",
}
TRAINED = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def plans(**changes: Any) -> dict[str, Any]:
    """PLANS with keys of its configuration changed; None takes one out."""
    made = copy.deepcopy(PLANS)
    chosen = made["configurations"]["3d_fullres"]
    for key, value in changes.items():
        chosen.pop(key, None)
        if value is not None:
            chosen[key] = value
    return made


def architecture(name: str, **changes: Any) -> dict[str, Any]:
    """The entry of a network with some of its arguments changed."""
    base = RESIDUAL if name == "ResidualEncoderUNet" else ARGUMENTS
    return {"network_class_name": UNET + name, "arch_kwargs": {**base, **changes}}


def real_network(entry: dict[str, Any], channels: int, classes: int, seed: int) -> torch.nn.Module:
    """The network as nnU-Net itself makes it, with random weights, norms too."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    given = dict(entry["arch_kwargs"])
    for key in ("conv_op", "norm_op", "dropout_op", "nonlin"):
        if given.get(key) is not None:
            given[key] = getattr(torch.nn, given[key].rpartition(".")[2])
    if "block" in given:
        residual = pytest.importorskip("dynamic_network_architectures.building_blocks.residual")
        given["block"] = getattr(residual, given["block"].rpartition(".")[2])
    torch.manual_seed(seed)
    kind = getattr(unet, entry["network_class_name"].rpartition(".")[2])
    net: torch.nn.Module = kind(
        input_channels=channels, num_classes=classes, deep_supervision=True, **given
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.3, 1.0)
    return net.eval()


def checkpoint(net: torch.nn.Module, **changes: Any) -> dict[str, Any]:
    """What nnUNetTrainer.save_checkpoint writes, numpy's numbers included."""
    made = {
        "network_weights": net.state_dict(),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    return made | changes


def write(
    folder: Path,
    nets: Sequence[torch.nn.Module],
    plan: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A trainer's result folder with a fold per network."""
    root = folder / TRAINED
    root.mkdir(parents=True)
    (root / "plans.json").write_text(json.dumps(plan or PLANS))
    (root / "dataset.json").write_text(json.dumps(dataset or DATASET))
    for n, net in enumerate(nets):
        fold = root / f"fold_{n}"
        fold.mkdir()
        torch.save(checkpoint(net, **changes), fold / "checkpoint_final.pth")
    return root


def nets(count: int = 1, name: str = "PlainConvUNet", **changes: Any) -> list[torch.nn.Module]:
    """Networks of PLANS with different random weights."""
    return [real_network(architecture(name, **changes), 1, 3, 7 + n) for n in range(count)]


def scan(path: Path, shape: Sequence[int] = (26, 23, 9), axes: str = "LPS") -> Path:
    """An anisotropic, oblique CT with a bright ball, as NIfTI."""
    generator = np.random.default_rng(3)
    i, j, k = np.ogrid[tuple(slice(n) for n in shape)]
    array = generator.normal(0, 40, tuple(shape)) - 100
    array += 400.0 * (((i - 9) ** 2 + (j - 12) ** 2 + (3 * (k - 4)) ** 2) < 25)
    array[0, 0, 0] = -1000.0
    affine = affine_of(axes, (1.0, 1.2, 3.4), (10, -20, 30), (8, -5, 12))
    image = nib.Nifti1Image(array.astype(np.float32), affine)
    image.header["descrip"] = b"CT"
    nib.save(image, path)
    return path
