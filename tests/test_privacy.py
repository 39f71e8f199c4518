"""Does a name that is planted everywhere in the input stay out of every byte that leaves?"""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med_gradcam.cli import main
from med_gradcam.loading import load_model
from tests.tiny import chest, opened, save_model, save_nifti, spec

NAME = "QXZVORONIN"  # nothing else holds these letters
FORMS = [NAME, NAME.lower(), NAME.title()]


def planted_scan(folder: Path) -> Path:
    """A scan with the name in every text field a NIfTI header has, its folder and its file name."""
    path = folder / f"{NAME}_1961" / f"{NAME.title()}-ct.nii.gz"
    path.parent.mkdir(parents=True)
    image = nib.Nifti1Image(chest(), None)
    image.set_sform(np.diag([1.5, 1.25, 2.0, 1.0]), 1)
    image.set_qform(np.diag([1.5, 1.25, 2.0, 1.0]), 1)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = NAME.encode()
    for code in (0, 2, 4, 6, 44):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, f"({NAME})".encode()))
    nib.save(image, path)
    return path


def planted_model(folder: Path, *, named: bool = True) -> Path:
    return save_model(folder / f"{NAME.lower()}_net", spec(name="tiny" if named else None))


def unpacked(content: bytes) -> bytes:
    """What a file holds after its compression: gzip, and the streams in a PNG."""
    if content[:2] == b"\x1f\x8b":
        return gzip.decompress(content)
    found = bytearray(content)
    at = 0
    while content[:8] == b"\x89PNG\r\n\x1a\n" and (at := content.find(b"zTXt", at + 1)) > 0:
        found += zlib.decompressobj().decompress(content[content.index(b"\0", at) + 2 :])
    return bytes(found)


def leaks(content: bytes) -> list[str]:
    whole = unpacked(content)
    texts = [*FORMS, *(form[::-1] for form in FORMS)]
    codecs = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")
    return [t for t in texts if any(t.encode(c) in whole for c in codecs)]


def found_in(folder: Path) -> list[str]:
    """Where below a folder the name is: file names and contents."""
    places = [str(p) for p in folder.rglob("*") if leaks(p.name.encode())]
    return places + [str(p) for p in folder.rglob("*") if p.is_file() and leaks(p.read_bytes())]


@pytest.mark.parametrize("named", [True, False])
def test_no_output_holds_the_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    named: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    scan, net = planted_scan(tmp_path / "in"), planted_model(tmp_path / "in", named=named)
    out = tmp_path / "out"
    words = ["explain", str(scan), "--model", str(net), "-o", str(out), "--reference", "zero"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert len(list(out.iterdir())) > 8
    assert found_in(out) == []
    assert leaks(said.out.encode()) == []
    assert said.err == ""
    assert leaks(caplog.text.encode()) == []


def test_nothing_of_a_reference_scan_or_a_second_channel(tmp_path: Path) -> None:
    layers = [
        ["Conv3d", {"in_channels": 2, "out_channels": 4, "kernel_size": 3}],
        *spec()["layers"][1:],
    ]
    net = save_model(
        tmp_path / "net", spec(layers=layers, input={**spec()["input"], "channels": 2})
    )
    one, two = planted_scan(tmp_path / "in1"), planted_scan(tmp_path / "in2")
    out = tmp_path / "out"
    words = ["explain", str(one), str(two), "--model", str(net), "-o", str(out)]
    assert main(words) == 0
    assert found_in(out) == []
    plain = save_model(tmp_path / "plain")
    empty = planted_scan(tmp_path / "in3")
    nib.save(nib.Nifti1Image(chest() // 2, opened(one).affine), empty)
    words = ["explain", str(one), "--model", str(plain), "-o", str(tmp_path / "b")]
    assert main([*words, "--reference", str(empty)]) == 0
    assert found_in(tmp_path / "b") == []


def test_inspect_says_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan, net = planted_scan(tmp_path), planted_model(tmp_path, named=False)
    for words in ([str(scan)], [str(net)], [str(net), str(scan)]):
        for form in ([], ["--json"]):
            assert main(["inspect", *words, *form]) == 0
            said = capsys.readouterr()
            assert leaks((said.out + said.err).encode()) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 99)


def flat(path: Path) -> None:
    save_nifti(path, chest()[:, :, 0])


def not_finite(path: Path) -> None:
    save_nifti(path, np.full((12, 12, 12), np.nan, np.float32))


def oriented_nowhere(path: Path) -> None:
    save_nifti(path, codes=(0, 0))


@pytest.mark.parametrize("spoil", [cut, garbage, flat, not_finite, oriented_nowhere])
def test_an_error_names_the_file_and_not_its_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    """Which file is off must be said; in which folders it lies need not."""
    scan = planted_scan(tmp_path)
    plain = scan.rename(scan.with_name("scan.nii.gz"))
    spoil(plain)
    net = save_model(tmp_path / "net")
    assert main(["explain", str(plain), "--model", str(net), "-o", str(tmp_path / "out")]) == 3
    said = capsys.readouterr()
    assert "scan.nii.gz" in said.err
    assert leaks(said.err.encode()) == []


def test_the_errors_of_a_model_do_not_name_the_folders_above_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / NAME / "net")
    (folder / "weights.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(ValueError, match="expected safetensors in net/weights") as caught:
        load_model(folder)
    assert leaks(str(caught.value).encode()) == []


def test_a_planted_name_is_found(tmp_path: Path) -> None:
    """The test of the test: each hiding place by itself is seen."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    hidden = {
        "json": json.dumps({"path": f"/data/{NAME}"}).encode(),
        "gzip": gzip.compress(NAME.encode()),
        "wide": NAME.encode("utf-16-le"),
        "plain": b"PatientName^" + NAME.lower().encode(),
    }
    info = PngInfo()
    info.add_text("Title", NAME, zip=True)
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG", pnginfo=info)
    hidden["png"] = picture.getvalue()
    for name, content in hidden.items():
        (tmp_path / name).write_bytes(content)
    assert len(found_in(tmp_path)) == len(hidden)
    (tmp_path / NAME).mkdir()
    assert len(found_in(tmp_path)) == len(hidden) + 1
    assert leaks(b"nothing of the kind") == []
