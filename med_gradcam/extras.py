"""How does a network that takes more than the scan become one of the scan alone, for a while?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from med_gradcam.errors import UsageError

Extras = Sequence[Any] | Mapping[str, Any] | None


def check(extras: object) -> Extras:
    """The other inputs as explain() takes them: by name, or by place with ... for the scan.

    Raises:
        UsageError: they are neither, or hold several places for the scan.
    """
    if isinstance(extras, Mapping) and any(value is ... for value in extras.values()):
        raise UsageError(
            "expected no ... among inputs by name, which is for a tuple; the scan goes first, name "
            "the others only."
        )
    if extras is None or isinstance(extras, Mapping):
        return extras
    if not isinstance(extras, (tuple, list)):
        raise UsageError(
            f"expected the network's other inputs as a dict by name, or as a tuple with ... where "
            f"the scan goes, got {type(extras).__name__}."
        )
    places = sum(value is ... for value in extras)
    if places > 1:
        raise UsageError(f"expected one ... for the scan among the inputs, got {places}.")
    return extras if places else (..., *extras)


@contextmanager
def joined(net: torch.nn.Module, extras: Extras, device: torch.device) -> Iterator[None]:
    """The network called with the scan alone; the other inputs, one item each, are handed in.

    Afterwards it is as it was.
    """
    if not extras:
        yield
        return
    by_name = isinstance(extras, Mapping)
    given = dict(extras.items()) if isinstance(extras, Mapping) else dict(enumerate(extras))
    first = next(net.parameters(), torch.empty(0))
    fixed = {key: _tensors(value, device, first.dtype) for key, value in given.items()}
    real = net.forward
    missing = object()
    before = net.__dict__.get("forward", missing)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        here = {key: _for_batch(value, x) for key, value in fixed.items()}
        if by_name:
            return real(x, *args, **{str(k): v for k, v in here.items()}, **kwargs)
        return real(*(x if value is ... else value for value in here.values()), *args, **kwargs)

    net.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            net.__dict__.pop("forward", None)
        else:
            net.__dict__["forward"] = before


def _tensors(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor or array on the network's device, real numbers in its own format as the scan is."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(device, dtype if value.is_floating_point() else None)


def _for_batch(value: Any, x: torch.Tensor) -> Any:
    """An input for as many items as `x` has, on its device."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    value = value.to(x.device)
    if value.shape[0] == 1 and x.shape[0] != 1:
        return value.expand(x.shape[0], *value.shape[1:])
    return value
