"""Does a model folder load as its authors meant it, and does a spoilt one say what is off?"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from med_gradcam.errors import ModelError
from med_gradcam.loading import load_model
from med_gradcam.model import Model
from med_gradcam.prepare import apply_steps, fit_steps
from tests.tiny import LAYERS, build, save_model, spec

Weights = dict[str, torch.Tensor]


def run(model: Model, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.net(x)
        return found


def test_a_folder_loads_as_it_is_written(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "net", spec(cam_layers={"deep": "3"}))
    model = load_model(folder)
    net = build(LAYERS)
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    x = torch.randn(1, 1, 12, 12, 12)
    assert torch.equal(run(model, x), net.eval()(x))
    assert not model.net.training
    assert (model.name, model.labels, model.link) == ("tiny", ("quiet", "nodule"), "softmax")
    assert (model.task, model.licence, dict(model.aliases)) == (
        "classification",
        "MIT",
        {"deep": "3"},
    )
    assert (model.input.axes, model.input.patch) == ("SPL", (12, 12, 12))
    assert [s.name for s in model.input.intensity] == ["clip", "scale"]
    assert len(model.weights_sha256) == 64
    assert load_model(folder / "spec.json").weights_sha256 == model.weights_sha256


def test_nested_layers(tmp_path: Path) -> None:
    nested: list[Any] = [["Sequential", LAYERS[:3]], ["Sequential", [["Sequential", LAYERS[3:]]]]]
    model = load_model(save_model(tmp_path / "net", spec(layers=nested)))
    assert isinstance(model.net[0][0], torch.nn.Conv3d)  # type: ignore[index]
    assert run(model, torch.zeros(1, 1, 12, 12, 12)).shape == (1, 2)


def test_a_calibration_comes_along(tmp_path: Path) -> None:
    entry = {"target": "nodule", "method": "integrated", "layer": "3"}
    numbers = {"peak_per_ml": 2.0, "floor_per_ml": 0.5, "volumes": 9}
    model = load_model(save_model(tmp_path / "net", spec(calibration=[{**entry, **numbers}])))
    scale = model.scale_for("nodule", "integrated", "3")
    assert scale is not None
    assert scale.peak_per_ml == 2.0


def test_old_batch_norms_have_no_counter(tmp_path: Path) -> None:
    layers = [LAYERS[0], ["BatchNorm3d", {"num_features": 4}], *LAYERS[1:]]

    def old(weights: Weights) -> None:
        del weights["1.num_batches_tracked"]

    load_model(save_model(tmp_path / "net", spec(layers=layers), change=old))


def test_an_unnamed_model_does_not_take_its_folders_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "DOE^JANE-1961", spec(name=None))
    assert load_model(folder).name == "unnamed network"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": None}, "expected format 'med-gradcam-model/1' in net/spec.json, got None"),
        ({"format": "med-gradcam-model/2"}, "got 'med-gradcam-model/2'"),
        ({"labels": None}, r"expected the key 'labels' \(list\) in net/spec.json, got None"),
        ({"labels": ["a", "a"]}, r"net/spec.json: expected different labels"),
        ({"labels": "ab"}, r"expected the key 'labels' \(list\)"),
        ({"link": None}, r"expected the key 'link' \(str\)"),
        ({"link": "relu"}, "expected a link of softmax, sigmoid, none, got 'relu'"),
        ({"layers": None}, r"expected the key 'layers' \(list\)"),
        ({"layers": "Conv3d"}, r"expected the key 'layers' \(list\)"),
        ({"layers": [["Conv9d", {}]]}, "allow-list, got 'Conv9d'.*--trust code"),
        ({"layers": [["Module", {}]]}, "allow-list, got 'Module'"),
        ({"layers": [["os.system", {"command": "true"}]]}, "allow-list, got 'os.system'"),
        ({"layers": [["monai.networks.nets.os", {}]]}, "allow-list, got 'monai.networks.nets.os'"),
        ({"layers": [["DenseNet121", {}]]}, "allow-list, got 'DenseNet121'"),
        ({"layers": ["ReLU"]}, r"expected a layer as \[name, arguments\], got 'ReLU'"),
        ({"layers": [["ReLU", []]]}, r"expected the arguments of ReLU as an object, got \[\]"),
        ({"layers": [["ReLU", {"speed": 3}]]}, "arguments of ReLU do not fit"),
        ({"layers": [["Conv3d", {"in_channels": 1}]]}, "the arguments of Conv3d do not fit"),
        (
            {"layers": [["Conv3d", {"in_channels": 1, "out_channels": 3, "kernel_size": "x"}]]},
            "the arguments of Conv3d do not fit",
        ),
        ({"layers": [["ReLU", {}], ["Linear", {"in_features": 1, "out_features": -1}]]}, "Linear"),
        (
            {"layers": [["Linear", {"in_features": 1, "out_features": 1, "device": "meta"}]]},
            "the arguments of Linear do not fit: 'device' is chosen by the user",
        ),
        ({"input": None}, r"expected the key 'input' \(dict\)"),
        ({"cam_layers": ["3"]}, r"expected the key 'cam_layers' \(dict\)"),
        ({"calibration": 3}, r"expected the key 'calibration' \(list\)"),
        ({"calibration": [{"peak": 1}]}, "a calibration entry does not fit"),
        ({"network": 3}, r"expected a layer as \[name, arguments\], got 3"),
    ],
)
def test_a_spoilt_spec(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = save_model(tmp_path / "net")
    (folder / "spec.json").write_text(json.dumps(spec(**changes)), encoding="utf-8")
    refused(folder, says)


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        load_model(folder)
    assert str(folder.parent) not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modality": None}, r"expected the key 'modality' \(str\)"),
        ({"axes": None}, r"expected the key 'axes' \(str\)"),
        ({"axes": "up,down"}, "expected the axes of a volume such as 'SPL', .* got axes 'up,down'"),
        ({"axes": "XYZ"}, "net/spec.json: expected axis letters"),
        ({"channels": "1"}, "expected a whole number of channels, got '1'"),
        ({"channels": 0}, "at least one input channel, got 0"),
        ({"patch": 12}, "expected three numbers or null as patch, got 12"),
        ({"patch": [12, 12]}, r"expected three numbers or null as patch, got \[12, 12\]"),
        ({"patch": [12.5, 12, 12]}, "whole numbers or null as patch"),
        ({"patch": [12, 12, -1]}, "expected three positive numbers as patch"),
        ({"spacing_mm": [1, 1, 0]}, "expected three positive numbers as spacing_mm"),
        ({"spacing_mm": [float("nan")] * 3}, "expected three positive numbers as spacing_mm"),
        ({"patch": [float("nan")] * 3}, "as patch"),
        ({"intensity": 3}, r"expected the key 'intensity' \(list\)"),
        ({"intensity": None}, r"expected the key 'intensity' \(list\)"),
        ({"intensity": ["clip"]}, r"expected intensity steps as \[name, numbers...\], got 'clip'"),
        ({"intensity": [["clip", "a", "b"]]}, "expected numbers in an intensity step, got 'a'"),
        ({"intensity": [["median"]]}, "expected an intensity step of clip, scale"),
        ({"intensity": [["clip", float("nan"), 1]]}, "finite numbers in the intensity step"),
    ],
)
def test_a_spoilt_input(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = save_model(tmp_path / "net")
    given: dict[str, Any] = {**spec()["input"], **changes}
    (folder / "spec.json").write_text(json.dumps(spec(input=given)), encoding="utf-8")
    refused(folder, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "expected readable JSON in net/spec.json"),
        (b"{", "expected readable JSON in net/spec.json"),
        (b"\xff\xfe{}", "expected readable JSON in net/spec.json"),
        (b"[1, 2]", "expected format 'med-gradcam-model/1' in net/spec.json, got 'list'"),
        (b"[" * 100000, "expected readable JSON in net/spec.json"),
    ],
)
def test_a_spec_that_is_none(tmp_path: Path, text: bytes, says: str) -> None:
    folder = save_model(tmp_path / "net")
    (folder / "spec.json").write_bytes(text)
    refused(folder, says)


def lose(weights: Weights) -> None:
    del weights["3.bias"]


def add(weights: Weights) -> None:
    weights["9.weight"] = torch.zeros(3)


def reshape(weights: Weights) -> None:
    weights["7.weight"] = torch.zeros(2, 5)


def not_a_number(weights: Weights) -> None:
    weights["7.weight"][0, 0] = torch.nan


def other_kind(weights: Weights) -> None:
    weights["7.weight"] = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lose, r"weights.safetensors do not fit spec.json \(missing: 3.bias\)"),
        (add, r"\(not in the spec: 9.weight\)"),
        (reshape, r"other shape or kind: 7.weight has \(2, 5\), the spec says \(2, 4\)"),
        (not_a_number, "expected finite weights in .* got NaN or inf in 7.weight"),
        (other_kind, "7.weight holds int64, the spec says float32"),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, change: Callable[[Weights], None], says: str
) -> None:
    refused(save_model(tmp_path / "net", change=change), says)


def test_half_precision_weights_are_taken(tmp_path: Path) -> None:
    def halve(weights: Weights) -> None:
        for name in weights:
            weights[name] = weights[name].half()

    model = load_model(save_model(tmp_path / "net", change=halve))
    assert next(model.net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, pickle.dumps({"a": 1}), b"\xff" * 64])
def test_a_pickle_or_garbage_as_weights(tmp_path: Path, content: bytes) -> None:
    folder = save_model(tmp_path / "net")
    (folder / "weights.safetensors").write_bytes(content)
    refused(folder, "expected safetensors in net/weights.safetensors, got")


def test_weights_cut_short(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "net")
    raw = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(raw[:-40])
    refused(folder, "expected safetensors in net/weights.safetensors, got")


def test_no_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "net")
    (folder / "weights.safetensors").unlink()
    refused(folder, "expected readable weights in net/weights.safetensors, got: No such file")


def test_a_network_for_images_is_one_pixel_thick(tmp_path: Path) -> None:
    flat = spec()["input"] | {"axes": "PL", "patch": [96, 96], "spacing_mm": [0.2, 0.3]}
    found = load_model(save_model(tmp_path / "net", spec(input=flat))).input
    assert (found.axes, found.patch, found.spacing_mm) == ("PLS", (96, 96, 1), (0.2, 0.3, 1.0))
    tile = spec()["input"] | {"axes": "row,column", "patch": [96, 96]}
    found = load_model(save_model(tmp_path / "tile", spec(input=tile))).input
    assert (found.axes, found.patch) == (None, (96, 96, 1))


# ----------------------------------------------------------------------------------------- MONAI

SMALL = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "init_features": 4,
    "growth_rate": 2,
    "block_config": [1, 1],
    "bn_size": 2,
}


def monai(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return spec(layers=None, network=[f"monai.networks.nets.{name}", arguments])


@pytest.mark.filterwarnings("ignore")
def test_a_constructor_of_monai(tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    folder = save_model(tmp_path / "net", monai("DenseNet", SMALL), nets.DenseNet(**SMALL))
    model = load_model(folder)
    assert run(model, torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("UNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}),
        ("UNet", {**SMALL}),
        ("DenseNet", {**SMALL, "act": "no such activation"}),
        ("DenseNet", {**SMALL, "spatial_dims": 7}),
        ("ViT", {"in_channels": 1, "img_size": [8, 8, 8], "patch_size": [99, 99, 99]}),
    ],
)
def test_arguments_that_monai_does_not_take(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    pytest.importorskip("monai.networks.nets")
    folder = save_model(tmp_path / "net")
    (folder / "spec.json").write_text(json.dumps(monai(name, arguments)), encoding="utf-8")
    refused(folder, rf"the arguments of monai.networks.nets.{name} do not fit")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DenseNet121", "resnet10", "SEResNet50", "EfficientNetBN"])
def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A spec that asks for pretrained weights gets those in its folder and no others."""
    pytest.importorskip("monai.networks.nets")

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("asked for a download")

    for place in ("torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    arguments: dict[str, Any] = {"spatial_dims": 2, "pretrained": True, "in_channels": 3}
    more: dict[str, dict[str, Any]] = {
        "DenseNet121": {"out_channels": 2},
        "resnet10": {"num_classes": 2, "n_input_channels": 3},
        "SEResNet50": {"num_classes": 2},
        "EfficientNetBN": {"model_name": "efficientnet-b0"},
    }
    arguments |= more[name]
    if name == "resnet10":
        del arguments["in_channels"]
    folder = save_model(tmp_path / "net")
    (folder / "spec.json").write_text(json.dumps(monai(name, arguments)), encoding="utf-8")
    refused(folder, "weights in net/weights.safetensors do not fit spec.json")


def test_without_monai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "monai.networks", None)
    folder = save_model(tmp_path / "net")
    (folder / "spec.json").write_text(json.dumps(monai("DenseNet", SMALL)), encoding="utf-8")
    refused(folder, r"needs MONAI, which is not installed: pip install 'med.gradcam\[monai\]'")


# -------------------------------------------------------------------------------- real networks


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["luna_nodule_cls", "meshnet_18class", "meshnet_3class", "ncomms_cog_fold0"]
)
def test_the_shared_networks_load_as_their_example_loader_does(real_data: Path, name: str) -> None:
    folder = real_data / "nets" / name
    model = load_model(folder)
    described = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    net = build(described["layers"])
    stored = load_file(folder / "weights.safetensors")
    net.load_state_dict(stored)
    ours = model.net.state_dict()
    assert list(ours) == list(net.state_dict())
    assert all(torch.equal(ours[k], v) for k, v in net.state_dict().items())
    assert [str(m) for m in model.net.children()] == [str(m) for m in net.children()]
    assert list(model.labels) == described["labels"]
    assert model.link == described["link"]


@pytest.mark.real
def test_stored_outputs_come_out_again(real_data: Path) -> None:
    folder = real_data / "nets" / "luna_nodule_cls"
    model = load_model(folder)
    stored = load_file(folder / "reference.safetensors")
    outputs = [run(model, stored["input"][i : i + 1].float()) for i in range(3)]
    assert torch.allclose(torch.cat(outputs), stored["output"][:3], atol=1e-4)


@pytest.mark.real
def test_the_network_for_tiles_is_explained(real_data: Path) -> None:
    import med_gradcam as mg

    model = load_model(real_data / "nets" / "pcam_simple")
    tile = np.random.default_rng(0).integers(0, 255, (3, 96, 96, 1)).astype(np.float32)
    e = mg.explain(tile, model, layer="auto", reference="zero")
    assert e.evidence.shape[2] == 1
    assert abs(e.residual or 0.0) < 1e-4


@pytest.mark.real
def test_the_quantiles_of_the_brain_network(real_data: Path) -> None:
    steps = load_model(real_data / "nets" / "meshnet_3class").input.intensity
    raw = np.random.default_rng(0).gamma(2, 50, (1, 9, 9, 9)).astype(np.float32)
    low, high = np.quantile(raw, [0.02, 0.98])
    assert apply_steps(raw, fit_steps(raw, steps)) == pytest.approx(
        np.clip((raw - low) / (high - low), 0, 1), abs=1e-6
    )
