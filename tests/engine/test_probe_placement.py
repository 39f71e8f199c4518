"""MONAI's networks: do their cells lie where the table says, are their tails the whole network?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from med_gradcam.errors import CannotExplainError, InputError
from med_gradcam.explanation import Cells
from med_gradcam.graph import LayerInfo, trace
from med_gradcam.placement import place
from med_gradcam.tail import at_rest
from tests.engine import nets
from tests.engine.architectures import TABLE, Row, made, monai_networks
from tests.oracle import papers


def _info(net: nn.Module, layer: str, shape: tuple[int, ...]) -> LayerInfo:
    found = trace(net, shape).find(layer)
    assert found is not None
    return found


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.net}-{row.layer}")
def test_cells_of_monai_networks(row: Row) -> None:
    """The recursion gives the table's numbers exactly, and the probe finds the same."""
    net, shape = made(row.net), (1, 64, 64, 64)
    info = _info(net, row.layer, shape)
    with at_rest(net):
        cells = place(net, info, shape)
    assert list(cells.jump) == [row.jump] * 3
    assert list(cells.start) == [row.start] * 3
    assert cells.how == "exact"
    assert cells.uncertainty_voxels is None
    assert (row.jump - 1) / 2 - row.start == row.peers


def test_the_size_of_the_scan_does_not_move_the_cells() -> None:
    net = made("resnet18")
    for size in (48, 57, 64):
        lattice = _info(net, "layer3", (1, size, size, size)).lattice
        assert lattice is not None
        assert (lattice.start, lattice.jump) == ((0.0,) * 3, (8.0,) * 3)


def test_a_stage_that_keeps_its_channels_last_is_seen_as_cells() -> None:
    """A block of a Swin transformer puts out (1, i, j, k, C): its last axis is no place."""
    net, shape = made("SwinUNETR"), (1, 64, 64, 64)
    info = _info(net, "swinViT.layers1.0.blocks.1", shape)
    assert info.shape[1:] == (32, 32, 32)
    with at_rest(net):
        cells = place(net, info, shape)
    assert (cells.how, cells.start, cells.jump) == ("exact", (0.5,) * 3, (2.0,) * 3)


def test_subpixel_upsampling_is_followed() -> None:
    """Behind its pad and pool, cells that a pixel shuffle made lie evenly."""
    monai_networks()
    from monai.networks.blocks.upsample import SubpixelUpsample

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), SubpixelUpsample(3, 8, 1), nn.Flatten()).eval()
    with at_rest(net):
        cells = place(net, _info(net, "1", (1, 16, 16, 16)), (1, 16, 16, 16))
    assert (cells.jump, cells.start, cells.how) == ((1.0,) * 3, (-1.0,) * 3, "exact")


# ------------------------------------------------------------------ where a network looks


def _one_tap(*taps: float, gate: nn.Module | None = None) -> nn.Module:
    """A stride-2 convolution whose weights along the last axis are `taps`."""
    kernel = nn.Conv3d(1, 1, 3, 2, 1)
    with torch.no_grad():
        kernel.weight.zero_()
        kernel.weight[0, 0, 1, 1] = torch.tensor(taps)
    parts = [("layer", nn.Sequential(kernel, gate or nn.Identity())), ("head", nn.Flatten())]
    net = nn.Sequential()
    for name, part in parts:
        net.add_module(name, part)
    return net.eval()


def _both(net: nn.Module, layer: str, size: int, **settings: Any) -> tuple[Cells, Cells]:
    shape = (1, size, size, size)
    info = _info(net, layer, shape)
    with at_rest(net):
        return place(net, info, shape), place(net, info, shape, "measured", **settings)


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize(
    ("taps", "moved"), [((0.0, 1.0, 0.0), 0.0), ((0.0, 0.0, 1.0), 1.0), ((3.0, 0.0, -1.0), -0.5)]
)
def test_measured_cells_lie_where_the_weights_are(
    taps: tuple[float, ...], moved: float, size: int
) -> None:
    nominal, measured = _both(_one_tap(*taps), "layer", size)
    assert nominal.start == (0.0, 0.0, 0.0)
    assert nominal.how == "exact"
    assert measured.start == pytest.approx((0.0, 0.0, moved), abs=1e-6)
    assert measured.uncertainty_voxels == pytest.approx((0.0, 0.0, abs(moved)), abs=1e-6)
    assert measured.how == "measured"
    assert (measured.jump, measured.receptive_field) == (nominal.jump, nominal.receptive_field)


def test_gates_that_see_everything_do_not_draw_the_cells() -> None:
    """A gate lets each cell see all voxels a little; the offset stays what it is without."""

    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x.mean((2, 3, 4), keepdim=True))

    _, plain = _both(_one_tap(0.0, 0.0, 1.0), "layer", 17)
    _, gated = _both(_one_tap(0.0, 0.0, 1.0, gate=Gate()), "layer", 17)
    assert gated.start == pytest.approx(plain.start, abs=1e-6)


def test_borders_do_not_draw_the_cells() -> None:
    """Cells at 3.5 + 8 i that see 40 of 32 voxels: borders cut 4 off either side of the middle."""
    kernel = nn.Conv3d(1, 1, 40, 8, 16)
    nn.init.ones_(kernel.weight)
    nominal, measured = _both(nn.Sequential(kernel, nn.Flatten()).eval(), "0", 32)
    assert nominal.start == (3.5, 3.5, 3.5)
    assert measured.start == pytest.approx(nominal.start, abs=1e-6)


def test_a_measured_place_belongs_to_its_input() -> None:
    """Two scans, two places, each found again; the nominal one stays as it is."""
    net = nn.Sequential(nn.Conv3d(1, 4, 5, 2, 2), nn.ReLU(), nn.Flatten()).eval()
    torch.manual_seed(0)
    scans = [torch.randn(1, 1, 12, 12, 12) for _ in range(2)]
    found = [_both(net, "1", 12, x=x)[1] for x in (*scans, *scans)]
    assert found[0] == found[2] != found[1] == found[3]
    assert _both(net, "1", 12)[0].how == "exact"


def test_measured_places_that_cannot_be_had() -> None:
    net, shape = _one_tap(0.0, 0.0, 0.0), (1, 8, 8, 8)
    info = _info(net, "layer", shape)
    with at_rest(net):
        with pytest.raises(CannotExplainError, match="their gradient is zero; use the alignment"):
            place(net, info, shape, "measured")
        with pytest.raises(InputError, match=r"expected an input \(1, 1, 8, 8, 8\), got \(1, 1, 4"):
            place(net, info, shape, "measured", torch.zeros(1, 1, 4, 4, 4))
        with pytest.raises(InputError, match="alignment nominal or measured, got 'exact'"):
            place(net, info, shape, "exact")  # type: ignore[arg-type]


def test_a_silent_cell_is_left_out() -> None:
    """The rectifier shuts the cells of one half of the scan: the other half's stand for all."""
    net = _one_tap(0.0, 0.0, 1.0, gate=nn.ReLU())
    x = torch.ones(1, 1, 16, 16, 16)
    x[:, :, :8] = -1.0
    _, measured = _both(net, "layer", 16, x=x)
    assert measured.start == pytest.approx((0.0, 0.0, 1.0), abs=1e-6)


@pytest.mark.parametrize(("layer", "jump"), [("layer2", 4), ("layer3", 8)])
def test_a_network_without_training_looks_where_the_table_says(layer: str, jump: int) -> None:
    """Random weights favour no side: on average over axes and nets within 0.1 voxels.

    On s m + 1 voxels, so that both borders are the same; peers would be (s - 1) / 2 off.
    """
    m = monai_networks()
    size, off = 4 * jump + 1, []
    for seed in range(4):
        torch.manual_seed(seed)
        small = m.ResNet("basic", [2, 2, 2, 2], [16, 32, 64, 128], 3, 1, 7, 1, num_classes=2)
        nominal, measured = _both(small.eval(), layer, size)
        assert nominal.how == "exact"
        off.append(np.subtract(measured.start, nominal.start))
    assert abs(np.mean(off)) < 0.1
    assert np.abs(off).max() < 0.25 * (jump - 1) / 2


# ---------------------------------------------------------------------------------- tails


TAILS = [
    ("resnet18", "layer2.0.downsample", True),  # what is added to it is shared by a batch
    ("EfficientNet-b0", "_blocks.4", False),
    ("BasicUNet", "down_3", False),
    ("UNet", "model.1.submodule.0", False),
    ("SegResNet", "down_layers.2", False),
    ("DynUNet", "bottleneck", False),
]
SLOW_TAILS = [
    ("resnet18", "layer2", False),
    ("resnet18", "layer3.1.conv1", False),
    ("resnet50", "layer3", False),
    ("SEResNet50", "layer3", False),
    ("DenseNet121", "features.denseblock3", False),
    ("DenseNet121", "features.denseblock2.denselayer4.layers.conv1", False),
]


@pytest.mark.parametrize(
    ("name", "layer", "alone"),
    [*TAILS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_TAILS)],
)
def test_tails_of_monai_networks_are_the_whole_network(name: str, layer: str, alone: bool) -> None:
    net = made(name)
    torch.manual_seed(1)
    x, reference = torch.randn(1, 1, 32, 32, 32), torch.randn(1, 1, 32, 32, 32)

    def score(output: Any) -> torch.Tensor:
        first: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return first.flatten(2).mean(2)[:, 0] if first.ndim == 5 else first[:, 0]

    activation, gradient = papers.full_gradient(net, layer, x, score)
    capture = nets.captured(net, layer, x, score, reference)
    size = float(gradient.abs().max())
    assert torch.allclose(capture.activation, activation, rtol=1e-5, atol=1e-6)
    assert float((capture.gradient() - gradient).abs().max()) < 1e-3 * size
    assert capture.tail.alone is alone
    assert len(capture.tail.memory) > 0
