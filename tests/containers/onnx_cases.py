"""The operators that are compared with onnx's reference: (name, opset, type, inputs, attributes).

Of the inputs the first is the scan, the others are constants of the file; None is one left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_R = np.random.default_rng(4)


def f(*shape: int, low: float | None = None) -> np.ndarray[Any, Any]:
    """Random numbers; at least `low` where that is given."""
    made = _R.normal(size=shape).astype(np.float32)
    return made if low is None else np.abs(made) + np.float32(low)


def i(*values: int) -> np.ndarray[Any, Any]:
    """Whole numbers."""
    return np.array(values, dtype=np.int64)


def s(value: float) -> np.ndarray[Any, Any]:
    """One number."""
    return np.array(value, dtype=np.float32)


X5, X4 = f(2, 4, 5, 6, 7), f(2, 4, 6, 8)
Case = tuple[str, int, str, list[Any], dict[str, Any]]

ONE = """Relu Sigmoid Tanh Softplus Softsign Erf Exp Abs Neg Floor Ceil Round Sign Sin Cos Identity
LeakyRelu Elu Selu Celu HardSigmoid ThresholdedRelu Softmax LogSoftmax Tan Atan""".split()
SINGLE: list[Case] = [(name, 17, name, [X5], {}) for name in ONE]
SINGLE += [(name, 17, name, [f(2, 3, 4, low=0.1)], {}) for name in ("Sqrt", "Log", "Reciprocal")]
SINGLE += [
    ("HardSwish", 17, "HardSwish", [X5], {}),
    ("Mish", 18, "Mish", [X5], {}),
    ("Gelu", 20, "Gelu", [X5], {}),
    ("Gelu tanh", 20, "Gelu", [X5], {"approximate": "tanh"}),
    ("LeakyRelu 0.3", 9, "LeakyRelu", [X5], {"alpha": 0.3}),
    ("Elu 0.4", 9, "Elu", [X5], {"alpha": 0.4}),
    ("Celu 2", 17, "Celu", [X5], {"alpha": 2.0}),
    ("Selu own", 9, "Selu", [X5], {"alpha": 1.2, "gamma": 0.9}),
    ("HardSigmoid torch", 17, "HardSigmoid", [X5], {"alpha": 1 / 6, "beta": 0.5}),
    ("PRelu channel", 17, "PRelu", [X5, f(4, 1, 1, 1)], {}),
    ("PRelu one", 17, "PRelu", [X5, f(1)], {}),
    ("PRelu each", 17, "PRelu", [X5, f(4, 5, 6, 7)], {}),
    ("Clip 6", 9, "Clip", [X5], {"min": -0.5, "max": 0.6}),
    ("Clip 11", 13, "Clip", [X5, s(-0.5), s(0.6)], {}),
    ("Clip high", 13, "Clip", [X5, None, s(0.6)], {}),
    ("Add scalar", 17, "Add", [X5, s(0.3)], {}),
    ("Add channel", 17, "Add", [X5, f(4, 1, 1, 1)], {}),
    ("Sub", 17, "Sub", [X5, f(1, 4, 1, 6, 7)], {}),
    ("Mul", 17, "Mul", [X5, f(7)], {}),
    ("Div", 17, "Div", [X5, f(7, low=0.5)], {}),
    ("Pow", 17, "Pow", [f(2, 3, low=0.1), s(2.5)], {}),
    ("Mod", 17, "Mod", [X5, f(7, low=0.5)], {"fmod": 1}),
    ("Min", 17, "Min", [X5, f(7), f(1)], {}),
    ("Max", 17, "Max", [X5, f(7)], {}),
    ("Sum", 17, "Sum", [X5, f(7), f(1)], {}),
    ("Mean", 17, "Mean", [X5, f(7)], {}),
    ("Softmax 11", 11, "Softmax", [X5], {"axis": 2}),
    ("Softmax 9", 9, "Softmax", [X5], {}),
    ("LogSoftmax 11", 11, "LogSoftmax", [X4], {"axis": 1}),
    ("Softmax axis", 13, "Softmax", [X5], {"axis": 1}),
    ("Gemm", 17, "Gemm", [f(2, 5), f(5, 3), f(3)], {}),
    ("Gemm transB", 17, "Gemm", [f(2, 5), f(3, 5), f(3)], {"transB": 1}),
    (
        "Gemm scaled",
        17,
        "Gemm",
        [f(5, 2), f(5, 3), f(2, 3)],
        {"transA": 1, "alpha": 0.5, "beta": 2.0},
    ),
    ("Gemm no bias", 17, "Gemm", [f(2, 5), f(5, 3)], {}),
    ("MatMul", 17, "MatMul", [f(2, 4, 5), f(5, 3)], {}),
    ("MatMul batch", 17, "MatMul", [f(2, 4, 5), f(2, 5, 3)], {}),
    ("Einsum", 17, "Einsum", [f(2, 4, 5), f(2, 4, 3)], {"equation": "bij,bik->bjk"}),
    ("Cast", 17, "Cast", [X5], {"to": 11}),
]
WINDOWS: list[Case] = [
    ("Conv 3d", 17, "Conv", [X5, f(6, 4, 3, 3, 3), f(6)], {"pads": [1] * 6, "strides": [2, 1, 2]}),
    ("Conv 2d uneven", 11, "Conv", [X4, f(6, 4, 3, 2)], {"pads": [0, 1, 2, 0]}),
    ("Conv group dilated", 17, "Conv", [X4, f(8, 2, 3, 3)], {"group": 2, "dilations": [2, 2]}),
    (
        "Conv same",
        17,
        "Conv",
        [X5, f(2, 4, 2, 3, 4)],
        {"auto_pad": "SAME_UPPER", "strides": [2, 2, 2]},
    ),
    ("Conv same low", 17, "Conv", [X4, f(2, 4, 2, 4)], {"auto_pad": "SAME_LOWER"}),
    ("Conv valid", 17, "Conv", [X4, f(2, 4, 3, 3)], {"auto_pad": "VALID"}),
    ("Conv 1d", 17, "Conv", [f(2, 3, 9), f(4, 3, 3)], {"pads": [1, 1]}),
    (
        "ConvTranspose",
        17,
        "ConvTranspose",
        [X5, f(4, 2, 3, 3, 3), f(2)],
        {"strides": [2, 2, 2], "pads": [1] * 6, "output_padding": [1, 1, 1]},
    ),
    (
        "ConvTranspose uneven",
        17,
        "ConvTranspose",
        [X4, f(4, 2, 3, 3), f(2)],
        {"strides": [2, 2], "pads": [0, 1, 2, 1]},
    ),
    (
        "ConvTranspose group",
        17,
        "ConvTranspose",
        [X4, f(4, 2, 2, 2)],
        {"strides": [2, 2], "group": 2},
    ),
    ("ConvTranspose dilated", 17, "ConvTranspose", [X4, f(4, 1, 3, 3)], {"dilations": [2, 2]}),
    (
        "ConvTranspose shape",
        17,
        "ConvTranspose",
        [X4, f(4, 2, 3, 3), f(2)],
        {"strides": [3, 2], "output_shape": [19, 16]},
    ),
    (
        "ConvTranspose same",
        17,
        "ConvTranspose",
        [X4, f(4, 2, 3, 3)],
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    (
        "MaxPool",
        17,
        "MaxPool",
        [X5],
        {"kernel_shape": [3, 3, 3], "strides": [2, 2, 2], "pads": [1] * 6},
    ),
    (
        "MaxPool ceil",
        17,
        "MaxPool",
        [X4],
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    (
        "MaxPool uneven",
        17,
        "MaxPool",
        [X4],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
    ),
    ("MaxPool dilated", 17, "MaxPool", [X4], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ("MaxPool no stride", 17, "MaxPool", [X4], {"kernel_shape": [2, 2]}),
    (
        "MaxPool same",
        17,
        "MaxPool",
        [X4],
        {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    (
        "AveragePool",
        17,
        "AveragePool",
        [X5],
        {"kernel_shape": [3, 3, 3], "strides": [2, 2, 2], "pads": [1] * 6},
    ),
    (
        "AveragePool counted",
        17,
        "AveragePool",
        [X4],
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    ),
    ("AveragePool uneven", 17, "AveragePool", [X4], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2]}),
    (
        "AveragePool uneven counted",
        17,
        "AveragePool",
        [X4],
        {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 1},
    ),
    (
        "AveragePool ceil",
        19,
        "AveragePool",
        [X4],
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    (
        "AveragePool ceil counted",
        19,
        "AveragePool",
        [X4],
        {
            "kernel_shape": [3, 3],
            "strides": [2, 2],
            "ceil_mode": 1,
            "count_include_pad": 1,
            "pads": [1] * 4,
        },
    ),
    ("GlobalAveragePool", 17, "GlobalAveragePool", [X5], {}),
    ("GlobalMaxPool", 17, "GlobalMaxPool", [X5], {}),
    ("LpPool", 18, "LpPool", [X4], {"kernel_shape": [2, 2], "strides": [2, 2], "p": 3}),
]
NORMS: list[Case] = [
    (
        "BatchNormalization",
        15,
        "BatchNormalization",
        [X5, f(4), f(4), f(4), f(4, low=0.5)],
        {"epsilon": 0.01},
    ),
    ("BatchNormalization 9", 9, "BatchNormalization", [X5, f(4), f(4), f(4), f(4, low=0.5)], {}),
    ("InstanceNormalization", 17, "InstanceNormalization", [X5, f(4), f(4)], {}),
    ("GroupNormalization 18", 18, "GroupNormalization", [X5, f(2), f(2)], {"num_groups": 2}),
    ("GroupNormalization 21", 21, "GroupNormalization", [X5, f(4), f(4)], {"num_groups": 2}),
    ("LayerNormalization", 17, "LayerNormalization", [f(2, 5, 8), f(8), f(8)], {}),
    (
        "LayerNormalization axis",
        17,
        "LayerNormalization",
        [f(2, 5, 8), f(5, 8), f(5, 8)],
        {"axis": 1},
    ),
    (
        "LayerNormalization broadcast",
        17,
        "LayerNormalization",
        [f(2, 5, 8), f(8), f(8)],
        {"axis": 1},
    ),
    ("RMSNormalization", 23, "RMSNormalization", [f(2, 5, 8), f(8)], {}),
    ("LpNormalization", 17, "LpNormalization", [X4], {"axis": 1, "p": 2}),
    ("LRN", 17, "LRN", [X4], {"size": 3, "alpha": 0.2, "beta": 0.6, "bias": 1.5}),
]
REDUCED: list[Case] = []
for _name in "Mean Sum Max Min Prod L1 L2 SumSquare LogSumExp".split():
    _old = 11 if _name == "Sum" else 13
    REDUCED += [
        (f"Reduce{_name} old", _old, f"Reduce{_name}", [X5], {"axes": [2, -1], "keepdims": 0}),
        (f"Reduce{_name} new", 18, f"Reduce{_name}", [X5, i(2, -1)], {}),
        (f"Reduce{_name} all", 18, f"Reduce{_name}", [X4], {"keepdims": 0}),
    ]
REDUCED += [
    ("ReduceLogSum", 18, "ReduceLogSum", [f(2, 3, 4, low=0.1), i(1)], {}),
    ("ReduceSum noop", 13, "ReduceSum", [X4], {"noop_with_empty_axes": 1}),
]
SHAPES: list[Case] = [
    ("Reshape 0 -1", 17, "Reshape", [X5, i(0, -1, 7)], {}),
    ("Flatten", 17, "Flatten", [X5], {}),
    ("Flatten 0", 17, "Flatten", [X5], {"axis": 0}),
    ("Flatten -2", 17, "Flatten", [X5], {"axis": -2}),
    ("Transpose", 17, "Transpose", [X5], {"perm": [0, 2, 3, 4, 1]}),
    ("Transpose plain", 17, "Transpose", [X4], {}),
    ("Squeeze 11", 11, "Squeeze", [f(2, 1, 3, 1)], {"axes": [1]}),
    ("Squeeze 13", 13, "Squeeze", [f(2, 1, 3, 1), i(1, -1)], {}),
    ("Squeeze all", 13, "Squeeze", [f(2, 1, 3, 1)], {}),
    ("Unsqueeze 11", 11, "Unsqueeze", [f(2, 3)], {"axes": [0, 3]}),
    ("Unsqueeze 13", 13, "Unsqueeze", [f(2, 3), i(-1, 1)], {}),
    ("Expand", 17, "Expand", [f(3, 1), i(2, 1, 4)], {}),
    ("Tile", 17, "Tile", [f(2, 3), i(2, 3)], {}),
    ("Concat", 17, "Concat", [X4, f(2, 1, 6, 8)], {"axis": 1}),
    ("Slice 9", 9, "Slice", [X4], {"starts": [1, -3], "ends": [4, 9999], "axes": [1, 3]}),
    ("Slice step", 17, "Slice", [X4, i(-1, 7), i(-9999, 0), i(2, 3), i(-2, -3)], {}),
    ("Gather one", 17, "Gather", [X4, np.array(-1)], {"axis": 1}),
    ("Gather even", 17, "Gather", [X4, i(1, 3)], {"axis": 1}),
    ("Gather uneven", 17, "Gather", [X4, i(3, 0, -1)], {"axis": 1}),
    ("Gather table", 17, "Gather", [X4, np.array([[0, 1], [2, -1]])], {"axis": 2}),
    (
        "GatherElements",
        17,
        "GatherElements",
        [f(3, 3), np.array([[1, 2, 0], [2, 0, -1]])],
        {"axis": 0},
    ),
    ("GatherND", 17, "GatherND", [f(3, 4, 2), np.array([[0, 1], [2, -1]])], {}),
    ("GatherND batch", 17, "GatherND", [f(2, 4, 3), np.array([[1], [-1]])], {"batch_dims": 1}),
    ("ScatterND", 17, "ScatterND", [f(5, 3), np.array([[1], [4]]), f(2, 3)], {}),
    (
        "ScatterND add",
        18,
        "ScatterND",
        [f(5, 3), np.array([[1], [1]]), f(2, 3)],
        {"reduction": "add"},
    ),
    (
        "ScatterElements",
        17,
        "ScatterElements",
        [f(3, 3), np.array([[1, 0, -1]]), f(1, 3)],
        {"axis": 0},
    ),
    (
        "ScatterElements add",
        18,
        "ScatterElements",
        [f(3, 3), np.array([[1, 1, 2]]), f(1, 3)],
        {"axis": 1, "reduction": "add"},
    ),
    ("Pad 9", 9, "Pad", [X4], {"pads": [0, 1, 2, 0, 0, 0, 1, 3], "value": 0.7}),
    ("Pad 13", 13, "Pad", [X4, i(0, 0, 1, 2, 0, 0, 3, 0), s(0.5)], {}),
    ("Pad axes", 18, "Pad", [X4, i(1, 2), None, i(-1)], {}),
    ("Pad negative", 13, "Pad", [X4, i(0, 0, -1, 0, 0, 0, 2, -3)], {}),
    ("Pad reflect", 13, "Pad", [X5, i(0, 0, 1, 2, 0, 0, 0, 3, 0, 1)], {"mode": "reflect"}),
    ("Pad edge", 13, "Pad", [X4, i(0, 0, 1, 2, 0, 0, 3, 9)], {"mode": "edge"}),
    ("Pad edge channels", 13, "Pad", [X4, i(0, 1, 0, 0, 0, 2, 0, 0)], {"mode": "edge"}),
    ("Pad wrap", 19, "Pad", [X4, i(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
    ("DepthToSpace", 17, "DepthToSpace", [f(1, 8, 2, 3)], {"blocksize": 2}),
    ("DepthToSpace CRD", 17, "DepthToSpace", [f(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", 17, "SpaceToDepth", [f(1, 2, 4, 6)], {"blocksize": 2}),
    ("Trilu", 17, "Trilu", [f(2, 4, 5), np.array(1)], {}),
    ("Trilu low", 17, "Trilu", [f(2, 4, 5)], {"upper": 0}),
    ("CumSum", 17, "CumSum", [f(3, 4), np.array(1)], {}),
    ("CumSum back", 17, "CumSum", [f(3, 4), np.array(0)], {"reverse": 1, "exclusive": 1}),
    ("TopK", 17, "TopK", [f(3, 7), i(3)], {}),
    ("TopK least", 11, "TopK", [f(3, 7), i(2)], {"largest": 0, "axis": 0}),
    ("Dropout", 17, "Dropout", [X4, s(0.5)], {}),
    ("Dropout 9", 9, "Dropout", [X4], {"ratio": 0.5}),
]
CASES = [*SINGLE, *WINDOWS, *NORMS, *REDUCED, *SHAPES]
