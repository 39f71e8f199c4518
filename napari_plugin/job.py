"""How does long work run beside the window: with progress, a prompt cancel and no lost error?

napari's generator workers swallow RuntimeError, which is what torch raises, and can only stop
between two yields. So the work runs in a thread of its own, and the worker only relays: it yields
every TICK_S whatever the work does, and hands every error on as an EngineError. Work that was
cancelled ends at its next progress call; the next run waits for that before it touches a model.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass

from med_gradcam.errors import Cancelled, MedGradcamError
from med_gradcam.progress import Progress, Step

TICK_S = 0.05
Work = Callable[[Progress], object]
_log = logging.getLogger("med_gradcam")


@dataclass(frozen=True, slots=True)
class News:
    """A run is alive; `step` is its newest progress, if there is any."""

    generation: int
    step: Step | None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A run has ended with `value`; None when it was cancelled."""

    generation: int
    value: object


class EngineError(Exception):
    """A run has failed: `sentence` for people, `details` for developers. Never a RuntimeError."""

    def __init__(self, generation: int, sentence: str, details: str = "") -> None:
        self.generation, self.sentence, self.details = generation, sentence, details
        super().__init__(sentence)


class Control:
    """The stop flag of the newest run and the lock that keeps two runs off one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._stop = threading.Event()

    def renew(self) -> threading.Event:
        """The stop flag for a new run; the one before is told to stop."""
        self._stop.set()
        self._stop = threading.Event()
        return self._stop

    def stop(self) -> None:
        """Tell the run to stop."""
        self._stop.set()


def sentence(error: BaseException) -> str:
    """One sentence for the dock."""
    if isinstance(error, MedGradcamError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in first.lower():
        return f"Not enough memory ({text}); close other programs or explain a smaller part."
    return f"The run failed ({text}); the log has the details."


def relay(
    generation: int, work: Work, control: Control, stop: threading.Event
) -> Generator[News, None, Outcome]:
    """Run `work` in a thread; yields News at least every TICK_S and returns the Outcome.

    Raises:
        EngineError: the work raised anything at all except Cancelled.
    """
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = threading.Thread(
        target=_run, args=(work, control.lock, stop, inbox), name=f"med-gradcam run {generation}"
    )
    thread.start()
    try:
        while True:
            item = _newest(inbox)
            if isinstance(item, BaseException):
                return _ended(generation, item)
            if isinstance(item, Outcome):
                return Outcome(generation, item.value)
            yield News(generation, item if isinstance(item, Step) else None)
    finally:
        stop.set()


def _newest(inbox: queue.SimpleQueue[object]) -> object:
    """The newest thing the work said within TICK_S; steps that were overtaken are dropped."""
    try:
        item = inbox.get(timeout=TICK_S)
        while isinstance(item, Step) and not inbox.empty():
            item = inbox.get()
    except queue.Empty:
        return None
    return item


def _ended(generation: int, error: BaseException) -> Outcome:
    if isinstance(error, Cancelled):
        return Outcome(generation, None)
    details = "".join(traceback.format_exception(error))
    if not isinstance(error, MedGradcamError):
        _log.error("a run in the napari dock failed:\n%s", details)
    raise EngineError(generation, sentence(error), details) from error


def _run(
    work: Work, lock: threading.Lock, stop: threading.Event, inbox: queue.SimpleQueue[object]
) -> None:
    """The thread: wait for the run before, do the work, put its end into the inbox."""

    def report(step: Step) -> None:
        if stop.is_set():
            raise Cancelled("Cancelled.")
        if step.done >= 0:  # below zero the engine only asks whether it should stop
            inbox.put(step)

    while not lock.acquire(timeout=TICK_S):
        inbox.put(Step(0, 0, "Waiting for the run before to stop"))
        if stop.is_set():
            inbox.put(Cancelled("Cancelled."))
            return
    try:
        report(Step(0, 0, "Starting"))
        inbox.put(Outcome(0, work(report)))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the window must hear of it
        inbox.put(error)
    finally:
        lock.release()
