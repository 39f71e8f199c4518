"""Scores of windows: is the volume's map that of its aggregation, and does its ledger add up?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.geometry import point_words
from med_gradcam.tiling import tiles
from med_gradcam.whole import Whole, explain_whole
from med_gradcam.whole_ledger import WindowRow, candidates
from med_gradcam.whole_score import multipliers, pool
from tests.tiny import affine_of, volume
from tests.whole.nets import classifier, noise, patched

SHAPE = (30, 26, 22)
WINDOW = (12, 12, 12)
DIRECT: dict[str, Any] = {
    "max": max,
    "mean": lambda z: sum(z) / len(z),
    "lse": lambda z: 2 * (math.log(sum(math.exp(v / 2) for v in z)) - math.log(len(z))),
}


def _logit_of_any(z: list[float]) -> float:
    none = math.prod(1 - 1 / (1 + math.exp(-v)) for v in z)
    return math.log(1 - none) - math.log(none)


DIRECT["noisy-or"] = _logit_of_any


def attention(out: torch.Tensor) -> torch.Tensor:
    """The first output, weighed by the second: attention over windows."""
    return (out[:, 1].softmax(0) * out[:, 0]).sum()


def by_windows(x: Any, net: Any, **changes: Any) -> Whole:
    given: dict[str, Any] = {"window": WINDOW, "layer": "4", "target": "1"}
    if isinstance(net, nn.Module):
        given["link"] = "softmax"
    return explain_whole(x, net, **{**given, **changes})


def log_odds(x: Any, net: nn.Module, c: int = 1) -> list[float]:
    """Each window's own log-odds, worked out one by one."""
    found = []
    for i, j, k in tiles(SHAPE, WINDOW).starts:
        part = torch.from_numpy(x[i : i + 12, j : j + 12, k : k + 12])[None, None]
        with torch.no_grad():
            y = net(part.to(next(net.parameters()).dtype))[0].double()
        others = [n for n in range(len(y)) if n != c]
        found.append(float(y[c] - y[others].logsumexp(0)))
    return found


# ------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("layer", ["1", "4", "@input"])
@pytest.mark.parametrize("how", ["max", "mean", "lse", "noisy-or"])
def test_the_map_and_the_ledger_add_up(how: str, layer: str) -> None:
    x, net = noise(SHAPE), classifier().double()
    w = by_windows(x, net, aggregate=how, temperature=2.0, layer=layer)
    e = w.explanation
    assert w.kind == "pooled"
    assert e.score == pytest.approx(DIRECT[how](log_odds(x, net)), abs=1e-9)
    nothing = log_odds(np.zeros_like(x), net)
    assert e.reference_score == pytest.approx(DIRECT[how](nothing), abs=1e-9)
    assert w.residual == pytest.approx(0, abs=1e-9)
    assert sum(row.share for row in w.windows) == pytest.approx(w.net, abs=1e-9)
    assert e.status == "complete"
    assert [row.score for row in w.windows] == pytest.approx(log_odds(x, net), abs=1e-9)
    assert e.target.label == f"class 1, {how} over windows"
    assert e.unit == "log-odds"


def test_attention_by_a_function_adds_up_its_attention_included() -> None:
    x, net = noise(SHAPE), classifier().double()
    w = by_windows(x, net, aggregate=attention, target="auto")
    outputs = np.array([[r.score, r.share] for r in w.windows])
    assert w.residual == pytest.approx(0, abs=1e-9)
    assert w.explained == len(w.windows)
    # the shares are not those of fixed attention: the attention itself changes with the scan
    assert np.abs(outputs[:, 1] - outputs[:, 0] / len(outputs)).max() > 1e-6
    assert w.explanation.target.label == "attention"


def test_of_a_maximum_only_the_highest_window_is_explained_and_as_alone() -> None:
    x, net = noise(SHAPE), classifier().double()
    w = by_windows(x, net, aggregate="max")
    scores = log_odds(x, net)
    (row,) = [row for row in w.windows if row.explained]
    assert row.number == int(np.argmax(scores))
    i, j, k = row.start
    alone = mg.explain(
        x[i : i + 12, j : j + 12, k : k + 12], net, target="1", layer="4", link="softmax"
    )
    place = [round(s / 2) for s in row.start]
    a, b, c = (slice(s, s + 6) for s in place)
    assert np.abs(w.explanation.evidence[a, b, c] - alone.evidence).max() < 1e-6
    assert np.abs(w.explanation.evidence).sum() == pytest.approx(
        np.abs(alone.evidence).sum(), rel=1e-6
    )


def test_the_mean_of_windows_without_overlap_is_untiled() -> None:
    """Where a mean over places ends the network, the mean over windows is the same mean."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 4, stride=4), nn.SiLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(6, 2),
    ).double().eval()  # fmt: skip
    x = noise((24, 24, 24))
    for method in ("secant", "hirescam"):
        given: dict[str, Any] = {"target": "1", "layer": "1", "link": "none", "method": method}
        whole = mg.explain(x, net, **given)
        tiled = explain_whole(x, net, window=(8, 12, 24), overlap=0.0, aggregate="mean", **given)
        assert tiled.explanation.score == pytest.approx(whole.score, abs=1e-9)
        assert tiled.explanation.grid == whole.grid
        size = np.abs(whole.evidence).max()
        assert np.abs(tiled.explanation.evidence - whole.evidence).max() < 1e-6 * size


@pytest.mark.parametrize("batch", [2, 5, 1000])
@pytest.mark.parametrize("how", ["max", "noisy-or"])
def test_any_batch_gives_the_same_result(how: str, batch: int) -> None:
    x, net = noise(SHAPE), classifier()
    one, other = (by_windows(x, net, aggregate=how, batch=n) for n in (1, batch))
    assert other.explanation.score == pytest.approx(one.explanation.score, abs=1e-5)
    size = np.abs(one.explanation.evidence).max()
    assert np.abs(other.explanation.evidence - one.explanation.evidence).max() < 1e-6 * size


def test_a_network_that_mixes_its_batch_is_run_window_by_window() -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4, track_running_stats=False), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    x = noise(SHAPE)
    one, other = (by_windows(x, net, batch=n, layer="2") for n in (1, 4))
    assert [r.score for r in other.windows] == pytest.approx([r.score for r in one.windows])
    assert any("one by one" in note for note in other.explanation.warnings)
    assert not any("one by one" in note for note in one.explanation.warnings)


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "integrated"])
def test_other_methods_add_up_their_own_maps(method: str) -> None:
    x, net = noise(SHAPE), classifier().double()
    w = by_windows(x, net, aggregate="mean", method=method)
    assert w.explained == len(w.windows)
    assert w.net == pytest.approx(sum(row.net for row in w.windows))
    assert (w.residual is None) == (method != "integrated")
    if method == "integrated":
        assert abs(w.residual or 0) <= 0.05 * abs(w.net) + 0.02
    assert any("each window's own" in n for n in w.explanation.warnings) == (method == "gradcam")


def _two_largest(o: torch.Tensor) -> torch.Tensor:
    return (o[:, 0].sort().values[-2:].mean() ** 2).reshape(1)


def _without_a_rule(o: torch.Tensor) -> torch.Tensor:
    bent: torch.Tensor = torch.special.i0(o)
    return bent.sum().reshape(1)


@pytest.mark.parametrize("how", [_two_largest, _without_a_rule])
def test_an_aggregation_without_a_rule_goes_along_the_path(how: Any) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(2, 6, 2, dtype=torch.float64)
    m = multipliers(how, x, y)
    assert float((m * (x - y)).sum()) == pytest.approx(float(how(x) - how(y)), rel=1e-2)


# ------------------------------------------------------------------------------- what is spared


def chest(seed: int = 0) -> mg.Volume:
    """A CT of noisy air with a body in one half of it."""
    array = np.random.default_rng(seed).normal(-1000, 60, (16, 16, 48)).astype(np.float32)
    array[4:12, 4:12, :24] += 950
    return volume(array, affine_of("LPS", (2.0, 2.0, 3.0), (40.0, 20.0, -60.0)))


def test_windows_of_air_are_not_run_and_that_is_said() -> None:
    model = patched(classifier(), (8, 8, 8))
    w = by_windows(chest(), model, window=None, aggregate="mean", reference="value:-1000")
    every = by_windows(
        chest(), model, window=None, aggregate="mean", reference="value:-1000", skip_air=False
    )
    air = [row for row in w.windows if row.skipped == "air"]
    assert w.skipped == len(air) > 0 == every.skipped
    assert all(row.start[2] >= 24 and row.score is None and row.share == 0 for row in air)
    assert {row.start[2] >= 24 for row in w.windows if not row.skipped} == {False}
    assert any(
        f"{len(air)} of {len(w.windows)} windows hold air alone" in n
        for n in w.explanation.warnings
    )
    assert not any("air" in n for n in every.explanation.warnings)
    run = [row.score or 0 for row in every.windows if row.start[2] < 24]
    assert w.explanation.score == pytest.approx(np.mean(run), abs=1e-5)


def test_a_scan_of_air_alone_is_refused() -> None:
    air = volume(np.random.default_rng(0).normal(-1000, 60, (16, 16, 16)).astype(np.float32))
    with pytest.raises(CannotExplainError, match="all are air"):
        by_windows(air, patched(classifier(), (8, 8, 8)), window=None)


def test_within_a_mask_only_its_windows_count() -> None:
    scan = chest()
    mask = np.zeros((1, 8, 8, 16))
    mask[:, :, :, :4] = 1  # on another grid: the first quarter of the slices
    coarse = mg.Geometry((8, 8, 16), scan.grid.affine @ np.diag([2, 2, 3, 1.0]))
    w = by_windows(
        scan, patched(classifier(), (8, 8, 8)), window=None, within=mg.Volume(mask, coarse)
    )
    inside = [row for row in w.windows if not row.skipped]
    assert inside
    assert all(row.start[2] + 3.5 < 12 for row in inside)
    assert any("outside the mask" in note for note in w.explanation.warnings)


# ------------------------------------------------------------------------------ the candidates


def row(number: int, start: tuple[int, int, int]) -> WindowRow:
    x, y, z = (2.0 * s for s in start)
    return WindowRow(number, start, (x, y, z), None, None, 0.0, 0.0, explained=False)


def test_candidates_are_apart() -> None:
    rows = [row(0, (0, 0, 0)), row(1, (4, 0, 0)), row(2, (8, 0, 0)), row(3, (30, 0, 0))]
    values = [1.0, 3.0, 2.0, 0.5]
    given: dict[str, Any] = {"window": (8, 8, 8), "most": 9, "least": 0.0}
    found = candidates(rows, values, apart_mm=None, **given)
    assert [(c.window, c.windows) for c in found] == [(1, 3), (3, 1)]
    found = candidates(rows, values, apart_mm=5.0, **given)
    assert [c.window for c in found] == [1, 2, 0, 3]
    assert [c.window for c in candidates(rows, values, apart_mm=5.0, **{**given, "most": 2})] == [
        1,
        2,
    ]
    assert [c.window for c in candidates(rows, [-1, -2, -3, -4], apart_mm=5.0, **given)] == [0]


def test_a_candidate_lies_where_its_window_does() -> None:
    scan = chest()
    array = np.asarray(scan.array).copy()
    array[0, 6:10, 6:10, 17:22] = 3000
    w = by_windows(
        mg.Volume(array, scan.grid, "CT", "HU"), patched(_bright(), (8, 8, 8)), window=None,
        reference="value:-1000", layer="1",
    )  # fmt: skip
    first = w.candidates[0]
    assert first.score == pytest.approx(w.explanation.score)
    start = w.windows[first.window].start
    assert start[2] in (12, 16)
    want = scan.grid.world_ras(np.array(start) + 3.5)
    assert first.centre_ras_mm == pytest.approx(want)
    assert first.words == point_words(want)


def _bright() -> nn.Sequential:
    """Takes the mean for the score of class 1."""
    net = nn.Sequential(
        nn.Conv3d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        for p, value in zip(
            net.parameters(), (0.01, 10.0, [[0.0], [1.0]], [0.0, -9.0]), strict=True
        ):
            p.copy_(torch.tensor(value).reshape(p.shape))
    return net.eval()


def test_auto_is_the_likeliest_class_but_the_background() -> None:
    x, net = noise(SHAPE), classifier()
    w = by_windows(x, net, target="auto")
    best = max((1, 2), key=lambda c: max(log_odds(x, net, c)))
    assert w.explanation.target.index == (best,)


# --------------------------------------------------------------------------------- window sizes


def test_a_networks_own_patch_is_the_window() -> None:
    model = patched(classifier(), (12, 12, 12))
    w = by_windows(noise(SHAPE), model, window=None)
    assert w.window == (12, 12, 12)
    with pytest.raises(UsageError, match=r"own patch \(12, 12, 12\)"):
        by_windows(noise(SHAPE), model, window=(8, 8, 8))
    least = mg.Model(classifier(), mg.InputSpec(min_patch=(10, 10, 10)))
    with pytest.raises(UsageError, match="at least"):
        by_windows(noise(SHAPE), least, window=(8, 8, 8))


def test_without_a_window_the_volume_is_one() -> None:
    x, net = noise(SHAPE), classifier().double()
    w = by_windows(x, net, window=None)
    alone = mg.explain(x, net, target="1", layer="4", link="softmax")
    assert len(w.windows) == 1
    assert np.abs(w.explanation.evidence - alone.evidence).max() < 1e-6


def test_a_volume_smaller_than_the_patch_is_padded_as_explain_pads_it() -> None:
    scan = chest()
    small = mg.Volume(
        np.asarray(scan.array)[:, 2:14, 2:14, 4:18],
        mg.Geometry((12, 12, 14), np.eye(4)),
        "CT",
        "HU",
    )
    model = patched(classifier().double(), (16, 16, 16))
    alone = mg.explain(small, model, at="ijk:6,6,7", target="1", layer="4")
    w = by_windows(small, model, window=None)
    assert w.explanation.score == pytest.approx(alone.score, abs=1e-6)
    zero = by_windows(small, model, window=None, padding=0.0)
    assert abs(zero.explanation.score - alone.score) > 1e-3
    assert zero.residual == pytest.approx(0, abs=1e-9)


# -------------------------------------------------------------------------------------- refusals


def test_what_is_no_aggregation_is_refused() -> None:
    x, net = noise(SHAPE), classifier()
    for changes, words in (
        ({"aggregate": "median"}, "max, mean, lse, noisy-or or a function"),
        ({"aggregate": "lse", "temperature": 0.0}, "temperature above 0"),
        ({"aggregate": attention}, "no target beside"),
        ({"aggregate": lambda o: o[:, 0], "target": "auto"}, "one number as a tensor"),
        (
            {"aggregate": lambda o: o.detach().sum(), "target": "auto", "method": "hirescam"},
            "leave out",
        ),
        ({"aggregate": "noisy-or", "link": "none"}, "log-odds for noisy-or"),
        ({"target": "1@component:1"}, "without a place"),
    ):
        with pytest.raises(UsageError, match=words):
            by_windows(x, net, **changes)


def test_the_settings_of_the_windows_are_in_the_record() -> None:
    w = by_windows(noise(SHAPE), classifier(), aggregate="lse", temperature=3.0)
    parameters = w.explanation.provenance.parameters["windows"]
    assert parameters["window"] == [12, 12, 12]
    assert parameters["aggregate"] == "lse"
    assert parameters["temperature"] == 3.0


def test_pools_agree_on_equal_scores() -> None:
    z = torch.full((7,), 1.3, dtype=torch.float64)
    for kind in ("max", "mean", "lse"):
        assert float(pool(kind, 0.7)(z)) == pytest.approx(1.3)
    assert float(pool("noisy-or", 1.0)(z[:1])) == pytest.approx(1.3)
