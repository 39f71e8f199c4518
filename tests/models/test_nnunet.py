"""Does a result folder of nnU-Net v2 load as nnU-Net meant it, and a spoilt one say what is off?"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.cli import main
from med_gradcam.errors import MedGradcamError, ModelError
from med_gradcam.loading import load_model
from med_gradcam.models import nnunet
from med_gradcam.models._averaged import UNMIRRORED
from tests.models import nnunet_folder as files

X = (1, 1, 8, 16, 16)


def logits(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a real network, its deep supervision off."""
    net.decoder.deep_supervision = False  # type: ignore[union-attr]
    with torch.inference_mode():
        found: torch.Tensor = net(x)
    net.decoder.deep_supervision = True  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("PlainConvUNet", {}),
        ("PlainConvUNet", {"conv_bias": False, "nonlin_first": True}),
        (
            "PlainConvUNet",
            {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.2}},
        ),
        ("PlainConvUNet", {"norm_op": None, "norm_op_kwargs": None}),
        ("PlainConvUNet", {"norm_op": "torch.nn.BatchNorm3d", "kernel_sizes": 3}),
        ("ResidualEncoderUNet", {}),
        ("ResidualEncoderUNet", {"stem_channels": 6}),
        (
            "ResidualEncoderUNet",
            {
                "block": "dynamic_network_architectures.building_blocks.residual.BottleneckD",
                "bottleneck_channels": [3, 4, 5],
            },
        ),
    ],
)
def test_its_logits_are_those_of_the_real_network(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    (net,) = files.nets(1, name, **changes)
    plan = files.plans(architecture=files.architecture(name, **changes))
    model = load_model(files.write(tmp_path, [net], plan))
    x = torch.randn(X)
    with torch.inference_mode():
        assert torch.equal(model.net(x), logits(net, x))
    assert set(model.net.state_dict()) == set(net.state_dict())
    assert not model.net.training


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    model = load_model(files.write(tmp_path, files.nets()))
    assert model.name == "nnU-Net Dataset900_Phantom 3d_fullres"
    assert (model.labels, model.link) == (("background", "lesion", "organ"), "softmax")
    assert (model.task, model.notes) == ("segmentation", (UNMIRRORED,))
    spec = model.input
    assert (spec.channels, spec.modality, spec.axes) == (1, "CT", "kji")
    assert (spec.patch, spec.spacing_mm, spec.padding) == ((12, 28, 28), (3.0, 1.1, 1.1), 0.0)


def test_folds_are_averaged_as_logits(tmp_path: Path) -> None:
    nets = files.nets(3)
    root = files.write(tmp_path, nets)
    x = torch.randn(X)
    with torch.inference_mode():
        found = load_model(root).net(x)
    torch.testing.assert_close(found, sum(logits(net, x) for net in nets) / 3)
    assert load_model(root).name.endswith(", 3 folds")
    one = load_model(root / "fold_1")
    with torch.inference_mode():
        assert torch.equal(one.net(x), logits(nets[1], x))
    assert one.weights_sha256 != load_model(root).weights_sha256


def test_which_folds_are_taken(tmp_path: Path) -> None:
    root = files.write(tmp_path, files.nets(2))
    (root / "fold_1").rename(root / "fold_all")
    assert "folds" not in load_model(root).name  # the numbered ones
    last = root / "fold_0" / "checkpoint_final.pth"
    last.rename(last.with_name("checkpoint_best.pth"))
    taken = "no checkpoint_final.pth: fold_0/checkpoint_best.pth was taken"
    assert taken in load_model(root).notes
    shutil.rmtree(root / "fold_0")
    assert load_model(root).name.endswith("3d_fullres")
    (root / "fold_all" / "checkpoint_final.pth").unlink()
    with pytest.raises(ModelError, match=r"expected checkpoint_final.pth or .* found none"):
        load_model(root)


def test_the_folder_above_and_other_folders(tmp_path: Path) -> None:
    root = files.write(tmp_path / "Dataset900", files.nets())
    assert load_model(root.parent).name == load_model(root).name
    assert not nnunet.sniff(str(tmp_path))
    assert not nnunet.sniff(str(root / "plans.json"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_in_the_names_of_weights(tmp_path: Path, prefix: str) -> None:
    (net,) = files.nets()
    weights = {prefix + key: value for key, value in net.state_dict().items()}
    model = load_model(files.write(tmp_path, [net], network_weights=weights))
    x = torch.randn(X)
    with torch.inference_mode():
        assert torch.equal(model.net(x), logits(net, x))


def test_plans_from_before_the_architecture_was_written_down(tmp_path: Path) -> None:
    old = {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    }
    (net,) = files.nets(features_per_stage=[4, 8, 8])
    model = load_model(files.write(tmp_path, [net], files.plans(architecture=None, **old)))
    x = torch.randn(X)
    with torch.inference_mode():
        assert torch.equal(model.net(x), logits(net, x))


def test_a_configuration_inherits(tmp_path: Path) -> None:
    plan = files.plans()
    plan["configurations"]["3d_fullres_bs4"] = {
        "inherits_from": "3d_fullres",
        "patch_size": [8, 32, 32],
    }
    arguments = {"configuration": "3d_fullres_bs4"}
    root = files.write(tmp_path, files.nets(), plan, init_args=arguments)
    assert load_model(root).input.patch == (8, 32, 32)
    plan["configurations"]["3d_fullres"]["inherits_from"] = "3d_fullres_bs4"
    (root / "plans.json").write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="inherit from one that is there"):
        load_model(root)


def test_the_low_resolution_stands_in_with_a_sentence(tmp_path: Path) -> None:
    plan = files.plans()
    plan["configurations"] = {"3d_lowres": plan["configurations"]["3d_fullres"]}
    root = files.write(tmp_path, files.nets(), plan, init_args={})
    plain = root.rename(tmp_path / "model")
    assert "3d_lowres was taken" in load_model(plain).notes[0]


def test_regions_have_a_sigmoid_each(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    dataset = {**files.DATASET, "labels": labels, "regions_class_order": [1, 2]}
    net = files.real_network(files.architecture("PlainConvUNet"), 1, 2, 7)
    root = files.write(tmp_path, [net], dataset=dataset)
    model = load_model(root)
    assert (model.labels, model.link) == (("whole", "core"), "sigmoid")
    (root / "dataset.json").write_text(json.dumps({**dataset, "regions_class_order": [1]}))
    with pytest.raises(ModelError, match="regions_class_order with 2 numbers"):
        load_model(root)


@pytest.mark.parametrize(
    ("names", "modality"),
    [
        (["CT"], "CT"),
        (["T1", "T1ce", "T2", "FLAIR"], "MR"),
        (["CT", "PET"], "CT+PT"),
        (["noNorm"], None),
    ],
)
def test_modalities(tmp_path: Path, names: list[str], modality: str | None) -> None:
    count = len(names)
    plan = files.plans(
        normalization_schemes=["ZScoreNormalization"] * count, use_mask_for_norm=[True] * count
    )
    dataset = {**files.DATASET, "channel_names": {str(n): c for n, c in enumerate(names)}}
    net = files.real_network(files.architecture("PlainConvUNet"), count, 3, 7)
    spec = load_model(files.write(tmp_path, [net], plan, dataset)).input
    assert (spec.modality, spec.channels) == (modality, count)


@pytest.mark.parametrize(
    ("reader", "turn", "axes"),
    [
        ("SimpleITKIO", [0, 1, 2], "kji"),
        ("NibabelIO", [2, 0, 1], "ikj"),
        ("NibabelIOWithReorient", [0, 1, 2], "SAR"),
        ("SimpleITKIOWithReorient", [1, 0, 2], "ASR"),
    ],
)
def test_axes(tmp_path: Path, reader: str, turn: list[int], axes: str) -> None:
    plan = {**files.plans(), "image_reader_writer": reader, "transpose_forward": turn}
    assert load_model(files.write(tmp_path, files.nets(), plan)).input.axes == axes


# ------------------------------------------------------------------------------- what is off

Change = Callable[[dict[str, Any]], object]


def _arch(**changes: Any) -> Change:
    return lambda plan: _chosen(plan)["architecture"]["arch_kwargs"].update(changes)


def _chosen(plan: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plan["configurations"]["3d_fullres"]
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("configurations"), "nnU-Net v2, whose plans.json has 'configurations'"),
        (lambda p: p.update(configurations={}), "the configuration '3d_fullres' in plans.json"),
        (lambda p: _chosen(p).update(patch_size=[8, 8]), "for volumes, got '3d_fullres'"),
        (lambda p: _chosen(p).update(previous_stage="3d_lowres"), "second stage of a cascade"),
        (lambda p: _chosen(p).pop("architecture"), "has 'architecture', got None"),
        (lambda p: _chosen(p).update(spacing=[1, 0, 1]), "three numbers above 0 as spacing"),
        (lambda p: _chosen(p).update(normalization_schemes=["Mine"]), "normalisation of CTNorm"),
        (lambda p: _chosen(p).update(normalization_schemes=[]), "1 normalization_schemes"),
        (lambda p: _chosen(p).update(resampling_fn_data="mine"), "resample_data_or_seg_to_shape"),
        (lambda p: p.update(transpose_forward=[0, 1, 1]), "transpose_forward as an order"),
        (lambda p: p.update(image_reader_writer="Tiff3DIO"), "a reader of SimpleITKIO"),
        (lambda p: p.update(foreground_intensity_properties_per_channel={}), "has 'mean'"),
        (_arch(conv_op="os.system"), "conv_op as torch.nn.Conv3d"),
        (_arch(conv_op="torch.nn.Conv2d"), "conv_op as torch.nn.Conv3d"),
        (_arch(norm_op="torch.nn.modules.container.Sequential"), "norm_op as torch.nn.Instance"),
        (_arch(nonlin_kwargs={"device": "cuda"}), "plain numbers as nonlin_kwargs"),
        (_arch(norm_op_kwargs={"colour": 1}), "the numbers in plans.json make no network"),
        (_arch(features_per_stage=[4, 8]), "3 whole numbers above 0 as features_per_stage"),
        (_arch(strides=[[1, 1], [2, 2], [2, 2]]), "3 sizes of three whole numbers as strides"),
        (_arch(features_per_stage=[4, 8, 16]), r"other shape: .*stages\.2.*has \(12"),
        (_arch(n_stages=4), "4 whole numbers above 0"),
        (_arch(conv_bias=False), r"not in the plans: .*conv\.bias"),
    ],
)
def test_plans_that_do_not_fit(tmp_path: Path, change: Change, words: str) -> None:
    plan = files.plans()
    change(plan)
    root = files.write(tmp_path, files.nets(), plan)
    with pytest.raises(ModelError, match=words):
        load_model(root)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (files.UNET + "ResidualUNet", "a network PlainConvUNet or ResidualEncoderUNet"),
        ("os.PlainConvUNet", "a network PlainConvUNet or ResidualEncoderUNet"),
    ],
)
def test_a_network_of_another_name(tmp_path: Path, name: str, words: str) -> None:
    entry = {**files.architecture("PlainConvUNet"), "network_class_name": name}
    root = files.write(tmp_path, files.nets(), files.plans(architecture=entry))
    with pytest.raises(ModelError, match=words):
        load_model(root)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"labels": {"0": "background", "1": "lesion"}}, "nnU-Net v1 cannot be read"),
        ({"labels": {"background": 0, "lesion": 2}}, "numbered from 0 without gaps"),
        ({"labels": {"background": 0, "lesion": 1}}, "other shape: decoder.seg_layers"),
        ({"channel_names": {"1": "CT"}}, "channel_names numbered from 0"),
        ({"channel_names": ["CT"]}, "whose dataset.json has 'channel_names'"),
    ],
)
def test_a_dataset_that_does_not_fit(tmp_path: Path, dataset: dict[str, Any], words: str) -> None:
    root = files.write(tmp_path, files.nets(), dataset={**files.DATASET, **dataset})
    with pytest.raises(ModelError, match=words):
        load_model(root)


def test_checkpoints_that_are_none_of_nnunet_v2(tmp_path: Path) -> None:
    (net,) = files.nets()
    root = files.write(tmp_path, [net])
    there = root / "fold_0" / "checkpoint_final.pth"
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, there)
    with pytest.raises(ModelError, match="got epoch, state_dict; checkpoints of another version"):
        load_model(root)
    there.write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"a checkpoint as torch.save writes it in fold_0"):
        load_model(root)
    weights = net.state_dict()
    broken = {**weights, "decoder.seg_layers.1.bias": torch.full((3,), float("nan"))}
    torch.save(files.checkpoint(net, network_weights=broken), there)
    with pytest.raises(ModelError, match=r"got NaN or inf in decoder.seg_layers.1.bias"):
        load_model(root)
    key = "encoder.stages.0.0.convs.0.conv.weight"
    torch.save(files.checkpoint(net, network_weights={**weights, key: weights[key] + 1}), there)
    with pytest.raises(ModelError, match="expected one value of each weight"):
        load_model(root)


def test_folds_of_two_configurations(tmp_path: Path) -> None:
    nets = files.nets(2)
    root = files.write(tmp_path, nets)
    other = files.checkpoint(nets[1], init_args={"configuration": "3d_lowres"})
    torch.save(other, root / "fold_1" / "checkpoint_final.pth")
    with pytest.raises(ModelError, match="folds of one configuration, got 3d_fullres, 3d_lowres"):
        load_model(root)


# ------------------------------------------------------------------------------- hostile files


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    (net,) = files.nets()
    mark = tmp_path / "ran"
    root = files.write(tmp_path, [net], init_args=_Bomb(mark))
    with pytest.raises(ModelError, match="which could run code; nothing of it was read"):
        load_model(root)
    assert not mark.exists()
    torch.load(root / "fold_0" / "checkpoint_final.pth", weights_only=False)  # noqa: TID251 - the proof
    assert mark.exists()  # so the bomb was a real one


def test_a_tensor_that_declares_more_than_it_has(tmp_path: Path) -> None:
    (net,) = files.nets()
    root = files.write(tmp_path, [net], network_weights={"x": torch.zeros(10)})
    there = root / "fold_0" / "checkpoint_final.pth"
    with zipfile.ZipFile(there) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    assert b"K\n" in members[pickled]  # ten numbers
    members[pickled] = members[pickled].replace(b"K\n", b"J\xff\xff\xff\x7f")
    with zipfile.ZipFile(there, "w") as new:
        for name, raw in members.items():
            new.writestr(name, raw)
    with pytest.raises(MedGradcamError, match="declares"):
        load_model(root)


def test_a_plan_of_a_giant_needs_no_memory(tmp_path: Path) -> None:
    root = files.write(tmp_path, files.nets())
    plan = files.plans()
    _arch(features_per_stage=[40_000, 400_000, 800_000])(plan)  # 80 TB
    (root / "plans.json").write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="other shape"):
        load_model(root)


# -------------------------------------------------------------------------------- explained


@pytest.mark.parametrize("count", [1, 3])
def test_it_is_explained_on_the_scans_own_grid(tmp_path: Path, count: int) -> None:
    root = files.write(tmp_path / "net", files.nets(count))
    scan = files.scan(tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    asked = ["--model", str(root), "--target", "lesion", "-o", str(out)]
    assert main(["explain", str(scan), *asked]) == 0
    volume, e = mg.read(scan), mg.read_explanation(out)
    assert e.image == volume.grid
    assert e.grid.axcodes == "SPL"  # the file's own axes, in reverse
    assert volume.grid.oblique_degrees > 3
    assert e.status == "complete"
    assert e.residual == pytest.approx(0, abs=1e-5)
    assert len(e.parts) == (3 if count == 3 else 0)
    assert UNMIRRORED in e.warnings
    image: Any = nib.load(out / "for.nii.gz")
    np.testing.assert_allclose(image.affine, volume.grid.affine, atol=1e-4)
    assert image.shape == volume.grid.shape
