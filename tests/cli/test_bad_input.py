"""Does every kind of bad input end in one sentence, the right exit code and no folder?"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from med_gradcam.formats import nifti
from tests.cli.conftest import Done, Run
from tests.tiny import LAYERS, chest, save_model, save_nifti, spec

Words = list[object]


def check(done: Done, code: int, says: str, folder: Path | None = None) -> None:
    """One line on stderr that says what is off, nothing on stdout, nothing left behind."""
    last = done.err.rstrip("\n").splitlines()[-1] if done.err else ""
    assert done.code == code, done.err
    assert done.out == ""
    assert last.startswith("med-gradcam: ")
    lines = [x for x in done.err.splitlines() if not x.startswith("looking at")]
    assert len(lines) == 1, done.err
    assert says in last
    assert "Traceback" not in done.err
    assert "internal error" not in done.err
    if folder is not None:
        assert not folder.exists()
        assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.fixture
def explain(run: Run, scan: Path, net: Path, tmp_path: Path) -> Callable[..., Done]:
    def command(*words: object, image: object = scan, model: object = net) -> Done:
        return run("explain", image, "--model", model, "-o", tmp_path / "new" / "out", *words)

    return command


Explain = Callable[..., Done]


def bad_images(folder: Path) -> dict[str, tuple[Path, str]]:
    noise = np.random.default_rng(0).integers(-999, 999, (12, 12, 12)).astype(np.int16)
    whole = save_nifti(folder / "whole.nii.gz", noise).read_bytes()
    plain = save_nifti(folder / "plain.nii", noise).read_bytes()
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "slice.dcm").write_text("Dear colleague,")

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    nan = chest().astype(np.float32)
    nan[3, 4, 5] = np.nan
    return {
        "cut gzip": (write("cut.nii.gz", whole[:-900]), "cut short or damaged"),
        "cut file": (write("cut.nii", plain[:-900]), "cut short or damaged"),
        "no gzip": (write("no.nii.gz", b"garbage" * 99), "'no.nii.gz'"),
        "no nifti": (write("no.nii", b"Dear colleague" * 99), "'no.nii' cannot be read"),
        "empty file": (write("zero.nii", b""), "'zero.nii' cannot be read"),
        "missing": (folder / "missing.nii.gz", "there is no"),
        "empty folder": (folder / "empty", "'empty'"),
        "text as DICOM": (folder / "texts", "slice.dcm"),
        "text file as DICOM": (folder / "texts" / "slice.dcm", "slice.dcm"),
        "other file": (write("scan.docx", b"PK"), "not known: 'scan.docx'"),
        "2D": (save_nifti(folder / "flat.nii", noise[:, :, 0]), "got a two-dimensional image"),
        "4D": (
            save_nifti(folder / "series.nii", np.stack([noise, noise], axis=-1)),
            "got several volumes",
        ),
        "NaN": (save_nifti(folder / "nan.nii.gz", nan), "got 1 NaN or infinite ones"),
        "no orientation": (
            save_nifti(folder / "lost.nii", noise, codes=(0, 0)),
            "left and right are not known",
        ),
    }


IMAGES = """cut gzip,cut file,no gzip,no nifti,empty file,missing,empty folder,text as DICOM,
text file as DICOM,other file,2D,4D,NaN,no orientation"""


@pytest.mark.parametrize("kind", IMAGES.replace("\n", "").split(","))
def test_bad_images(explain: Explain, tmp_path: Path, kind: str) -> None:
    path, says = bad_images(tmp_path)[kind]
    check(explain(image=path), 3, says, tmp_path / "new")


@pytest.mark.parametrize("kind", ["cut gzip", "no nifti", "missing", "empty folder", "2D"])
def test_bad_images_to_inspect(run: Run, net: Path, tmp_path: Path, kind: str) -> None:
    path, _ = bad_images(tmp_path)[kind]
    check(run("inspect", path), 3, path.name.split(".")[0])
    check(run("inspect", net, path), 3, path.name.split(".")[0])


def test_a_constant_scan(explain: Explain, tmp_path: Path) -> None:
    flat = save_nifti(tmp_path / "a.nii", np.full((12, 12, 12), -800, np.int16))
    check(explain(image=flat), 4, "the scan is constant", tmp_path / "new")


# ---------------------------------------------------------------------------------------- models


def flat_head(size: int) -> list[Any]:
    """A network that only runs on one size: flatten and a linear layer."""
    return [*LAYERS[:5], ["Flatten", {}], ["Linear", {"in_features": size, "out_features": 2}]]


def given(**changes: Any) -> dict[str, Any]:
    return {**spec()["input"], **changes}


def unfit_weights(folder: Path) -> None:
    described = json.loads((folder / "spec.json").read_text())
    described["layers"][0][1]["out_channels"] = 5
    (folder / "spec.json").write_text(json.dumps(described))


def pickled(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"\x80\x04K\x01.")


def keep(folder: Path) -> None:
    del folder


MODELS: dict[str, tuple[dict[str, Any], Callable[[Path], None], int, str]] = {
    "input size": (
        spec(layers=flat_head(999), input=given(patch=None)),
        keep,
        3,
        "to run on an input of shape",
    ),
    "input size of the patch": (
        spec(layers=flat_head(999)),
        keep,
        3,
        "to run on an input of shape",
    ),
    "two channels": (spec(input=given(channels=2)), keep, 3, "expected 2 input channel(s)"),
    "channels inside": (
        spec(
            layers=[
                ["Conv3d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3}],
                *LAYERS[1:],
            ]
        ),
        keep,
        3,
        "to run on an input of shape",
    ),
    "weights": (spec(), unfit_weights, 3, "do not fit spec.json"),
    "pickle": (spec(), pickled, 3, "expected safetensors"),
    "labels": (spec(labels=["a", "b", "c"]), keep, 3, "expected 3 outputs"),
    "no modality": (spec(input={"axes": "SPL"}), keep, 3, "expected the key 'modality'"),
    "no axes": (spec(input={"modality": "CT"}), keep, 3, "expected the key 'axes'"),
    "odd axes": (spec(input=given(axes="up,down")), keep, 3, "expected the axes of a volume"),
    "smallest": (
        spec(input=given(patch=None, min_patch=[32, 32, 32])),
        keep,
        3,
        "a scan of at least",
    ),
    "segmentation": (spec(layers=LAYERS[:5]), keep, 3, "expected 2 outputs (quiet, nodule)"),
    "one cell": (
        spec(
            layers=[
                ["AvgPool3d", {"kernel_size": 12}],
                ["Flatten", {}],
                ["Linear", {"in_features": 1, "out_features": 2}],
            ]
        ),
        keep,
        4,
        "more than one cell along each axis",
    ),
    "no network": (spec(layers=[]), keep, 4, ""),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_do_not_fit(explain: Explain, tmp_path: Path, kind: str) -> None:
    description, spoil, code, says = MODELS[kind]
    folder = save_model(tmp_path / "spoilt", description)
    spoil(folder)
    check(explain(model=folder), code, says, tmp_path / "new")


@pytest.mark.parametrize("kind", ["input size", "input size of the patch", "channels inside"])
def test_models_that_do_not_run_to_inspect(run: Run, tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path / "spoilt", MODELS[kind][0])
    check(run("inspect", folder), 3, "to run on an input of shape")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "got nothing there"),
        ("net.pth", "Pickles can run code"),
        ("m:f", "--trust code"),
    ],
)
def test_no_model(explain: Explain, run: Run, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "net.pth").write_bytes(b"\x80\x04.")
    model = name if ":" in name else tmp_path / name
    check(explain(model=model), 3, says, tmp_path / "new")


def test_a_factory_that_raises(
    explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_factory.py").write_text("def make():\n    raise OSError('no\\nweights')\n")
    done = explain("--trust", "code", model="broken_factory:make")
    check(done, 3, "got OSError: no weights", tmp_path / "new")


# ---------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--layer", "33"], 2, "expected a known layer, got '33'; near ones of 8: 3"),
        (["--layer", ""], 2, "expected a known layer"),
        (["--layer", "6"], 4, "has places"),
        (["--layer", "7"], 4, "has places"),
        (["--target", "nodul"], 2, "expected a known class, got 'nodul'; near ones of 2: nodule"),
        (["--target", "5"], 2, "An index goes from 0 to 1"),
        (["--target", "quiet-vs-quiet"], 2, "two different classes"),
        (
            ["--method", "gradcamm"],
            2,
            "expected a known method, got 'gradcamm'; near ones of 25: gradcam",
        ),
        (
            ["--formats", "nifty"],
            2,
            "expected a known output format, got 'nifty'; near ones of 3: ni",
        ),
        (["--formats", "nifti,dicom"], 2, "DICOM"),
        (["--formats", "nifty"], 2, "expected a known output format, got 'nifty'; near"),
        (
            ["--reference", "air"],
            2,
            "expected a reference of auto, tissue, zero, value:X or a file",
        ),
        (["--reference", "value:nan"], 2, "expected a reference of"),
        (["--at", "ijk:99,0,0"], 2, "expected a point inside the scan"),
        (["--at", "1,2,3"], 2, "expected a point as ras:X,Y,Z"),
        (["--threads", "0"], 2, "at least one thread, got 0"),
        (["--device", "abacus"], 2, "expected a device such as auto, cpu or cuda"),
    ],
)
def test_what_is_not_there(
    explain: Explain, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    check(explain(*words), code, says, tmp_path / "new")


def test_a_patch_must_be_chosen(explain: Explain, tmp_path: Path) -> None:
    large = save_nifti(tmp_path / "large.nii.gz", np.tile(chest(), (2, 2, 2)))
    done = explain(image=large)
    check(
        done,
        2,
        "expected a point --at, since the model takes patches of 12 x 12 x 12",
        tmp_path / "new",
    )
    assert "--at ijk:12,12,12" in done.err


def test_a_point_for_a_network_of_whole_scans(explain: Explain, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "whole", spec(input=given(patch=None)))
    check(explain("--at", "ijk:3,3,3", model=folder), 2, "expected no --at", tmp_path / "new")


def test_a_reference_scan_that_does_not_fit(explain: Explain, tmp_path: Path) -> None:
    whole = save_model(tmp_path / "whole", spec(input=given(patch=None)))
    small = save_nifti(tmp_path / "small.nii", chest(10))
    done = explain("--reference", small, model=whole)
    check(done, 2, "expected a reference scan of the same size", tmp_path / "new")
    broken = tmp_path / "broken.nii"
    broken.write_bytes(b"garbage" * 99)
    check(explain("--reference", broken), 3, "'broken.nii' cannot be read", tmp_path / "new")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["explain"],
        ["explain", "a.nii"],
        ["explain", "a.nii", "--model", "m"],
        ["explain", "a.nii", "--model", "m", "-o", "out", "--threads", "many"],
        ["explain", "a.nii", "--model", "m", "-o", "out", "--trust", "everything"],
        ["explain", "a.nii", "--model", "m", "-o", "out", "--no-such-option"],
        ["inspect"],
        ["frobnicate"],
    ],
)
def test_usage(run: Run, words: list[str]) -> None:
    done = run(*words)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err


# ----------------------------------------------------------------------------------------- output


def test_an_output_folder_that_exists(
    explain: Explain, run: Run, scan: Path, net: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "work.txt").write_text("work")
    words: Words = ["explain", scan, "--model", net, "-o", tmp_path / "old"]
    check(run(*words), 2, "exists already")
    check(run(*words, "--overwrite"), 2, "not one of our output folders")
    assert (tmp_path / "old" / "work.txt").read_text() == "work"


def test_an_output_folder_below_a_file_or_in_proc(
    run: Run, scan: Path, net: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words: Words = ["explain", scan, "--model", net, "-o"]
    check(run(*words, tmp_path / "file" / "out"), 5, "a part of the path is a file")
    check(run(*words, "/proc/out"), 5, "expected to write '/proc/out'")
    check(run(*words, tmp_path / ("x" * 300)), 5, "File name too long")


def test_a_full_disk(explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nifti, "_write", full)
    check(explain(), 5, "no room is left on the disk", tmp_path / "new")


def test_no_memory(explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(nifti, "read", huge)
    check(explain(), 5, "memory", tmp_path / "new")


def test_ctrl_c(explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nifti, "save", stop)
    check(explain(), 130, "stopped; nothing was written", tmp_path / "new")


def test_a_bug_is_a_sentence_too(
    explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(nifti, "save", bug)
    done = explain()
    assert done.code == 1
    assert done.err.startswith("med-gradcam: an internal error (ZeroDivisionError: a bug)")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert "Traceback (most recent call last)" in explain("--debug").err


@pytest.mark.parametrize("kind", ["cut gzip", "NaN", "text as DICOM", "2D"])
def test_a_shell_sees_the_same(scan: Path, net: Path, tmp_path: Path, kind: str) -> None:
    """The real program: no warning of another package slips onto stderr."""
    path, says = bad_images(tmp_path)[kind]
    command = [str(Path(sys.executable).with_name("med-gradcam")), "explain", str(path)]
    command += ["--model", str(net), "-o", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    check(Done(done.returncode, done.stdout, done.stderr), 3, says, tmp_path / "new")
