"""Is nothing kept of what lies before a layer that all paths pass through, and nothing lost?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.graph import Trace
from med_gradcam.outputs import tensors
from med_gradcam.tail import Tail, at_rest, record
from tests.engine import nets

X = nets.batch(nets.scan())
SCORE = nets.score_of(1)


class Chain(nn.Module):
    """Modules called one by one, so that each is remembered; `in_place` works on one's output."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nets.conv(1, 4), nets.conv(4, 6, 2), nets.conv(6, 6)
        self.head, self.in_place = nets.Pooled(), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        a = nn.functional.relu(a, inplace=True) if self.in_place else torch.relu(a)
        out: torch.Tensor = self.head(torch.relu(self.c(torch.relu(self.b(a)))))
        return out


def _bytes(tail: Tail) -> int:
    """What the memory holds, each storage once."""
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for m in tail.memory
        for _, t in tensors(m.output)
    }
    return sum(held.values())


def test_a_cut_keeps_numbers_only() -> None:
    net = nets.made(Chain)
    with at_rest(net):
        plain, slim = record(net, ["c"], X), record(net, ["c"], X, ["c"])
        assert _bytes(plain.tails["c"]) > 16**3 * 4 * 4
        assert _bytes(slim.tails["c"]) < 100
        at = plain.activations["c"]
        torch.testing.assert_close(slim.activations["c"], at)
        points = torch.cat([at, 0.5 * at, 0 * at])
        for ask in ("gradients", "scores"):
            wanted = getattr(plain.tails["c"], ask)(points, SCORE)
            torch.testing.assert_close(getattr(slim.tails["c"], ask)(points, SCORE), wanted)


def test_one_layer_that_is_no_cut_keeps_all() -> None:
    net = nets.made(Chain)
    with at_rest(net):
        found = record(net, ["b", "c"], X, ["c"])
    assert _bytes(found.tails["c"]) > 16**3 * 4 * 4


def test_work_in_place_on_what_stands_in() -> None:
    net = nets.made(lambda: Chain(in_place=True))
    with at_rest(net):
        plain, slim = record(net, ["c"], X), record(net, ["c"], X, ["c"])
        at = plain.activations["c"]
        pair, known = torch.cat([at, 0.5 * at]), float(SCORE(plain.output)[0])
        with pytest.raises(RuntimeError, match="single memory location"):
            slim.tails["c"].scores(pair, SCORE)
        tail = slim.tails["c"].faithful(pair, SCORE, known)
        assert tail.solid
        assert not tail.alone
        wanted = torch.cat([plain.tails["c"].gradients(one[None], SCORE) for one in pair])
        torch.testing.assert_close(tail.gradients(pair, SCORE), wanted)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layer", ["b", "c", "auto"])
def test_integrated_is_the_same(
    layer: str, *, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nets.made(lambda: Chain(in_place=in_place))
    slim = mg.explain(X[0], net, target=1, layer=layer, method="integrated")
    monkeypatch.setattr(Trace, "cuts", lambda *_: [])
    plain = mg.explain(X[0], net, target=1, layer=layer, method="integrated")
    assert slim.layer == plain.layer
    np.testing.assert_allclose(slim.evidence, plain.evidence, atol=1e-7)
    assert slim.status == plain.status == "complete"


def test_a_layer_wrongly_taken_for_a_cut_costs_more_but_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nets.made(nets.Skip)
    plain = mg.explain(X[0], net, layer="layer", method="integrated")
    assert abs(plain.bypassed or 0.0) > 0.01
    monkeypatch.setattr(Trace, "cuts", lambda _, names: list(names))
    slim = mg.explain(X[0], net, layer="layer", method="integrated")
    np.testing.assert_allclose(slim.evidence, plain.evidence, atol=1e-6)
    assert slim.bypassed == pytest.approx(plain.bypassed, abs=1e-4)
