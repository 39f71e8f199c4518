"""Is what a black box answers taken for what it is: scores, probabilities, or none of both?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.blackbox import CLAMP
from med_gradcam.errors import MedGradcamError, ModelError, UsageError
from tests.engine import nets
from tests.engine.boxes import Box, Floats, far, scores
from tests.engine.boxes import net as _net

SIZE = 12


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_probabilities_become_log_odds(link: Any) -> None:
    net = _net()
    as_p: Callable[[torch.Tensor], Any] = {
        "softmax": lambda s: s.double().softmax(1).numpy(),
        "sigmoid": lambda s: s.double().sigmoid().numpy(),
    }[link]
    box = mg.BlackBox(Box(net, as_p), link=link, outputs="probabilities", batch=16)
    e = mg.explain(nets.volume(SIZE), box, target=1)
    known = mg.explain(nets.volume(SIZE), net, link=link, target=1, method="occlusion")
    assert e.score == pytest.approx(known.score, abs=1e-5)
    assert far(e, known) < 1e-4
    assert not any("held" in w for w in e.warnings)


def test_a_clamp_that_was_hit_is_said() -> None:
    sure = Box(_net(), lambda s: (50 * s).softmax(1).round(decimals=3).numpy())
    e = mg.explain(nets.volume(SIZE), mg.BlackBox(sure, outputs="probabilities", batch=16))
    assert e.score == pytest.approx(-np.log(CLAMP), abs=1e-3)
    assert any("log-odds beyond about 16 are cut off" in w for w in e.warnings)


def test_the_word_about_the_clamp_goes_with_its_own_call() -> None:
    factor = [100.0]
    model = mg.BlackBox(
        Box(_net(), lambda s: (factor[0] * s).sigmoid().numpy()),
        link="sigmoid",
        outputs="probabilities",
        batch=16,
    )
    first = mg.explain(nets.volume(SIZE), model, target=1)
    factor[0] = 1.0
    second = mg.explain(nets.volume(SIZE), model, target=1)
    assert [any("cut off" in w for w in e.warnings) for e in (first, second)] == [True, False]


def test_scores_of_one_class_may_be_a_row_of_numbers() -> None:
    model = mg.BlackBox(lambda v: v.mean(axis=(1, 2, 3, 4)), link="none", labels=("mean",), batch=4)
    e = mg.explain(nets.volume(8), model)
    assert e.target.label == "mean"
    assert float(e.evidence.sum()) == pytest.approx(e.score - (e.reference_score or 0), abs=1e-5)


def _raises(volumes: Floats) -> Floats:
    raise ValueError("no \x1b[31mweights.\nnone")


BAD: dict[str, tuple[Callable[[Floats], Any], str]] = {
    "other batch": (lambda v: np.zeros((3, 2)), r"scores \(1, K\) .* got shape \(3, 2\)"),
    "no axis": (lambda v: np.float32(1), r"got shape \(\)"),
    "an image": (lambda v: np.zeros((1, 4, 4)), r"got shape \(1, 4, 4\)"),
    "nothing": (lambda v: None, r"array of real numbers .* got NoneType"),
    "words": (lambda v: [["a", "b"]], r"array of real numbers"),
    "ragged": (lambda v: [[1.0], [1.0, 2.0]], r"array of real numbers"),
    "empty": (lambda v: np.zeros((1, 0)), r"got shape \(1, 0\)"),
    "nan": (lambda v: np.array([[0.0, np.nan]]), r"finite scores .* got NaN"),
    "infinite": (lambda v: np.array([[0.0, np.inf]]), r"finite scores"),
    "raises": (
        _raises,
        r"failed on an array of shape \(1, 1, 8, 8, 8\): ValueError: no \[31mweights. none\.$",
    ),
    "probabilities": (lambda v: np.array([[0.25, 0.75]]), r"say outputs='probabilities'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_scores_is_said_in_one_sentence(name: str) -> None:
    predict, words = BAD[name]
    with pytest.raises(ModelError, match=words) as caught:
        mg.explain(nets.volume(8), mg.BlackBox(predict, name="mine"))
    assert "'mine'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_that_change_their_number_are_refused() -> None:
    sizes: list[int] = []

    def growing(volumes: Floats) -> Floats:
        sizes.append(len(volumes))
        outputs = 2 if len(sizes) < 3 else 3
        return np.ones((len(volumes), outputs), dtype=np.float32)

    with pytest.raises(ModelError, match="expected 2 outputs from 'growing' as before, got 3"):
        mg.explain(nets.volume(8), mg.BlackBox(growing))


@pytest.mark.parametrize("bad", [[[-3.0, 4.0]], [[0.5, 0.7]]])
def test_logits_said_to_be_probabilities_are_refused(bad: list[list[float]]) -> None:
    model = mg.BlackBox(lambda v: np.array(bad * len(v)), outputs="probabilities")
    with pytest.raises(ModelError, match=r"probabilities of 0 to 1 .*are they logits\?"):
        mg.explain(nets.volume(8), model)


def test_a_function_that_works_in_place_changes_nothing_of_ours() -> None:
    def greedy(volumes: Floats) -> Any:
        scores = net(torch.from_numpy(volumes.copy())).detach().numpy()
        volumes[:] = 1e9
        return scores

    net = _net()
    e = mg.explain(nets.volume(8), mg.BlackBox(greedy, batch=8), target=1)
    known = mg.explain(nets.volume(8), mg.BlackBox(Box(net), batch=8), target=1)
    assert far(e, known) == 0.0
    x = torch.rand(2, 1, 8, 8, 8)
    before = x.clone()
    mg.BlackBox(greedy, batch=8).net(x)
    assert torch.equal(x, before)


SETTINGS: list[tuple[dict[str, Any], type[MedGradcamError], str]] = [
    ({"predict": 3}, UsageError, r"a function from an array .* got int"),
    ({"batch": 0}, UsageError, "a batch of at least one"),
    ({"batch": True}, UsageError, "a batch of at least one"),
    ({"outputs": "percent"}, UsageError, "logits or probabilities"),
    ({"link": "tanh"}, UsageError, "a link of softmax"),
    ({"link": "none", "outputs": "probabilities"}, UsageError, "softmax or sigmoid for outputs"),
    ({"labels": "ab"}, UsageError, "list of texts as labels"),
    ({"input": {"channels": 1}}, UsageError, "expected an InputSpec"),
]


@pytest.mark.parametrize(("given", "kind", "words"), SETTINGS)
def test_settings_that_are_none(
    given: dict[str, Any], kind: type[MedGradcamError], words: str
) -> None:
    settings = {"predict": scores(1.0), **given}
    with pytest.raises(kind, match=words):
        mg.BlackBox(settings.pop("predict"), **settings)


def test_labels_that_do_not_fit_are_named() -> None:
    with pytest.raises(ModelError, match=r"expected 3 outputs \(a, b, c\), .* gives 2"):
        mg.explain(nets.volume(8), mg.BlackBox(Box(_net()), labels=("a", "b", "c")))


def test_the_record_says_what_was_done() -> None:
    e = mg.explain(nets.volume(8), mg.BlackBox(Box(_net()), batch=32, name="the box"), target=1)
    made = e.provenance
    assert (made.model_name, made.weights_sha256, made.dtype) == ("the box", "", "float32")
    assert e.reference_score is not None
