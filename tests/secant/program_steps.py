"""What does a step of a random program do: a view, work in place, a buffer, a choice, a branch?

Every value has the shape S, so that any step can follow any other. A step takes the values that are
alive and a source of random numbers, the same one in each run; it appends a value or changes some
in place, and with them all that share their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from med_gradcam.secant.tape import tensors
from tests.secant.calls import Case
from tests.secant.operations import ALL
from tests.secant.pairs import noise

S = (1, 4, 4, 4)
COUNT = 64
Values = list[torch.Tensor]
StepFunction = Callable[[Values, Random], Any]  # what it returns is looked at by nobody


def fixed(r: Random, *shape: int) -> torch.Tensor:
    return noise(*(shape or S), seed=r.randrange(1000))


def fixed_mask(r: Random, *shape: int) -> torch.Tensor:
    return fixed(r, *shape) > 0


def fit(value: torch.Tensor, *shape: int) -> torch.Tensor:
    """The values in another shape: repeated, or means of them."""
    count = int(torch.Size(shape).numel())
    flat = value.reshape(-1)
    if flat.numel() >= count:
        flat = flat[: flat.numel() // count * count].reshape(-1, count).mean(0)
    return flat.repeat(-(-count // flat.numel()))[:count].reshape(shape)


# ---------------------------------------------------------------------------------- the rules


def operation(case: Case) -> StepFunction:
    """A call of an operation that the table has a rule for."""

    def step(values: Values, r: Random) -> None:
        given = []
        for shape in case.shapes:
            v = fit(r.choice(values), *shape)
            given.append(v * v + 0.3 if case.positive else v)
        made = [t for t in tensors((case.function(*given),)) if t.is_floating_point()]
        values.append(sum((fit(t.double(), *S) * (0.7**n) for n, t in enumerate(made)), fixed(r)))

    return step


def _tokens(v: torch.Tensor) -> torch.Tensor:
    return v.reshape(1, 2, 8, 4)


def _cell(v: torch.Tensor, w: torch.Tensor, r: Random) -> torch.Tensor:
    weights = [fixed(r, 16, 4), fixed(r, 16, 4)]
    rows, hidden = v.reshape(16, 4), w.reshape(16, 4)
    return torch.lstm_cell(rows, (hidden, hidden.sin()), *weights)[0].reshape(S)


BRANCHES: dict[str, Callable[[torch.Tensor, torch.Tensor, Random], torch.Tensor]] = {
    "skip": lambda v, w, r: v + r.choice([torch.relu, torch.tanh, torch.sin])(w),
    "product of branches": lambda v, w, r: v * w,
    "gate": lambda v, w, r: v * torch.sigmoid(w.mean((2, 3), keepdim=True)),
    "matrix product": lambda v, w, r: v @ w.transpose(-1, -2) / 4,
    "quotient": lambda v, w, r: v / (1 + w * w),
    "where": lambda v, w, r: torch.where(fixed_mask(r), v, w),
    "concatenated": lambda v, w, r: (
        torch.cat([v, w, v[:, :1]], 1)[:, r.sample(range(9), 4)]
    ),
    "attention": lambda v, w, r: (
        F.scaled_dot_product_attention(_tokens(v), _tokens(w), _tokens(v)).reshape(S)
    ),
    "normalised": lambda v, w, r: F.normalize(v + w, dim=r.choice([1, 2, 3])),
    "limits": lambda v, w, r: torch.clamp(v, min=w - 0.5, max=w + 0.5),
    "products": lambda v, w, r: v + w.tanh().prod(r.choice([1, 2, 3]), keepdim=True),
    "einsum": lambda v, w, r: torch.einsum("bijk,bilk->bijl", v, w) / 4,
    "between": lambda v, w, r: torch.lerp(v, w, torch.sigmoid(v)),
    "powers": lambda v, w, r: 2 ** v.tanh() + w % 2,
    "LSTM cell": _cell,
    "convolution": lambda v, w, r: F.conv2d(v, fixed(r, 4, 2, 3, 3) / 4, padding=1, groups=2) + w,
    "up and down": lambda v, w, r: F.interpolate(F.max_pool2d(v, 2), scale_factor=2) + w,
    "norm and add": lambda v, w, r: F.group_norm(v, 2) + F.layer_norm(w, (4,)),
    "distance": lambda v, w, r: v / (1 + (v - w).norm(dim=(2, 3), keepdim=True)),
}  # fmt: skip


def branch(name: str) -> StepFunction:
    def step(values: Values, r: Random) -> None:
        values.append(BRANCHES[name](r.choice(values), r.choice(values), r))

    return step


# ---------------------------------------------------------------------------------- views


def turned(values: Values, r: Random) -> None:
    values.append(r.choice(values).permute(0, *r.sample([1, 2, 3], 3)))


def same_memory(values: Values, r: Random) -> None:
    v = r.choice(values)
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: v.view_as(v),
        v.detach,
        lambda: v.data,
        lambda: v[:, :, 0:],
        lambda: v.as_strided(v.shape, (v.stride(0), v.stride(1), v.stride(3), v.stride(2))),
        lambda: v.as_strided(S, (64, 16, 4, 1), 0),
    ]
    values.append(r.choice(ways)())


def spread(values: Values, r: Random) -> None:
    d = r.choice([1, 2, 3])
    values.append(r.choice(values).narrow(d, r.randrange(4), 1).expand(S))


def windows(values: Values, r: Random) -> None:
    """Two views that overlap in part."""
    d = r.choice([1, 2, 3])
    both = torch.cat([r.choice(values), r.choice(values).narrow(d, 0, 2)], d)
    values += [both.narrow(d, 0, 4), both.narrow(d, 2, 4)]


def runs(values: Values, r: Random) -> None:
    """Two views that overlap, one a few places behind the other in flat memory."""
    flat = torch.cat([r.choice(values).reshape(-1), r.choice(values).reshape(-1)[:6]])
    rows = flat.unfold(0, COUNT, r.choice([1, 3, 6]))
    values += [rows[0].view(S), rows[1].view(S)]


def combs(values: Values, r: Random) -> None:
    """Two views whose elements alternate."""
    both = torch.stack([r.choice(values), r.choice(values)], r.choice([1, 4]))
    values += both.unbind(1 if both.shape[1] == 2 else 4)


VIEWS: list[StepFunction] = [turned, same_memory, spread, windows, runs, combs]


# ---------------------------------------------------------------------------------- in place


def part(v: torch.Tensor, r: Random) -> torch.Tensor:
    """A part of a value, as a view."""
    d = r.choice([1, 2, 3])
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: v,
        lambda: v.narrow(d, r.randrange(3), 2),
        lambda: v.select(d, r.randrange(4)),
        lambda: v[:, :, :: r.choice([2, 3])],
        lambda: v.transpose(1, d)[:, 1:],
        lambda: v.diagonal(0, 2, 3),
        lambda: v.unfold(d, 2, r.choice([1, 2])),
        lambda: v.view(-1)[r.randrange(8) :: 3],
        lambda: part(part(v, r), r),
    ]
    return r.choice(ways)()


def _recorded(method: str, *args: Any) -> Callable[[torch.Tensor], Any]:
    return lambda v: getattr(v, method)(*args)


CHANGES = [
    *[_recorded(name) for name in "relu_ tanh_ sigmoid_ neg_ sin_ abs_ erf_ round_ zero_".split()],
    *[_recorded("mul_", 1.5), _recorded("add_", 0.5), _recorded("div_", 3.0), _recorded("pow_", 2)],
    *[_recorded("clamp_", -0.5, 0.5), _recorded("fill_", 0.3), _recorded("cumsum_", -1)],
    *[_recorded("sub_", 0.5), _recorded("detach_"), lambda v: F.silu(v, inplace=True)],
    *[lambda v: F.leaky_relu(v, 0.2, inplace=True), lambda v: F.elu(v, inplace=True)],
    _recorded("mul_", torch.tensor([[0.5], [2.0]])),
]


def changed(values: Values, r: Random) -> None:
    r.choice(CHANGES)(part(r.choice(values), r))


def turned_in_place(values: Values, r: Random) -> None:
    v = r.choice(values).detach()
    v.transpose_(*r.sample([1, 2, 3], 2))
    values.append(v)


def two_parts(values: Values, r: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of one shape of two values, which may be the same one: the parts may overlap."""
    d, size = r.choice([1, 2, 3]), r.choice([2, 3, 4])
    v, w = r.choice(values), r.choice(values)
    one, other = (t.narrow(d, r.randrange(5 - size), size) for t in (v, w))
    if r.random() < 0.2:
        return one, other.narrow(d, 0, 1)  # broadcast
    if r.random() < 0.2 and size == 4:
        return one, other.transpose(*r.sample([1, 2, 3], 2))
    return one, other


MEETINGS: list[Callable[[torch.Tensor, torch.Tensor], Any]] = [
    lambda v, w: v.add_(w),
    lambda v, w: v.sub_(w, alpha=0.5),
    lambda v, w: v.mul_(w),
    lambda v, w: v.div_(1 + w * w),
    lambda v, w: v.copy_(w),
    lambda v, w: v.copy_(w.flip(1)),
    lambda v, w: v.addcmul_(w, w, value=0.3),
    lambda v, w: v.lerp_(w, 0.3),
    lambda v, w: v.fill_(w.reshape(-1)[1]),
    lambda v, w: v[0].baddbmm_(v[0], w[0], beta=0.5, alpha=0.2),
    lambda v, w: v.clamp_(min=w - 1),
    lambda v, w: torch.mul(v, w, out=v),
    lambda v, w: v.__setitem__((slice(None), slice(0, 2)), w[:, -2:]),
]


def met(values: Values, r: Random) -> None:
    r.choice(MEETINGS)(*two_parts(values, r))


def put(values: Values, r: Random) -> None:
    """Values written to places that an index names, now and then two to one place."""
    v, w, d = r.choice(values), r.choice(values), r.choice([1, 2, 3])
    at = r.choices(range(4), k=2) if r.random() < 0.3 else r.sample(range(4), 2)
    index, two = torch.tensor(at), w.narrow(d, r.randrange(3), 2)
    wide = index.reshape([2 if n == d else 1 for n in range(4)]).expand(two.shape)
    ways: list[Callable[[], Any]] = [
        lambda: v.index_add_(d, index, two, alpha=0.5),
        lambda: v.index_copy_(d, index, two),
        lambda: v.scatter_(d, wide, two),
        lambda: v.scatter_add_(d, wide, two),
        lambda: v.index_fill_(d, index, 0.4),
        lambda: v.__setitem__((slice(None), index), w[:, 1:3]),
        lambda: v.index_put_((torch.tensor([0]), index), w[:, 1:3], accumulate=r.random() < 0.5),
        lambda: v.masked_fill_(fixed_mask(r, 4, 4), 0.2),
        lambda: v.masked_scatter_(fixed_mask(r), w),
        lambda: v.__setitem__(fixed_mask(r), 0.1),
        lambda: v.put_(index + 7, w[0, 0, 0, :2], accumulate=r.random() < 0.5),
    ]
    r.choice(ways)()


def buffer(values: Values, r: Random) -> None:
    """A new tensor filled piece by piece, in part by what is in it already."""
    made = torch.empty(S, dtype=torch.float64).fill_(0.5)
    for _ in range(r.choice([1, 2, 3, 4])):
        one, other = two_parts([*values, made], r)
        d = r.choice([1, 2, 3])
        at = made.narrow(d, r.randrange(3), 2)
        if one.shape == other.shape:
            at.copy_(fit(one * 0.5 + other, *at.shape))
        else:
            at += r.choice(values).narrow(d, 1, 2)
    if r.random() < 0.3:
        made[:, :, 1:3] = fixed(r, 4)
    values.append(made)


def chosen(values: Values, r: Random) -> None:
    """What may choose by the data: with far limits it is the same for both."""
    v, w, u = (r.choice(values) for _ in range(3))
    limit = r.choice([-50.0, 50.0, 50.0, 0.0])
    inside = u > limit
    made = torch.full(S, 0.2, dtype=torch.float64)
    made[:, :2] = v[:, 2:]
    ways: list[Callable[[], Any]] = [
        lambda: values.append(torch.where(inside, v, w)),
        lambda: v.masked_fill_(inside, 0.5),
        lambda: v.__setitem__(inside, 0.0),
        lambda: made.__setitem__((slice(None), slice(1, 3)), inside[:, :2].double()),
        lambda: made[:, 2:].masked_fill_(inside[:, 2:], 3.0),
        lambda: made.add_(inside.double()),
    ]
    r.choice(ways)()
    values.append(made)


def given_other_data(values: Values, r: Random) -> None:
    """A tensor takes over another one's memory."""
    v = r.choice(values).clone()
    kept = v.sin() if r.random() < 0.05 else v + r.choice(values)  # the first one needs v itself
    other = r.choice(values).transpose(2, 3) if r.random() < 0.5 else kept.sin()
    v.data = other
    values += [v, kept, other]


IN_PLACE: list[StepFunction] = [
    *[changed, met, put, buffer] * 3,
    *[chosen] * 2,
    turned_in_place,
    given_other_data,
]
STEPS: dict[str, StepFunction] = {
    **{f"{name} {n}": operation(c) for name, cases in ALL.items() for n, c in enumerate(cases)},
    **{name: branch(name) for name in BRANCHES},
    **{step.__name__: step for step in (*VIEWS, *IN_PLACE)},
}
KINDS: list[tuple[float, list[str]]] = [
    (0.3, [step.__name__ for step in IN_PLACE]),
    (0.2, [step.__name__ for step in VIEWS]),
    (0.2, list(BRANCHES)),
    (0.3, []),  # operations: one of the table, then one of its cases
]
