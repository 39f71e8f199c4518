"""Does every run end with its result, its error or a prompt stop? No window needed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator

import pytest

from med_gradcam.errors import Cancelled, ImageError
from med_gradcam.progress import Progress, Step
from napari_plugin import job


def drain(run: Generator[job.News, None, job.Outcome]) -> tuple[list[job.News], job.Outcome]:
    news: list[job.News] = []
    while True:
        try:
            news.append(next(run))
        except StopIteration as end:
            return news, end.value


def start(
    work: job.Work, control: job.Control | None = None
) -> Generator[job.News, None, job.Outcome]:
    control = control or job.Control()
    return job.relay(7, work, control, control.renew())


def test_result_and_steps_arrive_with_their_generation() -> None:
    def work(progress: Progress) -> str:
        for done in range(3):
            progress(Step(done, 3, "integrating"))
            time.sleep(0.06)
        return "answer"

    news, outcome = drain(start(work))
    assert (outcome.generation, outcome.value) == (7, "answer")
    assert {item.generation for item in news} == {7}
    steps = [item.step for item in news if item.step and item.step.total]
    assert [step.done for step in steps] == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried"), "Not enough memory .RuntimeError: CUDA out of"),
        (MemoryError(), "Not enough memory .MemoryError"),
        (RuntimeError("mat1 and mat2\nshapes"), "The run failed .RuntimeError: mat1 and mat2"),
        (ValueError(), "The run failed .ValueError"),
        (KeyboardInterrupt(), "The run failed .KeyboardInterrupt"),
        (StopIteration(), "The run failed .StopIteration"),
        (ImageError("expected a scan, got a letter."), "^expected a scan, got a letter.$"),
    ],
)
def test_every_error_becomes_one_that_no_worker_swallows(
    error: BaseException, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    def work(progress: Progress) -> None:
        raise error

    caplog.set_level(logging.CRITICAL, "med_gradcam")
    with pytest.raises(job.EngineError, match=words) as caught:
        drain(start(work))
    assert not isinstance(caught.value, RuntimeError)
    assert caught.value.generation == 7
    assert type(error).__name__ in caught.value.details


def test_cancelled_work_ends_without_result_or_error() -> None:
    def work(progress: Progress) -> None:
        raise Cancelled("stop")

    assert drain(start(work))[1].value is None


def test_relay_never_waits_long_for_work_that_says_nothing() -> None:
    free = threading.Event()
    run = start(lambda _progress: free.wait(10))
    slowest = 0.0
    for _ in range(5):
        before = time.perf_counter()
        next(run)
        slowest = max(slowest, time.perf_counter() - before)
    run.close()
    free.set()
    assert slowest < 0.5


def test_stop_ends_the_work_at_its_next_step() -> None:
    seen: list[str] = []

    def work(progress: Progress) -> None:
        try:
            for done in range(1000):
                progress(Step(done, 1000, "integrating"))
                time.sleep(0.01)
        except Cancelled:
            seen.append("restored")
            raise

    control = job.Control()
    run = start(work, control)
    next(run)
    control.stop()
    assert drain(run)[1].value is None
    assert seen == ["restored"]


def test_two_runs_are_never_at_work_at_once() -> None:
    at_work, most = 0, 0

    def work(progress: Progress) -> str:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        try:
            for done in range(20):
                time.sleep(0.02)
                progress(Step(done, 20, "integrating"))
        finally:
            at_work -= 1
        return "done"

    control = job.Control()
    first = start(work, control)
    next(first)
    first.close()  # as the worker does after a cancel: nobody waits for the work to end
    second = start(work, control)
    assert drain(second)[1].value == "done"
    assert most == 1


def test_run_that_is_stopped_while_it_waits_never_starts() -> None:
    control, begun = job.Control(), []
    with control.lock:
        run = start(lambda _progress: begun.append("second"), control)
        next(run)
        control.stop()
        assert drain(run)[1].value is None
    assert begun == []
