"""Is said, or refused, what windows cannot do: detectors, means of networks, odd settings?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.errors import UsageError
from tests.engine import retina

SCAN = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)


def _scorer(seed: int = 0) -> mg.Model:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    )
    return mg.Model(net, mg.InputSpec(patch=(8, 8, 8)), labels=("other", "finding"))


def test_the_notes_of_the_model_are_told() -> None:
    model = replace(_scorer(), notes=("softmax is assumed",))
    w = mg.explain_whole(SCAN, model, target="finding", layer="1", reference="zero")
    assert "softmax is assumed" in w.explanation.warnings


def test_a_mean_of_networks_is_explained_at_its_input() -> None:
    both = mg.mean_of([_scorer(0), _scorer(1)])
    with pytest.raises(UsageError, match="expected the layer '@input' for the mean of several"):
        mg.explain_whole(SCAN, both, target="finding", reference="zero")
    w = mg.explain_whole(SCAN, both, target="finding", layer="@input", reference="zero")
    assert w.residual == pytest.approx(0, abs=1e-5)


def test_a_detector_is_refused() -> None:
    with pytest.raises(UsageError, match="got a detector, which runs on the whole scan"):
        mg.explain_whole(SCAN, retina.retina(retina.bare()), target="box:1", window=(8, 8, 8))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch": 2.5}, "whole numbers, at least 1, as batch and most, got 2.5"),
        ({"most": 0}, "whole numbers, at least 1"),
        ({"importance": "foo"}, "an importance of gaussian or constant, got 'foo'"),
        ({"within": SCAN}, "expected a Volume as the mask within, got ndarray"),
    ],
)
def test_odd_settings(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        mg.explain_whole(SCAN, _scorer(), target="finding", layer="1", **given)


def test_the_window_that_matters_most_may_be_uniform() -> None:
    scan = np.zeros((16, 16, 16), dtype=np.float32)
    scan[9:14, 9:14, 9:14] = SCAN[:5, :5, :5]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 2, 3, padding=1)
    )
    w = mg.explain_whole(
        scan, net, target="#0@voxel:ijk:3,3,3", window=(8, 8, 8), overlap=0, reference="value:0.5"
    )
    assert w.residual == pytest.approx(0, abs=1e-5)
