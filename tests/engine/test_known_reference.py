"""Do the scans of one call share what is the same for all: the reference's run, and the check?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import observe
from med_gradcam.errors import CannotExplainError
from med_gradcam.secant import pair
from tests.engine import nets
from tests.engine.test_many import Sorting

SCANS = [nets.volume(seed=seed) for seed in (0, 1, 5, 7)]
GIVEN: dict[str, Any] = {"target": 1, "layer": "c", "reference": "zero"}


@contextmanager
def _runs(net: nn.Module) -> Iterator[list[bool]]:
    """Each run for real, and whether it was of an empty scan."""
    found: list[bool] = []

    def note(_: Any, given: Any) -> None:
        if given[0].device.type != "meta":
            found.append(float(given[0].detach().abs().max()) == 0.0)

    handle = net.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _each(net: nn.Module, **given: Any) -> list[mg.Explanation]:
    return [mg.explain(scan, net, **given) for scan in SCANS]


def _same(made: Any, alone: Any) -> None:
    for one, wanted in zip(made, alone, strict=True):
        np.testing.assert_array_equal(one.evidence, wanted.evidence)
        assert one.score == wanted.score
        assert one.reference_score == wanted.reference_score
        assert one.warnings == wanted.warnings
        assert one.status == wanted.status


def test_one_forward_for_each_further_scan() -> None:
    net = nets.made(Sorting)
    alone = _each(net, **GIVEN)
    with _runs(net) as found:
        made = mg.explain_many(SCANS, net, **GIVEN)
    assert len(found) == 3 + 1 + 1 + 1  # the first with its repetition and its reference
    assert sum(found) == 1
    _same(made, alone)
    assert [round(e.cost_in_forwards) for e in made] == [3, 1, 1, 1]
    assert made[1].cost_in_forwards < 1.2


@pytest.mark.parametrize("layer", ["all", "auto", "c", "b"])
@pytest.mark.parametrize("target", [1, [0, 2], "auto"])
def test_each_equals_its_own_run(layer: str, target: Any) -> None:
    net = nets.made(Sorting)
    made = mg.explain_many(SCANS, net, target=target, layer=layer, reference="zero")
    alone = [
        one
        for scan in SCANS
        for one in mg.explain_many([scan], net, target=target, layer=layer, reference="zero")
    ]
    _same(made, alone)


def test_a_reference_of_each_scan_s_own_is_run_for_each() -> None:
    net = nets.made(Sorting)
    given = {**GIVEN, "reference": "tissue"}
    scans = [replace(scan, modality="MR") for scan in SCANS]
    alone = [mg.explain(scan, net, **given) for scan in scans]
    with _runs(net) as found:
        made = mg.explain_many(scans, net, **given)
    assert len(found) == 3 + 2 + 2 + 2
    _same(made, alone)


def test_a_network_that_answers_at_random_is_still_noticed() -> None:
    class Noisy(Sorting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out + torch.rand(()) * out

    with pytest.raises(CannotExplainError, match="different score each time"):
        mg.explain_many(SCANS, nets.made(Noisy), **GIVEN)


def test_quick_repeats_no_scan() -> None:
    net = nets.made(Sorting)
    mg.explain(SCANS[0], net, **GIVEN)  # the cells are placed once per network
    with _runs(net) as found:
        mg.explain_many(SCANS, net, quick=True, **GIVEN)
    assert len(found) == 2 + 1 + 1 + 1


def test_targets_and_layers_of_another_kind_are_not_taken_for_known() -> None:
    net = nets.made(Sorting)
    x, zero = (nets.batch(a) for a in (nets.scan(), 0 * nets.scan()))
    known = observe.Known()
    first, second = nets.score_of(0), nets.score_of(1)
    runs = pair.run_all(net, ["c"], zero, lambda _: [first])
    known.keep(zero, (["c"], False, [first]), runs)
    assert len(known.of(zero.clone(), (["c"], False, [nets.score_of(0)]))) == 1
    assert not known.of(x, (["c"], False, [first]))
    assert not known.of(zero, (["b"], False, [first]))
    assert not known.of(zero, (["c"], True, [first]))
    assert not known.of(zero, (["c"], False, [second]))
    assert not known.of(zero, (["c"], False, [first, second]))


def test_two_functions_are_two_targets() -> None:
    net = nets.made(Sorting)
    for function in (lambda out: out[:, 0], lambda out: -out[:, 0]):
        made = mg.explain_many(SCANS, net, target=function, layer="c", reference="zero")
        _same(made, _each(net, target=function, layer="c", reference="zero"))
