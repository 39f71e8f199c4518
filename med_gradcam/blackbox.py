"""How does any function from volumes to scores become a network that can be explained?

It has no gradients and no layers, only predictions, which may be slow or cost money: they are made
in batches, work can be stopped between two of them, and within one call equal inputs are predicted
once. Scores are logits, or probabilities, which become log-odds here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam.errors import MedGradcamError, ModelError, UsageError
from med_gradcam.model import InputSpec, Model
from med_gradcam.target import LINKS, Link

Outputs = Literal["logits", "probabilities"]
Predict = Callable[[npt.NDArray[np.float32]], Any]
Scores = npt.NDArray[np.float32]

CLAMP = 1e-7  # probabilities are held this far from 0 and 1: log-odds of at most about 16.1
ROUNDED = 1e-2  # how far a row of probabilities may be from adding up to 1
LOGITS = 1e-4  # rows of 0..1 this close to adding up to 1 are no logits
MEMORY_BYTES = 2**26  # of scores that are remembered
_LONGEST = 200  # characters of a foreign message that are repeated


@dataclass(frozen=True, slots=True)
class How:
    """How a black box is asked: `what` it is called in messages, and what its numbers mean."""

    what: str = "predict"
    link: Link = "softmax"
    outputs: Outputs = "logits"
    batch: int = 1
    remark: str = ""

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise UsageError(f"expected a link of {', '.join(LINKS)}, got {self.link!r}.")
        if self.outputs not in get_args(Outputs):
            raise UsageError(
                f"expected outputs of {' or '.join(get_args(Outputs))}, got {self.outputs!r}."
            )
        if self.outputs == "probabilities" and self.link == "none":
            raise UsageError(
                "expected a link of softmax or sigmoid for outputs that are probabilities, got "
                "'none'."
            )
        if type(self.batch) is not int or self.batch < 1:
            raise UsageError(f"expected a batch of at least one volume, got {self.batch!r}.")


def BlackBox(  # noqa: N802, PLR0913 - made like the value it gives, and described like one
    predict: Predict,
    *,
    input: InputSpec | None = None,  # noqa: A002 - as the field of Model is called
    labels: Sequence[str] = (),
    link: Link = "softmax",
    outputs: Outputs = "logits",
    batch: int = 1,
    name: str = "",
) -> Model:
    """A Model whose network is any function: it is explained by its predictions alone.

    `predict` takes an array (n, C, I, J, K) float32 with n from 1 to `batch`, prepared as `input`
    says, and returns scores (n, K), or maps (n, K, i, j, k): logits, or with
    `outputs="probabilities"` probabilities, held within 1e-7 of 0 and 1, that become log-odds.

    Raises:
        UsageError: a setting that is none.
        ModelError: labels or a name that cannot be printed.
    """
    if not callable(predict):
        raise UsageError(
            f"expected a function from an array (n, C, I, J, K) to scores (n, K), got "
            f"{type(predict).__name__}."
        )
    spec = InputSpec() if input is None else input
    if not isinstance(spec, InputSpec):
        raise UsageError(f"expected an InputSpec as input, got {type(input).__name__}.")
    called = name or str(getattr(predict, "__name__", "black box")).replace("<lambda>", "black box")
    return made(predict, How(called, link, outputs, batch), spec, labels)


def made(predict: Predict, how: How, spec: InputSpec, labels: Sequence[str]) -> Model:
    """The Model of a black box; it is called what `how` calls it."""
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise UsageError(f"expected a list of texts as labels, got {labels!r}.")
    net = Predictor(predict, how).eval()
    return Model(net, spec, labels=tuple(labels), link=how.link, name=how.what)


class Predictor(torch.nn.Module):
    """A network (n, C, I, J, K) -> (n, K, ...) that asks a function; it has no gradient."""

    gradient_free = "it is a black box"

    def __init__(self, predict: Predict, how: How) -> None:
        super().__init__()
        self.how = how
        self.batch = how.batch
        self.asked = _Batch(predict, how)
        self.known: OrderedDict[bytes, _Row] | None = None
        self.held = 0  # predictions of this call whose probabilities were held
        self.predictions = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of a batch of any size, in float32."""
        volumes = x.detach().to("cpu", torch.float32).contiguous()
        keys = [_key(volume) for volume in volumes]
        known = {} if self.known is None else self.known
        rows = {key: known[key] for key in keys if key in known}
        new = {key: n for n, key in enumerate(keys) if key not in rows}
        for first in range(0, len(new), self.batch):
            some = list(new)[first : first + self.batch]
            # A copy, by its list of places: the function may work in place.
            answer: list[_Row] = self.asked(volumes[[new[key] for key in some]])
            self.predictions += len(some)
            rows.update(zip(some, answer, strict=True))
            self._remember(dict(zip(some, answer, strict=True)))
        self.held += sum(rows[key].held for key in rows)
        return torch.from_numpy(np.stack([rows[key].scores for key in keys])).to(x.device)

    def _remember(self, rows: dict[bytes, _Row]) -> None:
        if self.known is None:
            return
        self.known.update(rows)
        each = max(1, next(iter(rows.values())).scores.nbytes)
        while len(self.known) > max(2, MEMORY_BYTES // each):
            self.known.popitem(last=False)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within it equal inputs are predicted once: for one call, since a function may change."""
        before, self.known = self.known, OrderedDict()
        self.held, self.asked.outputs = 0, None
        try:
            yield
        finally:
            self.known = before

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Within it every input is predicted."""
        before, self.known = self.known, None
        try:
            yield
        finally:
            self.known = before

    @property
    def doing(self) -> str:
        """What it is at, for who waits."""
        return f"prediction {self.predictions + 1}"

    def remarks(self) -> list[str]:
        """What must be said beside the numbers."""
        said = [self.how.remark] if self.how.remark else []
        if self.held:
            said.append(
                f"the black box put out probabilities closer than {CLAMP:g} to 0 or 1, which were "
                f"held there: log-odds beyond about 16 are cut off"
            )
        return said


class _Batch(torch.nn.Module):
    """One question to the function; a module of its own so that work can be stopped before it."""

    def __init__(self, predict: Predict, how: How) -> None:
        super().__init__()
        self.__dict__["predict"] = predict  # no child, should it be a module: it is not looked into
        self.how = how
        self.outputs: int | None = None

    def forward(self, volumes: torch.Tensor) -> list[_Row]:
        """A row of scores for each volume.

        Raises:
            ModelError: the function failed, or gave something else.
        """
        array = volumes.numpy()
        try:
            answer = self.__dict__["predict"](array)
        except (MedGradcamError, MemoryError):
            raise
        except Exception as error:  # what a function raises is its own matter
            raise ModelError(
                f"{self.how.what!r} failed on an array of shape {tuple(array.shape)}: "
                f"{type(error).__name__}: {short(str(error))}."
            ) from error
        return self._rows(_as_array(answer, self.how.what), tuple(array.shape))

    def _rows(self, scores: npt.NDArray[np.float64], shape: tuple[int, ...]) -> list[_Row]:
        count = shape[0]
        if scores.ndim == 1 and len(scores) == count:
            scores = scores[:, None]
        if scores.ndim not in (2, 5) or len(scores) != count or 0 in scores.shape:
            raise ModelError(
                f"expected scores ({count}, K) from {self.how.what!r} for an array of shape "
                f"{shape}, got shape {tuple(scores.shape)}."
            )
        if self.outputs not in (None, scores.shape[1]):
            raise ModelError(
                f"expected {self.outputs} outputs from {self.how.what!r} as before, got "
                f"{scores.shape[1]}."
            )
        if not np.isfinite(scores).all():
            raise ModelError(
                f"expected finite scores from {self.how.what!r} for an array of shape {shape}, "
                f"got NaN or infinite ones."
            )
        first, self.outputs = self.outputs is None, scores.shape[1]
        if self.how.outputs == "probabilities":
            return _from_probabilities(scores, self.how)
        if first:
            _check_logits(scores, self.how)
        return [_Row(row.astype(np.float32)) for row in scores]


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """The scores of one volume; whether probabilities had to be `held`."""

    scores: Scores
    held: bool = False


def _from_probabilities(p: npt.NDArray[np.float64], how: How) -> list[_Row]:
    """Logits whose log-odds are those of the probabilities.

    softmax: log p, whose log-odds are log(p_c / sum of the others); otherwise log(p / (1 - p)).
    """
    several = how.link == "softmax" and p.shape[1] > 1
    off = np.abs(p.sum(axis=1) - 1).max() if several else 0.0
    if p.min() < -LOGITS or p.max() > 1 + LOGITS or off > ROUNDED:
        raise ModelError(
            f"expected probabilities of 0 to 1 from {how.what!r}"
            f"{' that add up to 1 over the classes' if several else ''}, got values from "
            f"{p.min():.4g} to {p.max():.4g}{f' and sums off by {off:.3g}' if several else ''}; "
            f"are they logits?"
        )
    least = np.maximum(p, CLAMP)
    held = p < CLAMP if several else (p < CLAMP) | (p > 1 - CLAMP)
    inside = np.minimum(least, 1 - CLAMP)
    logits = np.log(least) if several else np.log(inside) - np.log1p(-inside)
    flat = np.asarray(held.reshape(len(p), -1).any(axis=1)).tolist()
    return [_Row(row.astype(np.float32), bool(h)) for row, h in zip(logits, flat, strict=True)]


def _check_logits(scores: npt.NDArray[np.float64], how: How) -> None:
    """Refuse rows that look like the probabilities of a softmax."""
    if how.link != "softmax" or scores.shape[1] < 2 or scores.min() < 0 or scores.max() > 1:
        return
    if np.abs(scores.sum(axis=1) - 1).max() < LOGITS:
        raise ModelError(
            f"expected logits from {how.what!r}, got numbers of 0 to 1 that add up to 1, which are "
            f"probabilities; say outputs='probabilities'."
        )


def _as_array(answer: object, what: str) -> npt.NDArray[np.float64]:
    """What a function returned, as numbers."""
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu().to(torch.float64).numpy()
    try:
        array = np.asarray(answer)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf":
        raise ModelError(
            f"expected an array of real numbers (n, K) from {what!r}, got "
            f"{type(answer).__name__}{f' of {array.dtype}' if array.dtype.kind in 'cbUS' else ''}."
        )
    return array.astype(np.float64)


def _key(volume: torch.Tensor) -> bytes:
    """A digest of one volume; equal inputs of one call have one shape."""
    return hashlib.blake2b(volume.numpy().tobytes(), digest_size=16).digest()


def short(text: str) -> str:
    """A foreign message as one printable line of at most 200 characters, without its full stop."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _LONGEST]).split())
    return (line[:_LONGEST] + "..." if len(line) > _LONGEST else line).rstrip(".")
