"""Is a pickle refused with what it names, and a state dict read as numbers alone?"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import ModelError, UntrustedModelError
from med_gradcam.models import _archive, _state_dict
from tests.hostile.attacks import Small
from tests.tiny import LAYERS, build, save_model, spec

pytestmark = pytest.mark.filterwarnings("ignore")


def folder(tmp_path: Path, what: Any) -> Path:
    """A model folder whose weights are a checkpoint of torch.save."""
    made = save_model(tmp_path / "net")
    (made / "weights.safetensors").unlink()
    torch.save(what, made / "weights.pt")
    return made


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return build(LAYERS).state_dict()


def test_a_state_dict_beside_a_spec(tmp_path: Path) -> None:
    wanted = mg.load_model(save_model(tmp_path / "other"))
    model = mg.load_model(folder(tmp_path, weights()))
    ours, theirs = model.net.state_dict(), wanted.net.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert model.weights_sha256 != wanted.weights_sha256
    assert len(model.weights_sha256) == 64


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_checkpoint_with_numpys_numbers(tmp_path: Path, key: str) -> None:
    numbers = {"loss": np.float64(0.25), "epoch": np.int64(3), "best": np.bool_(True)}
    made = folder(tmp_path, {key: weights(), **numbers})
    assert len(mg.load_model(made).net.state_dict()) == len(weights())


def test_a_checkpoint_written_under_numpy_1(tmp_path: Path) -> None:
    numbers = {"loss": np.float64(0.25), "epoch": np.int64(3), "best": np.bool_(True)}
    made = folder(tmp_path, {"state_dict": weights(), **numbers})
    with zipfile.ZipFile(made / "weights.pt") as old:
        held = {info.filename: old.read(info) for info in old.infolist()}
    (pickled,) = (name for name in held if name.endswith("data.pkl"))
    assert b"cnumpy._core.multiarray\nscalar\n" in held[pickled]
    held[pickled] = held[pickled].replace(b"cnumpy._core.", b"cnumpy.core.")
    with zipfile.ZipFile(made / "weights.pt", "w") as new:
        for name, raw in held.items():
            new.writestr(name, raw)
    found = _state_dict.data(_archive.read(str(made / "weights.pt")))
    assert {key: found[key] for key in numbers} == numbers
    assert len(mg.load_model(made).net.state_dict()) == len(weights())


def test_parameters_and_views_are_numbers_too(tmp_path: Path) -> None:
    held = {k: torch.nn.Parameter(v) for k, v in weights().items()}
    mg.load_model(folder(tmp_path, held))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (Small(), r"it names .*tests\.hostile\.attacks\.Small"),
        ({"a": Path()}, "it names pathlib"),
        ([1, 2], "expected a state dict"),
        ({}, "expected a state dict"),
        ({"a": 1}, "expected a state dict"),
        ({"a": torch.ones(1)}, "do not fit spec.json"),
        ({"0.weight": np.array([object()])}, "it names"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, what: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        mg.load_model(folder(tmp_path, what))


def test_old_checkpoints_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path, {})
    torch.save(weights(), made / "weights.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"saved by torch 1\.6 or later"):
        mg.load_model(made)


def test_safetensors_come_first(tmp_path: Path) -> None:
    made = save_model(tmp_path / "net")
    torch.save(Small(), made / "weights.pt")
    mg.load_model(made)


def test_weights_without_their_network(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "net.pth")
    for trust in ((), "code"):
        with pytest.raises(ModelError, match=r"weights\.pt beside a spec\.json"):
            mg.load_model(tmp_path / "net.pth", trust=trust)


def test_a_network_pickled_whole_needs_the_trust_of_code(tmp_path: Path) -> None:
    net, path, scan = Small().eval(), tmp_path / "net.pt", torch.rand(6, 6, 6)
    torch.save(net, path)
    for trust in ((), "archive"):
        with pytest.raises(
            UntrustedModelError, match=r"attacks\.Small.* --trust code:[0-9a-f]{64}"
        ):
            mg.load_model(path, trust=trust)
    (tmp_path / "net.pt.json").write_text(
        json.dumps(spec(layers=None, input={"modality": "CT", "axes": "RAS"}))
    )
    model = mg.load_model(path, trust="code")
    assert model.labels == ("quiet", "nodule")
    found = mg.explain(scan, model.net, target=0, layer="conv")
    wanted = mg.explain(scan, net, target=0, layer="conv")
    assert np.array_equal(found.evidence, wanted.evidence)


def test_other_things_than_a_network(tmp_path: Path) -> None:
    torch.save({"net": Path()}, tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"expected a network pickled whole.*got dict"):
        mg.load_model(tmp_path / "net.pt", trust="code")
    (tmp_path / "net.ckpt").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UntrustedModelError, match="cannot be told without running it"):
        mg.load_model(tmp_path / "net.ckpt")
    with pytest.raises(ModelError, match="expected a pickled network"):
        mg.load_model(tmp_path / "net.ckpt", trust="code")
