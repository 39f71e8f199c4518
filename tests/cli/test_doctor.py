"""Does `med-gradcam doctor` print a row for each trap, and refuse in one sentence?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from tests.tiny import save_model

KEYS = [
    "place", "evidence against", "colours", "norm", "grad-cam", "logit", "grad-cam++", "float16",
    "dim", "in place", "layer", "cut", "training mode", "automatic layer", "tokens",
    "shared layers", "inputs and outputs", "occlusion", "guided backpropagation", "saved files",
    "smallest lesion", "windows",
]  # fmt: skip


def test_every_trap_has_a_row(run: Run, scan: Path, net: Path) -> None:
    done = run("doctor", net, scan, "--json", "--target", "nodule")
    assert (done.code, done.err) == (0, "")
    record = done.json
    assert record["format"] == "med-gradcam-doctor/1"
    assert [row["key"] for row in record["rows"]] == KEYS
    assert sum(record["counts"].values()) == len(KEYS)
    assert record["target"] == "nodule"
    assert not record["layer_named"]


def test_the_words_say_the_same(run: Run, scan: Path, net: Path) -> None:
    record = run("doctor", net, scan, "--layer", "3", "--json").json
    done = run("doctor", net, scan, "--layer", "3")
    assert (done.code, done.err) == (0, "")
    flat = " ".join(done.out.split())
    for row in record["rows"]:
        assert " ".join(row["finding"].split()) in flat, row["key"]
        full = row["verdict"] in ("wrong", "check")
        assert (bool(row["advice"]) and f"do {row['advice']}" in flat) == full, row["key"]
    counts = ", ".join(f"{n} {verdict}" for verdict, n in record["counts"].items())
    assert counts in flat
    for tool, keys in record["wrong_by_tool"].items():
        assert f"{tool}: {', '.join(keys)}" in flat
    assert "layer 3, as named: 6x6x6 cells" in done.out
    assert max(len(x) for x in done.out.splitlines()) <= 100


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--layer", "33"], 2, "expected a known layer"),
        (["--layer", "6"], 4, "has places"),
        (["--layer", "0+3"], 2, "expected one layer for a check-up"),
        (["--layer", "@input"], 2, "expected a layer inside the network, got its input"),
        (["--target", "nodul"], 2, "expected a known class"),
        (["--at", "ijk:99,0,0"], 2, "expected a point inside the scan"),
        (["--threads", "0"], 2, "at least one thread"),
    ],
)
def test_refusals(run: Run, scan: Path, net: Path, words: list[str], code: int, says: str) -> None:
    done = run("doctor", net, scan, *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("med-gradcam: ")
    assert done.err.count("\n") == 1
    assert says in done.err


def _spoil(weights: dict[str, torch.Tensor]) -> None:
    weights["7.bias"].fill_(float("nan"))


def test_bad_files(run: Run, scan: Path, net: Path, tmp_path: Path) -> None:
    done = run("doctor", scan, scan)
    assert (done.code, done.out) == (3, "")
    broken = tmp_path / "broken.nii"
    broken.write_bytes(b"garbage" * 99)
    done = run("doctor", net, broken)
    assert (done.code, done.out) == (3, "")
    assert "'broken.nii' cannot be read" in done.err
    spoilt = save_model(tmp_path / "nan", change=_spoil)
    done = run("doctor", spoilt, scan)
    assert done.code in (3, 4)
    assert (done.out, done.err.count("\n")) == ("", 1)
