"""Is a setting that makes no sense a sentence, also where the method would have no use for it?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import UsageError
from tests.engine import nets

SCAN = nets.volume()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "gradcam", "reference": "nonsense"}, "reference of auto, tissue, zero"),
        ({"method": "gradcam", "reference": "value:much"}, "reference of auto, tissue, zero"),
        ({"method": None}, "expected the name of a method such as 'secant', got NoneType"),
        ({"threads": 2.5}, "expected a whole number of threads or None, got float"),
        ({"progress": 3}, "expected a function of a Step as progress, got int"),
        ({"inputs": {"t1": ...}}, r"expected no \.\.\. among inputs by name"),
    ],
)
def test_is_refused(settings: dict[str, Any], sentence: str) -> None:
    net = nets.made(nets.pooled_linear)
    with pytest.raises(UsageError, match=sentence):
        mg.explain(SCAN, net, target=0, layer="first", **settings)
    with pytest.raises(UsageError, match=sentence):
        mg.explain_many([SCAN], net, target=0, layer="first", **settings)


def test_no_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one target, got an empty list"):
        mg.explain_many([SCAN], nets.made(nets.pooled_linear), target=[])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_torchscript_is_explained_as_its_source_is(*, frozen: bool) -> None:
    net = nets.made(nets.pooled_linear)
    made = torch.jit.trace(net, torch.rand(1, 1, 16, 16, 16))
    if frozen:
        made = torch.jit.freeze(made)
    found = mg.explain(SCAN, made, target=0, layer="first")
    wanted = mg.explain(SCAN, net, target=0, layer="first")
    assert np.abs(found.evidence - wanted.evidence).max() <= 1e-6 * np.abs(wanted.evidence).max()


def test_the_name_that_a_class_is_printed_with_names_it() -> None:
    net = nets.made(nets.pooled_linear)
    first = mg.explain(SCAN, net, target=1, layer="first")
    assert first.target.label == "class 1"
    again = mg.explain(SCAN, net, target=first.target.label, layer="first")
    assert again.target == first.target
    both = mg.explain(SCAN, net, target="class 1-vs-class 0", layer="first")
    assert both.target.index == (1, 0)
