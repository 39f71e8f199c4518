"""Which command trains the sample networks? `python train_nets.py [NAME ...]` writes them here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from builder.architectures import pooled_layers, strided_layers
from builder.brain import BRAIN_GRID, brain_pool
from builder.chest import CHEST_GRID
from builder.evaluation import accuracy
from builder.files import write_checksums
from builder.grid import Grid
from builder.net_io import RAS, save_net
from builder.pools import chest_pool
from builder.training import Plan, train

HERE = Path(__file__).resolve().parent
TRAIN_SEEDS, HELD_OUT_SEEDS = range(100, 260), range(5000, 5040)
HELD_OUT_PAIRS = 100

CT_STEPS = [["clip", -1000, 400], ["normalise", [-500.0], [400.0]]]
MR_STEPS = [["clip", 0, 1200], ["normalise", [450.0], [250.0]]]
TRAINING = (
    "Rendered scans only, never real patients. Huber regression of the log-odds on "
    "-1 + 3.5 (spiculated core) - 3 (rim), smooth nodules neutral, with uniform-tissue scans, "
    "and scans with boxes of uniform tissue, at the value of what is left. The maps of the last "
    "two resolutions were guided by the planted places, so healthy tissue is quiet."
)


@dataclass(frozen=True, slots=True)
class NetPlan:
    """What one sample network is and how it is trained."""

    name: str
    title: str
    modality: str
    axes: str
    link: str
    labels: tuple[str, ...]
    norm: str
    plan: Plan


NETS = (
    NetPlan("ct_nodule", "Chest CT nodule, malignant or benign", "CT", "SPL", "softmax",
            ("benign", "malignant"), "BatchNorm3d", Plan(seed=1)),
    NetPlan("mr_lesion", "Head MR lesion, tumour", "MR", "LPS", "sigmoid",
            ("tumour",), "BatchNorm3d", Plan(seed=2)),
    NetPlan("ct_nodule_instnorm", "Chest CT nodule with InstanceNorm", "CT", "SPL", "softmax",
            ("benign", "malignant"), "InstanceNorm3d", Plan(seed=3)),
)  # fmt: skip


def spec_of(net: NetPlan, grid: Grid) -> dict[str, Any]:
    """The spec.json of a network, without its accuracy."""
    outputs = len(net.labels)
    pooled = net.modality == "MR"
    layers, aliases = pooled_layers(outputs) if pooled else strided_layers(net.norm, outputs)
    order = [RAS[letter][0] for letter in net.axes]
    return {
        "format": "med-gradcam-model/1",
        "name": net.title,
        "task": "classification",
        "labels": list(net.labels),
        "link": net.link,
        "input": {
            "modality": net.modality,
            "axes": net.axes,
            "channels": 1,
            "patch": [grid.shape[axis] for axis in order],
            "spacing_mm": [grid.spacing_mm[axis] for axis in order],
            "intensity": CT_STEPS if net.modality == "CT" else MR_STEPS,
        },
        "input_in_words": "the whole sample scan, "
        + ("HU clipped to [-1000,400]" if net.modality == "CT" else "a.u. clipped to [0,1200]")
        + ", fixed mean and standard deviation",
        "source": "med_gradcam sample_volumes/train_nets.py",
        "licence": "Apache-2.0",
        "cam_layers": aliases,
        "training": TRAINING,
        "training_plan": asdict(net.plan),
        "layers": layers,
    }


def build(net: NetPlan) -> None:
    """Train, measure and write one network."""
    is_ct = net.modality == "CT"
    make_pool, grid = (chest_pool, CHEST_GRID) if is_ct else (brain_pool, BRAIN_GRID)
    spec = spec_of(net, grid)
    trained = train(spec, make_pool(TRAIN_SEEDS), net.plan)
    spec["accuracy"] = accuracy(trained, spec, make_pool(HELD_OUT_SEEDS), HELD_OUT_PAIRS, 1)
    spec["layers"] = spec.pop("layers")  # last, as it is long
    save_net(HERE / "nets" / net.name, trained, spec)
    print(net.name, json.dumps(spec["accuracy"], indent=1), flush=True)


def main() -> None:
    """Train what was asked for, or everything."""
    torch.set_num_threads(1)  # the same sums in the same order everywhere
    torch.use_deterministic_algorithms(mode=True)
    wanted = sys.argv[1:] or [net.name for net in NETS]
    for net in NETS:
        if net.name in wanted:
            build(net)
    write_checksums(HERE)


if __name__ == "__main__":
    main()
