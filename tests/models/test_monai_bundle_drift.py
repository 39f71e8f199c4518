"""Is our input for a bundle the one that MONAI's own transforms make of the same file?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from med_gradcam import drift, engine
from med_gradcam.errors import ModelError
from med_gradcam.loading import load_model, read
from med_gradcam.model import Ready
from med_gradcam.models import _bundle_stages
from med_gradcam.prepare import prepare
from tests.models.bundles import CT, FIRST, LOAD, RAS, TYPE, scan, spacing, t, unet

pytest.importorskip("monai")

SCALED = t("ScaleIntensityRanged", a_min=-200, a_max=200, b_min=-1, b_max=1)
D8 = t("DivisiblePadd", k=8)
ANY = [LOAD, FIRST, RAS]

PIPELINES: dict[str, list[dict[str, Any]]] = {
    "ct": [*CT, D8],
    "coarser": [*ANY, spacing(4, 2.5, 3.0), SCALED, D8],
    "finer": [*ANY, spacing(1, 0.8, 1.5), SCALED, D8],
    "one number": [*ANY, spacing(2.0), SCALED, D8],
    "one axis kept": [*ANY, spacing(-1, 2, 2), SCALED, D8],
    "cubic": [*ANY, spacing(1.5, 1.5, 2, mode=3), SCALED, D8],
    "file's own axes": [LOAD, FIRST, spacing(1.5, 1.5, 2), SCALED, D8],
    "other axes": [LOAD, FIRST, t("Orientationd", axcodes="PSR"), spacing(2, 2, 2.5), SCALED, D8],
    "range": [LOAD, FIRST, t("ScaleIntensityd", minv=-1.0, maxv=1.0), D8],
    "factor": [LOAD, FIRST, t("ScaleIntensityd", minv=None, maxv=None, factor=-0.9), D8],
    "nonzero": [LOAD, FIRST, t("ThresholdIntensityd", threshold=0.0),
                t("NormalizeIntensityd", nonzero=True, channel_wise=True), D8],
    "given mean": [LOAD, FIRST, t("NormalizeIntensityd", subtrahend=12.5, divisor=80.0), D8],
    "percentiles": [LOAD, FIRST, t("ScaleIntensityRangePercentilesd", lower=1, upper=99,
                                   b_min=-1.0, b_max=1.0, clip=True), D8],
    "relative": [LOAD, FIRST, t("ScaleIntensityRangePercentilesd", lower=5, upper=90,
                                b_min=0.0, b_max=1.0, relative=True, channel_wise=True), D8],
    "threshold": [LOAD, FIRST, t("ThresholdIntensityd", threshold=90, above=False, cval=90.0),
                  t("ScaleIntensityd"), D8],
    "intensity first": [LOAD, FIRST, t("NormalizeIntensityd"), RAS, spacing(1.5, 1.5, 2), D8],
    "crop and pad": [*CT[:-1], t("CropForegroundd", source_key="image", margin=2, k_divisible=4),
                     t("SpatialPadd", spatial_size=[32, 32, 16])],
    "crop, smaller": [*ANY, SCALED, t("CropForegroundd", source_key="image", margin=[3, 2, 9],
                                      select_fn="$lambda x: x > 0.2", allow_smaller=True), D8],
    "resized": [*ANY, t("Resized", spatial_size=[16, 24, 16], mode="trilinear"), SCALED],
    "area": [*ANY, t("Resized", spatial_size=[16, 24, 16]), SCALED],
    "nearest": [*ANY, t("Resized", spatial_size=[16, 32, 16], mode="nearest"), SCALED],
    "corners": [*ANY, t("Resized", spatial_size=[16, 32, 16], mode="trilinear",
                        align_corners=True), SCALED],
    "pad or crop": [*ANY, t("ResizeWithPadOrCropd", spatial_size=[24, 32, 16]), SCALED],
    "centre": [*ANY, t("CenterSpatialCropd", roi_size=[16, -1, 8]), SCALED, D8],
    "pad at the end": [*ANY, t("SpatialPadd", spatial_size=[32, 32, 16], method="end",
                               mode="edge"), SCALED],
    "shift": [LOAD, FIRST, t("ShiftIntensityd", offset=40.0), SCALED, D8],
    "whole body": [LOAD, TYPE, *ANY[1:], spacing(1.5, 1.5, 1.5),
                   t("NormalizeIntensityd", nonzero=True), t("ScaleIntensityd", minv=-1.0), D8],
}  # fmt: skip


@pytest.mark.parametrize("turn", [(0.0, 0.0, 0.0), (4.0, -3.0, 6.0)])
@pytest.mark.parametrize("name", PIPELINES)
def test_our_input_is_monais(tmp_path: Path, name: str, turn: tuple[float, float, float]) -> None:
    folder, _ = unet(tmp_path / "b", PIPELINES[name])
    path = scan(tmp_path / "scan.nii.gz", "SRP" if "axes" not in name else "LPS", turn)
    model = load_model(folder)
    assert model.drift == ()
    scans = read(path)
    prepared = prepare(scans, model)
    assert model.source_input is not None
    theirs, affine = model.source_input(scans.source.paths)
    assert prepared.network_input().shape == theirs.shape
    assert prepared.network_input() == pytest.approx(theirs, abs=2e-5)
    assert prepared.grid.affine == pytest.approx(affine, abs=1e-4)
    assert drift.drift(str(folder), str(path)) <= 1e-4


def test_a_patch_is_compared_where_it_lies(tmp_path: Path) -> None:
    windows = {"_target_": "SlidingWindowInferer", "roi_size": [32, 16, 16]}
    folder, _ = unet(tmp_path / "b", inferer=windows)
    path = scan(tmp_path / "scan.nii.gz")
    assert drift.drift(str(folder), str(path), "ijk:20,10,5") <= 1e-5


def test_a_difference_is_refused_and_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = unet(tmp_path / "b", [*CT, D8])
    path = scan(tmp_path / "scan.nii.gz")
    right = _bundle_stages.Fixed.__call__

    def wrong(self: Any, view: Any, affine: Any) -> Any:
        made = right(self, view, affine)
        return replace(made, now=made.now * np.float32(1.01))

    monkeypatch.setattr(_bundle_stages.Fixed, "__call__", wrong)
    model, scans = load_model(folder), read(path)
    given: dict[str, Any] = {"target": "spleen", "layer": "model.0", "method": "gradcam"}
    with pytest.raises(ModelError, match=r"its outputs differ by 0\.0.*pass --accept-drift"):
        engine.explain(scans, model, **given)
    found = engine.explain(scans, model, **given, accept_drift=True)
    assert any("accepted: its outputs differ" in note for note in found.provenance.notes)
    # voxels that are not the file's any more are not compared with it
    other = replace(scans, array=scans.array + 1)
    engine.explain(other, model, **given)


def test_voxels_that_lie_elsewhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from med_gradcam.models._bundle_transforms import Pipeline

    folder, _ = unet(tmp_path / "b", [*CT, D8])
    right = Pipeline.__call__

    def wrong(self: Any, array: Any, mm: Any) -> Ready:
        made = right(self, array, mm)
        return replace(made, start=(made.start[0] + 0.5, *made.start[1:]))

    monkeypatch.setattr(Pipeline, "__call__", wrong)
    scans = read(scan(tmp_path / "scan.nii.gz"))
    with pytest.raises(ModelError, match="its voxels lie elsewhere than ours"):
        engine.explain(scans, load_model(folder), layer="model.0", method="gradcam")


def test_a_volume_from_no_file_is_taken_as_it_is(tmp_path: Path) -> None:
    folder, _ = unet(tmp_path / "b", [LOAD, FIRST, SCALED, D8])
    array = np.random.default_rng(0).normal(0, 90, (16, 16, 16)).astype(np.float32)
    found = engine.explain(
        array, load_model(folder), target="spleen", layer="model.0", method="gradcam"
    )
    assert any("not compared with the model's own" in note for note in found.provenance.notes)
