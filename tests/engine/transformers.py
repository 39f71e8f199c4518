"""Small transformers written as the common libraries write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

WIDE = 16


class Block(nn.Module):
    """Attention and MLP beside a residual stream; `fused`: scaled_dot_product_attention."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2, self.fused = nn.LayerNorm(WIDE), nn.LayerNorm(WIDE), fused
        self.qkv, self.proj = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE)
        self.mlp = nn.Sequential(nn.Linear(WIDE, 32), nn.GELU(), nn.Linear(32, WIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, count, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, count, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.proj(seen.transpose(1, 2).reshape(n, count, WIDE))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Vit(nn.Module):
    """As in timm: a class token, register tokens, a head on the class token or on the mean.

    `read`: "class", "mean" (of all patches), "both", or "first" (one patch).
    """

    def __init__(
        self,
        read: str = "class",
        registers: int = 2,
        *,
        fused: bool = True,
        dims: int = 3,
        behind: bool = False,
    ) -> None:
        super().__init__()
        self.read, self.count, self.behind = read, 1 + registers, behind
        self.patch = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, WIDE, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, self.count, WIDE))
        self.place = nn.Parameter(0.3 * torch.randn(1, 200, WIDE))
        self.blocks = nn.Sequential(*(Block(fused=fused) for _ in range(3)))
        self.norm = nn.LayerNorm(WIDE)
        self.head = nn.Linear(2 * WIDE if read == "both" else WIDE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.place[:, : x.shape[1]]
        extra = self.extra.expand(len(x), -1, -1)
        x = self.norm(self.blocks(torch.cat([x, extra] if self.behind else [extra, x], 1)))
        at = -self.count if self.behind else 0
        patches = x[:, : -self.count] if self.behind else x[:, self.count :]
        rows = {
            "class": x[:, at],
            "mean": patches.mean(1),
            "both": torch.cat([x[:, at], patches.mean(1)], 1),
            "first": patches[:, 0],
        }
        out: torch.Tensor = self.head(rows[self.read])
        return out
