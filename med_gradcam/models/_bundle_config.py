"""What does a bundle's configuration say, with its references resolved as data?

JSON or YAML (safe loader). "@a::b" and "@a#b" name another value, "%file.json::a" a value of
another file of the configs folder; "$..." is an expression (_bundle_words). Nothing is executed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from med_gradcam.errors import ModelError
from med_gradcam.models._bundle_files import MOST_CONFIG, Files
from med_gradcam.models._bundle_words import Code, evaluated

MOST_DEPTH, MOST_VALUES = 64, 200_000
_SEPARATOR = re.compile(r"::|#")
_MACRO = re.compile(r"%(?:(?P<file>[^%#]*?\.(?:json|ya?ml))(?:(?:::|#)(?P<key>.*))?|(?P<own>\w.*))")


def read_config(files: Files, name: str) -> dict[str, Any]:
    """The mapping in a configuration file of a bundle.

    Raises:
        ModelError: it is too large, no JSON or YAML, or no mapping.
    """
    raw = files.read(name, MOST_CONFIG)
    try:
        text = raw.decode("utf-8")
        found = json.loads(text) if name.endswith(".json") else _yaml(text, files.name, name)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ModelError(f"expected JSON in {files.name}/{name}, got: {why}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"expected a mapping in {files.name}/{name}, got {type(found).__name__}.")
    return found


def _yaml(text: str, bundle: str, name: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ModelError(
            f"{bundle}/{name} is YAML, which needs a package that is not installed: "
            f"pip install pyyaml."
        ) from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"expected plain YAML in {bundle}/{name}, got: {why}.") from error


@dataclass(slots=True)
class Config:
    """One configuration file and what its references mean; `lenient` leaves code as Code."""

    files: Files
    name: str
    data: dict[str, Any]
    lenient: bool = False
    left: int = MOST_VALUES
    under_way: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The resolved value of a key such as "network_def"; None where there is none."""
        return self.resolved(self.data[key]) if key in self.data else None

    def resolved(self, value: Any, depth: int = 0) -> Any:
        """A value with all that is inside it resolved.

        Raises:
            ModelError: references that go round, too much, or an expression that is code.
        """
        self.left -= 1
        if depth > MOST_DEPTH or self.left < 0:
            raise ModelError(
                f"expected at most {MOST_DEPTH} levels and {MOST_VALUES} values in "
                f"{self.where}, got more; its references multiply."
            )
        if isinstance(value, dict):
            return {str(k): self.resolved(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.resolved(v, depth + 1) for v in value]
        if not isinstance(value, str):
            return value
        read = {"@": self._reference, "%": self._macro, "$": self._expression}.get(value[:1])
        return value if read is None else read(value, depth)

    def _reference(self, text: str, depth: int) -> Any:
        return self.named(text[1:], depth)

    def _expression(self, text: str, depth: int) -> Any:
        try:
            return evaluated(text[1:], lambda name: self.named(name, depth + 1))
        except ModelError:
            if not self.lenient or self.left < 0:
                raise
            return Code(text)

    @property
    def where(self) -> str:
        """The file, for messages."""
        return f"{self.files.name}/{self.name}"

    def named(self, name: str, depth: int = 0) -> Any:
        """The resolved value that "@name" names."""
        if name in self.under_way:
            way = " -> ".join([*self.under_way, name])
            raise ModelError(f"expected references that end in {self.where}, got {way}.")
        self.under_way.append(name)
        try:
            return self.resolved(self.raw(name), depth + 1)
        finally:
            self.under_way.pop()

    def raw(self, name: str) -> Any:
        """The value at "a::b" or "a#b", nothing resolved but references on the way."""
        value: Any = self.data
        for part in _SEPARATOR.split(name):
            if isinstance(value, str) and value.startswith("@"):
                value = self.named(value[1:])
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise ModelError(f"expected {name!r} in {self.where}, found no {part!r}.")
        return value

    def _macro(self, text: str, depth: int) -> Any:
        found = _MACRO.fullmatch(text)
        if found is None:
            raise ModelError(f"expected %file.json::key in {self.where}, got {text[:80]!r}.")
        if found["own"] is not None:
            return self.named(found["own"], depth)
        name = found["file"].removeprefix("./").removeprefix("configs/")
        path = f"configs/{name}"
        if "/" in name or "\\" in name or name.startswith(".") or not self.files.has(path):
            raise ModelError(
                f"expected a file of the bundle's configs folder after % in {self.where}, "
                f"got {text[:80]!r}; nothing outside is read."
            )
        if text in self.under_way:
            raise ModelError(f"expected macros that end in {self.where}, got {text!r} in itself.")
        other = Config(self.files, path, read_config(self.files, path), self.lenient, self.left)
        other.under_way = [*self.under_way, text]
        made = (
            other.named(found["key"], depth) if found["key"] else other.resolved(other.data, depth)
        )
        self.left = other.left
        return made
