"""Do many explanations from one forward equal each one's own, at the price of about one?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import med_gradcam as mg
from med_gradcam import many
from med_gradcam.errors import UnknownNameError, UsageError
from med_gradcam.progress import Step
from med_gradcam.secant import pair
from tests.engine import architectures, nets

METHODS = ("secant", "integrated", "hirescam", "gradcam", "layercam", "xgradcam")
SCANS = [nets.volume(seed=seed) for seed in (0, 1, 5, 7)]


class Sorting(nn.Module):
    """Three classes and three resolutions; the scans above are of several classes."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.a = nn.Sequential(nets.conv(1, 4), nn.ReLU())
        self.b = nn.Sequential(nets.conv(4, 6, 2), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.c = nn.Sequential(nets.conv(6, 8, 2), nn.ReLU())
        self.head = nets.Pooled(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.c(self.b(self.a(x))))
        return out


def _sorting(outputs: int = 3) -> nn.Module:
    """Its biases are such that the classes of SCANS differ."""
    net = nets.made(lambda: Sorting(outputs))
    with torch.no_grad():
        scores = torch.cat([net(nets.batch(np.asarray(v.array))) for v in SCANS])
        nets.weight(net, "head.head").mul_(50)
        scores = torch.cat([net(nets.batch(np.asarray(v.array))) for v in SCANS])
        nets.weight(net, "head.head", "bias").sub_(scores.mean(0))
    return net


def _same(made: mg.Explanation, wanted: mg.Explanation, near: float = 1e-6) -> None:
    assert np.abs(made.evidence - wanted.evidence).max() <= near * np.abs(wanted.evidence).max()
    assert made.score == pytest.approx(wanted.score, rel=1e-5, abs=1e-6)
    for name in ("target", "layer", "method", "status", "grid", "cells", "reference", "notices"):
        assert getattr(made, name) == getattr(wanted, name), name
    assert made.warnings == wanted.warnings
    assert made.provenance.parameters == wanted.provenance.parameters


@contextmanager
def _counted(net: nn.Module) -> Iterator[list[int]]:
    """How many scans went through the network at each run, but for those on shapes alone.

    Where its cells lie must be known by now: a probe of that runs it, too.
    """
    found: list[int] = []

    def count(_m: nn.Module, inputs: Any) -> None:
        if inputs[0].device.type != "meta":
            found.append(len(inputs[0]))

    handle = net.register_forward_pre_hook(count)
    try:
        yield found
    finally:
        handle.remove()


# ------------------------------------------------------------------------------ several scans


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_scan_in_a_batch_gets_the_map_of_its_own_class(method: str, batch: int) -> None:
    net = _sorting()
    made = mg.explain_many(SCANS, net, layer="b", method=method, batch=batch)
    alone = [mg.explain(scan, net, layer="b", method=method) for scan in SCANS]
    assert len({e.target.label for e in made}) > 1, "the test is of scans of several classes"
    for one, wanted in zip(made, alone, strict=True):
        _same(one, wanted)


@pytest.mark.parametrize("method", ["secant", "gradcam"])
def test_scans_targets_and_layers_come_in_this_order(method: str) -> None:
    net = _sorting()
    made = mg.explain_many(
        SCANS[:2], net, target=[2, "0-vs-1"], layer="all", method=method, batch=2
    )
    assert [(e.target.label, e.layer) for e in made] == 2 * [
        (label, layer) for label in ("class 2", "class 0-vs-class 1") for layer in ("c", "b", "a")
    ]
    scores = [e.score for e in made[::3]]
    assert len(set(scores)) == 4
    for e in made:
        scan = SCANS[made.index(e) // 6]
        label = e.target.label.replace("class ", "")
        wanted = mg.explain(scan, net, target=label, layer=e.layer, method=method)
        assert np.allclose(e.evidence, wanted.evidence, rtol=1e-5, atol=1e-7)
        assert e.provenance.parameters["target"] == label


def test_batches_share_one_forward() -> None:
    net = _sorting()
    mg.explain(SCANS[0], net, layer="b", method="gradcam")
    with _counted(net) as scans:
        mg.explain_many(SCANS, net, layer="b", method="gradcam", batch=4)
    assert scans == [4, 1], "one for all, and one scan by itself, to see that it gets the same"
    with _counted(net) as scans:
        mg.explain_many(SCANS, net, layer="b", method="gradcam")
    assert scans == [1, 1, 1, 1]


class Mixing(Sorting):
    """Batch norms without statistics of their own take those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.b[1] = nn.BatchNorm3d(6, track_running_stats=False)


class Scaling(Sorting):
    """A step that was meant for one scan."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / x.abs().max())


@pytest.mark.parametrize("kind", [Mixing, Scaling])
def test_a_network_that_mixes_the_scans_of_a_batch_runs_them_one_by_one(kind: Any) -> None:
    net = nets.made(kind)
    made = mg.explain_many(SCANS, net, target=1, layer="c", method="gradcam", batch=4)
    for one, scan in zip(made, SCANS, strict=True):
        _same(one, mg.explain(scan, net, target=1, layer="c", method="gradcam"))


def test_if_nobody_looked_they_would_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a batch is taken as it comes."""
    monkeypatch.setattr(many, "_alone_the_same", lambda *_: True)
    net = nets.made(Mixing)
    made = mg.explain_many(SCANS, net, target=1, layer="c", method="gradcam", batch=4)
    wanted = mg.explain(SCANS[0], net, target=1, layer="c", method="gradcam")
    assert np.abs(made[0].evidence - wanted.evidence).max() > 0.01 * np.abs(wanted.evidence).max()


def test_scans_of_several_sizes_need_no_batch() -> None:
    net, scans = _sorting(), [nets.volume(16), nets.volume(20)]
    with pytest.raises(UsageError, match=r"of one size in a batch, got \(1, 16, 16, 16\) and"):
        mg.explain_many(scans, net, layer="b", method="gradcam", batch=2)
    made = mg.explain_many(scans, net, layer="b", method="gradcam")
    assert [e.evidence.shape[0] for e in made] == [8, 10]
    made = mg.explain_many(scans, net, layer="b", batch=2)
    assert [e.evidence.shape[0] for e in made] == [8, 10], "secant takes them one by one"


# ------------------------------------------------------------------------------ several targets


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "secant"])
def test_fourteen_classes_cost_little_more_than_one(method: str) -> None:
    torch.manual_seed(0)
    net = architectures.monai_networks().resnet18(
        spatial_dims=3, n_input_channels=1, num_classes=14, conv1_t_stride=1
    )
    net.eval()
    scan, work, forwards = nets.volume(32), [], []
    wanted = mg.explain(scan, net, target=9, layer="layer4", method=method)
    for target in ([3], "all"):
        with FlopCounterMode(display=False) as counter, _counted(net) as scans:
            made = mg.explain_many([scan], net, target=target, layer="layer4", method=method)
        work.append(counter.get_total_flops())
        forwards.append(len(scans))
    assert len(made) == 14
    assert [e.target.index for e in made] == [(n,) for n in range(14)]
    assert forwards[0] == forwards[1] == (3 if method == "secant" else 1)
    assert work[1] < 1.5 * work[0]
    assert sum(e.cost_in_forwards for e in made) < 1.5 * forwards[0]
    assert np.abs(made[9].evidence - wanted.evidence).max() <= 1e-6 * np.abs(wanted.evidence).max()
    assert made[9].residual == (None if method != "secant" else pytest.approx(0, abs=1e-5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["b", "auto"])
def test_each_target_gets_the_map_of_its_own(method: str, layer: str) -> None:
    net, targets = _sorting(), [2, "0-vs-1", "auto", lambda out: out[:, 0] - 2 * out[:, 2]]
    made = mg.explain_many(SCANS[:1], net, target=targets, layer=layer, method=method)
    assert len(made) == 4
    for one, target in zip(made, targets, strict=True):
        wanted = mg.explain(SCANS[0], net, target=target, layer=layer, method=method)
        assert np.array_equal(one.evidence, wanted.evidence)
        assert one.warnings == wanted.warnings
        assert one.provenance.parameters == wanted.provenance.parameters


def test_all_outputs_are_as_many_as_the_network_has() -> None:
    for method in ("secant", "gradcam", "integrated"):
        made = mg.explain_many(SCANS[:2], _sorting(), target="all", layer="c", method=method)
        assert [e.target.label for e in made] == 2 * ["class 0", "class 1", "class 2"]
        assert [e.provenance.parameters["target"] for e in made] == 2 * ["#0", "#1", "#2"]


def test_targets_of_a_cut_share_one_pair() -> None:
    net = nets.made(nets.Skip)
    targets = [lambda out: out[:, 0], lambda out: -3 * out[:, 0]]
    mg.explain(SCANS[0], net, layer="layer+side")
    with _counted(net) as scans:
        made = mg.explain_many(SCANS[:1], net, target=targets, layer="layer+side")
    assert len(scans) == 3
    assert [e.status for e in made] == ["complete", "complete"]
    assert np.allclose(made[1].evidence, -3 * made[0].evidence, rtol=1e-5, atol=1e-7)
    assert [len(e.parts) for e in made] == [2, 2]


def test_a_target_without_a_rule_takes_no_other_one_with_it() -> None:
    net = _sorting()
    targets = [1, lambda out: torch.atan2(out[:, 0], out[:, 1])]
    made = mg.explain_many(SCANS[:1], net, target=targets, layer="c")
    assert [e.method for e in made] == ["secant", "integrated"]
    assert [e.status for e in made] == ["complete", "complete"]
    assert not made[0].warnings
    assert any("no rule for aten::atan2" in words for words in made[1].warnings)


def test_a_region_of_each_scan_s_own_prediction() -> None:
    """Of a network that puts out a map, each scan has its own region of a class."""
    net = nets.made(
        lambda: nn.Sequential(
            nets.conv(1, 6), nn.ReLU(), nets.conv(6, 6), nn.ReLU(), nets.conv(6, 2)
        )
    )
    made = mg.explain_many(SCANS[:3], net, target=[1, 0], layer="1", method="gradcam", batch=3)
    alone = [
        mg.explain(scan, net, target=target, layer="1", method="gradcam")
        for scan in SCANS[:3]
        for target in (1, 0)
    ]
    for one, wanted in zip(made, alone, strict=True):
        assert one.target.region == wanted.target.region
        _same(one, wanted)


# ------------------------------------------------------------------------------ several layers


@pytest.mark.parametrize("method", ["secant", "integrated", "gradcam", "hirescam"])
def test_all_layers_are_one_map_per_depth(method: str) -> None:
    net = _sorting()
    made = mg.explain_many(SCANS[:1], net, target=1, layer="all", method=method)
    assert [e.layer for e in made] == ["c", "b", "a"]
    assert [e.evidence.shape for e in made] == [(4,) * 3, (8,) * 3, (16,) * 3]
    for e in made:
        wanted = mg.explain(SCANS[0], net, target=1, layer=e.layer, method=method)
        assert np.allclose(e.evidence, wanted.evidence, rtol=1e-5, atol=1e-7)


def test_all_layers_of_secant_are_complete_and_tell_the_same_sum() -> None:
    (first, *others) = mg.explain_many(SCANS[:1], _sorting(), target=1, layer="all")
    assert first.reference_score is not None
    change = first.score - first.reference_score
    for e in (first, *others):
        assert e.status == "complete"
        assert float(e.evidence.sum(dtype=float)) == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("method", ["secant", "gradcam"])
def test_all_layers_cost_one_pass(method: str) -> None:
    net, batch = _sorting(), nets.batch(nets.scan())
    with FlopCounterMode(display=False) as once, torch.no_grad():
        net(batch)
    with FlopCounterMode(display=False) as counter:
        made = mg.explain_many(SCANS[:1], net, target=[0, 1], layer="all", method=method)
    done = counter.get_total_flops() / once.get_total_flops() - 1  # less the pass on shapes
    said = sum(e.cost_in_forwards for e in made)
    assert 0.85 * said <= done <= 1.15 * said
    assert done < (3 if method == "secant" else 1) + 2.0


def test_one_layer_alone_is_meant_by_explain() -> None:
    with pytest.raises(UsageError, match=r"explain_many\(\.\.\., layer='all'\)"):
        mg.explain(SCANS[0], _sorting(), layer="all")


class Trap(Sorting):
    """What follows `b` takes away the mean that a Grad-CAM weight is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = nn.functional.instance_norm(self.b(self.a(x)))
        out: torch.Tensor = self.head(self.c(seen))
        return out


def test_layers_that_cannot_be_explained_are_left_out_and_told() -> None:
    made = mg.explain_many(SCANS[:1], nets.made(Trap), target=1, layer="all", method="gradcam")
    assert [e.layer for e in made] == ["c", "a"]
    for e in made:
        assert [(t.layer, t.refused) for t in e.trials] == [("b", "norm trap")]
        assert "layer 'b' was passed over: norm trap" in e.warnings


# ------------------------------------------------------------------------------ what is asked


def test_progress_counts_the_scans() -> None:
    steps: list[Step] = []
    mg.explain_many(SCANS, _sorting(), layer="c", progress=steps.append)
    said = [s.what for s in steps if s.what.startswith("scan ")]
    assert said == [f"scan {n} of 4" for n in (1, 2, 3, 4)]


def test_settings_are_those_of_explain() -> None:
    net, reference = _sorting(), nets.volume(seed=9)
    settings: dict[str, Any] = {"reference": reference, "seed": 4, "quick": True, "precise": True}
    (made,) = mg.explain_many(SCANS[:1], net, target=1, layer="b", **settings)
    assert made == mg.explain(SCANS[0], net, target=1, layer="b", **settings).replace(
        provenance=made.provenance
    )
    with pytest.raises(UnknownNameError, match="expected a known setting, got 'quik'"):
        mg.explain_many(SCANS, net, layer="b", quik=True)


@pytest.mark.parametrize(
    ("images", "settings", "says"),
    [
        (SCANS[0], {}, "expected a list of scans, got Volume"),
        (torch.zeros(2, 1, 8, 8, 8), {}, "expected a list of scans, got Tensor"),
        ("scan.nii", {}, "expected a list of scans, got str"),
        (3, {}, "expected a list of scans, got int"),
        (SCANS, {"batch": 0}, "expected a batch of at least one scan, got 0"),
    ],
)
def test_what_is_no_list_of_scans_is_told(images: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        mg.explain_many(images, _sorting(), **settings)


def test_no_scans_have_no_explanations() -> None:
    assert mg.explain_many([], _sorting()) == ()


def test_the_layer_of_every_target_is_its_own_where_it_is_tested() -> None:
    """With layer auto the ways do not differ: nothing is shared that a target decides."""
    net = _sorting()
    for layer in ("auto", "fused"):
        made = mg.explain_many(SCANS[:1], net, target=[0, 1], layer=layer, method="gradcam")
        assert len(made) == 2
        for target, one in enumerate(made):
            wanted = mg.explain(SCANS[0], net, target=target, layer=layer, method="gradcam")
            assert np.array_equal(one.evidence, wanted.evidence)
            assert one.layer == wanted.layer


def test_a_score_of_another_target_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the pair's sweeps are handed out in the wrong order."""
    real = pair.run_all
    monkeypatch.setattr(pair, "run_all", lambda *a, **k: real(*a, **k)[::-1])
    net = _sorting()
    with pytest.raises(Exception, match="a different score each time"):
        mg.explain_many(SCANS[:1], net, target=[0, 1], layer="c")
