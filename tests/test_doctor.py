"""Are the traps worked out as the tools work, and is the network left alone?

Where a tool is at hand (MONAI, scipy, torch) its own code is the witness; else its rule is written
again here from its source, another way.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import med_gradcam as mg
from med_gradcam.checkup import facts, maps, network, places, report, rows
from med_gradcam.checkup.facts import Facts
from med_gradcam.checkup.report import Checkup, doctor
from med_gradcam.checkup.rows import VERDICTS, Row, correlation
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.opening import opened
from med_gradcam.samples import folder
from tests.tiny import affine_of, save_model, spec


def scan(size: int = 16, count: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise with a bright cube, (C, I, J, K)."""
    array = 0.3 * torch.randn((count, *(size,) * 3), generator=torch.Generator().manual_seed(seed))
    array[:, 3:7, 4:8, 5:9] += 2
    return array


def small(count: int = 1, outputs: int = 2, middle: nn.Module | None = None) -> nn.Sequential:
    """Convolutions with stride 2, a norm, a hidden head; `middle` after the second of them."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv3d(count, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv3d(6, 8, 3, stride=2, padding=1), middle or nn.BatchNorm3d(8), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs),
    ).eval()  # fmt: skip


def row(found: Checkup, key: str) -> Row:
    return next(r for r in found.rows if r.key == key)


def looked(net: nn.Module, x: torch.Tensor, **settings: Any) -> Facts:
    """The facts alone."""
    training, modes = facts.modes_of(net)
    with opened(x, net, settings) as case:
        return facts.gather(case, training, modes, 1)


def gradcam(net: nn.Module, x: torch.Tensor, layer: str, c: int) -> torch.Tensor:
    """Grad-CAM of a logit by plain torch, signed."""
    kept: list[torch.Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    score = net(x[None])[0, c]
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    return (gradient.mean(dim=(2, 3, 4), keepdim=True) * kept[0]).sum(1)[0].detach()


# ------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(("voxels", "count"), [(48, 3), (64, 4), (30, 7)])
def test_where_resizing_draws_a_cell(voxels: int, count: int) -> None:
    """torch and scipy draw one bright cell; its middle, or its peak, is where the rule says."""
    ndimage = pytest.importorskip("scipy.ndimage")
    for n in range(1, count - 1):  # the first and the last are held up to the border
        one = torch.zeros(1, 1, count)
        one[0, 0, n] = 1
        dense = functional.interpolate(one, size=voxels, mode="linear", align_corners=False)[0, 0]
        middle = float((dense * torch.arange(voxels)).sum() / dense.sum())
        assert middle == pytest.approx(places.half_pixel(voxels, count)[n], abs=0.02 * voxels)
        exact = places.half_pixel(voxels, count)[n]
        assert abs(int(dense.argmax()) - exact) <= 0.51
        zoomed = ndimage.zoom(one[0, 0].numpy(), voxels / count, order=1)
        assert abs(int(zoomed.argmax()) - places.aligned(voxels, count)[n]) <= 0.51
    assert places.aligned(voxels, count)[[0, -1]].tolist() == [0, voxels - 1]


def test_the_figures_of_a_residual_network() -> None:
    """Layer 4 of MONAI's ResNet: cells at 0, 16, 32, 48; half-pixels put them 7.5 voxels on."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    net = nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2, widen_factor=0.1)
    affine = affine_of("LPS", (0.7, 0.7, 3.0))
    f = looked(net.eval(), scan(64), layer="layer4", target=1, affine=affine)
    figures = places.resized(f).figures
    assert figures["half_pixel_worst_voxels"] == [7.5] * 3
    assert figures["aligned_worst_voxels"] == [15.0] * 3  # the last cell: 48 drawn at 63
    assert figures["half_pixel_voxels"] == [7.5] * 3
    off = np.array([-0.7 * 7.5, -0.7 * 7.5, 3 * 7.5])  # towards L, P, S
    assert figures["half_pixel_ras_mm"] == pytest.approx(off.tolist())
    assert figures["half_pixel_mm"] == pytest.approx(float(np.linalg.norm(off)))
    assert "23.7 mm off, towards L 5 P 5 S 22 mm" in places.resized(f).finding
    assert places.resized(f).verdict == "wrong"
    assert figures["cell_start_voxels"] == [0.0] * 3
    here = np.array(places.strongest(f))
    true = affine[:3, :3] @ (16 * here)
    kept = affine[:3, :3] @ here  # the scan's affine on the cells' indices
    filed = here[[1, 2, 0]]  # medcam's file: no affine, axes (1, 2, 0)
    saved = places.saved(f).figures
    assert saved["kept_affine_mm"] == pytest.approx(float(np.linalg.norm(kept - true)))
    assert saved["medcam_mm"] == pytest.approx(float(np.linalg.norm(filed - true)))
    assert saved["kept_affine_covers_mm"] == pytest.approx([4 * 0.7, 4 * 0.7, 4 * 3])
    size = places.resolution(f).figures
    assert size["cell_mm"] == pytest.approx([11.2, 11.2, 48])
    assert size["smallest_mm"] == pytest.approx(96)
    ball = np.pi / 6 * 10**3
    assert size["lesion_10_mm_in_cells"] == pytest.approx(ball / (11.2 * 11.2 * 48))


def test_cells_that_tile_the_scan_are_drawn_in_their_place() -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 4, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(4, 2),
    ).eval()  # fmt: skip
    found = doctor(net, scan(), layer="1")
    place = row(found, "place")
    assert place.figures["half_pixel_mm"] == pytest.approx(0, abs=1e-9)
    assert "drawn in its place by half-pixel resizing" in place.finding
    assert place.verdict == "wrong"  # corners aligned: not in their place
    assert rows.MONAI not in place.tools
    assert rows.GRAD_CAM in place.tools


def test_windows_of_a_larger_scan(tmp_path: Path) -> None:
    model = mg.load_model(save_model(tmp_path / "net"))
    small_one = doctor(model, mg.Volume(scan(12).numpy() * 100, mg.Geometry((12,) * 3, np.eye(4))))
    assert row(small_one, "windows").verdict == "not applicable"
    large = mg.Volume(scan(24).numpy() * 100, mg.Geometry((24,) * 3, np.eye(4)))
    windows = row(doctor(model, large, at="ijk:12,12,12"), "windows")
    assert (windows.verdict, windows.figures["patches"]) == ("check", 8)


# --------------------------------------------------------------------------------------- maps


def test_the_grad_cam_is_that_of_torch_and_of_explain() -> None:
    net, x = small(), scan()
    f = looked(net, x, layer="4", target=1)
    assert np.abs(f.gradcam(logit=True) - gradcam(net, x, "4", 1).numpy()).max() < 1e-7
    own = mg.explain(x, net, layer="4", target=1, method="gradcam")
    assert np.abs(f.gradcam() - own.evidence).max() < 1e-7
    assert f.score == pytest.approx(own.score, abs=1e-6)
    with torch.no_grad():
        assert f.logit == pytest.approx(float(net(x[None])[0, 1]), abs=1e-6)
    both = [gradcam(net, x, "4", c) for c in (0, 1)]
    for (_, high, low), one in zip(f.others, both, strict=True):
        assert (high, low) == pytest.approx((float(one.max()), float(one.min())), abs=1e-7)


def test_what_a_relu_hides() -> None:
    net, x = small(), scan()
    f = looked(net, x, layer="4", target=1)
    one = gradcam(net, x, "4", 1)
    figures = maps.sign(f).figures
    hidden = float((-one).clamp(min=0).sum() / one.abs().sum())
    assert figures["gradcam_against_share"] == pytest.approx(hidden, abs=1e-6)
    e = mg.explain(x, net, layer="4", target=1)
    share = e.sum_against / (e.sum_against + e.sum_for)
    assert figures["exact_against_share"] == pytest.approx(share, abs=1e-6)


def test_a_class_with_evidence_against_only() -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 3)
    ).eval()
    head, conv = net[4], net[0]
    assert isinstance(head, nn.Linear)
    assert isinstance(conv, nn.Conv3d)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        head.weight.copy_(torch.tensor([[1.0, 0.5], [-1.0, -0.5], [2.0, -1.0]]))
    f = looked(net, scan().abs(), layer="1", target=0, link="sigmoid")
    found = maps.sign(f)
    assert found.figures["classes_without_evidence_for"] == ["class 1"]
    assert "nothing but evidence against: class 1" in found.finding
    dark = maps.inverted(looked(net, scan().abs(), layer="1", target=1, link="sigmoid"))
    assert "0 everywhere" in dark.finding


def test_colours_are_those_of_monai() -> None:
    visualize = pytest.importorskip("monai.visualize")
    net, x = small(), scan()
    cam = visualize.GradCAM(nn_module=copy.deepcopy(net), target_layers="4")
    native = cam.compute_map(x[None], class_idx=1)
    drawn = cam.postprocessing(native)[0, 0].numpy()
    f = looked(net, x, layer="4", target=1)
    own = np.maximum(f.gradcam(logit=True), 0)
    assert correlation(drawn, own) == pytest.approx(-1, abs=1e-6)
    assert maps.inverted(f).figures["bright_share"] == pytest.approx(float((drawn == 1).mean()))


@pytest.mark.parametrize("size", [16, 40])
def test_grad_cam_pp_is_that_of_monai(size: int) -> None:
    """MONAI's exp(score) is a factor of all channels and falls out."""
    visualize = pytest.importorskip("monai.visualize")
    net, x = small(), scan(size)
    cam = visualize.GradCAMpp(nn_module=copy.deepcopy(net), target_layers="1")
    theirs = cam.compute_map(x[None], class_idx=1)[0, 0].detach().numpy()
    f = looked(net, x, layer="1", target=1)
    ours = maps.pp_with(f.activation, f.logit_gradient, 1e-7)
    assert correlation(ours, theirs) == pytest.approx(1, abs=1e-5)
    figures = maps.plusplus(f).figures
    right = np.maximum(mg.explain(x, net, layer="1", target=1, method="gradcam_pp", link="sigmoid")
                       .evidence, 0)  # fmt: skip
    assert figures["eps_1e-7"] == pytest.approx(correlation(theirs, right), abs=1e-4)


def test_grad_cam_pp_of_the_others() -> None:
    """pytorch-grad-cam's epsilon and torchcam's lost division, channel by channel."""
    f = looked(small(), scan(), layer="1", target=1)
    a, g = f.activation, f.logit_gradient
    for eps in (1e-6, None):
        total = torch.zeros(a.shape[1:], dtype=torch.float64)
        for k in range(len(a)):
            below = 2 * g[k] ** 2 + a[k].sum() * g[k] ** 3 + (eps or 0)
            alpha = g[k] ** 2 if eps is None else g[k] ** 2 / below
            total += (alpha * g[k].clamp(min=0)).sum() * a[k]
        theirs = total.clamp(min=0).numpy()
        assert np.allclose(maps.pp_with(a, g, eps), theirs, rtol=1e-6, atol=0)


def test_a_norm_behind_the_layer() -> None:
    net = small(middle=nn.InstanceNorm3d(8, affine=True))
    f = looked(net, scan(), layer="2", target=1)
    found = maps.norm(f)
    assert found.verdict == "wrong"
    assert found.figures["layers"] == ["2"]
    assert found.figures["largest_weight_share"] < 1e-5  # type: ignore[operator]
    assert maps.beside_the_ledger(f).verdict == "wrong"  # the exact map is right before a norm, too
    after = maps.norm(looked(net, scan(), layer="4", target=1))
    assert after.verdict == "check"
    assert "this layer is none of them" in after.meaning
    assert maps.norm(looked(small(), scan(), layer="4", target=1)).verdict == "not applicable"


def test_grad_cam_beside_the_exact_map() -> None:
    net, x = small(), scan()
    e = mg.explain(x, net, layer="4", target=1)
    own = mg.explain(x, net, layer="4", target=1, method="gradcam")
    found = maps.beside_the_ledger(looked(net, x, layer="4", target=1)).figures
    assert found["correlation"] == pytest.approx(
        float(np.corrcoef(e.evidence.ravel(), own.evidence.ravel())[0, 1]), abs=1e-4
    )
    turned = np.abs(e.evidence[e.evidence * own.evidence < 0]).sum() / np.abs(e.evidence).sum()
    assert found["other_sign_share"] == pytest.approx(float(turned), abs=1e-5)
    assert found["gradcam_sum"] == pytest.approx(float(own.evidence.sum()), abs=1e-5)
    assert e.reference_score is not None
    assert found["score_difference"] == pytest.approx(e.score - e.reference_score, abs=1e-6)
    tops = [
        e.grid.world_ras(np.unravel_index(np.abs(m).argmax(), m.shape))
        for m in (e.evidence, own.evidence)
    ]
    assert found["strongest_apart_mm"] == pytest.approx(float(np.linalg.norm(tops[0] - tops[1])))


def test_where_grad_cam_is_right_it_is_called_fine() -> None:
    """The mean over places and one linear layer, against nothing: both maps are the same."""
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    found = row(doctor(net, scan(), layer="1", target=1, reference="zero"), "grad-cam")
    assert found.figures["correlation"] == pytest.approx(1, abs=1e-6)
    assert (found.verdict, found.figures["other_sign_share"]) == ("fine", 0.0)


def test_the_logit_alone() -> None:
    net, x = small(outputs=3), scan()
    f = looked(net, x, layer="4", target=1)
    own = mg.explain(x, net, layer="4", target=1, method="gradcam").evidence
    r = correlation(own, gradcam(net, x, "4", 1).numpy())
    assert maps.raw_logit(f).figures["correlation"] == pytest.approx(r, abs=1e-5)
    alone = looked(net, x, layer="4", target=1, link="sigmoid")
    assert maps.raw_logit(alone).verdict == "not applicable"


def test_half_precision() -> None:
    """Gradients of at most half the smallest number, 2 ** -25, become 0 in float16."""
    net, x = small(), scan()
    last = net[9]
    assert isinstance(last, nn.Linear)
    sizes = looked(net, x, layer="1", target=1).logit_gradient.abs()
    with torch.no_grad():
        last.weight.mul_(2.0**-25 / float(sizes[sizes > 0].median()))
    f = looked(net, x, layer="1", target=1)
    g = f.logit_gradient
    lost = float(((g.abs() < 2.0**-25) & (g != 0)).sum() / (g != 0).sum())
    assert 0.3 < lost < 0.7
    found = maps.half(f)
    assert found.figures["lost_share"] == pytest.approx(lost, abs=0.01)
    assert found.verdict == "check"
    assert maps.half(looked(small(), x, layer="4", target=1)).verdict == "fine"
    one = maps.dim(f)
    largest = float(np.maximum(f.gradcam(logit=True), 0).max())
    assert one.figures["top"] == pytest.approx(largest / (largest + 1e-8), rel=1e-6)
    assert one.verdict == "wrong"


class InPlace(nn.Module):
    """A norm whose output an in-place ReLU changes, then one that a sum changes."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.act = nn.ReLU(inplace=inplace)
        self.more, self.head = nn.Conv3d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn(self.conv(x)))
        z = self.more(y)
        if self.inplace:
            z += y
        else:
            z = z + y
        out: torch.Tensor = self.head(z.relu().mean(dim=(2, 3, 4)))
        return out


def test_what_works_in_place() -> None:
    torch.manual_seed(2)
    net = InPlace(inplace=True).eval()
    x = scan()
    f = looked(net, x, layer="bn", target=1)
    assert set(f.run.overwritten) == {"bn", "more"}
    found = maps.overwritten(f)
    # As pytorch-grad-cam does: the tensor is kept, and its gradient by a hook on it.
    kept: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        kept.append(out)
        out.register_hook(gradients.append)

    handle = net.bn.register_forward_hook(keep)
    net(x[None])[0, 1].backward()
    handle.remove()
    theirs = (gradients[0].mean(dim=(2, 3, 4), keepdim=True) * kept[0]).sum(1)[0].relu().detach()
    right = np.maximum(gradcam(InPlaceTwin(net), x, "net.bn", 1).numpy(), 0)
    assert found.figures["correlation"] == pytest.approx(correlation(theirs, right), abs=1e-4)
    assert found.figures["this_layer"] is True
    assert found.figures["correlation"] < 0.99  # type: ignore[operator]
    assert found.verdict == "wrong"
    other = maps.overwritten(looked(net, x, layer="act", target=1))
    assert (other.verdict, other.figures["this_layer"]) == ("check", False)
    clean = InPlace(inplace=False).eval()
    assert maps.overwritten(looked(clean, x, layer="bn", target=1)).verdict == "not applicable"


class InPlaceTwin(nn.Module):
    """The same weights without anything in place."""

    def __init__(self, net: InPlace) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        self.net.inplace = self.net.act.inplace = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


# ------------------------------------------------------------------------------------ network


def test_the_slope_is_that_of_the_causal_test() -> None:
    """For a candidate it is the trial's own; a named layer is held against the same regions."""
    home = folder()
    model = mg.load_model(home / "nets" / "ct_nodule")
    volume = mg.read(home / "ct" / "core.nii.gz")
    trials = {t.layer: t.slope for t in mg.explain(volume, model).trials}
    found = row(doctor(model, volume, layer="block3"), "layer")
    assert found.figures["slope"] == pytest.approx(trials["19"], abs=1e-3)
    assert found.figures["best_layer"] == "5"
    assert found.figures["trials"] == pytest.approx(trials, abs=1e-6)
    assert found.verdict == "wrong"
    assert "5 (block1) names" in found.finding
    assert row(doctor(model, volume, layer="4"), "layer").figures["slope"] not in (None, 0)


def test_what_flows_past() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.past = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(1, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head((self.layer(x) + self.past(x)).relu().mean((2, 3, 4)))
            return out

    torch.manual_seed(0)
    net = Past().eval()
    e = mg.explain(scan(), net, target=1, layer="layer")
    found = row(doctor(net, scan(), target=1, layer="layer"), "cut")
    assert e.bypassed is not None
    assert abs(e.bypassed) > 0.01
    assert found.figures["bypassed_share"] == e.bypassed
    assert found.verdict in ("wrong", "check")
    assert row(doctor(small(), scan(), layer="4"), "cut").verdict == "fine"


def test_training_mode() -> None:
    net, x = small(), scan()
    assert isinstance(net[3], nn.BatchNorm3d)
    net.insert(7, nn.Dropout(0.3))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        out = copy.deepcopy(net).train()(x[None].repeat(1, 1, 1, 1, 1))
        truth = float(out[0, 1] - out[0, 0])
    for handed_over in (True, False):
        net.train(handed_over)
        before = torch.random.get_rng_state()
        found = row(doctor(net, x, target=1, layer="4"), "training mode")
        assert torch.equal(before, torch.random.get_rng_state())
        assert found.figures["training_score"] == pytest.approx(truth, abs=1e-5)
        assert found.figures["score"] != pytest.approx(truth, abs=1e-3)
        expected = ["3", "7"] if handed_over else []
        assert found.figures["handed_over_in_training"] == expected
    assert row(doctor(small(middle=nn.ReLU()), x), "training mode").verdict == "not applicable"


def test_part_of_a_network_in_training_mode() -> None:
    """A frozen norm stays frozen in the copy, as it was handed over."""
    net, x = small(), scan()
    net.insert(7, nn.Dropout(0.5))
    net[7].train()
    found = row(doctor(net, x, target=1, layer="4"), "training mode")
    assert found.figures["handed_over_in_training"] == ["7"]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        out = net(x[None])
    assert found.figures["training_score"] == pytest.approx(float(out[0, 1] - out[0, 0]), abs=1e-5)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # MONAI's own
@pytest.mark.parametrize(
    ("count", "outputs", "link", "takes", "verdict"),
    [
        (1, 3, "softmax", "sigmoid", "wrong"),
        (1, 3, "sigmoid", "sigmoid", "fine"),
        (4, 3, "softmax", "softmax", "fine"),
        (4, 1, "sigmoid", "softmax", "wrong"),
        (1, 1, "sigmoid", "sigmoid", "fine"),
        (4, 3, "sigmoid", "softmax", "wrong"),
    ],
)
def test_occlusion_is_that_of_monai(
    count: int, outputs: int, link: str, takes: str, verdict: str
) -> None:
    visualize = pytest.importorskip("monai.visualize")
    net, x = small(count, outputs), scan(count=count)
    c = outputs - 1
    found = row(doctor(net, x, target=c, layer="4", link=link), "occlusion")
    theirs, _ = visualize.OcclusionSensitivity(net, mask_size=1, n_batch=1, overlap=0.0, mode=0.0,
        verbose=False, activate=True)(x[None] * 0, b_box=(0, 1, 0, 1, 0, 1))  # fmt: skip
    with torch.no_grad():
        flat = net(x[None] * 0)[0]
    same = flat.sigmoid() if takes == "sigmoid" else flat.softmax(0)
    assert theirs.reshape(outputs)[c] == pytest.approx(float(same[c]), abs=1e-5)
    assert (found.figures["takes"], found.verdict) == (takes, verdict)
    with torch.no_grad():
        logits = net(x[None])[0]
    shown = logits.sigmoid() if takes == "sigmoid" else logits.softmax(0)
    assert found.figures["shown"] == pytest.approx(float(shown[c]), abs=1e-5)
    assert found.figures["sum"] == pytest.approx(float(shown.sum()), abs=1e-5)
    assert ("1.0000 everywhere" in found.finding) == (count == 4 and outputs == 1)


def test_guided_backpropagation_by_name() -> None:
    """The names that MONAI's own replacement finds."""
    utils = pytest.importorskip("monai.networks.utils")

    class Named(nn.Module):
        def __init__(self, **acts: nn.Module) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv3d(1, 2, 3, padding=1), nn.Linear(2, 2)
            for name, act in acts.items():
                self.add_module(name, act)
            self.names = list(acts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            for name in self.names:
                y = self.get_submodule(name)(y)
            out: torch.Tensor = self.head(y.mean((2, 3, 4)))
            return out

    cases: list[tuple[dict[str, nn.Module], str]] = [
        ({"relu": nn.ReLU(), "relu2": nn.ReLU()}, "fine"),
        ({"relu": nn.ReLU(), "act": nn.ReLU()}, "check"),
        ({"act": nn.ReLU()}, "wrong"),
        ({"lrelu": nn.LeakyReLU()}, "wrong"),
    ]
    for acts, verdict in cases:
        net = Named(**acts).eval()
        found = row(doctor(net, scan(), layer="conv"), "guided backpropagation")
        assert found.verdict == verdict, acts
        with utils.replace_modules_temp(net, "relu", nn.Identity(), strict_match=False):
            replaced = sum(isinstance(m, nn.Identity) for m in net.modules())
        assert found.figures["found_by_name"] == replaced
        kinds = {type(m).__name__ for name, m in acts.items() if "relu" in name} - {"ReLU"}
        assert found.figures["replaced"] == sorted(kinds)


class Outputs(nn.Module):
    """Two heads in a dict, a shared activation, and tokens on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.act, self.mix, self.head = nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.act(self.second(self.act(self.first(x))))
        tokens = self.mix(y.flatten(2).transpose(1, 2))
        return {"heads": [self.head(tokens.mean(1)), y], "more": y.mean()}


def test_outputs_tokens_and_shared_layers() -> None:
    torch.manual_seed(0)
    found = doctor(Outputs().eval(), scan(), layer="second", target=1, output="heads[0]")
    assert row(found, "shared layers").figures["layers"] == ["act"]
    assert row(found, "tokens").figures["modules"] == 1
    assert "mix" in row(found, "tokens").finding
    said = row(found, "inputs and outputs")
    assert "dict: heads[0] (1, 2), heads[1] (1, 4, 16, 16, 16), more ()" in said.finding
    assert said.verdict == "check"
    plain = doctor(small(), scan(), layer="4")
    for key in ("shared layers", "tokens", "inputs and outputs", "automatic layer"):
        assert row(plain, key).verdict == "not applicable"


def test_a_segmentation_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 3, padding=1)
    ).eval()
    found = doctor(net, scan(), target="1@box:ijk:8,8,8:5", layer="1")
    assert row(found, "automatic layer").verdict == "wrong"
    assert row(found, "occlusion").verdict == "not applicable"
    assert len(row(found, "evidence against").figures) == 4
    f = looked(net, scan(), target="1@box:ijk:8,8,8:5", layer="1")
    assert [label for label, _, _ in f.others] == ["class 0", "class 1", "class 2"]
    assert f.others[1][1] == pytest.approx(float(f.gradcam(logit=True).max()), abs=1e-9)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.age = small(), nn.Linear(1, 2)

        def forward(self, x: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.body(x) + self.age(age)
            return out

    net = Two().eval()
    age = torch.tensor([[0.7]])
    for inputs in ({"age": age}, (..., age), (age,)):
        found = doctor(net, scan(), layer="body.4", target=1, inputs=inputs)
        assert "takes 2 inputs" in row(found, "inputs and outputs").finding
        assert row(found, "training mode").figures["training_score"] is None


# ---------------------------------------------------------------------------------- the whole


def test_the_network_comes_back_bit_for_bit() -> None:
    for training in (True, False):
        net = small().train(training)
        net[7].requires_grad_(requires_grad=False)
        net[9].weight.grad = torch.ones_like(net[9].weight)  # type: ignore[arg-type]
        before = {k: v.clone() for k, v in net.state_dict().items()}
        names = [set(m.__dict__) for m in net.modules()]
        x = scan()
        given = x.clone()
        doctor(net, x, target=1)
        assert torch.equal(x, given)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        assert all(m.training is training for m in net.modules())
        assert [p.requires_grad for p in net[7].parameters()] == [False, False]
        assert all(p.requires_grad for n, p in net.named_parameters() if not n.startswith("7"))
        assert bool((net[9].weight.grad == 1).all())
        assert sum(p.grad is not None for p in net.parameters()) == 1
        assert [set(m.__dict__) for m in net.modules()] == names
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_also_after_an_error() -> None:
    net = small().train()
    with pytest.raises(CannotExplainError, match="constant"):
        doctor(net, torch.ones(1, 16, 16, 16))
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_the_layer_that_is_taken_where_none_is_named() -> None:
    found = doctor(small(), scan(), target=1)
    assert (found.layer, found.named) == ("4", False)
    assert "the coarsest worth trying" in report.as_text(found)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "gradcam"}, "expected no method for a check-up"),
        ({"layer": "1+4"}, "expected one layer for a check-up"),
        ({"layer": "@input"}, "a layer inside the network, got its input"),
        ({"layr": "4"}, "expected a known setting, got 'layr'"),
    ],
)
def test_refusals(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        doctor(small(), scan(), **settings)


def test_every_row_is_whole() -> None:
    found = [doctor(small(), scan(), target=1), doctor(small(4, 1), scan(count=4), link="sigmoid")]
    for one in found:
        assert [r.key for r in one.rows] == [r.key for r in found[0].rows]
        for r in one.rows:
            assert r.verdict in VERDICTS
            assert r.finding
            if r.verdict != "not applicable":
                assert r.meaning
                assert r.advice
                assert r.figures
            if r.verdict in ("wrong", "check"):
                assert r.tools or r.verdict == "check"


def test_a_network_that_cannot_be_copied_or_run_in_training_mode() -> None:
    """A norm over one value per channel fails in training mode only."""
    net = small()
    net.insert(6, nn.BatchNorm3d(8))
    found = row(doctor(net.eval(), scan(), layer="4", target=1), "training mode")
    assert found.figures["training_score"] is None
    assert "Expected more than 1 value per channel" in found.finding


def test_the_record_is_what_the_page_says(tmp_path: Path, root: Path) -> None:
    """Every key of the record, every row and every figure is on docs/doctor.md."""
    page = (root / "docs" / "doctor.md").read_text(encoding="utf-8")
    model = mg.load_model(save_model(tmp_path / "net", spec()))
    large = mg.Volume(scan(24).numpy() * 100, mg.Geometry((24,) * 3, np.eye(4)))
    torch.manual_seed(2)
    nets: list[Callable[[], Checkup]] = [
        lambda: doctor(model, large, at="ijk:12,12,12"),
        lambda: doctor(Outputs().train(), scan(), layer="second", target=1, output="heads[0]"),
        lambda: doctor(InPlace(inplace=True).eval(), scan(), layer="bn", target=1),
        lambda: doctor(small(middle=nn.InstanceNorm3d(8)), scan(), layer="4", target=1),
        lambda: doctor(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 2, 3, padding=2)),
                       scan(), layer="1", target="1@box:ijk:8,8,8:5"),
    ]  # fmt: skip
    figures: dict[str, set[str]] = {}
    for make in nets:
        record = report.as_record(make())
        assert record == json.loads(json.dumps(record, allow_nan=False))
        for key in (*record, *record["rows"][0], *record["input"]):
            assert f"`{key}`" in page, key
        for one in record["rows"]:
            figures.setdefault(one["key"], set()).update(one["figures"])
            assert f"| `{one['key']}` |" in page, one["key"]
    lines = {x.split("|")[1].strip(" `"): x for x in page.splitlines() if x.startswith("| `")}
    for key, names in figures.items():
        assert names, f"{key} never applied"
        for name in names:
            assert f"`{name}`" in lines[key], (key, name)
    for verdict in VERDICTS:
        assert f"`{verdict}`" in page


@pytest.mark.parametrize("name", ["ct_nodule", "ct_nodule_instnorm"])
def test_shipped_networks(name: str) -> None:
    home = folder()
    model = mg.load_model(home / "nets" / name)
    found = doctor(model, mg.read(home / "ct" / "core.nii.gz"))
    assert (found.target, found.axes, found.layer_name) == ("malignant", "SPL", "19 (block3)")
    place = row(found, "place")
    # cells at 0, 8, 16, ... voxels of 3.2 x 2.8 x 2.8 mm, drawn 3.5 voxels on
    assert place.figures["half_pixel_voxels"] == pytest.approx([3.5] * 3)
    assert place.figures["half_pixel_mm"] == pytest.approx(
        3.5 * float(np.linalg.norm([3.2, 2.8, 2.8])), abs=0.05
    )
    assert row(found, "norm").verdict == ("check" if "instnorm" in name else "not applicable")
    wrong = report.by_tool(found)
    assert "colours" in wrong["MONAI 1.6.1"]
    assert network.layer(looked_at(model)).verdict == "wrong"


def looked_at(model: mg.Model) -> Facts:
    training, modes = facts.modes_of(model.net)
    with opened(mg.read(folder() / "ct" / "core.nii.gz"), model, {}) as case:
        return facts.gather(case, training, modes, 1)
