"""Is the change of random programs shared out exactly or refused, and would a fault be seen?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from med_gradcam.secant import memory, pair, recorder, rules, sweep, table
from med_gradcam.secant.recorder import Recorder
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.secant.table import RULES
from tests.secant.operations import ALL
from tests.secant.programs import draw, smallest, tried, trouble
from tests.secant.test_wrong_rules import first_branch_only, product_at_the_case

aten = torch.ops.aten
FEW = 300
pytestmark = pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors is deprecated")


def _all_exact(seeds: range) -> tuple[float, set[str]]:
    """The part of the programs that was refused, and the names of the steps in all of them."""
    refused, names = 0, set()
    for seed in seeds:
        program = draw(seed)
        names |= {step.name for step in (*program.before, *program.behind)}
        try:
            wrong = trouble(program)
        except NoRuleError:
            refused += 1
            continue
        if wrong is not None:
            least = smallest(program)
            pytest.fail(f"{program}: {wrong}; at the least {least}: {tried(least)}")
    return refused / len(seeds), names


def test_a_few_hundred_programs_are_exact_or_refused() -> None:
    refused, names = _all_exact(range(FEW))
    assert refused < 0.25  # or they prove little
    called = {name.rsplit(" ", 1)[0] for name in names}
    assert len(called & ALL.keys()) > 0.9 * len(ALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_programs_are_exact_or_refused(block: int) -> None:
    start = FEW + 1000 * block
    refused, _ = _all_exact(range(start, start + 1000))
    assert refused < 0.25


# ---------------------------------------------------------------------------------- faults


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    table._needs.cache_clear()
    yield
    table._needs.cache_clear()


def _rule(name: str, wrong: rules.Rule) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        packet = getattr(aten, name)
        patch.setitem(RULES, packet, replace(RULES[packet], rule=wrong, keep="all"))

    return plant


def _put(where: Any, name: str, wrong: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(where, name, wrong)


def _forgotten(patch: pytest.MonkeyPatch) -> None:
    """Of two uses of a value only the last one counts."""
    text = inspect.getsource(sweep.sweep)
    assert text.count("before + m") == 1
    space = dict(vars(sweep))
    exec(text.replace("before + m", "m"), space)
    patch.setattr(pair, "sweep", space["sweep"])


def _one_way_only(p: rules.Pair, g: rules.Multipliers) -> rules.Multipliers:
    found = rules.product(p, g)
    return found if len(found) < 2 else [found[0], None]


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a product at the case only": _rule("bmm", product_at_the_case),
    "the second factor forgotten": _rule("mul", _one_way_only),
    "the second branch forgotten": _rule("cat", first_branch_only),
    "the first use forgotten": _forgotten,
    "writes not seen by other views": _put(memory.Memory, "write", memory.Memory.set),
    "kept values overwritten": _put(Recorder, "_part", lambda self, target: None),
    "reading what is overwritten": _put(recorder, "reads_over", lambda given, target: False),
    "two values to one place": _put(rules, "_once", lambda pair, place: None),
    "a choice in a part of a buffer": _rule("put", rules.linear),
    "other memory": _put(memory, "where_in_memory", lambda tensor: None),
    "places of views": _put(
        recorder, "overlap", lambda base, view: memory.overlap(base, (view[0], view[1], base[2]))
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[what](monkeypatch)
    table._needs.cache_clear()
    assert any(tried(draw(seed)) for seed in range(FEW))


def test_a_program_in_trouble_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED["a product at the case only"](monkeypatch)
    table._needs.cache_clear()
    program = next(p for p in map(draw, range(FEW)) if tried(p))
    least = smallest(program)
    assert tried(least)
    assert len((*least.before, *least.behind)) <= 3 < len((*program.before, *program.behind))
