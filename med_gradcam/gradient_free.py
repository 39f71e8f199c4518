"""What can be asked of a network without gradients, and how is it told from the others?

Such a network has an attribute `gradient_free`: a clause that says why it has none, such as "it is
a black box". Its layers cannot be looked at either, so only its input can be explained, by methods
that need nothing but predictions (NEEDS_GRADIENT = False).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from med_gradcam import _plugins
from med_gradcam.errors import CannotExplainError, UsageError

INSTEAD = "occlusion"  # what takes over from a method that takes another's place by itself
_WHOLE = ("auto", "fused", "all", "@input", "input")  # layers that mean, or come down to, the input


class Asked(Protocol):
    """The settings of a call that matter here."""

    @property
    def method(self) -> str:
        """The name of a method."""

    @property
    def layer(self) -> str:
        """The layer as the caller named it."""

    @property
    def fast(self) -> bool:
        """Whether what lies before the layer shall be fused."""


def why(net: object) -> str:
    """Why a network has no gradients; empty where it has them."""
    return str(getattr(net, "gradient_free", ""))


def methods() -> list[str]:
    """The methods that need predictions only and explain the input."""
    loaded = ((name, _plugins.load("methods", name)) for name in _plugins.names("methods"))
    return [name for name, module in loaded if not getattr(module, "NEEDS_GRADIENT", True)]


def settled(net: object, request: Asked) -> tuple[str, list[str]]:
    """The method that explains this network, and notes for the result.

    `secant`, the default, gives way to occlusion as it does to `integrated` where it lacks a rule.

    Raises:
        UsageError: a method that needs gradients, a layer, or `fast`.
    """
    reason = why(net)
    if not reason:
        return request.method, []
    if request.layer not in _WHOLE:
        raise UsageError(
            f"expected the layer '@input' or 'auto', got {request.layer!r}: the network has no "
            f"layers to look at ({reason})."
        )
    if request.fast:
        raise UsageError(
            f"expected no fast, which fuses a network's layers, of which none can be seen "
            f"({reason})."
        )
    module = _plugins.load("methods", request.method)
    if not getattr(module, "NEEDS_GRADIENT", True):
        return request.method, []
    if not hasattr(module, "INSTEAD"):
        raise UsageError(
            f"expected a method that needs predictions only ({', '.join(methods())}) for a network "
            f"without gradients ({reason}), got {request.method!r}."
        )
    return INSTEAD, [f"{request.method} needs gradients ({reason}); {INSTEAD} took over"]


def check_gradient(net: object, what: str) -> None:
    """Refuse a network without gradients.

    Raises:
        CannotExplainError: `what` needs them.
    """
    reason = why(net)
    if reason:
        raise CannotExplainError(
            "no gradient",
            f"expected a network with gradients for {what}, got one without ({reason}); explain() "
            f"and shapley() work on it.",
        )


def check_alone(net: object, others: object) -> None:
    """Refuse other inputs for a network that is a function of the scan.

    Raises:
        UsageError: there are some.
    """
    if others and why(net):
        raise UsageError(
            f"expected no other inputs for a network that takes the scan alone ({why(net)}); hand "
            f"them over inside its predict function."
        )


def batch(net: object) -> int:
    """How many inputs such a network takes at once; 1 for those that do not say."""
    return int(getattr(net, "batch", 1)) if why(net) else 1


def remarks(net: object) -> list[str]:
    """What the network itself says of the predictions it has made."""
    found: Any = getattr(net, "remarks", None)
    return list(found()) if why(net) and callable(found) else []


def remembering(net: object) -> AbstractContextManager[Any]:
    """Within it equal inputs are predicted once, if the network can do that."""
    begin: Any = getattr(net, "remembering", None)
    return begin() if why(net) and callable(begin) else nullcontext()


@contextmanager
def afresh(net: object) -> Iterator[None]:
    """Within it predictions are made anew: a memory would always repeat itself."""
    begin: Any = getattr(net, "afresh", None)
    with begin() if why(net) and callable(begin) else nullcontext():
        yield
