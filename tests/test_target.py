"""Is the number that is explained the log-odds that the target names?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError
from med_gradcam.target import Target, output_matrix, parse_target

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


def test_a_segmentation_network() -> None:
    with pytest.raises(CannotExplainError, match=r"got an output of shape \(1, 3, 4, 4, 4\)") as c:
        output_matrix(torch.ones(1, 3, 4, 4, 4))
    assert c.value.reason == "dense"


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


def test_a_regression_network() -> None:
    assert parse_target("auto", ("age",), "none", [61.0]) == Target(
        "regression", "age", (0,), "none"
    )
    assert parse_target("0", (), "none", [61.0]).label == "class 0"


@pytest.mark.parametrize("text", ["nodul", "3", "#3", "-1", "#", "", "nodule-vs-", "-vs-nodule"])
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
        (("mask", "x", (0,), "none"), "expected a kind class, contrast or regression, got 'mask'"),
        (("class", "x", (0, 1), "none"), r"index that fits a class target, got \(0, 1\)"),
        (("class", "x", (-1,), "none"), r"got \(-1,\)"),
        (("contrast", "x", (1,), "none"), r"index that fits a contrast target, got \(1,\)"),
        (("contrast", "a-vs-a", (1, 1), "none"), "two different classes to compare, got 'a-vs-a'"),
    ],
)
def test_no_target(fields: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Target(*fields)
