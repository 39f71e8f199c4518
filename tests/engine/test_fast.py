"""Is a fast run the plain run: same maps, paths known, weights followed, else refused?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import fast
from med_gradcam.capture import capture, outputs
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.tail import at_rest
from tests.engine import nets

SCAN = nets.volume()


class Branched(nn.Module):
    """A U-Net in small, with batch norms to fold and a skip past the layer `deep`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nets.conv(1, 4), nn.BatchNorm3d(4), nn.ReLU(inplace=True))
        self.aside = nn.Sequential(nets.conv(4, 4), nn.ReLU())
        self.down = nn.Sequential(nets.conv(4, 6, 2), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nets.conv(6, 6), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Sequential(nets.conv(10, 6), nn.ReLU())
        self.head = nets.Pooled(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        aside = self.aside(stem) + stem
        deep = self.up(self.deep(self.down(stem)))
        out: torch.Tensor = self.head(self.last(torch.cat([aside, deep], 1)))
        return out


class Parts(nn.Module):
    """Several outputs in a dict, one of them no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nets.conv(1, 4, 2), nn.ReLU()), nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        body = self.body(x)
        return {"logits": self.head(body), "note": "seen", "means": (body.mean(), body.amax())}


class Choosing(nn.Module):
    """Takes the one or the other path by what it sees, which a trace cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nets.conv(1, 4, 2), nets.conv(1, 4, 2), nets.Pooled(4)
        self.layer = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.one if bool(x[0, 0, 2:6].mean() > x[0, 0, 10:14].mean()) else self.other
        out: torch.Tensor = self.head(self.layer(first(x)))
        return out


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts were built."""
    found: list[str] = []
    real = fast._made

    def made(net: nn.Module, layers: Any, x: torch.Tensor) -> fast.Part:
        found.append("+".join(layers))
        return real(net, layers, x)

    monkeypatch.setattr(fast, "_made", made)
    return found


@pytest.mark.parametrize("method", ["secant", "gradcam", "integrated", "layercam", "xgradcam"])
@pytest.mark.parametrize("layer", ["deep.1", "down", "last", "auto"])
def test_equals_the_plain_run(method: str, layer: str) -> None:
    net = nets.made(Branched)
    given: dict[str, Any] = {"target": 1, "layer": layer, "method": method}
    plain = mg.explain(SCAN, net, **given)
    quick = mg.explain(SCAN, net, fast=True, **given)
    assert quick.layer == plain.layer
    assert quick.score == pytest.approx(plain.score, abs=1e-5)
    off = np.abs(quick.evidence - plain.evidence).max()
    assert off <= fast.PROMISE * np.abs(plain.evidence).max()
    assert (quick.bypassed is None) == (plain.bypassed is None)
    if plain.bypassed is not None:  # the skip is seen although no tape was written before the layer
        assert quick.bypassed == pytest.approx(plain.bypassed, abs=1e-4)
    assert quick.provenance.parameters["fast"] is True


def test_the_skip_past_a_layer_is_known_to_be_there() -> None:
    net = nets.made(Branched)
    found = mg.explain(SCAN, net, target=0, layer="deep", fast=True)
    plain = mg.explain(SCAN, net, target=0, layer="deep")
    assert found.status == plain.status
    assert abs(plain.bypassed or 0.0) > 1e-3
    cut = mg.explain(SCAN, net, target=0, layer="deep+aside", fast=True)
    assert cut.residual == pytest.approx(
        mg.explain(SCAN, net, target=0, layer="deep+aside").residual, abs=1e-4
    )


def test_several_scans_targets_and_layers_at_once(built: list[str]) -> None:
    net = nets.made(Branched)
    scans = [nets.volume(seed=n) for n in range(3)]
    for method, batch in (("gradcam", 3), ("secant", 1)):
        given: dict[str, Any] = {"target": [0, 2], "layer": "last", "method": method}
        plain = mg.explain_many(scans, net, batch=batch, **given)
        quick = mg.explain_many(scans, net, batch=batch, fast=True, **given)
        for one, other in zip(plain, quick, strict=True):
            off = np.abs(one.evidence - other.evidence).max()
            assert off <= fast.PROMISE * np.abs(one.evidence).max()
    assert built == ["last", "last"]  # one for a batch of three, one for a scan alone


def test_is_built_once_and_again_for_new_weights(built: list[str]) -> None:
    net = nets.made(Branched)
    first = mg.explain(SCAN, net, target=0, layer="last", method="gradcam", fast=True)
    again = mg.explain(SCAN, net, target=0, layer="last", method="gradcam", fast=True)
    assert len(built) == 1
    assert first.cost_in_forwards == pytest.approx(again.cost_in_forwards + fast.BUILDING + 2.0)
    np.testing.assert_array_equal(first.evidence, again.evidence)
    with torch.no_grad():
        net.get_parameter("stem.0.weight").mul_(1.5)
    changed = mg.explain(SCAN, net, target=0, layer="last", method="gradcam", fast=True)
    plain = mg.explain(SCAN, net, target=0, layer="last", method="gradcam")
    assert len(built) == 2
    np.testing.assert_allclose(changed.evidence, plain.evidence, atol=1e-6)
    assert np.abs(changed.evidence - again.evidence).max() > 0.1 * np.abs(again.evidence).max()


def test_weights_exchanged_through_data_are_followed() -> None:
    net = nets.made(Branched)
    mg.explain(SCAN, net, target=0, layer="last", method="gradcam", fast=True)
    weight = net.get_parameter("stem.0.weight")
    weight.data.mul_(1.5)  # leaves no trace in the version counter
    changed = mg.explain(SCAN, net, target=0, layer="last", method="gradcam", fast=True)
    plain = mg.explain(SCAN, net, target=0, layer="last", method="gradcam")
    np.testing.assert_allclose(changed.evidence, plain.evidence, atol=1e-6)


def test_the_network_comes_back_as_it_was() -> None:
    net = nets.made(Branched).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mg.explain(SCAN, net, target=0, fast=True)
    assert net.training
    assert all("forward" not in m.__dict__ for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_predictions_of_any_form() -> None:
    net = nets.made(Parts)
    x = nets.batch(nets.scan())
    with at_rest(net):
        made, _ = fast.part(net, ["body"], x, fast.Compare(lambda out: lambda o: o["logits"][:, 0]))
        plain = outputs(net, x)
        with fast.standing_in(net, made, whole=True):
            found = outputs(net, x)
    assert found["note"] == "seen"
    torch.testing.assert_close(found["logits"], plain["logits"])
    torch.testing.assert_close(found["means"], plain["means"])
    assert isinstance(found["means"], tuple)


def test_another_size_and_gradients_run_as_ever() -> None:
    net = nets.made(Branched)
    x = nets.batch(nets.scan())
    with at_rest(net):
        made, _ = fast.part(net, ["last"], x, fast.Compare(lambda out: lambda o: o[:, 0]))
        with fast.standing_in(net, made):
            other = torch.rand(1, 1, 8, 12, 16)
            torch.testing.assert_close(outputs(net, other), net(other).detach())
            leaf = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(leaf)[0, 0], leaf)
        plain = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(net(plain)[0, 0], plain)
    torch.testing.assert_close(slope, wanted)


def test_only_what_is_needed_is_handed_over() -> None:
    net = nets.made(Branched)
    x = nets.batch(nets.scan())
    with at_rest(net):
        made, _ = fast.part(net, ["deep"], x, fast.Compare(lambda out: lambda o: o[:, 0]))
    names = {m: n for n, m in net.named_modules()}
    needed = {names[m.module]: used for m, used in zip(made.memory, made.needed, strict=True)}
    assert needed == {"stem": True, "aside": True, "down": False}


def test_a_choice_by_the_data_is_refused() -> None:
    net = nets.made(Choosing)
    with pytest.raises(
        CannotExplainError, match=r"own maps within 0\.0001 of their peak"
    ) as caught:
        mg.explain(SCAN, net, target=0, layer="layer", method="gradcam", fast=True)
    assert caught.value.reason == "not fast"
    assert "forward" not in net.__dict__


def test_a_part_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, real = nets.made(Branched), fast._optimised

    def wrong(module: nn.Module, x: torch.Tensor) -> Any:
        run = real(module, x)
        return lambda given: tuple(t * 1.001 for t in run(given))

    monkeypatch.setattr(fast, "_optimised", wrong)
    with pytest.raises(CannotExplainError, match="run it without --fast"):
        mg.explain(SCAN, net, target=0, layer="last", method="gradcam", fast=True)


def test_what_cannot_be_traced_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nets.conv(1, 4, 2), nets.Pooled(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch._C._get_tracing_state() is not None:
                raise RuntimeError("no trace of me.")
            out: torch.Tensor = self.head(self.body(x))
            return out

    with pytest.raises(CannotExplainError, match="torch said: no trace of me; run it without"):
        mg.explain(SCAN, nets.made(Odd), target=0, layer="body", method="gradcam", fast=True)


def test_other_inputs_are_refused() -> None:
    net = nets.made(Branched)
    with pytest.raises(UsageError, match="no other inputs beside fast"):
        mg.explain(SCAN, net, target=0, fast=True, inputs={"age": 3.0})


def test_methods_at_the_input_run_their_predictions_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    net, count = nets.made(Branched), [0]
    plain = mg.explain(SCAN, net, target=0, method="occlusion")
    real = fast._predicted

    def counted(made: fast.Part, x: torch.Tensor) -> Any:
        count[0] += 1
        return real(made, x)

    monkeypatch.setattr(fast, "_predicted", counted)
    found = mg.explain(SCAN, net, target=0, method="occlusion", fast=True)
    assert count[0] > 10
    off = np.abs(found.evidence - plain.evidence).max()
    assert off <= 1e-3 * np.abs(plain.evidence).max()  # differences of scores: their rounding


def test_is_quicker_in_work_done() -> None:
    """What stands in runs no module before the layer."""
    net, ran = nets.made(Branched), []
    with at_rest(net):
        x = nets.batch(nets.scan())
        made, _ = fast.part(net, ["last"], x, fast.Compare(lambda out: lambda o: o[:, 0]))
        for name in ("stem", "down", "deep", "head"):
            real = net.get_submodule(name).forward

            def noted(*given: Any, name: str = name, real: Any = real) -> Any:
                ran.append(name)
                return real(*given)

            net.get_submodule(name).__dict__["forward"] = noted
        with fast.standing_in(net, made):
            capture(net, "last", x, lambda _: lambda o: o[:, 0])
    assert ran == ["head"]
