"""Does a MONAI Bundle load as data, and is it the same network with the same maps?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from med_gradcam import engine
from med_gradcam.cli import main
from med_gradcam.errors import ModelError, UntrustedModelError
from med_gradcam.loading import load_model, read
from med_gradcam.model import InputSpec, Model
from med_gradcam.models import monai_bundle
from med_gradcam.prepare import prepare
from tests.models.bundles import (
    CODE,
    CT,
    FIRST,
    LOAD,
    RAS,
    RESNET,
    TYPE,
    UNET,
    built,
    config,
    metadata,
    scan,
    spacing,
    t,
    unet,
    write,
    zipped,
)  # fmt: skip
from tests.tiny import volume

pytest.importorskip("monai")


def resnet(folder: Path, **more: Any) -> tuple[Path, torch.nn.Module]:
    """A classification bundle whose network is called by an expression, and its network."""
    net = built(RESNET)
    call = "$monai.networks.nets.resnet10(spatial_dims=@dims, n_input_channels=1, num_classes=len(@names), widen_factor=1 / 16)"  # noqa: E501
    inference = config(call, [LOAD, FIRST], dims=3, names={"no": 0, "yes": 1}, **more)
    return write(folder, inference, metadata(["no", "yes"], modality="MRI"), net.state_dict()), net


# ------------------------------------------------------------------------------- the same network


@pytest.mark.parametrize("kind", [unet, resnet])
def test_the_same_logits_as_the_source(tmp_path: Path, kind: Any) -> None:
    folder, net = kind(tmp_path / "bundle")
    model = load_model(folder)
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.net(x), net(x))
    assert not model.net.training
    assert (
        model.weights_sha256
        == hashlib.sha256((folder / "models/model.pt").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("method", ["secant", "gradcam"])
def test_the_same_maps_as_eager(tmp_path: Path, method: str) -> None:
    folder, net = resnet(tmp_path / "bundle")
    model = load_model(folder)
    x = np.random.default_rng(0).normal(0, 1, (16, 16, 16)).astype(np.float32)
    eager = Model(net, InputSpec(modality="MR"), labels=("no", "yes"))
    scans = volume(x, modality="MR")
    found, wanted = (
        engine.explain(scans, m, target="yes", layer="layer2", method=method, reference="zero")
        for m in (model, eager)
    )
    assert np.array_equal(found.evidence, wanted.evidence)
    assert found.score == wanted.score
    assert found.provenance.weights_sha256 == model.weights_sha256


def test_what_the_bundle_says_of_itself(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "patient_name")
    (folder / "LICENSE").write_text("text")
    model = load_model(folder)
    assert model.labels == ("background", "spleen")
    assert (model.name, model.task) == ("tiny bundle", "tiny task")
    assert model.licence == "see the bundle's LICENSE; nobody; intended use: tests only"
    assert (model.input.channels, model.input.modality, model.input.axes) == (1, "CT", "RAS")
    assert model.input.patch is None
    assert model.input.min_patch == (8, 8, 8)
    assert model.drift == ()
    assert "the bundle says its network takes values in 0 to 1" in model.notes


def test_a_zip_is_the_same(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "bundle")
    model = load_model(zipped(folder, tmp_path / "bundle.zip"))
    plain = load_model(folder)
    assert model.weights_sha256 == plain.weights_sha256
    state, wanted = model.net.state_dict(), plain.net.state_dict()
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("nested", ["model", "state_dict", "network"])
def test_weights_inside_a_checkpoint(tmp_path: Path, nested: str) -> None:
    net = built(UNET)
    held = {nested: net.state_dict(), "epoch": 3, "metric": np.float64(0.9)}
    folder = write(tmp_path / "b", config(UNET, CT), metadata(["a", "b"]), held)
    state = load_model(folder).net.state_dict()
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "bundle")
    other = built(UNET, seed=1)
    path = folder / "models/model.safetensors"
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, path)
    model = load_model(folder)
    assert model.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(next(model.net.parameters()), next(other.parameters()))


def test_weights_under_the_name_that_the_configuration_gives(tmp_path: Path) -> None:
    net = built(UNET)
    loader = {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/low.pt'"}
    folder = write(
        tmp_path / "b", config(UNET, CT, handlers=[loader]), metadata(["a", "b"]),
        net.state_dict(), "low.pt",
    )  # fmt: skip
    assert torch.equal(next(load_model(folder).net.parameters()), next(net.parameters()))


def test_half_precision_weights(tmp_path: Path) -> None:
    halves = {
        k: v.half() if v.is_floating_point() else v for k, v in built(UNET).state_dict().items()
    }
    folder = write(tmp_path / "b", config(UNET, CT), metadata(["a", "b"]), halves)
    state = load_model(folder).net.state_dict()
    assert all(torch.equal(state[k], v.to(state[k].dtype)) for k, v in halves.items())


def test_yaml_and_macros(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    net = built(UNET)
    folder = write(tmp_path / "b", None, metadata(["a", "b"]), net.state_dict())
    (folder / "configs/parts.json").write_text(json.dumps({"nets": {"unet": UNET, "n": 2}}))
    made = config("%parts.json::nets::unet", "$@loads + @rest", loads=CT[:3], rest=CT[3:])
    (folder / "configs/inference.yaml").write_text(yaml.safe_dump(made))
    model = load_model(folder)
    assert torch.equal(next(model.net.parameters()), next(net.parameters()))
    assert model.input.axes == "RAS"


def test_a_network_that_only_the_training_has(tmp_path: Path) -> None:
    inference = config(None, CT)
    inference.pop("network_def")
    inference.pop("network")
    net = built(UNET)
    folder = write(tmp_path / "b", inference, metadata(["a", "b"]), net.state_dict())
    (folder / "configs/train.json").write_text(json.dumps({"network_def": UNET}))
    assert torch.equal(next(load_model(folder).net.parameters()), next(net.parameters()))


def test_downloads_are_forced_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.networks.nets import densenet

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr(densenet, "load_state_dict_from_url", called)
    definition = {"_target_": "DenseNet121", "spatial_dims": 2, "in_channels": 3,
                  "out_channels": 2, "pretrained": True}  # fmt: skip
    from med_gradcam.models import _bundle_net

    made = _bundle_net.build(_bundle_net.plan(definition, "here"), 1 << 26)
    assert isinstance(made, torch.nn.Module)
    with pytest.raises(AssertionError, match="downloaded"):  # the careless way
        densenet.DenseNet121(spatial_dims=2, in_channels=3, out_channels=2, pretrained=True)


def test_arguments_of_another_monai(tmp_path: Path) -> None:
    from med_gradcam.models import _bundle_net

    swin = {"_target_": "SwinUNETR", "img_size": 96, "in_channels": 1, "out_channels": 2,
            "feature_size": 12, "dimensions": 3}  # fmt: skip
    plan = _bundle_net.plan(swin, "here")
    assert "the argument img_size of SwinUNETR does not exist in this MONAI: left out" in plan.notes
    assert "the argument dimensions of SwinUNETR is called spatial_dims in this MONAI" in plan.notes
    with pytest.raises(ModelError, match="that this MONAI knows in here, got 'act_kind'"):
        _bundle_net.plan({**UNET, "act_kind": 3}, "here")


# ------------------------------------------------------------------------------------- what is off


def test_no_metadata(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", config(UNET, CT), None, built(UNET).state_dict())
    with pytest.raises(
        ModelError, match=r"expected configs/metadata.json in the bundle b.*add one"
    ):
        load_model(folder)


@pytest.mark.parametrize("key", ["network_data_format", "inputs", "num_channels"])
def test_metadata_without_something(tmp_path: Path, key: str) -> None:
    meta = metadata(["a", "b"])
    formats = meta["network_data_format"]
    held = {"network_data_format": meta, "inputs": formats,
            "num_channels": formats["inputs"]["image"]}[key]  # fmt: skip
    held.pop(key)
    folder = write(tmp_path / "b", config(UNET, CT), meta, built(UNET).state_dict())
    with pytest.raises(ModelError, match=rf"expected .*{key} in b/configs/metadata.json"):
        load_model(folder)


def test_labels_that_do_not_match_the_head(tmp_path: Path) -> None:
    weights = built(UNET).state_dict()
    folder = write(tmp_path / "b", config(UNET, CT), metadata(["a", "b", "c"]), weights)
    with pytest.raises(ModelError, match=r"one label for each output of the network \(2\).*got 3"):
        load_model(folder)


def test_channels_that_do_not_match_the_network(tmp_path: Path) -> None:
    meta = metadata(["a", "b"], num_channels=4)
    folder = write(tmp_path / "b", config(UNET, CT), meta, built(UNET).state_dict())
    with pytest.raises(ModelError, match=r"as many input channels .* takes \(1\), got 4"):
        load_model(folder)


def test_the_same_label_twice_is_numbered(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", config(UNET, CT), metadata(["a", "a"]), built(UNET).state_dict())
    assert load_model(folder).labels == ("a", "a (2)")


def test_weights_of_another_network(tmp_path: Path) -> None:
    other = built({**UNET, "channels": [4, 6]})
    folder = write(tmp_path / "b", config(UNET, CT), metadata(["a", "b"]), other.state_dict())
    with pytest.raises(ModelError, match=r"b/models/model.pt do not fit network_def .*other shape"):
        load_model(folder)


def test_no_weights_and_a_program(tmp_path: Path) -> None:
    folder, net = unet(tmp_path / "b")
    (folder / "models/model.pt").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors or models/model\.pt in the bundle b"):
        load_model(folder)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, torch.zeros(1, 1, 16, 16, 16))
        torch.jit.save(traced, folder / "models/model.ts")
    with pytest.raises(UntrustedModelError, match="--trust archive"):
        load_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(folder, ["archive"])
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert (model.net(x) - net(x)).abs().max() < 1e-6


def test_random_preprocessing_is_refused(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "b", [*CT, t("RandAffined", prob=1.0)])
    with pytest.raises(ModelError, match="the random transform RandAffined"):
        load_model(folder)


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (t("GaussianSmoothd", sigma=1.0), "GaussianSmoothd"),
        (t("Lambdad", func="$lambda x: x * 2"), "Lambdad"),
        ({"_target_": "scripts.mine.Thingd", "keys": "image"}, "Thingd"),
        (t("monai.apps.vista3d.transforms.VistaPreTransformd"), "VistaPreTransformd"),
        (t("Spacingd", pixdim=[1, 1, 1], diagonal=True), "Spacingd (diagonal=True)"),
        (t("Spacingd", pixdim=[1, 1, 1], mode="nearest"), "Spacingd (mode='nearest')"),
        (t("CropForegroundd", source_key="image", select_fn="$lambda x: x.mean() > 0"),
         "CropForegroundd (select_fn)"),
        (t("CastToTyped", dtype="$torch.uint8"), "CastToTyped (dtype='uint8')"),
        (t("ScaleIntensityd", odd=1), "ScaleIntensityd (odd=1)"),
        (t("Orientationd", axcodes="LPS"), "Orientationd (after Spacing)"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, transform: dict[str, Any], says: str
) -> None:
    folder, _ = unet(tmp_path / "b", [*CT, transform])
    model = load_model(folder)
    assert model.drift == (says,)
    scans = read(scan(tmp_path / "scan.nii.gz"))
    with pytest.raises(ModelError, match=r"steps cannot be done here: .*--accept-drift") as caught:
        engine.explain(scans, model, layer="model.2", method="gradcam")
    assert says in str(caught.value)
    assert len(model.net._forward_hooks) == 0


def test_drift_that_was_accepted_is_written_down(tmp_path: Path) -> None:
    pad = t("DivisiblePadd", k=8)
    folder, _ = unet(tmp_path / "b", [*CT, pad, t("GaussianSmoothd", sigma=1.0)])
    found = engine.explain(
        read(scan(tmp_path / "scan.nii.gz")), load_model(folder), target="spleen",
        layer="model.0", method="gradcam", accept_drift=True,
    )  # fmt: skip
    assert any("which was accepted: these of its steps" in note for note in found.provenance.notes)


def test_disabled_transforms_and_those_of_labels_are_left_out(tmp_path: Path) -> None:
    more = [t("GaussianSmoothd", _disabled_="$not @wanted"),
            {"_target_": "RemoveSmallObjectsd", "keys": "label"}]  # fmt: skip
    folder, _ = unet(tmp_path / "b", [*CT, *more], wanted=False)
    assert load_model(folder).drift == ()


def test_keys_and_switches_as_the_zoo_writes_them(tmp_path: Path) -> None:
    key = {"keys": "@image"}
    steps = [{**LOAD, **key}, {**FIRST, **key}, {**RAS, "keys": ["@image"]},
             {"_target_": "Spacingd", **key, "pixdim": "@pixdim", "mode": ["bilinear"]},
             {"_target_": "NormalizeIntensityd", **key, "nonzero": "True"},
             {"_target_": "CastToTyped", **key, "dtype": "$torch.float32"}]  # fmt: skip
    folder, _ = unet(
        tmp_path / "b", "$@steps ", steps=steps, image="$monai.utils.CommonKeys.IMAGE",
        show={"fine": True}, pixdim="$[1.5, 1.5, 1.5] if @show#fine else [3.0, 3.0, 3.0]",
    )  # fmt: skip
    model = load_model(folder)
    assert model.drift == ()
    scans = read(scan(tmp_path / "scan.nii.gz"))
    assert prepare(scans, model).grid.spacing_mm == pytest.approx((1.5, 1.5, 1.5), abs=1e-6)


def test_images_that_are_joined_are_measured_one_by_one(tmp_path: Path) -> None:
    net = built({**UNET, "in_channels": 2})
    names = {"keys": ["t1", "t2"]}
    steps = [{**LOAD, **names}, {**FIRST, **names},
             {"_target_": "NormalizeIntensityd", **names},
             {"_target_": "ConcatItemsd", **names, "name": "image"},
             t("DivisiblePadd", k=8)]  # fmt: skip
    folder = write(
        tmp_path / "b", config({**UNET, "in_channels": 2}, steps),
        metadata(["a", "b"], num_channels=2, modality="MR"), net.state_dict(),
    )  # fmt: skip
    model = load_model(folder)
    assert "one image per channel, in the bundle's order: t1, t2" in model.notes
    array = np.random.default_rng(0).normal([[[[5]]], [[[90]]]], 3, (2, 8, 8, 8))
    made = prepare(volume(array.astype(np.float32), modality="MR"), model).network_input()
    assert made.mean(axis=(1, 2, 3)) == pytest.approx((0, 0), abs=1e-5)
    assert made.std(axis=(1, 2, 3)) == pytest.approx((1, 1), abs=1e-5)


def test_the_window_of_the_inferer_is_the_patch(tmp_path: Path) -> None:
    windows = {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, "@size"], "overlap": 0.5}
    folder, _ = unet(tmp_path / "b", inferer=windows, size=8)
    model = load_model(folder)
    assert model.input.patch == (16, 16, 8)
    assert model.input.padding == 0.0
    scans = read(scan(tmp_path / "scan.nii.gz"))
    prepared = prepare(scans, model, "ijk:14,13,6")
    assert prepared.network_input().shape == (1, 16, 16, 8)


@pytest.mark.parametrize(
    ("post", "link"),
    [({"softmax": True}, "softmax"), ({"sigmoid": True}, "sigmoid"), ({}, "softmax")],
)
def test_the_link_is_that_of_the_postprocessing(
    tmp_path: Path, post: dict[str, Any], link: str
) -> None:
    steps = {"_target_": "Compose", "transforms": [t("Activationsd", **post)]}
    folder, _ = unet(tmp_path / "b", postprocessing=steps)
    assert load_model(folder).link == link


# ---------------------------------------------------------------------------- where evidence lands


@pytest.mark.parametrize("axes", ["LPS", "SRP"])
def test_evidence_comes_home(tmp_path: Path, axes: str) -> None:
    """One voxel far brighter than the others, in an unequal, turned scan, cropped and padded."""
    import nibabel as nib

    steps = [LOAD, FIRST, RAS, spacing(1.5, 1.5, 2.0),
             t("CropForegroundd", source_key="image", margin=3, select_fn="$lambda x: x > 5"),
             t("SpatialPadd", spatial_size=[48, 48, 40]), TYPE]  # fmt: skip
    folder, _ = unet(tmp_path / "b", steps)
    path = scan(tmp_path / "scan.nii.gz", axes)
    stored: Any = nib.load(path)
    array = np.zeros(stored.shape, np.float32)
    index = (9, 15, 7)
    array[5:20, 6:20, 3:11] = 10
    array[index] = 1000
    nib.Nifti1Image(array, stored.affine).to_filename(path)
    scans, model = read(path), load_model(folder)
    prepared = prepare(scans, model)
    made = prepared.network_input()[0]
    assert made.shape == (48, 48, 40)
    weight = np.where(made > 60, made, 0)
    every = np.stack(np.meshgrid(*map(np.arange, made.shape), indexing="ij"), axis=-1)
    points = prepared.grid.world_ras(every)
    centre = (points * weight[..., None]).sum(axis=(0, 1, 2)) / weight.sum()
    # linear sampling of one voxel is right to half a voxel of the network's (1.5 x 1.5 x 2 mm)
    assert np.linalg.norm(centre - scans.grid.world_ras(index)) < 1.0
    assert prepared.grid.axcodes == "RAS"
    from med_gradcam.maps import draw

    found = engine.explain(
        scans, model, target="spleen", layer="@input", method="integrated_gradients",
        reference="zero",
    )  # fmt: skip
    signed = draw(found).signed
    assert signed.grid == scans.grid
    peak = np.unravel_index(int(np.abs(signed.values).argmax()), signed.values.shape)
    away = scans.grid.world_ras(peak) - scans.grid.world_ras(index)
    assert np.linalg.norm(away) < 1.5  # within a voxel of the network's


# ---------------------------------------------------------------------------------- from end to end


def test_explained_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = unet(tmp_path / "b", [*CT, t("DivisiblePadd", k=8)])
    path = scan(tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    arguments = ["explain", str(path), "--model", str(folder), "-o", str(out), "--quiet",
                 "--target", "spleen", "--layer", "model.0", "--method", "gradcam"]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    record = json.loads((out / "explanation.json").read_text())
    assert str(tmp_path) not in json.dumps(record)
    smooth, _ = unet(tmp_path / "smooth", [*CT, t("GaussianSmoothd", sigma=1.0)])
    assert main(["explain", str(path), "--model", str(smooth), "-o", str(out / "2")]) == 3
    assert "GaussianSmoothd; pass --accept-drift" in capsys.readouterr().err
    arguments[3], arguments[5] = str(smooth), str(tmp_path / "3")
    assert main([*arguments, "--accept-drift"]) in (0, 4)


def test_a_bundle_is_listed() -> None:
    assert monai_bundle.TITLE.startswith("MONAI Bundle")
    assert CODE.startswith("$")  # the configurations of these tests hold code that must not run
