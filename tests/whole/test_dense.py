"""Output maps: are they stitched as MONAI does it, and does the map add up and lie as untiled?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import whole_scan
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.explanation import Explanation
from med_gradcam.progress import Step
from med_gradcam.whole import Whole, explain_whole
from tests.whole.nets import noise, patchwise, segmenter

SHAPE = (26, 24, 22)
CASES = [
    ((12, 10, 9), 0.5, "gaussian"),
    ((16, 16, 16), 0.25, "constant"),
    ((40, 10, 30), 0.5, "gaussian"),
]


def by_windows(x: Any, net: nn.Module, **changes: Any) -> Whole:
    given: dict[str, Any] = {"window": (12, 12, 12), "layer": "1", "target": "1", "link": "softmax"}
    return explain_whole(x, net, **{**given, **changes})


def monai(x: Any, net: nn.Module, window: Any, overlap: float, mode: str) -> Any:
    from monai.inferers.utils import sliding_window_inference

    first = next(net.parameters())
    with torch.no_grad():
        tensor = torch.from_numpy(x)[None, None].to(first.dtype)
        return sliding_window_inference(tensor, window, 3, net, overlap=overlap, mode=mode)[0]


# ---------------------------------------------------------------------------------- stitching


@pytest.mark.parametrize(("window", "overlap", "mode"), CASES)
def test_the_stitched_map_is_that_of_monai(window: Any, overlap: float, mode: Any) -> None:
    x, net = noise(SHAPE), segmenter()
    w = by_windows(
        x, net, window=window, overlap=overlap, importance=mode, keep_output=True, batch=2
    )
    assert w.kind == "dense"
    assert w.output is not None
    want = monai(x, net, window, overlap, mode).numpy()
    assert np.abs(w.output - want).max() < 1e-6
    assert w.explanation.status == "complete"


def test_a_strided_map_is_stitched_as_monai_does_it() -> None:
    x, net = noise((24, 24, 24)), patchwise()[:-1]
    w = by_windows(x, net, window=(8, 8, 8), keep_output=True, target="1@voxel:ijk:9,9,9")
    assert w.output is not None
    want = monai(x, net, (8, 8, 8), 0.5, "gaussian").numpy()
    assert w.output.shape == want.shape == (3, 6, 6, 6)
    assert np.abs(w.output - want).max() < 1e-6
    assert w.grid.shape == (6, 6, 6)


# ------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize(
    "target",
    ["1", "1-vs-0", "1@component:1", "2@voxel:ijk:11,12,13", "2@box:ras:10,10,10:6"],
)
def test_the_map_adds_up_for_every_kind_of_target(target: str) -> None:
    net = segmenter().double()
    w = by_windows(noise(SHAPE), net, target=target)
    e = w.explanation
    assert e.reference_score is not None
    assert w.residual == pytest.approx(0, abs=1e-12)
    assert e.residual == pytest.approx(0, abs=1e-6)  # its cells are float32
    assert sum(row.share for row in w.windows) == pytest.approx(
        e.score - e.reference_score, abs=1e-12
    )
    assert sum(row.net for row in w.windows) == pytest.approx(w.net, abs=1e-12)


def test_the_score_is_that_of_the_stitched_map() -> None:
    x, net = noise(SHAPE), segmenter()
    mask = np.zeros(SHAPE, dtype=np.float32)
    mask[8:14, 9:16, 5:15] = 1
    w = by_windows(x, net, target=("1", mask))
    logits = monai(x, net, (12, 12, 12), 0.5, "gaussian").double()
    others = torch.stack([logits[0], logits[2]]).logsumexp(0)
    want = float((logits[1] - others)[torch.from_numpy(mask) > 0].mean())
    assert w.explanation.score == pytest.approx(want, abs=1e-6)


def test_windows_that_the_target_does_not_read_are_not_explained() -> None:
    w = by_windows(noise(SHAPE), segmenter(), target="1@voxel:ijk:2,2,2")
    assert w.explained == 1
    assert [row.number for row in w.windows if row.explained] == [0]


def test_where_the_place_is_given_no_other_window_is_run() -> None:
    x, net = noise((40, 12, 12)), segmenter()
    given = {"window": (12, 12, 12), "target": "1@box:ras:3,5,5:4", "overlap": 0.0}
    w = by_windows(x, net, **given)
    every = by_windows(x, net, **given, keep_output=True)
    assert len(w.windows) == 4
    # one to look at, one of the scan, one of the reference
    assert (w.ran, every.ran) == (3, 6)
    assert w.explanation.score == every.explanation.score
    assert np.array_equal(w.explanation.evidence, every.explanation.evidence)
    half = by_windows(x, net.half().float(), **given)
    assert half.residual == pytest.approx(0, abs=1e-5)


def test_a_function_of_the_stitched_map_adds_up() -> None:
    net = segmenter().double()
    w = by_windows(noise(SHAPE), net, target=lambda y: y[0, 1].sigmoid().sum() ** 0.5)
    assert w.residual == pytest.approx(0, abs=1e-10)
    assert w.explanation.target.label == "own function"


def test_finding_8_the_sum_of_the_maps_is_the_stitched_score() -> None:
    """S = sum of the stitched map over a region; behind a linear tail HiResCAM adds up to it."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 2, 3, padding=1, bias=False)
    ).double().eval()  # fmt: skip
    x = noise(SHAPE)
    roi = torch.zeros(SHAPE, dtype=torch.float64)
    roi[6:18, 5:19, 7:17] = 1
    w = by_windows(
        x, net, method="hirescam", target=lambda y: (y[0, 1] * roi).sum(), importance="gaussian"
    )
    want = float((monai(x, net, (12, 12, 12), 0.5, "gaussian")[1] * roi).sum())
    assert abs(want) > 1
    assert w.explanation.score == pytest.approx(want, rel=1e-6)  # MONAI's weights are float32
    assert w.net == pytest.approx(w.explanation.score, rel=1e-12)


# --------------------------------------------------------------------------------- tiled, untiled


def same(tiled: Explanation, whole: Explanation) -> float:
    """How far two maps lie apart; their cells must lie at the same places."""
    assert tiled.grid.affine == pytest.approx(whole.grid.affine, abs=1e-9)
    assert tiled.evidence.shape == whole.evidence.shape
    return float(np.abs(tiled.evidence - whole.evidence).max() / np.abs(whole.evidence).max())


@pytest.mark.parametrize("layer", ["1", "3", "@input"])
@pytest.mark.parametrize("method", ["secant", "hirescam", "integrated"])
def test_tiled_equals_untiled_where_windows_begin_on_the_stride(method: str, layer: str) -> None:
    x, net = noise((24, 24, 24)), patchwise().double()
    given: dict[str, Any] = {"target": "1@box:ras:11,11,11:10", "method": method, "layer": layer}
    given["link"] = "softmax"
    whole = mg.explain(x, net, **given)
    ways: list[tuple[float, Any]] = [(0.5, "gaussian"), (0.0, "constant"), (0.75, "gaussian")]
    for overlap, mode in ways:
        tiled = explain_whole(
            x, net, window=(16, 16, 16), overlap=overlap, importance=mode, **given
        )
        assert len(tiled.windows) > 1
        assert tiled.explanation.score == pytest.approx(whole.score, abs=1e-5)
        # the integral stops where it is within its bound, at other nodes for other windows
        assert same(tiled.explanation, whole) < (1e-6 if method != "integrated" else 0.05)


def test_tiled_differs_where_windows_begin_beside_the_stride() -> None:
    x, net = noise((24, 24, 24)), patchwise()
    given: dict[str, Any] = {"target": "1@box:ras:11,11,11:10", "layer": "3", "link": "softmax"}
    whole = mg.explain(x, net, **given)
    tiled = explain_whole(x, net, window=(16, 16, 16), overlap=0.9, **given)  # a step of 1
    assert abs(tiled.explanation.score - whole.score) > 1e-4
    assert tiled.residual == pytest.approx(0, abs=1e-5)  # and yet it adds up
    assert any("lie between those of the map" in note for note in tiled.explanation.warnings)


# In windows of 16 at 0, 8 and 16 voxel 12 is 3 or more from every border, voxel 9 only 1.
@pytest.mark.parametrize(("voxel", "equal"), [(12, True), (9, False)])
def test_a_padded_net_is_untiled_where_each_window_holds_what_the_target_sees(
    voxel: int, *, equal: bool
) -> None:
    x, net = noise((32, 32, 32)), segmenter().double()  # sees 2 voxels to each side
    given: dict[str, Any] = {"target": f"1@voxel:ijk:{voxel},{voxel},{voxel}", "layer": "1"}
    whole = mg.explain(x, net, link="softmax", **given)
    tiled = explain_whole(x, net, window=(16, 16, 16), link="softmax", **given)
    assert (same(tiled.explanation, whole) < 1e-6) == equal
    assert tiled.residual == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_any_batch_gives_the_same_result(batch: int) -> None:
    x, net = noise(SHAPE), segmenter()
    one, other = by_windows(x, net), by_windows(x, net, batch=batch)
    assert other.explanation.score == pytest.approx(one.explanation.score, abs=1e-6)
    assert same(other.explanation, one.explanation) < 1e-6
    assert [r.explained for r in one.windows] == [r.explained for r in other.windows]


# --------------------------------------------------------------------------------- what is spared


def test_windows_of_one_value_are_run_once() -> None:
    x = np.zeros((32, 12, 12), dtype=np.float32)
    x[:8] = noise((8, 12, 12))
    w = by_windows(x, segmenter(), window=(8, 12, 12), overlap=0.0, target="1@box:ras:3,5,5:4")
    assert len(w.windows) == 4
    # one to look at, the noisy one, one of zeros, and of the reference (zeros) none
    assert w.ran == 3
    assert w.skipped == 0


def test_large_results_lie_in_a_folder_that_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, net = noise(SHAPE), segmenter()
    small = by_windows(x, net, keep_output=True)
    monkeypatch.setattr(whole_scan, "MEMORY_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[int] = []
    large = by_windows(
        x, net, keep_output=True, progress=lambda _: seen.append(len(list(tmp_path.rglob("*.bin"))))
    )
    assert max(seen) == 4  # weights, both stitched maps, the lattice
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(large.explanation.evidence, small.explanation.evidence)
    assert large.output is not None
    assert small.output is not None
    assert np.array_equal(large.output, small.output)
    assert not isinstance(large.output, np.memmap)


def test_it_can_be_stopped_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whole_scan, "MEMORY_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net = segmenter().train()
    steps: list[Step] = []

    def stop(step: Step) -> None:
        steps.append(step)
        if step.what.startswith("explaining windows") and step.done == 2:
            raise mg.Cancelled("enough")

    with pytest.raises(mg.Cancelled, match="enough"):
        by_windows(noise(SHAPE), net, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert any("left" in step.what for step in steps)
    assert {step.total for step in steps if step.what.startswith("running windows")} == {36}


def test_a_method_that_stands_in_does_so_for_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    from med_gradcam import observe
    from med_gradcam.secant.rules import NoRuleError

    real, calls = observe.paired, [0]

    def paired(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:  # not the first window
            raise NoRuleError("an operation of its own")
        return real(*given, **named)

    monkeypatch.setattr(observe, "paired", paired)
    w = by_windows(noise(SHAPE), segmenter())
    assert w.explanation.method == "integrated"
    assert calls[0] == 3
    assert w.explanation.status == "complete"
    assert sum("took over" in note for note in w.explanation.warnings) == 1
    assert abs(w.residual or 0) < 0.05 * abs(w.net) + 0.02


# -------------------------------------------------------------------------------------- refusals


def test_what_does_not_go_with_windows_is_refused() -> None:
    x, net = noise(SHAPE), segmenter()
    for changes, words in (
        ({"at": "ijk:1,1,1"}, "the windows lie everywhere"),
        ({"fast": True}, "input of its own"),
        ({"batch": 0}, "at least 1"),
        ({"method": "layercam"}, "windows add up"),
        ({"method": "occlusion"}, "windows add up"),
        ({"layer": "1+3"}, "one layer"),
        ({"layer": "all"}, "one layer"),
        ({"within": mg.Volume(np.ones((1, *SHAPE)), mg.Geometry(SHAPE, np.eye(4)))}, "no mask"),
        ({"windows": 3}, "known setting"),
    ):
        with pytest.raises(UsageError, match=words):
            by_windows(x, net, **changes)
    with pytest.raises(CannotExplainError, match="constant"):
        by_windows(np.ones(SHAPE, dtype=np.float32), net)
