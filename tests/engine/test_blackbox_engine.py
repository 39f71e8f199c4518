"""Is a black box explained as the network inside it would be, at its price, and nothing else?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import gradient_free, inspection
from med_gradcam.blackbox import Predictor
from med_gradcam.errors import (
    Cancelled,
    CannotExplainError,
    UsageError,
)
from tests.engine import nets
from tests.engine.boxes import Box, Precise, far, scores
from tests.engine.boxes import net as _net

Floats = npt.NDArray[np.float32]
SIZE = 12


# ------------------------------------------------------------------- the same as the network itself


@pytest.mark.parametrize("method", ["occlusion", "rise"])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_map_is_that_of_the_network_inside(method: str, batch: int) -> None:
    box = Box(Precise(_net()))
    volume = nets.volume(SIZE)
    e = mg.explain(volume, mg.BlackBox(box, batch=batch), method=method, target=1)
    known = mg.explain(volume, box.net, method=method, target=1)
    assert far(e, known) < 1e-6
    assert e.score == pytest.approx(known.score, abs=1e-6)
    assert e.reference_score == pytest.approx(known.reference_score, abs=1e-6)
    assert (e.cells, e.grid, e.layer, e.reference) == (
        known.cells,
        known.grid,
        "@input",
        known.reference,
    )
    assert e.cells.how == "exact"
    assert max(box.sizes) == batch


def test_shapley_values_are_those_of_the_network_inside() -> None:
    box = Box(_net())
    volume = nets.volume(SIZE)
    labels = np.zeros((SIZE,) * 3, dtype=np.int32)
    labels[1:5, 2:6, 3:7], labels[6:10, 6:10, 2:6] = 1, 2
    found = mg.shapley(volume, mg.BlackBox(box, batch=4), regions=labels, target=1)
    known = mg.shapley(volume, box.net, regions=labels, target=1, layer="@input")
    ours, theirs = ([row.value for row in (*one.regions, one.elsewhere)] for one in (found, known))
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
    assert np.abs(theirs).max() > 1e-3
    assert found.residual == pytest.approx(0, abs=1e-5)
    assert box.asked <= found.forwards


def test_components_of_the_map_have_shapley_values() -> None:
    found = mg.shapley(nets.volume(SIZE), mg.BlackBox(Box(_net()), batch=32), target=1, most=2)
    assert 1 <= len(found.regions) <= 2
    assert found.explanation.method == "occlusion"


def test_a_segmentation_is_explained_by_its_predicted_region() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nets.conv(1, 3), nn.ReLU(), nets.conv(3, 2)).eval()
    box = Box(net)
    volume = nets.volume(8)
    e = mg.explain(volume, mg.BlackBox(box, batch=16), target="1@voxel:ras:4,4,4")
    known = mg.explain(volume, net, target="1@voxel:ras:4,4,4", method="occlusion")
    assert e.target == known.target
    assert far(e, known) < 1e-6


def test_several_targets_share_the_predictions() -> None:
    box = Box(_net())
    several = mg.explain_many([nets.volume(SIZE)], mg.BlackBox(box, batch=8), target=[0, 1])
    alone = mg.explain(nets.volume(SIZE), mg.BlackBox(Box(box.net), batch=8), target=1)
    assert far(several[1], alone) == 0.0
    assert box.again == 2, "the scan is run a second time for each target, and nothing else is"
    assert sum(e.cost_in_forwards for e in several) > box.asked


# ------------------------------------------------------------------------------ price and memory


def test_no_prediction_is_paid_twice_but_the_one_that_shows_that_it_repeats() -> None:
    box = Box(_net())
    e = mg.explain(nets.volume(SIZE), mg.BlackBox(box, batch=5), target=1)
    assert box.again == 1
    assert box.asked <= e.cost_in_forwards <= box.asked + 2
    quick = Box(_net())
    mg.explain(nets.volume(SIZE), mg.BlackBox(quick, batch=5), target=1, quick=True)
    assert quick.again == 0


def test_nothing_is_remembered_from_one_call_to_the_next() -> None:
    factor = [1.0]
    model = mg.BlackBox(lambda v: factor[0] * scores(1.0)(v), link="none")
    volume = nets.volume(SIZE)
    first = mg.explain(volume, model).score
    factor[0] = 3.0
    assert mg.explain(volume, model).score == pytest.approx(3 * first)


def test_equal_volumes_of_one_batch_are_asked_once() -> None:
    box = Box(_net())
    net = mg.BlackBox(box, batch=8).net
    assert isinstance(net, Predictor)
    x = nets.batch(nets.scan(8)).repeat(5, 1, 1, 1, 1)
    x[3] += 1
    with net.remembering():
        out = net(x)
        assert box.sizes == [2]
        assert torch.equal(out[0], out[4])
        assert not torch.equal(out[0], out[3])
    assert torch.allclose(out, box.net(x), atol=1e-6)


def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("med_gradcam.blackbox.MEMORY_BYTES", 3 * 8)  # three rows of two
    box = Box(_net())
    net = mg.BlackBox(box, batch=8).net
    assert isinstance(net, Predictor)
    x = torch.randn(6, 1, 8, 8, 8)
    with net.remembering():
        assert torch.equal(net(x), net(x))
        assert net.known is not None
        assert len(net.known) == 3
    assert net.known is None


def test_a_black_box_that_never_says_the_same_twice_is_refused() -> None:
    generator = np.random.default_rng(0)
    noisy = Box(_net(), lambda s: s.numpy() + generator.normal(0, 0.1, s.shape))
    with pytest.raises(CannotExplainError, match="a different score each time"):
        mg.explain(nets.volume(SIZE), mg.BlackBox(noisy), target=1)


def test_work_can_be_stopped_between_two_batches() -> None:
    box = Box(_net())

    def stop(step: mg.Step) -> None:
        if len(box.sizes) >= 4:
            raise Cancelled("enough")

    model = mg.BlackBox(box, batch=3)
    with pytest.raises(Cancelled):
        mg.explain(nets.volume(SIZE), model, target=1, progress=stop)
    assert len(box.sizes) == 4
    assert not any(m._forward_pre_hooks for m in model.net.modules())


def test_who_waits_hears_of_every_batch() -> None:
    box, said = Box(_net()), []
    mg.explain(nets.volume(SIZE), mg.BlackBox(box, batch=3), progress=lambda s: said.append(s.what))
    assert sum(what.startswith("prediction ") for what in said) == len(box.sizes)


# ------------------------------------------------------------------------------- methods and layers


def test_the_default_method_gives_way_and_says_so() -> None:
    e = mg.explain(nets.volume(SIZE), mg.BlackBox(Box(_net()), batch=16), target=1)
    assert e.method == "occlusion"
    assert "secant needs gradients (it is a black box); occlusion took over" in e.warnings
    named = mg.explain(
        nets.volume(SIZE), mg.BlackBox(Box(_net()), batch=16), target=1, method="occlusion"
    )
    assert not any("took over" in w for w in named.warnings)


@pytest.mark.parametrize("method", ["integrated", "gradcam", "saliency", "integrated_gradients"])
def test_methods_that_need_gradients_are_refused_in_one_sentence(method: str) -> None:
    box = Box(_net())
    with pytest.raises(
        UsageError, match=r"predictions only \(occlusion, rise\).*it is a black box"
    ):
        mg.explain(nets.volume(SIZE), mg.BlackBox(box), method=method)
    assert not box.sizes


def test_the_methods_that_work_are_those_that_say_so() -> None:
    assert gradient_free.methods() == ["occlusion", "rise"]


@pytest.mark.parametrize("layer", ["net.first", "asked", "a+b"])
def test_a_layer_is_refused(layer: str) -> None:
    with pytest.raises(UsageError, match=r"'@input' or 'auto', got .* no layers to look at"):
        mg.explain(nets.volume(SIZE), mg.BlackBox(Box(_net())), layer=layer)


@pytest.mark.parametrize("layer", ["auto", "@input", "input", "fused"])
def test_the_input_may_be_named(layer: str) -> None:
    model = mg.BlackBox(Box(_net()), batch=32)
    assert mg.explain(nets.volume(8), model, layer=layer, target=1).layer == "@input"


def test_what_else_cannot_be_asked_is_said() -> None:
    model, volume = mg.BlackBox(Box(_net())), nets.volume(SIZE)
    with pytest.raises(UsageError, match="expected no fast"):
        mg.explain(volume, model, fast=True)
    with pytest.raises(UsageError, match="inside its predict function"):
        mg.explain(volume, model, inputs={"age": 3})
    refused: list[Callable[[], object]] = [
        lambda: mg.doctor(model, volume),
        lambda: mg.concepts(volume, model),
    ]
    for ask in refused:
        with pytest.raises(CannotExplainError, match=r"expected a network with gradients for"):
            ask()


def test_a_black_box_is_inspected_without_a_prediction() -> None:
    box = Box(_net())
    report = mg.inspect(mg.BlackBox(box, labels=("a", "b")))
    assert (report["layers"], report["labels"]) == ([], ["a", "b"])
    assert inspection.as_text(report).endswith(
        "no layers (it is a black box); methods: occlusion, rise"
    )
    assert not box.sizes


def test_the_network_is_never_run_on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a black box has no layers to follow")

    monkeypatch.setattr("med_gradcam.case.trace", never)
    mg.explain(nets.volume(8), mg.BlackBox(Box(_net()), batch=32), target=1)


def test_any_network_that_says_so_is_explained_by_its_predictions() -> None:
    class Fallback(nn.Module):
        gradient_free = "the operator X has no form here"

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                out: torch.Tensor = self.net(x)
            return out

    net = _net()
    e = mg.explain(nets.volume(8), Fallback(net), target=1)
    assert far(e, mg.explain(nets.volume(8), net, target=1, method="occlusion")) < 1e-6
    assert any("the operator X has no form here" in w for w in e.warnings)
