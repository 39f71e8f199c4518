"""Is the score of a segmentation network that of the class, in the region, that was asked for?"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.special import logsumexp
from torch import nn

import med_gradcam as mg
from med_gradcam import findings, outputs, target_region
from med_gradcam.cli import main
from med_gradcam.errors import CannotExplainError, ImageError, UnknownNameError, UsageError
from med_gradcam.geometry import Geometry, cells, reorient, reorient_array, reorientation
from med_gradcam.graph import trace
from med_gradcam.layers import candidates
from med_gradcam.model import InputSpec, Model
from med_gradcam.target import Link
from med_gradcam.volume import Volume
from tests.engine import nets
from tests.tiny import affine_of, save_nifti

Floats = npt.NDArray[np.float64]
LABELS = ("background", "liver", "tumour")


def segmenter(outputs: int = 3, width: int = 4) -> nn.Module:
    """Two convolutions; the layer to explain is "1"."""
    return nets.made(
        lambda: nn.Sequential(
            nets.conv(1, width),
            nn.ReLU(),
            nets.conv(width, width),
            nn.SiLU(),
            nn.Conv3d(width, outputs, 1),
        )
    )


def centred(net: nn.Module) -> nn.Module:
    """The network with each logit's mean over the scan taken off, so that all classes occur."""
    with torch.no_grad():
        net[-1].bias -= net(nets.batch(nets.scan())).mean(dim=(0, 2, 3, 4))  # type: ignore[index]
    return net


def model(outputs: int = 3, link: Link = "softmax", labels: tuple[str, ...] = ()) -> Model:
    return Model(centred(segmenter(outputs)), InputSpec(), labels, link, weights_sha256="0")


def logits(net: nn.Module, array: nets.Floats) -> Floats:
    with torch.no_grad():
        out: Floats = net(nets.batch(array))[0].double().numpy()
    return out


def odds(y: Floats, c: int, link: str) -> Floats:
    """Voxel log-odds written down once more, in numpy."""
    if link != "softmax" or len(y) == 1:
        return np.asarray(y[c])
    return np.asarray(y[c] - logsumexp(np.delete(y, c, axis=0), axis=0))


def explain(model: Any, target: Any, volume: Volume | None = None, **more: Any) -> mg.Explanation:
    options = {"layer": "1", "method": "hirescam", **more}
    return mg.explain(volume or nets.volume(), model, target=target, **options)


# ------------------------------------------------------------------------------ predicted regions


@pytest.mark.parametrize(
    ("outputs", "link"),
    [(3, "softmax"), (2, "softmax"), (3, "sigmoid"), (1, "sigmoid"), (1, "softmax")],
)
def test_the_score_is_the_mean_log_odds_over_the_predicted_region(outputs: int, link: Link) -> None:
    net = model(outputs, link)
    y = logits(net.net, nets.scan())
    softmax = link == "softmax" and outputs > 1
    taken = np.stack([y.argmax(0) == c if softmax else y[c] > 0 for c in range(outputs)])
    sizes = taken.sum(axis=(1, 2, 3))
    for c in np.flatnonzero(sizes):
        made = explain(net, int(c))
        assert made.score == pytest.approx(odds(y, int(c), link)[taken[c]].mean(), rel=1e-4)
        assert made.target.region is not None
        assert made.target.region.voxels == made.target.region.weight == sizes[c]
        assert (made.unit, made.probability) == ("log-odds", None)
    first = 1 if softmax else 0
    auto = explain(net, "auto")
    assert auto.target.index == (first + int(sizes[first:].argmax()),)
    assert auto.target.label == f"class {auto.target.index[0]}"
    assert auto.target.region is not None
    assert auto.target.region.words == f"the predicted region of {auto.target.label}"


def test_the_map_is_that_of_the_class_and_of_the_region() -> None:
    """S26: against gradients of a score that is written down here, per class and mask."""
    net = model(3)
    x = nets.batch(nets.scan())
    mask = np.zeros((16, 16, 16), dtype=bool)
    mask[4:8, 5:12, 2:7] = True
    inside = torch.from_numpy(mask)
    activation = net.net[:2](x).detach().requires_grad_()  # type: ignore[index]
    probability = net.net[2:](activation)[0].softmax(0)  # type: ignore[index]
    made = {}
    for c in range(3):
        score = (probability[c] / (1 - probability[c])).log()[inside].mean()
        (gradient,) = torch.autograd.grad(score, activation, retain_graph=True)
        wanted = (gradient * activation)[0].sum(0).detach().numpy()
        made[c] = explain(net, (c, mask))
        assert made[c].score == pytest.approx(score.item(), rel=1e-4)
        assert np.abs(made[c].evidence - wanted).max() < 1e-4 * np.abs(wanted).max()
        far = np.ones_like(mask)
        far[2:10, 3:14, 0:9] = False  # nothing further off can reach the region
        assert not made[c].evidence[far].any()
    assert np.corrcoef(made[1].evidence.ravel(), made[2].evidence.ravel())[0, 1] < 0.9


def test_class_a_rather_than_class_b_in_a_region() -> None:
    net = model(3, labels=LABELS)
    y = logits(net.net, nets.scan())
    made = explain(net, "tumour-vs-0.6*liver@box:ijk:8,8,8:4")
    box = (slice(None), *(slice(6, 11),) * 3)
    assert made.score == pytest.approx((y[2] - 0.6 * y[1])[box[1:]].mean(), rel=1e-4)
    assert made.target.label == "tumour-vs-0.6*liver@box"
    a, b = (
        explain(net, "tumour-vs-liver@box:ijk:8,8,8:4"),
        explain(net, "liver-vs-tumour@box:ijk:8,8,8:4"),
    )
    assert np.array_equal(a.evidence, -b.evidence)
    assert a.score == -b.score


# --------------------------------------------------------------------------------------- P9 and P10


@pytest.mark.parametrize("method", ["hirescam", "integrated"])
def test_foreground_for_is_background_against_bit_for_bit(method: str) -> None:
    """P9 for maps of two logits."""
    mask = np.zeros((16, 16, 16))
    mask[3:9, 4:9, 5:9] = 0.3
    mask[5:7, 5:7, 5:7] = 1
    one, other = (explain(model(2), (c, mask), method=method) for c in (1, 0))
    assert np.array_equal(one.evidence, -other.evidence)
    assert one.score == -other.score
    assert one.sum_for == other.sum_against


class Shifted(nn.Module):
    """A network with h(x) added to all its logits, voxel by voxel."""

    def __init__(self, body: nn.Module, size: float) -> None:
        super().__init__()
        self.body, self.size = body, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out + self.size * x[:, :1].abs() if out.ndim == 5 else out + self.size * x.mean()


@pytest.mark.parametrize("dense", [True, False])
def test_a_number_added_to_all_logits_leaves_the_evidence(dense: bool) -> None:
    """P10."""
    body = segmenter(3).double() if dense else nets.made(nets.gated).double()
    layer = "body.1" if dense else "body.first"
    target = "1@box:ijk:8,8,8:5" if dense else "1"
    plain, moved = (
        explain(Shifted(body, size).eval(), target, method="integrated", layer=layer)
        for size in (0.0, 3.0)
    )
    assert np.abs(plain.evidence - moved.evidence).max() < 1e-6 * np.abs(plain.evidence).max()
    assert plain.score == pytest.approx(moved.score, abs=1e-6)
    single = [
        explain(Shifted(body, size).eval(), target, layer=layer, link="sigmoid").score
        for size in (0.0, 3.0)
    ]
    assert abs(single[0] - single[1]) > 0.1  # the shift is there


# ------------------------------------------------------------------------------------------ places


def looking_glass(axes: str | None = None, **spec: Any) -> Model:
    """A network whose only logit is the scan's own value: a score is a mean of the scan."""
    net = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.Conv3d(1, 1, 1, bias=False))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
    return Model(
        net.eval(), InputSpec(axes=axes, **spec), ("value",), "sigmoid", weights_sha256="0"
    )


def turned_scan(axes: str = "LAS", shape: tuple[int, int, int] = (12, 10, 14)) -> Volume:
    array = np.random.default_rng(2).normal(size=(1, *shape)).astype(np.float32)
    return Volume(
        array, Geometry(shape, affine_of(axes, (0.8, 1.5, 2.0), (40, -20, 7), (9, -5, 14)))
    )


def seen(volume: Volume, target: Any, net: Model | None = None) -> mg.Explanation:
    return explain(net or looking_glass("SPL"), target, volume, layer="0")


def test_a_mask_reaches_the_voxels_it_covers_whatever_the_axes() -> None:
    volume = turned_scan()
    mask = np.zeros(volume.grid.shape, dtype=bool)
    mask[1:3, 2:8, 5] = mask[9, 9, 13] = True
    made = seen(volume, ("value", mask))
    assert made.score == pytest.approx(float(volume.array[0][mask].mean()), rel=1e-5)
    assert made.target.region is not None
    assert (made.target.region.kind, made.target.region.voxels) == ("mask", 13)
    drawn = mg.draw(made).signed.values  # the same voxels, on the scan's own grid
    assert np.array_equal(np.abs(drawn) > 1e-6 * np.abs(drawn).max(), mask)
    for same in (mask[None], mask.astype(np.uint8) * 7, torch.from_numpy(mask)):
        again = seen(volume, ("value", same))
        assert again.target == made.target
        assert np.array_equal(again.evidence, made.evidence)


@given(st.sampled_from(["RAS", "SPL", "IAR", "PSL"]), st.integers(0, 99))
def test_a_mask_on_other_axes_is_the_same_mask(axes: str, seed: int) -> None:
    volume = turned_scan()
    mask = np.random.default_rng(seed).random(volume.grid.shape) > 0.7
    how = reorientation(volume.grid, axes)
    moved = reorient_array(mask.astype(np.float32), how)[None]
    other = Volume(np.ascontiguousarray(moved), reorient(volume.grid, how))
    grid = target_region.output_grid(volume.grid, volume.grid.shape)
    assert np.array_equal(target_region.from_mask(other, grid), mask.astype(np.float32))


def test_a_finer_mask_gives_each_voxel_its_share() -> None:
    own = Geometry((4, 4, 4), affine_of("LPS", (2.0, 3.0, 4.0), (5, 6, 7)))
    share = np.random.default_rng(0).integers(0, 9, own.shape)
    fine = cells(own, (0.5,) * 3, (-0.25,) * 3, (8, 8, 8))
    blocks = np.zeros((4, 4, 4, 8))
    for where in np.ndindex(4, 4, 4):
        blocks[where][: share[where]] = 1
    mask = blocks.reshape(4, 4, 4, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(1, 8, 8, 8)
    found = target_region.from_mask(Volume(mask.astype(np.float32), fine), own)
    assert np.abs(found - share / 8).max() < 1e-6


def test_a_coarser_mask_is_interpolated_once() -> None:
    """A ramp stays a ramp between the centres of a coarse mask's voxels, and ends beside it."""
    own = Geometry((40, 2, 2), affine_of("RAS", (1.0, 1.0, 1.0)))
    coarse = cells(own, (5, 1, 1), (10, 0, 0), (5, 2, 2))  # centres at 10, 15, 20, 25, 30
    ramp = np.linspace(0, 1, 5)[None, :, None, None] * np.ones((1, 5, 2, 2))
    found = target_region.from_mask(Volume(ramp.astype(np.float32), coarse), own)[:, 0, 0]
    assert found[10:31] == pytest.approx(np.linspace(0, 1, 21), abs=1e-6)
    assert not found[:8].any()
    assert not found[33:].any()


def test_a_mask_from_a_file_and_its_name_stays_there(tmp_path: Path) -> None:
    volume = turned_scan()
    mask = np.zeros(volume.grid.shape, dtype=np.uint8)
    mask[3:6, 2:8, 5:9] = 1
    path = save_nifti(tmp_path / "Jane_Doe@tumour.nii.gz", mask, volume.grid.affine)
    named, handed = seen(volume, f"value@mask:{path}"), seen(volume, ("value", mask))
    assert named.target == handed.target
    assert np.array_equal(named.evidence, handed.evidence)
    for given_ in (named, seen(volume, ("value", path)), seen(volume, ("value", str(path)))):
        mg.write(given_, tmp_path / "out", volume=volume, formats=(), overwrite=True)
        text = (tmp_path / "out" / "explanation.json").read_text()
        assert "Jane" not in text
        assert json.loads(text)["provenance"]["parameters"]["target"] == "value@mask:file"


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (np.ones((4, 4, 4)), UsageError, r"scan's grid \(12, 10, 14\), got \(4, 4, 4\)"),
        (np.full((12, 10, 14), -1.0), UsageError, "no value below 0, got 1 channel.* and -1"),
        (np.zeros((12, 10, 14)), CannotExplainError, "expected a mask with voxels of the network"),
        (np.full((12, 10, 14), np.nan), ImageError, "finite voxels"),
        (np.full((12, 10, 14), "x"), UsageError, "expected a mask as a Volume or an array"),
        (object(), UsageError, "expected a mask as a Volume or an array, got object"),
        ("no_such_file.nii", ImageError, "there is no 'no_such_file.nii'"),
        (
            Volume(np.ones((2, 4, 4, 4)), Geometry((4, 4, 4), np.eye(4))),
            UsageError,
            "a mask of one channel",
        ),
        (
            Volume(
                np.ones((1, 4, 4, 4)), Geometry((4, 4, 4), affine_of("RAS", origin=(900, 0, 0)))
            ),
            CannotExplainError,
            r"got none: the output reaches from RAS .* mm in voxels of .* mm",
        ),
    ],
)
def test_a_mask_that_will_not_do(mask: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        seen(turned_scan(), ("value", mask))


@pytest.mark.parametrize("kind", ["ras", "lps", "ijk"])
def test_a_voxel_is_the_one_that_was_pointed_at(kind: str) -> None:
    volume = turned_scan()
    index = np.array([3, 7, 11])
    point = volume.grid.world_ras(index + 0.3) if kind != "ijk" else index + 0.3
    text = ",".join(str(v) for v in point * ((-1, -1, 1) if kind == "lps" else 1))
    made = seen(volume, f"value@voxel:{kind}:{text}")
    assert made.score == pytest.approx(float(volume.array[0, 3, 7, 11]), rel=1e-5)
    assert made.target.label == "value@voxel"
    assert made.target.region is not None
    assert (made.target.region.voxels, made.target.region.weight) == (1, 1.0)
    assert made.target.region.words.startswith("the voxel at R")


def test_a_box_holds_the_voxels_whose_centres_are_in_it() -> None:
    volume = turned_scan()
    centre = volume.grid.world_ras((5, 5, 6.5))
    made = seen(volume, "value@box:ras:" + ",".join(map(str, centre)) + ":5.5")
    every = volume.grid.world_ras(np.moveaxis(np.indices(volume.grid.shape), 0, -1))
    inside = (np.abs(every - centre) <= 2.75).all(axis=-1)
    assert made.score == pytest.approx(float(volume.array[0][inside].mean()), rel=1e-4)
    assert made.target.region is not None
    assert made.target.region.voxels == inside.sum() > 20
    assert "a box of 5.5 mm around" in made.target.region.words


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("voxel:ras:900,0,0", "expected a point inside the scan"),
        ("voxel:3,4,5", "expected a point as ras:X,Y,Z"),
        ("box:ijk:3,4,5", r"expected a box as ras:X,Y,Z:SIZE_MM .* got 'ijk:3,4,5'"),
        ("box:ijk:3,4,5:-2", "expected a box as"),
        ("box:ijk:3,4,5:nan", "expected a box as"),
        ("box:ijk:3.4,4.4,5.5:0.1", "expected a box with voxels of the network"),
    ],
)
def test_a_place_that_will_not_do(place: str, says: str) -> None:
    with pytest.raises((UsageError, CannotExplainError), match=says):
        seen(turned_scan(), f"value@{place}")


def test_a_place_beside_the_patch() -> None:
    net = looking_glass("RAS", patch=(8, 8, 8))
    volume = Volume(nets.scan(16), Geometry((16, 16, 16), np.eye(4)))
    with pytest.raises(CannotExplainError, match=r"RAS \[8.0, 8.0, 8.0\] to \[15.0") as caught:
        explain(net, "value@voxel:ijk:2,2,2", volume, layer="0", at="ijk:12,12,12")
    assert caught.value.reason == "empty region"
    made = explain(net, "value@voxel:ijk:9,9,14", volume, layer="0", at="ijk:12,12,12")
    assert made.score == pytest.approx(float(volume.array[0, 9, 9, 14]), rel=1e-5)


# -------------------------------------------------------------------------------------- components


@given(hnp.arrays(bool, st.tuples(*[st.integers(1, 6)] * 3)), st.integers(1, 5))
def test_components_are_those_of_scipy(mask: npt.NDArray[np.bool_], n: int) -> None:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = sorted((int((labels == c).sum()) for c in range(1, count + 1)), reverse=True)
    part, parts = target_region.component(mask, n)
    assert parts == count
    if n > count:
        assert not part.any()
        return
    assert int(part.sum()) == sizes[n - 1]
    assert len(set(labels[part])) == 1
    assert part.sum() == (labels == labels[part][0]).sum()


def test_a_component_of_the_predicted_region() -> None:
    array = np.full((1, 12, 12, 12), -1.0, dtype=np.float32)
    array[0, 1:4, 1:4, 1:4] = 2
    array[0, 4, 4, 4] = 3  # touches the first by a corner
    array[0, 8:10, 8:10, 8:10] = 5
    volume = Volume(array, Geometry((12, 12, 12), np.eye(4)))
    scores = [seen(volume, f"value@component:{n}").score for n in (1, 2)]
    assert scores == pytest.approx([(27 * 2 + 3) / 28, 5.0], rel=1e-5)
    made = seen(volume, "auto@component:2")
    assert made.target.label == "value@component:2"
    assert made.target.region is not None
    assert made.target.region.words == "part 2 of 2 of the predicted region of value"
    with pytest.raises(UsageError, match=r"N from 1 \(the largest\) to 2, got '3'"):
        seen(volume, "value@component:3")
    for wrong in ("0", "-1", "one"):
        with pytest.raises(UsageError, match=f"N from 1 .the largest., got '{wrong}'"):
            seen(volume, f"value@component:{wrong}")


# ----------------------------------------------------------------------- outputs of another size


class Ending(nn.Module):
    """The looking glass, and then something else."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 1, 1, bias=False)
        self.end = end
        with torch.no_grad():
            self.first.weight.fill_(1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.first(x))


def ending(end: Any, target: Any, **more: Any) -> mg.Explanation:
    net = Ending(end).eval()
    return explain(net, target, layer="first", link="sigmoid", **more)


def test_an_output_at_half_the_resolution() -> None:
    scan = nets.scan()[0].astype(np.float64)
    made = ending(nn.AvgPool3d(2), "0@voxel:ijk:5,8,13")  # output voxel 2, 4, 6
    assert made.score == pytest.approx(scan[4:6, 8:10, 12:14].mean(), rel=1e-4)
    mask = np.zeros((16, 16, 16))
    mask[4:6, 8:10, 12:16] = 1
    made = ending(nn.AvgPool3d(2), (0, mask))
    assert made.score == pytest.approx(scan[4:6, 8:10, 12:16].mean(), rel=1e-4)
    assert made.target.region is not None
    assert made.target.region.voxels == 2
    half = np.zeros((16, 16, 16))
    half[4:6, 8:10, 13:16] = 1  # half of one output voxel, and all of the next
    a, b = scan[4:6, 8:10, 12:14].mean(), scan[4:6, 8:10, 14:16].mean()
    assert ending(nn.AvgPool3d(2), (0, half)).score == pytest.approx((a / 2 + b) / 1.5, rel=1e-4)


def test_an_output_at_twice_the_resolution() -> None:
    made = ending(nn.Upsample(scale_factor=2), "0@voxel:ijk:5,8,13")
    assert made.score == pytest.approx(float(nets.scan()[0, 5, 8, 13]), rel=1e-4)


@pytest.mark.parametrize("end", [lambda x: x[..., 2:-2], lambda x: x[..., 1:, :-1, :]])
def test_an_output_whose_place_cannot_be_told(end: Any) -> None:
    with pytest.raises(CannotExplainError, match=r"got \(1.*where its voxels lie cannot") as caught:
        ending(end, "0@voxel:ijk:5,8,13")
    assert caught.value.reason == "dense"


@pytest.mark.parametrize(
    ("shape", "m"), [((16, 16, 16), (8, 16, 4)), ((17, 15, 5), (9, 8, 2)), ((9, 9, 9), (1, 27, 3))]
)
def test_outputs_in_proportion(shape: tuple[int, int, int], m: tuple[int, int, int]) -> None:
    grid = target_region.output_grid(Geometry(shape, np.eye(4)), m)
    low, high = grid.world_ras((-0.5,) * 3), grid.world_ras(np.array(m) - 0.5)
    assert low == pytest.approx((-0.5,) * 3)
    assert high == pytest.approx(np.array(shape) - 0.5)


@dataclass
class Heads:
    """What a network may put out as a dataclass."""

    logits: Any
    aux: Any = None


class Pair(NamedTuple):
    seg: Any
    score: Any


HALF = partial(nn.functional.avg_pool3d, kernel_size=2)
NESTED: dict[
    str, tuple[Any, str, str, float]
] = {  # the output, where to look, what is taken, times
    "a tensor": (lambda x: 3 * x, "", "", 3),
    "a list, the first": (lambda x: [9 * x, 2 * x], "", "", 9),
    "a list, the second": (lambda x: [x, 2 * x], "[1]", "[1]", 2),
    "from the end": (lambda x: [x, 2 * x], "[-1]", "[-1]", 2),
    "a tuple in a dict": (lambda x: {"a": (x, 4 * x)}, "a[1]", "a[1]", 4),
    "a key that is no name": (lambda x: {"a key": x, 7: 5 * x}, "[7]", "[7]", 5),
    "a quoted key": (lambda x: {"b": x, "a key": 6 * x}, "['a key']", "['a key']", 6),
    "a dataclass": (lambda x: Heads(2 * x, [x]), "logits", "logits", 2),
    "inside a dataclass": (lambda x: Heads(2 * x, [3 * x]), "aux[0]", "aux[0]", 3),
    "a named tuple": (lambda x: Pair(7 * x, x.mean()), "seg", "seg", 7),
    "a named tuple's first": (lambda x: Pair(7 * x, x.mean()), "", "", 7),
    "deep supervision, fine first": (lambda x: [2 * x, HALF(x)], "", "[0]", 2),
    "deep supervision, fine last": (lambda x: [HALF(x), 2 * x], "", "[1]", 2),
    "three heads": (lambda x: (HALF(HALF(x)), HALF(x), 5 * x), "", "[2]", 5),
    "in a dict": (lambda x: {"out": [HALF(x), 3 * x], "z": x}, "", "out[1]", 3),
    "by its name": (lambda x: {"out": [HALF(x), 3 * x], "z": x}, "out", "out[1]", 3),
    "heads of a dict": (lambda x: {"coarse": HALF(x), "fine": 4 * x}, "", "fine", 4),
    "several as large": (lambda x: [2 * x, 3 * x, HALF(x)], "", "[0]", 2),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_outputs_by_path(name: str) -> None:
    end, place, taken, times = NESTED[name]
    whole = float(nets.scan()[0, 5, 8, 13])
    made = ending(end, "0@voxel:ijk:5,8,13", output=place)
    assert made.score == pytest.approx(times * whole, rel=1e-4)
    assert made.target.output == taken
    assert (f"output {taken})" in made.target.about) == bool(taken)


def test_maps_of_several_kinds_are_no_deep_supervision() -> None:
    two = lambda x: [HALF(x), torch.cat([x, x], dim=1)]  # noqa: E731
    block = float(nets.scan()[0, 4:6, 8:10, 12:14].mean())
    assert ending(two, "0@voxel:ijk:5,8,13").score == pytest.approx(block, rel=1e-4)
    assert outputs.full_resolution([torch.ones(1, 2), torch.ones(1, 4)]) == ""


# ------------------------------------------------------------------------------- the parts listed


BLOBS = {
    1: [(slice(1, 5),) * 3, (slice(8, 10),) * 3],
    2: [(slice(12, 15), slice(2, 4), slice(5, 9))],
}


def blobs() -> tuple[nn.Module, Volume]:
    """A network whose three logits are its input's three channels; stored as LPI, oblong voxels."""
    array = np.zeros((3, 16, 16, 16), dtype=np.float32)
    array[0] = 1.0
    for c, places in BLOBS.items():
        for n, place in enumerate(places):
            array[(c, *place)] = 3.0 + n
    net = nn.Conv3d(3, 3, 1)
    with torch.no_grad():
        net.weight.copy_(torch.eye(3)[:, :, None, None, None])
        net.bias.zero_()  # type: ignore[union-attr]
    grid = Geometry((16, 16, 16), affine_of("LPI", (1.5, 1.0, 2.0), (20, 30, 40)))
    return nn.Sequential(nn.Identity(), net).eval(), Volume(array, grid)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_predicted_parts_are_listed_in_mm(link: Link) -> None:
    net, volume = blobs()
    labels = ("background", "liver", "tumour")
    made = Model(net, InputSpec(channels=3), labels, link, weights_sha256="0")
    found = mg.components(volume, made)
    assert [c.target for c in found] == [
        "liver@component:1", "liver@component:2", "tumour@component:1",
    ]  # fmt: skip
    first, last = found[0], found[2]
    assert (first.voxels, last.voxels) == (64, 24)
    assert first.ml == pytest.approx(64 * 3.0 / 1000)
    middle = volume.grid.world_ras((2.5, 2.5, 2.5))
    assert first.centre_ras_mm == pytest.approx(tuple(middle))
    assert first.size_mm == pytest.approx((6.0, 4.0, 8.0))
    assert last.size_mm == pytest.approx((4.5, 2.0, 8.0))
    assert first.words == "R 16 A 28 S 35 mm (patient's right)"
    y = volume.array.astype(np.float64)
    for one in found:
        c, place = labels.index(one.label), BLOBS[labels.index(one.label)][one.number - 1]
        assert one.score == pytest.approx(odds(y, c, link)[place].mean(), rel=1e-5)
        e = mg.explain(volume, made, target=one.target, layer="@input", method="saliency")
        assert e.score == pytest.approx(one.score, rel=1e-5)
        assert e.target.region is not None
        assert e.target.region.voxels == one.voxels
    only = mg.components(volume, made, target="background")
    assert {c.label for c in only} == {"background"}
    assert only[0].voxels == (16**3 - 64 - 8 - 24 if link == "softmax" else 16**3)


def test_the_parts_of_a_coarse_head() -> None:
    volume = nets.volume()
    net = Ending(lambda x: [HALF(x), x]).eval()
    fine = mg.components(volume, net, link="sigmoid")
    coarse = mg.components(volume, net, link="sigmoid", output="[0]")
    assert sum(c.voxels for c in fine) == int((volume.array > 0).sum())
    assert sum(c.voxels for c in coarse) == int(
        (volume.array[0].reshape(8, 2, 8, 2, 8, 2).mean((1, 3, 5)) > 0).sum()
    )
    assert coarse[0].ml == pytest.approx(coarse[0].voxels * 8 / 1000)


def test_parts_of_what_predicts_none() -> None:
    with pytest.raises(UsageError, match=r"segmentation network, .* got one tensor \(1, 2\)"):
        mg.components(nets.volume(), nets.made(nets.pooled_linear))
    with pytest.raises(UsageError, match="without a link function"):
        mg.components(nets.volume(), model(1, "none", ("dose",)))
    with pytest.raises(UnknownNameError, match="known class, got 'x'"):
        mg.components(nets.volume(), model(3), target="x")
    net = model(3)
    with torch.no_grad():
        net.net[-1].bias[0] += 99  # type: ignore[index]
    assert mg.components(nets.volume(), net) == ()
    assert findings.as_text((), "components") == "no predicted parts"


def test_a_box_of_three_sides() -> None:
    net = model(3)
    y = logits(net.net, nets.scan())
    made = explain(net, "1@box:ijk:8,8,8:4,2,6")
    assert made.score == pytest.approx(odds(y, 1, "softmax")[6:11, 7:10, 5:12].mean(), rel=1e-4)
    assert made.target.region is not None
    assert made.target.region.words.startswith("a box of 4 x 2 x 6 mm around")
    for wrong in ("4,2", "4,2,0", "4,2,x", ""):
        with pytest.raises(UsageError, match="its side in mm, or its three sides"):
            explain(net, f"1@box:ijk:8,8,8:{wrong}")


def test_deep_supervision_lists_and_named_outputs() -> None:
    whole = float(nets.scan()[0, 5, 8, 13])
    place = "0@voxel:ijk:5,8,13"
    deep = lambda x: [x * 1, nn.functional.avg_pool3d(x, 2)]  # noqa: E731
    assert ending(deep, place).score == pytest.approx(whole, rel=1e-4)
    block = float(nets.scan()[0, 4:6, 8:10, 12:14].mean())
    made = ending(deep, place, output="[1]")
    assert made.score == pytest.approx(block, rel=1e-4)
    assert made.target.output == "[1]"
    both = lambda x: {"aux": x.mean(dim=(2, 3, 4)), "seg": {"logits": 2 * x}}  # noqa: E731
    assert ending(both, place, output="seg.logits").score == pytest.approx(2 * whole, rel=1e-4)
    assert ending(both, "0").target.kind == "class"
    with pytest.raises(UnknownNameError, match=r"puts out aux \(1, 1\), seg\.logits \(1, 1, 16"):
        ending(both, place, output="seg.logit")


# ------------------------------------------------------------------------------------- refusals


def test_a_class_that_is_not_predicted() -> None:
    net = model(3, labels=LABELS)
    with torch.no_grad():
        net.net[-1].bias[:] = torch.tensor([0.0, 50.0, -50.0])  # type: ignore[index]
    says = r"takes for 'tumour', there are none; it predicts liver \(4096 voxels\)\. Name a class"
    with pytest.raises(CannotExplainError, match=says) as caught:
        explain(net, "tumour")
    assert caught.value.reason == "empty region"
    assert explain(net, "tumour@box:ijk:8,8,8:3").target.index == (2,)
    with torch.no_grad():
        net.net[-1].bias[:] = torch.tensor([50.0, 0.0, -50.0])  # type: ignore[index]
    with pytest.raises(
        CannotExplainError, match=r"any class but the background.*background \(4096"
    ):
        explain(net, "auto")
    with pytest.raises(CannotExplainError, match=r"any class but the background.*background \(27"):
        explain(net, "auto@box:ijk:8,8,8:2")
    several = Model(net.net, InputSpec(), LABELS, "sigmoid", weights_sha256="0")
    with torch.no_grad():
        net.net[-1].bias[:] = -50.0  # type: ignore[index]
    with pytest.raises(CannotExplainError, match="any class, there are none; it predicts no class"):
        explain(several, "auto")


def test_auto_within_a_place_is_the_class_that_is_largest_there() -> None:
    net = model(3)
    winner = logits(net.net, nets.scan()).argmax(0)
    sizes = np.bincount(winner.ravel(), minlength=3)
    rare = 1 + int(sizes[1:].argmin())
    i, j, k = (int(n) for n in np.argwhere(winner == rare)[0])
    assert explain(net, "auto").target.index != (rare,)
    assert explain(net, f"auto@voxel:ijk:{i},{j},{k}").target.index == (rare,)


def test_classes_that_are_not_there() -> None:
    net = model(3, labels=LABELS)
    for target in ("tumor", 3, "#3", "3@component:1", "liver-vs-tumor@box:ijk:8,8,8:3"):
        with pytest.raises(
            UnknownNameError, match=r"classes are background, liver, tumour\. .* 0 to 2\."
        ):
            explain(net, target)
    with pytest.raises(mg.MedGradcamError, match=r"expected 2 outputs .*gives 3"):
        explain(model(3, labels=("a", "b")), "a")


def test_a_place_is_for_maps_only() -> None:
    net = nets.made(nets.pooled_linear)
    with pytest.raises(UsageError, match=r"puts out one row of scores per scan and no map"):
        mg.explain(nets.volume(), net, target="1@component:1", layer="first")
    odd = Model(net, InputSpec(), ("a", "a@component:1"), weights_sha256="0")
    made = mg.explain(nets.volume(), odd, target="a@component:1", layer="first")
    assert (made.target.kind, made.target.index) == ("class", (1,))


def test_a_map_of_amounts_needs_a_place() -> None:
    net = model(1, "none", ("dose",))
    with pytest.raises(UsageError, match="expected a place with the target 'dose', since a model"):
        explain(net, "auto")
    made = explain(net, "auto@box:ijk:8,8,8:4")
    y = logits(net.net, nets.scan())
    assert made.score == pytest.approx(y[0, 6:11, 6:11, 6:11].mean(), rel=1e-4)
    assert (made.unit, made.target.words) == ("score", ("pulls up", "pulls down"))
    with pytest.raises(UsageError, match="2 outputs and no link function"):
        explain(model(2, "none"), "auto@box:ijk:8,8,8:4")


@pytest.mark.parametrize(
    ("end", "outputs", "link"),
    [
        (nn.Softmax(dim=1), 3, "softmax"),
        (lambda y: y.softmax(1), 3, "softmax"),
        (torch.sigmoid, 3, "sigmoid"),
        (torch.sigmoid, 1, "softmax"),
    ],
)
def test_maps_of_probabilities_are_refused(end: Any, outputs: int, link: str) -> None:
    class Ended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = segmenter(outputs)

        def forward(self, x: torch.Tensor) -> Any:
            return end(self.body(x))

    with pytest.raises(CannotExplainError, match="got probabilities"):
        explain(Ended().eval(), "auto", layer="body.1", link=link)
    made = explain(Ended().eval(), "0@box:ijk:8,8,8:4", layer="body.1", link="none")
    assert 0 < made.score < 1


def test_a_map_with_holes_in_its_numbers() -> None:
    with pytest.raises(CannotExplainError, match="NaN or infinite") as caught:
        ending(lambda x: x / (x > -9).logical_not(), "0@voxel:ijk:5,8,13")
    assert caught.value.reason == "not finite"


# ----------------------------------------------------------------------------- whole explanations


def test_a_region_adds_up_is_written_and_comes_back(tmp_path: Path) -> None:
    net = model(3, labels=LABELS)
    e = explain(net, "auto", method="integrated", precise=True)
    assert e.status == "complete"
    assert e.residual is not None
    assert abs(e.residual) <= 0.01 * abs(e.score - (e.reference_score or 0)) + 1e-4
    folder = mg.write(e, tmp_path / "out", volume=nets.volume(), formats=("nifti", "png"))
    back = mg.read_explanation(folder)
    assert back == e
    with pytest.raises(UsageError, match="weights are not part of a file"):
        back.target(torch.zeros(1, 3, 16, 16, 16))
    again = explain(net, e.target, method="integrated", precise=True)  # the one in memory can
    assert np.array_equal(again.evidence, e.evidence)
    record = json.loads((folder / "explanation.json").read_text())
    assert record["target"]["region"]["kind"] == "predicted"
    assert "weights" not in record["target"]


def monai_nets() -> dict[str, Any]:
    monai = importlib.import_module("monai.networks.nets")

    return {
        "BasicUNet": (lambda: monai.BasicUNet(3, 1, 3, features=(4, 4, 8, 8, 8, 4)), "upcat_2"),
        "UNet": (lambda: monai.UNet(3, 1, 3, (4, 8, 8), (2, 2)), "model.1"),
        "SegResNet": (
            lambda: monai.SegResNet(3, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,)),
            "down_layers.1.0",
        ),
        "DynUNet": (
            lambda: monai.DynUNet(
                3,
                1,
                3,
                [3, 3, 3],
                [1, 2, 2],
                [2, 2],
                filters=[4, 8, 8],
                deep_supervision=True,
                deep_supr_num=1,
            ),
            "bottleneck",
        ),
    }


@pytest.mark.parametrize("name", ["BasicUNet", "UNet", "SegResNet", "DynUNet"])
@pytest.mark.parametrize("auto", [False, True])
def test_networks_of_monai_are_explained_with_an_honest_status(name: str, auto: bool) -> None:
    pytest.importorskip("monai")
    maker, layer = monai_nets()[name]
    net, volume = nets.made(maker), nets.volume(32 if name == "BasicUNet" else 16)
    e = mg.explain(volume, net, layer="auto" if auto else layer)
    difference = e.score - (e.reference_score or 0.0)
    y = logits(net, volume.array)
    taken = y.argmax(0) == e.target.index[0]
    assert e.score == pytest.approx(
        odds(y, e.target.index[0], "softmax")[taken].mean(), rel=1e-3, abs=1e-4
    )
    assert y.shape[1:] != e.evidence.shape or e.layer != "output_block"
    assert e.status in ("complete", "not_a_cut")
    assert e.residual is not None
    assert e.bypassed is not None
    bound = max(0.02, 0.05 * abs(difference))
    assert abs(e.residual - e.bypassed * difference) <= bound  # what is missing flows past
    if e.status == "complete":
        assert abs(e.residual) <= bound + 0.01 * abs(difference)
    else:
        assert any("flows past the layer" in w for w in e.warnings)


@pytest.mark.parametrize(
    ("maker", "wanted"),
    [
        (lambda: segmenter(3), ["1"]),
        (
            lambda: nn.Sequential(
                nets.conv(1, 4), nn.ReLU(), nn.Conv3d(4, 3, 1), nn.Upsample(None, 1)
            ),
            ["1"],
        ),
        (
            lambda: nn.Sequential(nets.conv(1, 4), nn.Sequential(nn.ReLU(), nn.Conv3d(4, 4, 1))),
            [],
        ),
        (
            lambda: nn.Sequential(nets.conv(1, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2, 2)),
            ["1"],
        ),
    ],
)
def test_candidates_are_never_the_logits(maker: Any, wanted: list[str]) -> None:
    net = maker().eval()
    found = [info.name for info in candidates(Model(net, InputSpec()), trace(net, (1, 8, 8, 8)))]
    assert found == wanted


FACTORY = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Conv3d(4, 3, 1)
    def forward(self, x):
        y = self.body(x / 500)
        return {"embedding": y.mean((2, 3, 4)), "segmentation": [self.head(y)]}

def make():
    return Two(), {"modality": "CT"}, ("air", "lung", "tissue"), "softmax"
"""


def said_targets(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The targets that a command lists as JSON."""
    assert main([*words, "--json"]) == 0
    return [row["target"] for row in json.loads(capsys.readouterr().out)]


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense_factory_for_a_test.py").write_text(FACTORY)
    scan = save_nifti(tmp_path / "scan.nii.gz")
    mask = np.zeros((12, 12, 12), dtype=np.uint8)
    mask[3:7, 3:7, 3:7] = 1
    save_nifti(tmp_path / "mask.nii.gz", mask)
    words = ["explain", str(scan), "--model", "dense_factory_for_a_test:make", "--trust", "code"]
    words += ["--layer", "body", "--formats", "", "-o", "out", "--overwrite"]
    words += ["--model-output", "segmentation[0]"]
    assert main([*words, "--target", "tissue@mask:mask.nii.gz"]) == 0
    said = capsys.readouterr().out
    assert "tissue@mask: mean over the given mask (64 voxels of the network's output segmen" in said
    record = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert record["target"]["output"] == "segmentation[0]"
    assert record["target"]["region"]["voxels"] == 64
    assert record["provenance"]["parameters"]["output"] == "segmentation[0]"
    asked = ["components", *words[1:6], "--model-output", "segmentation[0]"]
    assert main([*asked, "--most", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[0] in said_targets(asked, capsys)
    assert main([*words, "--target", "lung@mask:none.nii.gz"]) == 3
    assert "there is no 'none.nii.gz'" in capsys.readouterr().err
    assert main([*words[:-1], "head"]) == 2
    assert "segmentation[0] (1, 3, 12, 12, 12)" in capsys.readouterr().err
