"""What does a network expect and mean: its input, labels, link function and digests?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from med_gradcam.calibration import Calibration
from med_gradcam.errors import ModelError
from med_gradcam.geometry import Geometry, check_axcodes
from med_gradcam.target import LINKS, Link

if TYPE_CHECKING:
    import torch

Numbers = tuple[float, ...]
INTERPOLATIONS = ("linear", "cubic")


@dataclass(frozen=True, slots=True)
class Step:
    """One intensity step: its name and its numbers, one tuple per argument.

    clip ((low,), (high,)); scale ((factor,),); normalise (means, sds), one per channel or one for
    all; threshold ((limit,), (above,), (value,)) gives what is not above (0: below) it a value.
    Measured on the whole scan: quantile_scale ((low,), (high,)) quantiles to 0..1, clipped;
    minmax_scale ((low,), (high,)) the values' whole range to low..high; zscore ((nonzero,),
    (per_channel,)) to mean 0 and sd 1, each 0 or 1: `nonzero` measures, and changes, only voxels
    that are not 0. normalise_nonzero (means, sds) is what such a zscore becomes.
    """

    name: str
    arguments: tuple[Numbers, ...]

    def __post_init__(self) -> None:
        wanted = {
            "clip": 2,
            "scale": 1,
            "threshold": 3,
            "normalise": 2,
            "normalise_nonzero": 2,
            "quantile_scale": 2,
            "minmax_scale": 2,
            "zscore": 2,
        }
        if self.name not in wanted:
            raise ModelError(
                f"expected an intensity step of {', '.join(wanted)}, got {self.name!r}."
            )
        if len(self.arguments) != wanted[self.name] or not all(self.arguments):
            raise ModelError(
                f"expected {wanted[self.name]} arguments for the intensity step {self.name!r}, "
                f"got {len(self.arguments)}."
            )
        if not all(math.isfinite(n) for numbers in self.arguments for n in numbers):
            raise ModelError(
                f"expected finite numbers in the intensity step {self.name!r}, "
                f"got {self.arguments}."
            )
        low, high = self.arguments[0][0], self.arguments[-1][0]
        if self.name == "clip" and low >= high:
            raise ModelError(f"expected clip low < high, got {low} and {high}.")
        if self.name == "quantile_scale" and not 0 <= low < high <= 1:
            raise ModelError(f"expected quantiles 0 <= low < high <= 1, got {low} and {high}.")
        if self.name == "minmax_scale" and low >= high:
            raise ModelError(f"expected minmax_scale low < high, got {low} and {high}.")
        if self.name == "zscore" and {low, high} - {0.0, 1.0}:
            raise ModelError(f"expected 0 or 1 as the switches of zscore, got {low} and {high}.")
        if self.name.startswith("normalise") and 0.0 in self.arguments[1]:
            raise ModelError("expected standard deviations other than 0 in normalise, got 0.")


def parse_steps(listed: object) -> tuple[Step, ...]:
    """Intensity steps written as [name, numbers...], a list of numbers being one per channel.

    Raises:
        ModelError: they are not written so, or are no such steps.
    """
    if not isinstance(listed, (list, tuple)):
        raise ModelError(f"expected a list of intensity steps, got {listed!r}.")
    steps = []
    for step in listed:
        if isinstance(step, Step):
            steps.append(step)
        elif isinstance(step, (list, tuple)) and step and isinstance(step[0], str):
            steps.append(Step(step[0], tuple(_numbers(a) for a in step[1:])))
        else:
            raise ModelError(f"expected intensity steps as [name, numbers...], got {step!r}.")
    return tuple(steps)


def _numbers(value: object) -> Numbers:
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ModelError(f"expected numbers in an intensity step, got {value!r}.")
    return tuple(float(v) for v in values)


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A scan as a recipe leaves it: voxel n along an axis lies at start + n * jump of the scan's.

    `exact` (C, i, j, k) is what the network takes; `raw` the same voxels in the scan's own unit,
    which `steps` bring there as well as they can.
    """

    raw: npt.NDArray[np.float32]
    exact: npt.NDArray[np.float32]
    start: tuple[float, float, float]
    jump: tuple[float, float, float]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()


# What the source's own code makes of the files at some paths: (C, i, j, k) and affine (RAS+ mm).
Source = Callable[[Sequence[str]], "tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]"]
# A pipeline's own way from a scan (C, i, j, k) and its voxels' size in mm to the network's input.
Recipe = Callable[["npt.NDArray[Any]", tuple[float, float, float]], Ready]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The array a network takes. None means: as the scan is.

    `axes`: patient directions of the array's axes, "SPL" = superior, posterior, left, or "kji", the
    file's own axes in reverse; `patch` and
    `min_patch` in voxels; `spacing_mm` along those axes; `intensity` the steps in order;
    `interpolation` linear or cubic, for the change of spacing; `intensity_first`: the steps are
    done before that change, not after it. `recipe`: all that in the source pipeline's own way,
    instead of spacing and intensity; `recipe_on`: the same where it depends on the affine of the
    scan (on `axes`); `padding`: the network's input beside a scan smaller than the
    patch.
    """

    channels: int = 1
    modality: str | None = None
    axes: str | None = None
    patch: tuple[int, int, int] | None = None
    min_patch: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    intensity: tuple[Step, ...] = ()
    interpolation: str = "linear"
    intensity_first: bool = False
    recipe: Recipe | None = None
    recipe_on: Callable[[Geometry], Recipe] | None = None
    padding: float | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ModelError(
                f"expected an interpolation of {', '.join(INTERPOLATIONS)}, "
                f"got {self.interpolation!r}."
            )
        if self.channels < 1:
            raise ModelError(f"expected at least one input channel, got {self.channels}.")
        if self.axes is not None:
            object.__setattr__(self, "axes", check_axcodes(self.axes))
        for name in ("patch", "min_patch", "spacing_mm"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or not all(0 < n < math.inf for n in value)):
                raise ModelError(f"expected three positive numbers as {name}, got {value}.")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if not all(isinstance(step, Step) for step in self.intensity):
            raise ModelError(
                f"expected intensity steps as Step(name, numbers), got {self.intensity}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A network in eval mode and what it means.

    `aliases`: short layer names -> torch module paths, the author's choice of layers to explain.
    `calibration`: the fixed colour scales that came with the model. `notes`: what its file left
    open and was assumed about the model; they are written beside each result. `drift`: the steps
    of its own preprocessing that are not done here, refused unless the user accepts them;
    `source_input`: what that preprocessing makes of image files, for the comparison.
    """

    net: torch.nn.Module
    input: InputSpec
    labels: tuple[str, ...] = ()
    link: Link = "softmax"
    name: str = "unnamed network"
    weights_sha256: str = ""
    licence: str = "not stated"
    task: str = "classification"
    aliases: Mapping[str, str] = field(default_factory=dict)
    calibration: tuple[Calibration, ...] = ()
    notes: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()
    source_input: Source | None = None

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ModelError(f"expected a link of {', '.join(LINKS)}, got {self.link!r}.")
        for text in (*self.labels, self.name, self.licence, self.task, *self.aliases):
            if not text.isprintable():
                raise ModelError(f"expected printable labels and names, got {text!r}.")
        if len(set(self.labels)) != len(self.labels):
            raise ModelError(f"expected different labels, got {list(self.labels)}.")
        object.__setattr__(self, "aliases", MappingProxyType(dict(self.aliases)))

    def scale_for(self, target: str, method: str, layer: str) -> Calibration | None:
        """The calibrated colour scale of a (target, method, layer), if the model carries one."""
        key = (target, method, layer)
        return next((c for c in self.calibration if (c.target, c.method, c.layer) == key), None)
