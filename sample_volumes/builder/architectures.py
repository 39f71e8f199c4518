"""Which layers do the sample networks have, and what does their spec say?"""

from __future__ import annotations

from typing import Any

Layers = list[list[Any]]


def conv(
    inputs: int, outputs: int, stride: int = 1, norm: str = "BatchNorm3d", kernel: int = 3
) -> Layers:
    """Convolution, normalisation, ReLU."""
    arguments: dict[str, Any] = {"num_features": outputs}
    if norm == "InstanceNorm3d":
        arguments["affine"] = True
    return [
        [
            "Conv3d",
            {
                "in_channels": inputs,
                "out_channels": outputs,
                "kernel_size": kernel,
                "stride": stride,
                "padding": kernel // 2,
                "bias": False,
            },
        ],
        [norm, arguments],
        ["ReLU", {}],
    ]


def head(features: int, outputs: int) -> Layers:
    """Detector maps (1x1x1 convolution, softplus), their mean over all cells, two linear layers.

    Softplus rather than ReLU: faint, but never exactly zero, on a scan without findings.
    """
    one: dict[str, Any] = {"in_channels": features, "out_channels": 4, "kernel_size": 1}
    return [
        ["Conv3d", one],
        ["Softplus", {"beta": 12.0}],
        ["AdaptiveAvgPool3d", {"output_size": 1}],
        ["Flatten", {}],
        ["Linear", {"in_features": 4, "out_features": 16}],
        ["ReLU", {}],
        ["Linear", {"in_features": 16, "out_features": outputs}],
    ]


def strided_layers(norm: str, outputs: int) -> tuple[Layers, dict[str, str]]:
    """Three resolutions reached by strides, and the names of the last layer of each."""
    layers = [
        *conv(1, 12, 2, norm, kernel=5),
        *conv(12, 12, 1, norm),
        *conv(12, 24, 2, norm),
        *conv(24, 24, 1, norm),
        *conv(24, 32, 2, norm),
        *conv(32, 32, 1, norm),
        *head(32, outputs),
    ]
    return layers, {"block1": "5", "block2": "11", "block3": "19"}


def pooled_layers(outputs: int) -> tuple[Layers, dict[str, str]]:
    """As above, but two of the resolutions are reached by max-pooling."""
    pool: Layers = [["MaxPool3d", {"kernel_size": 2, "stride": 2}]]
    layers = [
        *conv(1, 12, 2, kernel=5),
        *conv(12, 12),
        *pool,
        *conv(12, 24),
        *conv(24, 24),
        *pool,
        *conv(24, 32),
        *conv(32, 32),
        *head(32, outputs),
    ]
    return layers, {"block1": "5", "block2": "12", "block3": "21"}
