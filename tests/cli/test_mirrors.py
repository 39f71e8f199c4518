"""Does `--mirrors` explain the mean over mirror images, each added where it belongs?"""

from __future__ import annotations

from pathlib import Path

import pytest

import med_gradcam as mg
from tests.cli.conftest import Run
from tests.tiny import save_model, save_nifti, spec


def test_the_mean_over_mirror_images_is_explained(run: Run, tmp_path: Path) -> None:
    net = save_model(tmp_path / "net", spec(input=spec()["input"] | {"patch": None}))
    scan = save_nifti(tmp_path / "scan.nii.gz")
    words = ["--model", net, "--layer", "3", "--formats", "nifti", "--json"]
    plain = run("explain", scan, *words, "-o", tmp_path / "plain").json
    done = run("explain", scan, *words, "--mirrors", "0,2", "-o", tmp_path / "out")
    assert done.code == 0
    e = mg.explain_ensemble(
        mg.read(scan),
        mg.load_model(net),
        mirrors=(0, 2),
        layer="3",
        target=plain["target"]["label"],
    )
    assert done.json["score"] == pytest.approx(e.total.score, abs=1e-5)
    assert done.json["residual"] == pytest.approx(0, abs=1e-4)
    assert len(e.members) == 4


@pytest.mark.parametrize("axes", ["0,3", "x", ""])
def test_what_are_no_axes(run: Run, scan: Path, net: Path, tmp_path: Path, axes: str) -> None:
    done = run("explain", scan, "--model", net, "--mirrors", axes, "-o", tmp_path / "out")
    assert done.code == 2
    assert "axes of the network's input such as 0,1,2" in done.err
