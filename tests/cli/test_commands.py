"""Does each command do what it says, with its results alone on stdout?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name

from med_gradcam import __version__, _plugins
from tests.cli.conftest import Run
from tests.tiny import affine_of, chest, save_model, save_nifti, spec


def test_explain_writes_the_folder_and_says_the_numbers(
    run: Run, scan: Path, net: Path, tmp_path: Path
) -> None:
    done = run("explain", scan, "--model", net, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == [
        *("finding", "score", "reference", "for", "against", "residual", "probability", "layer"),
    ]
    record = json.loads((tmp_path / "out" / "explanation.json").read_text(encoding="utf-8"))
    row = lines[2].split()
    assert row[0] == record["target"]["label"]
    for said, wrote in zip(
        row[1:6],
        (record["score"], record["reference_score"], record["sum_for"], -record["sum_against"]),
        strict=False,
    ):
        assert float(said) == pytest.approx(wrote, abs=6e-4)
    assert lines[-1] == f"written to {tmp_path / 'out'}"
    net_evidence = record["sum_for"] - record["sum_against"]
    difference = record["score"] - record["reference_score"]
    assert net_evidence == pytest.approx(difference, abs=max(0.02, 0.05 * abs(difference)))


def test_json_alone_on_stdout(run: Run, scan: Path, net: Path, tmp_path: Path) -> None:
    done = run("explain", scan, "--model", net, "-o", tmp_path / "out", "--json", "--formats", "")
    assert done.code == 0
    assert done.json == json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["explanation.json"]
    assert done.err == ""


def test_the_settings_of_explain(run: Run, scan: Path, net: Path, tmp_path: Path) -> None:
    words = [
        "--target",
        "quiet-vs-nodule",
        "--layer",
        "3",
        "--method",
        "hirescam",
        "--threads",
        "1",
    ]
    words += ["--reference", "value:-700", "--device", "cpu", "--formats", "nifti", "--json"]
    done = run("explain", scan, "--model", net, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    record = done.json
    assert (record["target"]["kind"], record["method"], record["layer"]) == (
        "contrast",
        "hirescam",
        "3",
    )
    assert record["provenance"]["parameters"]["reference"] == "value:-700"
    other = run(
        "explain", scan, "--model", net, "-o", tmp_path / "b", "--reference", scan, "--json"
    )
    assert other.code in (0, 4)  # a scan against itself: no difference to explain


def test_the_same_call_gives_the_same_maps(run: Run, scan: Path, net: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("explain", scan, "--model", net, "-o", tmp_path / name).code == 0
    a, b = (tmp_path / n / "signed.nii.gz" for n in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_a_patch_around_a_point(run: Run, net: Path, tmp_path: Path) -> None:
    big = np.tile(chest(), (2, 2, 2))
    affine = affine_of("LPS", (1.5, 1.25, 2.0), (30, 20, -10))
    scan = save_nifti(tmp_path / "scan.nii.gz", big, affine)
    point = affine[:3, :3] @ (16, 7, 10) + affine[:3, 3]
    texts = ["ijk:16,7,10", "ras:" + ",".join(str(p) for p in point)]
    texts += [f"lps:{-point[0]},{-point[1]},{point[2]}"]
    maps = []
    for n, text in enumerate(texts):
        done = run("explain", scan, "--model", net, "--at", text, "-o", tmp_path / str(n))
        assert done.code == 0, done.err
        assert done.err == "looking at R 6 A 11 S 10 mm, patient's right\n"
        image = sitk.ReadImage(str(tmp_path / str(n) / "signed.nii.gz"))
        maps.append(sitk.GetArrayFromImage(image).T)
    assert np.array_equal(maps[0], maps[1])
    assert np.array_equal(maps[0], maps[2])
    touched = np.argwhere(maps[0])
    # 12 voxels around the point; a patch of network axes S, P, L is [c - 6, c + 6) along each
    assert touched.min(axis=0).tolist() >= [10, 1, 4]
    assert touched.max(axis=0).tolist() <= [21, 12, 15]


def test_several_channels(run: Run, tmp_path: Path) -> None:
    layers = [
        ["Conv3d", {"in_channels": 2, "out_channels": 4, "kernel_size": 3}],
        *spec()["layers"][1:],
    ]
    net = save_model(
        tmp_path / "net", spec(layers=layers, input={**spec()["input"], "channels": 2})
    )
    one = save_nifti(tmp_path / "a.nii.gz")
    two = save_nifti(tmp_path / "b.nii.gz", chest() + 50)
    done = run("explain", one, two, "--model", net, "-o", tmp_path / "out")
    assert done.code == 0, done.err


def test_overwrite(run: Run, scan: Path, net: Path, tmp_path: Path) -> None:
    words = ("explain", scan, "--model", net, "-o", tmp_path / "out", "--formats", "nifti")
    assert run(*words).code == 0
    (tmp_path / "out" / "stale").write_text("")
    assert run(*words).code == 2
    assert run(*words, "--overwrite").code == 0
    assert not (tmp_path / "out" / "stale").exists()


@pytest.mark.parametrize("command", ["methods", "models", "formats"])
def test_lists(run: Run, command: str) -> None:
    done = run(command)
    assert (done.code, done.err) == (0, "")
    names = _plugins.names(command)
    assert [line.split()[0] for line in done.out.splitlines()] == list(names)
    listed = run(command, "--json").json
    assert [row["name"] for row in listed] == list(names)
    assert all(row["title"] for row in listed)
    if command == "methods":
        assert all(row["source"] and row["cannot_show"] for row in listed)


def test_inspect_a_model(run: Run, net: Path, scan: Path) -> None:
    done = run("inspect", net, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["kind"] == "model"
    assert report["labels"] == ["quiet", "nodule"]
    assert report["licence"] == "MIT"
    rows = {row["layer"]: row for row in report["layers"]}
    assert rows["4"]["cell_mm"] == [2.0, 2.0, 2.0]
    assert not report["spacing_known"]
    tried = run("inspect", net, scan, "--json").json
    rows = {row["layer"]: row for row in tried["layers"]}
    assert tried["spacing_known"]
    # the network's axes are S, P, L: voxels of 2, 1.25 and 1.5 mm
    assert rows["4"]["cell_mm"] == pytest.approx([4.0, 2.5, 3.0])
    assert rows["4"]["smallest_localisable_mm"] == pytest.approx(8.0)
    every = run("inspect", net, "--all", "--json").json
    guards = {row["layer"]: row["guard"] for row in every["layers"]}
    assert guards["0"] == "ok"
    words = run("inspect", net).out
    assert "labels: quiet, nodule" in words
    assert "cell mm at voxels of 1 mm" in words


def test_inspect_a_scan(run: Run, scan: Path) -> None:
    report = run("inspect", scan, "--json").json
    assert (report["kind"], report["axes"], report["shape"]) == ("scan", "RAS", [12, 12, 12])
    assert report["spacing_mm"] == [1.5, 1.25, 2.0]
    assert "axes: RAS" in run("inspect", scan).out


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"med-gradcam {__version__}\n"
    for words in (("--help",), ("explain", "--help"), ("inspect", "--help"), ("demo", "--help")):
        done = run(*words)
        assert done.code == 0
        assert done.out.startswith("usage: med-gradcam")


def program(*words: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("med-gradcam")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_program_itself(scan: Path, net: Path, tmp_path: Path) -> None:
    """Exit code, stdout and stderr as a shell sees them, with warnings of other packages too."""
    done = program("explain", scan, "--model", net, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "med-gradcam-explanation/1"
    assert done.stderr == ""
    again = program("explain", scan, "--model", net, "-o", tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1
    assert again.stderr.startswith("med-gradcam: the output folder")


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    """`med-gradcam methods | head -0` ends without a word of complaint."""
    command = Path(sys.executable).with_name("med-gradcam")
    line = f"'{command}' methods | true"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
