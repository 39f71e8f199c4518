"""What is left of each operation of a network without its slope, and where does it lie?

An operation y = f(a) has the bias b = y - (df/da) a, taken at the scan. Convolutions and linear
layers give their own biases, a BatchNorm beta - gamma mu / sd, ReLUs and max-pools nothing;
Instance, Group and LayerNorm, SiLU, gates and attention have implicit ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from med_gradcam.errors import CannotExplainError
from med_gradcam.receptive import follow, lattice, of_input

Three = tuple[float, float, float]
Grid = tuple[Three, Three]  # centre of cell 0 and distance of the cells, in voxels


class Biases(TorchFunctionMode):
    """Sums bias times gradient over every operation, during the backward of what ran inside.

    `placed`: sums over channels per grid and shape of cells, (i, j, k) float64; `no_place`: of
    vectors, tokens and single cells, which lie nowhere.
    """

    def __init__(self) -> None:
        super().__init__()
        _warm_up()
        self.followed = _Followed()
        self.placed: dict[tuple[Grid, torch.Size], torch.Tensor] = {}
        self.no_place = 0.0

    def begin(self, x: torch.Tensor) -> None:
        """Name the network's input (1, C, I, J, K)."""
        self.followed.places[x] = of_input(x.shape)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        given = kwargs or {}
        biases = _biases(func, args, given)
        with self.followed:
            out = func(*args, **given)
        for result, bias in zip(_tensors(out), biases, strict=False):
            if result.requires_grad and bias is not None:
                self._watch(result, bias)
        return out

    def _watch(self, result: torch.Tensor, bias: torch.Tensor) -> None:
        """Add up bias times gradient once the gradient of a result is known."""
        cells = lattice(self.followed.places.get(result)) if result.ndim == 5 else None
        shape = result.shape[2:]

        def add(gradient: torch.Tensor) -> None:
            amounts = gradient.double() * bias
            if cells is None or shape.numel() == 1:
                self.no_place += float(amounts.sum())
                return
            key = ((cells.start, cells.jump), shape)
            before = self.placed.get(key)
            summed = amounts.sum(dim=(0, 1))
            self.placed[key] = summed if before is None else before + summed

        result.register_hook(add)


class _Followed(TorchDispatchMode):
    """The places of every tensor, as in `graph.trace`, but with a graph of gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        known = [(t, self.places[t]) for t in _tensors(args) if t in self.places]
        for turn, result in enumerate(_tensors(out) if known else ()):
            places = follow(func.overloadpacket, args, known, result, turn)
            if places is None:
                self.places.pop(result, None)  # done in place: what it held before is gone
            else:
                self.places[result] = places
        return out


@cache
def _warm_up() -> None:
    """Let torch build its forward-mode derivatives, which it does at the first use.

    It warns of a deprecated function of its own then, which nobody here can act on.
    """
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwd.make_dual(torch.zeros(1), torch.zeros(1))


def _biases(func: Any, args: Sequence[Any], given: dict[str, Any]) -> list[torch.Tensor | None]:
    """The bias of each tensor that an operation puts out; None where it is zero.

    The operation runs once more on copies, along the tangent a at a (forward-mode derivative).

    Raises:
        CannotExplainError: torch has no such derivative of it.
    """
    if not any(t.requires_grad for t in _tensors((args, given))):
        return []
    with torch.no_grad(), fwd.dual_level():
        copies = _dual((args, given))
        try:
            out = func(*copies[0], **copies[1])
        except (RuntimeError, NotImplementedError) as error:
            if "forward AD" not in str(error):
                raise
            raise CannotExplainError(
                "no rule",
                f"expected operations whose slope is known for fullgrad, torch has none for "
                f"{getattr(func, '__name__', func)!r}; choose integrated_gradients.",
            ) from error
        return [_rest(t) for t in _tensors(out)]


def _dual(value: Any) -> Any:
    """A copy whose tensors that depend on the input carry themselves as tangents.

    Others are copied too, since the operation may write to them; weights are not.
    """
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, torch.Tensor):
        plain = value.detach().clone()
        return fwd.make_dual(plain, plain.clone()) if value.requires_grad else plain
    if isinstance(value, (tuple, list)):
        return type(value)(_dual(v) for v in value)
    if isinstance(value, dict):
        return {k: _dual(v) for k, v in value.items()}
    return value


def _rest(result: torch.Tensor) -> torch.Tensor | None:
    if not result.is_floating_point():
        return None
    plain, tangent = fwd.unpack_dual(result)
    bias = plain if tangent is None else plain - tangent
    return bias if bool(bias.any()) else None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
