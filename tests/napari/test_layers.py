"""Are scans and maps handed to napari the right way round, in millimetres, on one scale?"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from med_gradcam import maps
from med_gradcam.calibration import Calibration
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry
from med_gradcam.paint import OPACITY
from med_gradcam.target import Target
from med_gradcam.volume import Volume
from napari_plugin import layers

Scan = Callable[..., Volume]
Explain = Callable[..., Explanation]
Point = npt.NDArray[np.float64]
ALL_AXES = [
    "".join(axes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for axes in itertools.product(*order)
]


def brightest(layer: layers.LayerData) -> npt.NDArray[np.intp]:
    data = layer[0]
    return np.array(np.unravel_index(int(np.argmax(data)), data.shape))


def world(layer: layers.LayerData, index: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(np.multiply(index, layer[1]["scale"]) + layer[1]["translate"])


@pytest.mark.parametrize("axes", ALL_AXES)
def test_scan_is_shown_the_same_for_every_storage_order(
    axes: str, make_scan: Scan, finding_ras: Point
) -> None:
    first, layer = layers.scan_layers(make_scan("RAS"))[0], layers.scan_layers(make_scan(axes))[0]
    np.testing.assert_array_equal(layer[0], first[0])
    np.testing.assert_allclose(layer[1]["translate"], first[1]["translate"])
    assert layer[1]["scale"] == (3.0, 2.5, 2.0)
    # World of the layers: (-S, P, L) mm, P = -A and L = -R.
    i, p, l_ = world(layer, brightest(layer))
    r, a, s = finding_ras
    assert np.abs(np.array([i, p, l_]) - (-s, -a, -r)).max() <= 1.5
    # Upper half of a picture = anterior, left half = the patient's right.
    middle = np.array(layer[0].shape) / 2
    assert (brightest(layer) < middle).all()


@pytest.mark.parametrize("axes", ALL_AXES)
def test_maps_lie_on_their_scan(
    axes: str, make_scan: Scan, make_explanation: Explain, finding_ras: Point
) -> None:
    volume = make_scan(axes)
    explanation = make_explanation(volume)
    against, supporting = layers.map_layers(explanation, maps.draw(explanation))
    scan_layer = layers.scan_layers(volume)[0]
    for layer in (against, supporting):
        for key in ("scale", "translate", "units", "axis_labels"):
            assert layer[1][key] == scan_layer[1][key]
        assert layer[0].shape == scan_layer[0].shape
    np.testing.assert_array_equal(brightest(supporting), brightest(scan_layer))
    affine = np.array(supporting[1]["metadata"][layers.KEY]["affine_ras"])
    at = affine @ [*brightest(supporting), 1]
    assert np.abs(at[:3] - finding_ras).max() <= 1.5
    at = affine @ [*brightest(against), 1]
    assert np.abs(at[:3] - finding_ras * (-1, 1, 1)).max() <= 1.5


def test_maps_share_one_fixed_scale_and_clear_below_the_floor(
    make_scan: Scan, make_explanation: Explain
) -> None:
    explanation = make_explanation(make_scan())
    made = layers.map_layers(explanation, maps.draw(explanation))
    peak = explanation.calibration.peak_per_ml  # type: ignore[union-attr]
    for layer in made:
        assert layer[1]["contrast_limits"] == pytest.approx((peak / 10, peak))
        assert layer[1]["blending"] == "translucent_no_depth"
        assert layer[1]["colormap"]["low_color"][3] == 0
        assert [colour[3] for colour in layer[1]["colormap"]["colors"]] == pytest.approx(OPACITY)
    assert made[0][1]["name"] == "lowers the model's score: nodule"
    assert made[1][1]["name"] == "raises the model's score: nodule"


def test_a_map_without_a_sign_is_one_layer(make_scan: Scan, make_explanation: Explain) -> None:
    explanation = make_explanation(make_scan())
    bare = explanation.replace(evidence=abs(explanation.evidence), signed=False)
    (layer,) = layers.map_layers(bare, maps.draw(bare))
    assert layer[1]["name"] == "map without a sign: nodule"
    assert layer[1]["metadata"][layers.KEY]["kind"] == "strength"
    red, green, blue, _ = layer[1]["colormap"]["colors"][1]
    assert min(red, blue) > green
    assert layers.strongest(maps.draw(bare)) is not None


def test_map_metadata_says_what_it_is(make_scan: Scan, make_explanation: Explain) -> None:
    explanation = make_explanation(make_scan())
    entry = layers.map_layers(explanation, maps.draw(explanation))[1][1]["metadata"][layers.KEY]
    assert entry["kind"] == "for"
    assert entry["unit"] == "log-odds per mL"
    assert entry["relative_to"] == "uniform lung"
    assert entry["scale"] == "colours of the model (20 scans)"
    assert entry["use"] == "research use, not for diagnosis"


def test_scale_of_an_uncalibrated_model_says_so(make_scan: Scan, make_explanation: Explain) -> None:
    maps_ = maps.draw(make_explanation(make_scan(), calibration=None))
    assert "this scan alone" in layers.scale_words(maps_.signed)


def test_floor_at_the_peak_still_gives_rising_limits(
    make_scan: Scan, make_explanation: Explain
) -> None:
    scale = Calibration("nodule", "integrated", "features.3", 5.0, 5.0, 3)
    explanation = make_explanation(make_scan(), calibration=scale)
    low, high = layers.map_layers(explanation, maps.draw(explanation))[0][1]["contrast_limits"]
    assert low < high == 5.0


def test_three_slices_are_no_colour_picture() -> None:
    grid = Geometry((3, 5, 6), np.diag([-1.0, -1.0, 1.0, 1.0]))
    data, keywords, kind = layers.scan_layers(Volume(np.zeros((1, 3, 5, 6)), grid))[0]
    assert (kind, keywords["rgb"], keywords["multiscale"]) == ("image", False, False)
    assert data.shape == (6, 5, 3)  # I, P, L: the stored L, P, S axes turned round


def test_channels_become_layers_and_only_the_first_is_seen(make_scan: Scan) -> None:
    one = make_scan(modality="MR")
    two = Volume(np.concatenate([one.array, one.array + 1]), one.grid, "MR")
    made = layers.scan_layers(two)
    assert [layer[1]["name"] for layer in made] == ["scan (MR), channel 1", "scan (MR), channel 2"]
    assert [layer[1]["visible"] for layer in made] == [True, False]


def test_foreign_byte_order_becomes_the_machine_s(make_scan: Scan) -> None:
    volume = make_scan()
    swapped = Volume(volume.array.astype(">i2"), volume.grid, "CT", "HU")
    data = layers.scan_layers(swapped)[0][0]
    assert data.dtype.isnative
    np.testing.assert_array_equal(data, layers.scan_layers(volume)[0][0])


def rotated(degrees: float) -> Geometry:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, -1.5, 2.0])
    affine[:3, 3] = (50.0, 60.0, -20.0)
    return Geometry((40, 30, 20), affine)


def test_oblique_scan_is_shown_along_its_axes_with_true_read_outs() -> None:
    grid = rotated(12)
    at = layers.shown(grid)
    assert at.scale == pytest.approx((2.0, 1.5, 1.0))
    index = np.array([7.0, 11.0, 3.0])
    np.testing.assert_allclose(at.point_ras(at.point_world(index)), at.grid.world_ras(index))
    middle = (np.array(at.grid.shape) - 1) / 2
    r, a, s = at.grid.world_ras(middle)
    np.testing.assert_allclose(at.point_world(middle), (-s, -a, -r))
    assert "12 degrees" in layers.oblique_words(grid)


def test_straight_scan_has_no_oblique_words(make_scan: Scan) -> None:
    assert layers.oblique_words(make_scan().grid) == ""


def test_sheared_scan_says_so() -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[1, 2] = 0.4
    assert "sheared" in layers.oblique_words(Geometry((5, 5, 5), affine))


def test_strongest_is_the_voxel_with_most_net_evidence(
    make_scan: Scan, make_explanation: Explain, finding_ras: Point
) -> None:
    drawn = maps.draw(make_explanation(make_scan("LPS")))
    peak = layers.strongest(drawn)
    assert peak is not None
    assert np.abs(peak.ras_mm - finding_ras).max() <= 1.5
    np.testing.assert_allclose(peak.world_mm, -peak.ras_mm[::-1])


def test_nothing_above_the_floor_has_no_strongest_voxel(
    make_scan: Scan, make_explanation: Explain
) -> None:
    scale = Calibration("nodule", "integrated", "features.3", 1e6, 1e5, 3)
    explanation = make_explanation(make_scan(), calibration=scale)
    assert layers.strongest(maps.draw(explanation)) is None


@pytest.mark.parametrize("text", ["a\nb", "x" * 300, "\x1b[31mred"])
def test_names_from_files_are_one_short_line(text: str) -> None:
    line = layers.short(text)
    assert len(line) <= 60
    assert line.isprintable()


def test_label_from_a_file_cannot_blow_up_the_layer_name(
    make_scan: Scan, make_explanation: Explain
) -> None:
    target = Target("class", "evil\n" * 100, (0,), "softmax")
    explanation = make_explanation(make_scan(), target=target)
    made = layers.map_layers(explanation, maps.draw(explanation))
    assert all(len(layer[1]["name"]) < 90 for layer in made)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["layers", "state", "job", "tasks", "reader", "samples"])
def test_needs_neither_torch_nor_qt(module: str) -> None:
    loaded = modules_after(f"import napari_plugin.{module}")
    heavy: set[Any] = {"torch", "napari", "qtpy", "PyQt6", "monai", "nibabel", "pydicom"}
    assert not loaded & heavy
