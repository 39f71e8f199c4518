"""Is the number that is explained the logit behind the box, and is the box where MONAI has it?"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import med_gradcam as mg
from med_gradcam import anchors, box_target, detection
from med_gradcam.bundle import Bundle
from med_gradcam.cli import main
from med_gradcam.errors import CannotExplainError, ModelError, UnknownNameError, UsageError
from med_gradcam.formats import _panel
from med_gradcam.formats._scene import scene
from med_gradcam.geometry import Geometry
from med_gradcam.model import InputSpec, Model
from med_gradcam.record import to_json, to_record
from med_gradcam.target import Box, TargetRegion
from med_gradcam.volume import Volume
from tests.engine import retina
from tests.tiny import affine_of, save_nifti

STEM = "network.feature_extractor.stem"


def theirs(made: Any, array: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found: dict[str, torch.Tensor] = made(torch.from_numpy(array.copy())[None])[0]
    return found


def corners(boxes: tuple[Box, ...]) -> np.ndarray[Any, Any]:
    """Boxes of a scan on voxels of 1 mm in RAS as MONAI writes them."""
    middle, size = (
        np.array([getattr(box, name) for box in boxes]) for name in ("centre_ras_mm", "size_mm")
    )
    return np.concatenate([middle - size / 2, middle + size / 2], axis=1)


# ---------------------------------------------------------------------------------- the same boxes


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", [{}, {"nms_thresh": 0.6}, {"detections_per_img": 5}])
def test_the_boxes_are_those_of_the_detector(seed: int, settings: dict[str, Any]) -> None:
    made, array = retina.retina(retina.bare(seed=seed), **settings), retina.noise(seed=seed)
    wanted = theirs(made, array)
    found = mg.boxes(array, made)
    assert len(found) == len(wanted["boxes"]) > 1
    assert [box.number for box in found] == [*range(1, len(found) + 1)]
    assert np.abs(corners(found) - wanted["boxes"].numpy()).max() < 1e-4
    assert [box.label for box in found] == [f"class {c}" for c in wanted["labels"].tolist()]
    scores = [box.probability for box in found]
    assert scores == pytest.approx(wanted["labels_scores"].tolist(), rel=1e-5)


def test_the_coder_s_weights_and_per_level_limits_are_honoured() -> None:
    made, array = retina.retina(retina.bare(), topk_candidates_per_level=7), retina.noise()
    made.set_box_coder_weights((2.0, 1.0, 1.0, 1.5, 1.0, 3.0))
    wanted = theirs(made, array)
    assert np.abs(corners(mg.boxes(array, made)) - wanted["boxes"].numpy()).max() < 1e-4


def test_places_in_mm_are_those_of_the_affine() -> None:
    ops = importlib.import_module("monai.apps.detection.transforms.box_ops")
    made, volume = retina.retina(retina.bare()), retina.oblique_scan()
    wanted = ops.apply_affine_to_boxes(
        theirs(made, volume.array)["boxes"], torch.from_numpy(volume.grid.affine.copy()).float()
    )
    wanted = wanted.numpy()
    found = corners(mg.boxes(volume, made))
    low = np.minimum(wanted[:, :3], wanted[:, 3:])
    high = np.maximum(wanted[:, :3], wanted[:, 3:])
    assert np.abs(found - np.concatenate([low, high], axis=1)).max() < 1e-3


@pytest.mark.parametrize("listed", [False, True])
def test_a_bare_network_with_its_anchors_is_the_detector(listed: bool) -> None:
    net, array = retina.bare(listed=listed), retina.noise()
    wanted = mg.boxes(array, retina.retina(net))
    for given in (
        retina.generator(),
        {"feature_map_scales": retina.SCALES, "base_anchor_shapes": retina.SHAPES},
        [retina.SHAPES, [[2 * n for n in shape] for shape in retina.SHAPES]],
    ):
        made = mg.detector(net, given, threshold=0.3, nms=0.2)
        assert mg.boxes(array, made) == wanted
    assert detection.detector(made) is made


def test_anchors_of_sizes_and_aspect_ratios() -> None:
    sizes, ratios = ((6, 9), (14,)), (((0.5, 1.0), (2.0, 0.7)),) * 2
    wanted = retina.parts()[2].AnchorGenerator(sizes, ratios).cell_anchors
    made = detection._shapes({"sizes": sizes, "aspect_ratios": ratios})
    assert [t.shape for t in made] == [t.shape for t in wanted]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    alike = detection._shapes({"sizes": sizes, "aspect_ratios": ratios[0]})
    assert all(torch.equal(a, b) for a, b in zip(made, alike, strict=True))


# --------------------------------------------------------------------------------- the same number


def logits_of(made: Any, array: Any) -> torch.Tensor:
    """Every anchor's logits (n, K) in MONAI's order."""
    with torch.no_grad():
        out = made.network(
            torch.nn.functional.pad(torch.from_numpy(array)[None], (0, 0, 0, 2, 0, 2))
        )
        found: torch.Tensor = made._reshape_maps(out["classification"])[0]
    return found


def test_the_score_is_the_logit_of_the_anchor_behind_the_box() -> None:
    made, array = retina.retina(retina.bare()), retina.noise()
    logits = logits_of(made, array).double()
    wanted = theirs(made, array)["labels_scores"]
    for number in (1, 2, 5, 9):
        e = mg.explain(array, made, target=f"box:{number}", layer=STEM, method="hirescam")
        assert (e.target.kind, e.target.link, e.unit) == ("region", "sigmoid", "log-odds")
        assert e.probability == pytest.approx(float(wanted[number - 1]), rel=1e-4)
        assert float((logits - e.score).abs().min()) < 1e-4
        other = mg.explain(array, made, target=f"0-vs-1@box:{number}", layer=STEM, quick=True)
        row = int((logits - e.score).abs().min(dim=1).values.argmin())
        assert other.score == pytest.approx(float(logits[row, 0] - logits[row, 1]), rel=1e-4)
        assert other.probability is None


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("layer", ["auto", STEM, "@input"])
def test_the_evidence_adds_up_to_the_logit_of_either_level(level: int, layer: str) -> None:
    made, array = retina.retina(retina.bare(), score_thresh=0.1), retina.noise()
    net = detection.detector(made)
    with torch.no_grad():
        out = net(torch.from_numpy(array)[None])
    found = anchors.levels(out, net.rules, array.shape[1:])
    kept = anchors.kept(found, net.rules, array.shape[1:])
    number = next(n for n, one in enumerate(kept, 1) if one.level == level)
    e = mg.explain(array, made, target=f"box:{number}", layer=layer)
    assert e.status == "complete"
    assert e.target.output == f"classification[{level}]"
    assert e.reference_score is not None
    assert e.residual is not None
    assert abs(e.residual) < 1e-4 * max(1.0, abs(e.score - e.reference_score))
    if layer == "auto":  # the level's own map, or what all levels are made of
        assert e.layer in (f"network.feature_extractor.fpn.layer_blocks.{level}", STEM) or (
            e.layer.startswith("network.feature_extractor")
        )


def test_the_gradient_is_that_of_the_one_logit() -> None:
    made, array = retina.retina(retina.bare()), retina.noise()
    e = mg.explain(array, made, target="box:2", layer=STEM, method="hirescam")
    net = made.network
    x = torch.nn.functional.pad(torch.from_numpy(array)[None], (0, 0, 0, 2, 0, 2))
    activation = net.feature_extractor.stem(x).detach().requires_grad_()
    deep = net.feature_extractor.deep(activation)
    maps = [*net.feature_extractor.fpn({"a": activation, "b": deep}).values()]
    flat = made._reshape_maps(net.classification_head(maps))[0].flatten()
    (gradient,) = torch.autograd.grad(flat[(flat.detach() - e.score).abs().argmin()], activation)
    wanted = (gradient * activation)[0].sum(0).detach().numpy()
    assert np.abs(e.evidence - wanted).max() < 1e-4 * np.abs(wanted).max()


# ------------------------------------------------------------------------------- what users write


def quick(target: Any, made: Any = None, **more: Any) -> mg.Explanation:
    made = retina.retina(retina.bare()) if made is None else made
    options = {"layer": STEM, "method": "hirescam", "quick": True, **more}
    return mg.explain(retina.noise(), made, target=target, **options)


def test_ways_to_name_a_box() -> None:
    made, array = retina.retina(retina.bare()), retina.noise()
    found = mg.boxes(array, made)
    first, second = (next(b for b in found if b.label == f"class {c}") for c in (0, 1))
    assert {first.number, second.number} > {1}
    for target, number in (("auto", 1), ("box:1", 1), ("0", first.number), (1, second.number)):
        e = quick(target, made)
        assert e.target.label == f"{found[number - 1].label}@box:{number}"
        assert e.score == pytest.approx(found[number - 1].score, rel=1e-5)
    box = found[4]
    place = ",".join(f"{v:.2f}" for v in box.centre_ras_mm)
    sides = ",".join(f"{v:.2f}" for v in box.size_mm)
    given = quick(f"auto@box:ras:{place}:{sides}", made).target
    assert given.label == f"{box.label}@box:5"
    assert given.region is not None
    assert given.region.boxes[0] == box
    assert [b.number for b in given.region.boxes[1:4]] == [1, 2, 3]
    assert "box 5 of" in given.about
    named = Model(made, InputSpec(), ("vessel", "nodule"), "sigmoid", weights_sha256="0")
    assert quick("nodule", named).target.label == f"nodule@box:{second.number}"
    assert quick("nodule@box:1", named).target.label == "nodule@box:1"


def test_a_place_where_no_box_is_kept_has_an_anchor() -> None:
    e = quick("1@box:ijk:11,11,11:6", retina.retina(retina.bare(), score_thresh=1.0))
    assert e.target.label == "class 1@box"
    assert e.target.region is not None
    first = e.target.region.boxes[0]
    assert (first.number, first.label) == (0, "class 1")
    assert "where the detector keeps no box" in e.target.about
    seen = anchors.overlaps([8, 8, 8, 14, 14, 14], corners((first,)).tolist(), None)
    assert seen[0] >= box_target.SAME_BOX


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        (
            "box:9999",
            UsageError,
            r"one of the \d+ boxes that the detector keeps, got box:9999; they",
        ),
        ("box:0", UsageError, "got box:0"),
        ("7", UnknownNameError, "known class, got '7'.*0 to 1"),
        ("0@voxel:ijk:1,1,1", UsageError, "target of a detector as CLASS, box:N.*got a voxel"),
        ("0@component:1", UsageError, "got a component"),
        ("box:somewhere", UsageError, "expected a box as ras:X,Y,Z:SIZE_MM"),
        ("0@box:ijk:0,0,0:0.01", CannotExplainError, "best overlap with 'ijk:0,0,0:0.01' is"),
    ],
)
def test_targets_that_are_none(target: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        quick(target)


def test_no_box_above_the_threshold_names_the_nearest_one() -> None:
    made = retina.retina(retina.bare(), score_thresh=1.0)
    assert mg.boxes(retina.noise(), made) == ()
    with pytest.raises(CannotExplainError, match="there is none: its highest score is") as caught:
        quick("auto", made)
    assert caught.value.reason == "empty region"
    place = str(caught.value).partition("such as ")[2].rstrip(".")
    assert quick(place, made).target.label.endswith("@box")


def test_detectors_that_do_not_fit() -> None:
    net, array = retina.bare(), retina.noise()
    with pytest.raises(UsageError, match=r"a detector whose anchors are known.*box:1"):
        quick("box:1", net, layer=STEM[8:])
    with pytest.raises(UsageError, match="hand over MONAI's RetinaNetDetector"):
        quick("auto", net, layer=STEM[8:])  # not a segmentation of its logits
    with pytest.raises(UsageError, match="expected the anchors of the detector"):
        mg.detector(net)
    with pytest.raises(UsageError, match="expected no anchors beside a detector"):
        mg.detector(retina.retina(net), retina.generator())
    with pytest.raises(UsageError, match="expected anchors as an AnchorGenerator"):
        mg.detector(net, {"size": 3})
    with pytest.raises(ModelError, match=r"heads for 1 anchors per place, 6 numbers .*got 18"):
        mg.boxes(array, mg.detector(net, [[(6, 6, 6)], [(12, 12, 12)]]))
    with pytest.raises(ModelError, match="each of the 2 levels of the network, got them for 1"):
        mg.boxes(array, mg.detector(net, [retina.SHAPES]))
    with pytest.raises(ModelError, match=r"of a segmentation network list the components"):
        mg.boxes(array, torch.nn.Conv3d(1, 2, 1))
    with pytest.raises(UsageError, match="got a detector; list its boxes"):
        mg.components(array, retina.retina(net))
    with pytest.raises(ModelError, match=r"expected 1 classes \(nodule\), the detector .* has 2"):
        quick("auto", Model(retina.retina(net), InputSpec(), ("nodule",), weights_sha256="0"))
    with pytest.raises(ModelError, match="puts out logits"):
        mg.boxes(array, retina.retina(net, apply_sigmoid=False))


# ------------------------------------------------------------------------------- files and pictures


def test_boxes_are_written_and_come_back(tmp_path: Path) -> None:
    made, volume = retina.retina(retina.bare()), retina.oblique_scan()
    e = mg.explain(volume, made, target="box:3", layer=STEM)
    folder = mg.write(e, tmp_path / "out", volume=volume)
    back = mg.read_explanation(folder)
    assert back == e
    assert back.target.region is not None
    assert back.target.region.boxes[0].number == 3
    assert isinstance(back.target.region.boxes[0], Box)
    assert back.probability == e.probability
    schema = json.loads(
        (Path(mg.__file__).parent / "schema" / "explanation.schema.json").read_text()
    )
    record = json.loads(to_json(to_record(e, mg.draw(e))))
    pytest.importorskip("jsonschema")
    importlib.import_module("jsonschema").validate(record, schema)
    assert len(record["target"]["region"]["boxes"]) == min(len(mg.boxes(volume, made)), 21)
    again = mg.explain(volume, made, target=e.target, layer=STEM)
    assert np.array_equal(again.evidence, e.evidence)


def frame_of(box: Box, grid: Geometry) -> np.ndarray[Any, Any]:
    """Lowest and highest corner of a box, as indices of a grid without rotation."""
    middle, half = np.array(box.centre_ras_mm), np.array(box.size_mm) / 2
    ends = grid.index_ijk(np.stack([middle - half, middle + half]))
    return np.stack([ends.min(axis=0), ends.max(axis=0)])


@pytest.mark.parametrize("axes", [None, "SPL", "RAI"])
def test_the_frames_lie_on_the_boxes_whatever_the_network_s_axes(axes: str | None) -> None:
    made, volume = retina.retina(retina.bare()), retina.oblique_scan()
    net = Model(made, InputSpec(axes=axes), weights_sha256="0")
    e = mg.explain(volume, net, target="box:2", layer=STEM, method="hirescam")
    frames = scene(Bundle(e, mg.draw(e), volume)).frames
    assert frames[0].explained
    assert not frames[1].explained
    assert e.target.region is not None
    for frame, box in zip(frames, e.target.region.boxes, strict=True):
        assert np.abs(frame.corners - frame_of(box, volume.grid)).max() < 1e-6
        assert (frame.corners >= -1 - 1e-3).all()  # MONAI's boxes go from 0 to N
        assert (frame.corners <= np.array(volume.grid.shape) + 1e-3).all()


def test_the_pictures_show_the_frames(tmp_path: Path) -> None:
    made, volume = retina.retina(retina.bare()), retina.oblique_scan()
    e = mg.explain(volume, made, target="box:2", layer=STEM, method="hirescam")
    bare = e.replace(target=mg.explain(volume, made, target=_first, layer=STEM, quick=True).target)
    for one, shown in ((e, True), (bare, False)):
        folder = mg.write(one, tmp_path / str(shown), volume=volume, formats=("png",))
        for name in ("overview", "mip_axial_for"):
            pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
            for colour in (_panel.BOX, _panel.BOX_OTHER):
                assert (pixels == colour).all(axis=-1).any() == shown


def _first(output: Any) -> Any:
    return output["classification"][0][0].mean()


def test_a_region_of_a_file_takes_boxes_as_plain_values() -> None:
    plain: Any = [{"number": 1, "label": "a", "score": 0.0, "centre_ras_mm": [1, 2, 3],
                   "size_mm": [4, 5, 6]}]  # fmt: skip
    made = TargetRegion("detection", "words", 1, 1.0, "0", plain)
    assert made.boxes == (Box(1, "a", 0.0, (1, 2, 3), (4, 5, 6)),)
    assert made.boxes[0].probability == 0.5


# -------------------------------------------------------------------------------- planted truth


@pytest.mark.slow
@pytest.mark.parametrize("seed", [9001, 9002, 9003])
@pytest.mark.parametrize("layer", ["auto", STEM, "@input"])
def test_what_makes_a_detector_see_a_ball_lies_in_its_box(seed: int, layer: str) -> None:
    made = retina.trained()
    array, planted = retina.balls(seed)
    grid = Geometry((retina.SIZE,) * 3, affine_of("LPS", (1.5, 1.5, 2.0), (20, 30, -40)))
    volume = Volume(array, grid)
    for number in (1, 2):
        e = mg.explain(volume, made, target=f"box:{number}", layer=layer)
        assert e.target.region is not None
        frame = frame_of(e.target.region.boxes[0], grid)
        over = anchors.overlaps(
            frame.ravel().tolist(), [list(map(float, b)) for b in planted], None
        )
        assert over.max() > 0.5  # the detector found one of the balls
        assert e.score > 2
        assert e.residual is not None
        assert abs(e.residual) < 1e-4 * abs(e.score)
        drawn = mg.draw(e).raises.values
        peak = np.unravel_index(drawn.argmax(), drawn.shape)
        slack = 1.0 if layer == "@input" else 2.0  # a cell of the layer
        assert (frame[0] - slack <= peak).all()
        assert (peak <= frame[1] + slack).all()
        inside = tuple(slice(max(0, int(a) - 2), int(b) + 3) for a, b in frame.T)
        assert drawn[inside].sum() > 0.6 * drawn.sum()


# ----------------------------------------------------------------------------- the command line

FACTORY = """
from tests.engine import retina

def make():
    return retina.retina(retina.bare()), {}, ("vessel", "nodule"), "sigmoid"
"""


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detector_factory_for_a_test.py").write_text(FACTORY)
    scan = save_nifti(tmp_path / "scan.nii.gz", retina.noise()[0], np.eye(4))
    words = [str(scan), "--model", "detector_factory_for_a_test:make", "--trust", "code"]
    assert main(["boxes", *words, "--most", "3"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == [
        "target", "class", "score", "log-odds", "centre", "size", "mm",
    ]  # fmt: skip
    assert "box:3" in said
    assert "with lower scores" in said
    assert main(["boxes", *words, "--json", "--target", "nodule"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["label"] for row in rows} == {"nodule"}
    chosen = rows[1]["target"]
    assert main(["explain", *words, "--target", chosen, "--layer", STEM, "--formats", "",
                 "-o", "out"]) == 0  # fmt: skip
    assert f"behind box {rows[1]['number']} of" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert record["score"] == pytest.approx(rows[1]["score"], rel=1e-5)
    assert record["probability"] == pytest.approx(rows[1]["probability"], rel=1e-5)
    assert main(["components", *words]) == 2
    assert "med-gradcam boxes" in capsys.readouterr().err
