"""Model files that attack who loads them; each leaves the file MARKER behind when it succeeds."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MARKER = "attacked"


class Runs:
    """Unpickled, it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def touch(folder: Path) -> str:
    return f"touch {folder / MARKER}"


def attacked(folder: Path) -> bool:
    return (folder / MARKER).exists()


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3, 4)))  # type: ignore[no-any-return]


class Writes(torch.nn.Module):
    """Its forward saves what it was given."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.place)
        return self.conv(x).mean((2, 3, 4))  # type: ignore[no-any-return]


class WritesAtLoading(torch.nn.Module):
    """Its __setstate__ saves a tensor."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.place, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.place = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3, 4))


def script(net: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), path)
    return path


def members(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def rezip(path: Path, parts: Mapping[str, bytes], pack: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", pack) as made:
        for name, raw in parts.items():
            made.writestr(zipfile.ZipInfo(name), raw, pack)
    return path


def changed(path: Path, source: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive with its members changed."""
    parts = members(source.read_bytes())
    change(parts)
    return rezip(path, parts)


def pickled(path: Path, folder: Path) -> Path:
    """A checkpoint of torch.save with a command in it."""
    torch.save({"net": Small().state_dict(), "epoch": Runs(touch(folder))}, path)
    return path


def legacy(path: Path, folder: Path) -> Path:
    """The same as one bare pickle, as old tools write them."""
    path.write_bytes(pickle.dumps(Runs(touch(folder))))
    return path


def program(path: Path) -> Path:
    """An honest .pt2 file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(Small().eval(), (torch.rand(1, 1, 6, 6, 6),))
        torch.export.save(exported, path)
    return path


def program_with_inputs(path: Path, folder: Path) -> Path:
    """A .pt2 file whose sample inputs are a pickle with a command in it."""
    buffer = io.BytesIO()
    torch.save(Runs(touch(folder)), buffer)

    def spoil(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if "sample_inputs" in n)
        parts[name] = buffer.getvalue()

    return changed(path, program(path.with_suffix(".honest")), spoil)


def program_with_expression(path: Path, folder: Path) -> Path:
    """A .pt2 file with a size that is an expression, which sympy evaluates as Python."""
    evil = f"__import__('os').system({touch(folder)!r})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=8)
        exported = torch.export.export(
            Small().eval(), (torch.rand(2, 1, 6, 6, 6),), dynamic_shapes=({0: batch},)
        )
        torch.export.save(exported, path.with_suffix(".honest"))

    def poison(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: evil if k == "expr_str" else poison(v) for k, v in part.items()}
        return [poison(v) for v in part] if isinstance(part, list) else part

    def spoil(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("models/model.json"))
        parts[name] = json.dumps(poison(json.loads(parts[name]))).encode()

    return changed(path, path.with_suffix(".honest"), spoil)


def declared(source: Path, path: Path, numbers: int) -> Path:
    """A checkpoint whose first tensor declares `numbers` values and brings a few bytes."""

    def spoil(parts: dict[str, bytes]) -> None:
        name = next(n for n in parts if n.endswith("/data.pkl"))
        parts[name] = pickle.dumps(numbers, 2)[2:-1].join(parts[name].split(b"K6", 1))

    return changed(path, source, spoil)


def huge_header(path: Path) -> Path:
    """A safetensors file that declares a tensor of 10 GB and brings eight bytes."""
    entry = {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}
    header = json.dumps({"0.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    return path
