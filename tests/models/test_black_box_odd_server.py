"""Is an answer that is none of scores one sentence, in time, and no more than that?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import med_gradcam as mg
from med_gradcam.errors import ModelError
from med_gradcam.loading import load_model
from med_gradcam.models import _blackbox_http
from tests.engine import nets
from tests.models.kserve import SIZE, Odd, Server, written


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


def _with(body: bytes, **headers: str) -> Odd:
    def odd(handler: Any) -> bool:
        handler.reply(body, {key.replace("_", "-"): value for key, value in headers.items()})
        return True

    return odd


def _answer(**out: Any) -> Odd:
    given = {"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 1.0], **out}
    return _with(json.dumps({"outputs": [given]}).encode())


def _huge(handler: Any) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**31))
    handler.end_headers()
    return True


def _endless(handler: Any) -> bool:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b"0" * 2**16)
    return True


def _redirect(handler: Any) -> bool:
    handler.send_response(307)
    handler.send_header("Location", "http://10.9.9.9/steal\x1b[31m")
    handler.end_headers()
    return True


def _broken(handler: Any) -> bool:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    return True


def _cut(handler: Any) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"{")
    return True


def _refused(handler: Any) -> bool:
    body = json.dumps({"error": "unexpected shape\x07\nfor input 'scan'"}).encode()
    handler.send_response(400)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


_SIZED = {"binary_data_size": 8}
ODD: dict[str, tuple[Odd, str]] = {
    "junk": (_with(b"<html>hello\x00</html>"), r"KServe v2 protocol .* got '<html>hello </html>'"),
    "a list": (_with(b"[1, 2]"), r"KServe v2 protocol"),
    "deep": (_with(b"[" * 100_000), r"KServe v2 protocol"),
    "empty": (_with(b""), r"KServe v2 protocol"),
    "error": (_refused, r"it answered 400: unexpected shape for input 'scan'\.$"),
    "error in a 200": (_with(b'{"error": "no room"}'), r"it answered 200: no room"),
    "nan": (_answer(data=[float("nan"), 0.0]), r"finite scores .* got NaN"),
    "null": (_answer(data=[None, 0.0]), r"no numbers"),
    "words": (_answer(data=["a", "b"]), r"no numbers"),
    "other batch": (_answer(shape=[2, 1]), r"expected scores \(1, K\) .* got shape \(2, 1\)"),
    "other count": (_answer(shape=[1, 3]), r"2 numbers for the output 'logits' of shape \[1, 3\]"),
    "negative": (_answer(shape=[-1, -2]), r"the output 'logits' without a shape"),
    "overflow": (_answer(shape=[999999999] * 9), r"2 numbers for the output"),
    "no shape": (_answer(shape="1,2"), r"without a shape"),
    "other name": (_answer(name="scores"), r"no output 'logits'"),
    "no outputs": (_with(b'{"outputs": {"logits": [1]}}'), r"no output 'logits'"),
    "bytes short": (
        _with(json.dumps({"outputs": [{"name": "logits", "shape": [1, 2], "datatype": "FP32",
              "parameters": _SIZED}]}).encode()),
        r"0 numbers for the output",
    ),
    "bytes of text": (
        _with(json.dumps({"outputs": [{"name": "logits", "shape": [1, 2], "datatype": "BYTES",
              "parameters": _SIZED}]}).encode()),
        r"0 bytes of BYTES",
    ),
    "header lies": (_with(b"{}", Inference_Header_Content_Length="99999999999999"), "no output"),
    "2 GB": (_huge, r"at most \d+ bytes .* got 2147483648 bytes"),
    "endless": (_endless, r"at most \d+ bytes .* got more"),
    "redirect": (_redirect, r"a redirect \(307\) to 'http://10.9.9.9/steal \[31m', which is not"),
    "no http": (_broken, r"the connection failed"),
    "cut off": (_cut, r"the connection failed"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_one_sentence(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blackbox_http, "MOST_BYTES", 2**20)
    model = load_model(server.url)
    server.odd, words = ODD[name]
    with pytest.raises(ModelError, match=words) as caught:
        _explained(model)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500


@pytest.mark.parametrize("how", ["silent", "slow"])
def test_a_server_that_hangs_is_left(server: Server, tmp_path: Path, how: str) -> None:
    def hang(handler: Any) -> bool:
        if how == "slow":  # a byte now and then keeps every single wait short
            handler.send_response(200)
            handler.end_headers()
            while not server.released.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()
        server.released.wait(20)
        return True

    server.shape = [-1, 1, -1, -1, -1]
    model = load_model(written(tmp_path / "m", server, timeout_s=0.4), ["network"])
    server.odd = hang
    volume = mg.Volume(nets.scan(SIZE), nets.volume(SIZE).grid, "CT", "HU")
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"an answer .* within 0.4 s, got none"):
        mg.explain(volume, model, target=1)
    assert time.monotonic() - start < 5


def test_a_busy_server_is_asked_again(server: Server) -> None:
    model = load_model(server.url)
    server.busy = 3
    assert _explained(model).layer == "@input"
    server.busy = 99
    with pytest.raises(ModelError, match=r"it was busy 5 times \(503\)"):
        _explained(model)


def test_no_server_and_no_model(server: Server) -> None:
    with pytest.raises(ModelError, match=r"the model 'heart' at .* the server does not know it"):
        load_model(f"{server.root}/v2/models/heart")
    root = server.root
    server.close()
    with pytest.raises(ModelError, match="nothing answers there; is it running"):
        load_model(f"{root}/v2/models/lung")
