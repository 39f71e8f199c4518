"""How much does a map depend on the texture of the reference, where a norm needs one?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import med_gradcam as mg
from med_gradcam import samples
from tests.engine import nets

HOME = samples.folder()


def _alike(*arguments: Any, **settings: Any) -> float:
    """r of the maps of two seeds; the seeds change the reference and nothing else."""
    one, other = (mg.explain(*arguments, seed=seed, **settings) for seed in (0, 1))
    assert one.score == other.score
    assert one.reference.words.endswith("with the scan's own noise")
    return float(np.corrcoef(one.evidence.ravel(), other.evidence.ravel())[0, 1])


@pytest.mark.parametrize(
    ("scan", "layer", "least", "most"),
    [
        ("core", "block1", 0.98, 0.9999),
        ("core", "block3", 0.999, 1.0),
        ("healthy", "block1", 0.75, 0.95),  # nothing there to explain: a hundredth of the evidence
    ],
)
def test_on_a_trained_network_two_textures_give_one_map(
    scan: str, layer: str, least: float, most: float
) -> None:
    model = mg.load_model(HOME / "nets" / "ct_nodule_instnorm")
    volume = mg.read(HOME / "ct" / f"{scan}.nii.gz")
    assert least < _alike(volume, model, target="malignant", layer=layer) < most


def test_on_an_untrained_network_they_do_not() -> None:
    """As docs/evidence.md says; two textures are two questions there."""
    made = [
        _alike(nets.volume(), nets.made(nets.instance_normed, seed=s), target=1, layer="first")
        for s in range(3)
    ]
    assert all(0.1 < r < 0.6 for r in made)
