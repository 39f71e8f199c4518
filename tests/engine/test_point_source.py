"""Does evidence of one cell land where that cell looks, in mm, for every architecture?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

import med_gradcam as mg
from med_gradcam.formats import nifti
from med_gradcam.geometry import Geometry, cells, crop
from med_gradcam.graph import trace
from med_gradcam.maps import draw, drawing
from med_gradcam.model import InputSpec, Model
from med_gradcam.placement import place
from med_gradcam.prepare import prepare
from med_gradcam.record import to_record
from med_gradcam.tail import at_rest
from tests import tiny
from tests.engine import nets
from tests.engine.architectures import TABLE, Row, made

Doubles = npt.NDArray[np.float64]
HALF_A_VOXEL = 0.5

# --------------------------------------------------------- an oracle that shares no code


def _tap(module: nn.Module, *, box: bool) -> None:
    """One weight for the middle of the kernel (two where it is even), or for all of it."""
    weight = module.get_parameter("weight")
    weight.data.zero_()
    places = [slice(None) if box else slice((k - 1) // 2, k // 2 + 1) for k in weight.shape[2:]]
    weight.data[(slice(None), slice(None), *places)] = 1.0 / weight.shape[1]


def _constant(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.zero_()


_GATES = ("_se_reduce", "_se_expand", "se_layer.fc", "attn.proj", "attn.out_proj")
_SAME = (nn.Identity, "Norm", "ReLU", "ELU", "Swish", "SiLU", "GELU", "Dropout", "DropPath")


def _plain(module: nn.Module) -> nn.Module | None:
    """What stands for a module in the linear twin: nothing for norms and activations."""
    kind = type(module).__name__
    if any(isinstance(word, str) and word in kind for word in _SAME):
        return nn.Identity()
    if isinstance(module, nn.MaxPool3d):
        return nn.AvgPool3d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    return None


def linear_twin(net: nn.Module, *, box: bool = False) -> nn.Module:
    """A copy whose cells are weighted means of the voxels they see, all weights positive."""
    twin = copy.deepcopy(net)
    for name, module in list(twin.named_modules()):
        for child_name, child in list(module.named_children()):
            plain = _plain(child)
            if plain is not None:
                setattr(module, child_name, plain)
        if any(gate in name for gate in _GATES):
            _constant(module)
        elif isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            _tap(module, box=box)
        elif isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 1.0 / module.in_features)
    return twin.eval()


class _Ran(Exception):  # noqa: N818 - it is no error
    pass


def true_centre(net: nn.Module, layer: str, size: int, cell: tuple[int, ...]) -> Doubles:
    """The centroid of the gradient of one cell of a linear network, in voxels of its input."""
    x = torch.ones(1, 1, size, size, size, requires_grad=True)
    found: list[torch.Tensor] = []

    def look(module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        i, j, k = cell
        (gradient,) = torch.autograd.grad(out[0, :, i, j, k].sum(), x)
        found.append(gradient[0, 0].double())
        raise _Ran

    handle = net.get_submodule(layer).register_forward_hook(look)
    with pytest.raises(_Ran):
        net(x)
    handle.remove()
    mass = found[0].numpy()
    assert mass.min() >= 0
    return _middle(mass)


def _middle(mass: npt.NDArray[Any]) -> Doubles:
    """The centroid of an array, in its own indices."""
    at = np.stack(np.meshgrid(*map(np.arange, mass.shape), indexing="ij"), axis=-1)
    return np.asarray((at * mass[..., None]).sum((0, 1, 2), dtype=np.float64) / mass.sum())


# ------------------------------------------------------------------------ point sources


@dataclass(frozen=True)
class Scan:
    """How a scan lies about the network's grid of `size` voxels."""

    name: str
    spacing: tuple[float, float, float]
    axes: str
    network_spacing: tuple[float, float, float] | None = None
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def grids(self, size: int) -> tuple[Geometry, Geometry]:
        """The network's grid and the scan's, as prepare() makes them."""
        factor = np.divide(self.network_spacing or self.spacing, self.spacing)
        shape = [round(size * f) for f in factor]
        affine = tiny.affine_of("LPS", self.spacing, (12, -34, 56), self.turn)
        volume = tiny.volume(np.zeros(shape, np.float32) + np.arange(shape[2]), affine)
        model = Model(
            nn.Identity(),
            InputSpec(axes=self.axes, spacing_mm=self.network_spacing),
            weights_sha256="0",
        )
        ready = prepare(volume, model)
        grid = ready.grid
        low = [(n - size) // 2 for n in grid.shape]
        return crop(grid, low, (size,) * 3), volume.grid


SCANS = [
    Scan("1 mm, oblique", (1.0, 1.0, 1.0), "LPS", turn=(5.0, -8.0, 11.0)),
    Scan("1 x 1 x 5 mm", (1.0, 1.0, 5.0), "SPL"),
    Scan("1 x 1 x 5 mm, resampled", (1.0, 1.0, 5.0), "SPL", (1.0, 1.0, 1.0)),
]


def _size(row: Row) -> int:
    """Three cells at least, so that the middle one is drawn whole; UNETRs take 64 voxels."""
    return 64 if "UNETR" in row.net else max(3 * row.jump, 32)


def landed(placed: Geometry, image: Geometry, cell: tuple[int, ...]) -> Doubles:
    """Where unit evidence in one cell lies on the map, RAS mm."""
    evidence = np.zeros(placed.shape)
    evidence[cell] = 1.0
    maps = draw(tiny.explained(evidence, placed, image))
    assert maps.signed.outside_image == 0.0
    return image.world_ras(_middle(maps.signed.values))


def off_by(image: Geometry, found: Doubles, true: Doubles) -> float:
    """How far two points in mm are apart along the axis where it is most, in voxels of the scan."""
    return float(np.abs(image.index_ijk(found) - image.index_ijk(true)).max())


def _cases() -> list[Any]:
    large = ("SEResNet50", "DenseNet121", "EfficientNet-b0", "SwinUNETR", "resnet50")
    return [
        pytest.param(row, id=f"{row.net}-{row.layer}", marks=[pytest.mark.slow])
        if row.net in large and (row.jump > 8 or row.net == "SwinUNETR")
        else pytest.param(row, id=f"{row.net}-{row.layer}")
        for row in TABLE
    ]


@pytest.mark.parametrize("row", _cases())
def test_a_point_source_lands_within_half_a_voxel(row: Row) -> None:
    """And the fault of peers, who stretch the grid of cells over the scan, does not."""
    net, size = made(row.net), _size(row)
    shape = (1, size, size, size)
    info = trace(net, shape).find(row.layer)
    assert info is not None
    cell = tuple(n // 2 for n in info.shape[1:])
    with at_rest(net):
        placed = place(net, info, shape)
    centre = true_centre(linear_twin(net), row.layer, size, cell)
    for scan in SCANS:
        grid, image = scan.grids(size)
        true = grid.world_ras(centre)
        here = cells(grid, placed.jump, placed.start, info.shape[1:])
        assert off_by(image, landed(here, image, cell), true) < HALF_A_VOXEL, scan.name
    stretched = F.interpolate(_unit(info.shape[1:], cell), size=(size,) * 3, mode="trilinear")
    error = _middle(stretched[0, 0].numpy()) - centre
    assert error == pytest.approx([row.peers] * 3, abs=1e-3)
    within = bool(np.abs(error).max() < HALF_A_VOXEL - 1e-3)
    assert within is (row.peers == 0), "the fault must be seen"


def _unit(shape: tuple[int, ...], cell: tuple[int, ...]) -> torch.Tensor:
    evidence = torch.zeros(1, 1, *shape)
    evidence[(0, 0, *cell)] = 1.0
    return evidence


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("resnet18", "layer1", 33),
        ("BasicUNet", "down_2", 48),
        ("UNet", "model.1.submodule.1.submodule.1.submodule", 96),
        ("DynUNet", "bottleneck", 80),
    ],
)
def test_the_centre_is_that_of_all_a_cell_sees(name: str, layer: str, size: int) -> None:
    """With every tap of every kernel alike: no border cuts what the middle cell sees."""
    net, shape = made(name), (1, size, size, size)
    info = trace(net, shape).find(layer)
    assert info is not None
    assert info.lattice is not None
    cell = tuple(n // 2 for n in info.shape[1:])
    says = np.array(info.lattice.start) + np.array(info.lattice.jump) * cell
    assert info.lattice.field[0] <= 2 * min(says[0], size - 1 - says[0]) + 1
    found = true_centre(linear_twin(net, box=True), layer, size, cell)
    assert found == pytest.approx(says, abs=0.01)


# -------------------------------------------------------------------- flips and shifts


class Mirrored(nn.Module):
    """Stride 4 with kernels that are their own mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nets.conv(1, 4, 2), nn.ReLU(), nets.conv(4, 4, 2), nn.ReLU())
        self.rest = nn.Sequential(nets.conv(4, 4), nn.ReLU(), nets.Pooled(4))
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv3d):
                    for axis in (2, 3, 4):
                        module.weight.copy_((module.weight + module.weight.flip(axis)) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rest(self.layer(x))
        return out


def _map_of(net: nn.Module, array: npt.NDArray[Any], method: str) -> tuple[Any, Any]:
    e = mg.explain(nets.as_volume(array), net, target=0, layer="layer", method=method)
    return e, draw(e).signed.values


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "integrated"])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_mirrored_scan_has_a_mirrored_map(method: str, axis: int) -> None:
    """On s m + 1 voxels cells lie alike from both ends; on an even number they cannot."""
    net = nets.made(Mirrored)
    gap = {}
    for size in (17, 16):
        array = nets.scan(size)
        _, here = _map_of(net, array, method)
        _, there = _map_of(net, np.flip(array, axis).copy(), method)
        gap[size] = float(np.abs(np.flip(there, axis - 1) - here).max() / np.abs(here).max())
    assert gap[17] < 2e-6
    assert gap[16] > 0.02, "an even size must fail, or this test tests nothing"


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_a_scan_shifted_by_whole_cells_has_a_shifted_map(method: str) -> None:
    net = nets.made(Mirrored)
    array = np.zeros((1, 65, 65, 65), np.float32)
    array[:, 24:33, 26:35, 28:37] = nets.scan(9)
    _, here = _map_of(net, array, method)
    _, there = _map_of(net, np.roll(array, (4, -8, 8), (1, 2, 3)), method)
    moved = np.roll(here, (4, -8, 8), (0, 1, 2))
    inside = (slice(16, 49),) * 3
    size = np.abs(here).max()
    assert np.abs(there - moved)[inside].max() < 1e-5 * size
    assert np.abs(there - np.roll(moved, 1, 0))[inside].max() > 0.02 * size


# ------------------------------------------------------------------------------ export


def test_the_file_of_cells_is_the_dense_map_at_their_centres(tmp_path: Path) -> None:
    """One cell of a stride-4 grid on an oblique scan, written and read, held against the map."""
    net = nets.made(Mirrored)
    image = Geometry((17, 17, 17), tiny.affine_of("LPS", (1, 1, 5), (3, -20, 7), (5, -8, 11)))
    info = trace(net, (1, 17, 17, 17)).find("layer")
    assert info is not None
    with at_rest(net):
        placed = place(net, info, (1, 17, 17, 17))
    grid = cells(image, placed.jump, placed.start, info.shape[1:])
    evidence = np.zeros(grid.shape)
    evidence[1, 2, 3] = 1.0
    placed = replace(placed, uncertainty_voxels=(0.5, 0.0, 1.25))
    e = tiny.explained(evidence, grid, image, cells=placed)
    path = nifti.write_explanation(e, tmp_path / "explanation.nii.gz", to_record(e))
    back = nifti.read_explanation(path)
    assert back == e
    stored = tiny.opened(path)
    every = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    world = every @ stored.affine[:3, :3].T + stored.affine[:3, 3]
    voxels = np.rint(image.index_ijk(world)).astype(int)
    assert image.index_ijk(world) == pytest.approx(voxels, abs=1e-4)
    dense = draw(back).signed.values[tuple(np.moveaxis(voxels, -1, 0))]
    density = stored.get_fdata() / (drawing(grid, image).share() * image.voxel_ml)
    assert dense == pytest.approx(density, rel=1e-5, abs=1e-9)
    assert dense[1, 2, 3] == dense.max()
