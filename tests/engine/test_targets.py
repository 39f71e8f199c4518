"""Is the explained number the one that was asked for, for every kind of head?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError
from med_gradcam.model import InputSpec, Model
from med_gradcam.target import Link
from tests.engine import nets


def _model(outputs: int, link: Link, labels: tuple[str, ...] = ()) -> Model:
    net = nets.made(lambda: nets.flat_linear(outputs))
    return Model(net, InputSpec(), labels, link, weights_sha256="0")


def _logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.net(nets.batch(nets.scan()))[0].double()
    return out


def _explain(model: Any, target: Any, method: str = "hirescam", **more: Any) -> mg.Explanation:
    options = {"layer": "first", "method": method, **more}
    return mg.explain(nets.volume(), model, target=target, **options)


def test_softmax_scores_are_log_odds_of_the_class_against_the_rest() -> None:
    model = _model(3, "softmax", ("a", "b", "c"))
    probability = torch.softmax(_logits(model), 0)
    for index, label in enumerate(model.labels):
        made = _explain(model, label)
        p = float(probability[index])
        assert made.score == pytest.approx(np.log(p / (1 - p)), rel=1e-5, abs=1e-6)
        assert made.probability == pytest.approx(p, rel=1e-5)
        assert (made.target.label, made.unit) == (label, "log-odds")
    assert _explain(model, "auto").target.index == (int(probability.argmax()),)


def test_two_logits_are_opposites_bit_for_bit() -> None:
    model = _model(2, "softmax")
    one, other = _explain(model, "0", "integrated"), _explain(model, "1", "integrated")
    assert np.array_equal(one.evidence, -other.evidence)
    assert one.score == -other.score
    y = _logits(model)
    assert one.score == pytest.approx(float(y[0] - y[1]), rel=1e-5, abs=1e-6)


def test_sigmoid_scores_are_the_logits_themselves() -> None:
    model = _model(3, "sigmoid", ("a", "b", "c"))
    made = _explain(model, "b")
    y = float(_logits(model)[1])
    assert made.score == pytest.approx(y, rel=1e-5)
    assert made.probability == pytest.approx(1 / (1 + np.exp(-y)), rel=1e-5)


def test_a_single_output_with_a_link_is_a_log_odds() -> None:
    for link in ("softmax", "sigmoid"):
        made = _explain(_model(1, link), "auto")
        assert made.score == pytest.approx(float(_logits(_model(1, link))[0]), rel=1e-5)


def test_regression_keeps_its_own_unit_and_has_no_probability() -> None:
    model = _model(1, "none", ("age",))
    made = _explain(model, "auto")
    assert (made.unit, made.probability, made.target.kind) == ("score", None, "regression")
    assert made.score == pytest.approx(float(_logits(model)[0]), rel=1e-5)


@pytest.mark.parametrize("link", ["softmax", "sigmoid", "none"])
def test_a_contrast_is_the_difference_of_two_logits(link: Link) -> None:
    model = _model(3, link, ("a", "b", "c"))
    made, turned = _explain(model, "a-vs-c", "integrated"), _explain(model, "c-vs-a", "integrated")
    y = _logits(model)
    assert made.score == pytest.approx(float(y[0] - y[2]), rel=1e-5)
    assert np.array_equal(made.evidence, -turned.evidence)
    assert made.probability is None


def test_the_contrast_s_map_is_the_difference_of_the_classes_maps() -> None:
    model = _model(3, "none", ("a", "b", "c"))
    both = _explain(model, "a-vs-c").evidence
    parts = _explain(model, "a").evidence - _explain(model, "c").evidence
    assert np.abs(both - parts).max() < 1e-5 * np.abs(both).max()


@pytest.mark.parametrize("shape", [(1, 2), (1, 2, 1, 1, 1)])
def test_heads_that_keep_their_axes_are_the_same(shape: tuple[int, ...]) -> None:
    class Shaped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nets.made(nets.gated)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.body(x)
            return out.reshape(-1, *shape[1:])

    made = mg.explain(nets.volume(), Shaped().eval(), target=1, layer="body.first")
    wanted = mg.explain(nets.volume(), nets.made(nets.gated), target=1, layer="first")
    assert np.array_equal(made.evidence, wanted.evidence)


def test_a_weighted_rival_is_a_weighted_difference_of_maps() -> None:
    model = _model(3, "none", ("a", "b", "c"))
    made = _explain(model, "a-vs-0.6*c")
    y = _logits(model)
    assert made.score == pytest.approx(float(y[0] - 0.6 * y[2]), rel=1e-5)
    assert (made.target.label, made.target.rival_weight) == ("a-vs-0.6*c", 0.6)
    wanted = _explain(model, "a").evidence - 0.6 * _explain(model, "c").evidence
    assert np.abs(made.evidence - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("method", ["hirescam", "integrated"])
def test_what_is_for_one_of_two_is_against_the_other(method: str) -> None:
    """P9."""
    model = _model(2, "softmax")
    one, other = _explain(model, 1, method), _explain(model, 0, method)
    assert (one.sum_for, one.sum_against) == (other.sum_against, other.sum_for)


@pytest.mark.parametrize("target", ["d", 3, "#3", "a-vs-d", "a-vs-0.5*d", np.int64(7)])
def test_a_class_there_is_not_names_those_there_are(target: Any) -> None:
    """S18: an error, and one that says what to write instead."""
    says = r"The classes are a, b, c\. An index goes from 0 to 2\."
    with pytest.raises(UnknownNameError, match=says):
        _explain(_model(3, "softmax", ("a", "b", "c")), target)
    with pytest.raises(UnknownNameError, match=r"near ones: 0, 1, 2\. An index goes from 0 to 2"):
        _explain(_model(3, "softmax"), target)


@pytest.mark.parametrize("target", [None, True, 1.5, ["a"], ("a", "b", "c"), {"a": 1}])
def test_no_target_at_all(target: Any) -> None:
    with pytest.raises(UsageError, match="expected a target such as auto, a label, an index"):
        _explain(_model(3, "softmax"), target)


# ---------------------------------------------------------------------------- the user's function


def margin(output: torch.Tensor) -> torch.Tensor:
    """The lead of class 1 over the better of the two others; blind to the batch."""
    return output[0, 1] - torch.maximum(output[0, 0], output[0, 2])


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "integrated"])
def test_a_function_of_the_output(method: str) -> None:
    model = _model(3, "softmax")
    made = _explain(model, margin, method)
    y = _logits(model)
    assert made.score == pytest.approx(float(y[1] - torch.maximum(y[0], y[2])), rel=1e-5, abs=1e-6)
    rival = 0 if y[0] > y[2] else 2
    same = _explain(model, f"1-vs-{rival}", method)  # near the scan the same; the path may differ
    if method != "integrated":
        assert np.array_equal(made.evidence, same.evidence)
    assert (made.target.kind, made.target.label, made.unit) == ("custom", "margin", "score")
    assert made.probability is None
    if method == "integrated":
        assert made.status == "complete"


def test_a_function_with_the_layer_chosen_by_itself() -> None:
    net = nets.made(nets.gated)
    made = mg.explain(nets.volume(), net, target=lambda y: y[:, 0] - y[:, 1])
    assert made.target.label == "own function"
    assert made.score == pytest.approx(mg.explain(nets.volume(), net, target="0-vs-1").score)


def test_a_function_s_label_and_what_a_file_keeps_of_it(tmp_path: Path) -> None:
    class Volume:
        label = "liver volume, mL"

        def __call__(self, output: torch.Tensor) -> torch.Tensor:
            return output.sum(1)

    made = _explain(_model(3, "none"), Volume(), "integrated")
    folder = mg.write(made, tmp_path / "out", volume=nets.volume(), formats=("nifti", "png"))
    back = mg.read_explanation(folder)
    assert back == made
    assert back.target.label == "liver volume, mL"
    with pytest.raises(UsageError, match="hand it to explain"):
        back.target(torch.zeros(1, 3))
    with pytest.raises(UsageError, match="hand it to explain"):
        _explain(_model(3, "none"), back.target)
    record = json.loads((folder / "explanation.json").read_text())
    assert record["provenance"]["parameters"]["target"] == "liver volume, mL"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda y: 3.0, "to return one real number per scan as a tensor, .* got float"),
        (lambda y: y, r"one real number per scan as a tensor, .* got \(1, 3\)"),
        (lambda y: y[:, 0].detach(), "no gradient leads back to it"),
        (lambda y: torch.tensor(y[0, 0].item()), "no gradient leads back to it"),
        (lambda y: y.argmax(1), "no gradient leads back to it"),
        (lambda y: torch.ones(1), "no gradient leads back to it"),
        (lambda y: y[:, 7], r"'own function' failed on the network's output \(one tensor \(1, 3\)"),
        (lambda y: torch.from_numpy(y.numpy())[:, 0], "failed on the network's output"),
        (lambda y: y.missing, "has no attribute 'missing'"),
    ],
)
@pytest.mark.parametrize("method", ["hirescam", "integrated"])
def test_a_function_that_will_not_do(function: Any, says: str, method: str) -> None:
    with pytest.raises(UsageError, match=says):
        _explain(_model(3, "softmax"), function, method)


def test_a_function_that_gives_no_finite_number() -> None:
    with pytest.raises(
        CannotExplainError, match="'own function' gives inf for this scan"
    ) as caught:
        _explain(_model(3, "softmax"), lambda y: y[:, 0].abs() / (y[:, 0] - y[:, 0]))
    assert caught.value.reason == "not finite"


# -------------------------------------------------------------------------- outputs by their place


class Several(torch.nn.Module):
    """The first output is not the one of interest."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(nets.conv(1, 6, 2), torch.nn.ReLU())
        self.a, self.b = nets.Pooled(6, 2), nets.Pooled(6, 3)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        return self.wrap(self.a(y), self.b(y), y)


PLACES: list[tuple[Any, str]] = [
    (lambda a, b, y: (a, b), "[1]"),
    (lambda a, b, y: [a, {"b": b}], "[1].b"),
    (lambda a, b, y: {"features": [y], "logits": b}, "logits"),
    (lambda a, b, y: (a, [y, (b,)], None), "[1][1][0]"),
]


@pytest.mark.parametrize(("wrap", "path"), PLACES)
@pytest.mark.parametrize("method", ["hirescam", "integrated"])
def test_an_output_is_taken_from_its_place(wrap: Any, path: str, method: str) -> None:
    plain = _explain(nets.made(lambda: Several(lambda a, b, y: b)), 2, method)
    made = _explain(nets.made(lambda: Several(wrap)), 2, method, output=path)
    assert np.array_equal(made.evidence, plain.evidence)
    assert made.score == plain.score
    assert made.target.output == path
    own = _explain(nets.made(lambda: Several(wrap)), lambda b: b[:, 2], method, output=path)
    assert own.score == pytest.approx(
        _explain(nets.made(lambda: Several(wrap)), 2, method, output=path, link="none").score
    )


def test_the_first_tensor_without_a_place() -> None:
    pair = nets.made(lambda: Several(lambda a, b, y: (a, b)))
    made = _explain(pair, 1)
    assert made.target.output == ""
    with pytest.raises(UnknownNameError, match="from 0 to 1"):
        _explain(pair, 2)


@pytest.mark.parametrize(("output", "error"), [("logit", UnknownNameError), ("[", UsageError)])
def test_a_place_that_is_not_there(output: str, error: type[Exception]) -> None:
    net = nets.made(lambda: Several(lambda a, b, y: {"features": [y], "logits": b}))
    says = r"features\[0\] \(1, 6, 8, 8, 8\), logits \(1, 3\)|expected the place of an output"
    with pytest.raises(error, match=says):
        _explain(net, 1, output=output)
    with pytest.raises(UsageError, match=r"place of an output as text .* got int"):
        _explain(net, 1, output=1)


def test_a_target_that_is_ready() -> None:
    model = _model(3, "softmax", ("a", "b", "c"))
    made = _explain(model, "b")
    assert _explain(model, made.target).target == made.target
    assert np.array_equal(_explain(model, made.target).evidence, made.evidence)
    other = _explain(nets.made(lambda: Several(lambda a, b, y: (a, b))), made.target, output="[1]")
    assert other.target.output == "[1]"
    with pytest.raises(UsageError, match="class index below 2"):
        _explain(_model(2, "softmax"), _explain(model, "c").target)
