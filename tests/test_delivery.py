"""Is an output folder complete or absent, whatever goes wrong on the way?"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from med_gradcam import _plugins, delivery
from med_gradcam.bundle import Bundle
from med_gradcam.calibration import Calibration, from_case
from med_gradcam.errors import (
    Cancelled,
    OutputExistsError,
    ResourceError,
    UnknownNameError,
    UsageError,
)
from med_gradcam.explanation import Explanation
from med_gradcam.formats import _words, nifti, png
from med_gradcam.geometry import Geometry, cells
from med_gradcam.maps import draw
from med_gradcam.progress import Step
from tests.tiny import explained, volume

IMAGE = Geometry((12, 12, 12), np.eye(4))
SCAN = volume(np.arange(12**3, dtype=np.float32).reshape(12, 12, 12))


def explanation() -> Explanation:
    evidence = np.random.default_rng(0).normal(size=(6, 6, 6))
    return explained(evidence, cells(IMAGE, (2,) * 3, (0.5,) * 3, (6,) * 3), IMAGE)


def write(folder: Path, **changes: Any) -> Path:
    return delivery.write(explanation(), folder, **{"formats": ("nifti",), **changes})


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below, with hidden ones."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def test_a_folder_with_all_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", volume=SCAN, formats=("nifti", "png"))
    names = {p.name for p in folder.iterdir()}
    assert {"explanation.json", "explanation.nii.gz", "for.nii.gz", "overview.png"} <= names
    assert {
        f"mip_{v}_{p}.png" for v in ("axial", "coronal", "sagittal") for p in ("for", "against")
    } < names
    record = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    assert record["sum_for"] == explanation().sum_for
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert nifti.read_explanation(folder) == explanation()


def test_json_is_always_written(tmp_path: Path) -> None:
    assert [p.name for p in write(tmp_path / "out", formats=()).iterdir()] == ["explanation.json"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert (write(tmp_path / "a" / "b" / "out") / "explanation.json").is_file()


def test_the_folder_has_the_users_rights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = write(tmp_path / "out")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750


def test_progress_is_told_and_can_stop_it(tmp_path: Path) -> None:
    steps: list[Step] = []
    write(tmp_path / "out", progress=steps.append)
    assert [(s.done, s.total) for s in steps] == [(0, 2), (1, 2)]

    def stop(step: Step) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled, match="stopped"):
        write(tmp_path / "other", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------- several layers


def layers() -> list[Explanation]:
    """Two depths with a scale of the model's for one of them."""
    first = explanation()
    scale = Calibration("nodule", "integrated", "down/1", 5.0, 1.0, 7)
    second = explained(
        3 * first.evidence, first.grid, IMAGE, layer="down/1 + skip", calibration=scale
    )
    return [first, second]


def test_several_layers_share_one_scale(tmp_path: Path) -> None:
    made = layers()
    folder = delivery.write_layers(made, tmp_path / "out", volume=SCAN, formats=("nifti", "png"))
    names = ["1_features.3", "2_down_1_+_skip"]
    assert delivery.folder_names(made) == names
    assert sorted(p.name for p in folder.iterdir()) == [*names, "layers.json"]
    records = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    peak = draw(made[1].replace(calibration=None)).signed.peak
    for record, name, e in zip(records, names, made, strict=True):
        assert (record["folder"], record["layer"]) == (name, e.layer)
        assert record["colour_scale"]["peak_per_ml"] == pytest.approx(peak)
        assert (
            record["coloured_share"]
            == draw(e).on_scale(from_case(peak, "nodule", "integrated", "all")).coloured_share
        )
        assert {"explanation.json", "signed.nii.gz", "overview.png"} <= {
            p.name for p in (folder / name).iterdir()
        }
        assert nifti.read_explanation(folder / name) == e.replace(calibration=None)
    assert 0 < records[0]["coloured_share"] < records[1]["coloured_share"]


def test_ten_layers_stay_in_order() -> None:
    names = delivery.folder_names([explanation()] * 10)
    assert names == sorted(names)
    assert (names[0], names[9]) == ("01_features.3", "10_features.3")


def test_the_picture_says_that_the_scale_is_shared() -> None:
    shared = from_case(1.0, "nodule", "secant", "all")
    assert _words.scale(shared) == "colour scale: this case only, the same for all layers"


@pytest.mark.parametrize("place", ["out", "new/deep/out"])
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_of_several_layers_all_are_written_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], place: str
) -> None:
    """The first layer is written, the second one fails."""
    real = nifti.save

    def second_fails(bundle: Bundle, folder: Path) -> list[Path]:
        if bundle.explanation.layer.startswith("down"):
            raise kind
        return real(bundle, folder)

    monkeypatch.setattr(_plugins.load("formats", "nifti"), "save", second_fails)
    with pytest.raises(kind):
        delivery.write_layers(layers(), tmp_path / place)
    assert everything(tmp_path) == {}


def test_a_folder_of_several_layers_is_ours_to_overwrite(tmp_path: Path) -> None:
    folder = delivery.write_layers(layers(), tmp_path / "out", formats=())
    with pytest.raises(OutputExistsError, match="exists already"):
        delivery.write_layers(layers(), folder, formats=())
    delivery.write_layers(layers()[:1], folder, formats=(), overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["1_features.3", "layers.json"]
    write(folder, overwrite=True)
    assert (folder / "explanation.json").is_file()


# ------------------------------------------------------------------------------- what goes wrong


def no_room(bundle: Bundle, folder: Path) -> list[Path]:
    (folder / "half.nii.gz").write_bytes(b"half a file")
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(bundle: Bundle, folder: Path) -> list[Path]:
    (folder / "half.nii.gz").write_bytes(b"half a file")
    raise ZeroDivisionError("a bug")


def interrupted(bundle: Bundle, folder: Path) -> list[Path]:
    (folder / "half.nii.gz").write_bytes(b"half a file")
    raise KeyboardInterrupt("stop")


@pytest.mark.parametrize(
    ("save", "error", "says"),
    [
        (no_room, ResourceError, "expected to write .*out', but no room is left on the disk"),
        (broken, ZeroDivisionError, "a bug"),
        (interrupted, KeyboardInterrupt, "stop"),
    ],
)
@pytest.mark.parametrize("place", ["out", "new/deep/out"])
def test_a_writer_that_fails_half_way_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[..., Any],
    error: type[BaseException],
    says: str,
    place: str,
) -> None:
    monkeypatch.setattr(nifti, "save", save)
    with pytest.raises(error, match=says):
        write(tmp_path / place)
    assert everything(tmp_path) == {}


def test_the_second_writer_fails_and_the_old_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out")
    before = everything(tmp_path)
    monkeypatch.setattr(png, "save", no_room)
    with pytest.raises(ResourceError, match="no room is left"):
        write(tmp_path / "out", formats=("nifti", "png"), overwrite=True)
    assert everything(tmp_path) == before


def test_a_disk_that_is_full_for_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        write_text(path, "{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError, match="no room is left on the disk"):
        write(tmp_path / "out")
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("fails", [1, 2])
def test_an_old_folder_comes_back_when_the_swap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    write(tmp_path / "out")
    before = everything(tmp_path)
    rename, calls = Path.rename, []

    def sometimes(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == fails:
            raise OSError(errno.EPERM, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(ResourceError, match="you have no permission to write there"):
        write(tmp_path / "out", overwrite=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "you have no permission"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_each_reason_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ResourceError, match=says) as caught:
        write(tmp_path / "new" / "out")
    assert caught.value.exit_code == 5
    assert everything(tmp_path) == {}


# ----------------------------------------------------------------------------- where it may write


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(
        OutputExistsError, match=r"exists already; .*--overwrite to replace it whole"
    ):
        write(tmp_path / "out")


def test_our_folder_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "out", volume=SCAN, formats=("nifti", "png"))
    write(tmp_path / "out", formats=(), overwrite=True)
    assert list(everything(tmp_path)) == ["out", "out/explanation.json"]


def test_a_demos_folder_is_ours_too(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text("[]")
    write(tmp_path / "out", formats=(), overwrite=True)
    assert list(everything(tmp_path)) == ["out", "out/explanation.json"]


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "explanation.json").is_file()


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = everything(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(OutputExistsError, match=f"{name}' holds no explanation.json, so it is"):
            write(tmp_path / name, overwrite=True)
    assert everything(tmp_path) == before


def test_a_link_to_our_folder_is_replaced_and_not_its_target(tmp_path: Path) -> None:
    write(tmp_path / "real")
    before = everything(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out", formats=(), overwrite=True)
    assert everything(tmp_path / "real") == before


@pytest.mark.parametrize("deep", ["out", "deep/out"])
def test_a_parent_that_is_a_file(tmp_path: Path, deep: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ResourceError, match="a part of the path is a file, not a folder"):
        write(tmp_path / "file" / deep)


def test_a_parent_that_cannot_be_written() -> None:
    with pytest.raises(ResourceError, match="expected to write '/proc/out'"):
        delivery.check_output(Path("/proc/out"), overwrite=False)
    with pytest.raises(ResourceError, match="expected to write '/proc/deep/out'"):
        write(Path("/proc/deep/out"))


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="File name too long"):
        delivery.check_output(tmp_path / ("x" * 300), overwrite=False)


def test_a_check_makes_no_folders(tmp_path: Path) -> None:
    delivery.check_output(tmp_path / "a" / "b" / "out", overwrite=False)
    assert everything(tmp_path) == {}


# ---------------------------------------------------------------------------------------- formats


def test_formats_there_are_not() -> None:
    with pytest.raises(UnknownNameError, match="expected a known output format, got 'nifty'; near"):
        delivery.check_names(("nifti", "nifty"))
    with pytest.raises(UsageError, match="DICOM"):
        delivery.check_formats(("dicom",), SCAN)
    assert delivery.check_formats(("png", "nifti", "png"), None) == ("png", "nifti")
    assert delivery.default_formats(SCAN) == ("nifti", "png")


def test_every_format_has_its_writer() -> None:
    for module in delivery.WRITERS.values():
        assert callable(_plugins.load("formats", module).save)


def test_another_scan_than_the_one_explained(tmp_path: Path) -> None:
    other = volume(np.arange(27.0).reshape(3, 3, 3))
    with pytest.raises(UsageError, match="expected the scan on the grid of the maps"):
        write(tmp_path / "out", volume=other)
    assert everything(tmp_path) == {}


def test_formats_as_one_text(tmp_path: Path) -> None:
    assert delivery.check_names("nifti") == ("nifti",)
    assert delivery.check_formats(" png, nifti,png ", None) == ("png", "nifti")
    assert delivery.check_names("") == ()
    folder = write(tmp_path / "out", formats="nifti")
    assert (folder / "signed.nii.gz").is_file()
    assert not (folder / "overview.png").exists()
    assert (
        delivery.write_layers([explanation()], tmp_path / "layers", formats="nifti")
        / "1_features.3"
        / "signed.nii.gz"
    ).is_file()
    with pytest.raises(UnknownNameError, match="got 'nifty'"):
        delivery.check_names("nifty")
    for wrong in (3, [3], None):
        with pytest.raises(UsageError, match=r"expected names of formats \(nifti, png, dicom\)"):
            delivery.check_names(wrong)  # type: ignore[arg-type]


def test_a_map_without_a_sign_has_no_file_against(tmp_path: Path) -> None:
    e = explanation()
    bare = e.replace(evidence=np.abs(e.evidence), signed=False, measure="relative units")
    folder = delivery.write(bare, tmp_path / "out", volume=SCAN)
    assert {p.name for p in folder.iterdir()} == {
        *("explanation.json", "explanation.nii.gz", "strength.nii.gz", "overview.png"),
        *(f"mip_{view}_strength.png" for view in ("axial", "coronal", "sagittal")),
    }
    assert nifti.read_explanation(folder) == bare
