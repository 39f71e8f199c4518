"""How do ONNX's LSTM, GRU and RNN become torch's?

Their gates are the same in another order. Source: onnx/docs/Operators.md; torch.nn.LSTM, GRU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from med_gradcam.containers.onnx_node import Form, Node

# Which of ONNX's gates stand at torch's places: iofc -> ifgo, zrh -> rzn.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_USUAL = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
_RUN: dict[str, Callable[..., Any]] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}


def _reordered(weight: torch.Tensor, op: str) -> torch.Tensor:
    parts = weight.chunk(len(_GATES[op]))
    return torch.cat([parts[n] for n in _GATES[op]])


def _weights(op: str, w: torch.Tensor, r: torch.Tensor, b: Any) -> list[torch.Tensor]:
    """All directions' weights as torch lists them."""
    found = []
    for turn in range(len(w)):
        both = w.new_zeros(2 * len(w[turn])) if b is None else b[turn]
        inside, back = both.chunk(2)
        found += [_reordered(part, op) for part in (w[turn], r[turn], inside, back)]
    return found


def _recurrent(  # noqa: PLR0913, PLR0917 - ONNX's own arguments
    node: Node,
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: Any = None,
    lengths: Any = None,
    first: Any = None,
    cell: Any = None,
    *rest: Any,
) -> Any:
    del lengths, rest
    by_batch, direction = bool(node.get("layout", 0)), node.get("direction", "forward")
    x = x.transpose(0, 1) if by_batch else x
    x = x.flip(0) if direction == "reverse" else x
    start = [_start(state, x, r, by_batch=by_batch) for state in (first, cell)]
    given = start if node.op == "LSTM" else start[0]
    # Biases, layers, dropout, training, both directions, batch first.
    settings = (True, 1, 0.0, False, direction == "bidirectional", False)
    out, *last = _RUN[node.op](x, given, _weights(node.op, w, r, b), *settings)
    out = out.flip(0) if direction == "reverse" else out
    out = out.reshape(*out.shape[:2], len(w), -1)
    if by_batch:
        made: tuple[Any, ...] = (out.transpose(0, 1), *(state.transpose(0, 1) for state in last))
    else:
        made = (out.transpose(1, 2), *last)
    return made[: node.outputs] if node.outputs > 1 else made[0]


def _start(state: Any, x: torch.Tensor, r: torch.Tensor, *, by_batch: bool) -> torch.Tensor:
    if state is None:
        return x.new_zeros((len(r), x.shape[1], r.shape[2]))
    made: torch.Tensor = state.transpose(0, 1) if by_batch else state
    return made


FORMS: dict[str, Form] = dict.fromkeys(_RUN, _recurrent)


def refusal(node: Node) -> str:
    """Why a recurrent operator cannot be opened, in a clause; empty where it can."""
    if node.op not in FORMS:
        return ""
    words = [str(word).lower() for word in node.get("activations") or ()]
    usual = _USUAL[node.op] * (2 if node.get("direction") == "bidirectional" else 1)
    if words and words != usual:
        return f"has the activations {', '.join(words)}, which torch does not have"
    if node.get("clip") is not None or node.get("input_forget", 0):
        return "is clipped or couples its gates, which torch does not do"
    if node.op == "GRU" and not node.get("linear_before_reset", 0):
        return "resets before its weights (linear_before_reset=0), which torch does not do"
    present = node.get("_present", ())
    if 4 in present or 7 in present:
        return "has sequences of several lengths or peepholes, which have no form here"
    return ""
