"""What is one finding of a check-up, and which words and figures do several of them share?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["wrong", "check", "fine", "not applicable"]
VERDICTS: dict[Verdict, str] = {
    "wrong": "a map that these tools made of this network is wrong in this",
    "check": "it depends on how the map was made or read",
    "fine": "this trap does not bite on this network and scan",
    "not applicable": "there is nothing here that it could bite on",
}

# The versions whose source the rules were read from.
MONAI, GRAD_CAM, TORCHCAM = "MONAI 1.6.1", "pytorch-grad-cam 1.5.7", "torchcam 0.5.0"
MEDCAM, CAPTUM = "M3d-Cam (medcam) 0.1.22", "captum 0.9.0"
MEDCAM3D, NNUNET_CAM = "medcam3d 0.0.4", "nnunetv2-cam 0.1.6.1"
HEIRS = (MEDCAM3D, NNUNET_CAM)  # they build on pytorch-grad-cam
ALL_FIVE = (MONAI, GRAD_CAM, TORCHCAM, MEDCAM, CAPTUM)
EVERY = "every tool"

Figure = float | str | bool | None | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One trap on this network and scan.

    `key`: short name; `traps`: numbers on the page docs/why-not-the-others.md; `finding` with the
    measured figure, `meaning` for maps made earlier, `advice`, the `tools` that it concerns with a
    `note` on them, and all `figures` by name. Not applicable: the finding is the reason, and the
    rest is empty.
    """

    key: str
    traps: tuple[str, ...]
    verdict: Verdict
    finding: str
    meaning: str = ""
    advice: str = ""
    tools: tuple[str, ...] = ()
    note: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)


def absent(key: str, traps: tuple[str, ...], reason: str) -> Row:
    """A trap that has nothing to bite on."""
    return Row(key, traps, "not applicable", reason)


def correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Pearson's r of two maps; None where one of them is constant or not finite."""
    x, y = (np.asarray(v, dtype=np.float64).ravel() for v in (a, b))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size > 0 else None


def said(r: float | None) -> str:
    """A correlation for people."""
    if r is None:
        return "nothing (one of the two is the same everywhere)"
    return f"{r:.4f}" if 0.98 <= r < 0.99995 else f"{r:.2f}"


def percent(share: float) -> str:
    """A share for people, without a minus before nothing."""
    return f"{round(share, 2) + 0.0:.0%}"


def mm(values: Sequence[float]) -> str:
    """Sizes along three axes for people."""
    return " x ".join(f"{v:.1f}" for v in values) + " mm"


def some(names: Sequence[str], most: int = 4) -> str:
    """A list of names for people, cut short."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
