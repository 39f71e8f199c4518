"""Do the recursion, the probe and the plain gradient agree on where cells lie?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from med_gradcam import windows
from med_gradcam.errors import CannotExplainError
from med_gradcam.graph import LayerInfo, trace
from med_gradcam.placement import place
from med_gradcam.places import Places
from med_gradcam.receptive import Axis, Lattice, lattice, of_input
from med_gradcam.tail import at_rest
from med_gradcam.windows import Window, windowed
from tests.engine import nets

SIZE = 48


class Do(nn.Module):
    """A module out of a function."""

    def __init__(self, do: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.do(x)


def _shuffled(x: torch.Tensor, by: int = 2) -> torch.Tensor:
    """Pixel shuffle: channels become voxels; here all channels of a cell hold the same."""
    b, _, i, j, k = x.shape
    x = x.repeat(1, by**3, 1, 1, 1).view(b, 1, by, by, by, i, j, k)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, 1, i * by, j * by, k * by)


def _unshuffled(x: torch.Tensor, by: int = 2) -> torch.Tensor:
    """Space to depth: the voxels of a block become channels."""
    b, _, i, j, k = x.shape
    x = x.reshape(b, i // by, by, j // by, by, k // by, by)
    return x.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3).mean(1, keepdim=True)


def _windowed(x: torch.Tensor, by: int = 4) -> torch.Tensor:
    """Cut into windows of tokens, as before attention, and put together again."""
    b, _, i, j, k = x.shape
    x = x.permute(0, 2, 3, 4, 1).view(b, i // by, by, j // by, by, k // by, by, 1)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, by**3, 1)
    x = x.transpose(1, 2).reshape(b, i // by, j // by, k // by, by, by, by, 1) * 2
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, i, j, k, 1).permute(0, 4, 1, 2, 3)


class Tokens(nn.Module):
    """Patches as tokens, through a linear layer, and back to a grid."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.linear = patch, nn.Linear(patch**3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, (i, j, k) = self.patch, (n // self.patch for n in x.shape[2:])
        x = x.reshape(1, i, p, j, p, k, p).permute(0, 1, 3, 5, 2, 4, 6)
        tokens: torch.Tensor = self.linear(x.reshape(1, i * j * k, p**3))
        return tokens.transpose(1, 2).reshape(1, 1, i, j, k)


def _merged(x: torch.Tensor) -> torch.Tensor:
    """A patch merging: strided slices side by side."""
    parts = [x[:, :, a::2, b::2, c::2] for a, b, c in itertools.product((0, 1), repeat=3)]
    return torch.cat(parts, 1).mean(1, keepdim=True)


def _turned_and_back(x: torch.Tensor) -> torch.Tensor:
    """A convolution with its axes in another order."""
    weight = torch.ones(1, 1, 1, 2, 3, dtype=x.dtype)
    return F.conv3d(x.permute(0, 1, 4, 2, 3), weight, stride=(1, 2, 3)).permute(0, 1, 3, 4, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Plane by plane through a two-dimensional convolution and pool."""
    planes = x.permute(0, 2, 1, 3, 4).flatten(0, 1)
    planes = F.avg_pool2d(F.conv2d(planes, torch.ones(1, 1, 3, 3, dtype=x.dtype)), 2)
    return planes.reshape(1, x.shape[2], *planes.shape[1:]).permute(0, 2, 1, 3, 4)


class Slice(nn.Module):
    def __init__(self, *slices: slice) -> None:
        super().__init__()
        self.slices = slices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[(slice(None), slice(None), *self.slices)]


def _conv(kernel: int, **settings: object) -> nn.Conv3d:
    return nn.Conv3d(1, 1, kernel, **settings)  # type: ignore[arg-type]


def _up(kernel: int, **settings: object) -> nn.Module:
    return nn.ConvTranspose3d(1, 1, kernel, **settings)  # type: ignore[arg-type]


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "conv 3": lambda: _conv(3, padding=1),
    "conv 3 stride 2": lambda: _conv(3, stride=2, padding=1),
    "conv 7 stride 2": lambda: _conv(7, stride=2, padding=3),
    "conv 1 stride 2": lambda: _conv(1, stride=2),
    "conv 2 stride 2": lambda: _conv(2, stride=2),
    "conv 4 stride 2": lambda: _conv(4, stride=2, padding=1),
    "conv 3 unpadded": lambda: _conv(3),
    "conv 3 dilated": lambda: _conv(3, padding=2, dilation=2),
    "conv 5 same": lambda: _conv(5, padding="same"),
    "conv 4 same": lambda: _conv(4, padding="same"),
    "conv by axis": lambda: nn.Conv3d(1, 1, (1, 3, 5), (1, 2, 3), (0, 1, 2)),
    "max pool 2": lambda: nn.MaxPool3d(2),
    "max pool 3 stride 2": lambda: nn.MaxPool3d(3, 2, 1),
    "max pool ceil": lambda: nn.MaxPool3d(3, 2, ceil_mode=True),
    "max pool dilated": lambda: nn.MaxPool3d(2, 2, dilation=3),
    "average pool": lambda: nn.AvgPool3d(2),
    "average pool 3": lambda: nn.AvgPool3d(3, 2, 1),
    "adaptive average": lambda: nn.AdaptiveAvgPool3d(6),
    "adaptive max": lambda: nn.AdaptiveMaxPool3d(6),
    "zero pad": lambda: nn.ConstantPad3d((1, 0, 2, 0, 0, 3), 0.0),
    "replication pad": lambda: nn.ReplicationPad3d((2, 0, 0, 1, 1, 0)),
    "reflection pad": lambda: nn.ReflectionPad3d((2, 0, 0, 1, 1, 0)),
    "crop": lambda: nn.ConstantPad3d((-1, 0, -2, 0, 0, -3), 0.0),
    "transposed 2": lambda: _up(2, stride=2),
    "transposed 3": lambda: _up(3, stride=2, padding=1, output_padding=1),
    "transposed 4": lambda: _up(4, stride=2, padding=1),
    "trilinear": lambda: nn.Upsample(scale_factor=2, mode="trilinear"),
    "trilinear corners": lambda: nn.Upsample(
        size=(47, 47, 47), mode="trilinear", align_corners=True
    ),
    "trilinear 1.5": lambda: nn.Upsample(scale_factor=1.5, mode="trilinear"),
    "trilinear by scale": lambda: Do(
        lambda x: F.interpolate(x, scale_factor=1.3, mode="trilinear", align_corners=False)
    ),
    "trilinear down": lambda: nn.Upsample(scale_factor=0.5, mode="trilinear"),
    "nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "nearest 3": lambda: nn.Upsample(scale_factor=3, mode="nearest"),
    "nearest 1.5": lambda: nn.Upsample(scale_factor=1.5, mode="nearest"),
    "nearest down": lambda: nn.Upsample(scale_factor=0.5, mode="nearest"),
    "nearest exact": lambda: nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "nearest exact down": lambda: nn.Upsample(scale_factor=0.5, mode="nearest-exact"),
    "nearest exact 1.5": lambda: nn.Upsample(scale_factor=1.5, mode="nearest-exact"),
    "area": lambda: nn.Upsample(size=(6, 6, 6), mode="area"),
    "patch embedding": lambda: _conv(4, stride=4),
    "patches as tokens": lambda: Tokens(3),
    "tokens": lambda: Tokens(1),
    "patches by unfold": lambda: Do(
        lambda x: x.unfold(2, 2, 2).unfold(3, 3, 2).unfold(4, 4, 1).mean((-3, -2, -1))
    ),
    "patch merging": lambda: Do(_merged),
    "pixel shuffle": lambda: Do(_shuffled),
    "pixel unshuffle": lambda: Do(_unshuffled),
    "windows": lambda: Do(_windowed),
    "axes turned and back": lambda: Do(_turned_and_back),
    "planes": lambda: Do(_flat),
    "half": lambda: Do(lambda x: x.chunk(2, dim=2)[1]),
    "pieces": lambda: Do(lambda x: x.split([5, 6, 13], dim=4)[2]),
    "narrow": lambda: Do(lambda x: x.narrow(3, 4, 15)),
    "one plane": lambda: Do(lambda x: x[:, :, :, 7:8]),
    "gate": lambda: Do(lambda x: x * (1 + 0 * x.mean((2, 3, 4), keepdim=True))),
    "slice": lambda: Slice(slice(2, None), slice(1, -3), slice(None)),
    "slice with steps": lambda: Slice(slice(None, None, 2), slice(1, None, 2), slice(-10, None)),
    "relu": nn.ReLU,
    "instance norm": lambda: nn.InstanceNorm3d(1),
}


def _trial(name: str, before: int = 2) -> nn.Sequential:
    """A stride-2 convolution, the operation, and a convolution (the layer "last")."""
    net = nn.Sequential()
    net.add_module("first", nn.Conv3d(1, 1, 3, before, 1))
    net.add_module("what", OPERATIONS[name]())
    net.add_module("last", nn.Conv3d(1, 1, 3, 1, 1))
    net.add_module("head", nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    return net.eval()


def _linear(net: nn.Sequential) -> nn.Module:
    """The same with max replaced by mean and norms left out: its gradient shows the cells."""
    out: list[nn.Module] = []
    for module in (net[0], net[1], net[2]):
        if isinstance(module, nn.MaxPool3d) and module.dilation != 1:
            kernel = nn.Conv3d(1, 1, 2, 2, dilation=3)
            nn.init.ones_(kernel.weight)
            out.append(kernel)
        elif isinstance(module, nn.MaxPool3d):
            settings = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
            out.append(nn.AvgPool3d(*settings))
        elif isinstance(module, nn.AdaptiveMaxPool3d):
            out.append(nn.AdaptiveAvgPool3d(module.output_size))
        elif not isinstance(module, nn.InstanceNorm3d):
            out.append(module)
    return nn.Sequential(*out)


def _gradient_centres(net: nn.Module, cells: list[tuple[int, ...]]) -> list[list[float]]:
    x = torch.ones(1, 1, SIZE, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    out = net.double()(x)
    at = torch.arange(SIZE, dtype=torch.float64)
    found = []
    for cell in cells:
        (gradient,) = torch.autograd.grad(out[(0, 0, *cell)], x, retain_graph=True)
        lines = [gradient[0, 0].sum(dim=[d for d in range(3) if d != axis]) for axis in range(3)]
        found.append([float((line * at).sum() / line.sum()) for line in lines])
    return found


def _info(net: nn.Module, layer: str = "last") -> LayerInfo:
    found = trace(net, (1, SIZE, SIZE, SIZE)).find(layer)
    assert found is not None
    return found


SAME = "ignore:Using padding='same' with even kernel"  # torch's own remark, once per process


# Neighbours that share a cell lie on either side of it: even only on average over so many.
PERIOD = {"nearest 3": 3, "nearest 1.5": 3, "nearest exact 1.5": 3}


@pytest.mark.filterwarnings(SAME)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_recursion_is_the_plain_gradient_s_centre(name: str) -> None:
    """On average over two cells per axis, or three; each one to what is said to be uneven."""
    net = _trial(name)
    info = _info(net)
    assert info.lattice is not None
    assert info.lattice.agreed
    period = PERIOD.get(name, 2)
    cells = [
        tuple(min(max(n // 2 - 1, 0) + o, n - 1) for n, o in zip(info.shape[1:], off, strict=True))
        for off in itertools.product(range(period), repeat=3)
    ]
    says = np.array(info.lattice.start) + np.array(info.lattice.jump) * np.array(cells)
    centres = np.array(_gradient_centres(_linear(net), cells))
    assert np.abs((says - centres).mean(0)).max() < 1e-6
    assert np.abs(says - centres).max() <= max(info.lattice.uneven) + 1e-6


@pytest.mark.filterwarnings(SAME)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_probe_agrees_with_the_recursion(name: str) -> None:
    net = _trial(name)
    info = _info(net)
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert info.lattice is not None
    assert (made.start, made.jump) == (info.lattice.start, info.lattice.jump)
    assert made.how == "exact"
    uneven = info.lattice.uneven
    assert made.uncertainty_voxels == (uneven if max(uneven) > 0 else None)


@pytest.mark.filterwarnings(SAME)
def test_what_is_said_to_be_uneven() -> None:
    """In voxels, behind a stride of 2: neighbours made from one cell lie about it."""
    found = {name: _info(_trial(name)).lattice for name in OPERATIONS}
    uneven = {name: max(lattice.uneven) for name, lattice in found.items() if lattice}
    assert {name: off for name, off in uneven.items() if off > 0} == pytest.approx(
        {
            "transposed 2": 0.5,
            "transposed 4": 0.5,
            "nearest": 0.5,
            "nearest 3": 2 / 3,
            "nearest 1.5": 2 / 3,
            "nearest exact": 0.5,
            "nearest exact 1.5": 2 / 3,
            "pixel shuffle": 0.5,
        }
    )


def _along(*windows: Window) -> tuple[float, float, float]:
    """Start, jump and field along one axis after some windows."""
    places: Places | None = of_input((1, 1, 64, 64, 64))
    for window in windows:
        assert places is not None
        for dim in (2, 3, 4):
            made = windowed(places, dim, window, 9)
            assert made is not None
            places = made
    found = lattice(places)
    assert found is not None
    return found.start[0], found.jump[0], found.field[0]


def test_the_rule_by_hand() -> None:
    """ResNet's stem and four stages: centres at 16 i; a patch embedding: at (s - 1) / 2."""
    stem = (Window(7, 2, 3), Window(3, 2, 1))
    assert _along(*stem) == (0.0, 4.0, 11.0)
    stages = [Window(3, stride, 1) for stride in (1, 1, 2, 1, 2, 1)]
    assert _along(*stem, *stages)[:2] == (0.0, 16.0)
    assert _along(Window(16, 16)) == (7.5, 16.0, 16.0)
    same = Window(3, 2, 0)  # TensorFlow's "same" on even sizes pads behind
    assert _along(same, same)[:2] == (3.0, 4.0)
    assert _along(Window(1, 8), Window(2, 2, transposed=True)) == (-2.0, 4.0, 5.0)


def test_half_pixel_centres_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: cells at s i + (s - 1) / 2, as peers draw them."""
    real = windows.windowed

    def half(places: Places, dim: int, window: Window, size: int) -> Places | None:
        return real(places, dim, replace(window, left=window.left - (window.stride - 1) / 2), size)

    monkeypatch.setattr(windows, "windowed", half)
    net = _trial("conv 3 stride 2")
    info = _info(net)
    assert info.lattice is not None
    assert info.lattice.start == (1.5, 1.5, 1.5)
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert made.how == "assumed"
    assert made.uncertainty_voxels == pytest.approx((1.5, 1.5, 1.5))


class Branches(nn.Module):
    """Two branches that meet: `shift` voxels of cropping lie between them."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.a, self.b, self.shift = _conv(3, padding=1), _conv(3, padding=1), shift
        self.meet, self.head = nn.Conv3d(2, 1, 1), nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.a(x)[..., : SIZE - self.shift]
        both = torch.cat([left, self.b(x)[..., self.shift :]], 1)
        out: torch.Tensor = self.head(self.meet(both))
        return out


def test_branches_that_meet_apart_are_measured_between_them() -> None:
    for shift, how, start in ((0, "exact", 0.0), (2, "measured", 1.0)):
        net = Branches(shift).eval()
        info = _info(net, "meet")
        assert info.lattice is not None
        assert info.lattice.agreed is (shift == 0)
        with at_rest(net):
            made = place(net, info, (1, SIZE, SIZE, SIZE))
        assert made.how == how
        assert made.start == pytest.approx((0.0, 0.0, start))
        assert made.uncertainty_voxels == (None if shift == 0 else (0.0, 0.0, 2.0))


class Ladder(nn.Module):
    """A decoder whose transposed convolution is half a cell off its skip connection, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.Conv3d(1, 1, 3, 2, 1) for _ in range(2))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(1, 1, 2, 2) for _ in range(2))
        self.layer, self.head = nn.Identity(), nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.downs[0](x)
        quarter = self.downs[1](half)
        out: torch.Tensor = self.head(self.layer(self.ups[1](self.ups[0](quarter) + half) + x))
        return out


def test_disagreement_adds_up_over_branches() -> None:
    """The deep path lies 1 + 0.5 voxels before the scan's own, the one between 0.5."""
    net = Ladder().eval()
    info = _info(net, "layer")
    assert info.lattice is not None
    assert info.lattice.apart == pytest.approx((1.5, 1.5, 1.5))
    assert info.lattice.uneven == pytest.approx((1.5, 1.5, 1.5))
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert made.how == "measured"
    assert made.uncertainty_voxels == pytest.approx((3.0, 3.0, 3.0))
    assert all(-1.5 < s < 0 for s in made.start)


def test_bins_of_an_adaptive_pool_that_are_not_even() -> None:
    """24 cells in 7 bins: the mean spacing, and how far a bin lies from it."""
    net = nn.Sequential(nn.Conv3d(1, 1, 3, 2, 1), nn.AdaptiveAvgPool3d(7), nn.Flatten()).eval()
    info = _info(net, "1")
    assert info.lattice is not None
    assert info.lattice.jump == pytest.approx((2 * 24 / 7,) * 3)
    centres = [(24 * i // 7 + -(-24 * (i + 1) // 7) - 1) for i in range(7)]
    even = [info.lattice.start[0] + info.lattice.jump[0] * i for i in range(7)]
    off = max(abs(a - b) for a, b in zip(centres, even, strict=True))
    assert off > 0.1
    assert info.lattice.uneven == pytest.approx((off,) * 3)
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert made.how == "exact"
    assert made.uncertainty_voxels == info.lattice.uneven


class Scrambled(nn.Module):
    """Something without a rule between the scan and the layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.how = nn.Conv3d(1, 4, 2, 2), how
        self.last, self.head = nn.Conv3d(4, 4, 3, 1, 1), nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.how == "there and back":
            x = x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
        elif self.how == "hand-made norm":
            x = x.permute(0, 2, 3, 4, 1).permute(0, 4, 1, 2, 3)
            x = (x - x.mean()) / x.std()
        elif self.how == "turned":
            x = x.flip(2)
        elif self.how == "rolled":
            x = x.roll(1, 2)
        elif self.how == "axes swapped":
            x = x.transpose(2, 4)
        out: torch.Tensor = self.head(self.last(x))
        return out


@pytest.mark.parametrize("how", ["there and back", "hand-made norm", "axes swapped"])
def test_axes_that_come_back_are_followed(how: str) -> None:
    net = nets.made(lambda: Scrambled(how))
    with at_rest(net):
        made = place(net, _info(net), (1, SIZE, SIZE, SIZE))
    assert (made.how, made.start, made.jump) == ("exact", (0.5,) * 3, (2.0,) * 3)


def test_without_a_rule_the_probe_measures() -> None:
    net = nets.made(lambda: Scrambled("rolled"))
    info = _info(net)
    assert info.lattice is None
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert made.how == "measured"
    assert made.start == pytest.approx((-1.5, 0.5, 0.5))
    assert made.jump == pytest.approx((2.0, 2.0, 2.0))
    assert made.uncertainty_voxels is None


def test_where_neither_can_tell_the_layer_is_refused() -> None:
    """Cells have positive jumps along the scan's axes."""
    net = nets.made(lambda: Scrambled("turned"))
    with at_rest(net), pytest.raises(CannotExplainError, match="the place of the cells") as caught:
        place(net, _info(net), (1, SIZE, SIZE, SIZE))
    assert caught.value.reason == "placement"


def test_mixed_up_cells_are_refused() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last, self.head = _conv(2, stride=2), _conv(1), nn.Flatten()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x[:, :, torch.arange(x.shape[2] - 1, -1, -1)]
            out: torch.Tensor = self.head(self.last(x))
            return out

    net = Shuffled().eval()
    with at_rest(net), pytest.raises(CannotExplainError, match="cannot be told"):
        place(net, _info(net), (1, SIZE, SIZE, SIZE))


def test_one_cell_stands_for_the_whole_scan() -> None:
    net = nn.Sequential(_conv(3), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    with at_rest(net):
        made = place(net, _info(net, "1"), (1, SIZE, SIZE, SIZE))
    assert (made.jump, made.start, made.how) == ((48.0,) * 3, (23.5,) * 3, "assumed")


def test_the_trace_leaves_the_network_as_it_was() -> None:
    net = nets.made(nets.gated)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    keys = [sorted(m.__dict__) for m in net.modules()]
    trace(net, (1, SIZE, SIZE, SIZE))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert keys == [sorted(m.__dict__) for m in net.modules()]
    assert not any(m._forward_hooks for m in net.modules())


def test_a_network_that_cannot_run_on_shapes_alone_is_run_for_real() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 4, 2), nets.Pooled(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.layer(x)
            if float(layer.abs().max()) > 1e9:
                layer = layer * 2
            out: torch.Tensor = self.head(F.relu(layer))
            return out

    info = _info(nets.made(Looks), "layer")
    assert info.lattice == Lattice((Axis(0.0, 2.0, 3.0),) * 3)


def test_work_is_counted_up_to_each_layer() -> None:
    net = nets.made(nets.gated)
    traced = trace(net, (1, 16, 16, 16))
    first = 2 * 27 * 1 * 6 * 8**3
    second = 2 * 27 * 6 * 6 * 8**3
    info = traced.find("first")
    assert info is not None
    assert info.flops == pytest.approx(first, rel=0.03)  # and an operation per value put out
    assert traced.tail_share("first") == pytest.approx(second / (first + second), rel=0.03)
    assert traced.tail_share("no such layer") == 1.0
