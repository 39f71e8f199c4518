"""Which rule does each operation have, and which values must be kept for it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from med_gradcam.secant import elementwise, reductions, rules, softmax
from med_gradcam.secant.rules import Rule
from med_gradcam.secant.tape import aten

# What is kept of the arguments: nothing; what does not descend from the layer; a factor whose
# other factor does; everything.
Keep = Literal["nothing", "constants", "factors", "all"]


@dataclass(frozen=True, slots=True)
class Row:
    """A rule, what it needs, and what it covers.

    `first`: only the first argument may descend from a layer; `every`: the rule covers all outputs
    of the operation, not just the first; `outputs`: it needs their values, which cost as much to
    find again as they did.
    """

    rule: Rule
    keep: Keep
    first: bool = False
    every: bool = False
    outputs: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Whether the value of each tensor argument is kept, and those of the outputs.

    `by_statistics`: a batch norm, which needs them only where it takes statistics of its own.
    """

    inputs: tuple[bool, ...]
    outputs: bool = False
    by_statistics: bool = False


_RESHAPES = """
    view _unsafe_view unsqueeze squeeze clone detach alias lift_fresh _to_copy _reshape_alias
""".split()
_LINEAR = """
    t transpose select slice split split_with_sizes unsafe_split unsafe_split_with_sizes unbind
    expand repeat cat stack sum mean neg cumsum flip roll diagonal unfold constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa index
    index_select gather take diag_embed rot90 embedding im2col col2im pixel_shuffle
    pixel_unshuffle channel_shuffle index_add index_fill scatter_add slice_scatter
    select_scatter masked_select masked_scatter where masked_fill tril triu
    affine_grid_generator
""".split()
_KINKED = """
    relu leaky_relu hardtanh hardsigmoid threshold clamp clamp_min clamp_max abs
    _prelu_kernel softshrink hardshrink round floor ceil sign trunc
""".split()
_SMOOTH = """
    sigmoid tanh gelu silu mish softplus elu celu hardswish log_sigmoid_forward erf erfc sin cos
    expm1 log1p log2 log10 exp2 sinh cosh atan asinh sinc
""".split()
_BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    cudnn_batch_norm miopen_batch_norm
""".split()

_TABLE: dict[str, Row] = {
    **dict.fromkeys(_LINEAR, Row(rules.linear, "constants", every=True)),
    # Linear in their first argument only.
    **dict.fromkeys(
        ("grid_sampler_2d", "grid_sampler_3d"), Row(rules.linear, "constants", first=True)
    ),
    **dict.fromkeys(("sort", "topk"), Row(rules.ordered, "all", every=True, outputs=True)),
    "put": Row(rules.placed, "constants"),
    **dict.fromkeys(("index_put", "scatter"), Row(rules.written(-1), "constants")),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), Row(rules.written(0), "constants")),
    **dict.fromkeys(_RESHAPES, Row(rules.reshaped, "nothing")),
    **dict.fromkeys(_KINKED, Row(elementwise.kinked, "all", first=True)),
    **dict.fromkeys(_SMOOTH, Row(elementwise.smooth, "all", first=True)),
    **dict.fromkeys(("add", "sub", "rsub"), Row(rules.added, "nothing")),
    **dict.fromkeys(("copy", "fill"), Row(rules.copied, "nothing")),
    "mul": Row(rules.product, "factors"),
    "div": Row(rules.quotient, "all"),
    **dict.fromkeys(("maximum", "minimum"), Row(rules.larger, "all")),
    **dict.fromkeys(("mm", "bmm"), Row(rules.matrix_product(0), "factors")),
    **dict.fromkeys(("addmm", "baddbmm"), Row(rules.matrix_product(1), "factors")),
    **dict.fromkeys(("amax", "amin", "max", "min"), Row(reductions.amax, "all")),
    **dict.fromkeys(
        ("var", "std", "var_mean", "std_mean"), Row(reductions.spread, "all", every=True)
    ),
    **dict.fromkeys(("_softmax", "_safe_softmax"), Row(softmax.softmax, "all")),
    "_log_softmax": Row(softmax.log_softmax, "all"),
    "logsumexp": Row(softmax.logsumexp, "all"),
    "linalg_vector_norm": Row(reductions.vector_norm, "all"),
    **dict.fromkeys(_BATCH_NORMS, Row(reductions.batch_norm, "all", first=True)),
    "native_group_norm": Row(reductions.group_norm, "all", first=True),
    "native_layer_norm": Row(reductions.layer_norm, "all", first=True),
    **dict.fromkeys(("convolution", "_convolution"), Row(rules.convolution, "factors")),
    "permute": Row(rules.permuted, "nothing"),
    "exp": Row(elementwise.closed(elementwise.exp_secant), "all"),
    "log": Row(elementwise.closed(elementwise.log_secant), "all"),
    "sqrt": Row(elementwise.closed(elementwise.root_secant), "all"),
    "rsqrt": Row(elementwise.closed(elementwise.rsqrt_secant), "all"),
    "reciprocal": Row(elementwise.closed(elementwise.reciprocal_secant), "all"),
    "pow": Row(elementwise.power, "all"),
}

RULES: dict[Any, Row] = {
    getattr(aten, name): row for name, row in _TABLE.items() if hasattr(aten, name)
} | {packet: Row(rule, "all", outputs=True) for packet, rule in reductions.POOLS.items()}

# Forms of an operation that the rule for the others does not fit.
_OTHER = {
    "aten::view.dtype",
    "aten::pow.Tensor_Tensor",
    "aten::pow.Scalar",
    "aten::div.Tensor_mode",
    "aten::div.Scalar_mode",
    "aten::scatter.reduce",
    "aten::scatter.value_reduce",
}


def needs(func: Any, active: tuple[bool, ...], args: Sequence[Any]) -> Kept | None:
    """Which values are kept of an operation; None where it has no rule.

    `active` says which tensor arguments descend from the layer.
    """
    kept = _needs(func, active)
    if kept is not None and kept.by_statistics and not reductions.own_statistics(func, args):
        return Kept(tuple(not a for a in active))
    return kept


@lru_cache(maxsize=4096)
def _needs(func: Any, active: tuple[bool, ...]) -> Kept | None:
    row = RULES.get(func.overloadpacket)
    if row is None or func.name() in _OTHER or (row.first and any(active[1:])):
        return None
    inputs = {
        "nothing": (False,) * len(active),
        "constants": tuple(not a for a in active),
        "factors": tuple(sum(active) > a for a in active),
        "all": (True,) * len(active),
    }[row.keep]
    return Kept(inputs, row.outputs, by_statistics=row.rule is reductions.batch_norm)
