"""What is in an ONNX file, and can it be used without harm?

An ONNX file is data and runs nothing; but it can name files elsewhere, declare tensors of any size
and hold graphs that never end. All of this is looked at before any of it is used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ModelError, ResourceError

MOST_NODES = 100_000
MOST_BYTES = 2**31 - 1  # protobuf's own limit
OPSETS = range(7, 25)  # whose operators are known here
_OWN = ("", "ai.onnx")
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    **dict.fromkeys((21, 22, 23), 4),
    15: 128,
}


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """A file that was looked at: its ModelProto, all tensors inside, and its SHA-256."""

    proto: Any
    sha256: str
    opset: int


def package() -> Any:
    """The package onnx.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModelError(
            "an ONNX network needs the package onnx, which is not installed: "
            "pip install 'med_gradcam[onnx]'."
        ) from error
    return onnx


def read(path: Path) -> OnnxFile:
    """The file at a path, its external tensors read from beside it.

    Raises:
        ModelError: it is no ONNX file, is cut off, or must not be used.
    """
    onnx = package()
    raw = _bytes(path)
    sha = hashlib.sha256(raw)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(raw)
    except Exception as error:  # protobuf's own kind
        raise ModelError(
            f"expected an ONNX network in {path.name!r}, got a file that is cut off or of another "
            f"kind ({' '.join(str(error).split())[:80]})."
        ) from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(f"expected an ONNX network in {path.name!r}, got one without a graph.")
    _check_size(proto)
    _check_domains(proto)
    for name in _embedded(proto, path.parent):
        sha.update(name)
    opset = next((int(o.version) for o in proto.opset_import if o.domain in _OWN), 1)
    if proto.functions:
        from onnx import inliner

        proto = inliner.inline_local_functions(proto)
        _check_domains(proto)
    _check_order(proto.graph, ())
    return OnnxFile(proto, sha.hexdigest(), opset)


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ModelError(
                f"expected an ONNX file of at most 2 GiB in {path.name!r}, got {size} bytes; save "
                f"it with its tensors as external data."
            )
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"expected a readable ONNX file {path.name!r}, got: {error.strerror}."
        ) from error


# ------------------------------------------------------------------------------------ what is in it


def graphs_of(node: Any) -> Iterator[Any]:
    """The graphs inside a node (the branches of If, the body of Loop)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_of(nodes: Any) -> Iterator[Any]:
    """All nodes, those inside of others included."""
    for node in nodes:
        yield node
        for graph in graphs_of(node):
            yield from nodes_of(graph.node)


def _every_graph(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in graphs_of(node):
            yield from _every_graph(inner)


def _tensors(proto: Any) -> Iterator[Any]:
    """All tensors: initializers, constants and what else nodes hold."""
    for graph in _every_graph(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    held = [*nodes_of(proto.graph.node)]
    held += [node for function in proto.functions for node in nodes_of(function.node)]
    for node in held:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _check_size(proto: Any) -> None:
    """Refuse more nodes than any network has, also after functions have been put in place."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    known: dict[Any, int] = {}

    def count(nodes: Any, above: tuple[Any, ...]) -> int:
        total = 0
        for node in nodes_of(nodes):
            key = (node.domain, node.op_type)
            if key in above:
                raise ModelError(
                    f"expected an ONNX network that ends, got the function {node.op_type!r} that "
                    f"calls itself."
                )
            if key in functions and key not in known:
                known[key] = count(functions[key].node, (*above, key)) if len(above) < 64 else 0
            total += known.get(key, 1)
            if total > MOST_NODES:
                raise ModelError(
                    f"expected an ONNX network of at most {MOST_NODES} operators, got more."
                )
        return total

    count(proto.graph.node, ())


def _check_domains(proto: Any) -> None:
    own = {(f.domain, f.name) for f in proto.functions}
    held = [*nodes_of(proto.graph.node)]
    held += [node for function in proto.functions for node in nodes_of(function.node)]
    for node in held:
        if node.domain not in _OWN and (node.domain, node.op_type) not in own:
            raise ModelError(
                f"expected operators of ONNX itself, got {_short(node.domain)}::"
                f"{_short(node.op_type)}; export the network without operators of others."
            )


def _check_order(graph: Any, outside: tuple[set[str], ...]) -> None:
    """Refuse a graph that reads what is made later, or never, or twice."""
    known = {""}
    known.update(value.name for value in graph.input)
    known.update(value.name for value in graph.initializer)
    known.update(value.values.name for value in graph.sparse_initializer)
    for node in graph.node:
        for name in node.input:
            if not any(name in names for names in (known, *outside)):
                raise ModelError(
                    f"expected an ONNX network whose operators follow each other, got "
                    f"{_short(node.op_type)!r} that reads {_short(name)!r} before it is made (a "
                    f"cycle, or a part that is missing)."
                )
        for inner in graphs_of(node):
            _check_order(inner, (known, *outside))
        for name in node.output:
            if name and name in known:
                raise ModelError(
                    f"expected an ONNX network that makes each value once, got {_short(name)!r} "
                    f"twice."
                )
            known.add(name)
    for value in graph.output:
        if not any(value.name in names for names in (known, *outside)):
            raise ModelError(
                f"expected an ONNX network that makes its outputs, {_short(value.name)!r} is never "
                f"made."
            )


def _short(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:80])


# ----------------------------------------------------------------------------------------- tensors


def _embedded(proto: Any, folder: Path) -> Iterator[bytes]:
    """Put all external tensors inside, checking each; the bytes of their files, in order."""
    files: dict[str, bytes] = {}
    for tensor in _tensors(proto):
        if tensor.data_location == 1:
            where = {entry.key: entry.value for entry in tensor.external_data}
            name = where.get("location", "")
            if name not in files:
                files[name] = _beside(folder, name)
            tensor.raw_data = _part(files[name], where, tensor)
            tensor.ClearField("external_data")
            tensor.data_location = 0
        _check_tensor(tensor)
    for name in sorted(files):
        yield hashlib.sha256(files[name]).digest()


def _beside(folder: Path, name: str) -> bytes:
    """A file beside the network; nothing else may be named."""
    plain = name and name not in (".", "..") and not set(name) & set("/\\:\0")
    there = folder / name if plain else folder
    if not plain or there.is_symlink():
        raise ModelError(
            f"expected the tensors of an ONNX network in a file beside it, got the place "
            f"{_short(name)!r}, which could be any file of yours; it was not read."
        )
    if not there.is_file():
        raise ModelError(
            f"expected the tensors of the ONNX network in {_short(name)!r} beside it, there is no "
            f"such file."
        )
    try:
        return there.read_bytes()
    except MemoryError as error:
        raise ResourceError(f"not enough memory for the tensors in {_short(name)!r}.") from error


def _part(raw: bytes, where: Mapping[str, str], tensor: Any) -> bytes:
    try:
        start = int(where.get("offset", 0))
        length = int(where.get("length", _bytes_of(tensor)))
    except ValueError:
        start, length = -1, 0
    if start < 0 or length < 0 or start + length > len(raw):
        raise ModelError(
            f"expected the tensor {_short(tensor.name)!r} inside its file, which has {len(raw)} "
            f"bytes; it is cut off, or belongs to another network."
        )
    return raw[start : start + length]


def _bytes_of(tensor: Any) -> int:
    bits = _BITS.get(tensor.data_type, 0)
    return int(math.prod(tensor.dims) * bits + 7) // 8


def _check_tensor(tensor: Any) -> None:
    """Refuse a tensor that declares more, or fewer, elements than it has."""
    if any(n < 0 for n in tensor.dims) or tensor.HasField("segment"):
        raise ModelError(
            f"expected whole tensors in an ONNX network, got {_short(tensor.name)!r} with sides "
            f"{list(tensor.dims)[:8]}."
        )
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        fits = len(tensor.raw_data) == _bytes_of(tensor)
    elif tensor.data_type == 8:
        fits = len(tensor.string_data) == count
    else:
        found = (tensor.float_data, tensor.int32_data, tensor.int64_data)
        sizes = [len(one) for one in (*found, tensor.double_data, tensor.uint64_data)]
        pairs = 2 * count if tensor.data_type in (14, 15) else count
        four = (count + 1) // 2 if _BITS.get(tensor.data_type) == 4 else pairs
        fits = max(sizes) in (pairs, four)
    if not fits:
        raise ModelError(
            f"expected as many numbers as declared in the tensor {_short(tensor.name)!r} of an "
            f"ONNX network, which says {' x '.join(map(str, tensor.dims[:8])) or 'one'}; the file "
            f"is damaged, or made to fill the memory."
        )


def numbers_of(tensor: Any) -> npt.NDArray[Any]:
    """A tensor of the file as an array.

    Raises:
        ModelError: its elements are of no known kind.
    """
    onnx = package()
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"expected numbers in the tensor {_short(tensor.name)!r} of an ONNX network, got: "
            f"{' '.join(str(error).split())[:100]}."
        ) from error
