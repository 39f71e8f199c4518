"""Is a model behind a server explained by its answers, and is nothing else made of them?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import med_gradcam as mg
from med_gradcam.errors import MedGradcamError, ModelError, UntrustedModelError
from med_gradcam.loading import load_model
from med_gradcam.models import _blackbox_http, black_box
from med_gradcam.models._blackbox_http import Address, address
from tests.engine import nets
from tests.engine.boxes import far
from tests.models.kserve import SIZE, Server, written

NAME = "Doe^Jane"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(nets.made(nets.gated))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blackbox_http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(_blackbox_http, "LONGEST_WAIT_S", 0.02)


def _explained(model: mg.Model, **settings: Any) -> mg.Explanation:
    return mg.explain(nets.volume(SIZE), model, target=1, **settings)


# ------------------------------------------------------------------------------ the same as the net


@pytest.mark.parametrize("way", ["json", "binary", "v1", "kserve+", "version", "infer"])
def test_the_map_is_that_of_the_network_behind(server: Server, way: str) -> None:
    server.binary = way != "json"
    url = {
        "v1": f"{server.root}/v1/models/lung:predict",
        "kserve+": f"kserve+{server.url}",
        "version": f"{server.url}/versions/3",
        "infer": f"{server.url}/infer",
    }.get(way, server.url)
    e = _explained(load_model(url))
    known = _explained(mg.BlackBox(server.scores))
    assert far(e, known) < 1e-6
    assert e.score == pytest.approx(known.score, abs=1e-6)
    posted = [path for kind, path in server.asked if kind == "POST"]
    wanted = {"v1": "/v1/models/lung:predict", "version": "/v2/models/lung/versions/3/infer"}
    assert set(posted) == {wanted.get(way, "/v2/models/lung/infer")}
    binary = [b"Inference-Header-Content-Length" in body for body in server.bodies]
    assert set(binary) == {way not in ("json", "v1")}, "bytes only where the server takes them"


@pytest.mark.parametrize("datatype", ["FP64", "FP16"])
def test_other_kinds_of_numbers(server: Server, datatype: str) -> None:
    server.datatype = datatype
    e, known = _explained(load_model(server.url)), _explained(mg.BlackBox(server.scores))
    assert e.score == pytest.approx(known.score, abs=1e-6 if datatype == "FP64" else 1e-2)


def test_what_the_server_says_of_its_input_is_taken(server: Server) -> None:
    model = load_model(server.url)
    assert (model.input.channels, model.input.patch) == (1, (SIZE,) * 3)
    assert model.name == f"lung, version 3 at {server.root[7:]}"
    server.shape = [-1, 1, -1, -1, -1]
    assert load_model(server.url).input.patch is None
    assert server.asked == [("GET", "/v2/models/lung"), ("GET", "/v2")] * 2, "no voxel was sent"


def test_a_server_without_a_batch_axis(server: Server) -> None:
    server.shape = [1, SIZE, SIZE, SIZE]
    known = _explained(mg.BlackBox(server.scores))
    assert far(_explained(load_model(server.url)), known) < 1e-6


def test_a_folder_says_what_the_server_cannot(server: Server, tmp_path: Path) -> None:
    for path in (
        written(tmp_path / "m", server, batch=5),
        str(tmp_path / "m/spec.json"),
    ):
        model = load_model(path, ["network"])
        assert (model.name, model.labels) == ("lung nodule", ("no", "yes"))
        assert model.input.modality == "CT"
    server.batches.clear()
    volume = mg.Volume(nets.scan(SIZE), nets.volume(SIZE).grid, "CT", "HU")
    e = mg.explain(volume, model, target="yes")
    assert max(server.batches) == 5
    assert e.provenance.model_name == "lung nodule"


def test_probabilities_of_a_server_become_log_odds(server: Server, tmp_path: Path) -> None:
    logits = server.net
    server.net = nn.Sequential(logits, nn.Softmax(1))
    server.shape = [-1, 1, -1, -1, -1]
    spec = written(tmp_path / "m", server, outputs="probabilities", batch=8)
    volume = mg.Volume(nets.scan(SIZE), nets.volume(SIZE).grid, "CT", "HU")
    known = mg.explain(volume, logits, target=1, method="occlusion")
    assert mg.explain(volume, load_model(spec, ["network"]), target=1).score == pytest.approx(
        known.score, abs=1e-5
    )
    with pytest.raises(ModelError, match="say outputs='probabilities'"):
        _explained(load_model(server.url))


def test_tensors_are_chosen_by_name(server: Server, tmp_path: Path) -> None:
    server.inputs, server.outputs = ["mask", "scan"], ["aside", "logits"]
    with pytest.raises(ModelError, match=r"one input of the model .* it has mask, scan; name one"):
        load_model(server.url)
    where = {"url": server.url, "input": "scan", "output": "logits"}
    other = written(tmp_path / "other", server, endpoint={**where, "output": "other"})
    model = load_model(written(tmp_path / "m", server, endpoint=where), ["network"])
    known = mg.explain(
        mg.Volume(nets.scan(SIZE), nets.volume(SIZE).grid, "CT", "HU"), model, target=1
    )
    assert known.score == pytest.approx(_explained(mg.BlackBox(server.scores)).score, abs=1e-6)
    with pytest.raises(ModelError, match="called 'other', it has aside, logits"):
        load_model(other, ["network"])


# -------------------------------------------------------------------------------------- privacy


def test_nothing_but_voxels_is_sent(server: Server, tmp_path: Path) -> None:
    nii = tmp_path / f"{NAME}.nii.gz"
    import nibabel as nib

    image = nib.Nifti1Image(nets.scan(SIZE)[0], np.eye(4))
    image.header["descrip"] = NAME.encode()
    nib.save(image, nii)
    for url in (server.url, f"{server.root}/v1/models/lung"):
        mg.explain(mg.read(nii), load_model(url), target=1)
    assert server.bodies
    for body in server.bodies:
        assert NAME.encode() not in body
        head = body.split(b"\n\n", 1)[0].lower()
        names = {line.split(b":")[0].strip() for line in head.splitlines() if line.strip()}
        assert names <= {
            b"host",
            b"accept-encoding",
            b"content-length",
            b"content-type",
            b"inference-header-content-length",
        }


@pytest.mark.parametrize("host", ["10.1.2.3", "example.org", "[2001:db8::1]"])
def test_a_server_elsewhere_needs_the_user_s_word(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(_blackbox_http.Wire, "ask", never)
    url = f"http://{host}:8000/v2/models/lung"
    with pytest.raises(UntrustedModelError, match=r"voxels would be sent to .*--trust network"):
        load_model(url)
    with pytest.raises(AssertionError, match="asked"):
        load_model(url, ["network"])


def test_a_spec_s_server_needs_it_too_even_here(server: Server, tmp_path: Path) -> None:
    path = written(tmp_path / "m", server)
    for trust in ([], ["code"]):
        with pytest.raises(UntrustedModelError, match=r"'spec.json' says that the voxels go to 12"):
            load_model(path, trust)
    assert not server.asked


def test_where_voxels_went_is_in_the_result(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Address, "here", property(lambda _: False))
    e = _explained(load_model(server.url, ["network"]))
    assert [w for w in e.warnings if "sent" in w] == [f"the voxels were sent to {server.root[7:]}"]


def test_no_proxy_of_the_environment_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert _explained(load_model(server.url)).layer == "@input"


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost/v2/models/a", True),
        ("http://127.9.9.9:80/v2/models/a", True),
        ("https://[::1]/v2/models/a", True),
        ("http://localhost.example.org/v2/models/a", False),
        ("http://127.0.0.1.example.org/v2/models/a", False),
        ("http://0.0.0.0/v2/models/a", False),
    ],
)
def test_what_is_this_machine(url: str, *, here: bool) -> None:
    assert address(url).here is here


URLS = [
    ("http://127.0.0.1:99999/v2/models/a", "expected a URL such as"),
    ("http:///v2/models/a", "expected a URL such as"),
    ("http://127.0.0.1/v2/models/a b", "expected a URL such as"),
    ("http://127.0.0.1/v2/models/a\r\nX: y", "expected a URL such as"),
    ("http://user:secret@127.0.0.1/v2/models/a", "without a user"),
    ("http://127.0.0.1/v2/models/a?x=1", "without a user"),
    ("http://127.0.0.1/v2/models/", "expected the URL of a model"),
    ("http://127.0.0.1/v2/models/a/b/c", "expected the URL of a model"),
    ("http://127.0.0.1/predict", "expected the URL of a model"),
]


@pytest.mark.parametrize(("url", "words"), URLS)
def test_a_url_that_names_no_model(url: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(url)
    assert "secret" not in str(caught.value)


# -------------------------------------------------------------------------- what is off before


METADATA: list[tuple[str, Any, str]] = [
    (
        "shape",
        [-1, 3, SIZE],
        r"expected an input \(n, C, I, J, K\) of .* it takes FP32 \[-1, 3, 8\]",
    ),
    ("datatype", "BYTES", r"it takes BYTES"),
    ("shape", "any", r"metadata without a shape"),
    ("shape", [-1, 1, 10**12, 1, 1], r"metadata without a shape"),
    ("inputs", [], r"metadata without inputs"),
    ("shape", [4, 1, SIZE, SIZE, SIZE], r"a batch of 4, which the server takes, got 1"),
]


@pytest.mark.parametrize(("key", "value", "words"), METADATA)
def test_a_model_that_takes_no_volumes(server: Server, key: str, value: Any, words: str) -> None:
    setattr(server, key, value)
    with pytest.raises(ModelError, match=words):
        load_model(server.url)


SPECS: list[tuple[dict[str, Any], str]] = [
    ({"input": {"modality": "CT", "axes": "RAS", "channels": 2}}, r"takes \(1, 8, 8, 8\)"),
    ({"input": {"modality": "CT", "axes": "RAS"}}, r"the patch \[8, 8, 8\] in the spec"),
    ({"input": None}, "the key 'input'"),
    ({"endpoint": {"address": "x"}}, "an endpoint as a URL"),
    ({"endpoint": 3}, "an endpoint as a URL"),
    ({"endpoint": "ftp://x/v2/models/a"}, "expected a URL such as"),
    ({"command": ["a"]}, "an endpoint or a command, got both"),
    ({"timeout_s": -1}, "timeout_s in seconds"),
    ({"batch": 0}, "a batch of at least one"),
    ({"outputs": "percent"}, "logits or probabilities"),
    ({"labels": [1]}, "list of texts as labels"),
    ({"link": "tanh"}, "a link of"),
    ({"format": "other/9"}, "expected format"),
]


@pytest.mark.parametrize(("more", "words"), SPECS)
def test_a_spec_that_is_off(
    server: Server, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    given = {"input": {"modality": "CT", "axes": "RAS", "patch": [SIZE] * 3}, **more}
    with pytest.raises(ModelError, match=words) as caught:
        load_model(written(tmp_path / "m", server, **given), ["network", "code"])
    assert "m/spec.json" in str(caught.value)


def test_who_takes_what(server: Server, tmp_path: Path) -> None:
    assert black_box.sniff(server.url)
    assert black_box.sniff(written(tmp_path / "m", server))
    assert not black_box.sniff(str(tmp_path))
    assert not black_box.sniff("module:function")
    (tmp_path / "spec.json").write_text('{"layers": []}', encoding="utf-8")
    assert not black_box.sniff(str(tmp_path))
    (tmp_path / "spec.json").write_bytes(b"\xff[[[")
    assert not black_box.sniff(str(tmp_path))
    assert issubclass(ModelError, MedGradcamError)
