"""Does a TorchScript file load at the level of trust it needs, and explain as its source does?"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import ModelError, UntrustedModelError, UsageError
from med_gradcam.models import torchscript
from tests.hostile.attacks import Small
from tests.tiny import spec

pytestmark = pytest.mark.filterwarnings("ignore")
SCAN = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0))
METADATA = {
    "name": "spleen",
    "copyright": "MIT",
    "network_data_format": {
        "inputs": {
            "image": {
                "type": "image",
                "format": "hounsfield",
                "modality": "CT",
                "num_channels": 1,
                "spatial_shape": [8, 8, 8],
                "is_patch_data": True,
                "value_range": [0, 1],
            }
        },
        "outputs": {"pred": {"channel_def": {"1": "spleen", "0": "background"}}},
    },
}


def net() -> torch.nn.Module:
    torch.manual_seed(4)
    return Small().eval()


def save(path: Path, kind: str = "script", **extra: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.jit.script(net())
        if kind != "script":
            made = torch.jit.trace(net(), SCAN[None, None])
        if kind == "frozen":
            made = torch.jit.freeze(made)
        torch.jit.save(made, path, _extra_files={f"{k}.json": v for k, v in extra.items()})
    return path


@pytest.mark.parametrize("name", ["net.ts", "net.pt", "net.pth", "net"])
@pytest.mark.parametrize("kind", ["script", "trace", "frozen"])
def test_it_explains_as_its_source_does(tmp_path: Path, name: str, kind: str) -> None:
    path = save(tmp_path / name, kind)
    model = mg.load_model(path, trust="archive")
    assert model.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = mg.explain(SCAN, net(), target=0, layer="conv")
    layer = "conv3d" if kind == "frozen" else "conv"
    found = mg.explain(SCAN, model, target=0, layer=layer)
    near = 1e-6 * np.abs(wanted.evidence).max()
    assert np.abs(found.evidence - wanted.evidence).max() <= near
    assert found.score == pytest.approx(wanted.score, abs=1e-6)
    assert found.provenance.weights_sha256 == model.weights_sha256


def test_it_needs_the_trust_of_an_archive(tmp_path: Path) -> None:
    path = save(tmp_path / "net.ts")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for trust in ((), "data", ["data", "network"]):
        with pytest.raises(UntrustedModelError, match=f"--trust archive.*{digest}"):
            mg.load_model(path, trust=trust)
    for trust in ("archive", "code", ["code"], f"archive:{digest}", f"code:{digest.upper()}"):
        assert mg.load_model(path, trust=trust).labels == ()
    with pytest.raises(UntrustedModelError, match=f"is not the file that --trust pins.*{digest}"):
        mg.load_model(path, trust=f"archive:{'0' * 64}")
    with pytest.raises(UntrustedModelError, match="is not the file"):
        mg.load_model(path, trust=["code", f"archive:{'0' * 64}"])


@pytest.mark.parametrize("word", ["everything", "", "data:" + "0" * 64, "code:12", "code:"])
def test_words_that_are_no_trust(tmp_path: Path, word: str) -> None:
    with pytest.raises(UsageError, match="expected a trust of data, archive, code"):
        mg.load_model(tmp_path, trust=word)


def test_nothing_known_is_noted(tmp_path: Path) -> None:
    model = mg.load_model(save(tmp_path / "net.ts"), trust="archive")
    assert (model.input.channels, model.labels, model.link) == (1, (), "softmax")
    found = mg.explain(SCAN, model, target=0, layer="conv")
    assert any("softmax assumed; say more in net.ts.json beside it" in w for w in found.warnings)


def test_metadata_of_monai(tmp_path: Path) -> None:
    path = save(tmp_path / "net.ts", metadata=json.dumps(METADATA))
    model = mg.load_model(path, trust="archive")
    assert model.labels == ("background", "spleen")
    assert model.input.modality == "CT"
    assert model.input.patch == (8, 8, 8)
    assert (model.name, model.licence) == ("spleen", "MIT")
    assert any("values within 0 to 1" in note for note in model.notes)
    found = mg.explain(SCAN, model, target="spleen", layer="conv")
    assert any("values within 0 to 1" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("named", "labels"),
    [
        ({"0": "a", "1": "a"}, ()),
        ({"0": "a", "2": "b"}, ()),
        ({"left": "a"}, ()),
        (["a"], ()),
        ({"0": "lesion"}, ("lesion",)),
    ],
)
def test_channels_that_are_no_labels(
    tmp_path: Path, named: object, labels: tuple[str, ...]
) -> None:
    outputs = {"pred": {"channel_def": named}}
    format_ = {**METADATA["network_data_format"], "outputs": outputs}  # type: ignore[dict-item]
    path = save(tmp_path / "net.ts", metadata=json.dumps({"network_data_format": format_}))
    model = mg.load_model(path, trust="archive")
    assert model.labels == labels
    assert model.link == ("sigmoid" if labels else "softmax")


@pytest.mark.parametrize("beside", ["net.ts.json", "spec.json"])
def test_a_description_beside_it(tmp_path: Path, beside: str) -> None:
    path = save(tmp_path / "net.ts")
    described = spec(layers=None, cam_layers={"early": "conv"})
    described["input"]["patch"] = [8, 8, 8]
    (tmp_path / beside).write_text(json.dumps(described))
    model = mg.load_model(path, trust="archive")
    assert model.labels == ("quiet", "nodule")
    assert model.aliases == {"early": "conv"}
    assert model.notes == ()
    (tmp_path / beside).write_text(json.dumps(spec(link="relu")))
    with pytest.raises(ModelError, match=f"{beside}: expected a link"):
        mg.load_model(path, trust="archive")


def test_spoilt_metadata(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"readable JSON as metadata\.json in 'net.ts'"):
        mg.load_model(save(tmp_path / "net.ts", metadata="{"), trust="archive")
    bad = {"network_data_format": {"inputs": {"image": {"num_channels": "many"}}}}
    with pytest.raises(ModelError, match=r"metadata\.json in 'net.ts'"):
        mg.load_model(save(tmp_path / "net.ts", metadata=json.dumps(bad)), trust="archive")


def test_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "net.ts").write_text("no archive")
    assert not torchscript.sniff(str(tmp_path / "net.ts"))
    assert not torchscript.sniff(str(tmp_path))
    assert not torchscript.sniff("module:function")
    torch.save(net().state_dict(), tmp_path / "net.pt")
    assert not torchscript.sniff(str(tmp_path / "net.pt"))


def test_the_users_pytorch_is_left_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "net.ts")
    before = path.read_bytes()
    mg.explain(SCAN, mg.load_model(path, trust="archive"), target=0)
    assert path.read_bytes() == before
