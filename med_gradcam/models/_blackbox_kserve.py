"""How are scores asked of a server that speaks KServe's protocols, v2 (Triton's) or v1?

Nothing but the voxels of the network's input, their shape and type is sent.
Source: Open Inference Protocol v2, binary tensor data extension, and KServe's v1 protocol
(kserve.github.io/website, docs/concepts/architecture/data-plane).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.blackbox import short
from med_gradcam.errors import ModelError
from med_gradcam.models._blackbox_http import Address, Reply, Wire, address

_MODEL = re.compile(r"(?P<base>.*)/(?P<version>v[12])/models/(?P<name>[^/:]+)(?P<rest>.*)")
_REST = {"v2": re.compile(r"((/versions/[^/]+)?)(/infer)?"), "v1": re.compile(r"()(:predict)?")}
_TYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_BINARY = "binary_tensor_data"
_LENGTH = "Inference-Header-Content-Length"

Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model at a server: `protocol` v1 or v2, the `root` of the server's paths, the model's.

    `input` and `output`: the tensors meant, where there are several; "" for the only one.
    """

    wire: Wire
    protocol: str
    root: str
    model: str
    input: str = ""
    output: str = ""


def endpoint(url: str, timeout_s: float = 60.0, names: tuple[str, str] = ("", "")) -> Endpoint:
    """The endpoint that a URL names.

    Raises:
        ModelError: the URL names no model.
    """
    where: Address = address(url)
    found = _MODEL.fullmatch(where.path)
    rest = _REST[found["version"]].fullmatch(found["rest"]) if found else None
    if found is None or rest is None:
        raise ModelError(
            f"expected the URL of a model, .../v2/models/NAME or .../v1/models/NAME:predict, got "
            f"the path {short(where.path)!r} at {where.words}."
        )
    version = found["version"]
    path = f"{found['base']}/{version}/models/{found['name']}{rest[1]}"
    return Endpoint(Wire(where, timeout_s), version, f"{found['base']}/{version}", path, *names)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a model's metadata; sides that are free are -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class V2:
    """A model asked by the v2 protocol, in JSON, or in `binary` where the server says it can."""

    at: Endpoint
    input: Tensor
    output: str
    binary: bool = False
    version: str = ""

    @property
    def channels(self) -> int:
        """Channels that its input has; -1 where they are free."""
        return self.input.shape[-4]

    @property
    def sides(self) -> tuple[int, ...]:
        """Voxels along each axis of its input; -1 where they are free."""
        return self.input.shape[-3:]

    @property
    def most(self) -> int | None:
        """The batch that it is made for; None for any."""
        if len(self.input.shape) == 4:
            return 1
        return None if self.input.shape[0] == -1 else self.input.shape[0]

    def __call__(self, volumes: Floats) -> Scores:
        """Scores (n, ...) of volumes (n, C, I, J, K)."""
        array = volumes[0] if len(self.input.shape) == 4 else volumes
        array = np.ascontiguousarray(array, dtype=_TYPES[self.input.datatype])
        scores = _tensor(*self._asked(array), self.output, self.at)
        return scores[None] if len(self.input.shape) == 4 else scores

    def _asked(self, array: npt.NDArray[Any]) -> tuple[Mapping[str, Any], bytes]:
        """The answer's JSON, and the bytes behind it."""
        tensor: dict[str, Any] = {
            "name": self.input.name,
            "shape": list(array.shape),
            "datatype": self.input.datatype,
        }
        wanted: dict[str, Any] = {"name": self.output}
        headers = {"Content-Type": "application/json"}
        if not self.binary:
            tensor["data"] = array.ravel().tolist()
            body = _json({"inputs": [tensor], "outputs": [wanted]})
        else:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            wanted["parameters"] = {"binary_data": True}
            head = _json({"inputs": [tensor], "outputs": [wanted]})
            headers = {"Content-Type": "application/octet-stream", _LENGTH: str(len(head))}
            body = head + array.tobytes()
        reply = self.at.wire.ask("POST", f"{self.at.model}/infer", body, headers)
        size = reply.headers.get(_LENGTH.lower(), "")
        head_end = int(size) if size.isdecimal() and len(size) < 12 else len(reply.body)
        return _read(reply, self.at, head_end), reply.body[head_end:]


@dataclass(frozen=True, slots=True)
class V1:
    """A model asked by the v1 protocol: instances in, predictions out, all in JSON."""

    at: Endpoint

    def __call__(self, volumes: Floats) -> Scores:
        """Scores (n, ...) of volumes (n, C, I, J, K)."""
        body = _json({"instances": volumes.tolist()})
        headers = {"Content-Type": "application/json"}
        reply = self.at.wire.ask("POST", f"{self.at.model}:predict", body, headers)
        rows = _read(reply, self.at, len(reply.body)).get("predictions")
        if not isinstance(rows, list):
            raise _odd(self.at, "no list of predictions")
        return _numbers([self._row(row) for row in rows], self.at)

    def _row(self, row: object) -> object:
        """The numbers of one prediction, which may be one of several named outputs."""
        if not isinstance(row, dict):
            return row
        name = self.at.output or (next(iter(row)) if len(row) == 1 else "")
        if name not in row:
            raise _odd(self.at, f"outputs {_listed([str(key) for key in row])}; name one as output")
        return row[name]


def connect(at: Endpoint) -> V1 | V2:
    """The model at an endpoint, after a look at what the server says of it.

    Raises:
        ModelError: no such model, or none of one volume.
    """
    reply = at.wire.ask("GET", at.model)
    if reply.status == 404:
        raise ModelError(
            f"expected the model {at.model.rpartition('/')[2]!r} at {at.wire.address.words}, the "
            f"server does not know it."
        )
    if at.protocol == "v1":
        return V1(at)
    about = _read(reply, at, len(reply.body))
    tensor = _chosen(_tensors(about.get("inputs"), at), at.input, "input", at)
    output = _chosen(_tensors(about.get("outputs"), at), at.output, "output", at)
    if tensor.datatype not in _TYPES or len(tensor.shape) not in (4, 5):
        raise ModelError(
            f"expected an input (n, C, I, J, K) of {', '.join(_TYPES)} from the model at "
            f"{at.wire.address.words}, it takes {tensor.datatype} {list(tensor.shape)}."
        )
    versions = about.get("versions")
    version = str(versions[-1]) if isinstance(versions, list) and versions else ""
    return V2(at, tensor, output.name, _speaks_binary(at), short(version))


def _speaks_binary(at: Endpoint) -> bool:
    """Whether the server says that it takes tensors as they are."""
    reply = at.wire.ask("GET", at.root)
    if reply.status != 200:
        return False
    try:
        known = json.loads(reply.body).get("extensions")
    except (ValueError, RecursionError, AttributeError):
        return False
    return isinstance(known, list) and _BINARY in known


def _tensors(listed: object, at: Endpoint) -> list[Tensor]:
    """The tensors of a model's metadata."""
    found = []
    for one in listed if isinstance(listed, list) else []:
        kind, shape = (one.get("datatype"), one.get("shape")) if isinstance(one, dict) else ("", 0)
        if not isinstance(shape, list) or not all(_whole(n) for n in shape):
            raise _odd(at, "metadata without a shape")
        sides = tuple(int(n) for n in shape)
        found.append(Tensor(short(str(one.get("name"))), short(str(kind)), sides))
    if not found:
        raise _odd(at, "metadata without inputs and outputs")
    return found


def _whole(number: object) -> bool:
    text = str(number)  # some servers write them as texts
    return bool(re.fullmatch(r"-1|\d{1,9}", text))


def _chosen(found: Sequence[Tensor], name: str, what: str, at: Endpoint) -> Tensor:
    """The tensor of that name, or the only one."""
    named = [tensor for tensor in found if tensor.name == name]
    if named or (not name and len(found) == 1):
        return (named or list(found))[0]
    raise ModelError(
        f"expected one {what} of the model at {at.wire.address.words}"
        f"{f' called {name!r}' if name else ''}, it has {_listed([t.name for t in found])}"
        f"{'' if name else f'; name one as {what} in its spec'}."
    )


def _listed(names: Sequence[str]) -> str:
    return short(", ".join(names))


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise ModelError(
            "expected finite voxels to send to a server, the network's input holds NaN or "
            "infinite ones; check the intensity steps."
        ) from error


def _odd(at: Endpoint, got: str) -> ModelError:
    return ModelError(
        f"expected an answer of the KServe {at.protocol} protocol from the server "
        f"{at.wire.address.words}, got {got}."
    )


def _read(reply: Reply, at: Endpoint, end: int) -> Mapping[str, Any]:
    """The JSON of an answer.

    Raises:
        ModelError: the server says that something is wrong, or says no JSON.
    """
    try:
        value = json.loads(reply.body[:end])
    except (ValueError, RecursionError):
        value = None
    told = value.get("error") if isinstance(value, dict) else None
    if reply.status != 200 or told:
        why = short(str(told) if told else reply.body[:400].decode("utf-8", "replace"))
        raise ModelError(
            f"expected scores from the server {at.wire.address.words}, it answered "
            f"{reply.status}: {why or 'nothing'}."
        )
    if not isinstance(value, dict):
        raise _odd(at, f"{short(reply.body[:60].decode('utf-8', 'replace'))!r}")
    return value


def _tensor(answer: Mapping[str, Any], rest: bytes, name: str, at: Endpoint) -> Scores:
    """The scores in a v2 answer, as JSON or as the bytes behind it."""
    start = 0
    outputs = answer.get("outputs")
    for one in outputs if isinstance(outputs, list) else []:
        if not isinstance(one, dict):
            break
        own = one.get("parameters")
        size = own.get("binary_data_size") if isinstance(own, dict) else None
        end = start + (size if isinstance(size, int) and size >= 0 else 0)
        if one.get("name") == name:
            shape = one.get("shape")
            if not isinstance(shape, list) or not all(_whole(n) and int(n) >= 0 for n in shape):
                raise _odd(at, f"the output {name!r} without a shape")
            values = _numbers(one.get("data"), at).ravel()
            if size is not None:
                values = _from_bytes(rest[start:end], one.get("datatype"), at)
            sides = [int(n) for n in shape]
            if math.prod(sides) != values.size:
                raise _odd(at, f"{values.size} numbers for the output {name!r} of shape {sides}")
            return values.reshape(sides)
        start = end
    raise _odd(at, f"no output {name!r}")


def _from_bytes(raw: bytes, datatype: object, at: Endpoint) -> Scores:
    kind = _TYPES.get(str(datatype))
    if kind is None or len(raw) % np.dtype(kind).itemsize:
        raise _odd(at, f"{len(raw)} bytes of {short(str(datatype))}")
    return np.frombuffer(raw, dtype=kind).astype(np.float64)


def _numbers(values: object, at: Endpoint) -> Scores:
    """Numbers of JSON as an array."""
    try:
        array = np.asarray([] if values is None else values)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf":
        raise _odd(at, "scores that are no numbers, or not the same count for each volume")
    return array.astype(np.float64)
