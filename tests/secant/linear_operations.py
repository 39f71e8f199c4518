"""For each operation with a linear rule: calls that use it, as functions of some tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from tests.secant.calls import (
    FLAT,
    INDEX,
    LINE,
    MASK,
    MEAN,
    PLANE,
    SCALE,
    SHIFT,
    VARIANCE,
    VOLUME,
    Case,
    aten,
    one,
    several,
)
from tests.secant.pairs import noise


def _up(name: str, *, corners: bool | None, ndim: int) -> list[Case]:
    shape = {1: LINE, 2: PLANE, 3: VOLUME}[ndim]
    size = [7, 9, 6][:ndim]
    call = getattr(aten, name)
    if corners is None:
        return one(lambda a: call(a, size), shape)
    return several(
        one(lambda a: call(a, size, False), shape), one(lambda a: call(a, size, True), shape)
    )


def _pads(name: str, ndim: int) -> list[Case]:
    shape = {1: LINE, 2: PLANE, 3: VOLUME}[ndim]
    return one(lambda a: getattr(aten, name)(a, [2, 1, 1, 2, 0, 1][: 2 * ndim]), shape)


def _put_into(buffer: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return buffer.clone().copy_(value)


def _filled(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(2, 3, dtype=value.dtype).fill_(value)


LINEAR: dict[str, list[Case]] = {
    "view": one(lambda a: a.contiguous().view(2, 12)),
    "_unsafe_view": one(lambda a: aten._unsafe_view(a.contiguous(), [6, 4])),
    "_reshape_alias": one(lambda a: aten._reshape_alias(a.contiguous(), [2, 12], [12, 1])),
    "unsqueeze": one(lambda a: a.unsqueeze(-2)),
    "squeeze": several(
        one(lambda a: a.squeeze(1), (2, 1, 3)),
        one(lambda a: a.squeeze(), (2, 1, 3)),
        one(lambda a: a.squeeze((0, -1)), (1, 2, 1)),
    ),
    "clone": one(lambda a: a.clone(memory_format=torch.contiguous_format)),
    "detach": one(torch.detach),
    "alias": one(aten.alias.default),
    "lift_fresh": one(aten.lift_fresh.default),
    "_to_copy": one(lambda a: a.to(torch.float64, copy=True)),
    "t": one(lambda a: a.t(), (3, 4)),
    "transpose": one(lambda a: a.transpose(-1, 0)),
    "permute": one(lambda a: a.permute(-1, 0, 1)),
    "select": several(one(lambda a: a[:, 1]), one(lambda a: a.select(-1, -2))),
    "slice": several(one(lambda a: a[:, 1:, ::2]), one(lambda a: a[..., -3:-1])),
    "split": one(lambda a: a.split(2, -1)),
    "split_with_sizes": one(lambda a: a.split([1, 3], -1)),
    "unsafe_split": one(lambda a: a.unsafe_split(3, 2)[1]),
    "unsafe_split_with_sizes": one(lambda a: a.unsafe_split_with_sizes([1, 3], -1)),
    "unbind": one(lambda a: a.unbind(1)[::2]),
    "expand": several(
        one(lambda a: a.expand(2, 3, 4), (3, 1)), one(lambda a: a.expand(-1, 5), (3, 1))
    ),
    "repeat": one(lambda a: a.repeat(2, 1, 1, 3)),
    "cat": several(
        one(lambda a, b: torch.cat([a, b, a], -2), FLAT, (2, 1, 4)),
        one(lambda a: torch.cat([torch.ones(2, 3, 1), a], 2)),
    ),
    "stack": one(lambda a, b: torch.stack([a, b], -1), FLAT, FLAT),
    "sum": several(
        one(lambda a: a.sum()),
        one(lambda a: a.sum((0, -1), keepdim=True)),
        one(lambda a: a.sum(), ()),
    ),
    "mean": several(one(lambda a: a.mean()), one(lambda a: a.mean((1, -1)))),
    "neg": one(lambda a: -a),
    "cumsum": one(lambda a: a.cumsum(-1)),
    "flip": one(lambda a: a.flip(0, -1)),
    "roll": one(lambda a: a.roll((1, -2), (0, 2))),
    "diagonal": one(lambda a: a.diagonal(1, -2, -1)),
    "unfold": one(lambda a: a.unfold(-1, 3, 1)),
    "constant_pad_nd": one(lambda a: F.pad(a, (1, 2, 0, 1), value=3.0)),
    "reflection_pad1d": _pads("reflection_pad1d", 1),
    "reflection_pad2d": _pads("reflection_pad2d", 2),
    "reflection_pad3d": _pads("reflection_pad3d", 3),
    "replication_pad1d": _pads("replication_pad1d", 1),
    "replication_pad2d": _pads("replication_pad2d", 2),
    "replication_pad3d": _pads("replication_pad3d", 3),
    "avg_pool2d": one(lambda a: F.avg_pool2d(a, 3, 2, 1, True, False), PLANE),
    "avg_pool3d": several(
        one(lambda a: F.avg_pool3d(a, 3, 2, 1, ceil_mode=True), VOLUME),
        one(lambda a: F.avg_pool3d(a, 2, divisor_override=3), VOLUME),
    ),
    "_adaptive_avg_pool2d": one(lambda a: F.adaptive_avg_pool2d(a, (4, 3)), PLANE),
    "_adaptive_avg_pool3d": one(lambda a: F.adaptive_avg_pool3d(a, (2, 4, 3)), VOLUME),
    **{
        f"{prefix}upsample_nearest{kind}{n}d": _up(
            f"{prefix}upsample_nearest{kind}{n}d", corners=None, ndim=n
        )
        for prefix, kind in (("", ""), ("_", "_exact"))
        for n in (1, 2, 3)
    },
    "upsample_linear1d": _up("upsample_linear1d", corners=True, ndim=1),
    "upsample_bilinear2d": _up("upsample_bilinear2d", corners=True, ndim=2),
    "upsample_trilinear3d": _up("upsample_trilinear3d", corners=True, ndim=3),
    "upsample_bicubic2d": _up("upsample_bicubic2d", corners=True, ndim=2),
    "_upsample_bilinear2d_aa": _up("_upsample_bilinear2d_aa", corners=True, ndim=2),
    "_upsample_bicubic2d_aa": _up("_upsample_bicubic2d_aa", corners=True, ndim=2),
    "diag_embed": one(lambda a: torch.diag_embed(a, 1, -1, 0)),
    "rot90": one(lambda a: a.rot90(1, (0, 2))),
    "masked_scatter": one(lambda a, b: a.masked_scatter(MASK, b), FLAT, (3, 8)),
    "index": several(one(lambda a: a[:, INDEX[:3]]), one(lambda a: a[..., MASK])),
    "index_select": one(lambda a: a.index_select(-1, INDEX)),
    "gather": one(lambda a: a.gather(1, INDEX.reshape(1, 1, 4).expand(2, 2, 4))),
    "take": one(lambda a: a.take(INDEX * 5)),
    "put": one(lambda a, b: a.put(INDEX[1:] * 5, b, accumulate=True), FLAT, (3,)),
    "embedding": one(lambda a: F.embedding(INDEX.reshape(2, 2), a), (3, 4)),
    "im2col": one(lambda a: F.unfold(a, 3, padding=1, stride=2), PLANE),
    "col2im": one(lambda a: F.fold(a, (4, 4), 2), (2, 12, 9)),
    "pixel_shuffle": one(lambda a: F.pixel_shuffle(a, 2), (1, 8, 3, 2)),
    "pixel_unshuffle": one(lambda a: F.pixel_unshuffle(a, 2), (1, 2, 4, 6)),
    "channel_shuffle": one(lambda a: F.channel_shuffle(a, 2), (1, 4, 3, 2)),
    "index_fill": several(
        one(lambda a: a.index_fill(1, INDEX[:2], 2.0)),
        one(lambda a, b: a.index_fill(-1, INDEX, b), FLAT, ()),
    ),
    "index_add": one(lambda a, b: a.index_add(-1, INDEX, b, alpha=2), FLAT, FLAT),
    "index_put": several(
        one(lambda a, b: a.index_put((torch.tensor([1, 0]),), b), FLAT, (2, 3, 4)),
        one(lambda a, b: a.index_put((torch.tensor([1, 1]),), b, accumulate=True), FLAT, (4,)),
    ),
    "scatter": several(
        one(
            lambda a, b: a.scatter(-1, torch.tensor([2, 0, 1]).expand(2, 3, 3), b), FLAT, (2, 3, 3)
        ),
        one(lambda a: a.scatter(1, INDEX.reshape(1, 1, 4)[..., :2], 3.0)),
    ),
    "scatter_add": one(lambda a, b: a.scatter_add(-1, INDEX.expand(2, 3, 4), b), FLAT, FLAT),
    "slice_scatter": one(lambda a, b: a.slice_scatter(b, 2, 1, 3), FLAT, (2, 3, 2)),
    "select_scatter": one(lambda a, b: a.select_scatter(b, -1, 2), FLAT, (2, 3)),
    "masked_select": one(lambda a: a.masked_select(MASK)),
    "where": several(
        one(lambda a, b: torch.where(MASK, a, b), FLAT, (3, 1)),
        one(lambda a: torch.where(MASK, 2.0, a)),
    ),
    "masked_fill": several(
        one(lambda a: a.masked_fill(MASK, -torch.inf)),
        one(lambda a, b: a.masked_fill(MASK, b), FLAT, ()),
    ),
    "tril": one(lambda a: a.tril(1)),
    "triu": one(lambda a: a.triu(-1)),
    "max_unpool2d": one(
        lambda a: F.max_unpool2d(a, torch.arange(0, 16, 2).reshape(1, 2, 4), [2, 2]), (1, 2, 4)
    ),
    "max_unpool3d": one(
        lambda a: F.max_unpool3d(a, torch.arange(0, 64, 8).reshape(1, 2, 2, 2), [2, 2, 2]),
        (1, 2, 2, 2),
    ),
    "affine_grid_generator": one(
        lambda a: aten.affine_grid_generator(a, [2, 1, 3, 4, 2], False), (2, 3, 4)
    ),
    "grid_sampler_2d": one(
        lambda a: F.grid_sample(a, noise(2, 3, 3, 2, seed=4).tanh(), align_corners=False), PLANE
    ),
    "grid_sampler_3d": one(
        lambda a: F.grid_sample(a, noise(2, 3, 3, 2, 3, seed=4).tanh(), align_corners=True), VOLUME
    ),
    "sort": one(lambda a: (a.tanh() * 0.4 + torch.arange(4)).sort(-1, descending=True)),
    "topk": one(lambda a: (a.tanh() * 0.4 + torch.arange(4)).topk(2, -1)),
    "_native_batch_norm_legit_no_training": one(
        lambda a: aten._native_batch_norm_legit_no_training(
            a, SCALE, SHIFT, MEAN, VARIANCE, 0.1, 1e-5
        )[0],
        VOLUME,
    ),
    "add": several(
        one(lambda a, b: torch.add(a, b, alpha=-2), FLAT, (3, 1)),
        one(lambda a: a + 3),
        one(lambda a: torch.add(2.0, a, alpha=3)),
        one(lambda a, b: a + b, FLAT, ()),
        one(lambda a: a + a),
        one(lambda a: aten.add.Scalar(a, 2, 3)),
    ),
    "sub": several(
        one(lambda a, b: torch.sub(a, b, alpha=3), (4,), FLAT),
        one(lambda a: a - 1),
        one(lambda a: torch.sub(2.0, a, alpha=3)),
    ),
    "rsub": several(
        one(lambda a: 2 - a), one(lambda a, b: torch.rsub(a, b, alpha=2), FLAT, (3, 1))
    ),
    "copy": one(_put_into, FLAT, (3, 1)),
    "fill": one(_filled, ()),
}
