"""How is a sample network read, and how does a scan become its input?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

RAS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def build_net(layers: list[list[Any]]) -> nn.Sequential:
    """The network of a spec's `layers`: one Sequential of torch.nn modules."""
    return nn.Sequential(*[getattr(nn, name)(**arguments) for name, arguments in layers])


def load_net(folder: Path) -> tuple[nn.Sequential, dict[str, Any]]:
    """A network in eval mode and its spec."""
    spec = json.loads((folder / "spec.json").read_text())
    net = build_net(spec["layers"])
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    return net.eval(), spec


def save_net(folder: Path, net: nn.Sequential, spec: dict[str, Any]) -> None:
    """Write spec.json and weights.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)
    (folder / "spec.json").write_text(json.dumps(spec, indent=1) + "\n")


def to_axes(array_ras: np.ndarray, axes: str) -> np.ndarray:
    """Turn an (R, A, S) array so that its axes point to the given letters."""
    turned = np.transpose(array_ras, [RAS[letter][0] for letter in axes])
    flips = [axis for axis, letter in enumerate(axes) if RAS[letter][1] < 0]
    return np.flip(turned, flips)


def turn_index(index_ras: np.ndarray, shape_ras: tuple[int, ...], axes: str) -> np.ndarray:
    """The index, along axes that point to the given letters, of a voxel of an (R, A, S) array."""
    turned = [
        index_ras[RAS[letter][0]]
        if RAS[letter][1] > 0
        else shape_ras[RAS[letter][0]] - 1 - index_ras[RAS[letter][0]]
        for letter in axes
    ]
    return np.array(turned)


def apply_intensity(array: np.ndarray, steps: list[list[Any]]) -> np.ndarray:
    """The spec's intensity steps, in order (those that the sample networks use)."""
    for name, *values in steps:
        if name == "clip":
            array = np.clip(array, *values)
        elif name == "normalise":
            array = (array - values[0][0]) / values[1][0]
        else:
            raise ValueError(f"intensity step must be clip or normalise, got {name!r}")
    return np.ascontiguousarray(array, np.float32)


def network_input(array_ras: np.ndarray, spec: dict[str, Any]) -> torch.Tensor:
    """An (R, A, S) scan as the network's (1, 1, i, j, k) input."""
    turned = to_axes(array_ras, spec["input"]["axes"])
    return torch.from_numpy(apply_intensity(turned, spec["input"]["intensity"]))[None, None]


def log_odds(output: torch.Tensor) -> torch.Tensor:
    """Log-odds of the finding: the only logit, or the second minus the first."""
    return output[:, 0] if output.shape[1] == 1 else output[:, 1] - output[:, 0]


def score(net: nn.Module, array_ras: np.ndarray, spec: dict[str, Any]) -> float:
    """Log-odds of one scan."""
    with torch.inference_mode():
        return float(log_odds(net(network_input(array_ras, spec)))[0])


def foreground(array: np.ndarray) -> np.ndarray:
    """Voxels of an MR scan that are not air: above a tenth of the 99th percentile."""
    return array > 0.1 * float(np.percentile(array, 99))


def reference_scan(array_ras: np.ndarray, modality: str) -> np.ndarray:
    """The uniform-tissue scan that explanations are relative to, in the scan's own unit."""
    if modality == "MR":
        inside = foreground(array_ras)
        return np.where(inside, np.median(array_ras[inside]), array_ras)
    lung = (array_ras > -980) & (array_ras < -600)
    soft = (array_ras > -150) & (array_ras < 150)
    kept = lung if lung.mean() >= 0.2 else soft
    return np.full_like(array_ras, np.median(array_ras[kept]))
