"""Do the maps keep the identities of their papers and of algebra (sums, signs, symmetries)?"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.capture import Capture
from med_gradcam.methods import Bound, gradcam, hirescam, integrated
from med_gradcam.target import Link
from tests.engine import nets

LOOSE = Bound(float("inf"), 0.0)
METHODS = {"gradcam": gradcam, "hirescam": hirescam, "integrated": integrated}
Values = npt.NDArray[np.float64]


def _maps(capture: Capture) -> dict[str, Values]:
    return {n: m.evidence(capture, LOOSE).values.numpy() for n, m in METHODS.items()}


def _all(net: nn.Module, layer: str = "first", target: int = 0, link: Link = "none") -> Values:
    """The three maps on top of each other, float64."""
    x, reference = (nets.batch(nets.scan(seed=s), torch.float64) for s in (0, 5))
    score = nets.score_of(target, link)
    return np.stack(list(_maps(nets.captured(net, layer, x, score, reference)).values()))


def _zero_based(net: nn.Module, x: torch.Tensor) -> Capture:
    """A capture whose reference is the zero activation."""
    capture = nets.captured(net, "first", x, None, x)
    capture.baseline = torch.zeros_like(capture.activation)
    capture.reference_score = float(capture.scores(capture.baseline[None])[0])
    return capture


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_before_pooling_and_one_linear_layer_all_methods_are_cam(
    dtype: torch.dtype, near: float
) -> None:
    net = nets.made(nets.pooled_linear, dtype=dtype)
    capture = _zero_based(net, nets.batch(nets.scan(), dtype))
    weight = nets.weight(net, "rest.head")[0].double()
    cells = capture.activation[0].numel()
    cam = torch.einsum("k,kxyz->xyz", weight, capture.activation.double()).numpy() / cells
    for name, values in _maps(capture).items():
        assert np.abs(values - cam).max() < near * np.abs(cam).max(), name


@pytest.mark.parametrize("maker", [nets.pooled_linear, nets.flat_linear])
def test_sums_and_the_bias_give_the_score(maker: Callable[[], nn.Module]) -> None:
    net = nets.made(maker)
    capture = _zero_based(net, nets.batch(nets.scan()))
    maps = _maps(capture)
    for name in ("hirescam", "integrated"):
        total = maps[name].sum() + capture.reference_score
        assert total == pytest.approx(capture.score, rel=1e-5, abs=1e-5)
    if maker is nets.pooled_linear:
        assert maps["gradcam"].sum() == pytest.approx(maps["hirescam"].sum(), rel=1e-5)


def test_hirescam_sums_to_the_score_of_a_bias_free_tail() -> None:
    tail = nn.Sequential(
        nets.conv(6, 6, bias=False),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nets.conv(6, 8, bias=False),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 1, bias=False),
    )
    net = nets.made(lambda: nets.Body(tail), dtype=torch.float64)
    capture = nets.captured(net, "first", nets.batch(nets.scan(), torch.float64))
    total = hirescam.evidence(capture, LOOSE).values.sum()
    assert float(total) == pytest.approx(capture.score, rel=1e-10)


@pytest.mark.parametrize("maker", [nets.gated, nets.max_pooled, nets.instance_normed])
def test_the_map_of_the_negated_score_is_the_negated_map_bit_for_bit(
    maker: Callable[[], nn.Module],
) -> None:
    net = nets.made(maker, dtype=torch.float32)
    x, reference = (nets.batch(nets.scan(seed=s)) for s in (0, 5))
    plain = nets.score_of(1)
    ours = _maps(nets.captured(net, "first", x, plain, reference))
    negated = _maps(nets.captured(net, "first", x, lambda out: -plain(out), reference))
    for name, values in ours.items():
        assert np.array_equal(values, -negated[name]), name
        assert values.any()


@pytest.mark.parametrize("method", METHODS)
def test_two_logits_what_speaks_for_one_speaks_against_the_other_bit_for_bit(method: str) -> None:
    net = nets.made(nets.max_pooled)
    one, other = (
        mg.explain(
            nets.volume(),
            net,
            target=t,
            layer="first",
            method=method,
            reference=nets.volume(seed=5),
        )
        for t in (0, 1)
    )
    assert np.array_equal(one.evidence, -other.evidence)
    assert one.sum_for == other.sum_against
    assert (one.score, one.reference_score) == (
        -other.score,
        None if other.reference_score is None else -other.reference_score,
    )


@pytest.mark.parametrize("maker", [nets.gated, nets.max_pooled, nets.group_normed])
def test_maps_are_linear_in_the_score(maker: Callable[[], nn.Module]) -> None:
    net = nets.made(maker, dtype=torch.float64)
    x, reference = (nets.batch(nets.scan(seed=s), torch.float64) for s in (0, 5))
    parts = [_maps(nets.captured(net, "first", x, nets.score_of(c), reference)) for c in (0, 1)]
    both = _maps(
        nets.captured(net, "first", x, lambda out: 2.0 * out[:, 0] - 3.0 * out[:, 1], reference)
    )
    for name, values in both.items():
        wanted = 2.0 * parts[0][name] - 3.0 * parts[1][name]
        assert np.abs(values - wanted).max() < 1e-10 * np.abs(wanted).max(), name


def test_a_number_added_to_all_logits_changes_nothing() -> None:
    net = nets.made(lambda: nets.flat_linear(3), dtype=torch.float64)
    moved = copy.deepcopy(net)
    head = nets.weight(moved, "rest.1")  # h(x): the same function of the scan on every logit
    head.add_(torch.randn(1, head.shape[1], dtype=torch.float64))
    nets.weight(moved, "rest.1", "bias").add_(7.0)
    one, other = _all(net, target=2, link="softmax"), _all(moved, target=2, link="softmax")
    assert np.abs(one - other).max() < 1e-9 * np.abs(one).max()
    assert np.abs(_all(net, target=2) - _all(moved, target=2)).max() > 0.1 * np.abs(one).max()


def test_channels_may_be_renamed() -> None:
    net = nets.made(nets.gated, dtype=torch.float64)
    other = copy.deepcopy(net)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for part in ("weight", "bias"):
        stem = nets.weight(other, "first.0", part)
        stem.copy_(stem[order].clone())
    tail = nets.weight(other, "rest.0")
    tail.copy_(tail[:, order].clone())
    one, two = _all(net), _all(other)
    assert np.abs(one - two).max() < 1e-10 * np.abs(one).max()


def test_net_evidence_does_not_depend_on_the_basis_of_the_channels() -> None:
    net, other = nets.remixed()
    one, two = _all(net, "0"), _all(other, "0")
    assert np.abs(one - two).max() < 1e-8 * np.abs(one).max()


def test_rescaled_channels_with_a_rescaled_head_change_nothing() -> None:
    net = nets.made(nets.max_pooled, dtype=torch.float64)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.get_submodule("first").parameters():
            parameter.mul_(16.0)
        nets.weight(other, "rest.0.1").div_(16.0)
    one, two = _all(net), _all(other)
    assert np.abs(one - two).max() < 1e-10 * np.abs(one).max()


class _Symmetric(nn.Module):
    """A kernel that looks the same from both sides, stride 2, then mean + linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nets.conv(1, 4, 2), nn.Sequential(nn.ReLU(), nets.Pooled(4))
        with torch.no_grad():
            weight = self.first.weight
            for axis in (2, 3, 4):
                weight.copy_((weight + weight.flip(axis)) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rest(self.first(x))
        return out


@pytest.mark.parametrize(("size", "same"), [(17, True), (16, False)])
def test_a_flipped_scan_gives_the_flipped_map_where_cells_lie_symmetric(
    size: int, same: bool
) -> None:
    net = nets.made(_Symmetric)
    array, other = nets.scan(size), nets.scan(size, seed=5)
    flipped = [np.ascontiguousarray(a[:, ::-1]) for a in (array, other)]
    maps = [
        mg.explain(nets.as_volume(a), net, target=0, layer="first", reference=nets.as_volume(r))
        for a, r in ((array, other), (flipped[0], flipped[1]))
    ]
    off = np.abs(maps[0].evidence - maps[1].evidence[::-1]).max() / np.abs(maps[0].evidence).max()
    assert bool(off < 5e-6) is same  # at even sizes a stride of 2 sees the scan from the other side
    if same:
        grid = maps[0].grid
        assert grid.world_ras([0, 0, 0])[0] + grid.world_ras([8, 0, 0])[0] == size - 1


def test_a_scan_moved_by_strides_gives_the_moved_map() -> None:
    net = nets.made(nets.flat_linear, dtype=torch.float64)
    head = nets.weight(net, "rest.1")  # the same weight at every place
    one = head.view(2, 6, -1).mean(2, keepdim=True)
    head.copy_(one.expand(2, 6, 512).reshape(2, -1))
    array = np.zeros((1, 16, 16, 16), dtype=np.float32)
    array[0, 5:8, 6:9, 5:7] = nets.scan(3)[0][:, :, :2]
    maps = [
        hirescam.evidence(
            nets.captured(net, "first", nets.batch(np.roll(array, n, 1), torch.float64)), LOOSE
        ).values.numpy()
        for n in (0, 4)
    ]
    assert np.abs(maps[0][1:5] - maps[1][3:7]).max() < 1e-12
    assert np.abs(maps[0][1:5] - maps[1][2:6]).max() > 0.1 * np.abs(maps[0]).max()
