"""How does a network run on shapes alone, and is afterwards what it was?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Ready = tuple[torch.Tensor, Callable[[], Any]]  # an input, and the network's call with it
CANNOT = (RuntimeError, NotImplementedError, TypeError)  # what a network raises that needs values


def on_meta(net: torch.nn.Module, shape: Sequence[int]) -> Ready:
    """Inputs and weights without values; `shape` is (1, C, I, J, K) or (1, C, I, J)."""
    first = next(net.parameters(), torch.empty(0))
    state = {n: t.to("meta") for n, t in (*net.named_parameters(), *net.named_buffers())}
    x = torch.empty(tuple(shape), device="meta", dtype=first.dtype)
    return x, lambda: torch.func.functional_call(net, state, (x,))


def for_real(net: torch.nn.Module, shape: Sequence[int]) -> Ready:
    """An input of zeros."""
    first = next(net.parameters(), torch.empty(0))
    x = torch.zeros(tuple(shape), device=first.device, dtype=first.dtype)
    return x, lambda: net(x)


@contextmanager
def attributes_kept(net: torch.nn.Module) -> Iterator[None]:
    """Each module's attributes, and the dicts, lists and sets among them, as they were."""
    kept = [(m.__dict__, dict(m.__dict__)) for m in net.modules()]
    plain = [v for _, before in kept for v in before.values() if type(v) in (dict, list, set)]
    inside = [(value, value.copy()) for value in plain]
    try:
        yield
    finally:
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)
        for value, copy in inside:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(copy)
