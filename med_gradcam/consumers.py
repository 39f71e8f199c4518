"""What takes each layer's output as it is: norms that remove each channel's mean, or others?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from med_gradcam.forms import Form

_NORMS = ("instance_norm", "group_norm", "layer_norm", "rms_norm")
_BY_THE_INPUT = {"instance_norm": "use_input_stats", "batch_norm": "training"}
_PASSED_ON = (
    "clone",
    "contiguous",
    "dropout",
    "dropout3d",
    "feature_dropout",
    "detach",
    "alpha_dropout",
)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments or outputs, in order."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


class Consumers(TorchFunctionMode):
    """Notes which functions take each layer's output as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.norms = False
        self.channels: dict[str, frozenset[int]] = {}
        self.norm: Counter[str] = Counter()
        self.other: Counter[str] = Counter()

    def own(self, name: str, output: torch.Tensor, form: Form | None) -> None:
        """A layer's output; inner and outer modules may share one tensor."""
        self.owners[output] = (*self.owners.get(output, ()), name)
        self.channels[name] = frozenset({1}) if form is None else form.channels

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        given = (*args, *(kwargs or {}).values())
        owners = {n for t in tensors_in(given) if t in self.owners for n in self.owners[t]}
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        self.norms |= name in _NORMS
        if owners and name in _PASSED_ON and isinstance(out, torch.Tensor):
            self.owners[out] = tuple(owners)
        elif owners and any(True for _ in tensors_in(out)):  # asking for a shape consumes nothing
            for owner in owners:
                trap = _takes_the_mean(name, args, kwargs or {}, self.channels[owner])
                (self.norm if trap else self.other)[owner] += 1
        return out

    def only_norms(self, name: str) -> bool:
        """Whether the layer's output went into norms that take its mean, and nothing else."""
        return self.norm[name] > 0 and self.other[name] == 0


def _takes_the_mean(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], channels: frozenset[int]
) -> bool:
    """Whether a function takes each channel's own mean over places away from its input.

    `channels`: the dims of the input that hold channels.

    Stored statistics take none, an RMSNorm neither; a group of several channels, or a norm over
    channels, takes one mean from all of them.
    """

    def given(position: int, word: str, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(word, default)

    x = given(0, "input", None)
    if name in ("instance_norm", "batch_norm"):  # by name or by place, the sixth
        return bool(given(5, _BY_THE_INPUT[name], name == "instance_norm"))
    if name == "group_norm":
        return bool(given(1, "num_groups", 1) == x.shape[1])
    first = x.ndim - len(given(1, "normalized_shape", ())) if name == "layer_norm" else 0
    return name == "layer_norm" and first > 0 and all(dim < first for dim in channels)
