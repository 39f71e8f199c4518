"""Names of image transforms."""

from . import functional as functional


class _Missing:
    def __init__(self, *_arguments: object) -> None:
        raise NotImplementedError("this is a stand-in for torchvision: install torchvision")


class Compose(_Missing): ...


class Normalize(_Missing): ...


class ToTensor(_Missing): ...
