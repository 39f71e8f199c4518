"""Do the recursion, the probe and the plain gradient agree on where cells lie?"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from med_gradcam import receptive
from med_gradcam.errors import CannotExplainError
from med_gradcam.graph import LayerInfo, trace
from med_gradcam.placement import place
from med_gradcam.receptive import Axis, Lattice
from med_gradcam.tail import at_rest
from tests.engine import nets

SIZE = 48


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
    "nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
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


@pytest.mark.filterwarnings(SAME)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_recursion_is_the_plain_gradient_s_centre(name: str) -> None:
    """Mean over two cells per axis: behind a transposed convolution cells alternate."""
    net = _trial(name)
    info = _info(net)
    assert info.lattice is not None
    assert info.lattice.agreed
    first = [n // 2 - 1 for n in info.shape[1:]]
    cells = [
        tuple(f + o for f, o in zip(first, off, strict=True))
        for off in itertools.product((0, 1), repeat=3)
    ]
    says = np.array(info.lattice.start) + np.array(info.lattice.jump) * np.array(cells)
    centres = np.array(_gradient_centres(_linear(net), cells))
    assert np.abs((says - centres).mean(0)).max() < 1e-6
    if "transposed" not in name and "nearest" not in name and "corners" not in name:
        assert np.abs(says - centres).max() < 1e-6


@pytest.mark.filterwarnings(SAME)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_probe_agrees_with_the_recursion(name: str) -> None:
    net = _trial(name)
    info = _info(net)
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert made.how == "exact"
    assert info.lattice is not None
    assert (made.start, made.jump) == (info.lattice.start, info.lattice.jump)


def test_the_rule_by_hand() -> None:
    """ResNet's stem and four stages: centres at 16 i; a patch embedding: at (s - 1) / 2."""
    axis = Axis().window(7, 2, 3).window(3, 2, 1)
    assert (axis.start, axis.jump, axis.field) == (0.0, 4.0, 11.0)
    for stride in (1, 2, 2):
        axis = axis.window(3, stride, 1).window(3, 1, 1)
    assert (axis.start, axis.jump) == (0.0, 16.0)
    patch = Axis().window(16, 16, 0)
    assert (patch.start, patch.jump, patch.field) == (7.5, 16.0, 16.0)
    same = Axis().window(3, 2, 0).window(3, 2, 0)  # TensorFlow's "same" on even sizes pads behind
    assert (same.start, same.jump) == (3.0, 4.0)
    assert Axis(0.0, 8.0).transposed(2, 2, 0) == Axis(-2.0, 4.0, 5.0)


def test_half_pixel_centres_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: cells at s i + (s - 1) / 2, as peers draw them."""
    real = Axis.window

    def half(self: Axis, kernel: int, stride: int, left: float, dilation: int = 1) -> Axis:
        out = real(self, kernel, stride, left, dilation)
        return Axis(out.start + (stride - 1) / 2 * self.jump, out.jump, out.field)

    monkeypatch.setattr(receptive.Axis, "window", half)
    net = _trial("conv 3 stride 2")
    info = _info(net)
    assert info.lattice is not None
    assert info.lattice.start == (1.5, 1.5, 1.5)
    with at_rest(net):
        assert place(net, info, (1, SIZE, SIZE, SIZE)).how == "assumed"


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
        out: torch.Tensor = self.head(self.last(x))
        return out


def test_without_a_rule_the_probe_measures() -> None:
    net = nets.made(lambda: Scrambled("there and back"))
    info = _info(net)
    assert info.lattice is None
    with at_rest(net):
        made = place(net, info, (1, SIZE, SIZE, SIZE))
    assert made.how == "measured"
    assert made.start == pytest.approx((0.5, 0.5, 0.5))
    assert made.jump == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("how", ["turned", "hand-made norm"])
def test_where_neither_can_tell_the_layer_is_refused(how: str) -> None:
    """Turned cells would need a negative jump; a norm of nothing gives NaN, not a place."""
    net = nets.made(lambda: Scrambled(how))
    with at_rest(net), pytest.raises(CannotExplainError, match="the place of the cells") as caught:
        place(net, _info(net), (1, SIZE, SIZE, SIZE))
    assert caught.value.reason == "placement"


def test_mixed_up_cells_are_not_called_exact() -> None:
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
    with at_rest(net):
        assert place(net, _info(net), (1, SIZE, SIZE, SIZE)).how != "exact"


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
