"""How well does a sample network do on backgrounds it never saw?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .cases import EFFECT
from .draws import Pool, draw_pair
from .net_io import reference_scan, score


def accuracy(
    net: nn.Module, spec: dict[str, Any], pool: Pool, pairs: int, seed: int
) -> dict[str, float | int]:
    """Figures over held-out pairs of scan and twin, without augmentation."""
    rng = np.random.default_rng([31, seed])
    scores, wanted, has_core = [], [], []
    effects, designed, offsets = [], [], []
    torch.manual_seed(seed)
    for _ in range(pairs):
        pair = draw_pair(pool, rng, plain=True)
        values = [score(net, scan.astype(np.float32), spec) for scan in pair.scans]
        scores += values
        wanted += pair.log_odds
        has_core += [any(lesion.kind == "core" for lesion in kept) for kept in pair.present]
        if pair.removed:
            effects.append(values[0] - values[1])
            designed.append(sum(EFFECT[kind] for kind in pair.removed))
        if all(lesion.kind == "neutral" for lesion in pair.present[1]):
            plain = reference_scan(pair.scans[1].astype(np.float32), spec["input"]["modality"])
            offsets.append(abs(values[1] - score(net, plain, spec)))
    return _figures(
        np.array(scores), np.array(wanted), np.array(has_core), np.array(effects),
        np.array(designed), np.array(offsets),
    )  # fmt: skip


def _figures(
    scores: np.ndarray,
    wanted: np.ndarray,
    has_core: np.ndarray,
    effects: np.ndarray,
    designed: np.ndarray,
    offsets: np.ndarray,
) -> dict[str, float | int]:
    """Correlation, errors, signs and the area under the curve."""
    single = np.abs(designed) > 1  # both findings together nearly cancel by design
    return {
        "held_out_scans": len(scores),
        "held_out_pairs": len(effects),
        "r_score_vs_designed": _rounded(np.corrcoef(scores, wanted)[0, 1]),
        "mae_score_log_odds": _rounded(np.abs(scores - wanted).mean()),
        "r_effect_vs_designed": _rounded(np.corrcoef(effects, designed)[0, 1]),
        "mae_effect_log_odds": _rounded(np.abs(effects - designed).mean()),
        "sign_right_share": _rounded((np.sign(effects) == np.sign(designed))[single].mean()),
        "auc_core_vs_none": _rounded(_area(scores[has_core], scores[~has_core])),
        "healthy_minus_reference_median": _rounded(np.median(offsets)),
        "healthy_minus_reference_p95": _rounded(np.percentile(offsets, 95)),
    }


def _area(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve."""
    return float((positive[:, None] > negative[None]).mean())


def _rounded(value: float) -> float:
    return round(float(value), 4)
