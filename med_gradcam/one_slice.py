"""How does a network for images take a volume of one slice?

The house has volumes (1, C, I, J, K) everywhere; an image is a volume with one axis of size 1. That
axis is taken off before the network and put back into the maps that it puts out. Its layers keep
their names and are seen through their forms (forms.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from med_gradcam.errors import ModelError
from med_gradcam.outputs import changed
from med_gradcam.shapes import CANNOT, attributes_kept, for_real, on_meta

IMAGE_DIMS = 4  # of an image as a network takes it, (1, C, I, J)
_TWO, _THREE = ("Conv2d", "ConvTranspose2d"), ("Conv3d", "ConvTranspose3d")


class Flat(torch.nn.Module):
    """A network for images (1, C, I, J) as one for volumes of one slice.

    It shares the modules, parameters and buffers of `net`, under their own names.
    """

    axis: int
    inside: weakref.ref[torch.nn.Module]

    def __init__(self, net: torch.nn.Module, axis: int) -> None:
        super().__init__()
        # The same dicts: what is put into the network's own place for a while is seen here, too.
        self.__dict__.update(
            _modules=net._modules,  # noqa: SLF001
            _parameters=net._parameters,  # noqa: SLF001
            _buffers=net._buffers,  # noqa: SLF001
            training=net.training,
            axis=axis,
            inside=weakref.ref(net),  # so that the network can be remembered by itself
        )

    @property
    def inner(self) -> torch.nn.Module:
        """The network for images."""
        net = self.inside()
        if net is None:
            raise ModelError("expected the network to be alive as long as its volumes' form.")
        return net

    def image(self, x: torch.Tensor) -> torch.Tensor:
        """A volume (n, C, I, J, K) as the network takes it."""
        if x.shape[2 + self.axis] != 1:
            raise ModelError(_several(x.shape[2:]))
        return x.squeeze(2 + self.axis)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The network's output, maps with the axis put back; `x` is (n, C, I, J, K)."""
        dim = 2 + self.axis
        out = self.inner(self.image(x), *args, **kwargs)
        return changed(out, lambda t: t.unsqueeze(dim) if t.ndim == IMAGE_DIMS else t)


def _several(shape: Sequence[int]) -> str:
    size = " x ".join(str(n) for n in shape)
    return (
        f"expected an image, a volume with one axis of size 1, for a network with two-dimensional "
        f"convolutions only, got {size}; give one slice of it."
    )


_FLAT: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, Flat]] = weakref.WeakKeyDictionary()


def fitting(net: torch.nn.Module, shape: Sequence[int]) -> torch.nn.Module:
    """The network for inputs of `shape` (C, I, J, K): itself, or flat where it takes images only.

    Raises:
        ModelError: it takes images only, and the scan has several slices.
    """
    kinds = {type(m).__name__ for m in net.modules()}
    for_images = bool(kinds & {*_TWO}) and not kinds & {*_THREE}
    axes = [n for n in range(3) if shape[1 + n] == 1]
    if isinstance(net, Flat) or not (axes or for_images) or _takes(net, (1, *shape)):
        return net
    for axis in reversed(axes):
        image = [n for at, n in enumerate(shape) if at != 1 + axis]
        if _takes(net, (1, *image)):
            return _FLAT.setdefault(net, {}).setdefault(axis, Flat(net, axis))
    side = max(shape[1:])
    if for_images and not axes and _takes(net, (1, shape[0], side, side)):
        raise ModelError(_several(shape[1:]))
    return net


def _takes(net: torch.nn.Module, shape: Sequence[int]) -> bool:
    """Whether a network runs on an input of a shape: on shapes alone, else on zeros."""
    for ready in (on_meta, for_real):
        try:
            with torch.no_grad(), attributes_kept(net):
                ready(net, shape)[1]()
        except (*CANNOT, ValueError, IndexError, AssertionError):
            continue
        return True
    return False
