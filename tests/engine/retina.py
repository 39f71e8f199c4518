"""A small RetinaNet of MONAI, its detector, and scans with bright balls for it to find."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from med_gradcam.geometry import Geometry
from med_gradcam.volume import Volume
from tests.tiny import affine_of

Floats = npt.NDArray[np.float32]
SIZE = 32
SHAPES = ((6, 6, 6), (8, 4, 6), (4, 8, 8))
SCALES = (1, 2)


def parts() -> Any:
    """MONAI's modules for detection; a test that needs them is skipped without MONAI."""
    pytest.importorskip("monai")
    from monai.apps.detection.networks import retinanet_detector, retinanet_network
    from monai.apps.detection.utils import anchor_utils
    from monai.networks.blocks import feature_pyramid_network

    return retinanet_network, retinanet_detector, anchor_utils, feature_pyramid_network


class Pyramid(nn.Module):
    """Two levels, at a half and at a quarter of the resolution, joined by an FPN."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv3d(8, 16, 3, 2, 1), nn.ReLU())
        self.fpn = parts()[3].FeaturePyramidNetwork(3, [8, 16], 8)

    def forward(self, x: torch.Tensor) -> Any:
        fine = self.stem(x)
        return self.fpn(OrderedDict(fine=fine, coarse=self.deep(fine)))


def bare(classes: int = 2, seed: int = 0, *, listed: bool = False) -> Any:
    """A RetinaNet with random weights that scores some anchors high."""
    torch.manual_seed(seed)
    net = parts()[0].RetinaNet(
        3, classes, len(SHAPES), Pyramid(), size_divisible=4, use_list_output=listed
    )
    for head in (net.classification_head.conv, net.regression_head.conv):
        for module in head:
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
    nn.init.normal_(net.classification_head.cls_logits.weight, std=0.3)
    nn.init.normal_(net.regression_head.bbox_reg.weight, std=0.1)
    nn.init.constant_(net.classification_head.cls_logits.bias, -1.0)
    return net.eval()


def generator() -> Any:
    return parts()[2].AnchorGeneratorWithAnchorShape(SCALES, SHAPES)


def retina(net: Any, **settings: Any) -> Any:
    """MONAI's detector around a network."""
    made = parts()[1].RetinaNetDetector(net, generator())
    made.set_box_selector_parameters(**{"score_thresh": 0.3, "nms_thresh": 0.2, **settings})
    return made.eval()


def noise(shape: tuple[int, int, int] = (30, 26, 24), seed: int = 0) -> Floats:
    """Uniform noise, of sides that are no multiples of 4."""
    return np.random.default_rng(seed).random((1, *shape), dtype=np.float32)


def oblique_scan(seed: int = 0) -> Volume:
    """Noise stored as PIR, in voxels of 1.5 x 1 x 2 mm."""
    array = noise(seed=seed)
    grid = Geometry((30, 26, 24), affine_of("PIR", (1.5, 1.0, 2.0), (20, 30, 40)))
    return Volume(array, grid)


# ---------------------------------------------------------------------------------- planted truth


def balls(seed: int, count: int = 2) -> tuple[Floats, list[tuple[float, ...]]]:
    """Noise (1, i, j, k) with bright balls, and the corners of a box around each, in voxels."""
    random = np.random.default_rng(seed)
    array = 0.15 * random.standard_normal((SIZE,) * 3)
    at = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"))
    boxes: list[tuple[float, ...]] = []
    centres: list[Any] = []
    while len(boxes) < count:
        radius, centre = random.uniform(2.5, 4.0), random.uniform(6, SIZE - 6, 3)
        if any(np.linalg.norm(centre - other) < 12 for other in centres):
            continue
        centres.append(centre)
        array[((at - centre[:, None, None, None]) ** 2).sum(0) <= radius**2] += 1.0
        boxes.append((*(centre - radius), *(centre + radius)))
    return array[None].astype(np.float32), boxes


def loss_of(made: Any, array: Floats, boxes: Any) -> torch.Tensor:
    """Cross entropy over the anchors, and how far the boxes of those on a ball are off."""
    x = torch.from_numpy(array)[None]
    out = made.network(x)
    logits = made._reshape_maps(out["classification"])[0][:, 0]
    codes = made._reshape_maps(out["box_regression"])[0]
    anchors = made.anchor_generator(x, out["classification"])[0]
    truth = torch.tensor(boxes).float()
    overlap = made.box_overlap_metric(anchors, truth)
    best, which = overlap.max(dim=1)
    on = (best > 0.35) | (overlap == overlap.max(dim=0).values).any(dim=1)
    far = best < 0.2
    wanted = made.box_coder.encode_single(truth[which[on]], anchors[on])
    cross = nn.functional.binary_cross_entropy_with_logits
    hard = logits[far].topk(60).values
    scored = cross(logits[on], torch.ones(int(on.sum()))) + cross(hard, torch.zeros(60))
    return scored + nn.functional.smooth_l1_loss(codes[on], wanted)


@cache
def trained(steps: int = 300) -> Any:
    """A detector of one class that has seen `steps` scans with balls (its own loss, no matcher)."""
    torch.manual_seed(0)
    net = parts()[0].RetinaNet(3, 1, 1, Pyramid(), size_divisible=4)
    shapes = parts()[2].AnchorGeneratorWithAnchorShape(SCALES, ((6, 6, 6),))
    made = parts()[1].RetinaNetDetector(net, shapes)
    made.set_box_selector_parameters(score_thresh=0.3, nms_thresh=0.1)
    optimiser = torch.optim.Adam(made.network.parameters(), 3e-3)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(made, *balls(step)).backward()
        optimiser.step()
    return made.eval()
