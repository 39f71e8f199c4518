"""Does `med-gradcam concepts` print channels that add up, and refuse in one sentence?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_the_numbers_that_are_printed_add_up(run: Run, scan: Path, net: Path) -> None:
    done = run("concepts", scan, "--model", net, "--target", "nodule", "--layer", "3")
    assert (done.code, done.err) == (0, "")
    lines = [x.split() for x in done.out.splitlines()]
    assert done.out.startswith("nodule at the layer 3, 4 channels: score ")
    assert lines[2][:5] == ["channel", "net", "share", "for", "against"]
    nets = [float(x[1]) for x in lines if x and x[0] in {"0", "1", "2", "3", "residual"}]
    assert len(nets) == 5
    total = next(float(x[1]) for x in lines if x[:1] == ["all"])
    assert sum(nets) == pytest.approx(total, abs=6 * 5e-4)


def test_json_and_most(run: Run, scan: Path, net: Path) -> None:
    words = ["--target", "nodule", "--layer", "3", "--most", "1", "--reference", "value:-700"]
    done = run("concepts", scan, "--model", net, *words, "--json")
    assert (done.code, done.err) == (0, "")
    record = done.json
    assert record["format"] == "med-gradcam-concepts/1"
    assert (len(record["channels"]), record["others"]["count"]) == (1, 3)
    total = record["channels"][0]["net"] + record["others"]["net"] + record["residual"]
    assert total == pytest.approx(record["score"] - record["reference_score"], abs=1e-4)
    assert record["reference"]["kind"] == "value"
    other = run("concepts", scan, "--model", net, *words, "--json", "--method", "hirescam").json
    assert (other["method"], other["reference_score"], other["residual"]) == (
        "hirescam",
        None,
        None,
    )


def test_the_point_is_echoed(run: Run, scan: Path, net: Path) -> None:
    done = run("concepts", scan, "--model", net, "--layer", "3", "--at", "ijk:6,6,6")
    assert done.code == 0
    assert done.err.startswith("looking at R 9 A 8 S 12 mm, patient's right\n")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--method", "rise"], 2, "a method whose map is a sum over channels"),
        (["--layer", "33"], 2, "expected a known layer"),
        (["--layer", "6"], 4, "has places"),
        (["--layer", "0+3"], 2, "expected one layer for concepts"),
        (["--most", "0"], 2, "at least one channel"),
        (["--target", "nodul"], 2, "expected a known class"),
        (["--reference", "air"], 2, "expected a reference of"),
    ],
)
def test_refusals(run: Run, scan: Path, net: Path, words: list[str], code: int, says: str) -> None:
    done = run("concepts", scan, "--model", net, *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("med-gradcam: ")
    assert done.err.count("\n") == 1
    assert says in done.err


def test_a_bad_scan(run: Run, net: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.nii"
    broken.write_bytes(b"garbage" * 99)
    done = run("concepts", broken, "--model", net)
    assert (done.code, done.out) == (3, "")
    assert "'broken.nii' cannot be read" in done.err
