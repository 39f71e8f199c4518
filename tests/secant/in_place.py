"""What networks do in place, on views and with buffers: functions of one tensor (2, 4, 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

Made = Callable[..., Any]


def slices_of_zeros(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[:, :3] = 2 * x[:, :3]
    out[:, 3:] = x[:, 3:].exp()
    return out


def slices_of_a_constant(x: torch.Tensor) -> torch.Tensor:
    out = torch.arange(48.0, dtype=x.dtype).reshape(2, 4, 6)
    out[:, 1:3, ::2] = x[:, 1:3, ::2]
    return out * out


def views_of_views(x: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape)
    view = out[:, 1:3]
    inner = view[:, :, ::2]
    inner += x[:, 1:3, ::2]
    out[:, 0] = x[:, 0]
    view.mul_(x[:, 1:3])
    inner.transpose(1, 2)[:, 1].sigmoid_()
    return out * out


def view_then_base(x: torch.Tensor) -> torch.Tensor:
    y = 1.5 * x
    y[:, :2].relu_()
    return y.sin()


def base_then_view(x: torch.Tensor) -> torch.Tensor:
    y = 1.5 * x
    part, turned = y[:, :2], y[:, :2].transpose(1, 2)
    y.sigmoid_()
    return turned.sin() * part.transpose(1, 2)


def one_view_then_another(x: torch.Tensor) -> torch.Tensor:
    y = 1.5 * x
    low, high, even = y[:, :3], y[:, 2:], y[:, ::2]
    low.tanh_()
    high.exp_()
    even += 1
    return torch.cat([low.cos(), high.cos(), even.cos(), y], 1)


def flat_view(x: torch.Tensor) -> torch.Tensor:
    y = 1.5 * x
    y.view(-1)[::3].mul_(2).sigmoid_()
    return y * y


def spread_view(x: torch.Tensor) -> torch.Tensor:
    y = x[:, :1] * 2
    wide = y.expand(2, 4, 6)
    y.exp_()
    return wide * x


def kept_then_overwritten(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    square = y * y
    y.zero_()
    return square + y


def output_kept_then_overwritten(x: torch.Tensor) -> torch.Tensor:
    pooled, _ = F.max_pool1d(x, 2, return_indices=True)
    kept = pooled.sin()
    pooled.neg_()
    return kept + pooled


def added_to(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y += x
    y *= x
    y -= 1
    y /= x * x + 1
    y **= 2
    return y


def itself(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.mul_(y)
    y.add_(y.t() if y.ndim == 2 else y)
    return y


def buffer_again(x: torch.Tensor) -> torch.Tensor:
    buffer, total = torch.empty_like(x), torch.zeros((), dtype=x.dtype)
    for k in range(3):
        buffer.copy_(x)
        buffer.mul_(k + 1).tanh_()
        total = total + buffer * buffer
    return total


def buffer_of_constants_between(x: torch.Tensor) -> torch.Tensor:
    buffer = 2 * x
    first = buffer.sin()
    buffer.fill_(3.0)
    second = buffer * x
    buffer.copy_(x.cos())
    return first + second + buffer


def constants_over_parts(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, 1:3] = 5.0
    y[:, 2:] = torch.arange(6.0, dtype=x.dtype)
    y[:, :2, ::2] = x[:, 1:3, ::2]
    y[:, 3, :2].zero_()
    return y.sin() + y[:, :1]


def filled_where(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).masked_fill_(torch.arange(6) > 3, -1.0).exp()


def put_in(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, torch.tensor([0, 2])] = x[:, 1:3].exp()
    y.index_add_(2, torch.tensor([1, 1]), x[:, :, :2])
    y.scatter_(1, torch.tensor([3]).expand(2, 1, 6), x[:, :1])
    return y * y


def new_shape_in_place(x: torch.Tensor) -> torch.Tensor:
    y = (2 * x).transpose_(1, 2)
    y.unsqueeze_(1)
    y.squeeze_(1).relu_()
    return y * y


def by_data(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.data.clamp_(min=0)
    y.data[:, :2] *= 2
    return y.exp() + y.data


def by_detach(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.detach()[:, :2].relu_()
    return y.exp()


def by_another_tensor(x: torch.Tensor) -> torch.Tensor:
    y, other, part = 2 * x, torch.zeros(()).double(), torch.zeros(0).double()
    other.data = y
    other.clamp_(min=0)
    part.set_(y.untyped_storage(), 6, (2, 6))  # type: ignore[call-overload]
    part.mul_(3)
    return y.exp()


def parts_without_a_base(x: torch.Tensor) -> torch.Tensor:
    i, f, g = x.repeat(1, 1, 3).unsafe_chunk(3, 2)
    i.sigmoid_()
    f.tanh_()
    return i * f + g.exp_() * i


def many_addresses(x: torch.Tensor) -> torch.Tensor:
    total = x
    for k in range(40):  # each temporary may get the address of the one before
        total = total + (x * k).sin_().mul_(0.1)
        (x + k).relu_()
    return total


def around(x: torch.Tensor) -> torch.Tensor:
    """Circular padding: a buffer of whatever is in memory, filled piece by piece from itself."""
    torch.empty(2, 4, 12, dtype=x.dtype).fill_(torch.rand(()))  # leave something behind there
    return F.pad(x, (3, 3), mode="circular").sin() * F.pad(x, (1, 5), mode="circular")


def data_given_back(x: torch.Tensor) -> torch.Tensor:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.mark_dirty(x)
            return x.mul_(2)

    y = x.clone()
    out: torch.Tensor = Doubled.apply(y)  # type: ignore[no-untyped-call]
    return out.exp() + y


def random_then_overwritten(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.normal_()
    y.copy_(x)
    return y.exp()


def from_another_part(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, :2] += y[:, 2:]
    y.mul_(y.flip(1))
    y.copy_(y.roll(1, 2))
    y[:, 1].sub_(y[:, 3])
    return y * y


def a_choice_that_is_overwritten(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[:, 2:] = (x[:, 2:] > 0).to(x.dtype)
    out[:, :2] = x[:, :2]
    out[:, 2:] = x[:, 2:].exp()
    return out * x


def data_of_others(x: torch.Tensor) -> torch.Tensor:
    y, other = 2 * x, x.sin()
    out = y.data * x + y.data[:, 1:3].sum(1, keepdim=True)  # tensors of their own
    y.data = other
    return out * y + y.data


def filled_at_places(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.index_fill_(1, torch.tensor([0, 2]), 3.0)
    rows = [a.index_fill(0, torch.tensor([1, 1]), a[0, 0]) for a in y * x]
    return torch.stack(rows)


def strided(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    part = y[:, :2]
    rows = part.as_strided((2, 3, 5), (24, 6, 1), 1).sum((1, 2)).reshape(2, 1, 1)
    beyond = part.as_strided((2, 2, 6), (24, 6, 1), 12)  # not in that part at all
    out = rows + beyond.exp()
    y.sigmoid_()
    return out * beyond + part.as_strided((2, 2, 6), (24, 12, 1))


IN_PLACE: list[Made] = [
    from_another_part,
    a_choice_that_is_overwritten,
    data_of_others,
    filled_at_places,
    strided,
    slices_of_zeros,
    slices_of_a_constant,
    views_of_views,
    view_then_base,
    base_then_view,
    one_view_then_another,
    flat_view,
    spread_view,
    kept_then_overwritten,
    output_kept_then_overwritten,
    added_to,
    itself,
    buffer_again,
    buffer_of_constants_between,
    constants_over_parts,
    filled_where,
    put_in,
    new_shape_in_place,
    by_data,
    by_detach,
    by_another_tensor,
    parts_without_a_base,
    many_addresses,
    around,
    data_given_back,
    random_then_overwritten,
]
