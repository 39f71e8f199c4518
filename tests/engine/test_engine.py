"""Does explain() put the pieces together: layer, cost, grid, seeds, progress?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import med_gradcam as mg
from med_gradcam.engine import explain
from med_gradcam.errors import Cancelled, ModelError, UnknownNameError, UsageError
from med_gradcam.graph import trace
from med_gradcam.layers import candidates
from med_gradcam.model import InputSpec, Model
from med_gradcam.progress import Step
from tests.engine import nets

METHODS = ("integrated", "gradcam", "hirescam")


class Deep(nn.Module):
    """Five resolutions; `s3.2` is a pool, which says nothing that the layer before it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.s1 = nn.Sequential(nets.conv(1, 4), nn.ReLU())
        self.s2 = nn.Sequential(nets.conv(4, 4, 2), nn.BatchNorm3d(4), nn.ReLU())
        self.s3 = nn.Sequential(nets.conv(4, 6, 2), nn.ReLU(), nets.conv(6, 6), nn.ReLU())
        self.pool = nn.MaxPool3d(2)
        self.s4 = nn.Sequential(nets.conv(6, 8), nn.ReLU())
        self.s5 = nn.Sequential(nets.conv(8, 8, 2), nn.ReLU())
        self.head = nets.Pooled(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.s5(self.s4(self.pool(self.s3(self.s2(self.s1(x)))))))
        return out


def _deep() -> nn.Module:
    return nets.made(Deep)


def test_candidates_are_the_last_layers_of_the_coarsest_resolutions() -> None:
    model = Model(_deep(), InputSpec(), weights_sha256="0")
    found = [info.name for info in candidates(model, trace(model.net, (1, 32, 32, 32)))]
    assert found == ["s5", "s4", "s3", "s2"]
    small = [info.name for info in candidates(model, trace(model.net, (1, 16, 16, 16)))]
    assert small == ["s4", "s3", "s2", "s1"], "s5 has one cell per axis there"


def test_aliases_of_the_model_are_the_author_s_choice() -> None:
    model = Model(_deep(), InputSpec(), aliases={"one": "s2.2", "two": "s3.1"}, weights_sha256="0")
    found = [info.name for info in candidates(model, trace(model.net, (1, 32, 32, 32)))]
    assert found == ["s3.1", "s2.2"]
    made = mg.explain(nets.volume(), model, layer="one", target=0)
    assert made.layer == "s2.2"


def test_auto_reports_the_trials_and_takes_the_winner() -> None:
    made = mg.explain(nets.volume(40), _deep(), target=0, reference="value:0.2", link="none")
    slopes = {t.layer: t.slope for t in made.trials if not t.refused}
    assert list(slopes) == ["s5", "s4", "s3", "s2"]
    off = {name: abs(slope - 1) for name, slope in slopes.items() if slope is not None}
    assert off[made.layer] <= min(off.values()) + 0.05
    assert [r.chosen for r in made.regions][::2][:2] == ["top raising", "top lowering"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["s3", "auto"])
def test_the_stated_cost_is_the_work_done(method: str, layer: str) -> None:
    """In multiply-adds, counted by torch; the pass on shapes alone costs nothing."""
    net = _deep()
    with FlopCounterMode(display=False) as once, torch.no_grad():
        net(nets.batch(nets.scan(24)))
    forward = once.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        made = mg.explain(
            nets.volume(24), net, target=0, layer=layer, method=method, reference="value:0.2"
        )
    done = counter.get_total_flops() / forward - 1.0  # less the pass on shapes
    # A backward is reckoned as one forward: its weights are frozen.
    assert 0.85 * made.cost_in_forwards <= done <= 1.15 * made.cost_in_forwards
    if method != "integrated" and layer == "s3":
        assert done < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_explanation(method: str) -> None:
    made = [mg.explain(nets.volume(24), _deep(), method=method, seed=3) for _ in range(2)]
    assert np.array_equal(made[0].evidence, made[1].evidence)
    assert made[0].regions == made[1].regions
    assert made[0].trials == made[1].trials
    assert made[0].provenance.seed == 3


def test_the_global_random_state_is_left_alone() -> None:
    net = _deep()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is the point
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    mg.explain(nets.volume(24), net)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002


def test_cells_lie_on_the_scan_s_own_affine() -> None:
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1.0]])
    made = mg.explain(nets.scan(24), _deep(), layer="s3", affine=affine)
    assert made.cells.jump == (4.0, 4.0, 4.0)
    assert made.cells.start == (0.0, 0.0, 0.0)
    assert made.cells.how == "exact"
    assert made.grid.shape == (6, 6, 6)
    assert np.allclose(made.grid.world_ras([2, 1, 3]), made.image.world_ras([8, 4, 12]))
    assert made.cell_mm == pytest.approx((6.0, 8.0, 12.0))


def test_bare_arrays_tensors_and_volumes_are_the_same() -> None:
    array, net = nets.scan(), nets.made(nets.gated)
    kinds: list[Any] = [array, array[0], array[None], torch.tensor(array), array.astype(np.float64)]
    made = [mg.explain(kind, net, layer="first").evidence for kind in kinds]
    assert all(np.array_equal(made[0], other) for other in made[1:])


def test_progress_goes_up_and_ends() -> None:
    steps: list[Step] = []
    mg.explain(nets.volume(), _deep(), layer="s3", progress=steps.append)
    named = [s for s in steps if s.what]
    assert [s.done for s in named] == sorted(s.done for s in named)
    assert named[-1].what == "placing the cells"
    assert all(s.done < s.total for s in named)
    assert len(steps) > 3 * len(named), "a stop is possible between any two layers"


def test_a_stop_passes_through_as_it_is() -> None:
    def stop(_step: Step) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        explain(nets.volume(), _deep(), progress=stop)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "gradkam"}, "expected a known method, got 'gradkam'"),
        ({"target": "7"}, "expected a known class, got '7'"),
        ({"layer": "s33"}, "expected a known layer, got 's33'"),
    ],
)
def test_unknown_names_list_the_near_ones(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownNameError, match=words):
        mg.explain(nets.volume(), _deep(), **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "warp"}, "expected a device such as auto"),
        ({"threads": 0}, "expected at least one thread, got 0"),
        ({"link": "logit"}, "expected a link of softmax, sigmoid, none"),
        ({"reference": "blur"}, "expected a reference of auto"),
        ({"at": "ijk:1,1,1"}, "takes the whole scan"),
    ],
)
def test_settings_that_do_not_exist_are_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        mg.explain(nets.volume(), _deep(), **settings)


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(ModelError, match=r"expected a Model .* got str"):
        mg.explain(nets.volume(), "net.pt")


class Caching(nn.Module):
    """Makes a table at its first forward and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nets.conv(1, 4, 2), nets.Pooled(4)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = torch.relu(self.layer(x))
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, layer.shape[-1], device=x.device)
        out: torch.Tensor = self.head(layer * self.table)
        return out


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_keeps_a_table_is_not_given_one_without_values(method: str) -> None:
    net = nets.made(Caching)
    made = mg.explain(nets.volume(), net, layer="layer", method=method)
    assert made.status in ("complete", "no_sum")
    assert not getattr(net.table, "is_meta", False)
    assert torch.isfinite(net(nets.batch(nets.scan()))).all()


class Turned(nn.Module):
    """Turns the scan round before its first layer: the recursion cannot follow, the probe can."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nets.conv(1, 4, 2), nn.ReLU())
        self.b = nn.Sequential(nets.conv(4, 4, 2), nn.ReLU())
        self.head = nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flip(2).flip(2)
        out: torch.Tensor = self.head(self.b(self.a(x)))
        return out


def test_layers_whose_cells_only_the_probe_knows_can_be_chosen() -> None:
    net = nets.made(Turned)
    model = Model(net, InputSpec(), aliases={"fine": "a", "coarse": "b"}, weights_sha256="0")
    made = mg.explain(nets.volume(), model, target=0)
    assert made.layer in ("a", "b")
    assert made.cells.how == "measured"
    assert {t.layer for t in made.trials} == {"a", "b"}


@pytest.mark.parametrize("method", METHODS)
def test_the_device_is_that_of_the_call(method: str) -> None:
    made = mg.explain(nets.volume(), _deep(), layer="s3", method=method, device="cpu")
    assert made.provenance.device == "cpu"
