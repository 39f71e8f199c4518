"""Which maps were drawn in the wrong place, or saved where no viewer looks for them?"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import med_gradcam as mg
from benchmarks.peers.adapters import GRADCAM, peer
from benchmarks.traps import ours
from benchmarks.traps.cases import Array, Case, array, blocks, half_maximum, lesion, middle, resnet
from benchmarks.traps.rows import Figure, Row, trap, tried


def _off(dense: Array, truth: Array) -> float:
    """How far the map's middle is from the truth, worst axis, voxels."""
    return round(float(np.abs(middle(dense) - truth).max()), 1)


def _peak(dense: Array, truth: Array) -> float:
    """The same for the middle of the strongest voxels."""
    strongest = np.argwhere(dense >= dense.max() * (1 - 1e-6)).mean(0)
    return round(float(np.abs(strongest - truth).max()), 1)


def _inside(dense: Array, x: torch.Tensor) -> float:
    """Share of the voxels above half of the maximum that lie in the lesion."""
    region = half_maximum(dense)
    return round(float((region & (array(x)[0, 0] > 0)).sum() / region.sum()), 2)


@trap("S1", "The map is drawn up to half a cell off", "grad-cam")
def shifted() -> list[Row]:
    """A bright cube that fills one cell of a 4^3 grid on 64^3: at the corner and inside."""
    rows = []
    for where, corner in (("corner", (0, 0, 48)), ("inner", (16, 32, 16))):
        case = Case(blocks(16), "2", lesion((64, 64, 64), corner, 16))
        truth = np.array(corner) + 7.5
        mine = np.maximum(ours.dense(case), 0)
        for tool in ("grad-cam", "MONAI", "medcam"):
            dense = array(GRADCAM[tool](case.own().net, case.layer, 1)(case.x)).squeeze()
            dense = 1 - dense if tool == "MONAI" else dense  # S2 is another trap
            rows += [
                Row("S1", tool, f"{where} lesion: middle of the map, voxels off", 0.0,
                    _off(dense, truth), _off(mine, truth), within=0.5),
                Row("S1", tool, f"{where} lesion: strongest voxels, voxels off", 0.0,
                    _peak(dense, truth), _peak(mine, truth), within=0.5),
                Row("S1", tool, f"{where} lesion: share of the map's upper half inside it", 1.0,
                    _inside(dense, case.x), _inside(mine, case.x), within=0.05),
            ]  # fmt: skip
    return rows


@trap("S31", "Cells are taken to tile the scan, where padded convolutions put them elsewhere",
      "MONAI", "medcam", "grad-cam", "captum", own_network=True)  # fmt: skip
def lattice(case: Case | None = None) -> list[Row]:
    """Where a middle cell of the layer looks, and where each tool's own resizing draws it."""
    case = case or resnet(64)
    with torch.no_grad():
        shape = ours.native(case).shape
    cell = tuple(n // 2 for n in shape)
    truth = looks_at(case, cell)
    spot = np.zeros(shape)
    spot[cell] = 1.0
    size = tuple(case.x.shape[2:])
    one = torch.from_numpy(spot).float()[None, None]
    drawn: dict[str, Callable[[], Any]] = {
        "MONAI": lambda: peer("monai.visualize.visualizer").default_upsampler(size)(one),
        "medcam": lambda: peer("medcam.medcam_utils").interpolate(one, size),
        "grad-cam": lambda: peer("pytorch_grad_cam.utils.image").scale_cam_image(
            spot[None], size[::-1]
        ),
        "captum": lambda: peer("captum.attr").LayerAttribution.interpolate(one, size),
    }
    e = ours.explained(case)
    mine = e.image.index_ijk(e.grid.world_ras(list(cell)))
    off = round(float(np.abs(mine - truth).max()), 1)
    text = f"cell {cell} of {type(case.net).__name__} {case.layer}: drawn off, voxels"
    return [
        Row("S31", tool, text, 0.0, _off(array(draw()).squeeze(), truth), off, within=0.5)
        for tool, draw in drawn.items()
    ]


def looks_at(case: Case, cell: tuple[int, ...]) -> Array:
    """The voxel a cell looks at: the peak of its gradient once every kernel is positive and peaked.

    A copy of the network gets kernels that are highest in the middle, also for its pools, and plain
    norms; then the gradient of one cell is a hill over the voxels that it sees, in whatever way
    the network's strides and paddings place it. Nothing of this is shared with med_gradcam.
    """
    net = copy.deepcopy(case.net).eval()
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Conv3d):
            with torch.no_grad():
                module.weight.copy_(_hill(module.kernel_size).expand_as(module.weight))
                if module.bias is not None:
                    module.bias.zero_()
        elif isinstance(module, torch.nn.BatchNorm3d):
            module.reset_parameters()
            module.reset_running_stats()
        elif isinstance(module, torch.nn.MaxPool3d):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, _Peaked(module))
    kept: list[Any] = []
    net.get_submodule(case.layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    x = torch.ones_like(case.x, dtype=torch.float64).requires_grad_()
    net.double()(x)
    (gradient,) = torch.autograd.grad(kept[0][(0, slice(None), *cell)].sum(), x)
    hill = array(gradient)[0].sum(0)
    peak: Array = np.argwhere(hill >= hill.max() * (1 - 1e-9)).mean(0)
    return peak


class _Peaked(torch.nn.Module):
    """A pool of the same kernel, stride and padding as `pool`, with weights that peak."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        size, stride, padding = (
            (n,) * 3 if isinstance(n, int) else tuple(n)
            for n in (pool.kernel_size, pool.stride, pool.padding)
        )
        self.stride, self.padding = stride, padding
        self.register_buffer("kernel", _hill(size)[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled channels."""
        each = x.flatten(0, 1)[:, None]
        out = torch.nn.functional.conv3d(each, self.kernel, None, self.stride, self.padding)  # type: ignore[arg-type]
        return out.reshape(*x.shape[:2], *out.shape[2:])


def _hill(kernel: Any) -> torch.Tensor:
    """A positive kernel (*kernel,) that falls off steeply from its middle, with sum 1."""
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in kernel]
    a, b, c = (torch.exp(-2 * axis.abs()) for axis in axes)
    hill = a[:, None, None] * b[None, :, None] * c[None, None, :]
    return hill / hill.sum()


@trap("S10", "The saved NIfTI file lies elsewhere, in other axes, on the feature grid", "medcam")
def saved() -> list[Row]:
    """The world position of the lesion in the file that each tool writes, and the file's grid."""
    import nibabel as nib

    case = Case(blocks(16), "2", lesion((32, 48, 64), (16, 16, 32), 16))
    affine = np.diag([0.7, 0.7, 3.0, 1.0])
    affine[:3, 3] = (-20.0, 35.0, -90.0)
    truth = (affine @ [23.5, 23.5, 39.5, 1.0])[:3]

    def away(path: Path) -> tuple[Figure, Figure, Figure]:
        image: Any = nib.load(path)
        at = middle(np.asarray(image.dataobj, dtype=np.float64))
        found = (image.affine @ [*at, 1.0])[:3]
        mm = round(float(np.linalg.norm(found - truth)), 1)
        return mm, "x".join(str(n) for n in image.shape), str(image.get_data_dtype())

    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder) / "medcam"
        injected = peer("medcam.medcam_inject").inject(
            case.own().net, output_dir=str(theirs), layer=case.layer, label=1, save_maps=True
        )
        injected(case.x)
        e = ours.explained(case, affine=affine)
        written = mg.write(e, Path(folder) / "ours", formats=("nifti",))
        a = tried(lambda: away(next(theirs.rglob("*.nii.gz"))))
        b = away(written / "for.nii.gz")
    names = ("lesion in the file off its true place, mm", "grid of the file", "values stored as")
    right: tuple[Figure, ...] = (0.0, "32x48x64", "float32")
    return [
        Row("S10", "medcam", name, want, theirs, mine, within=1.0)
        for name, want, theirs, mine in zip(names, right, a, b, strict=True)
    ]


@trap("S23", "Guided Grad-CAM is enlarged in blocks, not smoothly", "captum")
def blocky() -> list[Row]:
    """The largest step between neighbouring voxels of the enlarged map, as a share of its range."""
    # Bright everywhere, so that guided backpropagation is even and the rest is the enlarged map.
    case = Case(blocks(16), "2", 1 + lesion((64, 64, 64), (16, 32, 16), 16))

    def step(dense: Array) -> float:
        return round(float(max(np.abs(np.diff(dense, axis=a)).max() for a in range(3))
                           / np.ptp(dense)), 2)  # fmt: skip

    def mine() -> float:
        return step(array(ours.explained(case, "guided_gradcam").evidence))

    net = case.own().net
    guided = peer("captum.attr").GuidedGradCam(net, net.get_submodule(case.layer))
    x = case.x.clone().requires_grad_()
    theirs = tried(lambda: step(array(guided.attribute(x, target=1))[0, 0]))
    return [
        Row("S23", "captum", "largest step between neighbouring voxels, share of the range",
            0.06, theirs, ours.if_offered("guided_gradcam", mine), within=0.02)
    ]  # fmt: skip


def _of(measure: Any, call: Any, x: Any) -> Any:
    return measure(call(x))


@trap("S24", "The map keeps the affine of the scan, on another grid", "torchcam", "captum")
def affine_kept() -> list[Row]:
    """The width of the map by the affine it carries, against that of the scan it explains."""
    meta_tensor = peer("monai.data").MetaTensor

    case = Case(blocks(16), "2", lesion((32, 32, 32), (16, 16, 16), 16))
    affine = np.diag([0.7, 0.7, 3.0, 1.0])
    scan = meta_tensor(case.x, affine=torch.from_numpy(affine))

    def width(values: Any) -> str:
        if not isinstance(values, meta_tensor):
            return "no affine"
        spacing = np.linalg.norm(array(values.affine)[..., :3, :3].reshape(3, 3), axis=0)
        shape = values.shape[-3:]
        return " x ".join(f"{n * mm:.1f}" for n, mm in zip(shape, spacing, strict=True))

    e = ours.explained(case, affine=affine)
    mine = " x ".join(f"{n * mm:.1f}" for n, mm in zip(e.grid.shape, e.cell_mm, strict=True))
    rows = []
    for tool in ("torchcam", "captum"):
        call = GRADCAM[tool](case.own().net, case.layer, 1)
        theirs = tried(_of, width, call, scan)
        rows.append(
            Row("S24", tool, "width of the map by its own affine, mm", "22.4 x 22.4 x 96.0",
                theirs, mine)
        )  # fmt: skip
    return rows
