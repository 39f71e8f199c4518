"""Does a network come back as it was, whatever it writes to itself while it runs?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

import med_gradcam as mg

SCAN = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)


class _Counts(torch.nn.Module):
    """Counts its runs, by a new tensor each time."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.Linear(3, 2)
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs = self.runs + 1
        out: torch.Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3, 4)))
        return out


class _Learns(_Counts):
    """Goes on with its running mean, in place, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, training=True)  # type: ignore[arg-type]
        out: torch.Tensor = self.head(torch.relu(x).mean((2, 3, 4)))
        return out


@pytest.mark.parametrize("make", [_Counts, _Learns])
@pytest.mark.parametrize("method", ["secant", "hirescam", "occlusion"])
def test_buffers_are_as_they_were(make: type[torch.nn.Module], method: str) -> None:
    torch.manual_seed(0)
    net = make()
    held = dict(net.named_buffers())
    before = {name: value.clone() for name, value in held.items()}
    layer = "auto" if method == "occlusion" else "conv"
    mg.explain(SCAN, net, target=1, layer=layer, method=method, reference="zero")
    for name, value in net.named_buffers():
        assert value is held[name]
        assert torch.equal(value, before[name]), name


class _Steps(torch.nn.Module):
    """No gradient comes through its first operation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.conv(torch.floor(x * 4))).mean((2, 3, 4)))
        return out


@pytest.mark.parametrize("method", ["occlusion", "rise"])
def test_what_only_predicts_needs_no_gradient(method: str) -> None:
    torch.manual_seed(0)
    e = mg.explain(SCAN, _Steps(), target=1, method=method, reference="zero")
    assert float(np.abs(e.evidence).max()) > 0
