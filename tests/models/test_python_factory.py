"""Does a Python factory run only with the user's word, and is what it returns checked?"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from med_gradcam.errors import ModelError, UntrustedModelError
from med_gradcam.loading import load_model
from med_gradcam.models import python_factory

Write = Callable[[str], str]
_numbers = itertools.count()
START = """import torch
from med_gradcam.model import InputSpec, Model

net = torch.nn.Conv3d(1, 2, 3)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the working folder and returns `module:make`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def module(body: str) -> str:
        name = f"factory_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(START + body, encoding="utf-8")
        return f"{name}:make"

    return module


def test_a_factory_of_four(write: Write) -> None:
    name = write(
        "def make():\n    return net.train(), InputSpec(axes='RAS'), ['a', 'b'], 'softmax'\n"
    )
    model = load_model(name, ["code"])
    assert (model.labels, model.link, model.input.axes) == (("a", "b"), "softmax", "RAS")
    assert model.name == "make"
    assert len(model.weights_sha256) == 64
    assert not model.net.training


def test_the_spec_may_be_what_a_spec_json_holds(write: Write) -> None:
    steps = "[['clip', -1000, 1000], ['normalise', [0.5], [2]]]"
    spec = f"{{'modality': 'CT', 'axes': 'SPL', 'patch': [4, 5, 6], 'intensity': {steps}}}"
    model = load_model(
        write(f"def make():\n    return net, {spec}, ['a', 'b'], 'softmax'\n"), ["code"]
    )
    assert [s.name for s in model.input.intensity] == ["clip", "normalise"]
    assert model.input.intensity[0].arguments == ((-1000.0,), (1000.0,))
    assert model.input.patch == (4, 5, 6)


def test_a_factory_that_returns_a_model(write: Write) -> None:
    model = load_model(
        write("def make():\n    return Model(net, InputSpec(), name='mine')\n"), ["code"]
    )
    assert model.name == "mine"
    assert len(model.weights_sha256) == 64


def test_nothing_runs_without_trust(write: Write, tmp_path: Path) -> None:
    name = write("open('ran', 'w').close()\ndef make(): ...\n")
    with pytest.raises(UntrustedModelError, match=r"is Python code .* say --trust code") as caught:
        load_model(name)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match=r"to build a model|to return"):
        load_model(name, ["code"])
    assert (tmp_path / "ran").exists()  # the probe itself works


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "def make():\n    raise RuntimeError('no disk\\nmore lines')\n",
            "got RuntimeError: no disk",
        ),
        ("def make():\n    raise SystemExit(3)\n", "got SystemExit: 3"),
        ("def make(needed):\n    return net\n", "got TypeError"),
        ("def other(): ...\n", "got AttributeError"),
        ("1 / 0\n", "got ZeroDivisionError"),
        ("def make(: ...\n", "got SyntaxError"),
        (
            "def make():\n    return net\n",
            r"to return \(net, input spec, labels, link\) or a Model",
        ),
        ("def make():\n    return 1, InputSpec(), [], 'none'\n", "expected a torch module from"),
        (
            "def make():\n    return net, {'axis': 'RAS'}, [], 'none'\n",
            "input spec of .* does not fit",
        ),
        ("def make():\n    return net, None, [], 'none'\n", "input spec of .* does not fit"),
        ("def make():\n    return net, {'intensity': 3}, [], 'none'\n", "does not fit"),
        ("def make():\n    return net, {'patch': 'abc'}, [], 'none'\n", "does not fit|patch"),
        ("def make():\n    return net, {'axes': 'XYZ'}, [], 'none'\n", "expected axis letters"),
        ("def make():\n    return net, InputSpec(), None, 'none'\n", "labels"),
        ("def make():\n    return net, InputSpec(), 'ab', 'none'\n", "labels"),
        ("def make():\n    return net, InputSpec(), [], 'relu'\n", "expected a link of"),
    ],
)
def test_a_factory_that_fails(write: Write, body: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        load_model(write(body), ["code"])
    assert "\n" not in str(caught.value)


def test_no_such_module() -> None:
    with pytest.raises(ModelError, match="got ModuleNotFoundError: No module named 'no_such_mod'"):
        load_model("no_such_mod:make", ["code"])


def test_what_looks_like_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert python_factory.sniff("package.module:function")
    for text in ("folder/net", "module", "module:", ":f", "a:b:c", "a b:c", "C:\\net", "m:f()"):
        assert not python_factory.sniff(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert not python_factory.sniff("a:b")


def test_the_digest_sees_every_number() -> None:
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2))
    before = python_factory.weights_digest(net)
    assert before == python_factory.weights_digest(net)
    for tensor in net.state_dict().values():
        kept = tensor.clone()
        tensor.add_(1)
        assert python_factory.weights_digest(net) != before
        tensor.copy_(kept)
    assert python_factory.weights_digest(net) == before
    assert python_factory.weights_digest(torch.nn.Identity()) == ""
    assert python_factory.weights_digest(net.to(torch.bfloat16)) != before
