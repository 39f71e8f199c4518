"""Does a trained network of an nnU-Net plan get a valid layer and map without the user's help?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import med_gradcam as mg
from med_gradcam.loading import load_model
from med_gradcam.model import Model
from med_gradcam.summary import evidence_within
from tests.models import nnunet_trained as trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    pytest.importorskip("dynamic_network_architectures")
    return load_model(trained.folder(tmp_path_factory.mktemp("nnunet")))


def test_it_has_learnt_what_it_was_taught(model: Model) -> None:
    assert np.median([trained.dice(model, seed) for seed in range(1000, 1006)]) > 0.8


@pytest.mark.parametrize("seed", [1000, 1001, 1002])
def test_the_layer_that_auto_takes_says_what_removing_regions_does(
    model: Model, tmp_path: Path, seed: int
) -> None:
    volume, shares = trained.scan(tmp_path, seed)
    e = mg.explain(volume, model, target="lesion")
    assert e.status == "complete"
    assert e.residual == pytest.approx(0, abs=1e-4)
    layers = [e.layer, *(layer for layer in trained.LAYERS if layer != e.layer)]
    table = {t.layer: t for t, _, _ in trained.slopes(model, volume, layers=layers)}
    slope, r = table[e.layer].slope, table[e.layer].r
    assert slope is not None
    assert r is not None
    assert 0.8 < slope < 1.2
    assert r > 0.95
    # On the scan's own grid the map's sum lies in the lesion, though it is a small part of it.
    inside = shares[0] > 0.25
    assert inside.mean() < 0.1
    found = evidence_within(mg.draw(e).signed, inside)
    total = e.sum_for - e.sum_against
    assert found / total > 0.4
