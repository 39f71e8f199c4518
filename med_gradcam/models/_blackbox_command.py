"""How is a program asked: the voxels in a file, the scores in another, no shell in between?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from med_gradcam.blackbox import short
from med_gradcam.errors import ModelError, ResourceError
from med_gradcam.model import InputSpec

MOST_BYTES = 2**29  # of an output file
TAIL_BYTES = 2000  # of what a program says on stderr
GRACE_S = 5.0  # between asking a program to end and ending it
_PLACE = re.compile(r"\{(input|output)(\.npy|\.nii\.gz|\.json)?\}")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Command:
    """A program and its arguments, in which {input} and {output} stand for files.

    {input} or {input.npy}: an array (n, C, I, J, K) float32; {input.nii.gz}: one volume (I, J, K),
    or (I, J, K, C), with the `spec`'s axes and spacing in its affine. {output} or {output.npy}:
    scores (n, K); {output.json}: the same as lists. It runs in `folder`.
    """

    words: tuple[str, ...]
    folder: Path
    spec: InputSpec
    timeout_s: float = 600.0

    @property
    def what(self) -> str:
        """The program, for people."""
        return Path(self.words[0]).name

    @property
    def kinds(self) -> dict[str, str]:
        """The suffixes of the input's and the output's file."""
        places = [match for word in self.words for match in _PLACE.finditer(word)]
        return {match[1]: match[2] or ".npy" for match in places}

    def __call__(self, volumes: Floats) -> npt.NDArray[Any]:
        """Scores (n, ...) of volumes (n, C, I, J, K).

        Raises:
            ModelError: the program fails, takes too long or writes no scores.
        """
        try:
            room = TemporaryDirectory(prefix="med_gradcam_")
        except OSError as error:
            raise ResourceError(f"no room for temporary files: {error.strerror}.") from error
        with room as name:
            files = {one: Path(name) / f"{one}{kind}" for one, kind in self.kinds.items()}
            _write(files["input"], volumes, self.spec)
            said = self._run([_PLACE.sub(lambda m: str(files[m[1]]), word) for word in self.words])
            return _read(files["output"], self.what, said)

    def _run(self, words: Sequence[str]) -> str:
        """Run it to its end; returns the end of what it said on stderr."""
        try:
            running = subprocess.Popen(  # noqa: S603 - what --trust code is for; no shell
                words,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ModelError(
                f"expected to run {self.what!r}, it cannot be started: {error.strerror}."
            ) from error
        tail: deque[bytes] = deque(maxlen=TAIL_BYTES)
        listener = threading.Thread(target=_listen, args=(running.stderr, tail), daemon=True)
        listener.start()
        try:
            code = running.wait(self.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"expected {self.what!r} to end within {self.timeout_s:g} s, it did not"
                f"{_said(tail)}; its timeout_s can be raised."
            ) from error
        finally:
            _end(running)
            listener.join(GRACE_S)
        if code != 0:
            raise ModelError(
                f"expected {self.what!r} to succeed, it ended with {code}{_said(tail)}."
            )
        return _said(tail)


def command(words: object, folder: Path, spec: InputSpec, timeout_s: float) -> Command:
    """The command of a spec.

    Raises:
        ModelError: no list of texts, no place for the input or the output, or no such program.
    """
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        raise ModelError(
            f"expected a command as a list of texts such as ['python', 'run.py', '{{input}}', "
            f"'{{output}}'], got {words!r}."
        )
    made = Command(tuple(words), folder, spec, timeout_s)
    kinds = made.kinds
    if set(kinds) != {"input", "output"}:
        raise ModelError(f"expected {{input}} and {{output}} in the command, got {words!r}.")
    if kinds["input"] == ".json" or kinds["output"] == ".nii.gz":
        raise ModelError(
            "expected {input.npy} or {input.nii.gz} and {output.npy} or {output.json} in the "
            f"command, got {words!r}."
        )
    program = words[0]
    if shutil.which(program) is None and not (folder / program).is_file():
        raise ModelError(f"expected the program {program!r} of the command, there is none.")
    return made


def _write(path: Path, volumes: Floats, spec: InputSpec) -> None:
    try:
        if path.suffix == ".npy":
            np.save(path, volumes, allow_pickle=False)
        else:
            _write_nifti(path, volumes[0], spec)
    except OSError as error:
        raise ResourceError(f"no room for a temporary file: {error.strerror}.") from error


def _write_nifti(path: Path, volume: Floats, spec: InputSpec) -> None:
    """One volume with the network's own axes and spacing; where it lay is not told."""
    import nibabel as nib

    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    for n, (letter, mm) in enumerate(
        zip(spec.axes or "RAS", spec.spacing_mm or (1.0,) * 3, strict=True)
    ):
        affine["RLAPSI".index(letter) // 2, n] = mm if letter in "RAS" else -mm
    array = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    nib.save(nib.Nifti1Image(array, affine), path)


def _read(path: Path, what: str, said: str) -> npt.NDArray[Any]:
    """The scores that a program wrote."""
    if not path.is_file():
        raise ModelError(f"expected {what!r} to write its scores, it ended without any{said}.")
    if path.stat().st_size > MOST_BYTES:
        raise ModelError(f"expected at most {MOST_BYTES} bytes of scores from {what!r}, got more.")
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        value = json.loads(path.read_text(encoding="utf-8"))
        return np.asarray(value, dtype=np.float64)
    except (OSError, ValueError, TypeError, EOFError, RecursionError) as error:
        raise ModelError(
            f"expected scores as {'.npy' if path.suffix == '.npy' else 'lists of numbers'} from "
            f"{what!r}, got a file that is none: {short(str(error))}."
        ) from error


def _listen(stream: IO[bytes] | None, tail: deque[bytes]) -> None:
    """Keep the end of what a program says, so that it never waits for a reader."""
    if stream is None:
        return
    with stream, suppress(ValueError, OSError):
        while piece := stream.read1(65536) if hasattr(stream, "read1") else stream.read(65536):
            tail.extend(bytes([n]) for n in piece[-TAIL_BYTES:])


def _said(tail: deque[bytes]) -> str:
    """The end of what a program said, for a sentence."""
    lines = b"".join(tail).decode("utf-8", "replace").strip().splitlines()
    return f", saying {short(' '.join(lines[-3:])[-180:])!r}" if lines else ""


def _end(running: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started; one that has ended is let go."""
    if running.poll() is not None:
        return
    for how in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(running.pid, how) if hasattr(os, "killpg") else running.kill()
        with suppress(subprocess.TimeoutExpired):
            running.wait(GRACE_S)
