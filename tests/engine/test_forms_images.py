"""Networks for images, and networks that put a volume's slices into the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import _plugins
from med_gradcam.errors import ModelError
from med_gradcam.geometry import Geometry
from med_gradcam.graph import trace
from med_gradcam.one_slice import Flat, fitting
from med_gradcam.volume import Volume
from tests.engine import architectures, nets
from tests.engine.transformers import Vit

METHODS = tuple(_plugins.names("methods"))
LAYER = {"eigengradcam": "2"}  # at the others its one component is zero here


def _image(axis: int = 2, sides: tuple[int, int] = (24, 32), channels: int = 1) -> Any:
    made = np.random.default_rng(0).normal(size=(channels, *sides)).astype(np.float32)
    made[:, 8:16, 10:20] += 2.0
    return np.expand_dims(made, 1 + axis)


def _flat(dims: int, axis: int = 2, inside: int = 1) -> nn.Module:
    """The same function with two-dimensional convolutions, or with three and a kernel of 1."""
    three = dims == 3

    def conv(a: int, b: int) -> nn.Module:
        if not three:
            return nn.Conv2d(a, b, 3, 2, 1)
        size, step, pad = ([n] * 3 for n in (3, 2, 1))
        size[axis], step[axis], pad[axis] = 1, 1, 0
        return nn.Conv3d(a, b, tuple(size), tuple(step), tuple(pad))  # type: ignore[arg-type]

    norm, pool = (
        (nn.BatchNorm3d, nn.AdaptiveAvgPool3d) if three else (nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
    )
    return nn.Sequential(
        conv(inside, 4), norm(4), nn.ReLU(), conv(4, 8), nn.ReLU(), pool(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


def _both(axis: int = 2, inside: int = 1) -> tuple[nn.Module, nn.Module]:
    flat = nets.made(lambda: _flat(2, axis, inside))
    deep = nets.made(lambda: _flat(3, axis, inside))
    state = {k: v.unsqueeze(2 + axis) if v.ndim == 4 else v for k, v in flat.state_dict().items()}
    deep.load_state_dict(state)
    return flat, deep


# -------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("method", METHODS)
def test_an_image_has_the_map_of_a_volume_of_one_slice(method: str) -> None:
    """Bit for bit: the same network with kernels of 1 along the third axis."""
    flat, deep = _both()
    layer = LAYER.get(method, "auto")
    one, other = (mg.explain(_image(), net, method=method, layer=layer) for net in (flat, deep))
    assert (one.layer, one.cells, one.cells.how) == (other.layer, other.cells, "exact")
    assert one.evidence.shape[2] == 1
    assert np.array_equal(one.evidence, other.evidence)
    assert (one.score, one.status) == (other.score, other.status)
    assert [t.layer for t in one.trials] == [t.layer for t in other.trials]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("layer", ["0", "4", "auto"])
def test_the_singleton_axis_may_be_any(axis: int, layer: str) -> None:
    flat, deep = _both(axis)
    one, other = (mg.explain(_image(axis), net, layer=layer) for net in (flat, deep))
    assert one.evidence.shape[axis] == 1
    assert np.array_equal(one.evidence, other.evidence)
    assert (one.status, one.cells) == ("complete", other.cells)
    jump = [4.0 if one.layer == "4" else 2.0] * 3
    jump[axis] = 1.0
    assert list(one.cells.jump) == jump


def test_an_image_keeps_its_pixel_spacing() -> None:
    """A radiograph of 0.2 x 0.3 mm, and an image of three colours."""
    flat, _ = _both(inside=3)
    image = _image(channels=3)
    grid = Geometry(image.shape[1:], np.diag([0.2, 0.3, 1.0, 1.0]))
    found = mg.explain(Volume(image, grid), flat, layer="4")
    assert found.grid.spacing_mm == pytest.approx((0.8, 1.2, 1.0))
    assert found.image == grid
    maps = mg.draw(found)
    assert maps.signed.values.shape == image.shape[1:]


def test_a_map_of_logits_of_an_image_has_its_targets() -> None:
    """A two-dimensional U-Net: class by predicted region, voxel and box, as of volumes."""
    networks = architectures.monai_networks()
    net = nets.made(lambda: networks.UNet(2, 1, 2, (4, 8, 16), (2, 2)))
    image = _image(sides=(32, 32))
    for target in ("#1", "#1@voxel:ijk:12,14,0", "#1@box:ijk:12,14,0:5"):
        found = mg.explain(image, net, target=target, layer="model.0")
        assert found.status == "complete"
        assert found.evidence.shape == (16, 16, 1)
    one, other = (
        mg.explain(_image(n, (32, 32)), net, target=f"#1@box:ijk:{at}:5", method="hirescam")
        for n, at in ((2, "12,14,0"), (0, "0,12,14"))
    )
    assert np.array_equal(other.evidence[0], one.evidence[:, :, 0])
    infos = {info.name: info for info in trace(fitting(net, image.shape), image.shape).layers}
    assert infos["model"].is_output


@pytest.mark.parametrize(
    ("make", "size", "jump"),
    [
        (lambda n: n.resnet10(spatial_dims=2, n_input_channels=1, num_classes=2), 64, 16.0),
        (lambda n: n.DenseNet121(2, 1, 2), 64, 32.0),
        (lambda n: n.EfficientNetBN("efficientnet-b0", None, False, 2, 1, 2), 64, 32.0),
    ],
    ids=["resnet10", "DenseNet121", "EfficientNet"],
)
def test_networks_for_images(make: Callable[[Any], nn.Module], size: int, jump: float) -> None:
    net = nets.made(lambda: make(architectures.monai_networks()))
    found = mg.explain(_image(sides=(size, size)), net, quick=True)
    assert (found.status, found.cells.how) == ("complete", "exact")
    assert found.cells.jump == (jump, jump, 1.0)


def test_a_vision_transformer_for_images() -> None:
    net = nets.made(lambda: Vit(dims=2))
    found = mg.explain(_image(), net, layer="blocks.1")
    assert (found.evidence.shape, found.cells.jump) == ((6, 8, 1), (4.0, 4.0, 1.0))


def test_a_network_for_images_refuses_a_stack_of_slices() -> None:
    flat, _ = _both()
    with pytest.raises(ModelError, match="two-dimensional convolutions only, got 24 x 32 x 2"):
        mg.explain(np.repeat(_image(), 2, 3), flat)


def test_a_network_for_volumes_takes_one_slice_as_it_is() -> None:
    _, deep = _both()
    assert fitting(deep, (1, 24, 32, 1)) is deep
    assert fitting(deep, (1, 24, 32, 9)) is deep


def test_the_flat_network_is_the_one_that_was_given() -> None:
    """The same modules under the same names, remembered, and gone with the network."""
    flat, _ = _both()
    seen = fitting(flat, (1, 24, 32, 1))
    assert isinstance(seen, Flat)
    assert seen.inner is flat
    assert dict(seen.named_parameters()).keys() == dict(flat.named_parameters()).keys()
    assert all(seen.get_submodule(name) is m for name, m in flat.named_modules() if name)
    assert fitting(flat, (1, 24, 32, 1)) is seen
    before = {name: t.clone() for name, t in flat.state_dict().items()}
    mg.explain(_image(), flat)
    assert all(torch.equal(t, before[name]) for name, t in flat.state_dict().items())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in flat.modules())
    del flat
    with pytest.raises(ModelError, match="alive"):
        _ = seen.inner


def test_settings_of_explain_hold_for_images() -> None:
    flat, deep = _both()
    for settings in (
        {"fast": True},
        {"alignment": "measured"},
        {"layer": "fused"},
        {"quick": True},
    ):
        one, other = (mg.explain(_image(), net, **settings) for net in (flat, deep))
        assert np.allclose(
            one.evidence, other.evidence, rtol=0, atol=1e-5 * abs(one.evidence).max()
        )
        assert one.cells == other.cells
    several = mg.explain_many(
        [_image(), 0.5 * _image()], flat, method="gradcam", batch=2, target="all"
    )
    assert len(several) == 4


# -------------------------------------------------------------------------------------- slices


class Slices(nn.Module):
    """A network for images on each slice, and what joins the slices' features."""

    def __init__(self, join: str, axis: int = 0, *, deep: bool = False) -> None:
        super().__init__()
        self.join, self.axis, self.deep = join, axis, deep
        size = {"kernel_size": 3, "stride": 2, "padding": 1}
        if deep:
            size = {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}  # type: ignore[dict-item]
        conv: Any = nn.Conv3d if deep else nn.Conv2d
        self.cnn = nn.Sequential(conv(1, 4, **size), nn.ReLU(), conv(4, 8, **size), nn.ReLU())
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU}
        self.rnn = (
            kinds[join](8, 4, batch_first=True, bidirectional=True) if join in kinds else None
        )
        self.weigh, self.head = nn.Linear(8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(2 + self.axis, 2)
        if self.deep:
            rows = self.cnn(x).mean((3, 4)).transpose(1, 2)
        else:
            n, count = x.shape[0], x.shape[2]
            each = self.cnn(x.transpose(1, 2).flatten(0, 1))
            rows = each.mean((2, 3)).view(n, count, -1)
        if self.rnn is not None:
            rows = self.rnn(rows)[0]
        joined = {
            "mean": lambda: rows.mean(1),
            "max": lambda: rows.amax(1),
            "attention": lambda: (rows * self.weigh(rows).softmax(1)).sum(1),
        }.get(self.join, lambda: rows[:, -1])()
        out: torch.Tensor = self.head(joined)
        return out


def _stack(axis: int = 0) -> Any:
    made = np.random.default_rng(1).normal(size=(6, 16, 24)).astype(np.float32)
    made[2:4, 4:10, 6:14] += 2.0
    return np.ascontiguousarray(np.moveaxis(made, 0, axis))


JOINS = ["mean", "max", "attention", "lstm", "gru"]


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("method", ["secant", "integrated", "gradcam", "hirescam", "reciprocam"])
def test_slices_in_the_batch_have_the_map_of_one_volume(join: str, method: str) -> None:
    """The same function with kernels of 1 across the slices, through the same join."""
    one = nets.made(lambda: Slices(join))
    other = nets.made(lambda: Slices(join, deep=True))
    state = {k: v.unsqueeze(2) if v.ndim == 4 else v for k, v in one.state_dict().items()}
    other.load_state_dict(state)
    maps = [mg.explain(_stack(), net, layer="cnn", method=method) for net in (one, other)]
    assert maps[0].cells == maps[1].cells
    assert maps[0].cells.jump == (1.0, 4.0, 4.0)
    peak = abs(maps[1].evidence).max()
    rounding = 4 * float(np.finfo(np.float32).eps) * max(1.0, abs(maps[0].score))
    assert abs(maps[0].evidence - maps[1].evidence).max() <= 1e-5 * peak + rounding
    assert maps[0].status == maps[1].status


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_along_any_axis_through_any_join(join: str, axis: int) -> None:
    net = nets.made(lambda: Slices(join, axis))
    found = mg.explain(_stack(axis), net)
    assert (found.status, found.cells.how, found.method) == ("complete", "exact", "secant")
    assert found.cells.jump[axis] == 1.0
    assert found.evidence.shape[axis] == 6
    change = found.score - (found.reference_score or 0.0)
    assert float(found.evidence.sum()) == pytest.approx(change, abs=1e-5 * max(1.0, abs(change)))
    assert {t.layer for t in found.trials} == {"cnn", "cnn.1"}


def test_a_slice_that_alone_matters_has_all_the_evidence() -> None:
    """Behind a maximum over slices only those that have it can count."""
    net = nets.made(lambda: Slices("lstm"))
    setattr(net, "rnn", None)  # noqa: B010 - the type checker takes it for a module
    found = mg.explain(_stack(), net, layer="cnn", method="hirescam")
    assert not found.evidence[:-1].any()
    assert found.evidence[-1].any()
