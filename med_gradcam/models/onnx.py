"""A network as an ONNX file, opened into torch modules; nothing in it is executed.

Labels and input come from NAME.onnx.json beside it (as a spec.json), else from its own metadata
(`med_gradcam` with such an object, or labels), else channels and sides from its input. Where an
operator cannot be opened the network runs whole, and only methods without gradients explain it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from med_gradcam.containers import onnx_build, onnx_file, onnx_whole
from med_gradcam.containers.onnx_graph import Input
from med_gradcam.containers.onnx_node import NoFormError
from med_gradcam.errors import ModelError
from med_gradcam.model import InputSpec, Model
from med_gradcam.models import _spec
from med_gradcam.target import Link

TITLE = "ONNX file (.onnx), opened operator by operator; nothing is executed"
_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_GRAPH, _OPSETS = 7, 8
_ENDS: dict[str, Link] = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
_LABELS = ("labels", "class_names", "classes", "names")


def sniff(path: str) -> bool:
    """Whether the file is a protobuf message with the fields of an ONNX model, or is named so."""
    there = Path(path)
    if not there.is_file():
        return False
    if there.suffix.lower() == ".onnx":
        return True  # one that is cut off, or no ONNX, is told so by load
    try:
        with there.open("rb") as file:
            fields = set(_fields(file, there.stat().st_size))
    except OSError:
        return False
    return {_GRAPH, _OPSETS} <= fields


def _fields(file: Any, size: int) -> Iterator[int]:
    """The field numbers of a protobuf message; nothing once it cannot be an ONNX model."""
    found = []
    while file.tell() < size:
        tag = _varint(file)
        number, wire = tag >> 3, tag & 7
        if _FIELDS.get(number) != wire:
            return
        length = _varint(file)
        if wire == 2:
            file.seek(length, 1)
        if length < 0 or file.tell() > size:
            return
        found.append(number)
    yield from found


def _varint(file: Any) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return -1
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return int(value)
    return -1


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The network in an ONNX file, in eval mode on the CPU.

    Raises:
        ModelError: it is no ONNX file, is damaged, or reaches outside of its folder.
    """
    del trust  # protobuf is data
    there = Path(path)
    file = onnx_file.read(there)
    beside = there.with_name(there.name + ".json")
    own = _own(file.proto)
    spec: dict[str, Any] | None
    spec, where = (_spec.read(beside), beside) if beside.is_file() else _own_spec(own, there)
    notes: list[str] = []
    link: Link = "softmax"
    if spec is None or spec.get("link") != "none":
        link = _taken_off(file.proto, file.opset, notes)
    net = _network(file)
    if spec is not None:
        return _noted(_spec.model(net, spec, where, file.sha256), notes)
    labels = _labels(own)
    first = onnx_build.inputs_of(file.proto.graph)
    model = Model(
        net=net,
        input=_input(first[0] if first else None),
        labels=labels,
        link=link,
        name=_printable(file.proto.graph.name) or "ONNX network",
        weights_sha256=file.sha256,
    )
    return _noted(model, [*notes, _assumed(model, there.name, known=bool(notes))])


def _network(file: onnx_file.OnnxFile) -> torch.nn.Module:
    try:
        net = onnx_build.network(file)
    except NoFormError as error:
        return onnx_whole.OnnxWhole(file.proto, error.clause).eval()
    if onnx_whole.has_runtime():  # what the opened network gives is compared with it
        net.__dict__["_program"] = onnx_whole.Source(file.proto)
    return net


def _taken_off(proto: Any, opset: int, notes: list[str]) -> Link:
    """Take a last softmax or sigmoid off, whose input are the logits; the link that it stands for.

    Scores are explained as logits here: behind a softmax each would depend on all others twice.
    """
    graph = proto.graph
    if len(graph.output) != 1:
        return "softmax"
    out = graph.output[0]
    last = next((node for node in graph.node if out.name in node.output), None)
    if last is None or last.op_type not in _ENDS or last.domain not in ("", "ai.onnx"):
        return "softmax"
    made = {name for node in graph.node for name in node.output}
    if last.op_type == "Softmax" and not _over_classes(last, out, opset):
        return "softmax"
    if last.input[0] not in made or any(out.name in node.input for node in graph.node):
        return "softmax"
    notes.append(
        f"the ONNX network ends in a {last.op_type.lower()}, which was taken off: what stands "
        f"before it are the scores"
    )
    out.name = last.input[0]
    graph.node.remove(last)
    return _ENDS[last.op_type]


def _over_classes(last: Any, out: Any, opset: int) -> bool:
    rank = len(out.type.tensor_type.shape.dim)
    axis = next((int(a.i) for a in last.attribute if a.name == "axis"), 1 if opset < 13 else -1)
    if opset < 13 and axis == 1:
        return rank in (0, 2)
    return axis == 1 or (axis == -1 and rank == 2)


def _own(proto: Any) -> dict[str, str]:
    return {str(entry.key): str(entry.value) for entry in proto.metadata_props}


def _own_spec(own: Mapping[str, str], there: Path) -> tuple[dict[str, Any] | None, Path]:
    where = there.with_name(f"{there.name} (metadata)")
    if "med_gradcam" not in own:
        return None, where
    try:
        spec = json.loads(own["med_gradcam"])
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"expected readable JSON as med_gradcam in the metadata of {there.name!r}, got: "
            f"{error}."
        ) from error
    if not isinstance(spec, dict) or spec.get("format") != _spec.FORMAT:
        raise ModelError(
            f"expected format {_spec.FORMAT!r} as med_gradcam in the metadata of {there.name!r}."
        )
    return spec, where


def _labels(own: Mapping[str, str]) -> tuple[str, ...]:
    """Labels from metadata: a JSON list, a JSON object of index -> label, or lines or commas."""
    text = next((own[key] for key in _LABELS if key in own), "")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text.splitlines() if "\n" in text.strip() else text.split(",")
    if isinstance(found, dict) and all(str(key).isdigit() for key in found):
        found = [found[key] for key in sorted(found, key=int)]
    if not isinstance(found, list):
        return ()
    labels = tuple(str(label).strip() for label in found)
    fits = all(labels) and len(set(labels)) == len(labels) and all(map(str.isprintable, labels))
    return labels if fits else ()


def _input(first: Input | None) -> InputSpec:
    shape = None if first is None else first.shape
    if not shape or len(shape) not in (4, 5):
        return InputSpec()
    sides = [int(side or 0) for side in shape[2:]]
    patch = (sides[0], sides[1], sides[2]) if len(sides) == 3 and all(sides) else None
    return InputSpec(channels=shape[1] or 1, patch=patch)


def _assumed(model: Model, name: str, *, known: bool) -> str:
    own = model.input
    sides = "" if own.patch is None else f" of {' x '.join(str(n) for n in own.patch)} voxels"
    missing = ["no intensity steps, axes or spacing"]
    missing += [] if model.labels else ["no labels"]
    link = "" if known else f", {model.link} assumed"
    s = "" if own.channels == 1 else "s"
    return (
        f"the ONNX file says only what its input is ({own.channels} channel{s}{sides}): "
        f"{', '.join(missing)}{link}; say more in {name}.json beside it"
    )


def _noted(model: Model, notes: list[str]) -> Model:
    from dataclasses import replace

    return replace(model, notes=(*model.notes, *notes))


def _printable(text: str) -> str:
    return text[:100] if text.isprintable() else ""
