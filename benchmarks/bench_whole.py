"""What does explaining a whole volume by windows cost, and what does it find on real scans?

Needs MED_GRADCAM_REAL_DATA (mr_brain_t1, ct_chest_c3n00247, nets/meshnet_18class and
nets/luna_nodule_cls). `brain`: the brain stem of the MR of 256^3 voxels by windows of 96^3, one run
of all windows, then the map of each method and layer from the same outputs; `stem`: the same where
a mask says where the brain stem is, so that only the windows that touch it are run. `lung`: the
chest CT scanned with the nodule network, whole and within the lungs. Peak memory is that of this
process. Run it from the repository: python -m benchmarks.bench_whole brain|stem|lung
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
import torch

import med_gradcam as mg
from benchmarks import real_ct
from med_gradcam.maps import draw
from med_gradcam.prepare import prepare
from med_gradcam.whole_windows import Runs

STEM = "Brain-Stem"
# Layer 15 is the last but one convolution's, 9 the fifth's: 3 and 19 voxels to see behind them.
BRAIN = [
    ("15", "hirescam"), ("15", "gradcam"), ("15", "secant"), ("15", "integrated"),
    ("9", "hirescam"), ("9", "gradcam"), ("9", "secant"),
]  # fmt: skip


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def remembered(folder: Path) -> None:
    """Windows that were run once answer from disk: for several methods on one scan."""
    real = Runs.outputs

    def outputs(self: Runs, wanted: Sequence[int], whole: Any, told: Any) -> Iterator[Any]:
        kind = "scan" if whole is None else "reference"
        for n in wanted:
            path = folder / f"{kind}{n}.npy"
            if not path.exists():
                ((_, out),) = real(self, [n], whole, told)
                np.save(path, out.numpy())
            yield n, torch.from_numpy(np.load(path))

    Runs.outputs = outputs  # type: ignore[method-assign]


def brain(*, given: bool = False) -> None:
    """The brain stem over the whole head, one row per layer and method."""
    home = real_ct.folder()
    volume = mg.read(home / "mr_brain_t1" / "t1_crop.nii.gz")
    model = mg.load_model(home / "nets" / "meshnet_18class")
    silver = mg.read(home / "mr_brain_t1" / "t1_crop_meshnet18.nii.gz")
    with tempfile.TemporaryDirectory() as folder:
        remembered(Path(folder))
        inside: npt.NDArray[np.bool_] | None = None
        target: Any = STEM
        if given:
            inside = np.asarray(silver.array[0] == model.labels.index(STEM))
            target = (STEM, mg.Volume(inside[None].astype(np.float32), silver.grid))
        for layer, method in BRAIN:
            began = time.perf_counter()
            w = mg.explain_whole(
                volume, model, target=target, window=(96, 96, 96), overlap=0.25, layer=layer,
                method=method, keep_output=inside is None,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            if w.output is not None:
                inside = w.output.argmax(0) == model.labels.index(STEM)
                inside = _on_scan(inside, w.grid, volume.grid)
            assert inside is not None
            raises = draw(w.explanation).raises.values
            share = float(raises[inside].sum() / raises.sum())
            row = {
                "layer": layer, "method": w.explanation.method, "share_inside": round(share, 4),
                "chance": round(float(inside.mean()), 5), "score": w.explanation.score,
                "reference_score": w.explanation.reference_score, "residual": w.residual,
                "windows": len(w.windows), "explained": w.explained,
                "seconds_per_window": w.seconds, "seconds": round(seconds, 1),
                "peak_gib": round(peak_gib(), 2),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def _on_scan(inside: Any, grid: mg.Geometry, image: mg.Geometry) -> npt.NDArray[np.bool_]:
    """A mask on the network's grid at the voxels of the scan, whose axes only lie otherwise."""
    index = np.moveaxis(np.indices(image.shape), 0, -1).reshape(-1, 3)
    step = np.linalg.inv(grid.affine) @ image.affine
    at = np.rint(index @ step[:3, :3].T + step[:3, 3]).astype(int)
    return np.asarray(inside[tuple(at.T)]).reshape(image.shape)


# -------------------------------------------------------------------------------------- the lung


def lungs(volume: mg.Volume) -> mg.Volume:
    """The lungs with what lies in them: dark parts that do not reach the edge, closed by 10 mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array[0].astype(np.float32).T))
    image.SetSpacing(volume.grid.spacing_mm)
    dark = sitk.DiscreteGaussian(image, 4.0) < -500
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(dark), 100_000)
    array = sitk.GetArrayFromImage(parts)
    edge = {*array[:, 0].ravel(), *array[:, -1].ravel(), *array[:, :, 0].ravel()}
    edge |= set(array[:, :, -1].ravel())
    kept = np.isin(array, list(edge | {0}), invert=True).astype(np.uint8)
    spacing = volume.grid.spacing_mm
    radius = [round(10 / s) for s in spacing]
    closed = sitk.BinaryMorphologicalClosing(sitk.GetImageFromArray(kept), radius)
    mask = sitk.GetArrayFromImage(closed).T[None]
    return mg.Volume(np.ascontiguousarray(mask), volume.grid)


def plain(volume: mg.Volume, model: mg.Model, count: int = 300) -> float:
    """Seconds of a plain prediction of one window."""
    x = torch.from_numpy(prepare(volume, model, real_ct.at("primary")).network_input())[None]
    with torch.no_grad():
        model.net(x)
        began = time.perf_counter()
        for _ in range(count):
            model.net(x)
    return (time.perf_counter() - began) / count


def lung() -> None:
    """The chest CT, whole and within the lungs, and which lesions are among the candidates."""
    volume, model = real_ct.scan_and_net()
    mask = lungs(volume)
    print(f"lungs: {float(mask.array.mean()):.3f} of the volume")
    for within, overlap in ((None, 0.5), (mask, 0.5), (mask, 0.75)):
        before = plain(volume, model)
        began = time.perf_counter()
        w = mg.explain_whole(
            volume, model, target="nodule", overlap=overlap, within=within, layer="block2", most=20
        )
        seconds = time.perf_counter() - began
        after = plain(volume, model)
        reach = np.array(w.window) * np.array(w.grid.spacing_mm) / 2
        print(
            f"within {within is not None}, overlap {overlap}: {len(w.windows)} windows, "
            f"{w.skipped} not run, score {w.explanation.score:.3f} against "
            f"{w.explanation.reference_score:.3f}, net {w.net:.3f}, residual {w.residual:.1g}, "
            f"{seconds:.1f} s, run {w.seconds[0] * 1000:.1f} ms, plain {before * 1000:.1f} and "
            f"{after * 1000:.1f} ms, explain {w.seconds[1] * 1000:.0f} ms, {peak_gib():.2f} GiB"
        )
        for n, c in enumerate(w.candidates, start=1):
            there = ", ".join(lesions(c, volume, w, reach)) or "no listed lesion"
            print(f"  {n}: {c.words}, score {c.score:+.2f}, {there}", flush=True)


def lesions(c: Any, volume: mg.Volume, w: mg.Whole, reach: Any) -> list[str]:
    """The listed lesions within half a window of a candidate, along the network's axes."""
    turn = np.linalg.inv(w.grid.affine[:3, :3] / np.array(w.grid.spacing_mm))
    found = []
    for name, (index, _) in real_ct.LESIONS.items():
        apart = np.abs(turn @ (volume.grid.world_ras(index) - np.array(c.centre_ras_mm)))
        if (apart < reach).all():
            found.append(name)
    return found


if __name__ == "__main__":
    runs = {"brain": brain, "stem": lambda: brain(given=True), "lung": lung}
    runs[sys.argv[1]]()
