"""Names of image functions."""


def resize(*_arguments: object) -> None:
    raise NotImplementedError("this is a stand-in for torchvision: install torchvision")
