"""Are fused, recurrent and rarer operations shared out by their parts?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import nn

from med_gradcam.secant import sweep
from med_gradcam.secant.parts import parts_of
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from tests.secant.pairs import Function, noise, off, shared, sums

EXACT, SINGLE = 1e-9, 1e-4
X, R = noise(2, 4, 6, seed=1), noise(2, 4, 6, seed=2)
CAUSAL = torch.ones(4, 4).triu(1).bool()
PADDED = torch.tensor([[False, False, True, True], [False, False, False, True]])
aten = torch.ops.aten


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 4, 2, 3).transpose(1, 2)


def attend(x: torch.Tensor, **settings: Any) -> torch.Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q, q, **settings)


def mha(**settings: Any) -> nn.Module:
    return nn.MultiheadAttention(6, 2, batch_first=True, **settings)


def encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **settings)


def cell(x: torch.Tensor, module: nn.Module, *, pair: bool = False) -> torch.Tensor:
    h = c = torch.zeros(len(x), 5, dtype=x.dtype)
    for t in range(x.shape[1]):
        if pair:
            h, c = module(x[:, t], (h, c))
        else:
            h = module(x[:, t], h)
    return h + c


def last(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    _, state = module(x)
    state = state if isinstance(state, tuple) else (state,)
    return torch.cat([s.transpose(0, 1) for s in state], -1)


def _turned_on_itself(x: torch.Tensor) -> torch.Tensor:
    return x.sin() @ x.cos().T


def _cubes(x: torch.Tensor) -> torch.Tensor:
    return (x**3).sum()


def _sums_of_products(x: torch.Tensor) -> torch.Tensor:
    rows = [torch.addbmm(a[:, :4], a[None], a.T[None], beta=2).sum() for a in x]
    return torch.stack(rows)[:, None]


def _products(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([a.prod() for a in x])[:, None]


NETS: dict[str, Callable[[], nn.Module]] = {
    "self attention": lambda: Function(lambda x, m: m(x, x, x)[0], mha()),
    "self attention, its weights": lambda: Function(lambda x, m: m(x, x, x)[1], mha()),
    "weights of each head": lambda: Function(
        lambda x, m: m(x, x, x, average_attn_weights=False)[1], mha()
    ),
    "self attention, no weights": lambda: Function(
        lambda x, m: m(x, x, x, need_weights=False)[0], mha()
    ),
    "cross attention": lambda: Function(
        lambda x, m: m(x, x.sin(), x.cos(), need_weights=False)[0], mha()
    ),
    "causal attention": lambda: Function(
        lambda x, m: m(x, x, x, need_weights=False, attn_mask=CAUSAL)[0], mha()
    ),
    "padded attention": lambda: Function(
        lambda x, m: m(x, x, x, need_weights=False, key_padding_mask=PADDED)[0], mha()
    ),
    "attention without biases": lambda: Function(
        lambda x, m: m(x, x, x)[0], mha(bias=False, add_bias_kv=True)
    ),
    "encoder layer": encoder,
    "encoder layer, norm first, gelu": lambda: encoder(norm_first=True, activation="gelu"),
    "encoder layer, norm first": lambda: encoder(norm_first=True),
    "encoder layer, gelu": lambda: encoder(activation="gelu"),
    "encoder layer, causal": lambda: Function(lambda x, m: m(x, src_mask=CAUSAL), encoder()),
    "encoder layer, padded": lambda: Function(
        lambda x, m: m(x, src_key_padding_mask=PADDED), encoder()
    ),
    "encoder": lambda: nn.TransformerEncoder(encoder(), 2),  # type: ignore[arg-type]
    "decoder layer": lambda: Function(
        lambda x, m: m(x, x.sin()), nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)
    ),
    "three dimensions": lambda: Function(
        lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos())
    ),
    "heads": lambda: Function(
        lambda x: F.scaled_dot_product_attention(heads(x), heads(x.sin()), heads(x.cos()))
    ),
    "one tensor thrice, causal": lambda: Function(
        lambda x: attend(x, is_causal=True, scale=0.3)
    ),
    "a mask that depends on the input": lambda: Function(
        lambda x: attend(x, attn_mask=heads(x) @ heads(x).transpose(-1, -2))
    ),
    "rows that are all forbidden": lambda: Function(
        lambda x: attend(x, attn_mask=torch.eye(4).bool() & (torch.arange(4) > 1))
    ),
    "shared keys": lambda: Function(
        lambda x: F.scaled_dot_product_attention(
            heads(x), heads(x.sin())[:, :1], heads(x)[:, :1], enable_gqa=True
        )
    ),
    "LSTM, both directions": lambda: Function(
        lambda x, m: m(x)[0], nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
    ),
    "LSTM, its state": lambda: Function(last, nn.LSTM(6, 5, 2, batch_first=True)),
    "LSTM without biases": lambda: Function(last, nn.LSTM(6, 5, bias=False, batch_first=True)),
    "LSTM, projected": lambda: Function(
        lambda x, m: m(x)[0], nn.LSTM(6, 5, batch_first=True, proj_size=3)
    ),
    "GRU": lambda: Function(
        lambda x, m: m(x)[0], nn.GRU(6, 5, 2, batch_first=True, bidirectional=True)
    ),
    "RNN": lambda: Function(last, nn.RNN(6, 5, 2, batch_first=True)),
    "RNN, relu": lambda: Function(last, nn.RNN(6, 5, nonlinearity="relu", batch_first=True)),
    "LSTM cell": lambda: Function(lambda x, m: cell(x, m, pair=True), nn.LSTMCell(6, 5)),
    "GRU cell": lambda: Function(cell, nn.GRUCell(6, 5)),
    "RNN cell": lambda: Function(cell, nn.RNNCell(6, 5)),
    "einsum of two": lambda: Function(lambda x: torch.einsum("bij,bkj->bik", x, x.sin())),
    "einsum, outer": lambda: Function(lambda x: torch.einsum("bi,bj->bij", x[:, 0], x[:, 1])),
    "a matrix times a vector": lambda: Function(lambda x: torch.stack([a @ a[0] for a in x])),
    "two vectors": lambda: Function(lambda x: torch.stack([a[0] @ a[1] for a in x])[:, None]),
    "embedding of fixed places": lambda: Function(
        lambda x, m: m(torch.tensor([1, 0, 2, 2])) * x, nn.Embedding(3, 6)
    ),
    "looked up in the input": lambda: Function(
        lambda x: torch.stack([F.embedding(torch.tensor([1, 0]), a) for a in x])
    ),
    "branches": lambda: Function(
        lambda x: torch.cat([x, x.sin(), torch.ones(2, 1, 6), x[:, :2] * x[:, 2:]], 1)
    ),
    "squeeze and excitation": lambda: Function(
        lambda x, m: x * torch.sigmoid(m(x.mean(1)))[:, None], nn.Linear(6, 6)
    ),
    "cosine": lambda: Function(lambda x: F.cosine_similarity(x[:, :2], x[:, 2:], -1)),
    "normalised": lambda: Function(lambda x: F.normalize(x, dim=1)),
    "norms of other orders": lambda: Function(
        lambda x: x.norm(p=1, dim=1) + x.norm(p=3, dim=1) + x.norm(p=float("inf"), dim=1)
    ),
    "RMS norm": lambda: nn.RMSNorm(6),
    "local response": lambda: nn.LocalResponseNorm(3),
    "group norm by hand": lambda: Function(
        lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
    ),
    "moving limits": lambda: Function(lambda x: torch.clamp(x, min=x.sin() - 0.2, max=x.cos())),
    "moving slope": lambda: Function(
        lambda x: torch.stack([F.prelu(a, a.mean().reshape(1)) for a in x])
    ),
    "leaky at random, at rest": lambda: Function(lambda x: F.rrelu(x, 0.1, 0.3)),
    "between two": lambda: Function(lambda x: torch.lerp(x, x.sin(), x.sigmoid())),
    "sums of products": lambda: Function(
        lambda x: torch.addcmul(x, x.sin(), x.cos()) + torch.addcdiv(x, x.sin(), x.exp())
    ),
    "products": lambda: Function(
        lambda x: x.prod(1) + x.prod(2, keepdim=True).sum(1) + _products(x)
    ),
    "sums of exponentials and of products": lambda: Function(
        lambda x: torch.logaddexp(x, x[:, :1] * 200).sum(1)
        + _sums_of_products(x)
    ),
    "by a logarithm": lambda: Function(lambda x: torch.xlogy(x, x.exp())),
    "rounded quotients": lambda: Function(
        lambda x: (3 * x).div(2, rounding_mode="floor")
        + torch.div(5 * x, x.exp(), rounding_mode="trunc")
    ),
    "functions without a row": lambda: Function(
        lambda x: torch.tan(x / 3) + torch.erfinv(x.tanh()) + torch.logit(x.sigmoid()) + x.frac()
        + torch.acos(x.tanh()) + torch.lgamma(x.exp()) + 2**x + torch.nan_to_num(x) + F.selu(x)
        + x % 2 + F.softsign(x) + F.tanhshrink(x) + F.glu(torch.cat([x, x.sin()], -1))
    ),
    "p-norm pool": lambda: Function(lambda x: F.lp_pool1d(x, 2, 2)),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)),
    "mapped": lambda: Function(torch.vmap(_turned_on_itself)),
    "a gradient inside": lambda: Function(torch.func.grad(_cubes)),
    "recomputed": lambda: Function(
        lambda x, m: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False), nn.Linear(6, 3)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize("what", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_a_composite_is_shared_out(what: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    net = NETS[what]().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" not in name:
                parameter.mul_(2.0)
    x, r = X.to(dtype), R.to(dtype)
    found = shared(net, x, r)
    assert off(found) <= (EXACT if dtype == torch.float64 else SINGLE)
    assert not found.past[INPUT]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.requires_grad = False  # as at rest: the short cuts of attention ask for it
        plain = net(x.clone())
    torch.testing.assert_close(found.case.output, plain, rtol=0, atol=0)


def test_a_packed_sequence_is_refused_by_name() -> None:
    def packed(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        rows = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3]), batch_first=True)
        out: torch.Tensor = nn.utils.rnn.pad_packed_sequence(module(rows)[0], batch_first=True)[0]
        return out

    with pytest.raises(NoRuleError, match="aten::_pack_padded_sequence"):
        shared(Function(packed, nn.LSTM(6, 5, batch_first=True)).double(), X, R)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name() -> None:
    net = nn.TransformerEncoder(encoder(), 2)  # type: ignore[arg-type]
    padded = Function(lambda x, m: m(x, src_key_padding_mask=PADDED), net).double()
    with pytest.raises(NoRuleError, match="aten::to_padded_tensor"):
        shared(padded, X, R)


@pytest.mark.parametrize("first", [True, False])
def test_a_fused_operation_with_another_output_in_use(first: bool) -> None:
    """Mean and scale of a norm, log sums of an attention: outputs that no rule is for."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        out, mean, scale = torch.native_layer_norm(x, [6], None, None, 1e-5)
        return out + mean * scale if first else mean * scale

    assert sums(norm, [X], [R]).off() <= EXACT

    def attention(x: torch.Tensor) -> Any:
        out = aten._scaled_dot_product_flash_attention_for_cpu(*[heads(x)] * 3)
        return out if first else out[1]

    with pytest.raises(NoRuleError, match="aten::_scaled_dot_product_flash_attention_for_cpu"):
        sums(attention, [X], [R])


def test_an_operation_that_is_part_of_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "parts_of", lambda func: func)
    with pytest.raises(NoRuleError, match="aten::prod"):
        shared(Function(lambda x: x.prod(1)), X, R)


def test_the_parts_of_attention_on_other_machines() -> None:
    """Fused kernels that only a GPU has: their parts are what the CPU's kernel computes."""
    q, k, v = (noise(2, 2, 4, 3, seed=n) for n in range(3))
    mask = noise(2, 2, 4, 4, seed=4)
    for causal, scale in ((False, None), (True, 0.3)):
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        for name, more in (
            ("_scaled_dot_product_flash_attention", (0.0, causal, False)),
            ("_scaled_dot_product_efficient_attention", (None, False, 0.0, causal)),
            ("_scaled_dot_product_cudnn_attention", (None, False, 0.0, causal, False)),
        ):
            found = parts_of(getattr(aten, name).default)(q, k, v, *more, scale=scale)
            torch.testing.assert_close(found[0], wanted)
    found = parts_of(aten._scaled_dot_product_efficient_attention.default)(q, k, v, mask, False)
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(q, k, v, mask))
    with pytest.raises(NoRuleError, match="dropout"):
        parts_of(aten._scaled_dot_product_flash_attention.default)(q, k, v, 0.1)
