"""What is explained: which number of the model's output, as log-odds?

By link: sigmoid -> y; softmax -> y_c - logsumexp of the others (two logits:
y1 - y0); contrast -> y_c - y_d; regression -> y in its own unit. Never a probability, whose
gradient vanishes when the model is sure. Log-odds of a softmax are blind to a number that is added
to all logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError

if TYPE_CHECKING:
    import torch

Link = Literal["softmax", "sigmoid", "none"]
Kind = Literal["class", "contrast", "regression"]
LINKS: tuple[Link, ...] = ("softmax", "sigmoid", "none")


@dataclass(frozen=True, slots=True)
class Target:
    """One number of a model's output. Called on the output (B, K) it gives scores (B,).

    `kind` is class, contrast or regression; `index` holds (c,) or, for a contrast, (c, d).
    """

    kind: Kind
    label: str
    index: tuple[int, ...]
    link: Link

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise UsageError(f"expected a link of {', '.join(LINKS)}, got {self.link!r}.")
        if self.kind not in ("class", "contrast", "regression"):
            raise UsageError(f"expected a kind class, contrast or regression, got {self.kind!r}.")
        if len(self.index) != (2 if self.kind == "contrast" else 1) or min(self.index) < 0:
            raise UsageError(f"expected an index that fits a {self.kind} target, got {self.index}.")
        if self.kind == "contrast" and self.index[0] == self.index[1]:
            raise UsageError(f"expected two different classes to compare, got {self.label!r}.")

    @property
    def unit(self) -> str:
        """Unit of the score: "log-odds", or "score" where the model has no link function."""
        return "score" if self.link == "none" else "log-odds"

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of a model's output (B, K)."""
        logits = output_matrix(output)
        c = self.index[0]
        if max(self.index) >= logits.shape[1]:
            raise UsageError(
                f"expected a class index below {logits.shape[1]} (the model's outputs), "
                f"got {max(self.index)} for {self.label!r}."
            )
        if self.kind == "contrast":
            return logits[:, c] - logits[:, self.index[1]]
        if self.link != "softmax" or logits.shape[1] == 1:
            return logits[:, c]
        others = [i for i in range(logits.shape[1]) if i != c]
        if len(others) == 1:  # two logits: the plain difference, antisymmetric bit for bit
            return logits[:, c] - logits[:, others[0]]
        return logits[:, c] - logits[:, others].logsumexp(dim=1)

    def probability(self, score: float) -> float | None:
        """The model's probability at a score in log-odds; None where there is none."""
        if self.kind != "class" or self.link == "none":
            return None
        if score >= 0:
            return 1.0 / (1.0 + math.exp(-score))
        return math.exp(score) / (1.0 + math.exp(score))


def output_matrix(output: object) -> torch.Tensor:
    """The model's output as (B, K): a tensor, or the first tensor of a tuple, list or dict.

    Raises:
        CannotExplainError: there is no tensor, or it is a map and not a vector per case.
    """
    first: object = output
    while isinstance(first, (tuple, list, dict)) and len(first) > 0:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    if not hasattr(first, "logsumexp"):
        raise CannotExplainError(
            "output", f"expected the network to return a tensor, got {type(output).__name__}."
        )
    tensor: torch.Tensor = first  # type: ignore[assignment]
    if tensor.ndim > 2 and all(n == 1 for n in tensor.shape[2:]):
        tensor = tensor.flatten(1)
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    if tensor.ndim != 2:
        raise CannotExplainError(
            "dense",
            f"expected a network with one score vector per scan, got an output of shape "
            f"{tuple(tensor.shape)}; maps of a segmentation network cannot be explained yet.",
        )
    return tensor


def class_name(labels: Sequence[str], index: int) -> str:
    """The label of an output, or "class 3" where the model names none."""
    return labels[index] if index < len(labels) else f"class {index}"


def _index(text: str, labels: Sequence[str], outputs: int) -> int:
    if text in labels:
        return list(labels).index(text)
    digits = text.removeprefix("#")
    if digits.isdecimal() and int(digits) < outputs:
        return int(digits)
    known = list(labels) or [str(i) for i in range(outputs)]
    raise UnknownNameError("class", text, known, f"An index goes from 0 to {outputs - 1}.")


def _sides(text: str, labels: Sequence[str]) -> list[str]:
    """The two sides of A-vs-B; a label that holds "-vs-" itself stays whole."""
    parts = text.split("-vs-")
    ways = [["-vs-".join(parts[:n]), "-vs-".join(parts[n:])] for n in range(1, len(parts))]
    return max(ways, key=lambda way: sum(side in labels for side in way))


def parse_target(text: str, labels: Sequence[str], link: Link, scores: Sequence[float]) -> Target:
    """The target a user means by "auto", a label, an index, "#3" or "A-vs-B".

    `scores` are the model's raw outputs for this scan; "auto" takes the predicted class, or the
    only output.

    Raises:
        UnknownNameError: no such class.
        UsageError: "auto" for several outputs without a link function.
    """
    outputs = len(scores)
    if text == "auto":
        if link == "none" and outputs > 1:
            raise UsageError(
                f"expected a target, since the model has {outputs} outputs and no link function; "
                f"name one of: {', '.join(class_name(labels, i) for i in range(outputs))}."
            )
        best = max(range(outputs), key=lambda i: scores[i])
        kind: Kind = "regression" if link == "none" else "class"
        return Target(kind, class_name(labels, best), (best,), link)
    if text not in labels and "-vs-" in text:
        a, b = (_index(part, labels, outputs) for part in _sides(text, labels))
        label = f"{class_name(labels, a)}-vs-{class_name(labels, b)}"
        return Target("contrast", label, (a, b), link)
    c = _index(text, labels, outputs)
    return Target("regression" if link == "none" else "class", class_name(labels, c), (c,), link)
