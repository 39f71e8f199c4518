"""Which tokens of a sequence have a place in the scan, and which come along without one?

Class, register and pooled tokens are put before or behind the tokens of patches; they stand for no
place. Operations that treat each token alike are followed for the tokens in between, as
receptive.py follows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from med_gradcam import receptive
from med_gradcam.places import Places, Three

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Beside:
    """`places` of a part of a tensor; along `dim`, indices `before` it and `behind` have none."""

    places: Places
    dim: int
    before: int
    behind: int

    @property
    def field(self) -> Three:
        """How far an element with a place sees."""
        return self.places.field


Followed = Places | Beside
Known = list[tuple[torch.Tensor, Followed]]

_VIEWS = {aten.view, aten._unsafe_view, aten.squeeze, aten.unsqueeze}  # noqa: SLF001 - public in aten
_PIECES = {aten.slice, aten.select, aten.unbind, aten.split, aten.split_with_sizes}
_TURNED = {aten.permute, aten.transpose, aten.t}
_WEIGHED = {aten.mm, aten.addmm, aten.linear}


def follow(
    packet: Any, args: tuple[Any, ...], known: Known, out: torch.Tensor, turn: int = 0
) -> Followed | None:
    """The places of result `turn` of one operation, as receptive.follow, tokens beside included."""
    first = next((own for _, own in known if isinstance(own, Beside)), None)
    if first is None:
        plain = [(tensor, own) for tensor, own in known if isinstance(own, Places)]
        made = receptive.follow(packet, args, plain, out, turn)
        return _appended(args, plain, out) if made is None and packet is aten.cat else made
    if packet is aten.cat:
        return _longer(args, known, out)
    if packet in receptive.LOST or out.numel() == 0:
        return None
    tensor = next(tensor for tensor, own in known if own is first)
    if packet in _PIECES:
        return _piece(packet, (tensor, first), args, out, turn)
    dim = _dim_after(packet, (tensor, first), args, out)
    return None if dim is None else _alike(packet, args, (known, dim), out, turn)


def _places_beside(dim: int, places: Places | None, before: int, behind: int) -> Followed | None:
    if places is None or not (before or behind):
        return places
    return Beside(places, dim, before, behind)


def _appended(
    args: tuple[Any, ...], known: list[tuple[torch.Tensor, Places]], out: torch.Tensor
) -> Followed | None:
    """One tensor with places and others without, one behind the other along a dim of places."""
    parts = list(args[0])
    dim = int(args[1]) % out.ndim if len(args) > 1 else 0
    if len(known) != 1 or not known[0][1].steps(dim):
        return None
    at = next(n for n, part in enumerate(parts) if part is known[0][0])
    sizes = [part.shape[dim] for part in parts]
    return _places_beside(dim, known[0][1], sum(sizes[:at]), sum(sizes[at + 1 :]))


def _longer(args: tuple[Any, ...], known: Known, out: torch.Tensor) -> Followed | None:
    """More tokens before and behind."""
    parts = list(args[0])
    dim = int(args[1]) % out.ndim if len(args) > 1 else 0
    tensor, own = known[0]
    if len(known) != 1 or not isinstance(own, Beside) or own.dim != dim:
        return None
    at = next(n for n, part in enumerate(parts) if part is tensor)
    sizes = [part.shape[dim] for part in parts]
    return replace(
        own, before=own.before + sum(sizes[:at]), behind=own.behind + sum(sizes[at + 1 :])
    )


# ------------------------------------------------------------------------------- pieces


def picks(packet: Any, known: Known) -> bool:
    """Whether an operation takes pieces of tokens some of which have no place."""
    return packet in _PIECES and bool(known) and isinstance(known[0][1], Beside)


def _piece(
    packet: Any,
    whole: tuple[torch.Tensor, Beside],
    args: tuple[Any, ...],
    out: torch.Tensor,
    turn: int,
) -> Followed | None:
    """A slice along the tokens, or along another dim of all of them."""
    tensor, own = whole
    if tensor is not args[0]:
        return None
    single = packet in (aten.select, aten.unbind)
    at = 2 if packet in (aten.split, aten.split_with_sizes) else 1
    dim = int(args[at] if len(args) > at else 0) % tensor.ndim
    if dim != own.dim:
        gone = single and dim < own.dim
        return _alike(packet, args, ([whole], own.dim - gone), out, turn)
    if single:
        return None  # one token: a class token, or one place of many
    first, step = _reach(packet, args, turn, tensor.shape[dim])
    count = tensor.shape[dim] - own.before - own.behind
    low, high = max(first, own.before), min(first + out.shape[dim], own.before + count)
    if step != 1 or high <= low:
        return None
    size = high - low
    made = own.places if size == count else own.places.sliced(dim, low - own.before, 1, size)
    return _places_beside(dim, made, low - first, first + out.shape[dim] - high)


def _reach(packet: Any, args: tuple[Any, ...], turn: int, length: int) -> tuple[int, int]:
    """The first index of a piece, and its step."""
    if packet is aten.slice:
        first = int(args[2] or 0) if len(args) > 2 else 0
        first = max(0, first + length) if first < 0 else first
        return first, int(args[4]) if len(args) > 4 else 1
    sizes = args[1]
    return (turn * sizes if isinstance(sizes, int) else sum(sizes[:turn])), 1


# ------------------------------------------------------------------- all tokens alike


def _dim_after(
    packet: Any, whole: tuple[torch.Tensor, Beside], args: tuple[Any, ...], out: torch.Tensor
) -> int | None:
    """The dim of the tokens in a result; None where an operation does not keep them apart."""
    tensor, own = whole
    if packet in _TURNED:
        return _turned(tensor.ndim, own.dim, packet, args)
    if packet in _VIEWS or packet is aten.expand:
        return _kept(tensor.shape, own.dim, out.shape)
    if packet in _WEIGHED:
        given = args[1 if packet is aten.addmm else 0]
        return own.dim if tensor is given and own.dim < tensor.ndim - 1 else None
    if packet in receptive.RULES or packet is aten.stack:
        return None
    dim = own.dim + out.ndim - tensor.ndim
    return dim if dim >= 0 and out.shape[dim] == tensor.shape[own.dim] else None


def _turned(count: int, dim: int, packet: Any, args: tuple[Any, ...]) -> int:
    if packet is aten.permute:
        return [int(n) % count for n in args[1]].index(dim)
    a, b = (int(n) % count for n in (args[1:] or (0, -1)))
    return {a: b, b: a}.get(dim, dim)


def _kept(before: Sequence[int], dim: int, after: Sequence[int]) -> int | None:
    """Where a dim is after a view that leaves it whole."""
    front = math.prod(before[:dim])
    found = [
        n for n, size in enumerate(after) if size == before[dim] and math.prod(after[:n]) == front
    ]
    return found[0] if found else None


def _alike(
    packet: Any,
    args: tuple[Any, ...],
    what: tuple[Known, int],
    out: torch.Tensor,
    turn: int,
) -> Followed | None:
    """An operation that treats each token alike, followed for the tokens that have a place.

    `what`: the operands with places, and the dim of the tokens in the result.
    """
    known, dim = what
    own = next(own for _, own in known if isinstance(own, Beside))
    size = out.shape[dim] - own.before - own.behind
    parts: list[tuple[torch.Tensor, Places]] = []
    changed: dict[int, torch.Tensor] = {}
    for tensor, places in known:
        if not isinstance(places, Beside):
            continue  # it has another number of tokens: all the same for each of these
        if (places.before, places.behind) != (own.before, own.behind):
            return None
        part = tensor.narrow(places.dim, places.before, size)
        changed[id(tensor)] = part
        parts.append((part, places.places))
    given = tuple(changed.get(id(one), one) for one in args)
    made = receptive.follow(packet, given, parts, out.narrow(dim, own.before, size), turn)
    return _places_beside(dim, made, own.before, own.behind)
