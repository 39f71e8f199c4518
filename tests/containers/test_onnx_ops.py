"""Each ONNX operator gives what onnx's own reference makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from med_gradcam.containers import onnx_ops
from med_gradcam.containers.onnx_node import NoFormError
from tests.containers import onnx_cases, onnx_small
from tests.containers.onnx_cases import X4, X5, Case, f, i

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
# The reference of onnx 1.23 does not do these as the specification says: norms and softmax of old,
# groups and shapes of transposed convolutions, maxima of volumes, cropping. onnxruntime does.
BY_RUNTIME = {
    "Softmax 9",
    "Softmax 11",
    "LogSoftmax 11",
    "ConvTranspose group",
    "ConvTranspose shape",
    "GlobalMaxPool",
    "Pad negative",
    "BatchNormalization 9",
    "LRN",
}


def _compare(ours: list[Any], theirs: list[Any], tolerance: float = 2e-5) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert own.dtype == other.dtype
        assert np.allclose(own, other, rtol=tolerance, atol=tolerance)


def _model(case: Case, outputs: int = 1) -> tuple[Any, dict[str, Any]]:
    _, opset, kind, args, attributes = case
    names = [None if value is None else f"v{n}" for n, value in enumerate(args)]
    outs = [f"y{n}" for n in range(outputs)]
    node = helper.make_node(kind, [name or "" for name in names], outs, **attributes)
    inputs = {"v0": args[0]}
    constants = {f"v{n}": v for n, v in enumerate(args) if n and v is not None}
    return onnx_small.made([node], inputs, constants, outs, opset), inputs


@pytest.mark.parametrize("case", onnx_cases.CASES, ids=lambda case: case[0])
def test_operator(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_ops, "NO_GRADIENT", frozenset())  # the value is what counts here
    model, inputs = _model(case)
    net = onnx_small.opened(model, tmp_path)
    if case[0] in BY_RUNTIME:
        ours = [net(torch.from_numpy(inputs["v0"])).detach().numpy()]
        _compare(ours, onnx_small.with_runtime(model, inputs))
        return
    _compare(*onnx_small.both(model, inputs, tmp_path))


def test_every_form_is_compared() -> None:
    tested = {case[2] for case in onnx_cases.CASES} | ELSEWHERE
    assert set(onnx_ops.FORMS) - tested == set()


# In tests of their own below, or not smooth.
ELSEWHERE = set(
    """Split Resize Upsample LSTM GRU RNN Where Equal Greater Less GreaterOrEqual LessOrEqual And
    Or Xor Not IsNaN IsInf CastLike ArgMax ArgMin NonZero OneHot ConstantOfShape Range Scatter
    GlobalLpPool Swish""".split()
)


@pytest.mark.parametrize("kind", ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"])
def test_where(kind: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node(kind, ["x", "limit"], ["is"]),
        helper.make_node("Not", ["is"], ["not"]),
        helper.make_node("And", ["is", "not"], ["never"]),
        helper.make_node("Or", ["is", "never"], ["there"]),
        helper.make_node("Xor", ["there", "not"], ["always"]),
        helper.make_node("And", ["there", "always"], ["chosen"]),
        helper.make_node("Where", ["chosen", "x", "other"], ["y"]),
    ]
    x = np.round(X4, 0)
    constants = {"limit": np.array(0.0, np.float32), "other": f(8)}
    model = onnx_small.made(nodes, {"x": x}, constants, ["y"], 17)
    _compare(*onnx_small.both(model, {"x": x}, tmp_path))


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("ArgMax", {"axis": 1}),
        ("ArgMin", {"axis": -1, "keepdims": 0}),
        ("ArgMax", {"axis": 2, "select_last_index": 1}),
        ("NonZero", {}),
        ("IsNaN", {}),
        ("IsInf", {"detect_negative": 0}),
    ],
)
def test_beside_the_scores(kind: str, attributes: dict[str, Any], tmp_path: Path) -> None:
    x = np.round(X4, 0)
    x[0, 0, 0, :3] = np.inf, -np.inf, np.nan
    nodes = [
        helper.make_node("Relu", ["x"], ["scores"]),
        helper.make_node(kind, ["x"], ["y"], **attributes),
    ]
    x = x if kind.startswith("Is") else np.nan_to_num(x, posinf=9, neginf=-9)
    model = onnx_small.made(nodes, {"x": x}, {}, ["y", "scores"], 20)
    ours, theirs = onnx_small.both(model, {"x": x}, tmp_path)
    _compare(ours[:1], theirs[:1])


def test_one_hot(tmp_path: Path) -> None:
    x = f(3, 4)
    nodes = [
        helper.make_node("ArgMax", ["x"], ["at"], axis=1, keepdims=0),
        helper.make_node("OneHot", ["at", "depth", "values"], ["hot"], axis=-1),
        helper.make_node("Mul", ["hot", "x"], ["y"]),
    ]
    constants = {"depth": np.array(4), "values": np.array([0, 1], np.float32)}
    model = onnx_small.made(nodes, {"x": x}, constants, ["y"], 17)
    _compare(*onnx_small.both(model, {"x": x}, tmp_path))


@pytest.mark.parametrize(
    ("opset", "attributes", "sizes", "count"),
    [
        (11, {"axis": 1, "split": [1, 3]}, None, 2),
        (11, {"axis": 1}, None, 2),
        (13, {"axis": -1}, i(5, 3), 2),
        (18, {"axis": 3, "num_outputs": 3}, None, 3),
    ],
)
def test_split(
    opset: int, attributes: dict[str, Any], sizes: Any, count: int, tmp_path: Path
) -> None:
    args = [X4] if sizes is None else [X4, sizes]
    model, inputs = _model(("Split", opset, "Split", args, attributes), count)
    _compare(*onnx_small.both(model, inputs, tmp_path))


def test_top_k_with_places(tmp_path: Path) -> None:
    model, inputs = _model(("TopK", 17, "TopK", [f(3, 7), i(3)], {}), 2)
    _compare(*onnx_small.both(model, inputs, tmp_path))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent(kind: str, direction: str, tmp_path: Path) -> None:
    """Against onnxruntime: the reference knows no directions."""
    ways, hidden = (2 if direction == "bidirectional" else 1), 4
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * hidden
    x = f(5, 2, 3)
    args = [x, f(ways, gates, 3), f(ways, gates, hidden), f(ways, 2 * gates), None]
    args += [f(ways, 2, hidden) for _ in range(2 if kind == "LSTM" else 1)]
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    count = 3 if kind == "LSTM" else 2
    model, inputs = _model((kind, 14, kind, args, attributes), count)
    net = onnx_small.opened(model, tmp_path)
    ours = [value.detach().numpy() for value in net(torch.from_numpy(x)).values()]
    _compare(ours, onnx_small.with_runtime(model, inputs))


def test_shape_arithmetic_follows_the_batch(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["count"]),
        helper.make_node("Unsqueeze", ["count", "axes"], ["front"]),
        helper.make_node("Concat", ["front", "rest"], ["new"], axis=0),
        helper.make_node("Reshape", ["x", "new"], ["flat"]),
        helper.make_node("Size", ["flat"], ["size"]),
        helper.make_node("Cast", ["size"], ["real"], to=1),
        helper.make_node("Div", ["flat", "real"], ["y"]),
    ]
    constants = {"zero": np.array(0), "axes": i(0), "rest": i(-1)}
    model = onnx_small.made(nodes, {"x": X4}, constants, ["y"], 17)
    _compare(*onnx_small.both(model, {"x": X4}, tmp_path))
    net = onnx_small.opened(model, tmp_path)
    assert net(torch.ones(3, 2, 2, 2)).shape == (3, 8)
    meta = net(torch.ones(3, 2, 2, 2, device="meta"))
    assert meta.device.type == "meta"
    assert meta.shape == (3, 8)


def test_numbers_that_become_values(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=1, end=2),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Squeeze", ["shape", "zero"], ["count"]),
        helper.make_node("Range", ["nil", "count", "one"], ["ramp"]),
        helper.make_node("CastLike", ["ramp", "x"], ["real"]),
        helper.make_node("Add", ["real", "zeros"], ["line"]),
        helper.make_node("Unsqueeze", ["line", "last"], ["wide"]),
        helper.make_node("Mul", ["x", "wide"], ["y"]),
    ]
    x = f(2, 4, 3)
    constants = {"zero": i(0), "nil": np.array(0), "one": np.array(1), "last": i(1)}
    model = onnx_small.made(nodes, {"x": x}, constants, ["y"], 17)
    _compare(*onnx_small.both(model, {"x": x}, tmp_path))


@pytest.mark.parametrize("yes", [True, False])
def test_if_with_a_constant_condition(yes: bool, tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x"], [f"{kind}_out"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"{kind}_out", 1, None)],
        )
        for kind in ("Sin", "Cos")
    ]
    nodes = [
        helper.make_node("If", ["yes"], ["z"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Relu", ["z"], ["y"]),
    ]
    model = onnx_small.made(nodes, {"x": X4}, {"yes": np.array(yes)}, ["y"], 17)
    _compare(*onnx_small.both(model, {"x": X4}, tmp_path))


def test_gelu_and_group_norm_come_together_again(tmp_path: Path) -> None:
    """As torch's older exporter writes them."""
    nodes = [
        helper.make_node("Reshape", ["x", "groups"], ["apart"]),
        helper.make_node("InstanceNormalization", ["apart", "ones", "zeros"], ["normed"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["normed", "shape"], ["back"]),
        helper.make_node("Mul", ["back", "weight"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["g"]),
        helper.make_node("Div", ["g", "root"], ["z"]),
        helper.make_node("Erf", ["z"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["p"]),
        helper.make_node("Mul", ["g", "p"], ["t"]),
        helper.make_node("Mul", ["t", "half"], ["y"]),
    ]
    constants = {
        "groups": i(0, 2, -1),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "weight": f(4, 1, 1, 1),
        "bias": f(4, 1, 1, 1),
        "root": np.array(math.sqrt(2), np.float32),
        "one": np.array(1.0, np.float32),
        "half": np.array(0.5, np.float32),
    }
    model = onnx_small.made(nodes, {"x": X5}, constants, ["y"], 17)
    kinds = [type(m).__name__ for m in onnx_small.opened(model, tmp_path).modules()]
    assert kinds.count("GroupNormalization") == 1
    assert kinds.count("Gelu") == 1
    assert "InstanceNormalization" not in kinds
    assert "Erf" not in kinds
    _compare(*onnx_small.both(model, {"x": X5}, tmp_path))


# ----------------------------------------------------------------------------------- properties


@FEW
@given(st.data())
def test_slice_anyhow(tmp_path: Path, data: st.DataObject) -> None:
    ends = st.integers(-12, 12)
    axes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    each = [data.draw(st.tuples(ends, ends, st.sampled_from([-3, -2, -1, 1, 2, 3]))) for _ in axes]
    starts, stops, steps = (i(*values) for values in zip(*each, strict=True))
    model, inputs = _model(("", 17, "Slice", [X4, starts, stops, i(*axes), steps], {}))
    _compare(*onnx_small.both(model, inputs, tmp_path))


@FEW
@given(st.data())
def test_pad_anyhow(tmp_path: Path, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["constant", "reflect", "edge"]))
    sides = data.draw(st.lists(st.integers(0, 3), min_size=8, max_size=8))
    model, inputs = _model(("", 17, "Pad", [X4, i(*sides)], {"mode": mode}))
    _compare(*onnx_small.both(model, inputs, tmp_path))


@FEW
@given(st.permutations([2, 4, 6, 8]), st.integers(-1, 3), st.integers(0, 3))
def test_reshape_anyhow(tmp_path: Path, sides: list[int], open_: int, same: int) -> None:
    wanted = list(sides)
    if open_ >= 0:
        wanted[open_] = -1
    if wanted[same] == X4.shape[same]:
        wanted[same] = 0
    model, inputs = _model(("", 17, "Reshape", [X4, i(*wanted)], {}))
    _compare(*onnx_small.both(model, inputs, tmp_path))


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


@FEW
@given(st.data())
def test_resize_anyhow(tmp_path: Path, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    coordinates = data.draw(st.sampled_from([*COORDINATES, "half_pixel_symmetric"]))
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    near = st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
    if mode == "nearest":
        attributes["nearest_mode"] = data.draw(near)
    by = data.draw(
        st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0, 3.0]), min_size=2, max_size=2)
    )
    if data.draw(st.booleans()):
        args: list[Any] = [X4, None, np.array([1, 1, *by], np.float32)]
    else:
        args = [X4, None, None, i(2, 4, *(int(n * b) for n, b in zip((6, 8), by, strict=True)))]
    model, inputs = _model(("", 19, "Resize", args, attributes))
    _compare(*onnx_small.both(model, inputs, tmp_path), tolerance=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_volumes_is_torchs_own(mode: str, tmp_path: Path) -> None:
    how = "asymmetric" if mode == "nearest" else "half_pixel"
    attributes = {"mode": mode, "coordinate_transformation_mode": how, "nearest_mode": "floor"}
    scales = np.array([1, 1, 2, 2, 2], np.float32)
    model, inputs = _model(("", 17, "Resize", [X5, None, scales], attributes))
    _compare(*onnx_small.both(model, inputs, tmp_path))
    seen: list[str] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    net = onnx_small.opened(model, tmp_path)
    with Watch():
        net(torch.from_numpy(X5))
    assert "interpolate" in seen


@pytest.mark.parametrize(("opset", "kind"), [(9, "Upsample"), (10, "Resize")])
def test_old_resize(opset: int, kind: str, tmp_path: Path) -> None:
    scales = np.array([1, 1, 2, 3], np.float32)
    model, inputs = _model(("", opset, kind, [X4, scales], {"mode": "nearest"}))
    net = onnx_small.opened(model, tmp_path)
    ours = net(torch.from_numpy(inputs["v0"])).numpy()
    assert np.array_equal(ours, X4.repeat(2, axis=2).repeat(3, axis=3))


# ------------------------------------------------------------------------------------- refusals


CROPPED = {"coordinate_transformation_mode": "tf_crop_and_resize"}
ALL = np.ones(4, np.float32)
REFUSED = [
    ("Resize", 17, [X4, f(8), ALL], CROPPED, "tf_crop_and_resize"),
    ("Resize", 18, [X4, None, ALL], {"antialias": 1, "mode": "linear"}, "antialias"),
    ("GRU", 17, [f(5, 2, 3), f(1, 12, 3), f(1, 12, 4)], {"hidden_size": 4}, "'GRU' resets"),
    ("Det", 17, [f(3, 3)], {}, "'Det' has no form"),
    ("AveragePool", 19, [X4], {"kernel_shape": [2, 2], "dilations": [2, 2]}, "dilations"),
    ("ArgMax", 17, [X4], {}, "'ArgMax' has no gradient"),
    ("Cast", 17, [X4], {"to": 7}, "'Cast' has no gradient"),
]


@pytest.mark.parametrize(("kind", "opset", "args", "attributes", "match"), REFUSED)
def test_refused_by_name(
    kind: str, opset: int, args: list[Any], attributes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    model, _ = _model(("", opset, kind, args, attributes))
    with pytest.raises(NoFormError, match=match):
        onnx_small.opened(model, tmp_path)
