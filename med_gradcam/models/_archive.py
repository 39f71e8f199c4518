"""What is in a zip archive that holds a model, and is it built as an honest one is?

Nothing is ever unpacked to disk. What was checked is written together anew for who reads it next,
so that no other reader can see something else in the same bytes.
"""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from med_gradcam.errors import ModelError, ResourceError
from med_gradcam.models import _trust

_MOST_MEMBERS = 200_000
_MOST_GROWTH = 100  # times the archive's own size; weights hardly shrink, programs tenfold
_FREE = 1 << 24  # bytes that any archive may unpack to
_ZIP = b"PK\x03\x04"
_TORCH = (".ts", ".pt", ".pt2", ".pth")
_MOST_TEXT = 1 << 28  # bytes of one program or pickle


def names(path: str) -> tuple[str, ...]:
    """The members of a zip archive, without the folder that holds them all; none if it is none."""
    there = Path(path)
    try:
        if not there.is_file() or there.stat().st_size < 22 or not zipfile.is_zipfile(there):
            return ()
        with zipfile.ZipFile(there) as opened:
            return tuple(name.partition("/")[2] for name in opened.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return ()


def cut(path: str) -> str:
    """Why a file cannot be what torch writes: it is empty, or a zip archive without its end."""
    there = Path(path)
    try:
        if not there.is_file():
            return ""
        with there.open("rb") as file:
            begins = file.read(4)
        if begins == _ZIP and not zipfile.is_zipfile(there):
            return "is cut off: it begins as a zip archive and has no end"
    except (OSError, ValueError):
        return ""
    return "is empty" if not begins and there.suffix.lower() in _TORCH else ""


@dataclass(frozen=True)
class Archive:
    """A zip archive in memory whose structure was checked: `name` for people, `raw` its bytes."""

    name: str
    raw: bytes

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return _trust.digest(self.raw)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each member, by its name within the folder that holds them all."""
        with self._opened() as opened:
            return {i.filename.partition("/")[2]: i.file_size for i in opened.infolist()}

    @cached_property
    def folders(self) -> frozenset[str]:
        """The folders at the top; torch writes one, named after the file."""
        with self._opened() as opened:
            return frozenset(name.partition("/")[0] for name in opened.namelist())

    def _opened(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BytesIO(self.raw))

    def text(self, name: str) -> bytes:
        """The bytes of a program, a pickle or a description.

        Raises:
            ModelError: it is damaged, or larger than any honest one.
        """
        with self._opened() as opened:
            for info in opened.infolist():
                if info.filename.partition("/")[2] == name:
                    if info.file_size > _MOST_TEXT:
                        raise ModelError(
                            f"expected at most {_MOST_TEXT >> 20} MB as {name!r} of {self.name!r}, "
                            f"it declares {info.file_size >> 20}."
                        )
                    return _bytes(opened, info, self.name)
        raise ModelError(f"expected a member {name!r} in {self.name!r}, it has none.")

    def anew(self) -> io.BytesIO:
        """The same members written together anew, stored one after the other."""
        made = io.BytesIO()
        with self._opened() as opened, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as copy:
            for info in opened.infolist():
                if not info.is_dir():
                    plain = zipfile.ZipInfo(info.filename)
                    copy.writestr(plain, _bytes(opened, info, self.name))
        made.seek(0)
        return made


def _bytes(opened: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> bytes:
    try:
        return opened.read(info)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"expected an undamaged archive in {name!r}, its member {info.filename!r} cannot be "
            f"read: {error}."
        ) from error
    except Exception as error:  # zlib's own error is none of these
        raise ModelError(
            f"expected an undamaged archive in {name!r}, {info.filename!r} cannot be unpacked."
        ) from error


def read(path: str) -> Archive:
    """An archive whose members have plain names, honest sizes and no links.

    Raises:
        ModelError: it has not, naming the member.
        ResourceError: it does not fit into memory.
    """
    there = Path(path)
    try:
        archive = Archive(there.name, there.read_bytes())
        with archive._opened() as opened:  # noqa: SLF001 - its own class
            infos = opened.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelError(f"expected a readable archive in {there.name!r}, got: {error}.") from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to read {there.name!r}.") from error
    for what in _faults(infos, len(archive.raw)):
        raise ModelError(
            f"expected an archive as torch writes it in {there.name!r}, it holds {what}; "
            f"nothing of it was read."
        )
    return archive


def plain(path: str) -> Archive:
    """A file that is no archive, as it is; it has no members.

    Raises:
        ModelError: it cannot be read.
        ResourceError: it does not fit into memory.
    """
    there = Path(path)
    try:
        return Archive(there.name, there.read_bytes())
    except OSError as error:
        raise ModelError(f"expected a readable file, {there.name!r} is none: {error}.") from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to read {there.name!r}.") from error


def _faults(infos: list[zipfile.ZipInfo], size: int) -> Iterator[str]:
    seen: set[str] = set()
    if len(infos) > _MOST_MEMBERS:
        yield f"{len(infos)} members"
    for info in infos:
        name = info.filename
        parts = name.replace("\\", "/").split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
            yield f"{name!r}, which leads out of it"
        if not name.isprintable():
            yield f"a member with an odd name, {name!r}"
        if stat.S_ISLNK(info.external_attr >> 16):
            yield f"{name!r}, a link"
        if info.flag_bits & 1 or info.compress_type not in (0, 8):
            yield f"{name!r}, encrypted or packed in an unusual way"
        if name in seen:
            yield f"{name!r} twice"
        seen.add(name)
    total = sum(info.file_size for info in infos)
    if total > _MOST_GROWTH * size + _FREE:
        yield f"{total >> 20} MB packed into {max(size >> 20, 1)} MB"
