"""A small InstanceNorm U-Net of an nnU-Net plan, trained on rendered lesions, as a result folder.

Spiculated nodules (class lesion) beside smooth ones (class organ) in lung: only the surroundings
tell which. `python -m tests.models.nnunet_trained` prints the causal slope of each layer.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from med_gradcam import outcome
from med_gradcam.capture import outputs
from med_gradcam.engine import explain
from med_gradcam.explanation import LayerTrial
from med_gradcam.loading import load_model, read
from med_gradcam.metrics import causal
from med_gradcam.model import Model
from med_gradcam.opening import opened
from med_gradcam.volume import Volume
from sample_volumes.builder.findings import (
    CT_MATERIALS,
    Lesion,
    lesion_shares,
    paint_lesion,
    random_lesion,
)
from sample_volumes.builder.grid import Grid
from tests.models import nnunet_folder as files
from tests.tiny import rotation

TRAINING = Grid((36, 36, 16), (2.0, 2.0, 4.0), (0.0, 0.0, 0.0))
SCAN = Grid((42, 44, 19), (1.7, 1.6, 3.4), (-30.0, 12.0, 55.0))
CT = {"mean": -700.0, "std": 250.0, "percentile_00_5": -1000.0, "percentile_99_5": 200.0}
ARCHITECTURE = {"features_per_stage": [8, 16, 24], "n_conv_per_stage": [2, 2, 2]}
SCALE = 0.75
STEPS = 500
LAYERS = (
    "@input",
    "encoder.stages.0.0.convs.0",
    "encoder.stages.0",
    "encoder.stages.0+encoder.stages.1",
    "encoder.stages.0+encoder.stages.1+encoder.stages.2",
    "encoder.stages.0+decoder.stages.0",
    "decoder.stages.1.convs.0",
)

Floats = npt.NDArray[np.float32]


def render(grid: Grid, seed: int) -> tuple[Floats, Floats]:
    """A scan in HU and the share of lesion and of organ in each voxel (2, r, a, s)."""
    rng = np.random.default_rng([91, seed])
    volume = np.full(grid.shape, -820.0, np.float32)
    shares = np.zeros((2, *grid.shape), np.float32)
    reach = np.array(grid.shape) * grid.spacing_mm / 2
    done: list[Lesion] = []
    for kind in ("core", "neutral", "neutral"):
        for _ in range(60):
            sized = random_lesion(kind, np.zeros(3), rng, SCALE)
            room = np.maximum(reach - 0.8 * sized.outer_mm, 1)
            place = rng.uniform(-1, 1, 3) * room
            lesion = Lesion(kind, tuple(place), sized.radius_mm, sized.outer_mm, sized.seed)
            apart = [
                np.linalg.norm(place - other.centre_mm) - lesion.outer_mm - other.outer_mm
                for other in done
            ]
            if min(apart, default=1.0) > 0:
                break
        else:
            continue
        done.append(lesion)
        slices, nodule, _ = lesion_shares(grid, lesion)
        shares[(int(kind != "core"), *slices)] = nodule
        paint_lesion(volume, grid, lesion, CT_MATERIALS)
    noise = rng.normal(0, rng.uniform(10, 30), grid.shape)
    return (volume + noise).astype(np.float32), shares


def _batch(seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    scans, marks = [], []
    for seed in seeds:
        volume, shares = render(TRAINING, seed)
        known = np.clip(volume, CT["percentile_00_5"], CT["percentile_99_5"])
        scans.append(((known - CT["mean"]) / CT["std"]).transpose(2, 1, 0)[None])
        label = np.where(shares[0] > 0.5, 1, np.where(shares[1] > 0.5, 2, 0))
        marks.append(label.transpose(2, 1, 0))
    x = torch.tensor(np.stack(scans), dtype=torch.float32)
    return x, torch.tensor(np.stack(marks)).long()


def trained(steps: int = STEPS) -> torch.nn.Module:
    """The network, after cross-entropy and Dice as nnU-Net trains; about a minute on one core."""
    entry = files.architecture("PlainConvUNet", **ARCHITECTURE)
    net: Any = files.real_network(entry, 1, 3, 1).train()
    net.decoder.deep_supervision = False
    best = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(best, 4e-3, steps)
    pool = [_batch([seed]) for seed in range(120)]
    order = np.random.default_rng(2)
    for _ in range(steps):
        picked = order.choice(len(pool), 2, replace=False)
        x = torch.cat([pool[n][0] for n in picked])
        mark = torch.cat([pool[n][1] for n in picked])
        flips = [a + 2 for a in range(3) if order.random() < 0.5]
        x, mark = x.flip(flips), mark.flip([f - 1 for f in flips])
        logits = net(x)
        share, truth = logits.softmax(1), functional.one_hot(mark, 3).movedim(-1, 1).float()
        both = (share * truth).sum((0, 2, 3, 4))
        dice = 2 * both / (share + truth).sum((0, 2, 3, 4)).clamp_min(1e-3)
        weights = torch.tensor([1.0, 8.0, 8.0])
        loss = functional.cross_entropy(logits, mark, weights) - dice[1:].mean()
        best.zero_grad()
        loss.backward()
        best.step()
        plan.step()
    net.decoder.deep_supervision = True
    return net.eval()  # type: ignore[no-any-return]


def dice(model: Model, seed: int) -> float:
    """Overlap of lesion, as nnU-Net would deliver it, with the truth of an unseen scan."""
    x, mark = _batch([seed])
    with torch.inference_mode():
        found = model.net(x).argmax(1) == 1
    truth = mark == 1
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp_min(1))


def folder(where: Path, steps: int = STEPS) -> Path:
    """The trained network as a result folder of nnU-Net."""
    plan = files.plans(
        spacing=[4.0, 2.0, 2.0],
        patch_size=[16, 36, 36],
        architecture=files.architecture("PlainConvUNet", **ARCHITECTURE),
    )
    plan["foreground_intensity_properties_per_channel"] = {"0": CT}
    return files.write(where, [trained(steps)], plan)


def scan(where: Path, seed: int = 1000) -> tuple[Volume, Floats]:
    """An unseen scan on other voxels, oblique, as a NIfTI; and the shares of its findings."""
    volume, shares = render(SCAN, seed)
    affine = np.eye(4)
    affine[:3, :3] = rotation(6, -9, 13) @ np.diag(SCAN.spacing_mm)
    affine[:3, 3] = SCAN.origin_ras_mm
    path = where / f"scan_{seed}.nii.gz"
    nib.save(nib.Nifti1Image(volume, affine), path)
    return read(path), shares


def slopes(
    model: Model, volume: Volume, target: str = "lesion", layers: Sequence[str] = LAYERS
) -> list[tuple[LayerTrial, str, float | None]]:
    """Causal slope and r of each layer over the same regions; its status and what is past it."""
    made = [explain(volume, model, target=target, layer=layer) for layer in layers]
    with opened(volume, model, {"target": target}) as case:
        x, traced = case.traced()
        background = case.background(traced)
        net, chosen = case.model.net, made[0].target

        def score(array: Floats) -> float:
            return float(chosen(outputs(net, case.tensor(array)))[0])

        here = float(chosen(outputs(net, x))[0])
        maps = [
            causal.CandidateMap(layer, e.evidence.astype(np.float64), e.grid)
            for layer, e in zip(layers, made, strict=True)
        ]
        choice = causal.choose(
            maps, case.prepared, background, (score, here, outcome.least(chosen)), 0
        )
    return [(t, e.status, e.bypassed) for t, e in zip(choice.trials, made, strict=True)]


def main() -> None:
    say = sys.stdout.write
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        model = load_model(folder(Path(place)))
        say(f"trained in {time.perf_counter() - started:.0f} s\n")
        say(f"Dice {[round(dice(model, seed), 2) for seed in range(1000, 1006)]}\n")
        for seed in (1000, 1001, 1002):
            volume, _ = scan(Path(place), seed)
            e = explain(volume, model, target="lesion")
            say(f"{seed} auto: {e.layer}, {e.score:.2f} from {e.reference_score:.2f}\n")
            for trial, status, past in slopes(model, volume):
                slope, r = (f"{n:.2f}" if n is not None else "-" for n in (trial.slope, trial.r))
                say(f"| {trial.layer} | {slope} | {r} | {status} | {past} |\n")


if __name__ == "__main__":
    main()
