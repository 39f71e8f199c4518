"""How are the U-Nets of nnU-Net v2 built from numbers in its plans, without nnU-Net?

Modules are named as in dynamic_network_architectures 0.4, parts that are registered twice included
(`conv` and `all_modules.0`, `encoder` and `decoder.encoder`), so that checkpoints fit name by name.
The package itself is not used: it needs timm, and timm needs torchvision.
Source: Isensee et al., Nature Methods 18 (2021) 203; He et al., CVPR 2019 (ResNet-D blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Make = Callable[..., nn.Module]
Size = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """What all blocks of a network share: constructors of torch.nn and their arguments."""

    conv: Make
    transposed: Make
    pool: Make
    bias: bool
    norm: Make | None
    norm_arguments: Mapping[str, Any]
    dropout: Make | None
    dropout_arguments: Mapping[str, Any]
    nonlin: Make | None
    nonlin_arguments: Mapping[str, Any]
    nonlin_first: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A U-Net's numbers, one per stage from the finest; `residual` has a stem and residual blocks.

    `repeats`: blocks per stage of the encoder; `repeats_up`: of the decoder, from the coarsest.
    """

    residual: bool
    channels: int
    classes: int
    features: Sequence[int]
    kernels: Sequence[Size]
    strides: Sequence[Size]
    repeats: Sequence[int]
    repeats_up: Sequence[int]
    stem: int | None = None
    bottleneck: Sequence[int] | None = None


class Block(nn.Module):
    """Convolution, dropout, norm and nonlinearity, as far as there are any."""

    def __init__(  # noqa: PLR0913 - what a convolution is made of
        self,
        how: Blocks,
        channels: tuple[int, int],
        kernel: Size,
        stride: Size = (1, 1, 1),
        *,
        bias: bool | None = None,
        dropout: bool = True,
        nonlin: bool = True,
    ) -> None:
        super().__init__()
        padding = [(n - 1) // 2 for n in kernel]
        own = how.bias if bias is None else bias
        self.conv = how.conv(*channels, kernel, stride, padding=padding, bias=own)
        parts = [self.conv]
        if how.dropout is not None and dropout:
            self.dropout = how.dropout(**how.dropout_arguments)
            parts.append(self.dropout)
        if how.norm is not None:
            self.norm = how.norm(channels[1], **how.norm_arguments)
            parts.append(self.norm)
        if how.nonlin is not None and nonlin:
            self.nonlin = how.nonlin(**how.nonlin_arguments)
            parts.append(self.nonlin)
            if how.nonlin_first and how.norm is not None:
                parts[-1], parts[-2] = parts[-2], parts[-1]
        self.all_modules = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.all_modules(x)
        return made


class Stack(nn.Module):
    """Blocks one after the other; the first one has the stride."""

    def __init__(
        self, how: Blocks, count: int, channels: tuple[int, int], kernel: Size, stride: Size
    ) -> None:
        super().__init__()
        first = Block(how, channels, kernel, stride)
        more = [Block(how, (channels[1], channels[1]), kernel) for _ in range(count - 1)]
        self.convs = nn.Sequential(first, *more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.convs(x)
        return made


ONE: Size = (1, 1, 1)


class Residual(nn.Module):
    """Two blocks, or three with a `bottleneck`, beside a short cut that pools where they stride."""

    def __init__(
        self,
        how: Blocks,
        channels: tuple[int, int],
        kernel: Size,
        stride: Size,
        bottleneck: int | None = None,
    ) -> None:
        super().__init__()
        first, last = channels
        plain: dict[str, Any] = {"dropout": False, "nonlin": False}
        last_nonlin = nn.Identity() if how.nonlin is None else how.nonlin(**how.nonlin_arguments)
        if bottleneck is None:
            self.conv1 = Block(how, channels, kernel, stride)
            self.conv2 = Block(how, (last, last), kernel, **plain)
            self.nonlin2 = last_nonlin
        else:
            self.conv1 = Block(how, (first, bottleneck), ONE, dropout=False)
            self.conv2 = Block(how, (bottleneck, bottleneck), kernel, stride)
            self.conv3 = Block(how, (bottleneck, last), ONE, **plain)
            self.nonlin3 = last_nonlin
        self.deep = bottleneck is not None
        short: list[nn.Module] = []
        if any(n != 1 for n in stride):
            short.append(how.pool(stride, stride))
        if first != last:
            short.append(Block(how, channels, ONE, bias=False, **plain))
        self.skip = nn.Sequential(*short) if short else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        aside = x if self.skip is None else self.skip(x)
        made = self.conv2(self.conv1(x))
        if self.deep:
            made = self.conv3(made)
        nonlin = self.nonlin3 if self.deep else self.nonlin2
        out: torch.Tensor = nonlin(made + aside)
        return out


class Residuals(nn.Module):
    """Residual blocks one after the other; the first one has the stride."""

    def __init__(
        self,
        how: Blocks,
        count: int,
        channels: tuple[int, int],
        kernel: Size,
        stride: Size,
        bottleneck: int | None,
    ) -> None:
        super().__init__()
        last = channels[1]
        made = [Residual(how, channels, kernel, stride, bottleneck)]
        made += [Residual(how, (last, last), kernel, ONE, bottleneck) for _ in range(count - 1)]
        self.blocks = nn.Sequential(*made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.blocks(x)
        return made


class Encoder(nn.Module):
    """The stages of a plan, finest first; puts out what each one makes."""

    def __init__(self, plan: Plan, how: Blocks) -> None:
        super().__init__()
        before = plan.channels
        self.stem: nn.Module | None = None
        if plan.residual:
            stem = plan.features[0] if plan.stem is None else plan.stem
            self.stem, before = Stack(how, 1, (before, stem), plan.kernels[0], ONE), stem
        stages: list[nn.Module] = []
        numbers = zip(plan.features, plan.kernels, plan.strides, plan.repeats, strict=True)
        for n, (features, kernel, stride, count) in enumerate(numbers):
            pair = before, features
            if plan.residual:
                narrow = None if plan.bottleneck is None else plan.bottleneck[n]
                stages.append(Residuals(how, count, pair, kernel, stride, narrow))
            else:
                stages.append(nn.Sequential(Stack(how, count, pair, kernel, stride)))
            before = features
        self.stages = nn.Sequential(*stages)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.stem is not None:
            x = self.stem(x)
        made = []
        for stage in self.stages:
            x = stage(x)
            made.append(x)
        return made


class Decoder(nn.Module):
    """From the coarsest stage up; the heads of deep supervision are there, and only the last runs.

    It knows the `encoder` as a part of its own, since the checkpoints list it twice.
    """

    def __init__(self, plan: Plan, how: Blocks, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        stages, up, heads = [], [], []
        for n, count in enumerate(plan.repeats_up):
            below, skip = plan.features[-n - 1], plan.features[-n - 2]
            stride = plan.strides[-n - 1]
            up.append(how.transposed(below, skip, stride, stride, bias=how.bias))
            kernel = plan.kernels[-n - 2]
            stages.append(Stack(how, count, (2 * skip, skip), kernel, ONE))
            heads.append(how.conv(skip, plan.classes, 1, 1, 0, bias=True))
        self.stages = nn.ModuleList(stages)
        self.transpconvs = nn.ModuleList(up)
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        x = skips[-1]
        for n, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat((up(x), skips[-n - 2]), 1))
        out: torch.Tensor = self.seg_layers[-1](x)
        return out


class UNet(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, plan: Plan, how: Blocks) -> None:
        super().__init__()
        self.encoder = Encoder(plan, how)
        self.decoder = Decoder(plan, how, self.encoder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.decoder(self.encoder(x))
        return out
