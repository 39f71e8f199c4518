"""Do the perturbation methods equal their papers, written out slowly with the whole network?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from med_gradcam.capture import Capture
from med_gradcam.explanation import Cells
from med_gradcam.methods import Bound, _masks, ablationcam, occlusion, reciprocam, rise, scorecam
from med_gradcam.metrics.shapley import shapley
from med_gradcam.tail import INPUT
from tests.engine import nets
from tests.oracle import perturbation as papers

LOOSE = Bound(float("inf"), 0.0)
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]
Pair = tuple[torch.Tensor, torch.Tensor]


def _far(ours: papers.Numbers, theirs: papers.Numbers) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _pair(dtype: torch.dtype = torch.float64, size: int = 16, channels: int = 1) -> Pair:
    one, other = (nets.batch(nets.scan(size, seed, channels), dtype) for seed in (0, 5))
    return one, other


def _at_input(net: nn.Module, pair: Pair, target: Any = None, seed: int = 0) -> Capture:
    found = nets.captured(net, INPUT, pair[0], target, pair[1])
    found.seed = seed
    return found


# ------------------------------------------------------------------ behind the layer: tail = full


@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_ablationcam_equals_the_whole_network_per_channel(
    tail: str, dtype: torch.dtype, near: float
) -> None:
    net, target = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1, "softmax")
    x = nets.batch(nets.scan(), dtype)
    drops = papers.ablation_drops(net, "first", x, target)
    activation = papers.activation_of(net, "first", x).double().numpy()
    ours = ablationcam.evidence(nets.captured(net, "first", x, target), LOOSE).values.numpy()
    assert _far(ours, papers.ablationcam(activation, drops)) < near
    assert ours.sum() == pytest.approx(sum(drops), rel=10 * near)


def test_the_paper_s_ablationcam_follows_from_the_drops() -> None:
    net, target = nets.made(nets.gated, dtype=torch.float64), nets.score_of(1, "softmax")
    x = nets.batch(nets.scan(), torch.float64)
    activation, z = papers.activation_of(net, "first", x).numpy(), papers.score_of(net, x, target)
    theirs = papers.ablationcam_of_the_paper(
        activation, papers.ablation_drops(net, "first", x, target), z
    )
    drops = ablationcam._drops(nets.captured(net, "first", x, target), torch.arange(6)).tolist()
    assert _far(papers.ablationcam_of_the_paper(activation, drops, z), theirs) < 1e-10
    upside_down = papers.ablationcam_of_the_paper(activation, drops, -z)
    assert _far(upside_down, theirs) > 0.5  # what the division does where the score is negative


@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_reciprocam_equals_the_whole_network_per_cell(
    tail: str, dtype: torch.dtype, near: float
) -> None:
    size = 16 if tail in ("flatten + linear", "max pool") else 8
    net, target = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1, "softmax")
    x = nets.batch(nets.scan(size), dtype)
    theirs = papers.reciprocam(net, "first", x, target)
    capture = nets.captured(net, "first", x, target)
    ours = reciprocam.evidence(capture, LOOSE).values.numpy()
    rounding = 1e-2 * near * max(1.0, abs(capture.score))  # of a difference of two scores
    assert np.abs(ours - theirs).max() < rounding
    assert np.abs(theirs).max() > 50 * rounding


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "layer4"])
def test_tail_ablation_equals_full_ablation_in_a_monai_network(layer: str) -> None:
    from monai.networks.nets.resnet import ResNet

    torch.manual_seed(0)
    net = ResNet(
        "basic", [1, 1, 1, 1], [4, 6, 8, 10], n_input_channels=1, num_classes=3, conv1_t_stride=2
    ).eval()
    x, target = nets.batch(nets.scan(32)), nets.score_of(2, "softmax")
    drops = papers.ablation_drops(net, layer, x, target)
    capture = nets.captured(net, layer, x, target)
    ours = ablationcam._drops(capture, torch.arange(len(drops))).numpy()
    assert np.abs(ours - drops).max() < 1e-6 * max(1.0, abs(capture.score))
    assert np.abs(drops).max() > 1e-4


# ----------------------------------------------------------------------------- whole predictions


@pytest.mark.parametrize("layer", ["first", "first.0"])  # behind and before the ReLU
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_scorecam_equals_the_paper(
    layer: str, known: bool, dtype: torch.dtype, near: float
) -> None:
    net, target, pair = (
        nets.made(nets.gated, dtype=dtype),
        nets.score_of(1, "softmax"),
        _pair(dtype),
    )
    start, jump = ([0.0] * 3 if known else [0.5] * 3), [2.0] * 3
    capture = nets.captured(net, layer, pair[0], target, pair[1])
    if known:
        capture.cells = Cells((2.0, 2.0, 2.0), (0.0, 0.0, 0.0), (3.0, 3.0, 3.0), "exact")
    theirs = papers.scorecam(net, layer, pair, target, (start, jump))
    ours = scorecam.evidence(capture, LOOSE).values.numpy()
    assert _far(ours, theirs) < near
    other = papers.scorecam(net, layer, pair, target, ([4.0] * 3, jump))
    air = papers.scorecam(net, layer, (pair[0], 0 * pair[1]), target, (start, jump))
    assert min(_far(other, theirs), _far(air, theirs)) > 10 * near  # the oracle can tell


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_every_patch_of_occlusion_has_the_paper_s_effect(
    channels: int, dtype: torch.dtype, near: float
) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nets.conv(channels, 4, 2), nn.ReLU(), nets.Pooled(4, 3)).to(dtype).eval()
    target, pair = nets.score_of(2, "softmax"), _pair(dtype, 12, channels)
    capture = _at_input(net, pair, target)
    values = occlusion.evidence(capture, LOOSE).values.numpy()
    patches = occlusion.leaves(capture)
    covered = np.zeros(values.shape, dtype=int)
    effects, sums = [], []
    for patch in patches:
        box = list(zip(patch.start, patch.stop, strict=True))
        effects.append(papers.occlusion_effect(net, pair, target, box))
        sums.append(values[patch.place].sum())
        assert np.ptp(values[patch.place]) == 0
        covered[patch.place] += 1
    assert (covered == 1).all()
    assert len({tuple(np.subtract(p.stop, p.start)) for p in patches}) > 1  # some were cut
    assert _far(np.array(sums), np.array(effects)) < near


def _rise(capture: Capture, shift: Sequence[float], seeds: int) -> tuple[papers.Numbers, ...]:
    """Mean of the package's blocks on one grid, and its standard error."""
    found = []
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        table = rise.axes(capture.input.shape[2:], shift)
        cells = int(np.prod([t.shape[1] for t in table]))
        found.append(rise.block(capture, table, rise.balanced(cells, generator)).numpy())
    return np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(seeds)


def _too_far(mean: papers.Numbers, error: papers.Numbers, exact: papers.Numbers) -> bool:
    return bool((np.abs(mean - exact) > 4.5 * error + 1e-9).any())


def _small() -> tuple[nn.Module, Pair]:
    """Strong interactions between eight cells."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nets.conv(1, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 64, 8),
        nn.SiLU(),
        nn.Linear(8, 1),
    )
    return net.double().eval(), _pair(torch.float64, 8)


def test_rise_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all 256 masks of eight cells; the paper's own sum gives the same, but for scale."""
    monkeypatch.setattr(rise, "CELLS", 2)
    net, pair = _small()
    target, shift = nets.score_of(), (0.5, 0.5, 0.5)
    kept, masks = papers.rise_masks((2, 2, 2), (8, 8, 8), shift)
    scores = papers.rise_scores(net, pair, target, masks)
    exact = papers.rise(scores, kept, masks)
    mean, error = _rise(_at_input(net, pair, target), shift, 60)
    assert not _too_far(mean, error, exact)
    assert error.max() < 0.2 * np.abs(exact).max()
    voxels = 8**3 / 8  # at this shift all cells are of one size
    paper = papers.rise_of_the_paper(scores, masks)
    assert _far(2 * (paper - scores.mean()) / voxels, exact) < 1e-10
    for wrong in (paper / voxels, exact / 2, -exact):  # not centred, p for p (1 - p), the sign
        assert _too_far(mean, error, wrong)


def test_rise_is_exact_where_effects_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rise, "CELLS", 2)
    torch.manual_seed(4)
    net = nn.Sequential(nets.conv(1, 4, 2), nn.Flatten(), nn.Linear(4 * 64, 1)).double().eval()
    pair, target, shift = _pair(torch.float64, 8), nets.score_of(), (0.1, 0.8, 0.3)
    kept, masks = papers.rise_masks((2, 2, 2), (8, 8, 8), shift)
    exact = papers.rise(papers.rise_scores(net, pair, target, masks), kept, masks)
    mean, _ = _rise(_at_input(net, pair, target), shift, 2)
    assert _far(mean, exact) < 1e-10
    whole = papers.score_of(net, pair[0], target) - papers.score_of(net, pair[1], target)
    assert mean.sum() == pytest.approx(whole, rel=1e-10)


# --------------------------------------------------------------------------------------- Shapley


@pytest.mark.parametrize("tail", ["gate", "instance norm", "SiLU MLP", "max pool"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_shapley_values_equal_the_mean_over_all_orders(
    tail: str, dtype: torch.dtype, near: float
) -> None:
    net, target, pair = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1), _pair(dtype)
    capture = nets.captured(net, "first", pair[0], target, pair[1])
    here, there = (papers.activation_of(net, "first", x) for x in pair)
    masks = soft_blocks()
    every = [*masks, 1 - masks.sum(0)]

    def value(coalition: frozenset[int]) -> float:
        mask = torch.tensor(sum(every[r] for r in sorted(coalition)) + 0 * every[0]).to(dtype)
        return papers.score_with(net, "first", pair[0], target, there + mask * (here - there))

    theirs = papers.shapley(value, 4)
    found = shapley(capture, masks, seed=0)
    rounding = near * max(1.0, abs(capture.score))
    assert np.abs(found.values - theirs).max() < rounding
    assert np.abs(theirs).max() > 50 * rounding
    assert found.passes == 16
    assert not found.standard_errors.any()


def soft_blocks() -> papers.Numbers:
    """Three regions of 8^3 cells with soft edges, which meet and leave something uncovered."""
    masks = np.zeros((3, 8, 8, 8))
    masks[0, :3], masks[0, 3] = 1.0, 0.4
    masks[1, 3], masks[1, 4:, :4] = 0.5, 0.9
    masks[2, 4:, 4:, 2:] = 0.8
    return masks


def test_masks_laid_corner_to_corner_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: what other packages do in 3D."""
    net, pair = nets.made(nets.gated, dtype=torch.float64), _pair()
    theirs = papers.scorecam(net, "first", pair, nets.score_of(), ([0.5] * 3, [2.0] * 3))
    real = _masks.axis
    monkeypatch.setattr(
        _masks, "axis", lambda v, c, _s, _j: real(v, c, 0.0, (v - 1) / max(c - 1, 1))
    )
    capture = nets.captured(net, "first", pair[0], None, pair[1])
    assert _far(scorecam.evidence(capture, LOOSE).values.numpy(), theirs) > 1e-6
