"""Operators come back under the module names of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

from med_gradcam.containers.onnx_names import Names
from tests.containers import onnx_small


@pytest.mark.parametrize(
    ("name", "weights", "wanted"),
    [
        ("/layer4/layer4.0/conv1/Conv", [], "layer4.0.conv1"),
        ("/blocks.0/attn/MatMul", [], "blocks.0.attn"),
        ("/model/model.1/submodule/submodule.0/Add", [], "model.1.submodule.0"),
        ("/conv/conv.0/Conv", ["conv.0.weight"], "conv.0"),
        ("/conv/conv.0/Conv", ["conv.conv.0.weight"], "conv.conv.0"),
        ("/vit/blocks.1/norm/Mul", ["vit.parts.blocks.1.norm.weight"], "vit.parts.blocks.1.norm"),
        ("Relu_7", [], ""),
    ],
)
def test_older_names(name: str, weights: list[str], wanted: str) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name=name)
    assert ".".join(part for part, _ in Names([node], weights).origin(node)) == wanted


def test_the_name_that_the_weights_have(tmp_path: Path) -> None:
    """As of DynUNet, whose blocks are in two lists."""
    conv = helper.make_node(
        "Conv", ["x", "down.0.conv.weight"], ["a"], name="/skip/block/conv/Conv"
    )
    relu = helper.make_node("Relu", ["a"], ["y"], name="/skip/block/act/Relu")
    names = Names([conv, relu], ["down.0.conv.weight"])
    assert [part for part, _ in names.origin(relu)] == ["down", "0", "act"]


@pytest.mark.parametrize("leaves", ["a", "b"])
def test_a_mark_is_on_what_leaves_the_module(leaves: str, tmp_path: Path) -> None:
    """Whichever of its operators ran last; of several the last one."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="/part/Relu"),
        helper.make_node("Sin", ["a"], ["b"], name="/part/Sin"),
        helper.make_node("Neg", [leaves], ["y"], name="/Neg"),
        helper.make_node("Add", ["a", "y"], ["z"], name="/Add"),
    ]
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    model = onnx_small.made(nodes, {"x": x}, {}, ["z"], 17)
    net = onnx_small.opened(model, tmp_path)
    seen: list[torch.Tensor] = []
    net.get_submodule("part").register_forward_hook(lambda _m, _a, out: seen.append(out))
    net(torch.from_numpy(x))
    wanted = torch.from_numpy(x).relu()
    assert torch.equal(seen[0], wanted if leaves == "a" else wanted.sin())
