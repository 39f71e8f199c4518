"""Raw outputs seen as cells and back: nothing is lost, moved or mixed, and no grid is guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.capture import capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.forms import Form, form_of
from med_gradcam.graph import trace
from med_gradcam.tail import record
from tests.engine import nets

SIDES = (8, 12, 16)  # three sides, so that no two axes are taken for each other


class Moved(nn.Module):
    """A convolution's output in another layout (`layer`), brought back for the rest."""

    def __init__(self, there: Any, back: Any, stride: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 5, stride, stride)
        self.there, self.layer, self.back = there, nn.Identity(), back
        self.rest, self.head = nn.Conv3d(5, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        cells = x.shape[-3:]
        x = self.back(self.layer(self.there(x)), cells)
        out: torch.Tensor = self.head(torch.tanh(self.rest(x)).mean((2, 3, 4)))
        return out


def _windows(x: torch.Tensor) -> torch.Tensor:
    """Windows of 1 x 1 x 2 cells, (windows, tokens, C), as a Swin transformer makes them."""
    n, c, i, j, k = x.shape
    return x.view(n, c, i, j, k // 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(-1, 2, c)


def _no_windows(x: torch.Tensor, cells: Any) -> torch.Tensor:
    i, j, k = cells
    return x.view(-1, i, j, k // 2, 2, 5).permute(0, 5, 1, 2, 3, 4).reshape(-1, 5, i, j, k)


def _sized(x: torch.Tensor, cells: Any) -> torch.Tensor:
    return x.reshape(-1, 5, *cells)


LAYOUTS = {
    "tokens": (
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x, cells: _sized(x.transpose(1, 2), cells),
    ),
    "channels first": (lambda x: x.flatten(2), _sized),
    "tokens first": (
        lambda x: x.flatten(2).permute(2, 0, 1),
        lambda x, cells: _sized(x.permute(1, 2, 0), cells),
    ),
    "channels last": (lambda x: x.movedim(1, -1), lambda x, _: x.movedim(-1, 1)),
    "axes turned": (lambda x: x.permute(0, 1, 4, 2, 3), lambda x, _: x.permute(0, 1, 3, 4, 2)),
    "slices": (
        lambda x: x.movedim(2, 1).flatten(0, 1),
        lambda x, cells: x.view(-1, cells[0], 5, *cells[1:]).movedim(1, 2),
    ),
    "windows": (_windows, _no_windows),
    "heads": (
        lambda x: x.flatten(2).transpose(1, 2).unflatten(2, (1, 5)).transpose(1, 2),
        lambda x, cells: _sized(x.transpose(1, 2).flatten(2).transpose(1, 2), cells),
    ),
}


def _made(how: str) -> tuple[nn.Module, nn.Module]:
    """The network in a layout, and the same without one."""
    one = nets.made(lambda: Moved(*LAYOUTS[how]))
    other = nets.made(lambda: Moved(lambda x: x, lambda x, _: x))
    other.load_state_dict(one.state_dict())
    return one, other


def score(out: Any) -> torch.Tensor:
    first: torch.Tensor = out[:, 0]
    return first


def _scan(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, *SIDES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_layout_is_seen_as_the_cells_that_it_holds(how: str) -> None:
    net, plain = _made(how)
    here, there = trace(net, (1, *SIDES)).find("layer"), trace(plain, (1, *SIDES)).find("layer")
    assert here is not None
    assert there is not None
    assert there.form is None
    assert here.form is not None
    assert (here.shape, here.lattice) == (there.shape, there.lattice)
    assert (here.past, here.feeds_norm) == (False, False)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize(
    "method", ["secant", "integrated", "gradcam", "hirescam", "ablationcam", "reciprocam"]
)
def test_a_map_does_not_depend_on_the_layout(how: str, method: str) -> None:
    net, plain = _made(how)
    one, other = (
        mg.explain(_scan().numpy(), each, layer="layer", method=method) for each in (net, plain)
    )
    assert one.cells == other.cells
    assert one.cells.how == "exact"
    assert one.status == other.status
    assert one.bypassed == pytest.approx(other.bypassed, abs=1e-5)
    peak = abs(other.evidence).max()
    assert peak > 0
    rounding = 4 * float(np.finfo(np.float32).eps) * max(1.0, abs(one.score))  # of a score
    assert abs(one.evidence - other.evidence).max() <= 2e-6 * peak + rounding


def _form(net: nn.Module) -> Form:
    trace(net, (1, *SIDES))
    form = form_of(net, "layer", _scan())
    assert form is not None
    return form


@pytest.mark.parametrize("how", LAYOUTS)
def test_back_and_forth_changes_no_bit(how: str) -> None:
    net, plain = _made(how)
    form, seen = _form(net), {}
    for name, one in (("raw", net), ("cells", plain)):
        hook = one.get_submodule("layer").register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out})
        )
        with torch.no_grad():
            one(_scan())
        hook.remove()
    assert torch.equal(form.cells(seen["raw"]), seen["cells"])
    back = form.whole(form.cells(seen["raw"]))
    assert torch.equal(back, seen["raw"])
    assert back.untyped_storage().data_ptr() != seen["raw"].untyped_storage().data_ptr()


@pytest.mark.parametrize("how", LAYOUTS)
def test_several_activations_at_once_are_each_their_own(how: str) -> None:
    """Slices and windows follow each other in the batch; a tail must not mix two activations."""
    net, _ = _made(how)
    trace(net, (1, *SIDES))
    tail = record(net, ["layer"], _scan()).tails["layer"]
    others = torch.cat([record(net, ["layer"], _scan(n)).activations["layer"] for n in range(8)])
    known = float(score(net(_scan())).detach()[0])
    tail = tail.faithful(others, score, known)
    wanted = [float(score(net(_scan(n))).detach()[0]) for n in range(8)]
    assert tail.scores(others, score).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("slices", [2, 8])
def test_as_many_activations_as_slices_are_not_taken_for_them(slices: int) -> None:
    """Modules before the layer whose outputs are needed behind it, one slice per batch item."""

    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.layer = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, _, s = x.shape[:3]
            x = x.movedim(2, 1).flatten(0, 1)
            side = self.side(x)
            both = torch.tanh(self.layer(x)) * torch.tanh(side)
            out: torch.Tensor = self.head(both.mean((2, 3)).view(n, s, -1).amax(1))
            return out

    net = nets.made(Skipped)
    x = torch.randn(1, 1, slices, 6, 6, generator=torch.Generator().manual_seed(1))
    trace(net, x.shape[1:])
    found = record(net, ["layer"], x)
    activation = found.activations["layer"]
    several = torch.cat([activation * t for t in torch.linspace(1, 0, slices)])
    tail = found.tails["layer"].faithful(several[:2], score, float(score(net(x)).detach()[0]))
    assert not tail.alone
    alone = [float(tail.scores(one[None], score)[0]) for one in several]
    assert tail.scores(several, score).tolist() == pytest.approx(alone, abs=1e-6)


def test_scans_that_share_a_dim_with_their_slices_go_one_by_one() -> None:
    net, _ = _made("slices")
    trace(net, (1, *SIDES))
    with pytest.raises(CannotExplainError, match="use batch=1"):
        capture(net, "layer", torch.cat([_scan(), _scan(1)]), lambda _: lambda out: out[:, 0])
    found = mg.explain_many([_scan(n)[0].numpy() for n in (0, 1)], net, layer="layer")
    assert [one.status for one in found] == ["complete", "complete"]


def test_a_plain_layer_has_no_form_and_one_of_another_size_its_own() -> None:
    net, plain = _made("tokens")
    trace(plain, (1, *SIDES))
    assert form_of(plain, "layer", _scan()) is None
    first = _form(net)
    trace(net, (1, 16, 12, 8))
    assert form_of(net, "layer", _scan()) == first
    other = form_of(net, "layer", torch.zeros(1, 1, 16, 12, 8))
    assert other is not None
    assert (first.counts, other.counts) == ((5, 2, 3, 4), (5, 4, 3, 2))


# ------------------------------------------------------------------------------------- no grid


class Tokens(nn.Module):
    """Tokens that something is done to before the layer."""

    def __init__(self, change: Any, extra: int) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.randn(1, extra, 5))
        self.patches, self.change, self.layer = nn.Conv3d(1, 5, 4, 4), change, nn.Tanh()
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.extra.shape[1]:
            x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        out: torch.Tensor = self.head(self.layer(self.change(x)).mean(1))
        return out


REFUSED = {
    "dropped": lambda x: x[:, torch.arange(x.shape[1]) % 3 != 0],
    "shuffled": lambda x: x[:, torch.randperm(x.shape[1], generator=torch.manual_seed(0))],
    "mixed": lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
    "a part of a row": lambda x: x[:, :7],
    "a slab": lambda x: x[:, 12:],
    "backwards": lambda x: x.flip(1),
    "shifted": lambda x: x.roll(1, 1),
    "pooled": lambda x: x.mean(1, keepdim=True),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("extra", [0, 1], ids=["", "class token"])
def test_tokens_that_make_no_grid_are_refused_and_not_guessed(how: str, extra: int) -> None:
    net = nets.made(lambda: Tokens(REFUSED[how], extra))
    with pytest.raises(CannotExplainError, match="cannot: an operation before it") as caught:
        mg.explain(_scan().numpy(), net, layer="layer")
    assert caught.value.reason == "no grid"
