"""Does `med-gradcam whole` write one map of a volume, and say where to look?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Run
from tests.tiny import save_nifti


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Noisy tissue with a bright block on the right, and air on the left."""
    array = np.random.default_rng(0).normal(-1000, 30, (36, 24, 24))
    array[:20] += 200
    array[4:10, 8:14, 8:14] = 100
    return save_nifti(tmp_path / "wide.nii.gz", array.astype(np.int16))


def test_the_report_names_places_and_counts(
    run: Run, wide: Path, net: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--target", "nodule", "--layer", "3", "--formats", "nifti", "--window-batch", 2]
    done = run("whole", wide, "--model", net, *words, "-o", out)
    assert (done.code, done.err) == (0, "")
    assert "nodule, max over windows" in done.out
    assert "45 windows of 12 x 12 x 12 voxels, 9 not run, 1 explained" in done.out
    assert "ms to run one" in done.out
    assert "candidate 1: " in done.out
    assert " mm (patient's " in done.out
    assert "9 of 45 windows hold air alone" in done.out
    record = json.loads((out / "windows.json").read_text(encoding="utf-8"))
    assert record["format"] == "med-gradcam-windows/1"
    assert len(record["windows"]) == 45
    shares = sum(row["share"] for row in record["windows"])
    assert shares == pytest.approx(record["score"] - record["reference_score"], abs=1e-4)
    assert (out / "explanation.json").is_file()
    assert (out / "for.nii.gz").is_file()


def test_json_and_a_mask(run: Run, wide: Path, net: Path, tmp_path: Path) -> None:
    mask = np.zeros((36, 24, 24), dtype=np.int16)
    mask[:12] = 1
    within = save_nifti(tmp_path / "mask.nii.gz", mask)
    words = ["--within", within, "--aggregate", "mean", "--layer", "3", "--json", "--quick"]
    done = run("whole", wide, "--model", net, *words, "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    record = done.json
    assert record["settings"]["aggregate"] == "mean"
    assert {row["skipped"] for row in record["windows"]} == {None, "outside the mask"}
    assert record["residual"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--window", "8,8"], 2, "three whole numbers"),
        (["--window", "a,b,c"], 2, "three whole numbers I,J,K"),
        (["--window", "8,8,8"], 2, "expected the network's own patch"),
        (["--overlap", "1"], 2, "below 1"),
        (["--aggregate", "median"], 2, "max, mean, lse, noisy-or"),
        (["--method", "layercam"], 2, "so that windows add up"),
        (["--at", "ijk:1,1,1"], 2, "unrecognized arguments"),
    ],
)
def test_refusals(
    run: Run, wide: Path, net: Path, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    done = run("whole", wide, "--model", net, *words, "-o", tmp_path / "out")
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert not (tmp_path / "out").exists()
