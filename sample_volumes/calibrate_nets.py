"""How bright is bright for the shipped nets? `python calibrate_nets.py [NET ...]` writes it.

Fresh scans (seeds that no net was trained on) with and without findings are explained at each
candidate layer. The floor is the density that scans without a finding reach nowhere in 19 of 20
cases (95th percentile of their maxima), but at least 5 % of the peak; the peak is the median of
the strongest density of scans with a finding. Both go into the net's spec.json, for its target,
method and layer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from builder.draws import Pool, draw_pair
from builder.files import write_checksums

import med_gradcam as mg
from med_gradcam.calibration import Calibration
from med_gradcam.errors import CannotExplainError

HERE = Path(__file__).resolve().parent
PAIRS, SEED = 20, 4711
LEAST_FLOOR = 0.05  # of the peak, for nets that stay wholly silent without a finding


def pool_for(modality: str) -> Pool:
    """Backgrounds that are no part of the training or the test."""
    if modality == "CT":
        from builder.pools import chest_pool

        return chest_pool(range(7000, 7006))
    from builder.brain import brain_pool

    return brain_pool(range(7000, 7006))


def scans(pool: Pool, modality: str) -> tuple[list[mg.Volume], list[mg.Volume]]:
    """Scans without and with findings."""
    rng = np.random.default_rng(SEED)
    quiet: list[mg.Volume] = []
    found: list[mg.Volume] = []
    while min(len(quiet), len(found)) < PAIRS:
        pair = draw_pair(pool, rng, plain=True)
        for scan, lesions in zip(pair.scans, pair.present, strict=True):
            grid = mg.Geometry(pair.grid.shape, pair.grid.affine)
            volume = mg.Volume(scan[None].astype(np.float32), grid, modality)
            kinds = {lesion.kind for lesion in lesions}
            (found if kinds & {"core", "rim"} else quiet).append(volume)
    return quiet[:PAIRS], found[:PAIRS]


def strongest(volume: mg.Volume, model: mg.Model, target: str, layer: str) -> tuple[str, float]:
    """The layer's path and the largest density of either polarity, log-odds per mL."""
    path = model.aliases[layer]
    try:
        maps = mg.draw(mg.explain(volume, model, target=target, layer=path))
    except CannotExplainError as error:
        if error.reason != "zero gradient":
            raise
        return path, 0.0  # the scan leaves the network cold
    return path, float(max(maps.raises.values.max(), maps.lowers.values.max()))


def calibrate(name: str) -> list[Calibration]:
    """The scales of one net, one per candidate layer."""
    model = mg.load_model(HERE / "nets" / name)
    modality = model.input.modality or "CT"
    quiet, found = scans(pool_for(modality), modality)
    target = model.labels[-1]
    scales = []
    for alias in model.aliases:
        without = [strongest(v, model, target, alias) for v in quiet]
        strong = [strongest(v, model, target, alias)[1] for v in found]
        floor = float(np.quantile([density for _, density in without], 0.95))
        peak = max(float(np.median(strong)), 1.5 * floor)
        floor = max(floor, LEAST_FLOOR * peak)
        layer = without[0][0]
        count = len(quiet) + len(found)
        scales.append(Calibration(target, "secant", layer, peak, floor, count))
        print(f"{name} {alias}: floor {floor:.3g}, peak {peak:.3g} log-odds per mL", flush=True)
        print("   quiet", np.round(sorted(d for _, d in without), 2).tolist())
        print("   found", np.round(sorted(strong), 2).tolist(), flush=True)
    return scales


def main() -> None:
    """Calibrate the named nets, or all, and write their specs and the checksums."""
    for name in sys.argv[1:] or sorted(p.name for p in (HERE / "nets").iterdir()):
        path = HERE / "nets" / name / "spec.json"
        scales = calibrate(name)
        spec = json.loads(path.read_text())
        spec["calibration"] = [asdict(scale) for scale in scales]
        path.write_text(json.dumps(spec, indent=1) + "\n")
    write_checksums(HERE)


if __name__ == "__main__":
    main()
