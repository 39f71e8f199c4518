"""The two block classes of torchvision's residual networks."""


class BasicBlock: ...


class Bottleneck: ...
