"""Is a file that is empty or cut off told so?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import ModelError
from tests.models.test_torchscript import net, save

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["net.ts", "net.pt", "net.pt2", "net.pth"])
@pytest.mark.parametrize("share", [0, 50, 95])
def test_a_file_that_is_not_whole(tmp_path: Path, name: str, share: int) -> None:
    whole = save(tmp_path / "whole.ts").read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * share // 100])
    why = "is cut off: it begins as a zip archive and has no end" if share else "is empty"
    with pytest.raises(ModelError, match=f"'{name}' {why}"):
        mg.load_model(tmp_path / name, trust="code")


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "net.pt")
    raw = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(raw[:-100])
    with pytest.raises(ModelError, match=r"'net\.pt' is cut off"):
        mg.load_model(tmp_path / "net.pt")
