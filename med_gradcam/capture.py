"""What does a method see of one case: the activation at a layer, its gradient, its tail?

The forward runs without a graph up to the layer; there the activation becomes a new leaf, so that
gradients (and their memory) exist only after it. For one layer that costs one prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from med_gradcam.errors import CannotExplainError
from med_gradcam.tail import INPUT, Recorded, Score, Tail, no_gradient

# Channel means of the gradient below this share of its mean size are rounding noise: behind an
# InstanceNorm they are analytically zero (measured: 1e-8 in float32, 1e-17 in float64).
NORM_TRAP = 1e-5


@dataclass(slots=True, eq=False)
class Capture:
    """One case at one layer; lives for one call.

    `activation` and `baseline` (the reference input's activation, or None) have shape (C, i, j, k);
    `score` is the target's for the case, `reference_score` that of the reference input; `tail` runs
    the network behind the layer; `passes` counts how many times that was done (one pass is a
    forward and, with a gradient, a backward of about the same price, weights being frozen) and
    `forwards` how many predictions of the whole network were made. At the layer `@input` the
    activation is the network's input itself. `reference_input` is (1, C, I, J, K) or None; `beside`
    is a second capture of the case, at a layer, for methods at the input that need one (BESIDE).
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
    beside: Capture | None = None
    seed: int = 0

    @property
    def input(self) -> torch.Tensor:
        """The network's input (1, C, I, J, K)."""
        return self.tail.x

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
        with torch.no_grad():
            return torch.cat([self.target(self.tail.net(one[None].clone())) for one in inputs])

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

    `choose` turns the raw output into the target (the predicted class is known only then). The
    tail of this capture holds no memory: it can only be run with `record`.

    Raises:
        CannotExplainError: the layer never ran, ran twice, has no places or a zero gradient.
    """
    leaves: list[torch.Tensor] = []

    def reroot(module: torch.nn.Module, inputs: Any, output: Any) -> torch.Tensor:
        del module, inputs
        if not isinstance(output, torch.Tensor) or output.ndim != 5 or leaves:
            raise CannotExplainError(
                "logits",
                f"expected the layer {layer!r} to run once and put out (1, C, i, j, k), "
                f"it did not; choose another layer.",
            )
        torch.set_grad_enabled(True)  # the surrounding no_grad() takes it back at its end
        leaf = output.detach()
        leaf.requires_grad = True
        leaves.append(leaf)
        return leaf.clone()  # what follows may work in place

    if layer == INPUT:
        handle = net.register_forward_pre_hook(lambda m, inputs: reroot(m, (), inputs[0]))
    else:
        handle = net.get_submodule(layer).register_forward_hook(reroot, prepend=True)
    try:
        with torch.no_grad():
            output = net(x.clone())  # which may work in place on it
            if not leaves:
                raise CannotExplainError("never ran", f"the layer {layer!r} never ran.")
            target = choose(output)
            with torch.enable_grad():
                score = target(output)
            if not score.requires_grad:
                raise CannotExplainError("zero gradient", no_gradient(layer))
            (gradient,) = torch.autograd.grad(score.sum(), leaves[0])
    finally:
        handle.remove()
    found = Capture(
        layer,
        leaves[0].detach()[0],
        target,
        float(score.detach()[0]),
        Tail(net, layer, x, ()),
        known_gradient=gradient[0],
    )
    return output, found


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
    """Refuse a layer whose evidence a normalisation wipes out.

    Raises:
        CannotExplainError: the layer feeds straight into a norm, or its channel-mean gradients are
            rounding noise.
    """
    gradient = capture_.gradient()
    size = float(gradient.double().abs().mean(dim=(1, 2, 3)).max())
    mean = float(gradient.double().mean(dim=(1, 2, 3)).abs().max())
    if feeds_norm or (size > 0 and gradient[0].numel() > 1 and mean / size < NORM_TRAP):
        raise CannotExplainError(
            "norm trap",
            f"the layer {capture_.layer!r} feeds straight into an Instance, Group or LayerNorm, "
            f"which removes its mean: every Grad-CAM weight is zero and a map would be rounding "
            f"noise (largest weight {mean:.1e}, mean size of the gradient {size:.1e}); choose the "
            f"layer after the norm, or --layer auto.",
        )


def check_signal(capture_: Capture) -> None:
    """Refuse NaN, infinite or zero gradients and activations.

    Raises:
        CannotExplainError: with the reason.
    """
    for what, tensor in (("activation", capture_.activation), ("gradient", capture_.gradient())):
        if not bool(torch.isfinite(tensor).all()):
            raise CannotExplainError(
                "not finite",
                f"the {what} of the layer {capture_.layer!r} holds NaN or infinite values for "
                f"this scan; check the network's weights and the intensity steps.",
            )
    if float(capture_.gradient().abs().max()) == 0.0 and not _wakes(capture_):
        raise CannotExplainError("zero gradient", no_gradient(capture_.layer))


def _wakes(capture_: Capture) -> bool:
    """Whether a score that is flat at the case changes on the way to its reference."""
    base = capture_.baseline
    if base is None:
        return False
    points = torch.stack([(capture_.activation + base) / 2, base])
    return float(capture_.gradients(points).abs().max()) > 0.0
