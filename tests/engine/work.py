"""How many multiply-adds did a call really do?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Flops(TorchDispatchMode):
    """Multiply-adds as torch counts them; its own counter stops gradients towards an input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.found += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted(call: Callable[[], Any]) -> tuple[Any, float]:
    with _Flops() as counter:
        made = call()
    return made, counter.found
