"""What does a method see of one case: the activation at a layer, its gradient, its tail?

The forward runs without a graph up to the layer; there the activation becomes a new leaf, so that
gradients (and their memory) exist only after it. For one layer that costs one prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from med_gradcam import gradient_free
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import Cells
from med_gradcam.forms import Form, form_of
from med_gradcam.secant.pair import Shared
from med_gradcam.tail import INPUT, Recorded, Score, Tail, as_cells, no_gradient, slopes

# Channel means of the gradient below this share of its mean size are rounding noise: behind an
# InstanceNorm they are analytically zero (measured: 1e-8 in float32, 1e-17 in float64).
NORM_TRAP = 1e-5
# The methods whose weights are such means. Multipliers, path integrals and cell-by-cell products
# are no noise there: they find as much before a norm as behind the one before (docs/evidence.md).
MEAN_WEIGHTS = ("gradcam", "xgradcam", "shapleycam", "guided_gradcam")


@dataclass(slots=True, eq=False)
class Capture:
    """One case at one layer; lives for one call.

    `activation` and `baseline` (the reference input's activation, or None) have shape (C, i, j, k);
    `score` is the target's for the case, `reference_score` that of the reference input; `tail` runs
    the network behind the layer; `passes` counts how many times that was done (one pass is a
    forward and, with a gradient, a backward of about the same price, weights being frozen) and
    `forwards` how many predictions of the whole network were made. At the layer `@input` the
    activation is the network's input itself. `reference_input` is (1, C, I, J, K) or None; `beside`
    is a second capture of the case, at a layer, for methods at the input that need one (BESIDE);
    `cells` says where the cells lie, once that is known; `shared` is the score's change from the
    reference as `secant` shares it out; `baselines`: all of them where several scans were given.
    """

    layer: str
    activation: torch.Tensor
    target: Score
    score: float
    tail: Tail
    baseline: torch.Tensor | None = None
    reference_score: float | None = None
    known_gradient: torch.Tensor | None = None
    passes: float = field(default=0.0)
    forwards: float = field(default=0.0)
    reference_input: torch.Tensor | None = None
    baselines: tuple[torch.Tensor, ...] = ()
    beside: Capture | None = None
    cells: Cells | None = None
    shared: Shared | None = None
    seed: int = 0

    @property
    def passed_by(self) -> bool:
        """Whether a path is known to lead past the layer."""
        return self.shared is not None and self.shared.avoided[self.layer]

    @property
    def has_rest(self) -> bool:
        """Whether the layer puts out tokens without a place beside its cells."""
        form = self.tail.form
        return form is not None and form.rest is not None

    @property
    def input(self) -> torch.Tensor:
        """The network's input (1, C, I, J, K)."""
        return self.tail.x

    @property
    def beside_cells(self) -> Cells | None:
        """Where the cells of the capture beside this one lie."""
        return None if self.beside is None else self.beside.cells

    def sensitivity(self) -> torch.Tensor:
        """What the score owes to the activation (C, i, j, k): secant multipliers, or gradient."""
        return self.gradient() if self.shared is None else self.shared.multipliers[self.layer][0]

    def gradient(self) -> torch.Tensor:
        """The gradient d score / d activation at the case, shape (C, i, j, k)."""
        if self.known_gradient is None:
            self._check_tail()
            self.known_gradient = self.gradients(self.activation[None])[0]
        return self.known_gradient

    def _check_tail(self) -> None:
        """Make sure that the tail gives the network's own score, also within a batch."""
        other = self.activation / 2 if self.baseline is None else self.baseline
        pair = torch.stack([self.activation, other])
        self.passes += 2.0
        self.tail = self.tail.faithful(pair, self.target, self.score)

    def gradients(self, activations: torch.Tensor) -> torch.Tensor:
        """Gradients d score / d activation at other activations, both (n, C, i, j, k)."""
        self.passes += 2.0 * len(activations)
        return self.tail.gradients(activations, self.target)

    def scores(self, activations: torch.Tensor) -> torch.Tensor:
        """The target's scores (n,) at other activations, through the tail only."""
        self.passes += float(len(activations))
        return self.tail.scores(activations, self.target)

    def input_scores(self, inputs: torch.Tensor) -> torch.Tensor:
        """The target's scores (n,) of other inputs (n, C, I, J, K): whole predictions."""
        self.forwards += float(len(inputs))
        parts = inputs.split(gradient_free.batch(self.tail.net))
        with torch.no_grad():
            return torch.cat([self.target(self.tail.net(some.clone())) for some in parts])

    def at_input(self, x: torch.Tensor) -> Capture:
        """The capture of another input (1, C, I, J, K) at the same layer, gradient included."""
        _, found = capture(self.tail.net, self.layer, x, lambda _: self.target)
        self.forwards += 1.0
        self.passes += 1.0
        return found


def capture(
    net: torch.nn.Module, layer: str, x: torch.Tensor, choose: Callable[[Any], Score]
) -> tuple[Any, Capture]:
    """The raw output and the capture of one layer, gradient included, for one prediction's price.

    `x` is (1, C, I, J, K); `choose` turns the raw output into the target (the predicted class is
    known only then). The tail of this capture holds no memory: it can only be run with `record`.

    Raises:
        CannotExplainError: the layer never ran, ran twice, has no places or a zero gradient.
    """
    output, found = capture_all(net, [layer], x, lambda out: [[choose(out)]])
    return output, found[0][0][layer]


def capture_all(
    net: torch.nn.Module,
    layers: Sequence[str],
    x: torch.Tensor,
    choose: Callable[[Any], Sequence[Sequence[Score]]],
) -> tuple[Any, list[list[dict[str, Capture]]]]:
    """Several layers, targets and scans (n, C, I, J, K) from one forward.

    `choose` gives each scan's targets, from the raw output of all; the result holds, for each scan
    and target, one capture per layer. The graph begins at the first of the layers; each target
    costs one backward from there.

    Raises:
        CannotExplainError: as for `capture`.
    """
    seen: dict[str, torch.Tensor] = {}
    rests: dict[str, torch.Tensor | None] = {}
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            form = form_of(net, layer, x)
            _check_apart(form, layer, len(x))
            hooks.callback(_watched(net, layer, form, (seen, rests)).remove)
        output = net(x.clone())  # which may work in place on it
        for layer in layers:
            if layer not in seen:
                raise CannotExplainError("never ran", f"the layer {layer!r} never ran.")
        wanted = choose(output)
        found: list[list[dict[str, Capture]]] = [[] for _ in wanted]
        for turn in range(max(len(targets) for targets in wanted)):
            targets = [row[min(turn, len(row) - 1)] for row in wanted]
            scores, gradients = _gradients(output, targets, seen, len(x))
            for item, row in enumerate(wanted):
                if turn < len(row):
                    found[item].append(
                        {
                            layer: Capture(
                                layer,
                                seen[layer].detach()[item],
                                row[turn],
                                float(scores[item]),
                                _tail(net, layer, x[item : item + 1], (rests.get(layer), item)),
                                known_gradient=gradients[layer][item],
                            )
                            for layer in layers
                        }
                    )
    return output, found


def _check_apart(form: Form | None, layer: str, scans: int) -> None:
    """Several scans at once must lie one after the other, and nothing mixed in between.

    Raises:
        CannotExplainError: slices or windows share a dim with the scans, whose order is not known.
    """
    if form is not None and form.folded and scans > 1:
        raise CannotExplainError(
            "batch",
            f"expected one scan at a time at the layer {layer!r}, whose output has slices or "
            f"windows where others have scans, got {scans}; use batch=1.",
        )


def _tail(
    net: torch.nn.Module, layer: str, x: torch.Tensor, rest: tuple[torch.Tensor | None, int]
) -> Tail:
    """A tail without memory for one scan; `rest`: what has no place, of all scans, and its turn."""
    whole, item = rest
    form = form_of(net, layer, x)
    if whole is None or form is None or form.folded:
        return Tail(net, layer, x, (), rest=whole)
    return Tail(net, layer, x, (), rest=whole[item : item + 1])


def _watched(
    net: torch.nn.Module,
    layer: str,
    form: Form | None,
    found: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]],
) -> Any:
    """A hook that begins the graph at a layer, or notes the layer within the graph."""
    seen, rests = found

    def reroot(output: Any) -> torch.Tensor:
        whole = isinstance(output, torch.Tensor) and (form is not None or output.ndim == 5)
        if not whole or layer in seen:
            raise CannotExplainError(
                "logits",
                f"expected the layer {layer!r} to run once and put out (1, C, i, j, k), "
                f"it did not; choose another layer.",
            )
        torch.set_grad_enabled(True)  # the surrounding no_grad() takes it back at its end
        leaf = as_cells(output, layer, form)
        if not output.requires_grad:
            leaf = leaf.detach()
            leaf.requires_grad = True
        seen[layer] = leaf
        if form is None:
            return leaf.clone()  # what follows may work in place
        beside = form.beside(output)
        rests[layer] = None if beside is None else beside.detach()
        return form.whole(leaf, beside)

    if layer == INPUT:
        return net.register_forward_pre_hook(lambda _, inputs: (reroot(inputs[0]), *inputs[1:]))
    module = net.get_submodule(layer)
    return module.register_forward_hook(lambda _, __, output: reroot(output), prepend=True)


def _gradients(
    output: Any, targets: Sequence[Score], seen: dict[str, torch.Tensor], count: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores (n,) of one target per scan, and the gradients of their sum at each layer."""
    with torch.enable_grad():
        rows = {id(target): target(output) for target in targets}
        score = torch.stack([rows[id(target)][n] for n, target in enumerate(targets)])
    if not score.requires_grad:
        raise CannotExplainError("zero gradient", no_gradient(next(iter(seen))))
    found = slopes(score.sum(), list(seen.values()))
    if len(score) != count:
        raise CannotExplainError(
            "output", f"expected one score per scan ({count}), got {len(score)}."
        )
    return score.detach(), dict(zip(seen, found, strict=True))


def captures(recorded: Recorded, target: Score, reference: Recorded | None) -> dict[str, Capture]:
    """One capture per recorded layer, with the reference's activations as baselines."""
    with torch.no_grad():
        score = float(target(recorded.output)[0])
        reference_score = None if reference is None else float(target(reference.output)[0])
    return {
        name: Capture(
            name,
            activation[0],
            target,
            score,
            recorded.tails[name],
            None if reference is None else reference.activations[name][0],
            reference_score,
            reference_input=None if reference is None else reference.tails[name].x,
        )
        for name, activation in recorded.activations.items()
    }


def outputs(net: torch.nn.Module, x: torch.Tensor) -> Any:
    """The raw output of a plain prediction."""
    with torch.no_grad():
        return net(x.clone())


# ---------------------------------------------------------------------------------- the guards


def check_norm_trap(capture_: Capture, *, feeds_norm: bool) -> None:
    """Refuse a layer whose channel-mean gradients, the weights of Grad-CAM, are rounding noise.

    Only for methods that weigh channels so. `feeds_norm`: the layer feeds straight into a norm that
    takes each channel's mean; there the mean is zero analytically, in half precision too.

    Raises:
        CannotExplainError: the largest weight is rounding noise beside the gradient.
    """
    gradient = capture_.gradient()
    size = float(gradient.double().abs().mean(dim=(1, 2, 3)).max())
    mean = float(gradient.double().mean(dim=(1, 2, 3)).abs().max())
    noise = NORM_TRAP
    if feeds_norm:
        noise = max(noise, 10 * torch.finfo(capture_.activation.dtype).eps)
    if size == 0 or gradient[0].numel() == 1 or mean / size >= noise:
        return
    why = (
        f"the layer {capture_.layer!r} feeds straight into an Instance, Group or LayerNorm, which "
        f"removes each channel's mean"
        if feeds_norm
        else f"what follows the layer {capture_.layer!r} removes each channel's mean"
    )
    raise CannotExplainError(
        "norm trap",
        f"{why}: every Grad-CAM weight is zero and a map would be rounding noise (largest weight "
        f"{mean:.1e}, mean size of the gradient {size:.1e}); choose the layer after the norm, "
        f"--layer auto or --method secant.",
    )


def check_signal(capture_: Capture) -> None:
    """Refuse NaN, infinite or zero gradients and activations.

    Raises:
        CannotExplainError: with the reason.
    """
    seen = [("activation", capture_.activation)]
    blind = bool(gradient_free.why(capture_.tail.net))
    seen += [] if blind else [("gradient", capture_.sensitivity())]
    for what, tensor in seen:
        if not bool(torch.isfinite(tensor).all()):
            raise CannotExplainError(
                "not finite",
                f"the {what} of the layer {capture_.layer!r} holds NaN or infinite values for "
                f"this scan; check the network's weights and the intensity steps.",
            )
    if capture_.shared is not None or blind:
        return  # a score that is that of its reference has none, which is no fault
    if float(capture_.gradient().abs().max()) == 0.0 and not _wakes(capture_):
        raise CannotExplainError("zero gradient", no_gradient(capture_.layer))


def _wakes(capture_: Capture) -> bool:
    """Whether a score that is flat at the case changes on the way to its reference."""
    base = capture_.baseline
    if base is None:
        return False
    points = torch.stack([(capture_.activation + base) / 2, base])
    return float(capture_.gradients(points).abs().max()) > 0.0
