"""Does evidence lie where it belongs when the whole of explain() and draw() is run?

P14, P15, P16, P19, the point source and list B of docs/properties.md. The placement of cells alone:
test_point_source.py and test_probe_placement.py; the drawing alone: tests/test_maps.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.geometry import Geometry, cells, reorient, reorient_array, reorientation
from med_gradcam.maps import drawing
from med_gradcam.model import InputSpec, Model
from med_gradcam.projection import VIEWS, project
from med_gradcam.summary import peaks
from tests import tiny
from tests.engine import architectures, nets
from tests.engine.architectures import TABLE, Row
from tests.engine.test_point_source import linear_twin
from tests.secant import architectures as small

Doubles = npt.NDArray[np.float64]
HALF_A_VOXEL = 0.5
METHODS = ("secant", "integrated", "gradcam", "hirescam")


def middle(mass: npt.NDArray[Any]) -> Doubles:
    """The centroid of an array, in its own indices."""
    at = np.stack(np.meshgrid(*map(np.arange, mass.shape), indexing="ij"), axis=-1)
    return np.asarray((at * mass[..., None]).sum((0, 1, 2), dtype=np.float64) / mass.sum())


def far(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(one - other).max() / np.abs(other).max())


# ------------------------------------------------- a point source, in every architecture


def positive(output: Any) -> torch.Tensor:
    """The mean of what a network puts out; of a transformer, of its last tokens."""
    if isinstance(output, tuple) and isinstance(output[1], list):
        output = output[1][-1]  # its class token sees nothing where attention is off
    first: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first.flatten(1).mean(1)


def point_at(centre: Doubles, size: int) -> npt.NDArray[np.float32]:
    """One voxel of 1, or the 2, 4 or 8 about a point between voxels, in zeros."""
    array = np.zeros((size,) * 3, np.float32)
    for corner in itertools.product((np.floor, np.ceil), repeat=3):
        array[tuple(int(f(c)) for f, c in zip(corner, centre, strict=True))] = 1.0
    return array


def _cases() -> list[Any]:
    large = (
        "SEResNet50",
        "DenseNet121",
        "EfficientNet-b0",
        "SwinUNETR",
        "UNETR",
        "VNet",
        "resnet50",
    )
    slow = [row for row in TABLE if row.net in large or row.jump > 16]
    vit = Row("ViT", "patch_embedding.patch_embeddings", 8, 3.5, 0.0)
    return [
        pytest.param(row, id=f"{row.net}-{row.layer}", marks=[pytest.mark.slow] * (row in slow))
        for row in (*TABLE, vit)
    ]


@pytest.mark.parametrize("row", _cases())
def test_a_point_source_lands_within_half_a_voxel(row: Row) -> None:
    """From the scan's file order to the drawn map, at 1 mm oblique and at 1 x 1 x 5 mm."""
    size = 64 if "UNETR" in row.net else max(3 * row.jump, 32)
    net = small.made("ViT").float() if row.net == "ViT" else architectures.made(row.net)
    twin = linear_twin(net)
    if row.net == "SwinUNETR":
        vars(twin)["normalize"] = False  # a functional norm of channels that are alike is zero
    model = Model(twin, InputSpec(axes="SPL"), link="none", weights_sha256="0")
    cell = size // row.jump // 2
    centre: Doubles = np.full(3, row.start + row.jump * cell)
    array = point_at(centre, size)
    for spacing, turn in (((1.0, 1.0, 1.0), (5.0, -8.0, 11.0)), ((1.0, 1.0, 5.0), (0, 0, 0))):
        affine = tiny.affine_of("LPS", spacing, (12, -34, 56), turn)
        volume = tiny.volume(array.transpose(2, 1, 0), affine)  # its files are stored as L, P, S
        made = mg.explain(
            volume, model, target=positive, layer=row.layer, method="secant", reference="zero"
        )
        maps = mg.draw(made)
        assert made.method == "secant"
        assert float(maps.raises.values.max()) > 0
        true = volume.grid.world_ras(centre[::-1])
        assert _off_by(made, true) < HALF_A_VOXEL, spacing
        shape = made.evidence.shape
        stretched = cells(
            reorient(volume.grid, reorientation(volume.grid, "SPL")),
            (row.jump,) * 3, ((row.jump - 1) / 2,) * 3, (shape[0], shape[1], shape[2]),
        )  # fmt: skip
        wrong = _off_by(made.replace(grid=stretched), true)
        assert (wrong > HALF_A_VOXEL - 0.1) is (row.peers != 0), "the fault must be seen"


def _off_by(made: mg.Explanation, true: Doubles) -> float:
    """How far the drawn evidence for is from a point, in voxels of the scan, at worst."""
    found = made.image.world_ras(middle(mg.draw(made).raises.values))
    return float(np.abs(made.image.index_ijk(found) - made.image.index_ijk(true)).max())


# ------------------------------------------------------------------- B: few cells, many voxels


def _patches(count: int, size: int) -> nn.Module:
    """Cells that tile the scan, each the mean of its voxels, and the sum of them all."""
    width = size // count
    head = nn.Linear(count**3, 1, bias=False)
    net = nn.Sequential(nn.Conv3d(1, 1, width, width, bias=False), nn.Flatten(), head)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    return net.eval()


def _one_bright_cell(count: int, cell: tuple[int, int, int]) -> tuple[mg.Explanation, Doubles]:
    """Its explanation, and its centre in voxels of a scan of 64^3."""
    width = 64 // count
    array = np.zeros((1, 64, 64, 64), np.float32)
    i, j, k = (slice(c * width, (c + 1) * width) for c in cell)
    array[0, i, j, k] = 1.0
    scan, net = nets.as_volume(array), _patches(count, 64)
    made = mg.explain(scan, net, link="none", layer="0", method="secant", reference="zero")
    assert made.evidence.shape == (count,) * 3
    return made, np.array(cell) * width + (width - 1) / 2


CORNERS = [
    pytest.param(count, cell, id=f"{count} cells, {name}")
    for count in (2, 4, 8, 16)
    for name, cell in {
        "middle": (count // 2,) * 3,
        "corner": (0, count // 4, count - 1),
        "other corner": (count - 1, count - 1, 0),
    }.items()
]


@pytest.mark.parametrize(("count", "cell"), CORNERS)
def test_the_peak_of_few_cells_is_at_the_cell_s_centre(
    count: int, cell: tuple[int, int, int]
) -> None:
    """List B: in the list of peaks, and among the strongest voxels of the drawn map.

    Beyond the centre of the outermost cell the drawn map stays as high as there, to the edge.
    """
    made, centre = _one_bright_cell(count, cell)
    (peak,) = peaks(made, most=1)
    assert np.abs(made.image.index_ijk(peak.ras_mm) - centre).max() < HALF_A_VOXEL
    drawn = mg.draw(made).raises.values
    top = np.argwhere(drawn >= drawn.max() * (1 - 1e-6))
    assert np.abs(top - centre).max(1).min() <= HALF_A_VOXEL
    inner = (np.array(cell) > 0) & (np.array(cell) < count - 1)
    assert np.abs(top - centre)[:, inner].max(initial=0.0) <= HALF_A_VOXEL


@pytest.mark.parametrize(
    ("count", "cell"),
    [
        pytest.param(*c.values, id=str(c.id))
        for c in CORNERS
        if c.values[0] != 16  # half a cell is two voxels there
    ],
)
def test_the_strongest_voxel_of_a_cell_is_at_its_centre(
    count: int, cell: tuple[int, int, int]
) -> None:
    """List B: the peaks as explanation.json and the command line name them."""
    made, centre = _one_bright_cell(count, cell)
    (peak,) = peaks(made, mg.draw(made), most=1)
    assert np.abs(made.image.index_ijk(peak.ras_mm) - centre).max() <= HALF_A_VOXEL


# ------------------------------------------------------------------- P14, P15: flips and shifts


class Even(nn.Module):
    """Stride 4 with kernels that are their own mirror image, and along all axes the same."""

    def __init__(self, *, symmetric: bool = True) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nets.conv(1, 4, 2), nn.LeakyReLU(0.3), nets.conv(4, 4, 2), nn.LeakyReLU(0.3)
        )
        self.rest = nn.Sequential(nets.conv(4, 4), nn.LeakyReLU(0.3), nets.Pooled(4))
        for module in self.modules():
            if symmetric and isinstance(module, nn.Conv3d):
                _make_even(module.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rest(self.layer(x))
        return out


def _make_even(weight: torch.Tensor) -> None:
    even = weight.double()  # so that the float32 weights are alike to the last bit
    for axis in (2, 3, 4):
        even = (even + even.flip(axis)) / 2
    orders = itertools.permutations((2, 3, 4))
    even = torch.stack([even.permute(0, 1, *order) for order in orders]).mean(0)
    weight.copy_(4 * even)  # what the mean of so many took away


def _evidence(net: nn.Module, array: npt.NDArray[Any], method: str) -> npt.NDArray[Any]:
    scan = nets.as_volume(np.ascontiguousarray(array))
    return mg.explain(
        scan, net, target=0, layer="layer", method=method, reference="value:0.1"
    ).evidence


TURNS: dict[str, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    "i": lambda a: a[..., ::-1, :, :],
    "j": lambda a: a[..., ::-1, :],
    "k": lambda a: a[..., ::-1],
    "i and k": lambda a: a.swapaxes(-3, -1),
    "j and k, flipped": lambda a: a.swapaxes(-2, -1)[..., ::-1],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("turn", TURNS)
def test_a_flipped_or_transposed_scan_has_the_map_flipped_or_transposed(
    turn: str, method: str
) -> None:
    """P14. On s m + 1 voxels cells lie alike from both ends; on an even number they cannot."""
    net, turned = nets.made(Even), TURNS[turn]
    array = nets.scan(17)
    here = _evidence(net, array, method)
    assert far(_evidence(net, turned(array), method), turned(here)) < 5e-7
    array = nets.scan(16)
    uneven = far(_evidence(net, turned(array), method), turned(_evidence(net, array, method)))
    assert (uneven > 0.02) is (turn != "i and k"), "an even size must fail, or this tests nothing"
    if turn == "i and k":
        net = nets.made(lambda: Even(symmetric=False))
        other = _evidence(net, turned(array), method)
        assert far(other, turned(_evidence(net, array, method))) > 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_scan_moved_by_whole_cells_has_the_map_moved(method: str) -> None:
    """P15: in air wider than what a cell sees, exactly so."""
    net = nets.made(Even, dtype=torch.float64)
    array = np.zeros((1, 49, 49, 49), np.float32)
    array[:, 20:29, 20:29, 20:29] = nets.scan(9)

    def at(*shift: int) -> npt.NDArray[Any]:
        moved = np.roll(array, shift, (1, 2, 3))
        scan = nets.as_volume(moved)
        made = mg.explain(scan, net, target=0, layer="layer", method=method, reference="zero")
        return made.evidence

    here, there = at(0, 0, 0), at(4, -8, 0)
    inside = (slice(4, 8),) * 3  # three cells from any border, before and after the shift
    moved = np.roll(here, (1, -2, 0), (0, 1, 2))
    size = np.abs(here).max()
    assert np.abs(there - moved)[inside].max() <= 1.2e-7 * size  # float32, in which maps are kept
    assert np.abs(there - np.roll(moved, 1, 2))[inside].max() > 0.02 * size


# ------------------------------------------------------------------- P16: orientations


def _turned_scan() -> mg.Volume:
    affine = tiny.affine_of("LPS", (0.8, 1.0, 2.5), (12, -34, 56), (9, -5, 14))
    array = nets.scan(24)[:, :, :20, :16]
    return tiny.volume(np.ascontiguousarray(array), affine)


def _reordered(volume: mg.Volume, axes: str) -> mg.Volume:
    how = reorientation(volume.grid, axes)
    array = np.ascontiguousarray(reorient_array(np.asarray(volume.array), how))
    return replace(volume, array=array, grid=reorient(volume.grid, how))


def _world_centroid(made: mg.Explanation) -> Doubles:
    return made.grid.world_ras(middle(np.abs(made.evidence)))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "IRP", "ASR"])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_however_a_scan_is_stored_its_map_lies_at_the_same_place(
    axes: str, spacing: tuple[float, float, float] | None
) -> None:
    """P16, on an oblique scan: the network gets the axes that it was trained with."""
    net, scan = nets.made(nets.gated), _turned_scan()
    stored = _reordered(scan, axes)

    def explained(volume: mg.Volume, own: str | None) -> mg.Explanation:
        model = Model(net, InputSpec(axes=own, spacing_mm=spacing), weights_sha256="0")
        return mg.explain(volume, model, target=1, layer="first")

    one, other = (explained(v, "SPL") for v in (scan, stored))
    assert other.score == pytest.approx(one.score, abs=1e-4)
    cell = min(one.cell_mm)
    assert np.linalg.norm(_world_centroid(one) - _world_centroid(other)) < 0.1 * cell
    back = _reordered(replace(scan, array=mg.draw(one).signed.values[None]), axes)
    drawn = mg.draw(other).signed.values
    assert far(drawn, np.asarray(back.array)[0]) < 1e-3
    if axes != "SPL":  # planted fault: the network takes the array as it is stored
        wrong = explained(stored, None)
        assert np.linalg.norm(_world_centroid(one) - _world_centroid(wrong)) > 0.1 * cell


# ------------------------------------------------------------------- P19: the drawing


@pytest.mark.parametrize(("jump", "start"), [(2, 0.5), (4, 0.0), (8, 3.5), (8, 0.0), (16, 6.0)])
def test_drawing_keeps_the_sum_the_sign_and_a_constant(jump: int, start: float) -> None:
    """P19, to 1e-6."""
    image = Geometry((48, 40, 33), tiny.affine_of("LPS", (1.0, 1.0, 5.0), turn=(5, -8, 11)))
    shape = [max(2, (n - int(start)) // jump) for n in image.shape]
    how = drawing(cells(image, (jump,) * 3, (start,) * 3, (shape[0], shape[1], shape[2])), image)
    evidence = np.random.default_rng(0).random(shape)
    dense = how.spread(evidence)
    total = float(dense.sum(dtype=np.float64)) * image.voxel_ml
    assert total + how.outside(evidence) == pytest.approx(evidence.sum(), rel=1e-6)
    assert float(dense.min()) >= 0.0
    alike = how.spread(how.share() * image.voxel_ml * 2.5)
    inside = alike[alike > 0]
    assert inside.size > 0.2 * alike.size
    assert np.abs(inside - 2.5).max() <= 2.5e-6


# ------------------------------------------------------------------- P26: projections


@pytest.mark.parametrize("view", VIEWS)
def test_projections_of_for_and_against_are_independent(view: str) -> None:
    """P26: what is against behind or before it takes nothing from what is for, and the reverse."""
    made = mg.explain(nets.volume(24), nets.made(nets.gated), target=1, layer="first")
    assert made.sum_for > 0
    assert made.sum_against > 0
    maps = mg.draw(made)
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[view]  # of a scan in RAS
    for sign, heatmap in ((1, maps.raises), (-1, maps.lowers)):
        alone = made.replace(evidence=sign * np.maximum(sign * made.evidence, 0))
        other = mg.draw(alone)
        only = other.raises if sign > 0 else other.lowers
        found = project(heatmap, view)
        assert np.array_equal(found.values, project(only, view).values)
        assert np.array_equal(
            np.sort(found.values, axis=None), np.sort(heatmap.values.max(axis), axis=None)
        )
        whole = project(heatmap, view, kind="sum")
        total = float(whole.values.sum(dtype=np.float64)) * whole.pixel_cm2
        inside = float(heatmap.values.sum(dtype=np.float64)) * heatmap.grid.voxel_ml
        assert total == pytest.approx(inside, rel=1e-6)
