"""Do the methods of the CAM family equal their papers, written out slowly cell by cell?"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from med_gradcam.capture import Capture
from med_gradcam.methods import (
    Bound,
    eigencam,
    eigengradcam,
    gradcam_pp,
    kpcacam,
    layercam,
    seg_xres_cam,
    shapleycam,
    smooth_gradcam_pp,
    xgradcam,
)
from med_gradcam.methods._voxels import interpolated, spread
from med_gradcam.tail import at_rest
from tests.engine import nets
from tests.oracle import cams, papers
from tests.oracle.papers import Numbers

LOOSE = Bound(float("inf"), 0.0)
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-6)]
# From activation and gradient alone.
ORACLES: dict[ModuleType, Callable[[Numbers, Numbers], Numbers]] = {
    gradcam_pp: cams.gradcam_pp,
    xgradcam: cams.xgradcam,
    layercam: cams.layercam,
    eigencam: lambda a, g: cams.eigen(a, a.mean(axis=0)),
    eigengradcam: lambda a, g: cams.eigen(g * a, (g * a).sum(axis=0)),
    seg_xres_cam: lambda a, g: cams.seg_xres_cam(a, g, seg_xres_cam.WINDOW),
}
CASES = [pytest.param(m, o, id=m.__name__.rpartition(".")[2]) for m, o in ORACLES.items()]


def _far(ours: Numbers, theirs: Numbers) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _seen(
    net: nn.Module, dtype: torch.dtype, layer: str = "first", size: int = 16
) -> tuple[Capture, Numbers, Numbers]:
    """The engine's capture, and activation and gradient of the plain network."""
    x, target = nets.batch(nets.scan(size), dtype), nets.score_of(1, "softmax")
    activation, gradient = papers.full_gradient(net, layer, x, target)
    capture = nets.captured(net, layer, x, target)
    return capture, activation.double().numpy(), gradient.double().numpy()


def _map(method: ModuleType, capture: Capture) -> Numbers:
    with at_rest(capture.tail.net):
        return np.asarray(method.evidence(capture, LOOSE).values.numpy())


@pytest.mark.parametrize(("method", "oracle"), CASES)
@pytest.mark.parametrize("tail", nets.TAILS)
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_a_map_equals_its_paper(
    method: ModuleType,
    oracle: Callable[[Numbers, Numbers], Numbers],
    tail: str,
    dtype: torch.dtype,
    near: float,
) -> None:
    capture, activation, gradient = _seen(nets.made(nets.TAILS[tail], dtype=dtype), dtype)
    theirs = oracle(activation, gradient)
    assert theirs.any()
    assert _far(_map(method, capture), theirs) < near


@pytest.mark.parametrize(("method", "oracle"), CASES)
def test_float32_maps_equal_float64_maps(
    method: ModuleType, oracle: Callable[[Numbers, Numbers], Numbers]
) -> None:
    del oracle
    one, other = (
        _map(method, _seen(nets.made(nets.gated, dtype=dtype), dtype)[0])
        for dtype in (torch.float64, torch.float32)
    )
    assert _far(other, one) < 1e-5


@pytest.mark.parametrize("method", [eigencam, eigengradcam, layercam, seg_xres_cam])
def test_layers_with_negative_values_follow_their_papers_too(method: ModuleType) -> None:
    """Behind a convolution without ReLU; the other two have no formula of the paper there."""
    net = nets.made(nets.gated, dtype=torch.float64)
    capture, activation, gradient = _seen(net, torch.float64, "rest.0")
    assert activation.min() < 0 < activation.max()
    assert _far(_map(method, capture), ORACLES[method](activation, gradient)) < 1e-10


# ------------------------------------------------------------------------------- Grad-CAM++


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradcam_pp_keeps_its_weights_up_to_64_cells_cubed(size: int, dtype: torch.dtype) -> None:
    """Before mean + linear g = w / N, so the weight is w+ / (2 + w mean A): gradients of 1e-6."""
    net = nets.made(nets.pooled_linear, dtype=dtype)
    x = nets.batch(nets.scan(2 * size), dtype)
    capture = nets.captured(net, "first", x, nets.score_of(1))
    activation = capture.activation.double().numpy()
    w = nets.weight(net, "rest.head")[1].double().numpy()
    mean = activation.mean(axis=(1, 2, 3))
    theirs = cams.relu(np.tensordot(np.maximum(w, 0) / (2 + w * mean), activation, axes=1))
    assert _far(_map(gradcam_pp, capture), theirs) < (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_gradcam_pp_does_not_depend_on_the_unit_of_the_activation(factor: float) -> None:
    """A -> cA with g -> g / c: what every eps breaks."""
    capture, _, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    before = _map(gradcam_pp, capture)
    capture.known_gradient = capture.gradient() / factor
    capture.activation = capture.activation * factor
    assert _far(_map(gradcam_pp, capture), before) < 1e-12


@pytest.mark.parametrize("near", [0.0, 1e-9, -1e-9])
def test_the_weight_of_gradcam_pp_stays_finite_at_its_pole(near: float) -> None:
    """A channel whose sum is -8, though one cell of it is positive: 2 + g sum A = 0."""
    activation = torch.full((1, 2, 2, 2), -1.5, dtype=torch.float64)
    activation[0, 0, 0, 0] = 2.5
    gradient = torch.full((1, 2, 2, 2), 0.1, dtype=torch.float64)
    gradient[0, 1, 1, 1] = 0.25 + near
    found = gradcam_pp.weighted(activation, gradient, gradient)
    weight = 7 * 0.1 / (2 - 8 * 0.1) + 0.25  # the paper's, but for the one at the pole
    assert float(found.max()) == pytest.approx(2.5 * weight, rel=1e-6)
    plain = cams.gradcam_pp((activation + 1.5).numpy(), gradient.numpy())
    assert _far(gradcam_pp.weighted(activation + 1.5, gradient, gradient).numpy(), plain) < 1e-12


@pytest.mark.parametrize("tail", ["gate", "SiLU MLP", "max pool"])
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_smooth_gradcam_pp_equals_its_paper(tail: str, dtype: torch.dtype, near: float) -> None:
    net = nets.made(nets.TAILS[tail], dtype=dtype)
    x, target = nets.batch(nets.scan(), dtype), nets.score_of(1, "softmax")
    noise = (smooth_gradcam_pp.NOISE, smooth_gradcam_pp.SAMPLES, 7)
    theirs = cams.smooth_gradcam_pp(net, "first", x, target, noise)
    capture = nets.captured(net, "first", x, target)
    capture.seed = 7
    assert _far(_map(smooth_gradcam_pp, capture), theirs) < near
    assert capture.forwards == smooth_gradcam_pp.SAMPLES
    capture.seed = 8
    assert _far(_map(smooth_gradcam_pp, capture), theirs) > 10 * near


def test_without_noise_smooth_gradcam_pp_is_gradcam_pp(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, _, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    monkeypatch.setattr(smooth_gradcam_pp, "NOISE", 0.0)
    assert _far(_map(smooth_gradcam_pp, capture), _map(gradcam_pp, capture)) < 1e-12


# ------------------------------------------------------------------------------- XGrad-CAM


def _two_channels(sums_to: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A plain channel, and one whose activations add up to next to nothing."""
    torch.manual_seed(1)
    activation = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    activation[0] = activation[0].abs()
    activation[1] -= activation[1].mean() - sums_to / 64
    return activation, torch.randn(2, 4, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("sums_to", [0.0, 1e-12, -1e-3, 1.0])
def test_a_channel_that_cancels_is_added_cell_by_cell(sums_to: float) -> None:
    capture, _, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    capture.activation, capture.known_gradient = _two_channels(sums_to)
    a, g = capture.activation.numpy(), capture.known_gradient.numpy()
    ours = _map(xgradcam, capture)
    assert _far(ours, cams.xgradcam(a[:1], g[:1]) + (g[1] * a[1])) < 1e-12
    assert ours.sum() == pytest.approx((g * a).sum(), rel=1e-12)


def test_a_channel_that_does_not_cancel_keeps_its_weight() -> None:
    capture, _, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    capture.activation, capture.known_gradient = _two_channels(20.0)
    a, g = capture.activation.numpy(), capture.known_gradient.numpy()
    assert _far(_map(xgradcam, capture), cams.xgradcam(a, g)) < 1e-12


def test_a_dead_channel_adds_nothing() -> None:
    capture, _, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    whole = _map(xgradcam, capture)
    capture.activation = torch.cat([capture.activation, 0 * capture.activation[:1]])
    capture.known_gradient = torch.cat([capture.gradient(), capture.gradient()[:1]])
    assert _far(_map(xgradcam, capture), whole) < 1e-15


# ------------------------------------------------------------------------------- principal parts


@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
@pytest.mark.parametrize("layer", ["first", "rest.0"])
def test_kpcacam_equals_the_whole_kernel_matrix(
    dtype: torch.dtype, near: float, layer: str
) -> None:
    capture, activation, _ = _seen(nets.made(nets.gated, dtype=dtype), dtype, layer, 14)
    assert _far(_map(kpcacam, capture), cams.kpca(activation)) < near


def test_kpcacam_on_landmarks_is_close_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, activation, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    whole = cams.kpca(activation)
    monkeypatch.setattr(kpcacam, "LANDMARKS", 200)
    monkeypatch.setattr(kpcacam, "BLOCK", 100)
    first, again = _map(kpcacam, capture), _map(kpcacam, capture)
    capture.seed = 1
    other = _map(kpcacam, capture)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    for found in (first, other):
        assert np.corrcoef(found.ravel(), whole.ravel())[0, 1] > 0.99
    monkeypatch.setattr(kpcacam, "LANDMARKS", 512)
    assert _far(_map(kpcacam, capture), whole) < 1e-10


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.7])
def test_kpcacam_of_cells_that_are_all_alike_is_zero(constant: float) -> None:
    """And not the rounding of their kernel, blown up."""
    capture, _, _ = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    capture.activation = torch.full_like(capture.activation, constant)
    assert not _map(kpcacam, capture).any()


@pytest.mark.parametrize("method", [eigencam, kpcacam])
def test_large_grids_need_no_matrix_of_cells_by_cells(method: ModuleType) -> None:
    """40^3 cells squared would be 33 GB in float64."""
    net = nets.made(nets.pooled_linear)
    capture = nets.captured(net, "first", nets.batch(nets.scan(80)))
    assert _map(method, capture).shape == (40, 40, 40)


# ------------------------------------------------------------------------------- curvature


@pytest.mark.parametrize("tail", ["gate", "SiLU MLP", "group norm", "batch norm", "mean + linear"])
@pytest.mark.parametrize(("dtype", "near"), PRECISIONS)
def test_shapleycam_equals_the_whole_hessian(tail: str, dtype: torch.dtype, near: float) -> None:
    net, target = nets.made(nets.TAILS[tail], dtype=dtype), nets.score_of(1, "softmax")
    capture, activation, gradient = _seen(net, dtype, size=6)
    hessian = cams.hessian_at(net, "first", nets.batch(nets.scan(6), dtype), target)
    theirs = cams.shapleycam(activation, gradient, hessian)
    assert _far(_map(shapleycam, capture), theirs) < near
    bent = tail in ("gate", "SiLU MLP", "group norm")
    without = cams.shapleycam(activation, gradient, 0 * hessian)
    assert (_far(without, theirs) > 1e-4) is bent


def test_shapleycam_equals_central_differences_of_the_tail() -> None:
    net = nets.made(nets.silu_mlp, dtype=torch.float64)
    capture, activation, gradient = _seen(net, torch.float64)
    h = 1e-4
    up, down = capture.gradients(
        torch.stack([(1 + h) * capture.activation, (1 - h) * capture.activation])
    )
    bent = ((up - down) / (2 * h)).numpy()
    weights = (gradient - bent / 2).mean(axis=(1, 2, 3))
    assert _far(_map(shapleycam, capture), np.tensordot(weights, activation, axes=1)) < 1e-6


# ------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 11])
def test_windows_that_do_not_fit_are_cut_off(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, activation, gradient = _seen(nets.made(nets.gated, dtype=torch.float64), torch.float64)
    monkeypatch.setattr(seg_xres_cam, "WINDOW", window)
    theirs = cams.seg_xres_cam(activation, gradient, window)
    assert _far(_map(seg_xres_cam, capture), theirs) < 1e-10
    if window == 1:
        assert _far(theirs, papers.hirescam(activation, gradient)) < 1e-12
    if window >= 8:
        assert _far(theirs, papers.gradcam(activation, gradient)) < 1e-12


# ------------------------------------------------------------------------------- cells to voxels


@pytest.mark.parametrize(("start", "jump"), [(0.0, 2.0), (1.0, 4.0), (1.5, 4.0), (3.0, 8.0)])
def test_reading_and_handing_out_equal_the_loops(start: float, jump: float) -> None:
    cells = np.random.default_rng(0).standard_normal([int(16 / jump)] * 3)
    given = torch.from_numpy(cells)
    where = ((start,) * 3, (jump,) * 3, (16, 16, 16))
    read = interpolated(given, *where).numpy()
    assert _far(read, cams.read_between(cells, (16, 16, 16), start, jump)) < 1e-12
    out = spread(given, *where).numpy()
    assert _far(out, cams.handed_out(cells, (16, 16, 16), start, jump)) < 1e-12
    assert out.sum() == pytest.approx(cells.sum(), rel=1e-12)


def test_a_cell_in_the_padding_gives_all_to_the_nearest_voxel() -> None:
    cells = torch.zeros(4, 4, 4, dtype=torch.float64)
    cells[0, 1, 1] = 3.0  # its centre lies at voxel -6, five before the nearest it could touch
    out = spread(cells, (-6.0, 0.0, 0.0), (4.0, 4.0, 4.0), (8, 12, 12))
    assert float(out.sum()) == pytest.approx(3.0)
    assert float(out[0].sum()) == pytest.approx(3.0)


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that is made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *(t.numel() for t in made), 0)
        return out


@pytest.mark.parametrize("bring", [interpolated, spread])
@pytest.mark.parametrize("cells", [4, 20])
def test_cells_are_brought_onto_voxels_one_axis_at_a_time(bring: Any, cells: int) -> None:
    """All three at once would take 20^3 x 20^2 numbers here, and 64^5 in a real scan."""
    jump = 20 / cells
    with _Largest() as largest:
        bring(torch.ones([cells] * 3).double(), ((jump - 1) / 2,) * 3, (jump,) * 3, (20, 20, 20))
    assert 0 < largest.numbers <= 20**3
