"""Are the time points of a series explained by one class and layer, and drawn on one scale?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.cli import main
from med_gradcam.errors import CannotExplainError, ImageError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.model import InputSpec, Model
from med_gradcam.volume import Volume
from tests.tiny import save_nifti

GRID = Geometry((16, 14, 12), np.diag([1.5, 1.25, 2.0, 1.0]))
STRENGTHS = (0.0, 1.0, 4.0, 2.0)


def scan(strength: float, seed: int = 0) -> Volume:
    """Grain, with a ball of some strength."""
    array = 0.1 * np.random.default_rng(seed).standard_normal(GRID.shape)
    i, j, k = np.ogrid[:16, :14, :12]
    array[(i - 8) ** 2 + (j - 7) ** 2 + (k - 6) ** 2 < 9] += strength
    return Volume(array[None].astype(np.float32), GRID)


def series() -> list[Volume]:
    return [scan(strength) for strength in STRENGTHS]


def classifier() -> nn.Module:
    """Class 1 grows with the brightness; two layers to choose from."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(3, 4, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(value.abs() if name.endswith("weight") else torch.zeros_like(value))
        last = net.get_submodule("7")
        last.get_parameter("weight")[0].zero_()
        last.get_parameter("weight")[1] *= 20
        last.get_parameter("bias")[1] = -2.0
    return net.eval()


def segmenter() -> nn.Module:
    net = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv3d(1, 2, 1))
    with torch.no_grad():
        net.get_parameter("0.weight").fill_(1 / 27)
        net.get_parameter("0.bias").zero_()
        net.get_parameter("2.weight").copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1))
        net.get_parameter("2.bias").copy_(torch.tensor([0.0, -0.5]))
    return net.eval()


def test_one_class_one_layer_one_scale() -> None:
    net, scans = classifier(), series()
    made = mg.explain_series(scans, net, reference="zero")
    assert made.leading == 2
    maps = [e for e in made.maps if e is not None]
    assert len(maps) == 4
    assert {(e.target.label, e.layer) for e in maps} == {("class 1", maps[2].layer)}
    asked = [e.provenance.parameters["layer"] for e in maps]  # tested once, then named
    assert asked == [maps[2].layer, maps[2].layer, "auto", maps[2].layer]
    with torch.no_grad():
        y = [net(torch.tensor(v.array[None]))[0].double() for v in scans]
    assert made.scores == pytest.approx([float(v[1] - v[0]) for v in y], rel=1e-5)
    alone = mg.explain(scans[3], net, target=1, layer=maps[2].layer, reference="zero")
    assert np.array_equal(alone.evidence, maps[3].evidence)
    peaks = [mg.draw(e).signed.peak for e in maps]
    assert peaks[2] > 1.5 * peaks[1]
    for n in range(4):
        drawn = made.draw(n)
        assert drawn.signed.peak == made.scale.peak_per_ml == max(peaks)
        assert np.array_equal(drawn.signed.values, mg.draw(maps[n]).signed.values)


def test_a_class_that_is_named_stays(tmp_path: Path) -> None:
    made = mg.explain_series(series(), classifier(), target=0, layer="1", reference="zero")
    assert {e.target.label for e in made.maps if e is not None} == {"class 0"}
    assert made.leading == 0
    assert all(e.layer == "1" for e in made.maps if e is not None)


def test_time_points_without_the_class_have_no_map(tmp_path: Path) -> None:
    scans, net = series(), segmenter()
    made = mg.explain_series(scans, net, layer="1", reference="zero")
    assert [e is None for e in made.maps] == [True, False, False, False]
    assert "there are none" in made.why[0]
    assert made.scores[0] is None
    sizes = [e.target.region.voxels for e in made.maps if e is not None and e.target.region]
    assert len(set(sizes)) > 1  # each time point has its own region
    with pytest.raises(UsageError, match="expected a time point with a map, got 0"):
        made.draw(0)
    with pytest.raises(UsageError, match=r"got 4 \(from 0\): there are 4"):
        made.draw(4)
    folder = mg.write_series(made, tmp_path / "out", volumes=scans)
    index = json.loads((folder / "series.json").read_text())
    assert [row["folder"] for row in index["times"]] == [None, "time_2", "time_3", "time_4"]
    assert "there are none" in index["times"][0]["why"]
    assert index["leading"] == 3
    with pytest.raises(CannotExplainError, match="there are none"):
        mg.explain_series(scans[:1] * 2, net, layer="1")


def test_the_folder_of_a_series(tmp_path: Path) -> None:
    scans = series()
    made = mg.explain_series(scans, classifier(), layer="1", reference="zero")
    folder = mg.write_series(made, tmp_path / "out", volumes=scans)
    assert (folder / "series.png").stat().st_size > 10_000
    index = json.loads((folder / "series.json").read_text())
    scales = [row["colour_scale"] for row in index["times"]]
    assert scales[0] == scales[3]
    assert scales[0]["layer"] == "all time points"
    for n, e in enumerate(made.maps, start=1):
        assert mg.read_explanation(folder / f"time_{n}") == e
    with pytest.raises(UsageError, match="exists already"):
        mg.write_series(made, folder, formats="nifti")
    mg.write_series(made, folder, formats="nifti", overwrite=True)
    assert not (folder / "series.png").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not one of our output"):
        mg.write_series(made, tmp_path / "other", formats="nifti", overwrite=True)
    with pytest.raises(UsageError, match="expected 4 scans, got 2"):
        mg.write_series(made, tmp_path / "new", volumes=scans[:2])


def test_what_is_no_series() -> None:
    net, scans = classifier(), series()
    moved = Volume(scans[0].array, Geometry(GRID.shape, np.diag([1.5, 1.25, 2.5, 1.0])))
    with pytest.raises(ImageError, match=r"number 2 .*2 mm instead|number 2 .*mm off"):
        mg.explain_series([scans[0], moved], net)
    nothing: list[Any] = [[], "a.nii", scans[0]]
    for wrong in nothing:
        with pytest.raises(UsageError, match="expected a list of time points"):
            mg.explain_series(wrong, net)
    for layer in ("all", "fused"):
        with pytest.raises(UsageError, match="expected auto or the name of a layer"):
            mg.explain_series(scans, net, layer=layer)
    with pytest.raises(UsageError, match="known class, got '7'"):
        mg.explain_series(scans, net, target=7)


def test_a_network_over_time_takes_the_whole_file(tmp_path: Path) -> None:
    path = save_nifti(
        tmp_path / "dce.nii.gz", np.stack([v.array[0] for v in series()], axis=-1), GRID.affine
    )
    net = nn.Sequential(nn.Conv3d(4, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
                        nn.Flatten(), nn.Linear(2, 2)).eval()  # fmt: skip
    from med_gradcam.loading import read_for

    model = Model(net, InputSpec(channels=4), weights_sha256="0")
    e = mg.explain(read_for([path], model), model, layer="1", target=0, reference="zero")
    with torch.no_grad():
        x = torch.tensor(np.stack([v.array[0] for v in series()])[None])
        y = net(x)[0].double()
    assert e.score == pytest.approx(float(y[0] - y[1]), rel=1e-5)


# ------------------------------------------------------------- one map per modality, one tensor in


class Branches(nn.Module):
    """One tensor in, a branch for each of its channels."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU()) for _ in range(channels)
        )
        self.head = nn.Sequential(nn.Linear(3 * channels, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> Any:
        seen = [part(x[:, n : n + 1]).mean(dim=(2, 3, 4)) for n, part in enumerate(self.parts)]
        return self.head(torch.cat(seen, dim=1))


class Apart(nn.Module):
    """The network of one tensor as one of several inputs, as docs say."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *scans: torch.Tensor) -> Any:
        return self.net(torch.cat(scans, dim=1))


def test_a_map_per_modality_of_one_input_tensor() -> None:
    scans, net = [scan(1.0, 1), scan(2.0, 2)], Branches().eval()
    joint = mg.explain_inputs(
        scans, Apart(net).eval(), target=1, layers=["net.parts.0", "net.parts.1"], reference="zero"
    )
    whole = joint.maps[0].score - (joint.maps[0].reference_score or 0.0)
    assert sum(joint.nets) == pytest.approx(whole, abs=1e-4)
    both = np.concatenate([v.array for v in scans])
    cut = mg.explain(Volume(both, GRID), net, target=1, layer="parts.0+parts.1", reference="zero")
    assert cut.score == pytest.approx(joint.maps[0].score, rel=1e-5)
    assert [part.net for part in cut.parts] == pytest.approx(joint.nets, rel=1e-3, abs=1e-5)


# ----------------------------------------------------------------------------- the command line

FACTORY = """
from tests.test_series import classifier

def make():
    return classifier(), {"modality": "MR"}, ("quiet", "lesion"), "softmax"
"""


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "series_factory_for_a_test.py").write_text(FACTORY)
    stack = np.stack([v.array[0] for v in series()], axis=-1)
    save_nifti(tmp_path / "dce.nii.gz", stack, GRID.affine)
    words = ["explain", "dce.nii.gz", "--model", "series_factory_for_a_test:make", "--trust"]
    words += ["code", "--layer", "1", "--reference", "zero", "--formats", "", "-o"]
    alone, words = [*words, "one", "--time", "3"], [*words, "out"]
    assert main(words) == 3
    assert "say which one (--time N" in capsys.readouterr().err
    assert main([*words, "--each-time"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:6]] == ["1", "2", "3", "4"]
    assert "those of time point 3, of the highest score; all maps on one scale" in said
    assert main([*words, "--each-time"]) == 2
    capsys.readouterr()
    assert main([*words, "--each-time", "--overwrite", "--json"]) == 0
    index = json.loads(capsys.readouterr().out)
    assert len(index["times"]) == 4
    assert main(alone) == 0
    capsys.readouterr()
    record = json.loads((tmp_path / "one" / "explanation.json").read_text())
    assert record["score"] == pytest.approx(index["times"][2]["score"], rel=1e-6)
    assert "time point 3 of 4" in record["provenance"]["notes"]
    assert main([*words, "--each-time", "--time", "1", "--overwrite"]) == 2
    save_nifti(tmp_path / "one.nii.gz", stack[..., 0], GRID.affine)
    words[1] = "one.nii.gz"
    assert main([*words, "--each-time", "--overwrite"]) == 2
    assert "expected several volumes with --each-time, got one" in capsys.readouterr().err
