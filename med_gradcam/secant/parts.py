"""What simpler operations does a fused or rarer one consist of, so that their rules apply?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from med_gradcam.secant.rules import NoRuleError
from med_gradcam.secant.tape import aten, name_of

Function = Callable[..., Any]


def parts_of(func: Any) -> Function:
    """A function of the same arguments that puts out the same, made of simpler operations.

    Raises:
        NoRuleError: none is known.
    """
    packet = getattr(func, "overloadpacket", None)
    schema = func._schema  # noqa: SLF001 - the operation's own description
    if packet in _PARTS and not any(argument.is_out for argument in schema.arguments):
        return _by_name(func, _PARTS[packet])
    if schema.is_mutable:
        raise NoRuleError(
            f"{name_of(func)}, which here reads what it overwrites or has no form out of place"
        )
    from torch._decomp import decomposition_table

    if func in decomposition_table:
        found: Function = decomposition_table[func]
        return found
    if hasattr(func, "decompose"):
        return _composite(func)
    raise NoRuleError(name_of(func))


def _composite(func: Any) -> Function:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            raise NoRuleError(name_of(func))
        return out

    return run


def _by_name(func: Any, parts: Callable[[dict[str, Any]], Any]) -> Function:
    arguments = func._schema.arguments  # noqa: SLF001 - the operation's own description

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {a.name: a.default_value for a in arguments}
        given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
        return parts(given | kwargs)

    return run


# ---------------------------------------------------------------------------------- attention


def _softmax_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: Any
) -> list[torch.Tensor]:
    """Attention over heads (..., tokens, width) and its weights.

    `mask` adds numbers, or forbids where True.
    """
    if k.shape[-3] != q.shape[-3]:  # several query heads share one of keys and values
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        forbids = mask.dtype == torch.bool
        scores = scores.masked_fill(mask, -torch.inf) if forbids else scores + mask
    weights = torch._safe_softmax(scores, -1)  # noqa: SLF001 - zeros where all is forbidden
    return [weights @ v, weights]


def _attention(given: dict[str, Any]) -> list[Any]:
    """The fused kernels of scaled_dot_product_attention."""
    if given["dropout_p"]:
        raise NoRuleError("attention with dropout")
    q, k, v = (given[name] for name in ("query", "key", "value"))
    mask = given.get("attn_mask", given.get("attn_bias"))
    if given["is_causal"]:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return _softmax_of(q, k, v, given["scale"], mask)[:1]


def _many_heads(given: dict[str, Any]) -> list[Any]:
    """The short cut of nn.MultiheadAttention: all of it in one operation, (B, tokens, width)."""
    rows = [given[name] for name in ("query", "key", "value")]
    heads, (count, _, width) = given["num_head"], rows[0].shape
    weights, biases = given["qkv_weight"].chunk(3), given["qkv_bias"].chunk(3)
    q, k, v = (
        functional.linear(x, w, b).reshape(count, x.shape[1], heads, -1).transpose(1, 2)
        for x, w, b in zip(rows, weights, biases, strict=True)
    )
    mask = given["mask"]
    if mask is not None and given["mask_type"] == 1:  # (B, tokens): these are padding
        mask = mask.reshape(count, 1, 1, -1)
    out, seen = _softmax_of(q, k, v, None, mask)
    out = out.transpose(1, 2).reshape(count, -1, width)
    if given["average_attn_weights"]:
        seen = seen.mean(1)
    return [functional.linear(out, given["proj_weight"], given["proj_bias"]), seen]


def _encoder_layer(given: dict[str, Any]) -> list[Any]:
    """The short cut of nn.TransformerEncoderLayer."""

    def norm(x: torch.Tensor, which: int) -> torch.Tensor:
        weight, bias = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return functional.layer_norm(x, weight.shape, weight, bias, given["eps"])

    def attend(x: torch.Tensor) -> torch.Tensor:
        own = {"query": x, "key": x, "value": x, "num_head": given["num_heads"]}
        out: torch.Tensor = _many_heads({**given, **own, "average_attn_weights": True})[0]
        return out

    def feed(x: torch.Tensor) -> torch.Tensor:
        inner = functional.linear(x, given["ffn_weight_1"], given["ffn_bias_1"])
        # The fused kernel of the GPU has only the approximate form.
        form = "tanh" if x.is_cuda else "none"
        inner = functional.gelu(inner, approximate=form) if given["use_gelu"] else inner.relu()
        return functional.linear(inner, given["ffn_weight_2"], given["ffn_bias_2"])

    x = given["src"]
    if given["norm_first"]:
        x = x + attend(norm(x, 1))
        return [x + feed(norm(x, 2))]
    x = norm(x + attend(x), 1)
    return [norm(x + feed(x), 2)]


# ---------------------------------------------------------------------------------- recurrent


def _lstm_layer(given: dict[str, Any]) -> list[Any]:
    """One layer of an LSTM in one direction: (T, B, H), the last h and c."""
    if given["mode"] != 2 or given["batch_sizes"]:
        raise NoRuleError("a recurrent layer of this kind")
    x, weight_x, weight_h = given["input"], given["weight0"], given["weight1"]
    bias = given["weight2"] + given["weight3"] if given["has_biases"] else 0.0
    start_h, start_c = given["hx_"], given["cx_"]
    h, c = (t.reshape(-1, t.shape[-1]) for t in (start_h, start_c))
    steps: list[torch.Tensor] = []
    order = range(x.shape[0])
    for t in reversed(order) if given["reverse"] else order:
        gates = x[t] @ weight_x.t() + h @ weight_h.t() + bias
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append(h)
    if given["reverse"]:
        steps.reverse()
    return [torch.stack(steps), h.reshape(start_h.shape), c.reshape(start_c.shape)]


# ---------------------------------------------------------------------------------- other


def _clamp(given: dict[str, Any]) -> list[Any]:
    """Limits that depend on the input themselves."""
    out = given["self"]
    if given["min"] is not None:
        out = torch.maximum(out, torch.as_tensor(given["min"]).to(out))
    if given["max"] is not None:
        out = torch.minimum(out, torch.as_tensor(given["max"]).to(out))
    return [out]


def _lerp(given: dict[str, Any]) -> list[Any]:
    return [given["self"] + given["weight"] * (given["end"] - given["self"])]


def _log_add_exp(given: dict[str, Any]) -> list[Any]:
    return [torch.stack(torch.broadcast_tensors(given["self"], given["other"])).logsumexp(0)]


def _sum_of_products(given: dict[str, Any]) -> list[Any]:
    product = (given["batch1"] @ given["batch2"]).sum(0)
    return [given["beta"] * given["self"] + given["alpha"] * product]


def _prelu(given: dict[str, Any]) -> list[Any]:
    """A slope that depends on the input itself."""
    return [given["self"].clamp(min=0) + given["weight"] * given["self"].clamp(max=0)]


def _rrelu(given: dict[str, Any]) -> list[Any]:
    if given["training"]:
        raise NoRuleError("aten::rrelu_with_noise in training")
    return [functional.leaky_relu(given["self"], (given["lower"] + given["upper"]) / 2)]


def _rounded_quotient(given: dict[str, Any]) -> list[Any]:
    ratio = given["self"] / given["other"]
    return [ratio.floor() if given["rounding_mode"] == "floor" else ratio.trunc()]


def _product(given: dict[str, Any]) -> list[Any]:
    """Of all elements, or of those along one axis, one after the other."""
    x, dim = given["self"], given.get("dim")
    x, axis = (x.flatten(), 0) if dim is None else (x, dim)
    out = x.narrow(axis, 0, 1)
    for n in range(1, x.shape[axis]):
        out = out * x.narrow(axis, n, 1)
    return [out.reshape(()) if dim is None else out if given["keepdim"] else out.squeeze(axis)]


_TABLE: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_native_multi_head_attention": _many_heads,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "mkldnn_rnn_layer": _lstm_layer,
    "clamp": _clamp,
    "logaddexp": _log_add_exp,
    "addbmm": _sum_of_products,
    "lerp": _lerp,
    "_prelu_kernel": _prelu,
    "rrelu_with_noise": _rrelu,
    "div": _rounded_quotient,
    "prod": _product,
}
_PARTS = {getattr(aten, name): parts for name, parts in _TABLE.items() if hasattr(aten, name)}
