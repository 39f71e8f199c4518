"""What is explained: which number of the model's output, as log-odds?

By link: sigmoid -> y; softmax -> y_c - logsumexp of the others (two logits:
y1 - y0); contrast -> y_c - y_d, or y_c - w y_d; regression -> y in its own unit. Where the output
is a map, the mean of these over a region of it. Never a probability, whose gradient vanishes when
the model is sure. Log-odds of a softmax are blind to a number that is added to all logits.
Source: Zhang et al., Finer-CAM, CVPR 2025, arXiv 2501.11309 (w); Vinogradova et al., Seg-Grad-CAM,
AAAI 2020, arXiv 2002.11434 (region).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError
from med_gradcam.outputs import batch_size, first_tensor, is_tensor, item, select

if TYPE_CHECKING:
    import torch

Link = Literal["softmax", "sigmoid", "none"]
Kind = Literal["class", "contrast", "regression", "region", "custom"]
LINKS: tuple[Link, ...] = ("softmax", "sigmoid", "none")
_INDEX: dict[str, tuple[int, ...]] = {  # how many classes a kind of target names
    "class": (1,),
    "contrast": (2,),
    "regression": (1,),
    "region": (1, 2),
    "custom": (0,),
}
_LISTED = 20  # classes that an error lists
_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\*(.+)")


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a detector.

    `number` counts its boxes by score from 1, and is 0 for one that it did not keep; `score` of its
    `label`, log-odds; `size_mm` along the scan's axes closest to right-left, anterior-posterior and
    superior-inferior.
    """

    number: int
    label: str
    score: float
    centre_ras_mm: tuple[float, float, float]
    size_mm: tuple[float, float, float]

    @property
    def probability(self) -> float:
        """The detector's own score, 0..1."""
        return _sigmoid(self.score)


@dataclass(frozen=True, slots=True)
class TargetRegion:
    """Where the score of a map is read.

    `kind`: predicted, component, mask, voxel, box or detection (an anchor of a detector); `words`
    for people; `voxels` of the network's output that count at all, the sum of their weights (0..1
    each), and a digest of the weights; `boxes` of a detection, the explained one first.
    """

    kind: str
    words: str
    voxels: int
    weight: float
    sha256: str
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        given: tuple[Any, ...] = tuple(self.boxes)  # of a file: plain values
        made = tuple(b if isinstance(b, Box) else Box(**_tuples(b)) for b in given)
        object.__setattr__(self, "boxes", made)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Weights (i, j, k) of the voxels of an output map: `values` at `start`, elsewhere 0."""

    shape: tuple[int, int, int]
    start: tuple[int, int, int]
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """One number of a model's output. Called on the raw output it gives scores (B,).

    `index` holds the class (c,), or (c, d) where one is compared with another at `rival_weight`;
    `output` is the place of the tensor in the raw output, "" for the first. A region target has
    `region`, a custom one nothing but its label. What only works in memory, the region's `weights`
    and the user's `function`, is not part of the value: a target that was read from a file equals
    the one that was written, but a region or custom target then cannot be called.
    """

    kind: Kind
    label: str
    index: tuple[int, ...]
    link: Link
    rival_weight: float = 1.0
    output: str = ""
    region: TargetRegion | None = None
    weights: Weights | None = field(default=None, compare=False, repr=False)
    function: Callable[[Any], Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise UsageError(f"expected a link of {', '.join(LINKS)}, got {self.link!r}.")
        if self.kind not in _INDEX:
            raise UsageError(f"expected a kind of {', '.join(_INDEX)}, got {self.kind!r}.")
        if len(self.index) not in _INDEX[self.kind] or min(self.index, default=0) < 0:
            raise UsageError(f"expected an index that fits a {self.kind} target, got {self.index}.")
        if len(set(self.index)) != len(self.index):
            raise UsageError(f"expected two different classes to compare, got {self.label!r}.")
        rivals = len(self.index) == 2
        if not 0 < self.rival_weight < math.inf or (not rivals and self.rival_weight != 1):
            raise UsageError(
                f"expected a weight above 0, for the rival of a contrast only, "
                f"got {self.rival_weight:g} for {self.label!r}."
            )
        if (self.kind == "region") != (self.region is not None):
            raise UsageError(f"expected a region for a region target only, got {self.kind!r}.")

    @property
    def unit(self) -> str:
        """Unit of the score: "log-odds", or "score" where the number is no log-odds.

        That is so without a link function, and for a rival's weight other than 1 behind a softmax.
        """
        lopsided = self.link == "softmax" and self.rival_weight != 1
        return "score" if self.link == "none" or lopsided else "log-odds"

    @property
    def words(self) -> tuple[str, str]:
        """What evidence for and evidence against do: "raises", "lowers"."""
        amount = self.kind == "regression" or (self.kind == "region" and self.link == "none")
        return ("pulls up", "pulls down") if amount else ("raises", "lowers")

    @property
    def about(self) -> str:
        """For people: what the score is, beyond the label; "" where the label says it all."""
        if self.region is None:
            return "" if self.kind != "custom" else "a function of the user's"
        r = self.region
        if r.kind == "detection":
            return r.words
        where = f" {self.output}" if self.output else ""
        return f"mean over {r.words} ({r.voxels} voxels of the network's output{where})"

    def __call__(self, output: object) -> torch.Tensor:
        """Scores (B,) of a model's raw output: (B, K), a map (B, K, i, j, k), or what holds it."""
        if self.kind == "custom":
            return self._custom(select(output, self.output))
        if self.kind == "region":
            return self._mean(output_map(first_tensor(output, self.output)))
        logits = output_matrix(first_tensor(output, self.output))
        self._check_index(logits)
        return log_odds(logits, self.index, self.link, self.rival_weight)

    def probability(self, score: float) -> float | None:
        """The model's probability at a score in log-odds; None where there is none."""
        boxed = self.region is not None and self.region.kind == "detection" and len(self.index) == 1
        if not (boxed or self.kind == "class") or self.link == "none":
            return None
        return _sigmoid(score)

    def _check_index(self, logits: torch.Tensor) -> None:
        if max(self.index) >= logits.shape[1]:
            raise UsageError(
                f"expected a class index below {logits.shape[1]} (the model's outputs), "
                f"got {max(self.index)} for {self.label!r}."
            )

    def _mean(self, logits: torch.Tensor) -> torch.Tensor:
        w = self.weights
        if w is None:
            raise UsageError(
                f"the region of {self.label!r} cannot be scored again: its weights are not part of "
                f"a file, only their sum and digest; name the region again in explain()."
            )
        self._check_index(logits)
        if tuple(logits.shape[2:]) != w.shape:
            raise UsageError(
                f"expected an output map of {w.shape} voxels for the region of {self.label!r}, "
                f"got {tuple(logits.shape[2:])}."
            )
        i, j, k = (slice(s, s + n) for s, n in zip(w.start, w.values.shape, strict=True))
        weights = w.values.to(device=logits.device, dtype=logits.dtype)
        voxels = log_odds(logits[:, :, i, j, k], self.index, self.link, self.rival_weight)
        return (voxels * weights).sum(dim=(1, 2, 3)) / weights.sum()

    def _custom(self, output: object) -> torch.Tensor:
        import torch

        if self.function is None:
            raise UsageError(
                f"the target {self.label!r} cannot be scored again: a function is not part of a "
                f"file; hand it to explain() again."
            )
        count = batch_size(output)  # one by one: a function that adds up cannot mix the items
        parts = [output] if count == 1 else [item(output, n, count) for n in range(count)]
        return torch.cat([_one_number(self.function(part), self.label) for part in parts])


def _sigmoid(score: float) -> float:
    if score >= 0:
        return 1.0 / (1.0 + math.exp(-score))
    return math.exp(score) / (1.0 + math.exp(score))


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds of a dataclass, its lists as tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}


def _one_number(score: Any, label: str) -> torch.Tensor:
    if not is_tensor(score) or score.numel() != 1 or score.is_complex():
        got = tuple(score.shape) if is_tensor(score) else type(score).__name__
        raise UsageError(
            f"expected the target function {label!r} to return one real number per scan as a "
            f"tensor, shape () or (B,), got {got}."
        )
    one: torch.Tensor = score.reshape(1)
    return one


def log_odds(
    logits: torch.Tensor, index: Sequence[int], link: Link, rival_weight: float = 1.0
) -> torch.Tensor:
    """Scores (B, ...) of logits (B, K, ...): of class c, or of (c, d), c rather than d."""
    c = index[0]
    if len(index) == 2:
        rival = logits[:, index[1]]
        return logits[:, c] - (rival if rival_weight == 1 else rival_weight * rival)
    if link != "softmax" or logits.shape[1] == 1:
        return logits[:, c]
    others = [i for i in range(logits.shape[1]) if i != c]
    if len(others) == 1:  # two logits: the plain difference, antisymmetric bit for bit
        return logits[:, c] - logits[:, others[0]]
    return logits[:, c] - logits[:, others].logsumexp(dim=1)


# ------------------------------------------------------------------------- the output's shape


def is_map(tensor: torch.Tensor) -> bool:
    """Whether this is a map (B, K, i, j, k), and not one row of scores per scan."""
    return tensor.ndim == 5 and any(n > 1 for n in tensor.shape[2:])


def output_matrix(output: object) -> torch.Tensor:
    """The model's output as (B, K): a tensor, or the first tensor of a tuple, list or dict.

    Raises:
        CannotExplainError: there is no tensor, or it is a map and not a vector per case.
    """
    tensor = first_tensor(output)
    if tensor.ndim > 2 and all(n == 1 for n in tensor.shape[2:]):
        tensor = tensor.flatten(1)
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    if tensor.ndim != 2:
        raise _no_shape(tensor, "one score vector (B, K) per scan")
    return tensor


def output_map(output: object) -> torch.Tensor:
    """The model's output as a map (B, K, i, j, k).

    Raises:
        CannotExplainError: it has another shape.
    """
    tensor = first_tensor(output)
    if tensor.ndim != 5:
        raise _no_shape(tensor, "a map (B, K, i, j, k) per scan")
    return tensor


def _no_shape(tensor: torch.Tensor, wanted: str) -> CannotExplainError:
    return CannotExplainError(
        "dense",
        f"expected a network with {wanted}, got an output of shape {tuple(tensor.shape)}; explain "
        f"a number of your own with a function as target, or another output by its place.",
    )


# ----------------------------------------------------------------------------- what users write


def class_name(labels: Sequence[str], index: int) -> str:
    """The label of an output, or "class 3" where the model names none."""
    return labels[index] if index < len(labels) else f"class {index}"


def _index(text: str, labels: Sequence[str], outputs: int) -> int:
    if text in labels:
        return list(labels).index(text)
    named = [class_name(labels, n) for n in range(outputs)]
    if text in named:
        return named.index(text)
    digits = text.removeprefix("#")
    if digits.isdecimal() and int(digits) < outputs:
        return int(digits)
    known = list(labels) or [str(i) for i in range(outputs)]
    listed = ", ".join(labels[:_LISTED]) + (" and others" if len(labels) > _LISTED else "")
    hint = f"The classes are {listed}. " if labels else ""
    raise UnknownNameError("class", text, known, f"{hint}An index goes from 0 to {outputs - 1}.")


def _weighted(text: str, labels: Sequence[str]) -> tuple[float, str]:
    """The weight and the class of a rival written as B or 0.6*B."""
    found = None if text in labels else _WEIGHTED.fullmatch(text)
    return (1.0, text) if found is None else (float(found[1]), found[2])


def _sides(text: str, labels: Sequence[str]) -> tuple[str, float, str]:
    """A, w and B of A-vs-B or A-vs-w*B; a label that holds "-vs-" itself stays whole."""
    parts = text.split("-vs-")
    ways = [
        ("-vs-".join(parts[:n]), *_weighted("-vs-".join(parts[n:]), labels))
        for n in range(1, len(parts))
    ]
    return max(ways, key=lambda way: (way[0] in labels) + (way[2] in labels))


def parse_classes(
    text: str, labels: Sequence[str], outputs: int
) -> tuple[tuple[int, ...], str, float]:
    """Index, label and the rival's weight of a label, an index, "#3", "A-vs-B" or "A-vs-0.6*B".

    Raises:
        UnknownNameError: no such class.
    """
    if text in labels or "-vs-" not in text:
        c = _index(text, labels, outputs)
        return (c,), class_name(labels, c), 1.0
    left, weight, right = _sides(text, labels)
    a, b = _index(left, labels, outputs), _index(right, labels, outputs)
    rival = class_name(labels, b) if weight == 1 else f"{weight:g}*{class_name(labels, b)}"
    return (a, b), f"{class_name(labels, a)}-vs-{rival}", weight


def parse_target(text: str, labels: Sequence[str], link: Link, scores: Sequence[float]) -> Target:
    """The target a user means by "auto", a label, an index, "#3", "A-vs-B" or "A-vs-0.6*B".

    `scores` are the model's raw outputs for this scan; "auto" takes the predicted class, or the
    only output.

    Raises:
        UnknownNameError: no such class.
        UsageError: "auto" for several outputs without a link function.
    """
    outputs = len(scores)
    single: Kind = "regression" if link == "none" else "class"
    if text == "auto":
        if link == "none" and outputs > 1:
            raise UsageError(
                f"expected a target, since the model has {outputs} outputs and no link function; "
                f"name one of: {', '.join(class_name(labels, i) for i in range(outputs))}."
            )
        best = max(range(outputs), key=lambda i: scores[i])
        return Target(single, class_name(labels, best), (best,), link)
    index, label, weight = parse_classes(text, labels, outputs)
    return Target("contrast" if len(index) == 2 else single, label, index, link, weight)
