"""What does one ONNX operator know of itself while it runs: its attributes, and its arguments?

Arguments are torch tensors, or plain numbers (numpy arrays) where a value comes from constants and
shapes alone: these stay out of torch, so that shapes may change and runs without values work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.errors import ModelError

Numbers = npt.NDArray[Any]
Form = Callable[..., Any]


class NoFormError(ModelError):
    """An operator that has no form in torch here; the network can only run whole.

    `clause` says why: "its operator 'Loop' has no form in torch here".
    """

    def __init__(self, clause: str) -> None:
        self.clause = clause
        super().__init__(f"expected operators that can be opened, but {clause}.")


@dataclass(slots=True)
class Run:
    """What all operators of a network share in a run: how many scans, and where the numbers go.

    `fixed`: the file says that it takes one scan at a time, so that a 1 in front of the shapes
    written in it stands for the scans.
    """

    fixed: bool = False
    scans: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def rebatched(self, shape: list[int]) -> list[int]:
        """A constant shape, for as many scans as there are now."""
        if self.fixed and self.scans > 1 and shape and shape[0] == 1:
            return [self.scans, *shape[1:]]
        return shape


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operator: its type, its attributes, the opset, and which of its outputs are used.

    `weights`: the arguments that are weights; `constant`: those that are constants of the file.
    """

    op: str
    attributes: Mapping[str, Any]
    opset: int
    run: Run
    outputs: int = 1
    weights: frozenset[int] = frozenset()
    constant: frozenset[int] = frozenset()

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default."""
        return self.attributes.get(name, default)

    def no_form(self, why: str) -> NoFormError:
        """The error that this operator cannot be opened, `why` in a clause."""
        return NoFormError(f"its operator {self.op!r} {why}")

    def option(self, name: str, given: Any, default: Any = None) -> Any:
        """Numbers that are an attribute in old opsets and an argument in new ones, as a list."""
        if given is not None:
            return listed(given)
        value = self.get(name, default)
        return value if value is None or isinstance(value, (int, float)) else list(value)


def numbers(value: Any) -> Numbers:
    """An argument as plain numbers; a tensor must have values."""
    if isinstance(value, torch.Tensor):
        return np.asarray(value.detach().cpu().numpy())
    return np.asarray(value)


def listed(value: Any) -> list[Any]:
    """An argument as a list of Python numbers; one number is a list of one."""
    found: list[Any] = numbers(value).reshape(-1).tolist()
    return found


def scalar(value: Any) -> Any:
    """An argument of one element as a Python number."""
    return numbers(value).reshape(-1)[0].item()


def tensor(value: Any, device: torch.device) -> torch.Tensor:
    """An argument as a tensor; numbers are put on a device."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(np.array(value)).to(device)


def device_of(args: Sequence[Any], run: Run) -> torch.device:
    """Where an operator works: where its first tensor is."""
    return next((a.device for a in args if isinstance(a, torch.Tensor)), run.device)


def axis_of(node: Node, count: int, default: int) -> int:
    """The attribute `axis`, from 0 on."""
    axis = int(node.get("axis", default))
    return axis + count if axis < 0 else axis
