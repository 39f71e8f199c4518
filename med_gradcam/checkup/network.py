"""Which traps come with the network itself: its layers, mode, outputs, activations?"""

from __future__ import annotations

import numpy as np
import torch

from med_gradcam import outputs
from med_gradcam.checkup.facts import Facts
from med_gradcam.checkup.rows import (
    ALL_FIVE,
    CAPTUM,
    EVERY,
    GRAD_CAM,
    MEDCAM,
    MONAI,
    TORCHCAM,
    Row,
    Verdict,
    absent,
    percent,
    some,
)
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry
from med_gradcam.metrics.causal import CandidateMap, ball, ledger, slope_and_r
from med_gradcam.target import is_map

GOOD_SLOPE, FAIR_SLOPE = (0.7, 1.3), (0.5, 2.0)
BYPASSED, MUCH_BYPASSED = 0.01, 0.2
MOVED = 0.05  # log-odds, or the same share of a probability
ACTIVATIONS = ("ReLU", "PReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Softplus")


def slope(f: Facts, grid: Geometry) -> float | None:
    """What this layer's map says of the tested regions, per true effect of removing them."""
    if not (isinstance(f.auto, Explanation) and isinstance(f.ledger, Explanation)):
        return None
    here = CandidateMap(f.layer, f.ledger.evidence.astype(np.float64), f.ledger.grid)
    says, true = [], []
    for region in f.auto.regions:
        i, j, k = np.rint(grid.index_ijk(region.centre_ras_mm)).astype(int).tolist()
        says.append(ledger(here, grid, ball(grid, (i, j, k), region.radius_mm)))
        true.append(region.effect)
    return slope_and_r(says, true)[0] if true else None


def layer(f: Facts) -> Row:
    """Whether this layer names what removing a region really does."""
    auto = f.auto
    if not isinstance(auto, Explanation):
        return absent("layer", (), f"no layer could be tested: {auto}")
    if not auto.regions:
        return absent("layer", (), "the network has one layer with places only: none to choose")
    mine = slope(f, f.prepared.grid)
    best = next((t.slope for t in auto.trials if t.layer == auto.layer), None)
    figures = {
        "slope": mine,
        "best_layer": auto.layer,
        "best_slope": best,
        "trials": {t.layer: t.slope for t in auto.trials},
    }
    still = any("no tested region moves the score" in w for w in auto.warnings)
    if still or mine is None:
        reason = "no tested region moves the score" if still else "there is no exact map here"
        return absent("layer", (), f"it cannot be told which layer is right: {reason}")
    low, high = GOOD_SLOPE
    verdict: Verdict = "fine" if low <= mine <= high else "check"
    if not FAIR_SLOPE[0] <= mine <= FAIR_SLOPE[1]:
        verdict = "wrong"
    differs = auto.layer != f.layer and best is not None
    other = f"; {f.name(auto.layer)} names {percent(best)}" if differs and best is not None else ""
    return Row(
        "layer",
        (),
        verdict,
        f"where regions are removed this layer's map names {percent(mine)} of what the score "
        f"really changes{other}",
        "even a right map of this layer says too little, too much or the opposite about places"
        if verdict != "fine"
        else "amounts and signs of this layer's map agree with removing regions",
        f"--layer auto takes {f.name(auto.layer)}"
        if other
        else "this is the best of the layers tried",
        (EVERY,),
        "the layer is the user's choice",
        figures,
    )


def cut(f: Facts) -> Row:
    """What flows past the layer."""
    if not isinstance(f.ledger, Explanation) or f.ledger.bypassed is None:
        reason = f.ledger if isinstance(f.ledger, str) else "the method promises no sum"
        return absent("cut", (), f"it cannot be told what flows past this layer: {reason}")
    share = f.ledger.bypassed
    verdict: Verdict = "fine" if abs(share) <= BYPASSED else "check"
    return Row(
        "cut",
        (),
        "wrong" if abs(share) > MUCH_BYPASSED else verdict,
        f"{percent(share)} of the score's difference flows past this layer (skip connections)"
        if verdict != "fine"
        else "all of the score's difference passes through this layer",
        "a map of this layer leaves that part out, and does not say so"
        if verdict != "fine"
        else "nothing is left out of a map for this reason",
        "take a layer that all paths pass through, or a cut of several layers: --layer a+b",
        (EVERY,),
        "",
        {"bypassed_share": share},
    )


def training(f: Facts) -> Row:
    """S17: a network in training mode."""
    came = f.handed_over_in_training
    kinds = ("Dropout", "BatchNorm")
    if not any(k in type(m).__name__ for m in f.model.net.modules() for k in kinds):
        return absent("training mode", ("S17",), "no module of this network has a training mode")
    how = f"{len(came)} modules were handed over in it" if came else "it was handed over in eval"
    known = f.trained if not isinstance(f.trained, str) else None
    moved = known is None or abs(known - f.score) > MOVED * max(1.0, abs(f.score))
    found = (
        f"in training mode the score of this scan is {known:+.2f} instead of {f.score:+.2f}"
        if known is not None
        else f"the score in training mode could not be had ({f.trained})"
    )
    return Row(
        "training mode",
        ("S17",),
        ("wrong" if came else "check") if moved else "fine",
        f"{how}; {found}",
        "a map made in training mode is of another function, and does not say so"
        if moved
        else "the mode makes little difference for this scan",
        "call net.eval() before other tools; ours puts the network there and back",
        (TORCHCAM, CAPTUM),
        "pytorch-grad-cam leaves the network in eval() for good",
        {"handed_over_in_training": list(came), "score": f.score, "training_score": known},
    )


def returned(f: Facts) -> Row:
    """What the network takes and puts out."""
    plain = isinstance(f.run.output, torch.Tensor)
    if plain and f.inputs == 1:
        return absent("inputs and outputs", (), "it takes one tensor and puts out one tensor")
    what = "one tensor" if plain else f"{type(f.run.output).__name__}: {outputs.what(f.run.output)}"
    return Row(
        "inputs and outputs",
        (),
        "check",
        f"the network takes {f.inputs} input{'s' * (f.inputs > 1)} and puts out {what}; "
        f"{f.target.output or 'its first tensor'} is explained here",
        "where a tool did not stop, it may have taken another output",
        "wrap the network so that it returns the one tensor you mean, or name it: --model-output",
        ALL_FIVE if not plain else (GRAD_CAM, MEDCAM),
        "they stop with an error for most of these",
        {"inputs": f.inputs, "output": what},
    )


def shared(f: Facts) -> Row:
    """Layers that run more than once."""
    names = list(dict.fromkeys(one.name for one in f.traced.layers if one.runs > 1))
    if not names:
        return absent("shared layers", (), "every layer runs once")
    return Row(
        "shared layers",
        (),
        "check",
        f"{len(names)} layers run more than once per scan: {some(names)}",
        "a map of one of these is of one of its runs, by chance of the tool",
        "take a layer that runs once",
        ALL_FIVE,
        "",
        {"layers": names},
    )


def tokens(f: Facts) -> Row:
    """S22: modules that put out (1, n, C)."""
    names = f.run.tokens
    if not names:
        return absent("tokens", ("S22",), "no module puts out tokens (1, n, C)")
    return Row(
        "tokens",
        ("S22",),
        "check",
        f"{len(names)} modules put out tokens (1, n, C), such as {some(names, 2)}",
        "of such a module the channels were taken for places: the map is noise",
        "reshape the tokens to their grid first, or take a layer that puts out (1, C, i, j, k)",
        (CAPTUM, MEDCAM),
        "the others stop with an error, or take a reshape of your own",
        {"modules": len(names)},
    )


def automatic(f: Facts) -> Row:
    """S11, S12: the layer that is taken when none is named."""
    if not is_map(outputs.first_tensor(f.run.output, f.target.output)):
        return absent(
            "automatic layer", ("S11", "S12"), "the network puts out no map that could be taken"
        )
    return Row(
        "automatic layer",
        ("S11", "S12"),
        "wrong",
        "the network puts out a map, and the last module with a map is taken when no layer is "
        "named: the network's own output",
        "the map is the prediction itself, not why",
        "name a layer",
        (MEDCAM, TORCHCAM),
        "medcam with layer='auto', torchcam without target_layer",
        {"taken": "output"},
    )


def occlusion(f: Facts) -> Row:
    """S7: MONAI's occlusion chooses its activation by the number of input channels."""
    first = outputs.first_tensor(f.run.output, f.target.output)
    if is_map(first) or first.ndim != 2 or len(f.target.index) != 1:
        return absent("occlusion", ("S7",), "the network puts out no row of class scores")
    logits, c = first[0].double(), f.target.index[0]
    channels = int(f.prepared.raw.shape[0])
    takes = "sigmoid" if channels == 1 else "softmax"
    theirs = logits.sigmoid() if channels == 1 else logits.softmax(0)
    right = f.target.probability(f.score)
    shown, truth = float(theirs[c]), "none" if right is None else f"{right:.4f}"
    true = "sigmoid" if len(logits) == 1 and f.model.link == "softmax" else f.model.link
    constant = takes == "softmax" and len(logits) == 1
    what = (
        "1.0000 everywhere, whatever is occluded"
        if constant
        else f"{shown:.4f} (all classes together {float(theirs.sum()):.2f}), the model's own is "
        f"{truth}"
    )
    good = takes == true
    several = f"{channels} channel{'s' * (channels > 1)}"
    own = "no activation at all" if f.model.link == "none" else f.model.link
    means = f"as this model does ({truth})" if good else f"where this model has {own}: "
    return Row(
        "occlusion",
        ("S7",),
        "fine" if good else "wrong",
        f"since the scan has {several}, it takes a {takes}, {means}"
        + ("" if good else f"the probability of {f.target.label} would be {what}"),
        "the activation happens to be the right one"
        if good
        else "maps of OcclusionSensitivity were of another number",
        "pass activate= yourself, or use our occlusion, which works on the log-odds",
        (MONAI,),
        "",
        {
            "input_channels": channels,
            "takes": takes,
            "means": f.model.link,
            "shown": shown,
            "true": right,
            "sum": float(theirs.sum()),
        },
    )


def guided(f: Facts) -> Row:
    """S9: guided backpropagation finds its ReLUs by name."""
    acts = [
        (name, type(m).__name__)
        for name, m in f.model.net.named_modules()
        if any(kind in type(m).__name__ for kind in ACTIVATIONS)
    ]
    if not acts:
        return absent("guided backpropagation", ("S9",), "the network has no activation modules")
    named = [kind for name, kind in acts if "relu" in name.lower()]
    turned = sorted({kind for kind in named if kind != "ReLU"})
    verdict: Verdict = "wrong" if not named or turned else "check"
    if len(named) == len(acts) and not turned:
        verdict = "fine"
    into = f"; {', '.join(turned)} among them would become plain ReLUs" if turned else ""
    return Row(
        "guided backpropagation",
        ("S9",),
        verdict,
        f"{len(named)} of {len(acts)} activations have 'relu' in their name{into}",
        "without any such name it was the plain gradient"
        if not named
        else "it was of another network"
        if turned
        else "every activation was guided"
        if verdict == "fine"
        else "it was guided in part only",
        "call it the plain gradient, or use our guided_backprop, which refuses what it cannot do",
        (MONAI,),
        "GuidedBackpropGrad",
        {"activations": len(acts), "found_by_name": len(named), "replaced": turned},
    )


ROWS = (
    layer,
    cut,
    training,
    automatic,
    tokens,
    shared,
    returned,
    occlusion,
    guided,
)
