"""Small ONNX files of one operator or a few, and what onnx's own reference makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from med_gradcam.containers import onnx_build, onnx_file

KIND = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def made(
    nodes: list[Any],
    inputs: dict[str, np.ndarray[Any, Any]],
    constants: dict[str, np.ndarray[Any, Any]],
    outputs: list[str],
    opset: int,
) -> Any:
    """A model; the shapes of its inputs are left open."""
    ins = [
        helper.make_tensor_value_info(name, KIND[str(value.dtype)], [None] * value.ndim)
        for name, value in inputs.items()
    ]
    outs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs]
    for out in outs:
        out.ClearField("type")
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "small", ins, outs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def opened(model: Any, folder: Path) -> torch.nn.Module:
    """The model as our network, by way of a file."""
    path = folder / "small.onnx"
    path.write_bytes(model.SerializeToString())
    return onnx_build.network(onnx_file.read(path))


def both(
    model: Any, inputs: dict[str, np.ndarray[Any, Any]], folder: Path
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """What we give and what the reference gives."""
    net = opened(model, folder)
    out = net(*[torch.from_numpy(value) for value in inputs.values()])
    several = list(out.values()) if isinstance(out, dict) else [out]
    ours = [value.detach().numpy() for value in several]
    theirs = onnx.reference.ReferenceEvaluator(model).run(None, inputs)
    return ours, [np.asarray(value) for value in theirs]


def with_runtime(model: Any, inputs: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
    """What onnxruntime gives."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, inputs))
