"""Which module of the source did an ONNX operator come from?

torch's older exporter writes it into the node's name (/layer4/layer4.0/conv1/Conv), its newer one
into metadata (pkg.torch.onnx.name_scopes). Other tools' names with slashes are read the same way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from med_gradcam.containers.flat import Path

Origin = list[tuple[str, str]]  # (name, class), outermost first
_QUOTED = re.compile(r"'([^'\\]*)'")
_LONGEST = 20_000  # characters of metadata that are looked at
_DEEPEST = 48  # modules inside each other
_TAKEN = frozenset((*dir(torch.nn.Module()), "finish", "_inputs", "_run", "_steps", "_outputs"))
_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"


def paths_of(names: Collection[str]) -> frozenset[Path]:
    """The modules that weights with these names (layer4.0.conv1.weight) belong to."""
    found: set[Path] = set()
    for name in names:
        parts = tuple(name.split("."))
        if all(parts) and len(parts) <= _DEEPEST:
            found.update(parts[:depth] for depth in range(1, len(parts)))
    return frozenset(found)


class Names:
    """The modules of the source for each node of a graph; `weights`: the names of its tensors."""

    def __init__(self, nodes: Sequence[Any], weights: Collection[str]) -> None:
        self.known = paths_of(weights)
        self.moved: dict[Path, Path] = {}
        self._find_moved(nodes, frozenset(weights))

    def origin(self, node: Any) -> Origin:
        """The modules that a node came from, under the names that their weights have."""
        found = origin(node, self.known)
        path = tuple(name for name, _ in found)
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.moved:
                kinds = [kind for _, kind in found]
                new = self.moved[path[:depth]]
                front = [""] * (len(new) - 1) + kinds[depth - 1 : depth] if new else []
                return [*zip(new, front, strict=True), *found[depth:]]
        return found

    def _find_moved(self, nodes: Sequence[Any], weights: frozenset[str]) -> None:
        """Modules that are called by one name and whose weights have another.

        Those that two lists of the source share (DynUNet.downsamples, .skip_layers); both names end
        alike.
        """
        doubtful: set[Path] = set()
        for node in nodes:
            called = tuple(name for name, _ in origin(node, self.known))
            named = {tuple(n.split(".")[:-1]) for n in node.input if n in weights}
            own = next(iter(named), ()) if len(named) == 1 else ()
            if not own or not called or called == own or called in self.known:
                continue
            same = 0
            while same < min(len(own), len(called)) and own[-1 - same] == called[-1 - same]:
                same += 1
            if not same:
                continue
            same -= 0 if len(called) > same and len(own) > same else 1
            old, new = called[: len(called) - same], own[: len(own) - same]
            if self.moved.setdefault(old, new) != new:
                doubtful.add(old)
        for path in doubtful:
            self.moved.pop(path)


def origin(node: Any, known: frozenset[Path]) -> Origin:
    """The modules that a node came from; `known`: those that have weights."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES and len(entry.value) <= _LONGEST:
            return _from_scopes(node, entry.value)
    parts = [part for part in node.name.split("/") if part][:-1]
    if not parts or len(parts) > _DEEPEST:
        return []
    path: Path = ()
    for part in parts:
        path = _deeper(path, part, known)
    return [(clean(name), "") for name in path[:_DEEPEST]]


def _from_scopes(node: Any, text: str) -> Origin:
    scopes = _QUOTED.findall(text)[:-1]  # the last one is the operation
    classes = next((e.value for e in node.metadata_props if e.key == _CLASSES), "")
    kinds = _QUOTED.findall(classes[:_LONGEST])
    if not scopes:
        return []
    kind_of = dict(zip(scopes, kinds, strict=False))
    path = tuple(part for part in scopes[-1].split(".") if part)[:_DEEPEST]
    made = []
    for depth, name in enumerate(path, start=1):
        kind = kind_of.get(".".join(path[:depth]), "").rpartition(".")[2]
        made.append((clean(name), kind if kind.isidentifier() else ""))
    return made


def _deeper(path: Path, part: str, known: frozenset[Path]) -> Path:
    """One step further in: the older exporter says layer4, then layer4.0 for its first child."""
    names = tuple(name for name in part.split(".") if name)
    tail = _tail(path)
    again = len(names) > len(tail) > 0 and names[: len(tail)] == tail
    below, inside = (*path, *names), (*path, *names[len(tail) :])
    if again and all(n.isdecimal() for n in names[len(tail) :]) and not _only(below, inside, known):
        return inside
    if below not in known and inside != below:
        ends = [p for p in known if p[: len(path)] == path and p[-len(names) :] == names]
        shortest = min(ends, key=len, default=below)
        return shortest if sum(len(p) == len(shortest) for p in ends) == 1 else below
    return below


def _only(one: Path, other: Path, known: frozenset[Path]) -> bool:
    return one in known and other not in known


def _tail(path: Path) -> Path:
    """The last name of a path with the numbers that follow it: (layer4, 0)."""
    at = len(path) - 1
    while at > 0 and path[at].isdecimal():
        at -= 1
    return path[max(at, 0) :]


def clean(name: str) -> str:
    """A name that a module can have: letters, digits and _, and none of torch's own."""
    made = re.sub(r"\W", "_", name)[:100] or "_"
    return f"{made}_" if made in _TAKEN or made.startswith("__") else made


def snake(word: str) -> str:
    """An operator's type as torch would call it: GlobalAveragePool, global_average_pool."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", clean(word)).lower()
