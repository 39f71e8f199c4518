"""What surrounds a network at work: it can be stopped, and its errors become sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from med_gradcam.errors import MedGradcamError, ModelError, ResourceError
from med_gradcam.model import Model
from med_gradcam.progress import Progress, Step, silent

# What a network raises of its own when an input does not fit it.
MISFIT = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    AttributeError,
    ImportError,
)
_MEMORY_WORDS = ("out of memory", "allocate memory", "not enough memory", "alloc_cpu")


@contextmanager
def stoppable(net: torch.nn.Module, progress: Progress) -> Iterator[None]:
    """Lets `progress` raise Cancelled between any two layers of a running network."""
    if progress is silent:
        yield
        return
    doing: Callable[[], str] = lambda: str(getattr(net, "doing", ""))  # noqa: E731
    tick: Callable[..., None] = lambda *_: progress(Step(-1, 6, doing()))  # noqa: E731
    leaves = [m for m in net.modules() if next(m.children(), None) is None]
    handles = [m.register_forward_pre_hook(tick) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def is_memory(error: BaseException) -> bool:
    """Whether an error, torch's RuntimeErrors included, says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _MEMORY_WORDS)


@contextmanager
def network_errors(
    model: Model, shape: Sequence[int], kinds: tuple[type[Exception], ...] = (RuntimeError,)
) -> Iterator[None]:
    """Turns errors of these kinds while a network runs (torch's are RuntimeErrors) into ours."""
    try:
        yield
    except MedGradcamError:
        raise
    except MemoryError as error:
        raise ResourceError(_no_memory(shape)) from error
    except kinds as error:
        text = first_line(error)
        if is_memory(error):
            raise ResourceError(_no_memory(shape)) from error
        raise ModelError(
            f"expected the network of {model.name!r} to run on an input of shape "
            f"{(1, *shape)}, it failed: {text}."
        ) from error


def _no_memory(shape: Sequence[int]) -> str:
    return (
        f"not enough memory to explain an input of shape {(1, *shape)}; choose a "
        f"deeper layer with --layer, or a machine with more memory."
    )
