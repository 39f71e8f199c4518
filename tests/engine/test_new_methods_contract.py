"""Does every module in med_gradcam/methods keep the contract, whoever wrote it?"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import _plugins, observe
from med_gradcam.capture import Capture
from med_gradcam.explanation import Measure
from med_gradcam.graph import trace
from med_gradcam.methods import Bound, Evidence
from med_gradcam.methods._noise import textures
from med_gradcam.record import from_record, to_record
from med_gradcam.reference import grain
from med_gradcam.tail import INPUT, Score, at_rest
from tests.engine import nets

LOOSE = Bound(float("inf"), 0.0)
NAMES = _plugins.names("methods")
FLAGS = ("SIGNED", "BESIDE", "USES_REFERENCE", "PROMISES_SUM")
# Nets without leaks or curved rectifiers, so that every method has a rule for them.
MAKERS = {"gate": nets.gated, "max pool": nets.max_pooled, "batch norm": nets.batch_normed}


def _method(name: str) -> ModuleType:
    return importlib.import_module(f"med_gradcam.methods.{name}")


def _capture(
    name: str, net: nn.Module, score: Score, seed: int = 0, *, times: float = 1.0
) -> Capture:
    """A capture as the engine hands it to a method; the scans times `times`."""
    dtype = next(net.parameters()).dtype
    x, reference = (times * nets.batch(nets.scan(seed=s), dtype) for s in (0, 5))
    method = _method(name)
    layer = "first" if method.LEVEL == "layer" else INPUT
    if hasattr(method, "INSTEAD"):  # it needs scan and reference as a pair
        with at_rest(net):
            pair, traced = (x, reference), trace(net, x.shape[1:])
            picked: Any = score
            (seen,) = observe.paired(net, [layer], pair, lambda _: [picked], traced)
            found = seen.found[layer]
    else:
        found = nets.captured(net, layer, x, score, reference if method.USES_REFERENCE else None)
    if method.BESIDE:
        found.beside = nets.captured(net, "first", x, score, reference)
    found.seed = seed
    return found


def _evidence(
    name: str, net: nn.Module, score: Score, seed: int = 0, *, times: float = 1.0
) -> Evidence:
    capture = _capture(name, net, score, seed, times=times)
    with at_rest(net):
        made: Evidence = _method(name).evidence(capture, LOOSE)
    return made


def check_constants(method: ModuleType) -> None:
    for text in ("TITLE", "SOURCE", "CANNOT_SHOW"):
        value = getattr(method, text)
        assert isinstance(value, str), text
        assert value == value.strip() != "", text
        assert value[0] != value[0].upper() or text != "CANNOT_SHOW", "it goes on a sentence"
    assert len(method.TITLE) <= 100
    for flag in FLAGS:
        assert isinstance(getattr(method, flag), bool), flag
    assert method.UNIT in get_args(Measure)
    assert method.SIGNED or method.UNIT != "score", "what leaves out a sign is no amount"
    assert method.LEVEL in ("layer", "input")
    assert method.LEVEL == "input" or not method.BESIDE
    assert method.SIGNED or not method.PROMISES_SUM
    assert method.SIGNED or "evidence" in method.CANNOT_SHOW, "it cannot show evidence against"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name: str) -> None:
    check_constants(_method(name))


def test_a_method_that_says_too_little_is_caught() -> None:
    """Planted faults, one each."""
    whole = {k: v for k, v in vars(_method("layercam")).items() if k.isupper()}
    check_constants(_module(whole))
    for key, wrong in (
        ("SIGNED", "no"),
        ("UNIT", "log-odds"),
        ("UNIT", "score"),
        ("LEVEL", "voxel"),
        ("BESIDE", True),
        ("PROMISES_SUM", True),
        ("TITLE", ""),
        ("CANNOT_SHOW", "amounts"),
        ("SOURCE", None),
    ):
        with pytest.raises(AssertionError):
            check_constants(_module({**whole, key: wrong}))


def _module(values: dict[str, Any]) -> ModuleType:
    made = ModuleType("planted")
    vars(made).update(values)
    return made


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_evidence_is_finite_float64_and_on_the_cells(name: str, maker: str) -> None:
    method, net = _method(name), nets.made(MAKERS[maker])
    found = _evidence(name, net, nets.score_of(1, "softmax"))
    values = found.values
    assert tuple(values.shape) == ((8, 8, 8) if method.LEVEL == "layer" else (16, 16, 16))
    assert values.dtype == torch.float64
    assert not values.requires_grad
    assert bool(torch.isfinite(values).all())
    assert bool(values.any())
    if not method.SIGNED:
        assert float(values.min()) >= 0
    elif found.start_score is not None and method.PROMISES_SUM:
        capture = _capture(name, net, nets.score_of(1, "softmax"))
        total = float(values.sum()) + found.start_score
        assert total == pytest.approx(capture.score, abs=0.05 * float(values.abs().sum()))
        assert isinstance(found.converged, bool)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", [n for n in NAMES if _method(n).SIGNED])
def test_what_is_for_a_class_is_against_its_opposite(name: str, maker: str) -> None:
    net, plain = nets.made(MAKERS[maker], dtype=torch.float64), nets.score_of(1)
    ours = _evidence(name, net, plain).values
    theirs = _evidence(name, net, lambda out: -plain(out)).values
    assert float((ours + theirs).abs().max()) <= 1e-10 * float(ours.abs().max())
    assert float(ours.min()) < 0 < float(ours.max())


def _times(
    net: nn.Module, path: str, factor: float, names: tuple[str, ...] = ("weight",)
) -> nn.Module:
    for name in names:
        nets.weight(net, path, name).mul_(factor)
    return net


def measured(name: str) -> str:
    """What a method's numbers are, by what becomes of them in other units.

    Of twice the score, of its opposite, of a layer whose numbers are four times as large, and of
    a scan in another unit: the network gives the same scores in the last two.
    """
    plain, four = nets.score_of(1), 4.0

    def same(values: torch.Tensor, wanted: torch.Tensor) -> bool:
        return float((values - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())

    def net() -> nn.Module:
        return nets.made(nets.gated, dtype=torch.float64)

    once = _evidence(name, net(), plain).values
    twice = _evidence(name, net(), lambda out: 2 * plain(out)).values
    opposite = _evidence(name, net(), lambda out: -plain(out)).values
    scaled = _times(_times(net(), "first.0", four, ("weight", "bias")), "rest.0", 1 / four)
    louder = _evidence(name, scaled, plain).values
    weaker = _times(net(), "first.0", 1 / four)
    other = _evidence(name, weaker, plain, times=four).values
    if not (same(twice, 2 * once) and same(louder, once)):
        return "relative units"
    if same(opposite, -once) and same(other, once):
        return "score"
    if same(opposite, once) and same(other, once / four):
        return "score per input unit"
    return "relative units"


@pytest.mark.parametrize("name", NAMES)
def test_a_map_has_the_unit_that_its_method_says(name: str) -> None:
    """No map is called log-odds that cannot be an amount of them."""
    assert measured(name) == _method(name).UNIT


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("gradcam", "log-odds"),
        ("eigencam", "relative units"),
        ("saliency", "log-odds per input unit"),
    ],
)
def test_the_unit_goes_with_the_result(name: str, unit: str) -> None:
    layer = "first" if _method(name).LEVEL == "layer" else "auto"
    made = mg.explain(nets.volume(), nets.made(nets.gated), method=name, layer=layer)
    assert (made.unit, made.target.unit) == (unit, "log-odds")
    assert mg.draw(made).signed.unit == f"{unit} per mL"
    record = to_record(made)
    assert (record["unit"], record["score_unit"]) == (unit, "log-odds")
    assert from_record(record, made.evidence) == made


def test_expected_gradients_are_held_against_the_mean_of_their_references() -> None:
    net, scan = nets.made(nets.silu_mlp), nets.as_volume(3 * nets.scan())
    nets.weight(net, "rest.4.4").mul_(100)
    made = mg.explain(scan, net, method="expected_gradients")
    assert made.status == "complete"
    assert made.bypassed == 0
    assert made.reference_score is not None
    assert made.residual is not None
    wanted = []
    for sign in (1.0, -1.0):
        for texture in textures(torch.Size(scan.array.shape), 2, 0):
            x = sign * grain(scan.array[0]) * texture[None]
            with torch.no_grad():
                wanted.append(float(made.target(net(x))[0]))
    assert made.reference_score == pytest.approx(np.mean(wanted), abs=1e-5)
    assert len(set(wanted)) == 4
    change = made.score - made.reference_score
    assert abs(made.residual) <= 0.05 * abs(change)
    assert made.reference.words.endswith(
        "0 a.u. with 4 seeded textures of the scan's noise, their mean"
    )
    plain = mg.explain(scan, net, method="integrated_gradients")
    assert plain.reference.words.endswith("0 a.u.")
    assert plain.reference_score != pytest.approx(made.reference_score, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_map(name: str) -> None:
    net, score = nets.made(nets.gated), nets.score_of(1)
    one, again = (_evidence(name, net, score, seed=3).values for _ in range(2))
    assert torch.equal(one, again)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_the_case_and_the_global_random_state_are_left_alone(name: str) -> None:
    net, score = nets.made(nets.gated), nets.score_of(1)
    capture = _capture(name, net, score)
    tensors = [t for t in (capture.activation, capture.baseline, capture.input) if t is not None]
    copies = [t.clone() for t in tensors]
    net.train()
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    hooks = [_hooks(m) for m in net.modules()]
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 - the global state is the point
    before = torch.get_rng_state()
    numbers = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    with at_rest(net):
        _method(name).evidence(capture, LOOSE)
    assert torch.equal(before, torch.get_rng_state())
    assert numbers == np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert [_hooks(m) for m in net.modules()] == hooks
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert torch.is_grad_enabled()


def _hooks(module: nn.Module) -> tuple[int, bool]:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return sum(len(kind) for kind in kinds), "forward" in vars(module)


# ------------------------------------------------------------------------------- docs/methods.md


def _rows(text: str, heading: str) -> dict[str, list[str]]:
    """The cells of the table under a heading, by the name in its first column."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if "| `" in line]
    return {cells[0].strip().strip("`"): [c.strip() for c in cells[1:]] for cells in lines}


def test_the_page_of_methods_says_what_the_modules_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
    at = {"layer": _rows(text, "At a layer"), "input": _rows(text, "At the input")}
    for name in NAMES:
        method = _method(name)
        _, adds_up, sign, unit, reference = at[method.LEVEL][name]
        assert unit == method.UNIT.removesuffix(" units"), name
        assert sign == ("for and against" if method.SIGNED else "no sign"), name
        assert reference == ("yes" if method.USES_REFERENCE else "no"), name
        assert not method.PROMISES_SUM or adds_up.startswith("z"), name
    assert sorted([*at["layer"], *at["input"]]) == list(NAMES)
    limits = _rows(text, "Papers, limits, cost")
    assert sorted(limits) == list(NAMES)
    for name, (paper, cannot, cost) in limits.items():
        source = _method(name).SOURCE
        ours = set(re.findall(r"arXiv:(\d{4}\.\d{5})", source))
        assert ours <= set(re.findall(r"\d{4}\.\d{5}", text)), name
        assert paper, name
        assert cost, name
        assert _method(name).SIGNED or "evidence" in cannot or "same" in cannot, name
