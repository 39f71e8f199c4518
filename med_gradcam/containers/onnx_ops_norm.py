"""Which torch functions do ONNX's norms and reductions stand for?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from med_gradcam.containers.onnx_node import Form, Node, axis_of


def _batch_norm(node: Node, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> torch.Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=float(node.get("epsilon", 1e-5)))


def _instance_norm(node: Node, x: Any, scale: Any, bias: Any) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=float(node.get("epsilon", 1e-5)))


def _group_norm(node: Node, x: Any, scale: Any, bias: Any) -> torch.Tensor:
    groups, channels = int(node.get("num_groups")), x.shape[1]
    if scale.numel() == groups != channels:  # until opset 20, one for each group
        scale = scale.repeat_interleave(channels // groups)
        bias = bias.repeat_interleave(channels // groups)
    return F.group_norm(x, groups, scale, bias, float(node.get("epsilon", 1e-5)))


def _layer_norm(node: Node, x: torch.Tensor, scale: torch.Tensor, bias: Any = None) -> torch.Tensor:
    shape, eps = x.shape[axis_of(node, x.ndim, -1) :], float(node.get("epsilon", 1e-5))
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, eps)
    out = F.layer_norm(x, shape, eps=eps) * scale
    return out if bias is None else out + bias


def _rms_norm(node: Node, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    shape, eps = x.shape[axis_of(node, x.ndim, -1) :], float(node.get("epsilon", 1e-5))
    if scale.shape == shape:
        return F.rms_norm(x, shape, scale, eps)
    out = F.rms_norm(x, shape, eps=eps)
    return out * scale


def _lp_norm(node: Node, x: Any) -> torch.Tensor:
    return F.normalize(x, float(node.get("p", 2)), int(node.get("axis", -1)), eps=0.0)


def _local_response(node: Node, x: Any) -> torch.Tensor:
    alpha, beta = float(node.get("alpha", 1e-4)), float(node.get("beta", 0.75))
    return F.local_response_norm(x, int(node.get("size")), alpha, beta, float(node.get("bias", 1)))


def _softmax(function: Callable[..., torch.Tensor]) -> Form:
    def run(node: Node, x: torch.Tensor) -> torch.Tensor:
        if node.opset >= 13:
            return function(x, dim=int(node.get("axis", -1)))
        axis = axis_of(node, x.ndim, 1)
        if axis == x.ndim - 1 or all(n == 1 for n in x.shape[axis + 1 :]):
            return function(x, dim=axis)
        return function(x.flatten(axis), dim=axis).reshape(x.shape)  # over all that follows

    return run


def _reduced(function: Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]) -> Form:
    def run(node: Node, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
        along = node.option("axes", axes)
        if not along:
            if node.get("noop_with_empty_axes", 0):
                return x
            along = range(x.ndim)
        dims = tuple(int(a) % x.ndim for a in along)
        return function(x, dims, bool(node.get("keepdims", 1))) if dims else x

    return run


def _mean(x: torch.Tensor, dims: tuple[int, ...], keep: bool) -> torch.Tensor:  # noqa: FBT001
    return x.mean(dims, keepdim=keep)


def _sum(x: torch.Tensor, dims: tuple[int, ...], keep: bool) -> torch.Tensor:  # noqa: FBT001
    return x.sum(dims, keepdim=keep)


def _product(x: torch.Tensor, dims: tuple[int, ...], keep: bool) -> torch.Tensor:  # noqa: FBT001
    for dim in sorted(dims, reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _of_sum(before: Callable[..., Any], after: Callable[..., Any]) -> Form:
    return _reduced(lambda x, dims, keep: after(_sum(before(x), dims, keep)))


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


FORMS: dict[str, Form] = {
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "LpNormalization": _lp_norm,
    "LRN": _local_response,
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
    "ReduceMean": _reduced(_mean),
    "ReduceSum": _reduced(_sum),
    "ReduceMax": _reduced(lambda x, dims, keep: x.amax(dims, keepdim=keep)),
    "ReduceMin": _reduced(lambda x, dims, keep: x.amin(dims, keepdim=keep)),
    "ReduceProd": _reduced(_product),
    "ReduceL1": _of_sum(torch.abs, _itself),
    "ReduceL2": _of_sum(torch.square, torch.sqrt),
    "ReduceSumSquare": _of_sum(torch.square, _itself),
    "ReduceLogSum": _of_sum(_itself, torch.log),
    "ReduceLogSumExp": _reduced(lambda x, dims, keep: x.logsumexp(dims, keepdim=keep)),
}
HOSTS: dict[str, frozenset[int]] = {
    name: frozenset((1,)) for name in FORMS if name.startswith("Reduce")
}
_ONE_OUTPUT = ("BatchNormalization", "LayerNormalization")


def refusal(node: Node) -> str:
    """Why a norm cannot be opened, in a clause; empty where it can."""
    if node.op in _ONE_OUTPUT and (node.outputs > 1 or node.get("training_mode", 0)):
        return "puts out its statistics, as in training, which has no form here"
    if node.op == "LRN" and int(node.get("size", 1)) % 2 == 0:
        return "has an even size, for which torch has another form"
    return ""
