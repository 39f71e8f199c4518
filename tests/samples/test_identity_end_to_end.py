"""A name in every tag, folder and file name of the input: is it anywhere in what comes out?"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pydicom
import pytest

from med_gradcam import samples
from med_gradcam.cli import main

NAME = "ZQXNAME"
TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"}
KEPT = {"ImageType", "Modality", "PhotometricInterpretation", "SpecificCharacterSet"}


def planted(source: Path, folder: Path) -> Path:
    """A copy of a DICOM series with the name in every text tag that may hold one."""
    folder.mkdir(parents=True)
    for n, path in enumerate(sorted(source.iterdir())):
        data = pydicom.dcmread(path)
        for element in data:
            if element.VR in TEXT and element.keyword not in KEPT:
                element.value = f"{NAME}^A" if element.VR == "PN" else NAME
        data.PatientID = data.InstitutionName = data.StudyDescription = NAME
        data.SeriesDescription = data.ProtocolName = data.PatientComments = NAME
        data.save_as(folder / f"{NAME}_{n}.dcm")
    return folder


@pytest.mark.parametrize("identified", [False, True])
def test_a_planted_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, identified: bool
) -> None:
    home = samples.folder()
    scan = planted(home / "ct" / "core_dicom", tmp_path / NAME / f"{NAME}_series")
    net = tmp_path / f"{NAME}_net"
    shutil.copytree(home / "nets" / "ct_nodule", net)
    out = tmp_path / "out"
    extra = ["--identified"] if identified else []
    arguments = ["explain", str(scan), "--model", str(net), "--layer", "block2", "-o", str(out)]
    assert main([*arguments, *extra]) == 0
    said = capsys.readouterr()
    assert NAME not in said.out
    assert NAME not in said.err
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) > 14
    holding = []
    for path in files:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        if NAME.encode() in raw or NAME.encode("utf-16-le") in raw or NAME in path.name:
            holding.append(path.name)
    assert sorted(holding) == (["against.dcm", "for.dcm", "signed.dcm"] if identified else [])
