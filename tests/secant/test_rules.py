"""Does every rule share out an operation's change exactly, whatever the two inputs are?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from med_gradcam.secant.table import RULES
from tests.secant.calls import Case
from tests.secant.operations import ALL, ELSEWHERE
from tests.secant.pairs import Tensors, noise, sums

Vary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _in_part(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    same = torch.rand(a.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    if same.numel() == 1:
        return a, b
    return a, torch.where(same, a, b)


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory whose axes run the other way, with gaps."""
    other = tensor.new_full([2 * n for n in reversed(tensor.shape)], 7.0)
    view = other.permute(list(reversed(range(tensor.ndim))))
    return view[tuple(slice(None, None, 2) for _ in range(tensor.ndim))].copy_(tensor)


VARIANTS: dict[str, Vary] = {
    "random": lambda a, b: (a, b),
    "the same in part": _in_part,
    "nearly the same": lambda a, b: (a, a + 1e-6 * b),
    "large": lambda a, b: (30 * a, 30 * b),
    "far apart": lambda a, b: (a, 20 * b),
    "in turned memory": lambda a, b: (_turned(a), _turned(b)),
}


def pair(case: Case, variant: str, seed: int = 0) -> tuple[Tensors, Tensors]:
    found = []
    for n, shape in enumerate(case.shapes):
        a, b = noise(*shape, seed=seed + 2 * n), noise(*shape, seed=seed + 2 * n + 1)
        if case.positive:
            a, b = a.abs() + 0.05, b.abs() + 0.05
        found.append(VARIANTS[variant](a, b))
    return [a for a, _ in found], [b for _, b in found]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ALL)
def test_the_change_is_shared_out_exactly(name: str, variant: str) -> None:
    for case in ALL[name]:
        for seed in (0, 10):
            found = sums(case.function, *pair(case, variant, seed))
            assert name in found.called, found.called
            assert found.off() <= 1e-9, found
            assert all(m is None or bool(m.isfinite().all()) for m in found.multipliers)


def test_every_rule_is_exercised_or_has_a_reason() -> None:
    known = {packet.__name__ for packet in RULES}
    assert known == ALL.keys() | ELSEWHERE.keys()
    assert not ALL.keys() & ELSEWHERE.keys()
