"""How does a sample network learn the designed log-odds?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .cases import BASE_LOG_ODDS
from .draws import Pool, draw_pair
from .net_io import RAS, apply_intensity, build_net, log_odds, to_axes, turn_index


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train: maps on cubes cut from scans, then scores on whole scans."""

    seed: int
    cube: int = 40
    cube_steps: int = 1500
    cube_pairs: int = 8
    cube_rate: float = 3e-3
    head_pairs: int = 60
    whole_steps: int = 250
    whole_pairs: int = 3
    whole_rate: float = 2e-4


@dataclass(frozen=True, slots=True)
class Batch:
    """Some scans; the last one is uniform tissue.

    Attributes:
        inputs: (n, 1, i, j, k).
        log_odds: As designed (n).
        lesions: In each scan: kind, centre in network voxels.
        spacing_mm: Along the network's axes.
    """

    inputs: torch.Tensor
    log_odds: torch.Tensor
    lesions: list[list[tuple[str, np.ndarray]]]
    spacing_mm: np.ndarray


def draw_batch(
    pool: Pool, rng: np.random.Generator, pairs: int, spec: dict[str, Any], crop: int | None
) -> Batch:
    """Some pairs of scan and twin, and one uniform scan."""
    axes, steps = spec["input"]["axes"], spec["input"]["intensity"]
    scans, targets, lesions = [], [], []
    for _ in range(pairs):
        pair = draw_pair(pool, rng, crop=crop)
        scans += pair.scans
        targets += pair.log_odds
        for present in pair.present:
            centres = [pair.grid.index_of(np.array(lesion.centre_mm)) for lesion in present]
            turned = [turn_index(centre, pair.grid.shape, axes) for centre in centres]
            kinds = [lesion.kind for lesion in present]
            lesions.append(list(zip(kinds, turned, strict=True)))
    scans.append(pool.uniform(scans[-1], rng))
    targets.append(BASE_LOG_ODDS)
    lesions.append([])
    arrays = [apply_intensity(to_axes(scan, axes), steps) for scan in scans]
    spacing_mm = np.array([pool.grid.spacing_mm[RAS[letter][0]] for letter in axes])
    inputs = torch.from_numpy(np.stack(arrays))[:, None]
    return Batch(inputs, torch.tensor(targets), lesions, spacing_mm)


@dataclass(frozen=True, slots=True)
class Cells:
    """Where the cells of a layer lie, in voxels: cell i has its centre at start + i * jump."""

    start: float = 0.0
    jump: int = 1

    def after(self, layer: nn.Module) -> Cells:
        """The cells of the next layer."""
        if not isinstance(layer, nn.Conv3d | nn.MaxPool3d):
            return self
        kernel, stride, padding = (
            value[0] if isinstance(value, tuple) else value
            for value in (layer.kernel_size, layer.stride, layer.padding)
        )
        return Cells(self.start + ((kernel - 1) / 2 - padding) * self.jump, self.jump * stride)


def map_targets(batch: Batch, cells: Cells, shape: torch.Size) -> torch.Tensor:
    """Where the findings lie: (n, 2, i, j, k), a soft ball of 9 mm around each core and rim."""
    maps = torch.zeros(len(batch.lesions), 2, *shape)
    for scan, members in enumerate(batch.lesions):
        for kind, centre in members:
            if kind == "neutral":
                continue
            offsets = [
                (cells.start + np.arange(shape[axis]) * cells.jump - centre[axis])
                * batch.spacing_mm[axis]
                for axis in range(3)
            ]
            mesh = np.meshgrid(*offsets, indexing="ij", sparse=True)
            ball = np.exp(-sum(offset**2 for offset in mesh) / (2 * 9.0**2))
            maps[scan, ("core", "rim").index(kind)] += torch.from_numpy(ball.astype(np.float32))
    return maps


def train(spec: dict[str, Any], pool: Pool, plan: Plan) -> nn.Sequential:
    """A network that finds the findings (maps on cubes) and scores whole scans as designed."""
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng([19, plan.seed])
    net = build_net(spec["layers"])
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv3d)]
    for layer in convolutions:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    guide = nn.Conv3d(24, 4, 1)
    for layer in (guide, convolutions[-1]):
        nn.init.zeros_(layer.bias)
        with torch.no_grad():
            layer.weight *= 0.3
    learn_maps(net, guide, pool, spec, plan, rng)
    fit_head(net, pool, spec, plan, rng)
    learn_scores(net, guide, pool, spec, plan, rng)
    return net.eval()


def learn_maps(
    net: nn.Sequential,
    guide: nn.Conv3d,
    pool: Pool,
    spec: dict[str, Any],
    plan: Plan,
    rng: np.random.Generator,
) -> None:
    """Teach the maps on cubes, in place; batch statistics are fixed for the last quarter."""
    weights = [*body_of(net).parameters(), *guide.parameters()]
    optimiser = torch.optim.Adam(weights, lr=plan.cube_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, plan.cube_rate, total_steps=plan.cube_steps + 1, pct_start=0.15
    )
    progress = Progress("maps")
    for step in range(plan.cube_steps):
        net.train(step < 0.75 * plan.cube_steps)
        batch = draw_batch(pool, rng, plan.cube_pairs, spec, plan.cube)
        loss = map_loss(net, guide, batch)[0]
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 20.0)
        optimiser.step()
        schedule.step()
        progress.add(float(loss.detach()))


def map_loss(
    net: nn.Sequential, guide: nn.Conv3d, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the maps of the last two resolutions, and the log-odds of the scans."""
    value, cells = batch.inputs, Cells()
    for layer in body_of(net):
        value, cells = layer(value), cells.after(layer)
        if isinstance(layer, nn.Conv3d) and layer.out_channels == 4:
            detector = _near(value, map_targets(batch, cells, value.shape[2:]))
        elif isinstance(layer, nn.ReLU) and value.shape[1] == guide.in_channels:  # the last counts
            middle = _near(guide(value), map_targets(batch, cells, value.shape[2:]))
    return detector + 0.5 * middle, log_odds(head_of(net)(value))


def _near(maps: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Error of maps before their softplus: as wanted at findings, below -0.5 elsewhere."""
    wanted = wanted.repeat_interleave(2, dim=1)
    at = 8.0 * (maps - wanted).square()
    elsewhere = nn.functional.relu(maps + 0.5).square()
    return torch.where(wanted > 0.05, at, elsewhere).sum() / (wanted.sum() + 2)


def fit_head(
    net: nn.Sequential, pool: Pool, spec: dict[str, Any], plan: Plan, rng: np.random.Generator
) -> None:
    """Fit the linear layers to the means of the detector maps over whole scans, in place."""
    net.eval()
    body, head = body_of(net), head_of(net)
    with torch.no_grad():
        batches = [draw_batch(pool, rng, 1, spec, None) for _ in range(plan.head_pairs)]
        means = torch.cat([body(batch.inputs).mean(dim=(2, 3, 4)) for batch in batches])
    targets = torch.cat([batch.log_odds for batch in batches])
    scale = means.std(dim=0) + 1e-6
    optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(1500):
        error = log_odds(head((means / scale)[:, :, None, None, None])) - targets
        loss = nn.functional.huber_loss(error, torch.zeros_like(error))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        next(layer for layer in head if isinstance(layer, nn.Linear)).weight /= scale
    print(f"head: error {float(error.detach().abs().mean()):.3f}", flush=True)


def learn_scores(
    net: nn.Sequential,
    guide: nn.Conv3d,
    pool: Pool,
    spec: dict[str, Any],
    plan: Plan,
    rng: np.random.Generator,
) -> None:
    """Polish all layers on whole scans with the designed log-odds, in place."""
    net.eval()
    first = next(layer for layer in net if isinstance(layer, nn.Linear))
    scale = float(first.weight.detach().abs().mean()) / 0.3
    rest = [value for value in net.parameters() if value is not first.weight]
    groups = [
        {"params": [*rest, *guide.parameters()], "lr": plan.whole_rate},
        {"params": [first.weight], "lr": plan.whole_rate * scale},
    ]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, plan.whole_steps)
    progress = Progress("scores")
    for _ in range(plan.whole_steps):
        batch = draw_batch(pool, rng, plan.whole_pairs, spec, None)
        maps, scores = map_loss(net, guide, batch)
        error = scores - batch.log_odds
        loss = nn.functional.huber_loss(error, torch.zeros_like(error)) + 0.02 * maps
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 20.0)
        optimiser.step()
        schedule.step()
        progress.add(float(error.detach().abs().mean()))


def body_of(net: nn.Sequential) -> nn.Sequential:
    """The layers up to the mean over all cells."""
    return net[: _pooling_index(net)]


def head_of(net: nn.Sequential) -> nn.Sequential:
    """The mean over all cells and what follows."""
    return net[_pooling_index(net) :]


def _pooling_index(net: nn.Sequential) -> int:
    return next(i for i, layer in enumerate(net) if isinstance(layer, nn.AdaptiveAvgPool3d))


class Progress:
    """Prints the mean of a figure now and then."""

    def __init__(self, name: str) -> None:
        self.name, self.values, self.started = name, [], time.monotonic()

    def add(self, value: float) -> None:
        """Take one value; print every 50."""
        self.values.append(value)
        if len(self.values) % 50 == 0:
            spent = time.monotonic() - self.started
            recent = float(np.mean(self.values[-50:]))
            print(f"{self.name} {len(self.values):4d}  {recent:.3f}  {spent:.0f} s", flush=True)
