"""Do the perturbation methods keep their identities, prices and limits?"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import rerun
from med_gradcam.capture import Capture, capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Cells
from med_gradcam.methods import Bound, ablationcam, hirescam, occlusion, reciprocam, rise, scorecam
from med_gradcam.tail import INPUT, at_rest
from tests.engine import nets

LOOSE = Bound(float("inf"), 0.0)
METHODS: dict[str, ModuleType] = {
    m.__name__.rpartition(".")[2]: m for m in (ablationcam, occlusion, reciprocam, rise, scorecam)
}
TAIL_ONLY = {"ablationcam": ablationcam, "reciprocam": reciprocam}


def _captured(
    net: nn.Module, layer: str = "first", size: int = 16, target: Any = None, channels: int = 1
) -> Capture:
    dtype = next(net.parameters()).dtype
    x, other = (nets.batch(nets.scan(size, seed, channels), dtype) for seed in (0, 5))
    return nets.captured(net, layer, x, target, other)


def _linear(voxels: int = 8, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(voxels**3, 1)).to(dtype).eval()


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# ---------------------------------------------------------------------------- what all promise


@pytest.mark.parametrize("name", METHODS)
def test_each_says_what_it_is(name: str) -> None:
    module = METHODS[name]
    assert all(isinstance(getattr(module, n), str) for n in ("TITLE", "SOURCE", "CANNOT_SHOW"))
    assert (module.PROMISES_SUM, module.BESIDE) == (False, False)
    assert module.SIGNED is (name != "scorecam")
    assert ("input" if name in ("occlusion", "rise") else "layer") == module.LEVEL
    assert module.USES_REFERENCE is (name in ("occlusion", "rise", "scorecam"))


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].SIGNED])
def test_the_map_of_the_negated_score_is_the_negated_map(name: str) -> None:
    net, plain = nets.made(nets.gated), nets.score_of(1)
    layer = INPUT if METHODS[name].LEVEL == "input" else "first"
    maps = [
        METHODS[name].evidence(_captured(net, layer, 16, target), LOOSE).values
        for target in (plain, lambda out: -plain(out))
    ]
    assert torch.equal(maps[0], -maps[1])
    assert maps[0].min() < 0
    assert maps[0].max() > 0
    assert maps[0].dtype == torch.float64


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_the_capture_or_the_network_is_changed(name: str) -> None:
    net = nets.made(nets.gated)
    found = _captured(net, INPUT if METHODS[name].LEVEL == "input" else "first")
    kept = (found.activation.clone(), found.input.clone(), found.reference_input)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first = METHODS[name].evidence(found, LOOSE).values
    assert torch.equal(first, METHODS[name].evidence(found, LOOSE).values)
    assert torch.equal(found.activation, kept[0])
    assert torch.equal(found.input, kept[1])
    assert found.reference_input is kept[2]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bytes_", [1.0, 1e5])
def test_small_batches_give_the_same_map(
    name: str, bytes_: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nets.made(nets.gated, dtype=torch.float64)
    layer = INPUT if METHODS[name].LEVEL == "input" else "first"
    whole = METHODS[name].evidence(_captured(net, layer), LOOSE).values
    monkeypatch.setattr(rerun, "BATCH_BYTES", bytes_)
    assert _far(METHODS[name].evidence(_captured(net, layer), LOOSE).values, whole) < 1e-9


@pytest.mark.parametrize(("makes", "largest"), [(2, 2 * 16**3), (1, 4 * 8**3)])
def test_a_batch_stays_within_its_memory(
    makes: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the largest tensor that the tail makes; what it remembers is not copied."""
    grown = nn.ConvTranspose3d(4, 2, 2, stride=2) if makes == 2 else nets.conv(4, 2)
    wide = nets.conv(1, 64)  # before the layer: 64 channels at full size
    net = nn.ModuleList([wide, nets.conv(64, 4, 2), grown, nets.Pooled(2, 1)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    found = _captured(Net().eval(), "parts.1")
    sizes: list[int] = []
    real = Capture.scores
    monkeypatch.setattr(rerun, "BATCH_BYTES", 3 * rerun.ALIVE * largest * 4)

    def scores(self: Capture, activations: torch.Tensor) -> torch.Tensor:
        sizes.append(len(activations))
        return real(self, activations)

    monkeypatch.setattr(Capture, "scores", scores)
    tail = rerun.behind(found)
    seven = tail.scores(7, lambda s: found.activation.repeat(s.stop - s.start, 1, 1, 1, 1))
    assert sizes == [3, 3, 1]
    assert seven.tolist() == pytest.approx([found.score] * 7, abs=1e-5)


@pytest.mark.parametrize("name", ["occlusion", "rise"])
def test_without_a_reference_there_is_nothing_to_put_in(name: str) -> None:
    found = nets.captured(nets.made(nets.gated), INPUT, nets.batch(nets.scan()))
    with pytest.raises(UsageError, match=f"expected a reference input for the method '{name}'"):
        METHODS[name].evidence(found, LOOSE)


# --------------------------------------------------------------------------- behind the layer only


def _direct(net: nn.Module, layer: str) -> Capture:
    """As explain() makes it for one named layer and no reference: nothing is remembered."""
    with at_rest(net):
        _, found = capture(net, layer, nets.batch(nets.scan()), lambda _: nets.score_of())
    return found


@pytest.mark.parametrize("name", TAIL_ONLY)
@pytest.mark.parametrize("direct", [False, True])
def test_one_pass_of_the_tail_per_channel_or_cell(name: str, direct: bool) -> None:
    net = nets.made(nets.Skip)
    found = _direct(net, "layer") if direct else _captured(net, "layer")
    before, passes = found.forwards, found.passes
    with at_rest(net):
        values = TAIL_ONLY[name].evidence(found, LOOSE).values
    assert found.forwards - before == float(direct)
    scored = {"ablationcam": 4 + 1, "reciprocam": 8**3 + 1}[name]
    assert found.passes - passes == scored + 2
    assert _far(values, TAIL_ONLY[name].evidence(_captured(net, "layer"), LOOSE).values) < 1e-4
    assert found.tail.memory


@pytest.mark.parametrize("direct", [False, True])
def test_what_lies_before_the_layer_is_not_run_again(direct: bool) -> None:
    class Counted(nn.Module):
        ran = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counted.ran += len(x)
            return x

    net = nn.Sequential(nets.conv(1, 4, 2), Counted(), nn.ReLU(), nets.Pooled(4, 1)).eval()
    Counted.ran = 0
    found = _direct(net, "2") if direct else _captured(net, "2")
    assert Counted.ran == (1 if direct else 2)  # the scan (and its reference)
    for module in TAIL_ONLY.values():
        module.evidence(found, LOOSE)
    assert Counted.ran == 2  # recorded once where it was not before


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_before_pooling_and_one_linear_layer_both_are_cam(dtype: torch.dtype, near: float) -> None:
    found = _captured(nets.made(nets.pooled_linear, dtype=dtype))
    cam = hirescam.evidence(found, LOOSE).values
    for name, module in TAIL_ONLY.items():
        assert _far(module.evidence(found, LOOSE).values, cam) < near, name


def test_before_one_linear_layer_reciprocam_is_hirescam_and_ablation_keeps_its_sum() -> None:
    found = _captured(nets.made(nets.flat_linear, dtype=torch.float64))
    wanted = hirescam.evidence(found, LOOSE).values
    assert _far(reciprocam.evidence(found, LOOSE).values, wanted) < 1e-10
    ablated = ablationcam.evidence(found, LOOSE).values
    assert float(ablated.sum()) == pytest.approx(float(wanted.sum()), rel=1e-10)
    assert _far(ablated, wanted) > 0.1  # places are lost


def test_a_negative_score_does_not_turn_the_signs() -> None:
    """The paper divides by the score; a number added to it must change nothing here."""
    net = nets.made(nets.pooled_linear, dtype=torch.float64)
    one = ablationcam.evidence(_captured(net), LOOSE).values
    nets.weight(net, "rest.head", "bias").sub_(100.0)
    other = _captured(net)
    assert other.score < 0
    assert _far(ablationcam.evidence(other, LOOSE).values, one) < 1e-9


def test_signed_activations_do_not_blow_up_a_share() -> None:
    """A channel whose values cancel: its drop is still shared out, bounded by the drop."""
    net = nn.Sequential(nn.Identity(), nets.Gate(2), nets.Pooled(2, 1)).double().eval()
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    x[0, 0] -= x[0, 0].mean() - 1e-12
    found = nets.captured(net, "0", x)
    drops = ablationcam._drops(found, torch.arange(2))
    values = ablationcam.evidence(found, LOOSE).values
    assert float(values.sum()) == pytest.approx(float(drops.sum()), rel=1e-9)
    assert float(values.abs().sum()) <= float(drops.abs().sum()) * (1 + 1e-9)


def test_channels_of_zeros_cost_nothing() -> None:
    net = nets.made(nets.pooled_linear, dtype=torch.float64)
    nets.weight(net, "first.0", "bias")[1:5] = -100.0  # dead behind the ReLU
    found = _captured(net)
    wanted = hirescam.evidence(found, LOOSE).values
    before = found.passes
    values = ablationcam.evidence(found, LOOSE).values
    assert found.passes - before == 2 + 2 + 1
    assert _far(values, wanted) < 1e-10


def test_many_cells_are_masked_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets.made(nets.flat_linear, dtype=torch.float64)
    found = _captured(net)
    fine = reciprocam.evidence(found, LOOSE).values
    monkeypatch.setattr(reciprocam, "MOST_MASKS", 128)
    before = found.passes
    coarse = reciprocam.evidence(found, LOOSE).values
    assert found.passes - before <= 128 + 1 + 2
    assert reciprocam._block((8, 8, 8)) == [2, 2, 1]
    assert reciprocam._block((7, 1, 200)) == [1, 1, 16]
    pooled = fine.reshape(4, 2, 4, 2, 8).sum((1, 3))
    assert _far(coarse.reshape(4, 2, 4, 2, 8).sum((1, 3)), pooled) < 1e-10
    assert torch.equal(coarse[::2, ::2], coarse[1::2, 1::2])


@pytest.mark.parametrize("name", TAIL_ONLY)
def test_explain_hands_it_out(name: str) -> None:
    net = nets.made(nets.gated)
    made = mg.explain(nets.volume(), net, target=1, layer="first", method=name)
    found = _captured(net, "first", 16, nets.score_of(1, "softmax"))
    wanted = TAIL_ONLY[name].evidence(found, LOOSE).values.numpy()
    assert np.abs(made.evidence - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert made.status == "no_sum"


# ---------------------------------------------------------------------------------------- Score-CAM


def test_scorecam_is_never_negative_and_takes_the_channels_that_matter_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(nets.conv(1, 8, 2), nn.Flatten(), nn.Linear(8 * 512, 2)).double().eval()
    found = _captured(net, "0")  # before any ReLU: activations of both signs
    assert found.activation.min() < 0
    assert scorecam.evidence(found, LOOSE).values.min() == 0
    monkeypatch.setattr(scorecam, "MOST_CHANNELS", 3)
    before = found.forwards
    values = scorecam.evidence(found, LOOSE).values
    assert found.forwards - before == 3
    largest = found.gradient().mean((1, 2, 3)).abs().argsort(descending=True)[:3]
    assert scorecam._channels(found).tolist() == largest.tolist()
    rest = [n for n in range(8) if n not in largest.tolist()]
    found.activation[rest] *= 2.0  # channels that were left out leave no trace
    assert torch.equal(scorecam.evidence(found, LOOSE).values, values)


def test_scorecam_passes_over_channels_that_are_the_same_everywhere() -> None:
    net = nets.made(nets.flat_linear)
    nets.weight(net, "first.0")[:] = 0.0
    found = _captured(net)
    before = found.forwards
    assert not scorecam.evidence(found, LOOSE).values.any()
    assert found.forwards == before


def test_scorecam_shows_the_scan_fading_to_the_reference_not_to_air() -> None:
    """Where the mask is zero the network sees the reference's values, where it is one the scan."""
    found = _captured(nets.made(nets.flat_linear, dtype=torch.float64))
    found.gradient()
    seen: list[torch.Tensor] = []
    found.tail.net.register_forward_pre_hook(lambda _m, i: seen.append(i[0].clone()))
    scorecam.evidence(found, LOOSE)
    assert found.reference_input is not None
    masks = (torch.cat(seen) - found.reference_input) / (found.input - found.reference_input)
    assert len(masks) == 6
    assert masks.amin((1, 2, 3, 4)) == pytest.approx(np.zeros(6), abs=1e-9)
    assert masks.amax((1, 2, 3, 4)) == pytest.approx(np.ones(6), abs=1e-9)


@pytest.mark.parametrize("start", [0.0, 3.5])
def test_scorecam_s_masks_lie_where_the_cells_lie(start: float) -> None:
    """One bright cell: the voxels that are shown in full are those at its centre."""
    found = _captured(nets.made(nets.flat_linear))
    found.activation = torch.zeros(6, 2, 2, 2)
    found.activation[0, 1, 1, 1] = 1.0
    found.known_gradient = torch.ones(6, 2, 2, 2)
    found.cells = Cells((8.0, 8.0, 8.0), (start,) * 3, (15.0, 15.0, 15.0), "exact")
    seen: list[torch.Tensor] = []
    found.tail.net.register_forward_pre_hook(lambda _m, i: seen.append(i[0].clone()))
    scorecam.evidence(found, LOOSE)
    assert found.reference_input is not None
    mask = ((seen[0] - found.reference_input) / (found.input - found.reference_input))[0, 0]
    line = mask.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1)
    peak = start + 8.0
    at = torch.arange(16) - start
    expected = ((at / 8).clamp(0, 1) ** 3) / float(min(1.0, (15 - start) / 8, 1.0)) ** 3
    assert torch.allclose(line, expected, atol=1e-3)
    assert int(line.argmax()) == int(np.ceil(peak))


# ---------------------------------------------------------------------------------------- occlusion


def test_four_channels_and_one_logit_do_not_give_a_constant() -> None:
    """A softmax over one logit is 1 everywhere; scores here are log-odds, whatever the channels."""
    torch.manual_seed(0)
    net = nn.Sequential(nets.conv(4, 4, 2), nn.ReLU(), nets.Pooled(4, 1)).eval()
    pair = [nets.batch(nets.scan(16, seed, 4)) for seed in (0, 5)]
    target = nets.score_of(0, "softmax")
    found = nets.captured(net, INPUT, pair[0], target, pair[1])
    values = occlusion.evidence(found, LOOSE).values
    effects = np.array([p.effect for p in occlusion.leaves(found)])
    assert effects.std() > 0.1 * np.abs(effects).max() > 1e-4
    sigmoid = nets.captured(net, INPUT, pair[0], nets.score_of(0, "sigmoid"), pair[1])
    assert torch.equal(occlusion.evidence(sigmoid, LOOSE).values, values)


def test_occlusion_of_a_score_that_adds_is_exact_and_adds_up() -> None:
    net = _linear(8)
    found = _captured(net, INPUT, 8)
    values = occlusion.evidence(found, LOOSE).values
    weight = nets.weight(net, "1").reshape(8, 8, 8)
    assert found.reference_input is not None
    true = weight * (found.input - found.reference_input)[0, 0]
    for patch in occlusion.leaves(found):
        inside = float(true[patch.place].sum())
        assert float(values[patch.place].sum()) == pytest.approx(inside, abs=1e-9)
    assert found.reference_score is not None
    assert float(values.sum()) == pytest.approx(found.score - found.reference_score, rel=1e-9)


class _Ball(nn.Module):
    """The brightness of one corner of the scan, or of the brightest voxel (any copy will do)."""

    def __init__(self, *, brightest: bool = False) -> None:
        super().__init__()
        self.brightest = brightest
        self.weak = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = x[:, 0, 4:8, 4:8, 4:8]
        seen = corner.amax((1, 2, 3)) if self.brightest else corner[:, 1, 2, 3]
        return 3.0 * seen[:, None] + self.weak * x[:, :1, 20, 20, 20]


def _ball(*, brightest: bool) -> Capture:
    x = torch.zeros(1, 1, 32, 32, 32)
    x[..., 4:8, 4:8, 4:8] = x[..., 20, 20, 20] = 1.0
    return nets.captured(
        _Ball(brightest=brightest).eval(), INPUT, x, nets.score_of(), torch.zeros_like(x)
    )


def test_occlusion_looks_closer_only_where_it_pays() -> None:
    found = _ball(brightest=False)
    patches = occlusion.leaves(found)
    assert found.forwards == 64 + 8 + 8
    hit = {(p.start, p.stop, p.effect) for p in patches if p.effect}
    weak = ((16, 16, 16), (24, 24, 24), 0.5)
    assert hit == {((4, 6, 6), (6, 8, 8), 3.0), weak}
    values = occlusion.evidence(found, LOOSE).values
    assert float(values.sum()) == pytest.approx(3.5)
    assert values[5, 6, 7] == pytest.approx(3.0 / 8)


def test_evidence_of_which_any_part_can_be_missed_is_not_lost() -> None:
    """Removing an eighth of the ball changes nothing: the patch that holds it all stays."""
    values = occlusion.evidence(_ball(brightest=True), LOOSE).values
    assert float(values.sum()) == pytest.approx(3.5)
    assert float(values[4:8, 4:8, 4:8].sum()) == pytest.approx(3.0)


def test_occlusion_never_costs_more_than_256_predictions() -> None:
    found = _captured(_linear(32, torch.float32), INPUT, 32)
    occlusion.evidence(found, LOOSE)
    assert found.forwards == 64 + 12 * 8 + 12 * 8


@pytest.mark.parametrize("name", ["occlusion", "rise"])
@pytest.mark.parametrize("shape", [(1, 9, 14), (3, 2, 1), (17, 6, 5)])
def test_odd_and_flat_scans_are_covered(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 1)).double().eval()
    x = torch.randn(1, 1, *shape, dtype=torch.float64)
    found = nets.captured(net, INPUT, x, None, torch.zeros_like(x))
    values = METHODS[name].evidence(found, LOOSE).values
    assert values.shape == shape
    assert found.reference_score is not None
    assert float(values.sum()) == pytest.approx(found.score - found.reference_score, rel=1e-9)


# --------------------------------------------------------------------------------------------- RISE


def test_rise_of_a_score_that_adds_adds_up_and_finds_the_place() -> None:
    net = _linear(16)
    weight = nets.weight(net, "1").reshape(16, 16, 16)
    weight.zero_()
    weight[11:14, 2:5, 6:9] = 1.0
    weight[2:5, 10:13, 10:13] = -1.0
    x = torch.ones(1, 1, 16, 16, 16, dtype=torch.float64)
    found = nets.captured(net, INPUT, x, None, torch.zeros_like(x))
    values = rise.evidence(found, LOOSE).values
    assert float(values.sum()) == pytest.approx(0.0, abs=1e-9)
    up, down = (np.unravel_index(int(v.argmax()), v.shape) for v in (values, -values))
    assert np.abs(np.subtract(up, (12, 3, 7))).max() <= 2
    assert np.abs(np.subtract(down, (3, 11, 11))).max() <= 2


def test_rise_is_seeded() -> None:
    found = _captured(nets.made(nets.gated), INPUT)
    maps = []
    for seed in (0, 0, 1):
        found.seed = seed
        maps.append(rise.evidence(found, LOOSE).values)
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_rise_stops_at_the_bound_or_at_the_most() -> None:
    found = _captured(nets.made(nets.gated), INPUT)
    loose = rise.evidence(found, LOOSE)
    assert loose.nodes == 2 * 2 * 128
    tight = rise.evidence(found, Bound(0.0, 0.0))
    assert tight.nodes == 8 * 2 * 128
    assert found.forwards == loose.nodes + tight.nodes
    assert (loose.converged, loose.start_score) == (None, None)


def test_the_error_at_which_rise_stops_is_the_error_it_makes() -> None:
    """Boxes of the maps of many seeds differ by what one run says of itself."""
    found = _captured(nets.made(nets.max_pooled, dtype=torch.float64), INPUT)
    boxes, said = [], []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        tables = [rise.axes((16, 16, 16), generator.random(3)) for _ in range(3)]
        parts = [rise._fifths(rise.block(found, t, rise.balanced(125, generator))) for t in tables]
        boxes.append(torch.stack(parts).mean(0))
        said.append(rise._errors(parts))
    real = float(torch.stack(boxes).var(0).mean())
    assert 0.6 < float((torch.stack(said) ** 2).mean()) / real < 1.6


def test_no_cell_s_effect_leaks_into_another_s() -> None:
    for cells in (1, 2, 3, 8, 100, 125):
        signs = rise.balanced(cells, np.random.default_rng(cells))
        assert np.abs(signs.T @ signs / len(signs) - np.eye(cells)).max() == 0
        assert len(signs) < 2 * cells
    tosses = np.stack([rise.balanced(6, np.random.default_rng(s))[0] for s in range(2000)])
    assert np.abs(tosses.mean(0)).max() < 0.1
    assert np.abs(tosses.T @ tosses / 2000 - np.eye(6)).max() < 0.1
