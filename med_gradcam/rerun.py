"""How are many changed activations or inputs scored, in batches that fit into memory?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from med_gradcam import gradient_free
from med_gradcam.capture import Capture
from med_gradcam.tail import INPUT, record

BATCH_BYTES = 2.5e8  # of what one batch may hold at a time
ALIVE = 3  # tensors as large as the largest that a network holds at a time: in, out, a skip

Make = Callable[[slice], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """What lies behind a capture's layer, to be run in batches of `size` activations.

    Large batches are several times quicker per activation, so the size goes by what the tail holds.
    """

    capture: Capture
    size: int

    def scores(self, count: int, make: Make) -> torch.Tensor:
        """Scores (count,) float64 of `count` activations, through the tail only.

        `make` gives the activations (n, C, i, j, k) of a slice; only one slice lives at a time.
        """
        parts = [self.capture.scores(make(some)) for some in _slices(count, self.size)]
        return torch.cat(parts).double()


def behind(capture: Capture) -> Behind:
    """The tail of a capture, sure to compute only what lies behind the layer, also in a batch.

    A capture made without a recording has a tail that remembers nothing; recording costs one
    forward. The check, which also shows what a pass holds, costs two passes.
    """
    tail = capture.tail
    if capture.layer != INPUT and not tail.memory and not tail.alone:
        tail = record(tail.net, [capture.layer], tail.x).tails[capture.layer]
        capture.forwards += 1.0
    other = capture.activation / 2 if capture.baseline is None else capture.baseline
    pair = torch.stack([capture.activation, other])
    capture.passes += 2.0
    with _Largest() as largest:
        capture.tail = tail.faithful(pair, capture.target, capture.score)
    return Behind(capture, _fitting(max(largest.bytes, _bytes(pair)) / 2))


def input_scores(capture: Capture, count: int, make: Make) -> torch.Tensor:
    """Scores (count,) float64 of `count` inputs: whole predictions, as many at once as may be.

    `make` gives the inputs (n, C, I, J, K) of a slice; only one slice lives at a time.
    """
    batch = gradient_free.batch(capture.tail.net)
    size = max(_fitting(_bytes(capture.input)) // batch, 1) * batch
    slices = _slices(count, size)
    return torch.cat([capture.input_scores(make(some)) for some in slices]).double()


def _fitting(each: float) -> int:
    """How many fit into a batch if the largest tensor of one has `each` bytes."""
    return max(1, int(BATCH_BYTES / (ALIVE * max(each, 1.0))))


def _slices(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Largest(TorchDispatchMode):
    """Looks on and notes the size of the largest new tensor; views of old ones are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        known = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in known:
                self.bytes = max(self.bytes, _bytes(tensor))
        return out


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
