"""What does one transform of a bundle mean, with all of its arguments?

One reader per transform of monai.transforms. A setting that is not understood is an error of its
own, so that nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from med_gradcam.model import Step
from med_gradcam.models._bundle_stages import (
    Centred,
    Counts,
    Fill,
    Fixed,
    Foreground,
    Padded,
    Resized,
    Respaced,
    Scaled,
    Stage,
)  # fmt: skip
from med_gradcam.models._bundle_words import Above

# Arguments that say how MONAI does its work, not what it does to the voxels.
_WORK = frozenset(
    """
    keys allow_missing_keys meta_keys meta_key_postfix image_only simple_keys lazy device
    prune_meta_namespace prune_meta_sep overwriting reader affine_lps_to_ras ensure_channel_first
    strict_check channel_dim track_meta data_type wrap_sequence start_coord_key end_coord_key
    source_key recompute_affine drop_meta expanduser squeeze_non_spatial_dims
    """.split()
)


class NotHonouredError(Exception):
    """A transform, or a setting of it, that is not understood; the text says which."""


@dataclass(slots=True)
class Arguments:
    """The arguments of one transform; what nobody asked for is not understood."""

    values: dict[str, Any]
    separate: bool = False  # several images that are not joined to channels yet
    used: set[str] = field(default_factory=set)

    def take(self, name: str, default: Any = None) -> Any:
        """An argument; a list of one counts as the one."""
        self.used.add(name)
        value = self.values.get(name, default)
        return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value

    def number(self, name: str, default: float | None = None) -> float:
        """An argument that is a number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise NotHonouredError(f"{name}={value!r}")
        return float(value)

    def counts(self, name: str, default: Any = 0) -> Counts:
        """Three whole numbers, one for all axes or one each; negative ones become 0."""
        value = self.take(name, default)
        listed = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        listed += [0] * (len(listed) == 2)  # of an image: a volume of one slice
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in listed)
        if len(listed) != 3 or not whole:
            raise NotHonouredError(f"{name}={value!r}")
        a, b, c = (max(int(v), 0) for v in listed)
        return a, b, c

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse any other value than those that change nothing."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise NotHonouredError(f"{name}={value!r}")

    def flag(self, name: str, *, default: bool = False) -> bool:
        """An argument that is a switch; as in Python, any text but the empty one is on."""
        return bool(self.take(name, default))

    def unset(self, name: str) -> None:
        """Refuse a switch that is on."""
        if self.flag(name):
            raise NotHonouredError(f"{name}={self.values[name]!r}")

    def check_rest(self) -> None:
        """Refuse an argument that was not understood."""
        rest = [k for k in self.values if k not in self.used and k not in _WORK]
        if rest:
            raise NotHonouredError(f"{rest[0]}={self.values[rest[0]]!r}")


# -------------------------------------------------------------------------------------- the table


def _load(a: Arguments) -> list[Stage]:
    a.only("dtype", None, "float32", "float64", "float")
    return []


def _typed(a: Arguments) -> list[Stage]:
    a.only("dtype", None, "float32", "float64", "float")
    return []


def _range(a: Arguments) -> list[Stage]:
    a.only("dtype", None, "float32", "float64", "float")
    low, high = a.number("a_min"), a.number("a_max")
    bounds = a.take("b_min"), a.take("b_max")
    if low == high:
        raise NotHonouredError(f"a_min=a_max={low:g}")
    clip = a.flag("clip")
    if bounds == (None, None):
        if clip:
            raise NotHonouredError("clip without b_min and b_max")
        return [Fixed((Step("normalise", ((low,), (high - low,))),))]
    to_low, to_high = a.number("b_min"), a.number("b_max")
    if to_low == to_high:
        raise NotHonouredError(f"b_min=b_max={to_low:g}")
    share = (high - low) / (to_high - to_low)
    steps = [Step("normalise", ((low - to_low * share,), (share,)))]
    if clip:
        steps.append(Step("clip", ((min(to_low, to_high),), (max(to_low, to_high),))))
    return [Fixed(tuple(steps))]


def _percentiles(a: Arguments) -> list[Stage]:
    a.only("dtype", None, "float32", "float64", "float")
    lower, upper = a.number("lower"), a.number("upper")
    low, high = a.number("b_min"), a.number("b_max")
    if a.flag("relative"):
        low, high = ((high - low) * q / 100 + low for q in (lower, upper))
    if not (0 <= lower < upper <= 100 and low < high):
        raise NotHonouredError(f"lower={lower:g}, upper={upper:g}, b_min={low:g}, b_max={high:g}")
    clip, apart = a.flag("clip"), a.flag("channel_wise") or a.separate
    return [Scaled((lower / 100, upper / 100), low, high, clip, apart)]


def _scale(a: Arguments) -> list[Stage]:
    a.only("dtype", None, "float32", "float64", "float")
    apart = a.flag("channel_wise") or a.separate
    low, high = a.take("minv", 0.0), a.take("maxv", 1.0)
    factor = a.take("factor")
    if low is None and high is None and factor is not None:
        return [Fixed((Step("scale", ((1.0 + a.number("factor"),),)),))]
    low, high = a.number("minv", 0.0), a.number("maxv", 1.0)
    if factor is not None or low >= high:
        raise NotHonouredError(f"minv={low:g}, maxv={high:g}, factor={factor}")
    return [Scaled((0.0, 1.0), low, high, per_channel=apart)]


def _normalise(a: Arguments) -> list[Stage]:
    a.only("dtype", None, "float32", "float64", "float")
    nonzero = a.flag("nonzero")
    apart = a.flag("channel_wise") or a.separate
    given = a.take("subtrahend"), a.take("divisor")
    if given == (None, None):
        return [Fixed((Step("zscore", ((float(nonzero),), (float(apart),))),))]
    if None in given:
        raise NotHonouredError("subtrahend or divisor alone")
    lists = [list(g) if isinstance(g, (list, tuple)) else [g] for g in given]
    for numbers in lists:
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
            raise NotHonouredError(f"subtrahend={given[0]!r}, divisor={given[1]!r}")
    mean = tuple(float(n) for n in lists[0])
    sd = tuple(float(n) if n else 1.0 for n in lists[1])  # MONAI takes 1 for 0
    return [Fixed((Step("normalise_nonzero" if nonzero else "normalise", (mean, sd)),))]


def _threshold(a: Arguments) -> list[Stage]:
    above = float(a.flag("above", default=True))
    step = Step("threshold", ((a.number("threshold"),), (above,), (a.number("cval", 0.0),)))
    return [Fixed((step,))]


def _shift(a: Arguments) -> list[Stage]:
    a.unset("safe")
    return [Fixed((Step("normalise", ((-a.number("offset"),), (1.0,))),))]


def _spacing(a: Arguments) -> list[Stage]:
    a.unset("diagonal")
    a.unset("scale_extent")
    a.only("padding_mode", "border", "nearest")
    for name in ("dtype", "align_corners"):
        a.take(name)
    for name in ("min_pixdim", "max_pixdim"):
        a.only(name, None)
    pixdim = a.take("pixdim")
    listed = list(pixdim) if isinstance(pixdim, (list, tuple)) else [pixdim]
    if not 1 <= len(listed) <= 3 or not all(isinstance(p, (int, float)) for p in listed):
        raise NotHonouredError(f"pixdim={pixdim!r}")
    mode = a.take("mode", "bilinear")
    if mode not in ("bilinear", "linear", "trilinear", 1, 3):
        raise NotHonouredError(f"mode={mode!r}")
    x, y, z = (max(float(p), 0.0) for p in [*listed, *[listed[-1]] * (3 - len(listed))])
    return [Respaced((x, y, z), cubic=mode == 3)]


def _resize(a: Arguments) -> list[Stage]:
    a.only("size_mode", "all")
    a.unset("anti_aliasing")
    a.take("dtype")
    a.take("anti_aliasing_sigma")
    mode, corners = a.take("mode", "area"), a.flag("align_corners")
    kinds = {"area": "area", "nearest": "nearest", "trilinear": "linear", "bilinear": "linear"}
    if mode not in kinds or (corners and kinds[mode] != "linear"):
        raise NotHonouredError(f"mode={mode!r}")
    return [Resized(a.counts("spatial_size"), "corners" if corners else kinds[mode])]


def _fill(a: Arguments, default: float = 0.0) -> Fill:
    mode = a.take("mode", "constant")
    if mode in ("edge", "replicate"):
        return Fill("edge")
    if mode == "minimum":
        return Fill("minimum")
    if mode != "constant":
        raise NotHonouredError(f"mode={mode!r}")
    value = a.take("value", a.take("constant_values", default))
    if not isinstance(value, (int, float)):
        raise NotHonouredError(f"value={value!r}")
    return Fill("constant", float(value))


def _pad(a: Arguments) -> list[Stage]:
    return [Padded(a.counts("spatial_size"), _fill(a), symmetric=_symmetric(a))]


def _divisible(a: Arguments) -> list[Stage]:
    return [Padded(a.counts("k"), _fill(a), multiple=True, symmetric=_symmetric(a))]


def _symmetric(a: Arguments) -> bool:
    method = a.take("method", "symmetric")
    if method not in ("symmetric", "end"):
        raise NotHonouredError(f"method={method!r}")
    return bool(method == "symmetric")


def _centre(a: Arguments) -> list[Stage]:
    return [Centred(a.counts("roi_size"))]


def _pad_or_crop(a: Arguments) -> list[Stage]:
    size = a.counts("spatial_size")
    return [Centred(size), Padded(size, _fill(a), symmetric=_symmetric(a))]


def _foreground(a: Arguments) -> list[Stage]:
    if a.separate:
        raise NotHonouredError("on images that are not joined yet")
    a.only("channel_indices", None)
    a.unset("return_coords")
    select = a.take("select_fn")
    if select is not None and not isinstance(select, Above):
        raise NotHonouredError("select_fn")
    k = a.counts("k_divisible", 1)
    x, y, z = (max(n, 1) for n in k)
    smaller = a.flag("allow_smaller")
    box = Foreground(
        select.limit if isinstance(select, Above) else 0.0,
        a.counts("margin", 0),
        smaller,
        (x, y, z),
        _fill(a),
        turned=(x, y, z) != (1, 1, 1),
    )
    return [box]


READERS: dict[str, Callable[[Arguments], list[Stage]]] = {
    "LoadImage": _load,
    "EnsureType": _typed,
    "CastToType": _typed,
    "ScaleIntensityRange": _range,
    "ScaleIntensityRangePercentiles": _percentiles,
    "ScaleIntensity": _scale,
    "NormalizeIntensity": _normalise,
    "ThresholdIntensity": _threshold,
    "ShiftIntensity": _shift,
    "Spacing": _spacing,
    "Resize": _resize,
    "SpatialPad": _pad,
    "DivisiblePad": _divisible,
    "CenterSpatialCrop": _centre,
    "ResizeWithPadOrCrop": _pad_or_crop,
    "CropForeground": _foreground,
}
