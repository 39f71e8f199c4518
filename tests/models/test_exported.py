"""Does a .pt2 file load with the user's word only, pinned if wished, and explain as its source?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import ModelError, UntrustedModelError
from tests.hostile.attacks import Small, rezip
from tests.models.test_torchscript import METADATA

pytestmark = pytest.mark.filterwarnings("ignore")
SCAN = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> torch.nn.Module:
    torch.manual_seed(4)
    return Small().eval()


def save(path: Path, **extra: str) -> Path:
    program = torch.export.export(net(), (SCAN[None, None],))
    torch.export.save(program, path, extra_files={f"{k}.json": v for k, v in extra.items()})
    return path


def test_it_explains_as_its_source_does(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt2")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for trust in ((), "data", "archive"):
        with pytest.raises(UntrustedModelError, match=f"can run code .*--trust code:{digest}"):
            mg.load_model(path, trust=trust)
    with pytest.raises(UntrustedModelError, match="is not the file that --trust pins"):
        mg.load_model(path, trust=f"code:{'0' * 64}")
    model = mg.load_model(path, trust=f"code:{digest}")
    assert model.weights_sha256 == digest
    for method in ("gradcam", "secant", "integrated"):
        wanted = mg.explain(SCAN, net(), target=0, layer="conv", method=method)
        found = mg.explain(SCAN, model, target=0, layer="conv", method=method)
        near = 1e-6 * np.abs(wanted.evidence).max()
        assert np.abs(found.evidence - wanted.evidence).max() <= near
        assert found.method == method


def test_metadata_comes_along(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt2", metadata=json.dumps(METADATA))
    assert mg.load_model(path, trust="code").labels == ("background", "spleen")


def test_another_size_than_it_was_exported_for(tmp_path: Path) -> None:
    model = mg.load_model(save(tmp_path / "net.pt2"), trust="code")
    with pytest.raises(ModelError, match=r"to run on an input of shape \(1, 1, 9, 9, 9\)"):
        mg.explain(torch.rand(9, 9, 9), model, target=0)


def test_an_archive_that_torch_cannot_read(tmp_path: Path) -> None:
    path = rezip(tmp_path / "net.pt2", {"net/models/model.json": b"{}", "net/archive_format": b"x"})
    with pytest.raises(ModelError, match="cannot read it"):
        mg.load_model(path, trust="code")
