"""Where change cannot be followed, is that said by name, and never passed over in silence?"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import nn

from med_gradcam.errors import CannotExplainError
from med_gradcam.secant.pair import run
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from tests.secant.pairs import Function, noise, off, shared, weighted

EXACT = 1e-9
aten = torch.ops.aten
X, R = noise(1, 4, 6, seed=1), noise(1, 4, 6, seed=2) - 1
Made = Callable[[torch.Tensor], Any]


def written_where_negative(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[y < 0] = 0.0
    return y


def out_into_a_buffer(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, x, out=torch.empty_like(x))


def put_beside_a_copy(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.from_numpy(x.numpy().copy())
    buffer[:, :2] = x[:, :2].exp()
    return buffer * 2


def noise_over_all(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.normal_()
    return y * x


def noise_over_a_part(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, 1:3].normal_()
    return y.sin()


def copied_over(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.copy_(torch.from_numpy(x.numpy()))
    return y + x


def copied_over_a_part(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, 1:3] = torch.from_numpy(x.numpy()[:, :2])
    return y.sin()


def a_choice_in_a_part(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, :2] = 2 * x[:, :2]
    y[:, 2:] = (x[:, 2:] > 0).to(x.dtype)
    return y


def parts_by_choice(x: torch.Tensor) -> torch.Tensor:
    y = torch.ones_like(x)
    y[:, 2:][x[:, 2:] > 0] = 5.0
    y[:, 3:] *= 2
    y[:, :2] = 2 * x[:, :2]
    return y


def on_what_is_behind(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, :, 1:] += y[:, :, :-1]
    return y


def copied_from_what_is_behind(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, 1:, :4].copy_(y[:, :-1, :4])
    return y


def product_with_itself(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    return y.baddbmm_(x[:, :, :4], y)


def places_that_repeat(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.unfold(2, 3, 1).mul_(2.0)
    return y


def twice_by_index(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y[:, torch.tensor([1, 1])] = x[:, 1:3].exp()
    return y


def other_order_of_arguments(x: torch.Tensor) -> torch.Tensor:
    return (x.abs() + 1).polygamma_(1)


def memory_given_away(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    square = y * y
    y.data = torch.empty(0, dtype=x.dtype)  # to free it
    return square


def memory_of_nobody(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x
    y.data = x.exp()
    return y + x


ONE = torch.ones(4, dtype=torch.long)
REFUSED: dict[str, tuple[Made, str]] = {
    # no rule, and no simpler operations that have one
    "singular values": (lambda x: torch.linalg.svd(x)[1], "aten::_linalg_svd"),
    "Fourier": (lambda x: torch.fft.fft(x).abs(), "aten::_fft_r2c"),
    "Fourier, then back": (lambda x: torch.fft.irfft(torch.fft.rfft(x)) + x, "aten::_fft_r2c"),
    "angle of two": (lambda x: torch.atan2(x, x + 1), "aten::atan2"),
    "distances": (lambda x: torch.cdist(x, x.sin()), "aten::_cdist_forward"),
    "median": (lambda x: x.median(1)[0], "aten::median"),
    "a power that depends on the input": (lambda x: x.abs() ** x, "aten::pow"),
    "into a buffer by out=": (out_into_a_buffer, "aten::mul"),
    "bits as other numbers": (lambda x: x.view(torch.int64).double() * 1e-18, "aten::view"),
    "places that move": (
        lambda x: F.grid_sample(x[None], torch.tanh(x[:, None, :, :2]), align_corners=False),
        "aten::grid_sampler_2d",
    ),
    # what it overwrites is read, or something is overwritten twice
    "quotient into a buffer": (lambda x: torch.div(x, x, out=torch.empty_like(x)), "aten::div, wh"),
    "sum with what is behind": (on_what_is_behind, "aten::add_, which here reads what it overw"),
    "copy of what is behind": (copied_from_what_is_behind, "aten::copy_, which here reads"),
    "matrix product with itself": (product_with_itself, "aten::baddbmm_, which here reads"),
    "views that repeat places": (places_that_repeat, "aten::mul_, which here reads"),
    "no form out of place": (other_order_of_arguments, "aten::polygamma_, which here reads"),
    "two to one place by index": (twice_by_index, "aten::index_put, which writes several"),
    "two to one place by scatter": (
        lambda x: (2 * x).scatter(1, ONE[:2].reshape(1, 2, 1).expand(1, 2, 6), x[:, :2]),
        "aten::scatter, which writes several",
    ),
    "two to one place by copy": (
        lambda x: (2 * x).index_copy(1, ONE[:2], x[:, :2]),
        "aten::index_copy .in it aten::index_put, which writes several",
    ),
    "two to one place by put": (
        lambda x: (2 * x).put(ONE, x[0, :, 0]),
        "aten::put, which writes several",
    ),
    "two unpooled to one place": (
        lambda x: aten.max_unpool2d(x, ONE.repeat(6).reshape(1, 4, 6), [4, 6]),
        "aten::max_unpool2d, which writes several",
    ),
    "memory given away": (memory_given_away, "aten::mul with a tensor whose `data` was set"),
    "memory of nobody": (memory_of_nobody, "aten::add with a value that no operation"),
    # masks, places and whole numbers that are not the same for both
    "a mask as a factor": (lambda x: x * (x > 0), "aten::gt"),
    "a mask in where": (lambda x: torch.where(x > 0, x, 0.1 * x), "aten::gt"),
    "a mask as numbers": (lambda x: (x > 0).double().mean(1) + 0 * x[:, 0], "aten::gt"),
    "a mask alone": (lambda x: (x > 0).double(), "aten::gt"),
    "a mask of masks": (lambda x: ((x > 0) & (x < 1)).double() * x, "aten::(gt|lt|bitwise_and)"),
    "masked in place": (written_where_negative, "aten::lt"),
    "a mask in a part of a buffer": (a_choice_in_a_part, "aten::gt, whose result.*into aten::put"),
    "a part by a mask": (parts_by_choice, "aten::gt, whose result.*into aten::put"),
    "rounded to whole numbers": (lambda x: x.long().double() * x, "aten::_to_copy"),
    "whole numbers in place": (
        lambda x: torch.zeros(1, 4, 6).long().copy_(9 * x) * x,
        "aten::copy",
    ),
    "largest place": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), "aten::argmax"),
    "place of max": (lambda x: (2 * x).gather(1, x.max(1, keepdim=True)[1]), "aten::max"),
    "picked places": (lambda x: x[:, (x[0, :, 0] > 0).nonzero()[:1, 0]] * 2, "control flow"),
    "order": (lambda x: x.sort(1)[0], "aten::sort, whose order"),
    "largest few": (lambda x: x.topk(2, 1)[0], "aten::topk, whose order"),
    "unpooled at moving places": (
        lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), [2]),
        "aten::max_pool2d_with_indices",
    ),
    # control flow
    "a branch": (lambda x: x.exp() if x.sum() > 0 else x.sin(), "control flow.*_local_scalar"),
    "a longer branch": (lambda x: x.exp() if x.sum() > 0 else x.exp() * 2, "control flow"),
    "a number read": (lambda x: x * float(x.mean()), "control flow.*aten::mul.*_local_scalar"),
    "a list read": (lambda x: x * x.tolist()[0][0][0], "control flow.*aten::mul"),
    "a shape that depends": (lambda x: x[x > 0].sum().reshape(1, 1), "aten::gt|control"),
    "a length that depends": (lambda x: x[:, : 2 + int(x.sum() > 0)], "control flow"),
    "torch.cond": (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "control flow"),
    # what left the network and came back, and noise
    "by a Python number": (lambda x: x + torch.tensor(x.mean().item()), "no operation on the inp"),
    "by numpy": (lambda x: x + torch.from_numpy(2 * x.numpy()), "no operation on the input"),
    "by numpy alone": (lambda x: torch.from_numpy(2 * x.numpy()), "no operation on the input"),
    "into a buffer that changed": (put_beside_a_copy, "aten::put with a value that no"),
    "noise over what was there": (noise_over_all, "aten::mul with a value that no"),
    "noise over a part": (noise_over_a_part, "aten::put with a value that no"),
    "numbers from outside over what was there": (copied_over, "aten::add with a value that no"),
    "numbers from outside over a part": (copied_over_a_part, "aten::put with a value that no"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), "no operation on the input"),
    "noise": (lambda x: x + torch.rand(6), "no operation on the input"),
    "noise like": (lambda x: x * torch.rand_like(x), "no operation on the input"),
    "drawn by chance": (lambda x: torch.bernoulli(x.sigmoid()), "aten::bernoulli"),
    "drawn in place": (lambda x: torch.zeros_like(x).bernoulli_(x.sigmoid()) * x, "bernoulli"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name(what: str) -> None:
    function, name = REFUSED[what]
    with pytest.raises(NoRuleError, match=name):
        shared(Function(function), X, R)
    # Also behind a layer, and where the rest goes on.
    net = nn.Sequential(nn.Identity(), Function(function), Function(lambda y: torch.tanh(y) * y))
    with pytest.raises(NoRuleError, match=name):
        shared(net, X, R, ["0"])


def unused_rest(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.from_numpy(x.numpy().copy())
    buffer[:, :2] = x[:, :2].exp()
    return buffer[:, :2] * 2


ALLOWED: dict[str, Made] = {
    "a buffer whose changed part is not used": unused_rest,
    "a check of the values": lambda x: 2 * x if not torch.isnan(x).any() else x,
    "a branch that both take": lambda x: x.exp() if x.sum() > -1e6 else x.sin(),
    "a mask that is the same": lambda x: x * (x > -1e6) + (x > -1e6).double(),
    "a choice that leads nowhere": lambda x: (x.argmax(1), x.exp())[1],
    "an operation that leads nowhere": lambda x: (torch.linalg.svd(x), x.exp())[1],
    "a number that is only looked at": lambda x: (float(x.mean()), x.sin())[1],
    "the same order": lambda x: (0.01 * x + torch.arange(6.0)).sort(-1)[0],
    "noise from a seed": lambda x: x * torch.randn(6, generator=torch.Generator().manual_seed(0)),
    "constants made anew": lambda x: (
        x * torch.arange(6.0) + torch.eye(4, 6) + torch.full((6,), 2.0)
    ),
    "what has no shape": lambda x: x * torch.tensor(3.0) + torch.tensor(2),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_changes_nothing_is_let_through(what: str) -> None:
    found = shared(Function(ALLOWED[what]), X, R)
    assert off(found) <= EXACT
    assert not found.past[INPUT]


class Masked(nn.Module):
    """A mask made of the input meets the output of the layer."""

    def __init__(self, *, as_number: bool) -> None:
        super().__init__()
        self.layer, self.as_number = nn.Tanh(), as_number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = x > 0
        y: torch.Tensor = self.layer(x)
        return y * inside.double() if self.as_number else torch.where(inside, y, 0.0)


def test_a_mask_made_before_the_layer_is_a_path_past_it() -> None:
    assert shared(Masked(as_number=True), X, R, ["layer"]).past["layer"]
    with pytest.raises(NoRuleError, match=r"aten::where with a mask.*from before the layer"):
        shared(Masked(as_number=False), X, R, ["layer"])


def test_another_expert_is_seen() -> None:
    """The same operations, with other weights."""
    torch.manual_seed(0)
    net = Function(
        lambda x, one, two: one(x) if x.sum() > 0 else two(x), nn.Linear(6, 6), nn.Linear(6, 6)
    ).double()
    assert X.sum() > 0 > R.sum()
    with pytest.raises(NoRuleError, match="no operation on the input"):
        shared(net, X, R)


def test_an_operation_of_somebody_else_is_named() -> None:
    @torch.library.custom_op("med_gradcam_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @torch.library.custom_op("med_gradcam_tests::twice_", mutates_args=("x",))
    def twice_(x: torch.Tensor) -> None:
        x.mul_(2)

    with pytest.raises(NoRuleError, match="med_gradcam_tests::twice"):
        shared(Function(twice), X, R)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        twice_(y)
        return y * 3

    with pytest.raises(NoRuleError, match="med_gradcam_tests::twice_"):
        shared(Function(in_place), X, R)


def test_shared_weights_and_layers_that_never_run_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.never, self.two = nn.Tanh(), nn.Tanh(), Function(lambda x: (x, x))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(self.layer(x)) + self.two(x)[0]
            return out

    with pytest.raises(CannotExplainError, match="'layer' to run once"):
        run(Twice(), ["layer"], X, weighted)
    with pytest.raises(CannotExplainError, match="'two' to run once and put out one tensor"):
        run(Twice(), ["two"], X, weighted)
    with pytest.raises(CannotExplainError, match="'never' never ran"):
        run(Twice(), ["never"], X, weighted)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_message_names_the_operation_once() -> None:
    for function, _ in REFUSED.values():
        with pytest.raises(NoRuleError) as caught:
            shared(Function(function), X, R)
        text = str(caught.value)
        assert re.search(r"aten::\w+|control flow|no operation", text)
        assert "\n" not in text
        assert len(text) < 250
