"""How are the windows of a scan, and of its reference, cut out and run, a batch at a time?"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.errors import CannotExplainError
from med_gradcam.geometry import crop
from med_gradcam.outputs import first_tensor
from med_gradcam.prepare import Prepared, apply_steps
from med_gradcam.progress import Progress, Step
from med_gradcam.reference import ReferenceInput
from med_gradcam.tiling import Slices, Tiles

AIR_HU = -900.0  # a CT window without a block of voxels above it on average holds no patient
EACH = 8  # blocks of windows after which freed memory is given back
BLOCK = 4  # voxels of a block along each axis: its mean is not moved by noise
BATCH_ROUNDING = 1e-3  # share by which a window's output may differ within a batch

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The windows of a prepared scan.

    `pad`: what the network takes where a window reaches beyond the scan; None: the scan's minimum,
    after the intensity steps.
    """

    prepared: Prepared
    tiled: Tiles
    pad: float | None = None

    def raw(self, n: int, array: Floats) -> Floats:
        """Window `n` of an array (C, I, J, K) in the scan's unit; beside it the scan's minimum."""
        here, own = self.tiled.places(n)
        part = array[(slice(None), *here)]
        if part.shape[1:] == self.tiled.window:
            return part
        low = self.prepared.raw.min(axis=(1, 2, 3), keepdims=True)
        out = np.empty((len(array), *self.tiled.window), dtype=np.float32)
        out[:] = low
        out[(slice(None), *own)] = part
        return out

    def one(self, n: int) -> Prepared:
        """Window `n` as a prepared scan of its own."""
        whole, raw = self.prepared, self.raw(n, self.prepared.raw)
        exact = None if whole.exact is None else self._exact(n, whole.exact)
        if exact is None and self.pad is not None and self._reaches_beyond(n):
            exact = self._exact(n, None)
        grid = crop(whole.grid, self.tiled.starts[n], self.tiled.window)
        return replace(whole, raw=raw, grid=grid, exact=exact, notes=(), beside=None)

    def _reaches_beyond(self, n: int) -> bool:
        here, _ = self.tiled.places(n)
        return any(s.stop - s.start != w for s, w in zip(here, self.tiled.window, strict=True))

    def _exact(self, n: int, array: Floats | None) -> Floats:
        """What the network takes at window `n` of an array, or after the steps; with `pad`."""
        here, own = self.tiled.places(n)
        place: tuple[slice, Slices] = (slice(None), here)
        if array is None:
            part = apply_steps(self.prepared.raw[(place[0], *here)], self.prepared.steps)
        else:
            part = array[(place[0], *here)]
        if part.shape[1:] == self.tiled.window:
            return part
        out = np.empty((len(part), *self.tiled.window), dtype=np.float32)
        if self.pad is None:
            low = self.prepared.raw.min(axis=(1, 2, 3), keepdims=True)
            out[:] = apply_steps(low, self.prepared.steps)
        else:
            out[:] = self.pad
        out[(slice(None), *own)] = part
        return out

    def background(self, n: int, whole: ReferenceInput) -> ReferenceInput:
        """The reference of window `n`, cut from that of the scan."""
        return replace(whole, raw=self.raw(n, whole.raw), every=())

    def given(self, n: int, whole: ReferenceInput | None) -> Floats:
        """What the network takes at window `n` of the scan, or of its reference."""
        one = self.one(n)
        return one.network_input() if whole is None else one.network_input(self.raw(n, whole.raw))

    def empty(self, n: int, *, ct: bool) -> bool:
        """Whether window `n` holds nothing but air (CT) or one value, and no padding."""
        here, _ = self.tiled.places(n)
        part = self.prepared.raw[(slice(None), *here)]
        if ct and _highest_block(part) < AIR_HU:
            return True
        return not self._reaches_beyond(n) and one_value(part) is not None


def _highest_block(array: Floats) -> float:
    """The largest mean of blocks of 4 x 4 x 4 voxels of (C, i, j, k); those at the end are less."""
    if float(array.max()) < AIR_HU:
        return float(array.max())
    sums, counts = array, np.ones((1, 1, 1, 1), dtype=np.float32)
    for axis in (1, 2, 3):
        first = np.arange(0, array.shape[axis], BLOCK)
        sums = np.add.reduceat(sums, first, axis=axis)
        size = np.diff([*first, array.shape[axis]]).astype(np.float32)
        counts = counts * size.reshape([-1 if a == axis else 1 for a in range(4)])
    return float((sums / counts).max())


def uniform(background: ReferenceInput) -> ReferenceInput:
    """A reference that is one value everywhere, without the memory of a scan."""
    value = one_value(background.raw)
    if value is None:
        return background
    thin = np.array(value, dtype=np.float32).reshape(-1, 1, 1, 1)
    return replace(background, raw=np.broadcast_to(thin, background.raw.shape))


def one_value(array: npt.NDArray[Any]) -> tuple[float, ...] | None:
    """The value of each channel of (C, i, j, k) where it has but one everywhere, else None."""
    low, high = array.min(axis=(1, 2, 3)), array.max(axis=(1, 2, 3))
    return tuple(low.tolist()) if bool((low == high).all()) else None


@dataclass(slots=True, eq=False)
class Runs:
    """The network run over windows, in their order, `batch` at a time.

    `path`: where in its output the scores are. A window of one value has the output of every other
    such window, and is run once. `alone`: the network mixes the windows of a batch, so that they
    are run one by one. `ran` counts windows that were run, `seconds` what that took, cutting
    them out and all.
    """

    net: torch.nn.Module
    windows: Windows
    batch: int
    path: str
    where: torch.device
    ran: int = 0
    seconds: float = 0.0
    alone: bool = False
    compared: bool = False
    known: dict[tuple[float, ...], torch.Tensor] = field(default_factory=dict)

    def outputs(
        self, wanted: Sequence[int], whole: ReferenceInput | None, told: Clock
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and raw output (K, ...) of the wanted windows of the scan, or of its reference."""
        for first in range(0, len(wanted), self.batch):
            some = wanted[first : first + self.batch]
            told.tell(first)
            began = time.perf_counter()
            found = self._block(some, whole)
            self.seconds += time.perf_counter() - began
            if first // self.batch % EACH == 0:
                give_back()
            yield from zip(some, found, strict=True)

    def _block(self, some: Sequence[int], whole: ReferenceInput | None) -> list[torch.Tensor]:
        inputs = [self.windows.given(n, whole) for n in some]
        values = [one_value(x) for x in inputs]
        fresh: list[int] = []
        for n, value in enumerate(values):
            first = value is None or value not in (values[m] for m in fresh)
            if first and (value is None or value not in self.known):
                fresh.append(n)
        found = dict(zip(fresh, self._run([inputs[n] for n in fresh]), strict=True))
        for n, out in found.items():
            value = values[n]
            if value is not None:
                self.known[value] = out
        return [found[n] if n in found else self.known[values[n] or ()] for n in range(len(some))]

    def _run(self, inputs: Sequence[Floats]) -> list[torch.Tensor]:
        """The outputs of some windows; the first batch is compared with a window run alone."""
        if not inputs:
            return []
        if self.alone:
            made = [out for one in inputs for out in self._forward([one])]
        else:
            made = self._forward(inputs)
        if len(inputs) > 1 and not self.compared:
            self.compared = True
            (single,) = self._forward(inputs[-1:])
            self.alone = not _near(single, made[-1])
            if self.alone:
                made = [*(out for one in inputs[:-1] for out in self._forward([one])), single]
        self.ran += len(inputs)
        return made

    def _forward(self, inputs: Sequence[Floats]) -> list[torch.Tensor]:
        first = next(self.net.parameters(), torch.empty(0))
        x = torch.from_numpy(np.stack(inputs)).to(device=self.where, dtype=first.dtype)
        with torch.no_grad():
            out = first_tensor(self.net(x), self.path)
        if out.ndim < 2 or len(out) != len(inputs):
            raise CannotExplainError(
                "output",
                f"expected one output per window ({len(inputs)}, K) or a map of it, got "
                f"{tuple(out.shape)}; does the network squeeze away its batch axis?",
            )
        if not bool(torch.isfinite(out).all()):
            raise CannotExplainError(
                "not finite",
                "the network's output holds NaN or infinite values for a window of this scan; "
                "check the weights and the intensity steps.",
            )
        return list(out.detach().cpu())


def give_back() -> None:
    """Return freed memory to the system.

    The C library keeps what windows have used in pieces that small results between them part: it
    grew by 5 MB per window, to 2 GiB on a large scan.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc
        return None
    return found


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    size = max(float(a.abs().max()), 1e-6)
    return float((a - b).abs().max()) <= BATCH_ROUNDING * size


@dataclass(slots=True, eq=False)
class Clock:
    """Tells how many of `total` windows are done, and about how long the others will take."""

    progress: Progress
    total: int
    what: str
    began: float = field(default_factory=time.perf_counter)

    def tell(self, done: int) -> None:
        """`done` windows are over; `progress` may raise Cancelled here."""
        self.progress(Step(done, self.total, f"{self.what}{self.left(done)}"))

    def left(self, done: int, now: Callable[[], float] = time.perf_counter) -> str:
        """The time left for people; empty where nothing is known yet."""
        if done == 0:
            return ""
        seconds = (now() - self.began) / done * (self.total - done)
        if seconds < 90:
            return f", about {seconds:.0f} s left"
        return f", about {seconds / 60:.0f} min left"
