"""Does `med-gradcam regions` print values that add up, and refuse in one sentence?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Run
from tests.tiny import SIZE, save_nifti


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Two halves and a rim without a label."""
    array = np.ones((SIZE,) * 3, dtype=np.int16)
    array[6:], array[:, :2] = 2, 0
    return save_nifti(tmp_path / "labels.nii.gz", array)


def test_the_numbers_that_are_printed_add_up(run: Run, scan: Path, net: Path) -> None:
    words = ["--target", "nodule", "--layer", "3", "--most", "3"]
    done = run("regions", scan, "--model", net, *words)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("nodule at the layer 3: score ")
    lines = [x.replace("region ", "region").split() for x in done.out.splitlines()]
    listed = [x for x in lines if x and x[0].startswith(("region", "elsewhere"))][1:]
    assert 2 <= len(listed) <= 4
    total = next(x for x in lines if x[:1] == ["all"])
    for column in (1, 2):
        values = [float(x[column]) for x in listed]
        assert sum(values) == pytest.approx(float(total[column]), abs=5 * 5e-4)


def test_json_and_labels(run: Run, scan: Path, net: Path, labels: Path) -> None:
    words = ["--target", "nodule", "--layer", "3", "--reference", "value:-700", "--labels", labels]
    done = run("regions", scan, "--model", net, *words, "--json")
    assert (done.code, done.err) == (0, "")
    record = done.json
    assert record["format"] == "med-gradcam-regions/1"
    assert [row["number"] for row in record["regions"]] == [1, 2]
    total = sum(r["value"] for r in record["regions"]) + record["elsewhere"]["value"]
    assert total == pytest.approx(record["score"] - record["reference_score"], abs=1e-4)
    assert record["passes"] == 8
    assert abs(record["regions"][0]["value"] - record["regions"][1]["value"]) > 1e-6


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--method", "saliency"], 2, "a signed method in the score's own unit"),
        (["--most", "11"], 2, "expected 1 to 10 components, got 11"),
        (["--layer", "0+3"], 2, "expected one layer for Shapley values"),
        (["--labels", "none.nii.gz"], 3, "none.nii.gz"),
    ],
)
def test_refusals(run: Run, scan: Path, net: Path, words: list[str], code: int, says: str) -> None:
    done = run("regions", scan, "--model", net, *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("med-gradcam: ")
    assert says in done.err
