"""A KServe server on this machine, in a thread, for tests: v2 in JSON and bytes, and v1."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

SIZE = 8
_KINDS = {"FP32": "<f4", "FP64": "<f8", "FP16": "<f2"}
_LENGTH = "Inference-Header-Content-Length"
Odd = Callable[["Handler"], bool]


class Quiet(ThreadingHTTPServer):
    """Its clients hang up in the middle, which is no error here."""

    daemon_threads = True
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    """One question."""

    @property
    def owner(self) -> Server:
        assert isinstance(self.server, Quiet)
        return self.server.owner

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def reply(
        self, body: bytes, headers: Mapping[str, str] | None = None, status: int = 200
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.owner.asked.append(("GET", self.path))
        known: dict[str, dict[str, Any]] = {
            "/v2": {"extensions": ["binary_tensor_data"] if self.owner.binary else []},
            "/v2/models/lung": self.owner.metadata(),
            "/v2/models/lung/versions/3": self.owner.metadata(),
            "/v1/models/lung": {"name": "lung", "ready": True},
        }
        if self.path in known:
            self.reply(json.dumps(known[self.path]).encode())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.owner.asked.append(("POST", self.path))
        self.owner.bodies.append(str(self.headers).encode() + body)
        if self.owner.busy:
            self.owner.busy -= 1
            self.send_error(503)
        elif self.owner.odd(self):
            return
        elif self.path == "/v1/models/lung:predict":
            rows = self.owner.scores(np.array(json.loads(body)["instances"])).tolist()
            self.reply(json.dumps({"predictions": rows}).encode())
        else:
            assert self.path.endswith("/infer")
            self.v2(body)

    def v2(self, body: bytes) -> None:
        head = int(self.headers.get(_LENGTH, len(body)))
        asked = json.loads(body[:head])
        (tensor,), (wanted,) = asked["inputs"], asked["outputs"]
        kind = _KINDS[tensor["datatype"]]
        if head < len(body):
            assert tensor["parameters"] == {"binary_data_size": len(body) - head}
            volumes = np.frombuffer(body[head:], dtype=kind)
        else:
            volumes = np.array(tensor["data"], dtype=kind)
        volumes = volumes.reshape(tensor["shape"])
        batched = volumes.ndim == 5
        found = self.owner.scores(volumes if batched else volumes[None])
        self.tensors(found if batched else found[0], wanted)

    def tensors(self, found: npt.NDArray[np.float32], wanted: dict[str, Any]) -> None:
        """The output behind another one that was not asked for, as servers may."""
        shape = list(found.shape)
        out: dict[str, Any] = {"name": wanted["name"], "datatype": "FP32", "shape": shape}
        other: dict[str, Any] = {"name": "aside", "datatype": "FP32", "shape": [1]}
        if not wanted.get("parameters", {}).get("binary_data"):
            other["data"], out["data"] = [1.0], found.ravel().tolist()
            self.reply(json.dumps({"outputs": [other, out]}).encode())
            return
        other["parameters"] = {"binary_data_size": 4}
        out["parameters"] = {"binary_data_size": found.nbytes}
        head = json.dumps({"outputs": [other, out]}).encode()
        body = head + b"\1\2\3\4" + found.astype("<f4").tobytes()
        self.reply(body, {_LENGTH: str(len(head))})


class Server:
    """What it says of itself, what it was asked, and `odd`, which may answer in its place."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.binary = True
        self.shape: Any = [-1, 1, SIZE, SIZE, SIZE]
        self.datatype = "FP32"
        self.inputs, self.outputs = ["scan"], ["logits"]
        self.busy = 0
        self.odd: Odd = lambda _: False
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.batches: list[int] = []
        self.released = threading.Event()
        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.owner = self
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.root}/v2/models/lung"

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(5)

    def scores(self, volumes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        self.batches.append(len(volumes))
        with torch.no_grad():
            out: npt.NDArray[np.float32] = self.net(torch.tensor(volumes).float()).numpy()
        return out

    def metadata(self) -> dict[str, Any]:
        ins = [(name, self.shape) for name in self.inputs]
        outs = [(name, [-1, 2]) for name in self.outputs]
        made = [
            [{"name": name, "datatype": self.datatype, "shape": shape} for name, shape in some]
            for some in (ins, outs)
        ]
        return {"name": "lung", "versions": ["3"], "inputs": made[0], "outputs": made[1]}


def written(folder: Path, server: Server, **more: Any) -> str:
    """A folder with a spec.json for this server."""
    spec = {
        "format": "med-gradcam-model/1",
        "name": "lung nodule",
        "endpoint": server.url,
        "input": {"modality": "CT", "axes": "RAS", "patch": [SIZE] * 3},
        "labels": ["no", "yes"],
        "link": "softmax",
        **more,
    }
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return str(folder)
