"""What is measured? One line of VARIANTS is one row of the table.

A variant makes a callable for one network; making it is not on the clock. `fresh` makes it anew
before every call, for what is only true of a first call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.peers.adapters import GRADCAM, Call
from benchmarks.peers.nets import OUTPUTS, SEGMENTATION, TARGET, Net

PLAIN = "plain inference"
SMALL = (64, 64, 64)  # for the paths of a network, which do not depend on its input's size


@dataclass(frozen=True, slots=True)
class Variant:
    """A row: its name, how its callable is made, at which layer, and for which networks."""

    name: str
    make: Callable[[torch.nn.Module, str], Call]
    layer: str = "last"
    fresh: bool = False
    not_for: tuple[str, ...] = ()

    def made(self, net: Net, built: torch.nn.Module) -> Call:
        """The callable for a network; the input is (1, 1, I, J, K)."""
        return self.make(built, net.layer(self.layer))


def _plain(net: torch.nn.Module, layer: str) -> Call:
    del layer

    def call(x: torch.Tensor) -> Any:
        with torch.inference_mode():
            return net(x)

    return call


def _score(output: Any) -> torch.Tensor:
    return torch.as_tensor(output[:, TARGET])


def _direct(method: str) -> Callable[[torch.nn.Module, str], Call]:
    """A method that needs no reference: one forward, re-rooted at the layer."""

    def make(net: torch.nn.Module, layer: str) -> Call:
        from med_gradcam import _plugins
        from med_gradcam.capture import capture
        from med_gradcam.methods import Bound
        from med_gradcam.tail import at_rest

        module = _plugins.load("methods", method)

        def call(x: torch.Tensor) -> Any:
            with at_rest(net):
                _, found = capture(net, layer, x, lambda _: _score)
                return module.evidence(found, Bound(float("inf"), 0.0)).values

        return call

    return make


def _relative(method: str) -> Callable[[torch.nn.Module, str], Call]:
    """A method with a reference input (zeros); `integrated` takes its eight nodes and no more."""

    def make(net: torch.nn.Module, layer: str) -> Call:
        from med_gradcam import _plugins
        from med_gradcam.capture import captures
        from med_gradcam.graph import trace
        from med_gradcam.methods import Bound
        from med_gradcam.tail import at_rest, record

        module = _plugins.load("methods", method)

        cuts = trace(net, (1, *SMALL)).cuts([layer])

        def call(x: torch.Tensor) -> Any:
            with at_rest(net):
                here = record(net, [layer], x, cuts)
                there = record(net, [layer], torch.zeros_like(x), [layer])
                found = captures(here, _score, there)[layer]
                return module.evidence(found, Bound(float("inf"), 0.0)).values

        return call

    return make


def _known(method: str) -> Callable[[torch.nn.Module, str], Call]:
    """A method with a reference whose activation at the layer is known from an earlier scan."""

    def make(net: torch.nn.Module, layer: str) -> Call:
        from med_gradcam import _plugins
        from med_gradcam.capture import captures
        from med_gradcam.graph import trace
        from med_gradcam.methods import Bound
        from med_gradcam.tail import Recorded, at_rest, record

        module = _plugins.load("methods", method)
        cuts = trace(net, (1, *SMALL)).cuts([layer])
        kept: list[Recorded] = []

        def call(x: torch.Tensor) -> Any:
            with at_rest(net):
                if not kept or kept[0].tails[layer].x.shape != x.shape:
                    kept.clear()
                    kept.append(record(net, [layer], torch.zeros_like(x), [layer]))
                found = captures(record(net, [layer], x, cuts), _score, kept[0])[layer]
                return module.evidence(found, Bound(float("inf"), 0.0)).values

        return call

    return make


def _fast(method: str) -> Callable[[torch.nn.Module, str], Call]:
    """As `_direct`, the part up to the layer fused; building and checking it is off the clock."""

    def make(net: torch.nn.Module, layer: str) -> Call:
        from med_gradcam import _plugins, fast
        from med_gradcam.capture import capture
        from med_gradcam.methods import Bound
        from med_gradcam.tail import at_rest

        module = _plugins.load("methods", method)
        built: list[fast.Part] = []

        def call(x: torch.Tensor) -> Any:
            with at_rest(net):
                if not built or built[0].shape != x.shape:
                    built[:] = [fast.part(net, [layer], x, fast.Compare(lambda _: _score))[0]]
                with fast.standing_in(net, built[0]):
                    _, found = capture(net, layer, x, lambda _: _score)
                return module.evidence(found, Bound(float("inf"), 0.0)).values

        return call

    return make


def _secant_known(net: torch.nn.Module, layer: str, *, fused: bool = False) -> Call:
    """As `_secant`, the reference run once for all scans; `fused`: with the fast part, too."""
    from contextlib import nullcontext

    from med_gradcam import fast
    from med_gradcam.observe import Known
    from med_gradcam.secant.pair import Run, run_all, share
    from med_gradcam.tail import at_rest

    known, built = Known(), list[fast.Part]()

    def runs(x: torch.Tensor) -> list[Run]:
        return run_all(net, [layer], x, lambda _: [_score])

    def call(x: torch.Tensor) -> Any:
        zero, wanted = torch.zeros_like(x), ([layer], False, [])
        with at_rest(net):
            if fused and (not built or built[0].shape != x.shape):
                built[:] = [fast.part(net, [layer], x, fast.Compare(lambda _: _score))[0]]
            with fast.standing_in(net, built[0]) if fused else nullcontext():
                if known.reference is None or known.reference.shape != x.shape:
                    known.keep(zero, wanted, runs(zero))
                (case,) = runs(x)
            (other,) = known.of(zero, wanted)
            return share(case, other, [layer]).evidence(layer)

    return call


def _secant(net: torch.nn.Module, layer: str) -> Call:
    """The pair of scan and reference (zeros), both run each time."""
    from med_gradcam.secant.pair import run, share
    from med_gradcam.tail import at_rest

    def call(x: torch.Tensor) -> Any:
        with at_rest(net):
            case, other = (run(net, [layer], y, lambda _: _score) for y in (x, torch.zeros_like(x)))
            return share(case, other, [layer]).evidence(layer)

    return call


def _pair(net: torch.nn.Module, layer: str) -> Call:
    """Plain inference of scan and reference, for comparison with what runs both."""
    plain = _plain(net, layer)
    return lambda x: (plain(x), plain(torch.zeros_like(x)))


def _explain_secant(net: torch.nn.Module, layer: str) -> Call:
    import med_gradcam as mg

    return lambda x: mg.explain(x, net, target=TARGET, layer=layer, method="secant")


def _all_classes(net: torch.nn.Module, layer: str) -> Call:
    """Grad-CAM of every class from one forward."""
    from med_gradcam.capture import capture_all
    from med_gradcam.methods import Bound, gradcam
    from med_gradcam.tail import at_rest

    def logit(index: int) -> Callable[[Any], torch.Tensor]:
        return lambda output: torch.as_tensor(output[:, index])

    def call(x: torch.Tensor) -> Any:
        with at_rest(net):
            _, found = capture_all(net, [layer], x, lambda _: [[logit(n) for n in range(OUTPUTS)]])
            bound = Bound(float("inf"), 0.0)
            return torch.stack([gradcam.evidence(row[layer], bound).values for row in found[0]])

    return call


def _explain(net: torch.nn.Module, layer: str) -> Call:
    import med_gradcam as mg

    return lambda x: mg.explain(x, net, target=TARGET, layer=layer, method="gradcam")


def _explain_first(net: torch.nn.Module, layer: str) -> Call:
    return _explain(copy.deepcopy(net), layer)  # nothing is remembered about a new network


def _peer(name: str) -> Variant:
    return Variant(f"{name}: Grad-CAM", lambda net, layer: GRADCAM[name](net, layer, TARGET))


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(PLAIN, _plain),
        Variant("ours: Grad-CAM", _direct("gradcam")),
        Variant("ours: integrated, 8 nodes", _relative("integrated")),
        Variant("ours: integrated, 8 nodes, one block earlier", _relative("integrated"), "earlier"),
        Variant("ours: integrated, 8 nodes, reference known", _known("integrated")),
        Variant("plain inference of scan and reference", _pair),
        Variant("ours: secant", _secant),
        Variant("ours: secant, one block earlier", _secant, "earlier"),
        Variant("ours: secant, reference known", _secant_known),
        Variant("ours: Grad-CAM, --fast", _fast("gradcam")),
        Variant("ours: secant, reference known, --fast", partial(_secant_known, fused=True)),
        Variant(f"ours: Grad-CAM, {OUTPUTS} classes", _all_classes, not_for=SEGMENTATION),
        Variant("ours: explain(), first call", _explain_first, fresh=True),
        Variant("ours: explain(), later calls", _explain),
        Variant("ours: explain() with secant, layer named", _explain_secant),
        *(_peer(name) for name in GRADCAM),
    )
}
