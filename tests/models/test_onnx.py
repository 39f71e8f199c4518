"""An ONNX network is explained as the network that it was exported from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, load_model, numpy_helper, save_model

import med_gradcam as mg
from med_gradcam.containers import onnx_whole
from med_gradcam.errors import ModelError, UsageError
from med_gradcam.models import onnx as onnx_format
from tests.containers import onnx_small
from tests.models.onnx_nets import NETS, exported, network, scan

METHODS = ("gradcam", "hirescam", "secant", "integrated")
QUICK = ("resnet10", "unet", "vit")


def _first(out: Any) -> torch.Tensor:
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def _same(name: str, path: Path, layer: str = "") -> None:
    net, x = network(name), scan(name)
    model = mg.load_model(path)
    batch = torch.from_numpy(x)[None, None]
    with torch.no_grad():
        theirs, ours = _first(net(batch)), _first(model.net(batch))
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    for method in METHODS:
        a = mg.explain(x, net, method=method, layer=NETS[name].layer, target=1)
        b = mg.explain(x, model, method=method, layer=layer or NETS[name].layer, target=1)
        assert a.method == b.method == method
        assert a.cells == b.cells
        size = np.abs(a.evidence).max()
        assert size > 0
        assert np.abs(a.evidence - b.evidence).max() <= 1e-4 * size
    assert mg.explain(x, model, target=1).layer  # auto finds one


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETS]
)
def test_same_maps(name: str, tmp_path: Path) -> None:
    _same(name, exported(network(name), NETS[name].side, tmp_path / "net.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_same_maps_by_the_newer_exporter(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = exported(network(name), NETS[name].side, tmp_path / "net.onnx", dynamo=True)
    _same(name, path, NETS[name].newer)


def _classifier(tmp_path: Path, **kwargs: Any) -> Path:
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 3, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(3, 2),
        *kwargs.pop("end", ()),
    ).eval()
    torch.manual_seed(1)
    for weight in net.parameters():
        weight.data.normal_()
    return exported(net, 8, tmp_path / "small.onnx", **kwargs)


SPEC = {
    "format": "med-gradcam-model/1",
    "input": {"modality": "CT", "axes": "SPL", "channels": 1},
    "labels": ["benign", "malignant"],
    "link": "softmax",
}


def test_what_the_file_says_is_used_and_the_rest_noted(tmp_path: Path) -> None:
    model = mg.load_model(_classifier(tmp_path))
    assert model.input.channels == 1
    assert model.input.patch == (8, 8, 8)
    assert "softmax assumed" in model.notes[0]
    assert len(model.weights_sha256) == 64


def test_a_description_beside_it(tmp_path: Path) -> None:
    path = _classifier(tmp_path)
    path.with_name("small.onnx.json").write_text(json.dumps(SPEC))
    model = mg.load_model(path)
    assert model.labels == ("benign", "malignant")
    assert model.input.axes == "SPL"
    assert model.notes == ()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("med_gradcam", json.dumps(SPEC)),
        ("labels", '["benign", "malignant"]'),
        ("names", '{"1": "malignant", "0": "benign"}'),
        ("class_names", "benign,malignant"),
    ],
)
def test_labels_in_its_metadata(key: str, text: str, tmp_path: Path) -> None:
    proto = load_model(_classifier(tmp_path))
    helper.set_model_props(proto, {key: text})
    save_model(proto, tmp_path / "named.onnx")
    assert mg.load_model(tmp_path / "named.onnx").labels == ("benign", "malignant")


@pytest.mark.parametrize(
    ("end", "link"), [(torch.nn.Softmax(1), "softmax"), (torch.nn.Sigmoid(), "sigmoid")]
)
def test_a_last_softmax_is_taken_off(end: torch.nn.Module, link: str, tmp_path: Path) -> None:
    model = mg.load_model(_classifier(tmp_path, end=(end,)))
    plain = mg.load_model(_classifier(tmp_path))
    x = torch.randn(1, 1, 8, 8, 8)
    assert model.link == link
    assert "was taken off" in model.notes[0]
    assert torch.equal(model.net(x), plain.net(x))


def test_sniff_looks_inside(tmp_path: Path) -> None:
    path = _classifier(tmp_path)
    assert onnx_format.sniff(str(path.rename(tmp_path / "network.bin")))
    (tmp_path / "other.bin").write_bytes(b"\x08\x07\x12\x03abc" + bytes(50))
    assert not onnx_format.sniff(str(tmp_path / "other.bin"))
    assert not onnx_format.sniff(str(tmp_path / "none.onnx"))


def test_what_was_opened_is_compared_with_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from med_gradcam.containers import onnx_ops

    monkeypatch.setitem(onnx_ops.FORMS, "Relu", lambda _, x: torch.nn.functional.leaky_relu(x, 0.1))
    model = mg.load_model(_classifier(tmp_path))
    with pytest.raises(ModelError, match="expected the opened network to give what its program"):
        mg.explain(scan("unet")[:8, :8, :8], model)


# ------------------------------------------------------------------------- networks that stay whole


def _without_gradient(tmp_path: Path) -> Path:
    proto = load_model(_classifier(tmp_path))
    relu = next(node for node in proto.graph.node if node.op_type == "Relu")
    middle = helper.make_node("Floor", [relu.output[0]], ["stepped"])
    for node in proto.graph.node:
        for n, name in enumerate(node.input):
            if name == relu.output[0]:
                node.input[n] = "stepped"
    at = list(proto.graph.node).index(relu)
    proto.graph.node.insert(at + 1, middle)
    save_model(proto, tmp_path / "stepped.onnx")
    return tmp_path / "stepped.onnx"


@pytest.mark.parametrize("method", ["occlusion", "rise"])
@pytest.mark.parametrize("runtime", [True, False])
def test_methods_without_gradients_explain_it(
    method: str, runtime: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runtime:
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_whole, "has_runtime", lambda: runtime)
    x = scan("unet")[:8, :8, :8]
    model = mg.load_model(_without_gradient(tmp_path))
    assert model.net.gradient_free == "its operator 'Floor' has no gradient"
    found = mg.explain(x, model, method=method, target=1)
    assert np.abs(found.evidence).max() > 0


def test_gradient_methods_refuse_by_name(tmp_path: Path) -> None:
    model = mg.load_model(_without_gradient(tmp_path))
    with pytest.raises(UsageError, match=r"occlusion.*rise.*'Floor' has no gradient"):
        mg.explain(scan("unet")[:8, :8, :8], model, method="gradcam")


# ------------------------------------------------------------------------------------ hostile files


def _big(path: Path, tensor: Any) -> Path:
    tensor.name = "big"
    node = helper.make_node("Add", ["x", "big"], ["y"])
    ins = [helper.make_tensor_value_info("x", 1, [1, 1, 8, 8, 8])]
    outs = [helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph([node], "g", ins, outs, [tensor])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_tensor_of_ten_gigabytes_that_is_not_there(tmp_path: Path) -> None:
    tensor = TensorProto(data_type=1, dims=[10, 1024, 1024, 256], raw_data=b"abcd")
    with pytest.raises(ModelError, match="as many numbers as declared in the tensor 'big'"):
        mg.load_model(_big(tmp_path / "big.onnx", tensor))


@pytest.mark.parametrize(
    "place",
    ["../secret", "/etc/hostname", "..", "", "a/../../secret", "C:secret", "..\\secret", "link"],
)
def test_tensors_elsewhere_are_not_read(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = TensorProto(data_type=1, dims=[4], data_location="EXTERNAL")
    for key, value in (("location", place), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(ModelError, match="could be any file of yours; it was not read"):
        mg.load_model(_big(folder / "net.onnx", tensor))


@pytest.mark.parametrize(("offset", "length"), [("0", "32"), ("8", "16"), ("-4", "16"), ("x", "1")])
def test_tensors_past_the_end_of_their_file(offset: str, length: str, tmp_path: Path) -> None:
    (tmp_path / "net.data").write_bytes(bytes(16))
    tensor = TensorProto(data_type=1, dims=[4], data_location="EXTERNAL")
    for key, value in (("location", "net.data"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(ModelError, match="inside its file, which has 16 bytes"):
        mg.load_model(_big(tmp_path / "net.onnx", tensor))


def test_tensors_beside_it_are_read_and_counted_in_the_digest(tmp_path: Path) -> None:
    plain = _classifier(tmp_path)
    proto = load_model(plain)
    save_model(
        proto, tmp_path / "apart.onnx", save_as_external_data=True, location="w.data",
        size_threshold=0,
    )  # fmt: skip
    model, x = mg.load_model(tmp_path / "apart.onnx"), torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(model.net(x), mg.load_model(plain).net(x))
    raw = bytearray((tmp_path / "w.data").read_bytes())
    raw[3] ^= 1
    (tmp_path / "w.data").write_bytes(raw)
    assert mg.load_model(tmp_path / "apart.onnx").weights_sha256 != model.weights_sha256


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = _classifier(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="cut off or of another kind"):
        mg.load_model(path)


def _refused(nodes: list[Any], path: Path, match: str, **constants: Any) -> None:
    model = onnx_small.made(
        nodes, {"x": np.zeros((1, 1, 4, 4, 4), np.float32)}, constants, ["y"], 17
    )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=match):
        mg.load_model(path)


def test_cycles(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "z"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    _refused(nodes, tmp_path / "net.onnx", "reads 'z' before it is made")


def test_values_made_twice(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]
    _refused(nodes, tmp_path / "net.onnx", "makes each value once")


def test_operators_of_others(tmp_path: Path) -> None:
    nodes = [helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")]
    _refused(nodes, tmp_path / "net.onnx", "com.microsoft::FusedConv")


def test_too_many_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from med_gradcam.containers import onnx_file

    monkeypatch.setattr(onnx_file, "MOST_NODES", 3)
    names = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]
    _refused(nodes, tmp_path / "net.onnx", "at most 3 operators")


def test_constants_that_fill_the_memory(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["sides"], ["big"]),
        helper.make_node("ReduceMax", ["big"], ["top"]),
        helper.make_node("Add", ["x", "top"], ["y"]),
    ]
    sides = np.array([10**6, 10**6])
    _refused(nodes, tmp_path / "net.onnx", "at most 67108864 elements", sides=sides)


def _with_functions(calls: dict[str, list[str]], path: Path) -> Path:
    """Local functions that call each other."""
    own = helper.make_opsetid("own", 1), helper.make_opsetid("", 17)
    functions = []
    for name, called in calls.items():
        inner = ["x", *(f"v{n}" for n in range(len(called) - 1)), "y"]
        nodes = [
            helper.make_node(c, [a], [b], domain="" if c == "Relu" else "own")
            for c, (a, b) in zip(called, pairwise(inner), strict=True)
        ]
        functions.append(helper.make_function("own", name, ["x"], ["y"], nodes, own))
    ins = [helper.make_tensor_value_info("x", 1, [1, 1, 4, 4, 4])]
    outs = [helper.make_tensor_value_info("y", 1, [1, 1, 4, 4, 4])]
    nodes = [helper.make_node(next(iter(calls)), ["x"], ["y"], domain="own")]
    graph = helper.make_graph(nodes, "g", ins, outs)
    proto = helper.make_model(graph, functions=functions, opset_imports=own)
    path.write_bytes(proto.SerializeToString())
    return path


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    path = _with_functions({"A": ["B"], "B": ["A"]}, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="calls itself"):
        mg.load_model(path)


def test_functions_that_double(tmp_path: Path) -> None:
    calls = {f"F{n}": [f"F{n + 1}"] * 10 for n in range(12)}
    path = _with_functions({**calls, "F12": ["Relu"]}, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="at most 100000 operators"):
        mg.load_model(path)


def test_functions_are_put_in_their_place(tmp_path: Path) -> None:
    path = _with_functions({"A": ["B", "Relu"], "B": ["Relu"]}, tmp_path / "net.onnx")
    x = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(mg.load_model(path).net(x), x.relu())


@pytest.mark.parametrize("name", ["forward", "__class__", "_modules", "a b;import os", "/../x/y"])
def test_names_that_are_torchs_own(name: str, tmp_path: Path) -> None:
    node = helper.make_node(
        "Add", ["x", f"{name}.{name}.weight"], ["y"], name=f"/{name}/{name}/Add"
    )
    value = np.ones((1, 1, 4, 4, 4), np.float32)
    x = np.zeros_like(value)
    model = onnx_small.made([node], {"x": x}, {f"{name}.{name}.weight": value}, ["y"], 17)
    net = onnx_small.opened(model, tmp_path)
    assert torch.equal(net(torch.from_numpy(x)), torch.ones(1, 1, 4, 4, 4))


def test_opsets_of_the_future_run_whole(tmp_path: Path) -> None:
    model = onnx_small.made(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": np.zeros((1, 1), np.float32)}, {}, ["y"], 99
    )
    with pytest.raises(ModelError, match="of opset 99"):
        onnx_small.opened(model, tmp_path)


def test_half_precision_weights(tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.full(3, 0.5, np.float16), "w")
    node = helper.make_node("Cast", ["w"], ["wide"], to=1)
    add = helper.make_node("Add", ["x", "wide"], ["y"])
    ins = [helper.make_tensor_value_info("x", 1, [2, 3])]
    outs = [helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph([node, add], "g", ins, outs, [value])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    net = onnx_small.opened(proto, tmp_path)
    assert torch.equal(net(torch.zeros(2, 3)), torch.full((2, 3), 0.5))


def test_many_constants_that_fill_the_memory_together(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["sides"], ["c0"]),
        *(helper.make_node("Neg", [f"c{n}"], [f"c{n + 1}"]) for n in range(40)),
        helper.make_node("Reshape", ["x", "c40"], ["y"]),
    ]
    sides = np.array([2**22])
    _refused(nodes, tmp_path / "net.onnx", "got one that makes more", sides=sides)


def test_many_operators_take_seconds_not_hours(tmp_path: Path) -> None:
    names = ["x", *(f"v{n}" for n in range(5000)), "y"]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]
    x = np.ones((1, 1), np.float32)
    net = onnx_small.opened(onnx_small.made(nodes, {"x": x}, {}, ["y"], 17), tmp_path)
    assert torch.equal(net(torch.from_numpy(x)), torch.ones(1, 1))
