"""Is the explained number the one that was asked for, for every kind of head?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import med_gradcam as mg
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


def _explain(model: Model, target: str, method: str = "hirescam") -> mg.Explanation:
    return mg.explain(nets.volume(), model, target=target, layer="first", method=method)


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
