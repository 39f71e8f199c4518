"""Do the benchmarks import without the other tools, and do their tables say what was measured?"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_peers
from benchmarks.peers import measure, page, variants
from benchmarks.peers.nets import NETS, OUTPUTS, Summed
from benchmarks.traps import __main__ as traps_main
from benchmarks.traps import cases, ours, placement, rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def registered() -> dict[str, rows.Trap]:
    return traps_main.traps()


# -------------------------------------------------------------------------- what is there


def test_every_trap_is_measured_or_says_why_not(registered: dict[str, rows.Trap]) -> None:
    assert list(registered) == [f"S{n}" for n in range(1, 34)]
    for trap in registered.values():
        assert (trap.run is None) != (trap.why_not == ""), trap.number


def test_traps_for_ones_own_network_take_a_case(registered: dict[str, rows.Trap]) -> None:
    own = [t for t in registered.values() if t.own_network]
    assert len(own) >= 10
    for trap in own:
        assert trap.run is not None
        assert list(inspect.signature(trap.run).parameters) == ["case"], trap.number


def test_every_trap_is_on_the_page(registered: dict[str, rows.Trap]) -> None:
    text = (ROOT / "docs" / "why-not-the-others.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bS\d+\b", text.partition("<!-- traps:begin -->")[0]))
    assert named == set(registered)


@pytest.mark.parametrize(
    ("name", "marker"), [("benchmarks.md", "peers"), ("why-not-the-others.md", "traps")]
)
def test_the_pages_have_their_markers(name: str, marker: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    copy.write_text((ROOT / "docs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    page.put(copy, marker, "| new |")
    assert f"<!-- {marker}:begin -->\n| new |\n<!-- {marker}:end -->" in copy.read_text("utf-8")


def test_the_other_tools_are_no_dependencies() -> None:
    wanted = (ROOT / "benchmarks/peers/requirements.txt").read_text(encoding="utf-8")
    names = re.findall(r"^([\w-]+)==", wanted, re.MULTILINE)
    assert "grad-cam" in names
    for place in ("pyproject.toml", "constraints.txt"):
        text = (ROOT / place).read_text(encoding="utf-8")
        assert not [n for n in names if re.search(rf'^\s*"?{n}[>=<"]', text, re.MULTILINE)], place


def test_a_missing_tool_says_its_name() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_tool"):
        importlib.import_module("benchmarks.peers.adapters").peer("no_such_tool")


# --------------------------------------------------------------------------------- tables


def test_put_needs_both_markers(tmp_path: Path) -> None:
    one = tmp_path / "page.md"
    one.write_text("<!-- peers:begin -->\nno end", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the markers"):
        page.put(one, "peers", "text")


def test_ratios_are_taken_within_a_round() -> None:
    seconds = {variants.PLAIN: [1.0, 2.0, 4.0], "x": [2.0, 4.0, 12.0]}
    found = measure.summary(seconds, {"y": "ValueError: no"})
    assert found["x"]["ratio_min"] == 2.0
    assert found["x"]["ratio"] == 2.0
    assert found["x"]["ratio_max"] == 3.0
    assert found["y"] == {"error": "ValueError: no"}


def report() -> dict[str, Any]:
    plain = {"seconds": 0.5, "ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0, "extra_mb": 50.0}
    fast = {**plain, "ratio": 1.25, "ratio_min": 1.1, "ratio_max": 12.0, "extra_mb": 60.0}
    failed = {"error": "RuntimeError: a | b"}
    return {
        "machine": measure.machine(2),
        "versions": {"torch": "2", "MONAI": "1"},
        "settings": {"rounds": 3, "date": "2026-01-02"},
        "results": {
            "A @ 96": {variants.PLAIN: dict(plain), "fast": dict(fast), "bad": dict(failed)},
            "B @ 64": {variants.PLAIN: dict(plain), "fast": dict(fast)},
            "C @ 64": {variants.PLAIN: dict(plain), "bad": dict(failed)},
        },
    }


def test_the_table_of_costs() -> None:
    text = page.peers_text(report())
    assert "| fast | x1.25 (1.10-12.00) |" in text
    assert "| fast | x1.20 |" in text
    assert "| plain inference | 0.50 s |" in text
    assert "| plain inference | 50 MB |" in text
    assert text.count("**Input") == 2
    assert "| bad | - | fails [1] |" in text
    assert "[1] bad: `RuntimeError: a | b`" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line[:1] == "|"}
    assert widths == {3, 4}  # one network at 96, two at 64


def test_bars_in_cells_are_escaped() -> None:
    assert page.table(["a"], [["x | y"]]).splitlines()[-1] == "| x \\| y |"


@pytest.mark.parametrize(
    ("right", "value", "verdict"),
    [
        (1.0, 0.995, "right"),
        (1.0, -1.0, "wrong"),
        (1.0, float("nan"), "wrong"),
        (1.0, "fails: ValueError: x", "fails"),
        (1.0, "refuses: dense", "refuses"),
        (1.0, rows.NOT_OFFERED, "not offered"),
        ("kept", "kept", "right"),
        ("kept", "lost", "wrong"),
        ("kept", 0.0, "wrong"),
    ],
)
def test_verdicts(right: rows.Figure, value: rows.Figure, verdict: str) -> None:
    assert rows.Row("S1", "t", "f", right, value).verdict(value) == verdict


def test_the_table_of_traps_names_what_is_wrong() -> None:
    found = [
        rows.Row("S1", "MONAI", "off", 0.0, 7.5, 0.0),
        rows.Row("S2", "MONAI", "corr", 1.0, 1.0, float("nan")),
    ]
    told = {"date": "2026-01-02", "versions": {"MONAI": "9"}, "not_run": []}
    text = traps_main.text({**told, "rows": traps_main.record(found, {"MONAI": "9"})})
    assert "| S1 | MONAI 9 | off | 0 | **7.5** | 0 |" in text
    assert "Where ours is not right: S2 (corr: NaN)." in text


def test_an_error_in_a_trap_is_a_row_and_no_end() -> None:
    def broken() -> list[rows.Row]:
        raise KeyError("layer4")

    (row,) = traps_main.run(rows.Trap("S1", "t", ("a",), broken))
    assert str(row.theirs).startswith("fails: KeyError")


# ------------------------------------------------------------- what is measured is right


def test_ours_is_the_reference_where_others_are_caught_by_in_place_operations() -> None:
    layers = importlib.import_module("benchmarks.traps.layers")
    assert ours.agreement(layers.before_inplace()) == 1.0


def test_the_reference_keeps_the_sign() -> None:
    case = cases.Case(cases.signs(), "1", -cases.noise(6, 6, 6).abs())
    assert cases.reference(case).max() <= 0
    assert cases.reference(case).min() < 0


@pytest.mark.parametrize(("padding", "expected"), [(1, 8.0), (0, 11.0)])
def test_where_a_cell_looks(padding: int, expected: float) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, 2, padding),
        torch.nn.BatchNorm3d(2),
        torch.nn.ReLU(),
        torch.nn.MaxPool3d(3, 2, padding),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(2, 2),
    )
    case = cases.Case(net.eval(), "3", cases.noise(24, 24, 24))
    assert placement.looks_at(case, (2, 2, 2)) == pytest.approx([expected] * 3)


def test_the_middle_of_a_map_at_a_border() -> None:
    ramp = np.clip(1.5 - np.arange(20) / 8, 0, 1)
    dense = ramp[:, None, None] * ramp[None, :, None] * ramp[None, None, :]
    assert cases.middle(dense) == pytest.approx([4.0] * 3)


def test_all_classes_at_once_are_the_classes_one_by_one() -> None:
    net = cases.small(classes=OUTPUTS)
    x = cases.noise(6, 6, 6)
    together = variants.VARIANTS[f"ours: Grad-CAM, {OUTPUTS} classes"].make(net, "1")(x)
    for index in range(OUTPUTS):
        alone = cases.reference(cases.Case(net, "1", x, index))
        assert np.abs(together[index].numpy() - alone).max() < 1e-6


@pytest.mark.parametrize("name", [n for n in variants.VARIANTS if n.startswith("ours")])
def test_our_variants_run(name: str) -> None:
    net = cases.small(classes=OUTPUTS)
    assert variants.VARIANTS[name].make(net, "1")(cases.noise(6, 6, 6)) is not None


def test_a_summed_network_puts_out_the_sum_over_its_central_box() -> None:
    x = cases.noise(8, 8, 8)
    assert torch.allclose(Summed(torch.nn.Identity())(x)[0, 0], x[0, 0, 2:6, 2:6, 2:6].sum())


def test_options_name_networks_and_variants() -> None:
    options = bench_peers.parser().parse_args([])
    assert options.nets == list(NETS)
    assert variants.PLAIN not in options.variants
    with pytest.raises(SystemExit):
        bench_peers.parser().parse_args(["--nets", "VGG"])
