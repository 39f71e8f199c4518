"""Does a result folder of nnU-Net v2 that cannot work say so before anything is run?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import med_gradcam as mg
from med_gradcam import inspection
from med_gradcam.cli import main
from med_gradcam.errors import ImageError, ModelError
from med_gradcam.loading import load_model
from med_gradcam.models import nnunet
from med_gradcam.models._nnunet_recipe import Channel, NnunetRecipe
from tests.models import nnunet_folder as files


@pytest.mark.parametrize("gone", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("place", ["", "fold_0", ".."])
def test_the_missing_file_is_named(tmp_path: Path, gone: str, place: str) -> None:
    root = files.write(tmp_path / "Dataset900", files.nets())
    (root / gone).unlink()
    with pytest.raises(ModelError, match=rf"in '{files.TRAINED}', found no {gone}; copy"):
        load_model((root / place).resolve())


def test_folds_alone_are_nnunets(tmp_path: Path) -> None:
    root = files.write(tmp_path, files.nets())
    for name in ("plans.json", "dataset.json"):
        (root / name).unlink()
    with pytest.raises(ModelError, match=r"found no plans\.json and no dataset\.json"):
        load_model(root)
    (root / "fold_0" / "checkpoint_final.pth").unlink()
    assert not nnunet.sniff(str(root))
    assert not nnunet.sniff(str(root / "fold_0"))


@pytest.mark.parametrize("patch", [[12, 28, 30], [11, 28, 28], [12, 28, "28"], [12, 28, 28.5]])
def test_a_patch_that_the_strides_do_not_divide(tmp_path: Path, patch: list[object]) -> None:
    plan = files.plans(patch_size=patch)
    root = files.write(tmp_path, files.nets(), plan)
    with pytest.raises(
        ModelError, match=r"the product of the strides, \[2, 4, 4\], divides .* got"
    ):
        load_model(root)


@pytest.mark.parametrize(
    "spacing", [(1e-6, 1e-6, 1e-6), (1e-7, 1e6, 1e6), (1e-320, 1.0, 1.0), (1e-9, 1e9, 1.0)]
)
def test_voxels_too_small_for_any_memory(spacing: tuple[float, float, float]) -> None:
    recipe = NnunetRecipe((Channel("NoNormalization"),), spacing)
    array = np.ones((1, 4, 5, 6), np.float32)
    with pytest.raises(ImageError, match=r"at most 2,000,000,000 numbers .* check the spacing"):
        recipe(array, (1.0, 1.0, 1.0))


def test_no_resampling_needs_no_bound() -> None:
    recipe = NnunetRecipe((Channel("NoNormalization"),), (1e-6, 1e-6, 1e-6), resample=False)
    assert recipe(np.ones((1, 4, 5, 6), np.float32), (1.0, 1.0, 1.0)).raw.shape == (1, 4, 5, 6)


def test_a_tiny_spacing_is_refused_by_explain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = files.write(tmp_path / "net", files.nets(), files.plans(spacing=[1e-6, 1e-6, 1e-6]))
    scan = files.scan(tmp_path / "scan.nii.gz")
    asked = ["--model", str(root), "--target", "lesion", "-o", str(tmp_path / "out")]
    assert main(["explain", str(scan), *asked]) != 0
    assert "at most 2,000,000,000 numbers" in capsys.readouterr().err


def test_inspect_shows_the_layers_that_explain_takes(tmp_path: Path) -> None:
    model = load_model(files.write(tmp_path, files.nets(2)))
    report = mg.inspect(model, every=True)
    one = mg.inspect(load_model(tmp_path / files.TRAINED / "fold_0"), every=True)
    assert report["layers"] == one["layers"]
    assert report["candidates"] == one["candidates"] != []
    assert report["members"] == 2
    assert "members" not in one
    said = inspection.as_text(report)
    assert "members: 2, the layers are the first one's" in said
    assert "intensity the model's own recipe" in said
    assert json.loads(json.dumps(report)) == report
