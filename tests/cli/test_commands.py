"""Does each command do what it says, with its results alone on stdout?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name

import med_gradcam as mg
from med_gradcam import __version__, _plugins, commands
from med_gradcam.explanation import Explanation, Measure, Reference, Region
from med_gradcam.geometry import Geometry
from tests.cli.conftest import Run
from tests.tiny import affine_of, chest, explained, opened, save_model, save_nifti, spec


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


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("secant", "evidence in log-odds, relative to uniform"),
        ("gradcam", "evidence in log-odds; this method"),
        ("eigencam", " in relative units"),
        ("saliency", " in log-odds per input unit"),
    ],
)
def test_the_unit_is_said(
    run: Run, scan: Path, net: Path, tmp_path: Path, method: str, said: str
) -> None:
    words = ["--method", method, "--formats", "", "--quick"]
    done = run("explain", scan, "--model", net, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert said in done.out
    assert (" log-odds per mL" in done.out) == (method in ("secant", "gradcam"))


@pytest.mark.parametrize("method", ["eigencam", "saliency"])
def test_a_method_without_a_sign_speaks_of_no_side(
    run: Run, scan: Path, net: Path, tmp_path: Path, method: str
) -> None:
    done = run("explain", scan, "--model", net, "-o", tmp_path / "out", "--method", method)
    assert done.code == 0, done.err
    assert "with no sign: it shows where it is strong, not what raises or lowers" in done.out
    assert "the map is strongest at " in done.out
    assert not [p.name for p in (tmp_path / "out").iterdir() if "against" in p.name]


def made(**changes: Any) -> Explanation:
    grid = Geometry((4, 4, 4), affine_of("RAS", (4, 4, 4)))
    evidence = np.zeros((4, 4, 4))
    evidence[1, 1, 1], evidence[2, 2, 3] = 2.0, -1.0 if changes.get("signed", True) else 1.0
    regions = (Region((4.0, 4.0, 4.0), 8.0, "top raising", 1.24, -0.15),)
    return explained(evidence, grid, grid, regions=regions, **changes)


def test_the_words_of_a_map_without_a_sign() -> None:
    e = made(signed=False, measure="relative units", status="no_sum", reference_score=None)
    row = commands.table([("nodule", e)]).splitlines()[2].split()
    assert row == ["nodule", "+1.500", "-", "-", "-", "-", "0.8176", "features.3"]
    for said in (commands.notes(e), commands.layer_notes([e], ["1_x"])):
        words = "\n".join(said).replace("not what raises or lowers the score", "")
        assert "in relative units, relative to uniform lung" in words
        assert "no sign: it shows where it is strong" in words
        assert "the map is strongest at R 4 A 4 S 4 mm" in words
        for wrong in ("evidence", "raises", "lowers"):
            assert wrong not in words


def test_two_units_are_never_compared() -> None:
    (line,) = [w for w in commands.notes(made()) if "removing" in w]
    assert line == (
        "around R 4 A 4 S 4 mm (8 mm ball) the map says +1.24 log-odds; removing it changes the "
        "score by +0.15 log-odds"
    )
    relative = commands.notes(made(measure="relative units", status="no_sum"))
    (line,) = [w for w in relative if "removing" in w]
    assert line == (
        "removing what lies around R 4 A 4 S 4 mm (8 mm ball) changes the score by +0.15 log-odds"
    )
    assert any(w.startswith("raises the model's score most at") for w in relative)
    assert sum("log-odds" in w for w in relative) == 1


def test_without_a_reference_the_map_adds_up_to_the_score() -> None:
    reference = Reference("none", None, "no reference")
    words = commands.notes(made(reference_score=None, reference=reference))[0]
    assert words.startswith("evidence in log-odds; the map adds up to the score; cost")


def test_all_layers_are_one_folder_each_on_one_scale(
    run: Run, scan: Path, net: Path, tmp_path: Path
) -> None:
    words = ["explain", scan, "--model", net, "--layer", "all"]
    done = run(*words, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    folders = ["1_4", "2_1"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*folders, "layers.json"]
    records = json.loads((tmp_path / "out" / "layers.json").read_text(encoding="utf-8"))
    assert [(r["folder"], r["layer"]) for r in records] == [("1_4", "4"), ("2_1", "1")]
    assert records[0]["colour_scale"] == records[1]["colour_scale"]
    assert (records[0]["colour_scale"]["layer"], records[0]["colour_scale"]["volumes"]) == (
        "all",
        0,
    )
    peaks = []
    for record in records:
        folder = tmp_path / "out" / record.pop("folder")
        assert json.loads((folder / "explanation.json").read_text(encoding="utf-8")) == record
        made = mg.read_explanation(folder)
        assert (made.layer, made.calibration) == (record["layer"], None)
        peaks.append(mg.draw(made).signed.peak)
        header = opened(folder / "for.nii.gz").header
        assert float(header["cal_max"]) == pytest.approx(record["colour_scale"]["peak_per_ml"])
        single = run(
            *words[:-1], record["layer"], "-o", tmp_path / folder.name, "--formats", "", "--json"
        ).json
        assert single["sum_for"] == pytest.approx(record["sum_for"], rel=1e-6)
    assert max(peaks) == records[0]["colour_scale"]["peak_per_ml"] > 1.01 * min(peaks)
    rows = [line.split() for line in done.out.splitlines()[2:4]]
    assert [row[-1] for row in rows] == ["4", "1"]
    assert [float(row[3]) for row in rows] == [
        pytest.approx(r["sum_for"], abs=6e-4) for r in records
    ]
    assert all(
        any(line.startswith(f"{name}: ") for line in done.out.splitlines()) for name in folders
    )
    assert "; no layer was tested" in done.out
    again = run(*words, "-o", tmp_path / "out", "--overwrite", "--json", "--formats", "")
    assert [r["layer"] for r in again.json] == ["4", "1"]
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == [
        *folders,
        *["explanation.json"] * 2,
        "layers.json",
    ]


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
    tried = run("inspect", net, one, two, "--json")
    assert tried.code == 0, tried.err
    assert tried.json["tried_on"]["shape"] == [2, 12, 12, 12]
    assert tried.json["spacing_known"]
    refused = run("inspect", net, one)
    assert (refused.code, refused.out) == (3, "")
    assert "channel" in refused.err


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
        assert {row["unit"] for row in listed} == set(get_args(Measure))


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
