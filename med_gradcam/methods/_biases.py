"""What is left of each operation of a network without its slope, and where does it lie?

An operation y = f(a) has the bias b = y - (df/da) a, taken at the scan. Convolutions and linear
layers give their own biases, a BatchNorm beta - gamma mu / sd, ReLUs and max-pools nothing;
Instance, Group and LayerNorm, SiLU, gates and attention have implicit ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from med_gradcam.errors import CannotExplainError
from med_gradcam.forms import Form, derived
from med_gradcam.places import Places
from med_gradcam.receptive import RULES, Lattice, aten, lattice, of_input
from med_gradcam.tokens import Followed, Known, follow

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = tuple(name.replace("conv", "conv_transpose") for name in _CONVOLUTIONS)
_LINEAR = {getattr(torch, name) for name in (*_CONVOLUTIONS, *_TRANSPOSED)}
_LINEAR.add(torch.nn.functional.linear)

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
        self.followed, self.slopes = _Followed(), _Counted()
        self.placed: dict[tuple[Grid, torch.Size], torch.Tensor] = {}
        self.no_place = 0.0

    @property
    def more(self) -> float:
        """The work of finding slopes, as a share of what ran inside; much of it for attention."""
        return self.slopes.flops / self.followed.flops if self.followed.flops else 0.0

    def begin(self, x: torch.Tensor) -> None:
        """Name the network's input (1, C, I, J, K)."""
        self.followed.places[x] = of_input(x.shape)
        self.followed.extent = tuple(x.shape[2:])

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        leaves, form = tree_flatten((args, kwargs or {}))
        with self.slopes:
            biases, written = _biases(func, leaves, form)
        views = {}
        with self.followed:
            if any(bias is not None for bias in biases):
                views = {n: leaves[n] for n in written if leaves[n]._is_view()}  # noqa: SLF001 - torch has no other way to ask
            for n, view in views.items():
                leaves[n] = view.clone()
            given, named = tree_unflatten(leaves, form)
            out = func(*given, **named)
            results, made = tree_flatten(_written(func, given, out))
            for n, bias in enumerate(biases):
                if bias is not None and results[n].requires_grad:
                    results[n] = self._watched(results[n], bias)
            for n, view in views.items():
                view.copy_(leaves[n])
                results = [view if result is leaves[n] else result for result in results]
        return None if out is None else tree_unflatten(results, made)

    def _watched(self, result: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The result, so that its gradient will be seen whatever is done in place later.

        Writing to a view, or to what it is a view of, leaves a hook on it without a gradient. A
        copy of it goes on in its place. So an operation that writes to a view is done on a copy,
        too, and that is written to the view.
        """
        whole = result.clone() if result._is_view() else result  # noqa: SLF001 - as above
        self._watch(whole, bias)
        return whole

    def _watch(self, result: torch.Tensor, bias: torch.Tensor) -> None:
        """Add up bias times gradient once the gradient of a result is known."""
        seen = _cells(result, self.followed)
        shape = torch.Size(() if seen is None else seen[1])

        def add(gradient: torch.Tensor) -> None:
            amounts = gradient.double() * bias
            if seen is None or shape.numel() == 1:
                self.no_place += float(amounts.sum())
                return
            cells, _, form = seen
            key = ((cells.start, cells.jump), shape)
            before = self.placed.get(key)
            placed = amounts if form is None else form.cells(amounts)
            self.no_place += float(amounts.sum() - placed.sum()) if form and form.rest else 0.0
            summed = placed.reshape(-1, *shape).sum(0)
            self.placed[key] = summed if before is None else before + summed

        result.register_hook(add)


class _Counted(TorchDispatchMode):
    """The multiply-adds of what runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


class _Followed(_Counted):
    """The places of every tensor, as in `graph.trace`, but with a graph of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.extent: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        known = [(t, self.places[t]) for t in _tensors(args) if t in self.places]
        for turn, result in enumerate(_tensors(out) if known else ()):
            places = _followed(func.overloadpacket, args, known, result, turn)
            if places is None:
                self.places.pop(result, None)  # done in place: what it held before is gone
            else:
                self.places[result] = places
        return out


def _followed(
    packet: Any, args: tuple[Any, ...], known: Known, out: torch.Tensor, turn: int
) -> Followed | None:
    """The places of a result, also of picked channels and of their logsumexp, as in log-odds."""
    first, places = known[0]
    if not isinstance(places, Places):
        return follow(packet, args, known, out, turn)
    if packet is aten.logsumexp and first is args[0]:
        return RULES[aten.mean](places, args, out)
    if packet is aten.index and first is args[0]:
        dims = [n for n, picked in enumerate(args[1]) if picked is not None]
        if len(dims) == 1 and out.ndim == first.ndim:
            picked = places.steps(dims[0])  # picked places lie anywhere: no lattice
            return None if picked else places.averaged(dims[0], out.shape[dims[0]])
    return follow(packet, args, known, out, turn)


def _cells(
    result: torch.Tensor, followed: _Followed
) -> tuple[Lattice, tuple[int, ...], Form | None] | None:
    """The cells of a result, how many there are along each axis, and the form they are seen in.

    Also of a map (1, i, j, k) or (i, j, k) made from (1, C, i, j, k).
    """
    places = followed.places.get(result)
    if isinstance(places, Places) and len(places.dims) in {3, 4, 5}:
        own = lattice(replace(places, dims=((),) * (5 - len(places.dims)) + places.dims))
        if own is not None:
            return own, tuple(result.shape[-3:]), None
    found = derived(result.shape, places, followed.extent)
    if found is None or found[0] is None or found[1] is None:
        return None
    return found[1], found[0].counts[1:], found[0]


@cache
def _warm_up() -> None:
    """Let torch build its forward-mode derivatives, which it does at the first use.

    It warns of a deprecated function of its own then, which nobody here can act on.
    """
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwd.make_dual(torch.zeros(1), torch.zeros(1))


def _biases(
    func: Any, leaves: Sequence[Any], form: TreeSpec
) -> tuple[list[torch.Tensor | None], list[int]]:
    """The bias of each value that an operation puts out or writes, None where it is zero.

    And which of the arguments, `leaves` of a tree of `form`, it writes to. Convolutions and linear
    layers give their biases. Any other operation runs once more on copies, along the tangent a at a
    (forward-mode derivative).

    Raises:
        CannotExplainError: torch has no such derivative of it.
    """
    if not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
        return [], []
    args, given = tree_unflatten(leaves, form)
    if (own := _own(func, args, given)) is not None:
        return own, []
    with torch.no_grad(), fwd.dual_level():
        copies = [_dual(leaf) for leaf in leaves]
        before = [_version(copy) for copy in copies]
        args, given = tree_unflatten(copies, form)
        try:
            out = func(*args, **given)
        except (RuntimeError, NotImplementedError) as error:
            if "forward AD" not in str(error):
                raise
            raise CannotExplainError(
                "no rule",
                f"expected operations whose slope is known for fullgrad, torch has none for "
                f"{getattr(func, '__name__', func)!r}; choose integrated_gradients.",
            ) from error
        written = [n for n, copy in enumerate(copies) if _version(copy) != before[n]]
        return [_rest(leaf) for leaf in tree_leaves(_written(func, args, out))], written


def _own(func: Any, args: Sequence[Any], given: dict[str, Any]) -> list[torch.Tensor | None] | None:
    """The bias of a convolution or linear layer itself; None where it is none or has changed.

    To run it on copies would cost three more of them: its tangent, and that of weights at rest.
    """
    if func not in _LINEAR:
        return None
    x, weight, bias = (
        given.get(name, value)
        for name, value in zip(("input", "weight", "bias"), (*args, None, None, None), strict=False)
    )
    at_rest = not any(
        t.requires_grad and not isinstance(t, torch.nn.Parameter) for t in _tensors((weight, bias))
    )
    if not (at_rest and x.requires_grad):  # weights made from the scan, or a layer that sees none
        return None
    if bias is None or not bool(bias.any()):
        return [None]
    behind = 0 if func is torch.nn.functional.linear else weight.ndim - 2
    return [bias.detach().reshape(-1, *[1] * behind)]


def _written(func: Any, args: Sequence[Any], out: Any) -> Any:
    """What an operation put out; `a[i] = b` puts out nothing, and writes to a."""
    return args[0] if func is torch.Tensor.__setitem__ else out


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0  # noqa: SLF001 - as above


def _dual(value: Any) -> Any:
    """A copy of a tensor, which carries itself as its tangent if it depends on the input.

    Others are copied too, since the operation may write to them; weights are not.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return value
    plain = value.detach().clone()
    return fwd.make_dual(plain, plain.clone()) if value.requires_grad else plain


def _rest(result: Any) -> torch.Tensor | None:
    if not (isinstance(result, torch.Tensor) and result.is_floating_point()):
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
