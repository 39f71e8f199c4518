"""Which traps change what a Grad-CAM says at this layer: its sign, its scale, its formula?"""

from __future__ import annotations

import numpy as np
import torch

from med_gradcam.capture import NORM_TRAP
from med_gradcam.checkup.facts import Facts, Numbers, weighted
from med_gradcam.checkup.places import cell_grid
from med_gradcam.checkup.rows import (
    ALL_FIVE,
    CAPTUM,
    GRAD_CAM,
    HEIRS,
    MEDCAM,
    MONAI,
    TORCHCAM,
    Figure,
    Row,
    Verdict,
    absent,
    correlation,
    percent,
    said,
    some,
)
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import point_words
from med_gradcam.methods.gradcam_pp import weighted as exact_pp

HIDDEN, NOTHING_LEFT = 0.05, 0.99  # shares of evidence that go unseen
ALIKE, NEARLY = 0.95, 0.8  # correlations
FORMULA = 0.99  # a correlation below this is another formula
NO_LEDGER = "there is no exact map here to hold it against: "


def against_share(values: Numbers) -> float:
    """Share of a signed map's sizes that is negative."""
    size = float(np.abs(values).sum())
    return float(np.maximum(-values, 0).sum()) / size if size > 0 else 0.0


def sign(f: Facts) -> Row:
    """S2, S13: evidence against that a ReLU cuts off."""
    own = f.gradcam(logit=True)
    hidden = against_share(own)
    silent = [label for label, high, low in f.others if high <= 0 and low < 0]
    figures: dict[str, Figure] = {
        "gradcam_against_share": hidden,
        "classes_without_evidence_for": silent,
    }
    exact, true = "", 0.0
    if isinstance(f.ledger, Explanation):
        e = f.ledger
        true = against_share(e.evidence.astype(np.float64))
        figures |= {"exact_against_share": true, "exact_against": e.sum_against}
        exact = f"; of the exact evidence {percent(true)} is against ({-e.sum_against:+.2f})"
    verdict: Verdict = "wrong" if max(hidden, true) > HIDDEN else "check" if silent else "fine"
    nothing = f"; nothing but evidence against: {some(silent)}" if silent else ""
    return Row(
        "evidence against",
        ("S2", "S13"),
        verdict,
        f"a ReLU hides {percent(hidden)} of the Grad-CAM of {f.target.label}{exact}{nothing}",
        _after_relu(hidden, silent),
        "take the map before its ReLU, or one that is signed, as ours are",
        (MONAI, GRAD_CAM, TORCHCAM, MEDCAM),
        "captum keeps the sign",
        figures,
    )


def _after_relu(hidden: float, silent: list[str]) -> str:
    black = (
        "; a class with nothing but evidence against comes out black, as NaN in a batch of medcam, "
        "and by MONAI as most important everywhere"
    )
    if hidden > NOTHING_LEFT:
        return (
            "next to nothing is left, and scaling to 0..1 blows that up to full colour"
            + black * bool(silent)
        )
    if hidden > HIDDEN:
        return "what speaks against the finding is not in the picture" + black * bool(silent)
    return "at this layer a ReLU cuts off little of Grad-CAM for this class" + black * bool(silent)


def inverted(f: Facts) -> Row:
    """S2: MONAI's default colours."""
    own = np.maximum(f.gradcam(logit=True), 0)
    if own.max() == 0:
        found = (
            "this map has no evidence for, so MONAI's picture is 0 everywhere, which in its scale "
            "means most important everywhere"
        )
        bright = 0.0
    else:
        bright = float((own == own.min()).mean())
        found = (
            f"by MONAI's default the strongest cell is drawn as 0 and the weakest as 1: "
            f"{percent(bright)} of the cells would be brightest"
        )
    return Row(
        "colours",
        ("S2",),
        "wrong",
        found,
        "the picture is upside down",
        "draw 1 - map, or give a postprocessing of your own",
        (MONAI,),
        "",
        {"bright_share": bright},
    )


def norm(f: Facts) -> Row:
    """Layers that feed straight into an Instance, Group or LayerNorm."""
    feeding = [info.name for info in f.traced.layers if info.feeds_norm]
    if f.trap is None:
        return absent("norm", (), "no layer feeds straight into an Instance, Group or LayerNorm")
    name, share = f.trap
    here = f.info.feeds_norm
    return Row(
        "norm",
        (),
        "wrong" if here else "check",
        f"{len(feeding)} of {len(f.traced.layers)} layers feed straight into a norm over places "
        f"({some(feeding)}): the largest Grad-CAM weight of {name} is {share:.1e} of its gradient, "
        f"{'rounding noise' if share < NORM_TRAP else 'which is not zero here'}",
        ("this layer is one of them: " if here else "this layer is none of them, but ")
        + "a map of such a layer is rounding noise, scaled to look like a finding",
        "take the layer after the norm",
        ALL_FIVE,
        "",
        {"layers": feeding, "layer": name, "largest_weight_share": share, "this_layer": here},
    )


def beside_the_ledger(f: Facts) -> Row:
    """Grad-CAM beside the exact map: places and signs."""
    if not isinstance(f.ledger, Explanation):
        return absent("grad-cam", (), NO_LEDGER + f.ledger)
    e, own = f.ledger, f.gradcam()
    true = e.evidence.astype(np.float64)
    r = correlation(own, true)
    size = float(np.abs(true).sum())
    turned = float(np.abs(true[own * true < 0]).sum()) / size if size else 0.0
    grid = cell_grid(f)
    tops = [grid.world_ras(np.unravel_index(int(np.abs(m).argmax()), m.shape)) for m in (own, true)]
    apart = float(np.linalg.norm(tops[0] - tops[1]))
    net, difference = float(own.sum()), e.score - (e.reference_score or 0.0)
    good = r is not None and r >= ALIKE and turned <= HIDDEN
    bad = r is None or r < NEARLY or turned > 2 * HIDDEN
    return Row(
        "grad-cam",
        (),
        "wrong" if bad else "fine" if good else "check",
        f"Grad-CAM here correlates with the exact map by {said(r)}; {percent(turned)} of the exact "
        f"evidence has the other sign there; its strongest place {point_words(tops[0])} is "
        f"{apart:.0f} mm from {point_words(tops[1])}; its sum is {net:+.2f} where the score "
        f"differs by {difference:+.2f} {e.unit}",
        "Grad-CAM itself, by whatever tool, shows other places or signs at this layer"
        if not good
        else "a right Grad-CAM at this layer is about right; the traps above are what is left",
        "use the default method (secant), whose map adds up, or check a region by removing it",
        ALL_FIVE,
        "",
        {
            "correlation": r,
            "other_sign_share": turned,
            "strongest_apart_mm": apart,
            "gradcam_sum": net,
            "score_difference": difference,
        },
    )


def raw_logit(f: Facts) -> Row:
    """The logit alone is explained, though a softmax compares it with the others."""
    if f.target.link != "softmax" or len(f.others) < 2 or len(f.target.index) != 1:
        return absent("logit", (), "the score is the logit itself")
    r = correlation(f.gradcam(), f.gradcam(logit=True))
    good = r is not None and r >= ALIKE
    return Row(
        "logit",
        (),
        "fine" if good else "check",
        f"the Grad-CAM of the logit of {f.target.label} alone correlates with that of its "
        f"log-odds by {said(r)}",
        "what raises all classes alike counts as evidence for this one"
        if not good
        else "it makes little difference here whether the logit or the log-odds are explained",
        "explain the log-odds, or one class against another (A-vs-B)",
        ALL_FIVE,
        "",
        {"correlation": r},
    )


def pp_with(activation: torch.Tensor, gradient: torch.Tensor, eps: float | None) -> Numbers:
    """Grad-CAM++ with an epsilon in its denominator; None: without the denominator at all.

    Source: pytorch-grad-cam 1.5.7 (1e-6), MONAI 1.6.1 and medcam 0.1.22 (1e-7); torchcam 0.5.0
    divides a temporary copy.
    """
    square, places = gradient**2, (1, 2, 3)
    cubes = activation.sum(dim=places, keepdim=True) * gradient**3
    alpha = square if eps is None else square / (2 * square + cubes + eps)
    weights = (alpha * gradient.relu()).sum(dim=places, keepdim=True)
    return (weights * activation).sum(0).relu().cpu().numpy()


def plusplus(f: Facts) -> Row:
    """S3, S4: the formula of Grad-CAM++ in three dimensions."""
    a, g = f.activation, f.logit_gradient
    right = exact_pp(a, g, g).cpu().numpy()
    if float(right.max()) == 0.0:
        return absent("grad-cam++", ("S3", "S4"), "Grad-CAM++ is empty here in every tool")
    rs = {
        "eps_1e-7": correlation(pp_with(a, g, 1e-7), right),
        "eps_1e-6": correlation(pp_with(a, g, 1e-6), right),
        "no_denominator": correlation(pp_with(a, g, None), right),
    }
    users = {"eps_1e-7": (MONAI, MEDCAM), "eps_1e-6": (GRAD_CAM,), "no_denominator": (TORCHCAM,)}
    off = [name for name, r in rs.items() if r is None or r < FORMULA]
    cells = "x".join(str(n) for n in f.shape)
    return Row(
        "grad-cam++",
        ("S3", "S4"),
        "wrong" if off else "fine",
        f"on {cells} cells the largest gradient is {float(g.abs().max()):.1e}; Grad-CAM++ with an "
        f"epsilon of 1e-7 correlates with its own formula by {said(rs['eps_1e-7'])}, with 1e-6 by "
        f"{said(rs['eps_1e-6'])}, without its denominator by {said(rs['no_denominator'])}",
        "a Grad-CAM++ made here by these tools is another formula"
        if off
        else "neither the epsilon nor the lost denominator does harm at this layer",
        "divide through by the squared gradient, as our gradcam_pp does",
        tuple(tool for name in off for tool in users[name]),
        f"1e-7: {MONAI}, {MEDCAM}; 1e-6: {GRAD_CAM}; without: {TORCHCAM}",
        {"largest_gradient": float(g.abs().max()), **rs},
    )


def half(f: Facts) -> Row:
    """S14: what float16 loses of the gradient at this layer."""
    g = f.logit_gradient
    kept = g.half().double()
    there = g != 0
    lost = float(((kept == 0) & there).sum()) / max(1, int(there.sum()))
    r = correlation(weighted(f.activation.half().double(), kept), weighted(f.activation, g))
    good = lost <= 0.01 and r is not None and r >= FORMULA
    own = next((str(p.dtype).removeprefix("torch.") for p in f.model.net.parameters()), "float32")
    verdict: Verdict = "fine" if good else "wrong" if own == "float16" else "check"
    return Row(
        "float16",
        ("S14",),
        verdict,
        f"{percent(lost)} of the gradients here are too small for float16 and become 0; the map "
        f"from the rest correlates with the right one by {said(r)} (this network runs in {own})",
        "a map made in half precision misses these places"
        if not good
        else "half precision would do no harm at this layer",
        "run the network in float32 for maps",
        (TORCHCAM, CAPTUM),
        "in networks made half precision, and under autocast",
        {"lost_share": lost, "correlation": r, "dtype": own},
    )


def dim(f: Facts) -> Row:
    """S15: a fixed epsilon in the scaling to 0..1."""
    own = np.maximum(f.gradcam(logit=True), 0)
    reach = float(own.max() - own.min())
    if reach == 0:
        return absent("dim", ("S15",), "the map has no evidence for that could be scaled")
    top = reach / (reach + 1e-8)
    return Row(
        "dim",
        ("S15",),
        "fine" if top >= FORMULA else "wrong",
        f"the largest Grad-CAM value is {float(own.max()):.1e}; scaled with an epsilon of 1e-8 it "
        f"reaches {top:.2f} of full colour",
        "weak evidence looks weaker still, by a number nobody chose"
        if top < FORMULA
        else "the epsilon of the scaling is not seen here",
        "take the raw values (normalized=False) and scale them yourself",
        (TORCHCAM,),
        "",
        {"largest": float(own.max()), "top": top},
    )


def overwritten(f: Facts) -> Row:
    """S16: an operation that works in place on the layer's output."""
    names = f.run.overwritten
    if f.layer not in names:
        if not names:
            return absent("in place", ("S16",), "no operation works in place on a layer's output")
        return Row(
            "in place",
            ("S16",),
            "check",
            f"this layer's output is left alone, but that of {len(names)} others is changed in "
            f"place: {some(names)}",
            "maps of those layers mix values from before and after the activation",
            "take the layer after the activation, or switch inplace off",
            (GRAD_CAM, TORCHCAM, MEDCAM, *HEIRS),
            "MONAI stops with an error",
            {"this_layer": False, "layers": list(names), "correlation": None},
        )
    weights = f.logit_gradient.mean(dim=(1, 2, 3), keepdim=True)
    mixed = (weights * f.run.kept).sum(0).relu().cpu().numpy()
    r = correlation(mixed, np.maximum(f.gradcam(logit=True), 0))
    return Row(
        "in place",
        ("S16",),
        "wrong" if r is None or r < FORMULA else "check",
        f"the next operation changes this layer's output in place; a map from the changed values "
        f"correlates with the right one by {said(r)}",
        "the map mixes the gradient from before the activation with values from after it",
        "take the layer after the activation, or switch inplace off",
        (GRAD_CAM, TORCHCAM, MEDCAM, *HEIRS),
        "MONAI stops with an error",
        {"this_layer": True, "layers": list(names), "correlation": r},
    )


ROWS = (sign, inverted, norm, beside_the_ledger, raw_logit, plusplus, half, dim, overwritten)
