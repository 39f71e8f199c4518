"""Which noisy inputs do the methods that average over noise look at?"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def textures(shape: torch.Size, count: int, seed: int) -> Iterator[torch.Tensor]:
    """`count` volumes of standard normal noise of a shape, the same for a seed on any device.

    Drawn in single precision on the CPU from a generator of its own: torch's global random state
    is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(shape, generator=generator)


def noisy(x: torch.Tensor, share: float, count: int, seed: int) -> Iterator[torch.Tensor]:
    """`count` copies of an input (1, C, I, J, K) with noise of `share` of each channel's own SD."""
    sd = x.double().std(dim=(2, 3, 4), correction=0, keepdim=True)
    for texture in textures(x.shape, count, seed):
        yield x + (share * sd * texture.to(x.device)).to(x.dtype)
