"""Guided backprop: the input's gradient with every negative signal stopped at every ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from med_gradcam.capture import Capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.explanation import Measure
from med_gradcam.methods import Bound, Evidence

TITLE = "guided backprop: sum over channels of |guided dz/dx(v)|; nearly independent of the weights"
SOURCE = "Springenberg et al., ICLR Workshop 2015, arXiv:1412.6806, section 3.4"
CANNOT_SHOW = (
    "what the network has learnt: it nearly restores the image's edges whatever the weights and "
    "the class (arXiv:1810.03292, 1805.07039, 1912.09818); evidence for or against"
)
SIGNED = False
UNIT: Measure = "relative units"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = False
PROMISES_SUM = False

# Rectifiers with a slope where the rule of ReLU has none. Sigmoid and tanh, as in gates and
# attention, are no rectifiers and are passed through as they are.
_OTHERS = frozenset(
    "celu elu gelu glu hardswish hardtanh leaky_relu mish prelu relu6 rrelu selu silu softplus "
    "threshold".split()
)
_OWN_CODE = frozenset(("Swish", "MemoryEfficientSwish"))  # modules that write such a slope out


class _Guided(torch.autograd.Function):
    """A ReLU whose gradient passes only where it is positive, and the input was."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """ReLU."""
        ctx.save_for_backward(x > 0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """The rule."""
        passed: torch.Tensor = ctx.saved_tensors[0]
        return gradients[0].clamp(min=0) * passed


class _GuidedMode(TorchFunctionMode):
    """Every ReLU that runs, a module or a bare function, in place or not, by what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in _OTHERS:
            raise _no_rule(name)
        if not _is_relu(name, args, given):
            return func(*args, **given)
        self.count += 1
        x: torch.Tensor = args[0] if args else given["input"]
        inplace = name.endswith("_") or (*args[1:2], given.get("inplace"))[0] is True
        made: torch.Tensor = _Guided.apply(x)  # type: ignore[no-untyped-call]
        return x.copy_(made) if inplace else made


def _is_relu(name: str, args: Sequence[Any], given: dict[str, Any]) -> bool:
    if name.rstrip("_") == "relu":
        return True
    low, high = (*args[1:3], None, None)[:2]
    bare = name.rstrip("_")
    one_sided = bare == "clamp_min" or (
        bare in ("clamp", "clip") and given.get("max", high) is None
    )
    return one_sided and _is_zero(given.get("min", low))


def _is_zero(low: Any) -> bool:
    return isinstance(low, (int, float)) and low == 0


def _no_rule(name: str) -> CannotExplainError:
    return CannotExplainError(
        "no rule",
        f"expected a network whose activations are ReLUs for guided backprop, got {name}, for "
        f"which its rule is not defined; choose saliency or integrated_gradients.",
    )


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """The size of the guided gradient (I, J, K).

    Raises:
        CannotExplainError: the network has other rectifiers than ReLU, or none.
    """
    del bound
    return Evidence(guided(capture).double().abs().sum(0))


def guided(capture: Capture) -> torch.Tensor:
    """The guided gradient of the score by the network's input, (C, I, J, K)."""
    net = capture.tail.net
    own = next((type(m).__name__ for m in net.modules() if type(m).__name__ in _OWN_CODE), None)
    if own is not None:
        raise _no_rule(own)
    capture.passes += 2.0
    mode = _GuidedMode()
    with torch.enable_grad():
        leaf = capture.input.detach().clone()
        leaf.requires_grad = True
        with mode:
            output = net(leaf.clone())  # which may work in place on it
        if mode.count == 0:
            raise _no_rule("none")
        (gradient,) = torch.autograd.grad(capture.target(output).sum(), leaf)
    return gradient[0]
