"""Is the number that is explained the log-odds that the target names?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.outputs import item, select, what
from med_gradcam.record import from_record, to_json, to_record
from med_gradcam.target import (
    Target,
    TargetRegion,
    Weights,
    log_odds,
    output_map,
    output_matrix,
    parse_target,
)
from tests.tiny import explained

numbers = st.floats(-30, 30, width=32)
vectors = st.lists(numbers, min_size=2, max_size=6)


def score(target: Target, output: list[float]) -> float:
    return float(target(torch.tensor([output], dtype=torch.float64))[0])


@given(vectors, st.data())
def test_softmax_gives_the_log_odds_of_the_probability(
    output: list[float], data: st.DataObject
) -> None:
    c = data.draw(st.integers(0, len(output) - 1))
    target = Target("class", "x", (c,), "softmax")
    logits = torch.tensor(output, dtype=torch.float64)
    z = score(target, output)
    others = [v for i, v in enumerate(logits.tolist()) if i != c]
    want = output[c] - math.log(sum(math.exp(v) for v in others))
    assert z == pytest.approx(want, abs=1e-9)
    assert target.probability(z) == pytest.approx(float(logits.softmax(0)[c]), abs=1e-12)
    shifted = score(target, [v + 7.5 for v in output])  # P10: blind to a number added to all
    assert shifted == pytest.approx(z, abs=1e-6)


@given(numbers, numbers)
def test_two_logits_are_antisymmetric_bit_for_bit(a: float, b: float) -> None:
    one, other = (Target("class", "x", (c,), "softmax") for c in (1, 0))
    assert score(one, [a, b]) == b - a == -score(other, [a, b])


@given(vectors)
def test_contrast_is_a_difference(output: list[float]) -> None:
    target = Target("contrast", "b-vs-a", (1, 0), "softmax")
    assert score(target, output) == output[1] - output[0]
    assert target.probability(1.0) is None


@given(numbers)
def test_sigmoid_and_regression_are_the_output_itself(y: float) -> None:
    sigmoid = Target("class", "x", (0,), "sigmoid")
    assert score(sigmoid, [y, 3.0]) == y
    assert sigmoid.probability(y) == pytest.approx(1 / (1 + math.exp(-y)))
    assert sigmoid.unit == "log-odds"
    regression = Target("regression", "x", (0,), "none")
    assert score(regression, [y]) == y
    assert regression.probability(y) is None
    assert regression.unit == "score"


def test_a_probability_at_the_far_ends() -> None:
    target = Target("class", "x", (0,), "sigmoid")
    assert target.probability(5000.0) == 1.0
    assert target.probability(-5000.0) == 0.0


def test_scores_of_a_batch() -> None:
    target = Target("class", "x", (1,), "softmax")
    assert target(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), "features"),
        [torch.ones(2, 3)],
        {"logits": torch.ones(2, 3), "other": 1},
        [(torch.ones(2, 3, 1, 1, 1),)],
    ],
)
def test_outputs_of_many_kinds(output: Any) -> None:
    assert output_matrix(output).shape == (2, 3)


def test_one_number_per_case() -> None:
    assert output_matrix(torch.ones(4)).shape == (4, 1)


@pytest.mark.parametrize("output", [None, (), {}, 3.0, "logits"])
def test_no_tensor_comes_out(output: Any) -> None:
    with pytest.raises(CannotExplainError, match="expected the network to return a tensor") as c:
        output_matrix(output)
    assert c.value.reason == "output"


@pytest.mark.parametrize(
    ("take", "shape"),
    [(output_matrix, (1, 3, 4, 4, 4)), (output_matrix, (1, 7, 3)), (output_map, (1, 3, 4, 4))],
)
def test_an_output_of_another_shape(take: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(CannotExplainError) as caught:
        take(torch.ones(shape))
    assert f"got an output of shape {shape}" in str(caught.value)
    assert caught.value.reason == "dense"


LABELS = ("quiet", "nodule", "2")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("auto", Target("class", "nodule", (1,), "softmax")),
        ("nodule", Target("class", "nodule", (1,), "softmax")),
        ("0", Target("class", "quiet", (0,), "softmax")),
        ("#1", Target("class", "nodule", (1,), "softmax")),
        ("2", Target("class", "2", (2,), "softmax")),
        ("nodule-vs-quiet", Target("contrast", "nodule-vs-quiet", (1, 0), "softmax")),
        ("#0-vs-2", Target("contrast", "quiet-vs-2", (0, 2), "softmax")),
        ("nodule-vs-0.6*quiet", Target("contrast", "nodule-vs-0.6*quiet", (1, 0), "softmax", 0.6)),
        ("#1-vs-.5*#2", Target("contrast", "nodule-vs-0.5*2", (1, 2), "softmax", 0.5)),
        ("nodule-vs-1*quiet", Target("contrast", "nodule-vs-quiet", (1, 0), "softmax")),
    ],
)
def test_what_a_user_writes(text: str, want: Target) -> None:
    assert parse_target(text, LABELS, "softmax", [0.1, 0.7, 0.2]) == want


def test_labels_win_over_indices() -> None:
    labels = ("1", "0")
    assert parse_target("1", labels, "softmax", [0.0, 1.0]).index == (0,)
    assert parse_target("#1", labels, "softmax", [0.0, 1.0]).index == (1,)


def test_a_label_that_looks_like_a_contrast() -> None:
    labels = ("a-vs-b", "c")
    assert parse_target("a-vs-b", labels, "softmax", [0.0, 1.0]).kind == "class"
    assert parse_target("a-vs-b-vs-c", labels, "softmax", [0.0, 1.0]).index == (0, 1)
    assert parse_target("c-vs-a-vs-b", labels, "softmax", [0.0, 1.0]).index == (1, 0)
    weighted = parse_target("c-vs-0.6*a-vs-b", labels, "softmax", [0.0, 1.0])
    assert (weighted.index, weighted.rival_weight) == ((1, 0), 0.6)


def test_a_label_that_looks_like_a_weight() -> None:
    made = parse_target("b-vs-2*a", ("2*a", "b"), "softmax", [0.0, 1.0])
    assert (made.index, made.rival_weight) == ((1, 0), 1.0)


def test_a_regression_network() -> None:
    assert parse_target("auto", ("age",), "none", [61.0]) == Target(
        "regression", "age", (0,), "none"
    )
    assert parse_target("0", (), "none", [61.0]).label == "class 0"


_WRONG = ["nodul", "3", "#3", "-1", "#", "", "nodule-vs-", "-vs-nodule", "nodule-vs-0.6*", "1*2"]


@pytest.mark.parametrize("text", _WRONG)
def test_a_class_there_is_not(text: str) -> None:
    with pytest.raises(UnknownNameError, match=r"expected a known class, got .*0 to 2") as caught:
        parse_target(text, LABELS, "softmax", [0.1, 0.7, 0.2])
    assert caught.value.exit_code == 2


def test_near_labels_are_named() -> None:
    with pytest.raises(UnknownNameError, match="got 'nodul'; near ones of 3: nodule"):
        parse_target("nodul", LABELS, "softmax", [0.1, 0.7, 0.2])


def test_auto_among_several_outputs_without_a_link() -> None:
    with pytest.raises(UsageError, match="2 outputs and no link function; name one of: a, class 1"):
        parse_target("auto", ("a",), "none", [1.0, 2.0])


def test_a_class_beyond_the_outputs() -> None:
    with pytest.raises(UsageError, match=r"class index below 2 .* got 4 for 'x'"):
        Target("class", "x", (4,), "softmax")(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("class", "x", (0,), "relu"), "expected a link of softmax, sigmoid, none, got 'relu'"),
        (("mask", "x", (0,), "none"), "kind of class, contrast, regression, region, custom, got"),
        (("class", "x", (0, 1), "none"), r"index that fits a class target, got \(0, 1\)"),
        (("class", "x", (-1,), "none"), r"got \(-1,\)"),
        (("contrast", "x", (1,), "none"), r"index that fits a contrast target, got \(1,\)"),
        (("contrast", "a-vs-a", (1, 1), "none"), "two different classes to compare, got 'a-vs-a'"),
        (("contrast", "x", (1, 0), "none", -0.5), "weight above 0, .* got -0.5 for 'x'"),
        (("contrast", "x", (1, 0), "none", math.inf), "weight above 0, .* got inf for 'x'"),
        (("class", "x", (1,), "none", 0.5), "for the rival of a contrast only, got 0.5"),
        (("region", "x", (1,), "none"), "expected a region for a region target only, got 'region'"),
        (("custom", "x", (1,), "none"), r"index that fits a custom target, got \(1,\)"),
    ],
)
def test_no_target(fields: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Target(*fields)


# ------------------------------------------------------------------------------ a weighted rival


@given(vectors, st.floats(0.05, 5))
def test_a_weighted_rival(output: list[float], weight: float) -> None:
    target = Target("contrast", "b-vs-w*a", (1, 0), "softmax", weight)
    assert score(target, output) == pytest.approx(output[1] - weight * output[0], abs=1e-9)
    assert target.probability(1.0) is None


def test_a_weighted_rival_is_no_log_odds_behind_a_softmax() -> None:
    units = {
        (link, weight): Target("contrast", "x", (1, 0), link, weight).unit
        for link in ("softmax", "sigmoid", "none")
        for weight in (1.0, 0.6)
    }
    assert [key for key, unit in units.items() if unit == "log-odds"] == [
        ("softmax", 1.0),
        ("sigmoid", 1.0),
        ("sigmoid", 0.6),
    ]


def test_what_for_and_against_do() -> None:
    assert Target("regression", "age", (0,), "none").words == ("pulls up", "pulls down")
    assert region_target(torch.ones(1, 1, 1), "none", (0,)).words == ("pulls up", "pulls down")
    for link in ("softmax", "sigmoid"):
        assert Target("class", "x", (0,), link).words == ("raises", "lowers")
    assert Target("contrast", "a-vs-b", (0, 1), "none").words == ("raises", "lowers")


# --------------------------------------------------------------------------------- over a region


def region_target(
    values: torch.Tensor,
    link: Any = "softmax",
    index: tuple[int, ...] = (1,),
    start: tuple[int, int, int] = (0, 0, 0),
    shape: tuple[int, int, int] | None = None,
) -> Target:
    found = TargetRegion("mask", "the given mask", int((values > 0).sum()), float(values.sum()), "")
    i, j, k = shape or tuple(values.shape)
    return Target(
        "region", "x", index, link, region=found, weights=Weights((i, j, k), start, values)
    )


@pytest.mark.parametrize("link", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("index", [(2,), (2, 0)])
def test_a_region_is_the_weighted_mean_of_the_voxels(link: Any, index: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    weights = torch.rand(2, 3, 2, dtype=torch.float64)
    target = region_target(weights, link, index, (1, 2, 3), (4, 5, 6))
    flat = Target("contrast" if len(index) == 2 else "class", "x", index, link)
    wanted = [0.0, 0.0]
    for i, j, k in np.ndindex(2, 3, 2):
        one = flat(logits[:, :, 1 + i, 2 + j, 3 + k])  # the score of a row, voxel by voxel
        wanted = [w + float(weights[i, j, k] * z) for w, z in zip(wanted, one, strict=True)]
    assert target(logits).tolist() == pytest.approx([w / float(weights.sum()) for w in wanted])
    assert target.probability(0.0) is None
    assert target.unit == ("score" if link == "none" else "log-odds")


@given(st.integers(0, 2**32 - 1))
def test_two_logits_of_a_map_are_antisymmetric_bit_for_bit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(1, 2, 3, 4, 5, generator=generator)
    weights = torch.rand(3, 4, 5, generator=generator)
    one, other = (region_target(weights, "softmax", (c,)) for c in (1, 0))
    assert float(one(logits)[0]) == -float(other(logits)[0])
    shifted = logits + 7.5 * torch.randn(1, 1, 3, 4, 5, generator=generator)  # P10, per voxel
    assert float(one(shifted)[0]) == pytest.approx(float(one(logits)[0]), abs=1e-4)


def test_a_region_of_another_map() -> None:
    target = region_target(torch.ones(2, 2, 2))
    with pytest.raises(UsageError, match=r"output map of \(2, 2, 2\) voxels .* got \(3, 2, 2\)"):
        target(torch.zeros(1, 2, 3, 2, 2))
    with pytest.raises(UsageError, match="class index below 1"):
        target(torch.zeros(1, 1, 2, 2, 2))


# ---------------------------------------------------------------------------- the user's function


def custom(function: Any, output: str = "") -> Target:
    return Target("custom", "own", (), "none", output=output, function=function)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y[:, 1] * 2,
        lambda y: y[0, 1] * 2,  # a number, and of the first item only
        lambda y: (y[:, 1] * 2).mean(),  # would mix the items
        lambda y: 2 * y[:, 1:2],
    ],
)
def test_a_function_is_asked_item_by_item(function: Any) -> None:
    output = torch.tensor([[0.0, 1.0], [2.0, 5.0], [3.0, -1.0]])
    assert custom(function)(output).tolist() == [2.0, 10.0, -2.0]
    both = {"a": [output, 3], "b": None}
    assert custom(lambda y: function(y["a"][0]))(both).tolist() == [2.0, 10.0, -2.0]
    assert custom(function, "a[0]")(both).tolist() == [2.0, 10.0, -2.0]
    assert (custom(function).unit, custom(function).probability(1.0)) == ("score", None)


@pytest.mark.parametrize("wrong", [1.0, None, torch.ones(2), torch.ones(1) * 1j])
def test_a_function_that_gives_no_number(wrong: Any) -> None:
    with pytest.raises(UsageError, match="'own' to return one real number per scan"):
        custom(lambda y: wrong)(torch.ones(2, 3))


# ------------------------------------------------------------------------- a place in the output

Pair = namedtuple("Pair", ["mean", "spread"])


@dataclasses.dataclass
class Out:
    logits: Any
    hidden: Any = None


T = torch.ones(2, 3)
U = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("output", "path"),
    [
        (T, ""),
        ((U, T), "[1]"),
        ([U, [U, T]], "[1][1]"),
        ([U, T], "[-1]"),
        ({"a": [U, {"b": T}]}, "a[1].b"),
        ({"a key": T}, '["a key"]'),
        ({"a.b": T}, "['a.b']"),
        ({0: T}, "[0]"),
        (Pair(U, T), "spread"),
        (Pair(U, T), "[1]"),
        (Out(U, (T,)), "hidden[0]"),
        ({"a": Out(T)}, "a.logits"),
        (OrderedDict(x=U, y=T), "y"),
    ],
)
def test_an_output_by_its_place(output: Any, path: str) -> None:
    assert select(output, path) is (T if path else output)
    assert Target("class", "x", (1,), "sigmoid", output=path)(output).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("output", "path", "says"),
    [
        (
            {"logits": T, "aux": [U]},
            "logit",
            r"got 'logit'; .*logits.* puts out logits \(2, 3\), aux",
        ),
        ((T, U), "[2]", r"got '\[2\]'; .*\[0\] \(2, 3\), \[1\] \(2, 3\)\."),
        (T, "[0]", r"one tensor \(2, 3\) and nothing else"),
        (T, "shape", r"one tensor \(2, 3\) and nothing else"),
        (Out(T), "grad", r"puts out logits \(2, 3\)\."),
        ({"a": 1}, "b", "puts out no tensor, but dict"),
        (list(T.expand(11, 2, 3)), "[20]", "and 3 more"),
    ],
)
def test_a_place_there_is_not(output: Any, path: str, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        select(output, path)


@pytest.mark.parametrize("path", ["[", "[1", "a..b", "a b", "[a]", "0", ".", "a[1.5]"])
def test_no_place(path: str) -> None:
    with pytest.raises(UsageError, match=r"expected the place of an output such as"):
        select({"a": [T, {"b": T}]}, path)


def test_what_a_network_puts_out_is_named_where_no_tensor_comes_first() -> None:
    with pytest.raises(CannotExplainError, match=r"begins with NoneType; it holds \[1\] \(2, 3\)"):
        output_matrix((None, T))
    assert what([T, {"a": U}]) == "[0] (2, 3), [1].a (2, 3)"


def test_one_item_of_an_output_keeps_its_kind() -> None:
    batch = torch.arange(6.0).reshape(2, 3)
    loose = SimpleNamespace(x=1)
    output: Any = OrderedDict(a=Pair(batch, [batch]), b=Out(batch, loose), c=torch.tensor(3.0))
    one = item(output, 1, 2)
    assert type(one) is OrderedDict
    assert type(one["a"]) is Pair
    assert one["a"].mean.tolist() == one["a"].spread[0].tolist() == [[3.0, 4.0, 5.0]]
    assert one["b"].logits.tolist() == [[3.0, 4.0, 5.0]]
    assert one["b"].hidden is loose
    assert float(one["c"]) == 3.0
    assert output["a"][0] is batch


# ----------------------------------------------------------------------------- to a file and back

GRID = Geometry((2, 2, 2), np.eye(4))
texts = st.text(max_size=8)
found = st.builds(
    TargetRegion,
    st.sampled_from(["predicted", "component", "mask", "voxel", "box"]),
    texts,
    st.integers(1, 99),
    st.floats(0.1, 99),
    texts,
)
links = st.sampled_from(["softmax", "sigmoid", "none"])
rivals = st.just((4, 1))
weight = st.floats(0.01, 9)
one_class = st.tuples(st.integers(0, 9))
targets = st.one_of(
    st.builds(Target, st.just("class"), texts, one_class, links, output=texts),
    st.builds(Target, st.just("contrast"), texts, rivals, links, weight, texts),
    st.builds(Target, st.just("region"), texts, one_class, links, output=texts, region=found),
    st.builds(Target, st.just("region"), texts, rivals, links, weight, texts, region=found),
    st.builds(Target, st.just("custom"), texts, st.just(()), st.just("none"), output=texts),
)


@given(targets)
def test_a_target_comes_back_from_a_file(target: Target) -> None:
    e = explained(np.ones((2, 2, 2)), GRID, GRID, target=target)
    record = json.loads(to_json(to_record(e)))
    back = from_record(record, e.evidence)
    assert back.target == target
    assert record["target"]["words"] == dict(zip(("for", "against"), target.words, strict=True))


def test_a_file_from_before_these_keys() -> None:
    e = explained(np.ones((2, 2, 2)), GRID, GRID)
    record = to_record(e)
    record["target"] = {k: record["target"][k] for k in ("kind", "label", "index", "link")}
    assert from_record(record, e.evidence) == e


def test_what_is_not_in_a_file_is_said() -> None:
    whole = region_target(torch.ones(2, 2, 2))
    e = explained(np.ones((2, 2, 2)), GRID, GRID, target=whole)
    back = from_record(to_record(e), e.evidence)
    assert back == e
    assert back.target.weights is None
    with pytest.raises(UsageError, match=r"weights are not part of a file, .* region again"):
        back.target(torch.zeros(1, 2, 2, 2, 2))
    with pytest.raises(UsageError, match="a function is not part of a file; hand it to explain"):
        Target("custom", "own", (), "none")(torch.zeros(1, 2))


def test_log_odds_of_rows_and_maps_are_one_formula() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 2, 3, 2)
    for index in ((2,), (2, 0)):
        rows = log_odds(logits.flatten(2)[0].T, index, "softmax", 0.6)
        assert torch.equal(log_odds(logits, index, "softmax", 0.6).flatten(), rows)
