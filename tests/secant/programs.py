"""What is a random program, does it share out its score's change exactly, and what is left of one
that does not when all that does not matter is taken out?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import nn

from med_gradcam.secant.pair import share
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from tests.secant.operations import ALL
from tests.secant.pairs import both, noise
from tests.secant.program_steps import KINDS, STEPS, S, Values

EXACT = 1e-9
MOST = 1e3  # no value larger than this, so that rounding stays far below EXACT
ALIVE = 4  # values: a later step is the more likely to meet an earlier one's


@dataclass(frozen=True)
class Step:
    name: str
    seed: int


@dataclass(frozen=True)
class Program:
    """Steps before and behind a layer that all paths pass."""

    seed: int
    before: tuple[Step, ...]
    behind: tuple[Step, ...]

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return noise(*S, seed=2 * self.seed), noise(*S, seed=2 * self.seed + 1)

    def __str__(self) -> str:
        before, behind = (
            [f"{s.name} ({s.seed})" for s in part] for part in (self.before, self.behind)
        )
        return f"program {self.seed}: {', '.join(before)} | {', '.join(behind)}"


class Net(nn.Module):
    """A program as a network."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.layer, self.program = nn.Identity(), program

    def forward(self, x: torch.Tensor) -> Values:
        values = [x]
        self.go(values, self.program.before)
        values = [self.layer(sum((v * 0.8**n for n, v in enumerate(values)), x))]
        self.go(values, self.program.behind)
        return values

    def go(self, values: Values, steps: Iterable[Step]) -> None:
        for step in steps:
            STEPS[step.name](values, Random(step.seed))
            del values[:-ALIVE]


class Trial(Net):
    """The same with a look at each step; `bad` is one that torch refuses or that gets too large."""

    bad: Step | None = None

    def go(self, values: Values, steps: Iterable[Step]) -> None:
        for step in steps:
            if self.bad is not None:
                return
            try:
                super().go(values, [step])
                fine = all(bool((v.abs() < MOST).all()) for v in values)
            except (IndexError, RuntimeError):  # parts of parts; memory that overlaps
                fine = False
            if not fine:
                self.bad = step


def _draw(r: Random) -> Step:
    names = r.choices([names for _, names in KINDS], [weight for weight, _ in KINDS])[0]
    if names:
        name = r.choice(names)
    else:
        packet = r.choice(list(ALL))
        name = f"{packet} {r.randrange(len(ALL[packet]))}"
    return Step(name, r.randrange(10**6))


def without(program: Program, bad: Step) -> Program:
    before, behind = (
        tuple(s for s in part if s != bad) for part in (program.before, program.behind)
    )
    return replace(program, before=before, behind=behind)


def draw(seed: int) -> Program:
    """A program of 5 to 15 steps, less those that it cannot do."""
    r = Random(seed)
    count = r.randint(5, 15)
    steps = tuple(_draw(r) for _ in range(count))
    at = r.randrange(count + 1)
    program = Program(seed, steps[:at], steps[at:])
    while True:
        net = Trial(program)
        with torch.no_grad():
            for x in program.inputs():
                net(x.clone())
        if net.bad is None:
            return program
        program = without(program, net.bad)


def trouble(program: Program) -> str | None:
    """What is wrong with how the change was shared out; None where nothing is.

    Raises:
        NoRuleError: it was refused.
    """
    net = Net(program)
    x, reference = program.inputs()
    with torch.no_grad():
        plain = net(x.clone())
    layers = [INPUT, "layer"]
    case, other = both(net, x, reference, layers)
    for ours, its in zip(case.output, plain, strict=True):
        if not torch.equal(ours, its):
            return "the recorded forward is not the plain one"
    found = share(case, other, layers)
    z, z0 = float(case.score.sum()), float(other.score.sum())
    for layer in layers:
        if found.past[layer]:
            return f"a path past {layer}"
        off = abs(float(found.evidence(layer).sum()) - (z - z0))
        if not off <= EXACT * max(abs(z), abs(z0), 1.0):
            return f"at {layer} {off:.3g} of {z - z0:.3g} is missing"
    return None


def tried(program: Program) -> str | None:
    """As `trouble`; a refusal is none."""
    try:
        return trouble(program)
    except (NoRuleError, IndexError, RuntimeError):  # torch refuses what is left of it
        return None


def smallest(program: Program) -> Program:
    """What is left of a program in trouble when every step that can go has gone."""
    for step in (*program.before, *program.behind):
        less = without(program, step)
        if tried(less):
            return smallest(less)
    return program
