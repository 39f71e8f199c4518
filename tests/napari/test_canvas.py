"""Do the letters follow from what is shown, and is a flipped picture noticed?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from napari.layers import Layer

from med_gradcam import maps
from med_gradcam.explanation import Explanation
from med_gradcam.volume import Volume
from napari_plugin.canvas import Signs, is_mirrored, legend, letters
from napari_plugin.layers import map_layers, scan_layers


@pytest.mark.parametrize(
    ("displayed", "expected"),
    [
        ((1, 2), "APRL"),  # axial
        ((0, 2), "SIRL"),  # coronal
        ((0, 1), "SIAP"),  # sagittal
        ((2, 1), "RLAP"),  # axial, lying
    ],
)
def test_letters_of_each_plane(displayed: tuple[int, int], expected: str) -> None:
    found = letters(displayed, "down", "right")
    assert "".join(found[edge] for edge in ("top", "bottom", "left", "right")) == expected


def test_letters_turn_with_the_camera() -> None:
    found = letters((1, 2), "up", "left")
    assert found == {"top": "P", "bottom": "A", "left": "L", "right": "R"}


@pytest.mark.parametrize(
    ("ndisplay", "vertical", "horizontal", "handedness", "expected"),
    [
        (2, "down", "right", "right", False),
        (2, "down", "right", "left", False),  # depth does not show in a slice
        (3, "down", "right", "left", True),
        (3, "down", "right", "right", False),
        (2, "down", "left", "left", True),
        (2, "up", "right", "left", True),
    ],
)
def test_mirror_alarm(
    *, ndisplay: int, vertical: str, horizontal: str, handedness: str, expected: bool
) -> None:
    assert is_mirrored(ndisplay, vertical, horizontal, handedness) is expected


def test_legend_speaks_of_the_newest_map() -> None:
    assert legend([{"kind": "scan"}]) == ""
    old = {"kind": "for", "unit": "log-odds per mL", "relative_to": "air", "scale": "scale A"}
    new = {**old, "relative_to": "uniform lung", "scale": "scale B"}
    words = legend([old, {"kind": "scan"}, new])
    assert "relative to uniform lung" in words
    assert "(log-odds per mL)" in words
    assert "scale B" in words
    assert "not for diagnosis" in words
    assert "air" not in words


def test_legend_of_a_map_without_a_sign() -> None:
    entry = {"kind": "strength", "unit": "relative units per mL", "relative_to": "", "scale": "S"}
    words = legend([{**entry, "kind": "for"}, entry])
    assert words.startswith("purple: where the map is strong, no sign\nrelative units per mL\n")
    assert "raises" not in words
    assert "lowers" not in words


def middle(picture: npt.NDArray[np.uint8], strong: int, weak: int) -> tuple[float, float]:
    """Row and column, -1..1 from the picture's middle, of pixels with more of one colour."""
    difference = picture[..., strong].astype(int) - picture[..., weak]
    rows, columns = np.nonzero(difference > 60)
    assert rows.size, "no such pixels"
    height, width = picture.shape[:2]
    return 2 * rows.mean() / height - 1, 2 * columns.mean() / width - 1


@pytest.mark.gui
def test_pixels_are_where_the_patient_has_them(
    make_napari_viewer_proxy: Any,
    make_scan: Callable[..., Volume],
    make_explanation: Callable[..., Explanation],
    finding_ras: Any,
) -> None:
    """The finding lies right, anterior and superior; its evidence against at the patient's left."""
    viewer = make_napari_viewer_proxy(show=True)
    volume = make_scan("LPS")
    explanation = make_explanation(volume)
    drawn = map_layers(explanation, maps.draw(explanation))
    for layer in [*scan_layers(volume), *drawn]:
        viewer.add_layer(Layer.create(*layer))
    signs = Signs(viewer)
    overlays = viewer.canvas.overlays
    for order, horizontal in (((0, 1, 2), True), ((1, 0, 2), True), ((2, 0, 1), False)):
        viewer.dims.order = order
        viewer.dims.set_point((0, 1, 2), tuple(-finding_ras[::-1]))
        viewer.reset_view()
        picture = viewer.screenshot(canvas_only=True, flash=False)
        row, column = middle(picture, 0, 2)
        assert (row < 0, column < 0) == (True, True), f"{order}: {row}, {column}"
        if horizontal:
            assert overlays["med_gradcam_left"].text == "R"
            assert middle(picture, 2, 0)[1] > 0
    viewer.dims.order = (0, 1, 2)
    viewer.dims.ndisplay = 3
    viewer.layers[0].visible = False
    viewer.scene.camera.set_view_direction(view_direction=(0, 1, 0), up_direction=(-1, 0, 0))
    viewer.reset_view(reset_camera_angle=False)
    picture = viewer.screenshot(canvas_only=True, flash=False)
    row, column = middle(picture, 0, 2)
    assert (row < 0, column < 0) == (True, True), f"3D from the front: {row}, {column}"
    assert not overlays["med_gradcam_left"].visible
    signs.remove()
