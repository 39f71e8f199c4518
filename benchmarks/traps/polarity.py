"""Which maps were upside down, lost their sign, or were scaled beyond comparison?"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

import med_gradcam as mg
from benchmarks.peers.adapters import GRADCAM, peer
from benchmarks.traps import ours
from benchmarks.traps.cases import (
    Case,
    array,
    correlation,
    noise,
    reference,
    resnet,
    signs,
    small,
    stretched,
)
from benchmarks.traps.rows import NOT_RUN, Row, not_run, trap, tried


@trap("S2", "The colours are upside down: 0 is the strongest evidence", "MONAI", own_network=True)
def inverted(case: Case | None = None) -> list[Row]:
    """MONAI's map beside the right one; and a scan with evidence against only."""
    case = case or resnet()
    own = case.own()
    right = reference(case)
    theirs = array(GRADCAM["MONAI"](own.net, own.layer, case.index)(own.x))[0, 0]
    dense = stretched(np.maximum(right, 0), theirs.shape)
    rows = [
        Row("S2", "MONAI", "correlation with the right map", 1.0, correlation(theirs, dense),
            ours.agreement(case))
    ]  # fmt: skip
    dark = Case(signs(), "1", -noise(16, 16, 16).abs())
    empty = array(GRADCAM["MONAI"](dark.own().net, dark.layer, 1)(dark.x))
    e = ours.explained(dark)
    rows.append(
        Row("S2", "MONAI", "evidence against only: size of the evidence against in the result",
            "kept", "lost: all voxels 0" if not empty.any() else "kept",
            "kept" if e.sum_for == 0 and e.sum_against > 0 else "lost")
    )  # fmt: skip
    return rows


@trap("S13", "One scan without evidence for the class turns into NaN", "medcam", "torchcam")
def not_a_number() -> list[Row]:
    """Share of NaN in the map of a scan whose evidence is all against the class."""
    dark = -noise(16, 16, 16).abs()
    case = Case(signs(), "1", dark)

    def share(values: Any) -> float:
        return round(float(np.isnan(array(values)).mean()), 2)

    mine = share(ours.explained(case).evidence)
    call = GRADCAM["medcam"](case.own().net, "1", 1)
    pair = torch.cat([-dark, dark])
    half = Case(signs().half(), "1", dark.half())
    return [
        Row("S13", "medcam", "NaN in the map, in a batch with another scan", 0.0,
            tried(lambda: share(call(pair)[1])), mine),
        Row("S13", "torchcam", "NaN in the map, float16", 0.0,
            tried(lambda: share(GRADCAM["torchcam"](half.own().net, "1", 1)(half.x))),
            ours.said(lambda: share(ours.explained(half).evidence))),
    ]  # fmt: skip


def _ours_beside(case: Case, right: Any) -> float:
    return correlation(ours.explained(case).evidence, right)


def _ours_default(one: Case, half: Case) -> float:
    method = inspect.signature(mg.explain).parameters["method"].default
    maps = [ours.explained(case, method).evidence for case in (half, one)]
    return correlation(*maps)


def _beside(call: Any, case: Case, right: Any) -> float:
    return correlation(array(call(case.x)), right)


@trap("S14", "In float16 the evidence underflows at large layers",
      "torchcam", "captum", own_network=True)  # fmt: skip
def underflow(case: Case | None = None) -> list[Row]:
    """Correlation of the float16 map with the float32 one."""
    given = (case,) if case else tuple(
        Case(small(gain=0.05), "3", noise(n, n, n)) for n in (32, 64)
    )  # fmt: skip
    rows = []
    for one in given:
        right = reference(one)
        half = Case(one.own().net.half(), one.layer, one.x.half(), one.index)
        text = f"correlation of float16 with float32, {'x'.join(map(str, right.shape))} cells"
        mine = ours.said(_ours_beside, half, right)
        for tool, right_here in (("captum", right), ("torchcam", np.maximum(right, 0))):
            call = GRADCAM[tool](half.own().net, half.layer, half.index)
            theirs = tried(_beside, call, half, right_here)
            rows.append(Row("S14", tool, text, 1.0, theirs, mine))
        default = ours.said(_ours_default, one, half)
        rows.append(Row("S14", "-", f"our default method, {text}", 1.0, NOT_RUN, default))
    return rows


@trap(
    "S15", "Weak evidence is drawn dim, because a fixed epsilon stands in the scaling", "torchcam"
)
def dim() -> list[Row]:
    """The maximum of the map that is said to be scaled to 0..1."""
    rows = []
    for n in (32, 64):
        case = Case(small(gain=0.02), "3", noise(n, n, n))
        theirs = array(GRADCAM["torchcam"](case.own().net, "3", 1)(case.x)).max()
        maps = mg.draw(ours.explained(case))
        mine = max(maps.raises.values.max(), maps.lowers.values.max()) / maps.raises.peak
        rows.append(
            Row("S15", "torchcam", f"largest value over full colour, {n}^3 cells", 1.0,
                round(float(theirs), 3), round(float(mine), 3))
        )  # fmt: skip
    return rows


@trap("S25", "Sliding windows that are each scaled to 0..1 light up empty regions", "MONAI")
def windows() -> list[Row]:
    """The largest value in the empty half of a scan, over the largest of all."""
    x = 1e-4 * noise(64, 32, 32)
    x[..., 8:16, 8:16, 8:16] += 2.0
    case = Case(small(), "3", x)
    call = GRADCAM["MONAI"](case.own().net, "3", 1)
    monai: Any = peer("monai.inferers").sliding_window_inference(
        x, (32, 32, 32), 1, lambda window: 1 - call(window), overlap=0.0
    )
    dense = array(monai)[0, 0]
    right = np.maximum(reference(case), 0)
    mine = np.maximum(ours.dense(case), 0)

    def far(values: Any) -> float:
        return round(float(values[40:].max() / values.max()), 3)

    return [
        Row("S25", "MONAI", "largest value in the empty half over the largest of all (S2 undone)",
            far(right), far(dense), far(mine), within=0.02)
    ]  # fmt: skip


@trap("S27", "Layer-wise relevance does not add up on networks it has no recipe for", "zennit")
def relevance() -> list[Row]:
    """The sum of the relevance over what was put in; ours: the sum over the score's difference."""
    case = resnet(32)

    def total() -> float:
        composite = peer("zennit.composites").EpsilonPlusFlat()
        attributor = peer("zennit.attribution").Gradient(model=case.own().net, composite=composite)
        with attributor as attribute:
            seed = torch.eye(3)[[case.index]]
            _, found = attribute(case.x.clone().requires_grad_(), seed)
        return round(float(found.sum()), 2)

    def mine() -> float:
        e = ours.explained(case, "integrated", layer="layer3", precise=True)
        return round(float((e.sum_for - e.sum_against) / (e.score - e.reference_score)), 3)

    return [
        Row("S27", "zennit", "sum of the relevance over what was put in (ours: sum over score "
            "difference)", 1.0, tried(total), ours.said(mine), within=0.05)
    ]  # fmt: skip


not_run(
    "S28",
    "Min-max scaling without a ReLU: no evidence is drawn at mid-scale",
    "known from the source only: AUCMEDI needs TensorFlow",
    "AUCMEDI",
)
not_run(
    "S29",
    "Attention percentiles are drawn, unsigned and the same for every class",
    "known from the source only: CLAM is for slides, not for volumes",
    "CLAM",
)
