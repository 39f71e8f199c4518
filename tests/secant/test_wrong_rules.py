"""Is a wrong rule seen? Each one planted here must break the sum by more than 1e-3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from med_gradcam.secant import elementwise, reductions, rules, softmax, table
from med_gradcam.secant.rules import Multipliers, Pair, Rule
from med_gradcam.secant.table import RULES, Row
from tests.secant.operations import ALL, BENT
from tests.secant.pairs import sums
from tests.secant.test_rules import pair

aten = torch.ops.aten
BROKEN, RIGHT = 1e-3, 1e-9


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    """What is kept depends on the table; it is remembered per operation."""
    table._needs.cache_clear()
    yield
    table._needs.cache_clear()


def worst(name: str) -> float:
    """How far the worst case of an operation is off, for random inputs."""
    return max(sums(c.function, *pair(c, "random", s)).off() for c in ALL[name] for s in (0, 10))


# With stored statistics these two are linear, and a derivative is right.
@pytest.mark.parametrize("name", BENT)
def test_the_derivative_at_the_case_is_no_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(name) <= RIGHT
    packet = getattr(aten, name)
    derivative = Row(rules.linear, "all", every=True)
    monkeypatch.setitem(RULES, packet, replace(derivative, outputs=RULES[packet].outputs))
    table._needs.cache_clear()
    assert worst(name) > BROKEN


def product_at_the_case(p: Pair, g: Multipliers) -> Multipliers:
    assert g[0] is not None
    return [rules.summed_to(g[0] * p.a[1 - n].of(), p.a[n]) for n in (0, 1)]


def matrix_product_at_the_case(p: Pair, g: Multipliers) -> Multipliers:
    assert g[0] is not None
    return [g[0] @ p.a[1].of().transpose(-1, -2), p.a[0].of().transpose(-1, -2) @ g[0]]


def only_the_case_wins(p: Pair, g: Multipliers) -> Multipliers:
    """All of the change goes to the place where the case is largest."""
    assert g[0] is not None
    a, b = (v.flatten(-3) for v in p.values())
    (top, at), (top0, _) = ([s.of().flatten(-3) for s in e.kept] for e in (p.case, p.reference))
    share = torch.zeros_like(a).scatter_add_(-1, at, g[0].flatten(-3) * (top - top0))
    return [rules.over_change(torch.where(a == b, 0.0, share), a, b).reshape(p.a[0].shape)]


def no_scatter_add(p: Pair, g: Multipliers) -> Multipliers:
    """Windows overlap, and the last one overwrites the others."""
    assert g[0] is not None
    a, b = (v.flatten(-3) for v in p.values())
    (top, at), (top0, at0) = ([s.of().flatten(-3) for s in e.kept] for e in (p.case, p.reference))
    high, w = torch.maximum(top, top0), g[0].flatten(-3)
    share = torch.zeros_like(a).scatter_(-1, at, w * (high - top0))
    share += torch.zeros_like(a).scatter_(-1, at0, w * (top - high))
    return [rules.over_change(share, a, b).reshape(p.a[0].shape)]


def frozen_sigma(
    a: torch.Tensor, b: torch.Tensor, dims: Any, eps: float, g: torch.Tensor
) -> torch.Tensor:
    axes = tuple(dims)
    m = g / (a.var(axes, correction=0, keepdim=True) + eps).sqrt()
    return m - m.mean(axes, keepdim=True)


def softmax_by_derivative(p: Pair, g: Multipliers) -> Multipliers:
    assert g[0] is not None
    dim = p.case.args[1]
    out = p.a[0].of().softmax(dim)
    return [out * (g[0] - (g[0] * out).sum(dim, keepdim=True))]


def half_way_slope(p: Pair, g: Multipliers) -> Multipliers:
    """The derivative half-way, as if every change were small."""
    assert g[0] is not None
    a, b = p.values()
    return [g[0] * elementwise._slope(p, (a + b) / 2)]


def first_branch_only(p: Pair, g: Multipliers) -> Multipliers:
    return [m if n == 0 else None for n, m in enumerate(rules.linear(p, g))]


def first_summand_only(p: Pair, g: Multipliers) -> Multipliers:
    return [m if n == 0 else None for n, m in enumerate(rules.added(p, g))]


def sign_of_the_difference_lost(p: Pair, g: Multipliers) -> Multipliers:
    return [None if m is None else m.abs() for m in rules.added(p, g)]


def quotient_at_the_case(p: Pair, g: Multipliers) -> Multipliers:
    assert g[0] is not None
    a, b = (seen.of() for seen in p.a)
    return [rules.summed_to(m, p.a[n]) for n, m in enumerate((g[0] / b, -g[0] * a / b / b))]


def not_turned_back(p: Pair, g: Multipliers) -> Multipliers:
    return [None if g[0] is None else g[0].contiguous().reshape(p.a[0].shape)]


def spread_without_its_mean(p: Pair, g: Multipliers) -> Multipliers:
    return reductions.spread(p, [g[0], None])


# What is planted: in which operation, and of its cases the one that it is for.
PLANTED: dict[str, tuple[str, Rule, int]] = {
    "product, both sides at the case": ("mul", product_at_the_case, 0),
    "quotient, both sides at the case": ("div", quotient_at_the_case, 0),
    "matrix product, both sides at the case": ("bmm", matrix_product_at_the_case, 0),
    "max-pool, the case's arg max only": ("max_pool3d_with_indices", only_the_case_wins, 1),
    "max-pool, overlapping windows overwrite": ("max_pool3d_with_indices", no_scatter_add, 1),
    "softmax, its derivative": ("_softmax", softmax_by_derivative, 0),
    "gelu, the slope half-way": ("gelu", half_way_slope, 0),
    "relu, the slope half-way": ("relu", half_way_slope, 0),
    "cat, a dropped branch": ("cat", first_branch_only, 0),
    "where, a dropped branch": ("where", first_branch_only, 0),
    "sum, a dropped summand": ("add", first_summand_only, 0),
    "difference, its sign": ("sub", sign_of_the_difference_lost, 0),
    "axes, not turned back": ("permute", not_turned_back, 0),
    "variance and mean, the mean dropped": ("var_mean", spread_without_its_mean, 0),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_rule_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, place = PLANTED[what]
    case = ALL[name][place]
    variants = [pair(case, variant) for variant in ("random", "the same in part")]
    assert max(sums(case.function, *values).off() for values in variants) <= RIGHT
    packet = getattr(aten, name)
    monkeypatch.setitem(RULES, packet, replace(RULES[packet], rule=wrong, keep="all", first=False))
    table._needs.cache_clear()
    assert max(sums(case.function, *values).off() for values in variants) > BROKEN


@pytest.mark.parametrize(
    "name",
    ["native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"],
)
def test_a_norm_with_a_frozen_sigma_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "normalised", frozen_sigma)
    assert worst(name) > BROKEN


@pytest.mark.parametrize("name", ["_log_softmax", "logsumexp", "_softmax", "_safe_softmax"])
def test_a_sum_of_exponentials_at_the_case_only_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = softmax._secants
    monkeypatch.setattr(softmax, "_secants", lambda a, _: right(a.clone(), a.clone()))
    assert worst(name) > BROKEN


def test_a_window_without_its_cross_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(a: Any, b: Any, best: Any, what: Any) -> torch.Tensor:
        (g, axis), ((top, at), (top0, at0)) = what, best
        share = torch.zeros_like(a)
        for place in (at, at0):  # half of the change to each winner, whether it changed or not
            share.scatter_add_(axis, place, g * (top - top0) / 2)
        return rules.over_change(torch.where(a == b, 0.0, share), a, b)

    monkeypatch.setattr(reductions, "cross", halves)
    found = [sums(c.function, *pair(c, "the same in part")).off() for c in ALL["amax"]]
    assert max(found) > BROKEN
