"""Which torch functions do ONNX's moving windows stand for: convolutions and pools?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from med_gradcam.containers.onnx_node import Form, Node

_CONV: dict[int, Callable[..., torch.Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_BACK: dict[int, Callable[..., torch.Tensor]] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}
_MAX: dict[int, Callable[..., Any]] = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Any]] = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_ONE_MEAN: dict[int, Callable[..., Any]] = {
    3: F.adaptive_avg_pool1d,
    4: F.adaptive_avg_pool2d,
    5: F.adaptive_avg_pool3d,
}
_ONE_MAX: dict[int, Callable[..., Any]] = {
    3: F.adaptive_max_pool1d,
    4: F.adaptive_max_pool2d,
    5: F.adaptive_max_pool3d,
}


@dataclass(frozen=True, slots=True)
class Window:
    """A window along all axes: kernel, stride, dilation and what is put before and behind."""

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    behind: list[int]

    @property
    def even(self) -> bool:
        """Whether as much is put before as behind."""
        return self.before == self.behind

    @property
    def wide(self) -> list[int]:
        """How many cells each window covers."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]


def _of_rank(table: dict[int, Any], node: Node, rank: int) -> Any:
    if rank not in table:
        raise node.no_form(f"works on {rank - 2} axes, for which torch has no form")
    return table[rank]


def _window(node: Node, kernel: Sequence[int], size: Sequence[int]) -> Window:
    count = len(kernel)
    stride = list(node.get("strides") or [1] * count)
    dilation = list(node.get("dilations") or [1] * count)
    pads = list(node.get("pads") or [0] * 2 * count)
    auto = node.get("auto_pad", "NOTSET")
    before, behind = pads[:count], pads[count:]
    if auto == "VALID":
        before, behind = [0] * count, [0] * count
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        before, behind = (less, more) if auto == "SAME_UPPER" else (more, less)
    return Window(list(kernel), stride, dilation, before, behind)


def _sides(before: Sequence[int], behind: Sequence[int]) -> list[int]:
    """As F.pad wants them, the last axis first."""
    pairs = list(zip(before, behind, strict=True))
    return [side for pair in reversed(pairs) for side in pair]


def _conv(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    conv = _of_rank(_CONV, node, weight.ndim)
    own = _window(node, weight.shape[2:], x.shape[2:])
    padding = own.before
    if not own.even:
        x, padding = F.pad(x, _sides(own.before, own.behind)), [0] * len(own.kernel)
    groups = int(node.get("group", 1))
    made: torch.Tensor = conv(x, weight, bias, own.stride, padding, own.dilation, groups)
    return made


def _conv_transpose(
    node: Node, x: torch.Tensor, weight: torch.Tensor, bias: Any = None
) -> torch.Tensor:
    conv = _of_rank(_BACK, node, weight.ndim)
    count, groups = weight.ndim - 2, int(node.get("group", 1))
    stride = list(node.get("strides") or [1] * count)
    dilation = list(node.get("dilations") or [1] * count)
    extra = list(node.get("output_padding") or [0] * count)
    wide = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    full = [s * (n - 1) + w for s, n, w in zip(stride, x.shape[2:], wide, strict=True)]
    before, behind = _cropped(node, x.shape[2:], full, extra, stride)
    more = [o + b - e for o, b, e in zip(extra, before, behind, strict=True)]
    fits = all(b >= 0 for b in before) and all(
        0 <= m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)
    )
    if fits:
        out: torch.Tensor = conv(x, weight, bias, stride, before, more, groups, dilation)
        return out
    out = conv(x, weight, None, stride, 0, 0, groups, dilation)
    ends = [o - e for o, e in zip(extra, behind, strict=True)]
    out = F.pad(out, _sides([-b for b in before], ends))
    return out if bias is None else out + bias.reshape(1, -1, *[1] * count)


def _cropped(
    node: Node,
    size: Sequence[int],
    full: Sequence[int],
    extra: Sequence[int],
    stride: Sequence[int],
) -> tuple[list[int], list[int]]:
    """How much of a whole transposed convolution falls away before and behind."""
    auto, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    count = len(size)
    if wanted is None and auto in ("NOTSET", "VALID"):
        pads = list(node.get("pads") or [0] * 2 * count)
        return ([0] * count, [0] * count) if auto == "VALID" else (pads[:count], pads[count:])
    if wanted is None:
        wanted = [n * s for n, s in zip(size, stride, strict=True)]
    total = [f + o - w for f, o, w in zip(full, extra, list(wanted)[-count:], strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


# ---------------------------------------------------------------------------------------- pools


def _pooled(node: Node, x: torch.Tensor) -> tuple[Window, bool]:
    """The window of a pool, and whether torch has the same one."""
    own = _window(node, node.get("kernel_shape"), x.shape[2:])
    halves = all(2 * b <= k for b, k in zip(own.before, own.kernel, strict=True))
    if node.get("auto_pad", "NOTSET") != "NOTSET":
        return own, own.even and halves  # the number of windows is fixed
    return own, own.even and halves


def _reach(node: Node, own: Window, size: Sequence[int]) -> list[int]:
    """How much must follow each axis so that all windows fit; negative: what no window sees."""
    found = []
    up = bool(node.get("ceil_mode", 0)) and node.get("auto_pad", "NOTSET") == "NOTSET"
    rows = zip(size, own.wide, own.stride, own.before, own.behind, strict=True)
    for n, wide, step, left, right in rows:
        room = n + left + right - wide
        count = (-(-room // step) if up else room // step) + 1
        if up and (count - 1) * step >= n + left:
            count -= 1
        found.append((count - 1) * step + wide - n - left)
    return found


def _max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    pool = _of_rank(_MAX, node, x.ndim)
    own, same = _pooled(node, x)
    if same:
        up = bool(node.get("ceil_mode", 0)) and node.get("auto_pad", "NOTSET") == "NOTSET"
        out: torch.Tensor = pool(x, own.kernel, own.stride, own.before, own.dilation, up)
        return out
    least = torch.finfo(x.dtype).min
    x = F.pad(x, _sides(own.before, _reach(node, own, x.shape[2:])), value=least)
    found: torch.Tensor = pool(x, own.kernel, own.stride, 0, own.dilation)
    return found


def _average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    pool = _of_rank(_AVERAGE, node, x.ndim)
    own, same = _pooled(node, x)
    inside = bool(node.get("count_include_pad", 0))
    up = bool(node.get("ceil_mode", 0))
    if same and not (up and inside):
        out: torch.Tensor = pool(x, own.kernel, own.stride, own.before, up, inside)
        return out
    reach = _reach(node, own, x.shape[2:])
    sides = _sides(own.before, reach)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if inside:  # what the file pads counts, what lies beyond that does not
        counted = [min(e, r) for e, r in zip(own.behind, reach, strict=True)]
        beyond = [r - c for r, c in zip(reach, counted, strict=True)]
        ones = F.pad(ones, _sides(own.before, counted), value=1.0)
        ones = F.pad(ones, _sides([0] * len(beyond), beyond))
    else:
        ones = F.pad(ones, sides)
    out = pool(F.pad(x, sides), own.kernel, own.stride)
    share: torch.Tensor = pool(ones, own.kernel, own.stride)
    return out / share


def _lp_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    pool = _of_rank(_AVERAGE, node, x.ndim)
    own, p = _window(node, node.get("kernel_shape"), x.shape[2:]), float(node.get("p", 2))
    x = F.pad(x.abs() ** p, _sides(own.before, _reach(node, own, x.shape[2:])))
    mean: torch.Tensor = pool(x, own.kernel, own.stride)
    return (mean * math.prod(own.kernel)) ** (1 / p)


def _global(table: dict[int, Any]) -> Form:
    def pool(node: Node, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _of_rank(table, node, x.ndim)(x, 1)
        return out

    return pool


def _global_lp(node: Node, x: torch.Tensor) -> torch.Tensor:
    p, axes = float(node.get("p", 2)), tuple(range(2, x.ndim))
    return (x.abs() ** p).sum(axes, keepdim=True) ** (1 / p)


FORMS: dict[str, Form] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "LpPool": _lp_pool,
    "GlobalAveragePool": _global(_ONE_MEAN),
    "GlobalMaxPool": _global(_ONE_MAX),
    "GlobalLpPool": _global_lp,
}


def refusal(node: Node) -> str:
    """Why a window cannot be opened, in a clause; empty where it can."""
    if node.op == "MaxPool" and node.outputs > 1:
        return "puts out the places of the largest values, which has no form here"
    dilated = any(d != 1 for d in node.get("dilations") or ())
    if node.op in ("AveragePool", "LpPool") and dilated:
        return "has dilations, for which torch has no form"
    return ""
