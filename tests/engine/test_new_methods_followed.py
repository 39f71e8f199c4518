"""FullGrad and ShapleyCAM: do they follow any network, and refuse what they cannot follow?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from med_gradcam.capture import capture as direct
from med_gradcam.errors import CannotExplainError
from med_gradcam.methods import Bound, fullgrad, shapleycam
from med_gradcam.tail import INPUT, at_rest
from tests.engine import nets

LOOSE = Bound(float("inf"), 0.0)


class Branches(nn.Module):
    """Bare functions, views, slices, work in place, attention: all that has no module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nets.conv(1, 4, 2), nets.conv(4, 4), nn.InstanceNorm3d(2)
        self.shift = nn.Parameter(torch.randn(4, 1, 1, 1))
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.25
        a = torch.nn.functional.elu(self.a(x) * 1.5 - 0.1)
        a += self.shift
        one, two = self.b(a)[:, :, 1:].chunk(2, 1)
        both = torch.cat([self.norm(one), torch.sigmoid(two) * one], 1)
        both = torch.nn.functional.relu(both, inplace=True) + 0.3
        total = torch.full_like(both.detach(), 0.2)  # a buffer that is written to
        total += both
        tokens = torch.nn.functional.avg_pool3d(total, 2).flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        out: torch.Tensor = self.head(tokens.softmax(1).amax(1))
        return out


@pytest.mark.parametrize("tail", [*nets.TAILS, "branches"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fullgrad_is_complete_for_any_network(tail: str, dtype: torch.dtype, near: float) -> None:
    net = nets.made(nets.TAILS.get(tail, Branches), dtype=dtype)
    if tail == "branches":
        nets.weight(net, "attend", "in_proj_bias").add_(0.3)
    score = nets.score_of(1, "softmax")
    capture = nets.captured(net, INPUT, nets.batch(nets.scan(), dtype), score)
    found = fullgrad.evidence(capture, Bound(near * 10, near))
    assert found.start_score is not None
    total = float(found.values.sum()) + found.start_score
    assert total == pytest.approx(capture.score, abs=near * max(1, float(found.values.abs().sum())))
    assert found.converged
    inputs = float((capture.gradient() * capture.activation).double().sum())
    assert abs(inputs + found.start_score - capture.score) > 1e-4  # biases with places count


def test_fullgrad_is_complete_for_a_monai_densenet() -> None:
    from monai.networks.nets.densenet import DenseNet

    torch.manual_seed(0)
    net = DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)).eval()
    capture = nets.captured(net, INPUT, nets.batch(nets.scan(32)), nets.score_of(1, "softmax"))
    found = fullgrad.evidence(capture, Bound(1e-5, 0.0))
    assert found.converged
    assert float(found.values.abs().sum()) > 0.1


class Cut(nn.Module):
    """Hands on the scan from voxel `first` of its last axis on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.first :]


@pytest.mark.parametrize("first", [0, 4])
def test_fullgrad_puts_a_bias_where_its_cells_are(first: int) -> None:
    """A bias seen by one corner of the map only: its evidence lies in that corner."""
    count = 4 * 4 * (16 - first) // 4
    net = nets.made(
        lambda: nn.Sequential(Cut(first), nets.conv(1, 2, 4), nn.Flatten(), nn.Linear(2 * count, 1))
    )
    with torch.no_grad():
        nets.weight(net, "1").zero_()
        nets.weight(net, "1", "bias").copy_(torch.tensor([3.0, 0.0]))
        nets.weight(net, "3").zero_()
        nets.weight(net, "3", "bias").zero_()
        nets.weight(net, "3")[0, 1] = 2.0  # channel 0, cell (0, 0, 1): 4 voxels behind the first
    found = fullgrad.evidence(
        nets.captured(net, INPUT, nets.batch(nets.scan()), nets.score_of(0)), Bound(1e-6, 0.0)
    )
    assert float(found.values.sum()) == pytest.approx(6.0)
    assert found.start_score == 0.0
    at = first + 4
    assert float(found.values[:4, :4, at - 3 : at + 4].sum()) == pytest.approx(6.0)
    assert float(found.values.max()) == pytest.approx(float(found.values[0, 0, at]))


def _blocks(norm: nn.Module, act: nn.Module) -> nn.Module:
    return nn.Sequential(
        nets.conv(1, 4), norm, act, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm3d(4, affine=True), nn.GroupNorm(2, 4), nn.BatchNorm3d(4)]
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.SiLU()])
def test_fullgrad_is_the_same_when_work_is_done_in_place(norm: nn.Module, act: nn.Module) -> None:
    """The block of nnU-Net: torch gives an InstanceNorm's output as a view."""
    net = nets.made(lambda: _blocks(norm, act), dtype=torch.float64)
    capture = nets.captured(net, INPUT, nets.batch(nets.scan(), torch.float64), nets.score_of(1))
    plain = fullgrad.evidence(capture, Bound(1e-10, 0.0))
    net.get_submodule("2").inplace = True  # type: ignore[assignment]
    inside = fullgrad.evidence(capture, Bound(1e-10, 0.0))
    assert inside.start_score == pytest.approx(plain.start_score, abs=1e-12)
    assert torch.allclose(inside.values, plain.values, rtol=0, atol=1e-12)
    assert float(plain.values.abs().sum()) > 0.01


class InPlace(nn.Module):
    """The same network, writing to whole tensors, views and slices (or not)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nets.conv(1, 4), nets.conv(4, 4), nn.InstanceNorm3d(4)
        self.mix, self.head, self.inside = nn.Linear(4, 4), nn.Linear(4, 2), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.a(x))
        halves = torch.full_like(h, 0.5)[:, :2]
        if self.inside:
            view = h[:, 1:3]
            view += 0.3  # what it is a view of goes on
            view.sigmoid_()
            h = h * 1.5
            h[:, :, 2:5] = 0.25
            h[:, :2] += halves
            residual = h
            h = self.b(h)
            h += residual
            h.tanh_()
        else:
            view = torch.sigmoid(h[:, 1:3] + 0.3)
            h = torch.cat([h[:, :1], view, h[:, 3:]], 1) * 1.5
            rows = torch.arange(h.shape[2])[:, None, None]
            h = torch.where((rows >= 2) & (rows < 5), torch.full_like(h, 0.25), h)
            h = torch.cat([h[:, :2] + halves, h[:, 2:]], 1)
            h = torch.tanh(self.b(h) + h)
        mixed = self.mix(h.movedim(1, -1))
        mixed = torch.relu_(mixed) if self.inside else torch.relu(mixed)
        out: torch.Tensor = self.head(mixed.mean((1, 2, 3)))
        return out


def test_fullgrad_follows_what_is_written_to_views() -> None:
    net = nets.made(InPlace, dtype=torch.float64)
    capture = nets.captured(net, INPUT, nets.batch(nets.scan(), torch.float64), nets.score_of(1))
    made = []
    for net.inside in (True, False):  # type: ignore[assignment]
        made.append(fullgrad.evidence(capture, Bound(1e-10, 0.0)))
    assert made[0].start_score == pytest.approx(made[1].start_score, abs=1e-12)
    assert float((made[0].values - made[1].values).abs().max()) < 1e-12
    assert float(made[0].values.abs().sum()) > 0.01


@pytest.mark.parametrize("picked", [False, True])
def test_the_log_odds_of_a_map_have_their_places(picked: bool) -> None:
    """log(1 + 1) at one voxel of a network that puts out nothing: there, and nowhere else."""
    net = nets.made(lambda: nets.conv(1, 3))
    with torch.no_grad():
        nets.weight(net, "").zero_()
        nets.weight(net, "", "bias").zero_()

    def score(out: torch.Tensor) -> torch.Tensor:
        rivals = (out[:, [1, 2]] if picked else out[:, 1:]).logsumexp(1)
        return (out[:, 0] - rivals)[:, 5, 6, 7]

    capture = nets.captured(net, INPUT, nets.batch(nets.scan()), score)
    found = fullgrad.evidence(capture, Bound(1e-6, 0.0))
    assert found.start_score == 0.0
    assert float(found.values[5, 6, 7]) == pytest.approx(-math.log(2), abs=1e-6)
    assert int((found.values != 0).sum()) == 1


def test_channels_picked_one_by_one_with_voxels_have_no_place() -> None:
    """Picked voxels lie anywhere: their bias is left out, and no place is made up."""
    net = nets.made(lambda: nets.conv(1, 3), dtype=torch.float64)

    def score(out: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(out[:, :, [3, 9, 1]]).sum(dim=(1, 2, 3, 4))

    x = nets.batch(nets.scan(), torch.float64)
    capture = nets.captured(net, INPUT, x, score)
    found = fullgrad.evidence(capture, Bound(1e-10, 0.0))
    out = net(x).detach()[:, :, [3, 9, 1]]
    bent = torch.sigmoid(out) - out * torch.sigmoid(out) * (1 - torch.sigmoid(out))
    assert found.start_score == pytest.approx(float(bent.sum()), rel=1e-9)


class Hidden(torch.autograd.Function):
    """Code that torch cannot follow: adds 1."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x + 1.0

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nets.conv(1, 4, 2), nets.Pooled(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(Hidden.apply(self.first(x)))  # type: ignore[no-untyped-call]
        return out


def test_fullgrad_refuses_what_it_cannot_follow() -> None:
    net = nets.made(Hiding)
    capture = nets.captured(net, INPUT, nets.batch(nets.scan()))
    with pytest.raises(CannotExplainError, match="they miss it by") as caught:
        fullgrad.evidence(capture, Bound(1e-3, 0.0))
    assert caught.value.reason == "no rule"


# ---------------------------------------------------------------------------------- ShapleyCAM


class Once(torch.autograd.Function):
    """Its gradient cannot be differentiated again, nor pushed forward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def test_shapleycam_refuses_a_tail_without_second_derivatives() -> None:
    class Bent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = Once.apply(x)  # type: ignore[no-untyped-call]
            return made**2

    net = nets.made(lambda: nets.Body(nn.Sequential(Bent(), nets.Pooled())))
    capture = nets.captured(net, "first", nets.batch(nets.scan()))
    with pytest.raises(CannotExplainError, match="an operation there has none; choose") as caught:
        shapleycam.evidence(capture, LOOSE)
    assert caught.value.reason == "no rule"


def test_shapleycam_sees_the_curvature_of_attention() -> None:
    """Fused attention has no second derivative; its plain form gives that of differences."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            seen = self.attend(tokens, tokens, tokens, need_weights=False)[0]
            out: torch.Tensor = self.head(seen.mean(1))
            return out

    net = nets.made(lambda: nets.Body(Attend(), stride=4), dtype=torch.float64)
    capture = nets.captured(net, "first", nets.batch(nets.scan(), torch.float64), nets.score_of(1))
    at, h = capture.activation, 1e-4
    up, down = capture.gradients(torch.stack([(1 + h) * at, (1 - h) * at]))
    weights = (capture.gradient() - (up - down) / (4 * h)).mean(dim=(1, 2, 3), keepdim=True)
    theirs, ours = (weights * at).sum(0), shapleycam.evidence(capture, LOOSE).values
    assert float((ours - theirs).abs().max()) < 1e-6 * float(theirs.abs().max())


def test_the_cost_of_the_curvature_is_stated() -> None:
    net, x = nets.made(nets.gated), nets.batch(nets.scan())
    found = nets.captured(net, "rest.0", x)
    found.gradient()
    before = found.passes
    one = shapleycam.evidence(found, LOOSE).values
    assert (found.passes - before, found.forwards) == (4.0, 0.0)
    with at_rest(net):
        _, bare = direct(net, "rest.0", x, lambda _: nets.score_of())  # remembers nothing
        other = shapleycam.evidence(bare, LOOSE).values
    assert (bare.passes, bare.forwards) == (3.0, 1.0)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)
