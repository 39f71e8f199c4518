"""Which files does a bundle hold, and how are they read without leaving it?

A bundle is a folder or a zip of one. Nothing is unpacked onto the disk, no name may point out of
the bundle, and every file has a size above which it is not read.
"""

from __future__ import annotations

import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from med_gradcam.errors import ModelError

MOST_CONFIG = 4 << 20  # bytes of one configuration file; those of the zoo stay under 200 kB
MOST_RATIO = 100  # a zip entry may grow this much; text of zoo bundles grows 20 times
_SMALL = 1 << 20  # bytes; what stays below cannot fill a machine however well it was packed
MOST_ENTRIES = 20_000
_CONFIGS = tuple(
    f"configs/{name}" for name in ("inference.json", "inference.yaml", "inference.yml",
                                   "metadata.json", "train.json", "train.yaml")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a bundle at `path`; `entries` name -> zip entry, None for a folder."""

    path: Path
    entries: dict[str, zipfile.ZipInfo] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What to call the bundle in a message."""
        return self.path.name

    def has(self, name: str) -> bool:
        """Whether there is such a file, such as "configs/inference.json"."""
        if self.entries is not None:
            return name in self.entries
        return (self.path / name).is_file()

    def local(self, name: str) -> Path:
        """The path of a file of a folder, links followed.

        Raises:
            ModelError: it lies outside the bundle, or the bundle is a zip.
        """
        if self.entries is not None:
            raise ModelError(f"expected an unpacked bundle to read {name}, got {self.name}.")
        there = (self.path / name).resolve()
        if not there.is_relative_to(self.path.resolve()):
            raise ModelError(
                f"expected {name} inside the bundle {self.name}, got a link out of it."
            )
        return there

    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        if self.entries is not None:
            return self.entries[name].file_size
        return self.local(name).stat().st_size

    def read(self, name: str, most: int | None = None) -> bytes:
        """The bytes of a file; `most` refuses a larger one.

        Raises:
            ModelError: it is larger, cannot be read, or is packed as only a bomb is.
        """
        size = self.size(name)
        if most is not None and size > most:
            raise ModelError(
                f"expected at most {most} bytes in {self.name}/{name}, got {size}; "
                f"this is no configuration."
            )
        try:
            if self.entries is None:
                return self.local(name).read_bytes()
            entry = self.entries[name]
            if size > max(_SMALL, MOST_RATIO * entry.compress_size):
                raise ModelError(
                    f"expected {name} in {self.name} to grow at most {MOST_RATIO} times when "
                    f"unpacked, got {entry.compress_size} bytes that say they are {size}."
                )
            with zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
                data = file.read(size + 1)
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise ModelError(f"expected a readable {name} in {self.name}, got: {error}.") from error
        if len(data) != size:
            raise ModelError(f"expected {size} bytes of {name} in {self.name}, got {len(data)}.")
        return data


def is_bundle(path: str) -> bool:
    """Whether a folder or zip looks like a bundle: it has one of the usual configurations."""
    there = Path(path)
    if there.is_dir():
        return any((there / name).is_file() for name in _CONFIGS)
    if there.suffix.lower() != ".zip" or not there.is_file():
        return False
    try:
        with zipfile.ZipFile(there) as archive:
            return any(info.filename.endswith(_CONFIGS) for info in archive.infolist())
    except (OSError, zipfile.BadZipFile):
        return False


def files_of(path: str) -> Files:
    """The files of the bundle at `path`.

    Raises:
        ModelError: the zip is broken, or names files outside itself.
    """
    there = Path(path)
    if there.is_dir():
        return Files(there)
    try:
        with zipfile.ZipFile(there) as archive:
            listed = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"expected a readable zip, got {there.name}: {error}.") from error
    if len(listed) > MOST_ENTRIES:
        raise ModelError(f"expected at most {MOST_ENTRIES} files in {there.name}, got more.")
    for info in listed:
        _check_name(info, there.name)
    roots = [
        info.filename[: -len(name)]
        for info in listed
        for name in _CONFIGS
        if info.filename == name or info.filename.endswith(f"/{name}")
    ]
    root = min(roots, key=len)  # the bundle's own folder inside the zip
    entries = {
        info.filename.removeprefix(root): info
        for info in listed
        if info.filename.startswith(root) and not info.is_dir()
    }
    return Files(there, entries)


def _check_name(info: zipfile.ZipInfo, zipped: str) -> None:
    name = info.filename.replace("\\", "/")
    pure = PurePosixPath(name)
    link = stat.S_ISLNK(info.external_attr >> 16)
    if pure.is_absolute() or ".." in pure.parts or ":" in name or link:
        raise ModelError(
            f"expected only files inside the bundle in {zipped}, got {info.filename!r}, which "
            f"points out of it; do not use this file."
        )
