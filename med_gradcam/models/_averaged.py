"""How do several networks, and one network on mirrored scans, give one output: their mean?

nnU-Net's way: the mean of the logits over folds and mirrors. Or the mean of the probabilities, as
logits again, so that links and targets mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

Axes = tuple[int, ...]
MEANS = ("logits", "probabilities")
UNMIRRORED = (
    "nnU-Net also averages over mirrored scans unless told not to; this score is without "
    "(med_gradcam.explain_ensemble has mirrors=)"
)


class Averaged(nn.Module):
    """The mean of the outputs of `members`, each on the scan and on its mirror images.

    `mirrors`: axes (0, 1, 2) that are flipped together, one tuple per mirror image; () is the scan
    as it is, and always there. `mean`: logits, or probabilities by the `link` softmax or sigmoid.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        mirrors: Sequence[Axes] = (),
        mean: str = "logits",
        link: str = "softmax",
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.mirrors: tuple[Axes, ...] = ((), *(tuple(axes) for axes in mirrors if axes))
        self.mean, self.link = mean, link

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.rejoined(self.collected(call(x, *args, **kwargs) for call in self.calls()))

    def pairs(self) -> list[tuple[nn.Module, Axes]]:
        """The members: each network with each mirror image."""
        return [(net, axes) for net in self.members for axes in self.mirrors]

    def calls(self) -> list[Callable[..., torch.Tensor]]:
        """What each member says of a scan, turned back, as a function."""
        return [partial(_said, net, axes) for net, axes in self.pairs()]

    def collected(self, outputs: Iterable[torch.Tensor]) -> torch.Tensor:
        """The members' outputs as far as their mean needs them apart.

        The sum (B, K, ...) for a mean of logits, which is linear; else all (B, members, K, ...).
        """
        if self.mean != "logits":
            return torch.stack(list(outputs), 1)
        total: torch.Tensor | None = None
        for one in outputs:
            total = one if total is None else total + one
        assert total is not None  # noqa: S101 - there is at least one member
        return total

    def rejoined(self, made: torch.Tensor) -> torch.Tensor:
        """The mean, as logits, of what `collected` gave."""
        if self.mean == "logits":
            return made / len(self.pairs())
        if self.link == "sigmoid":
            return made.sigmoid().mean(1).logit()
        return made.softmax(2).mean(1).log()

    def weights(self, multipliers: torch.Tensor) -> Callable[[int], torch.Tensor]:
        """Multipliers of what `collected` gave as those of each member's output (B, K, ...)."""
        return lambda n: multipliers if self.mean == "logits" else multipliers[:, n]


def _said(net: nn.Module, axes: Axes, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return mirrored(net(mirrored(x, axes), *args, **kwargs), axes)


def mirrored(values: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A map (B, K, i, j, k) with some of its axes 0, 1, 2 flipped; a row of scores as it is."""
    if not axes or values.ndim < 5:
        return values
    return values.flip([axis + 2 for axis in axes])
