"""Does the dock do what it says, in a real window: open, explain, cancel, fail, close?"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from napari.layers import Layer
from qtpy.QtCore import Qt

from med_gradcam.explanation import Explanation
from med_gradcam.progress import Step
from med_gradcam.volume import Volume
from napari_plugin import dock as dock_module
from napari_plugin import job, tasks
from napari_plugin.dock import EvidenceDock
from napari_plugin.layers import scan_layers

pytestmark = [
    pytest.mark.gui,
    pytest.mark.filterwarnings("error:Private attribute access:FutureWarning"),
]
WIDGET = "Evidence maps (3D Grad-CAM)"


class Window:
    """A viewer with the dock in it, as a user has it."""

    def __init__(self, viewer: Any, plugin: str, qtbot: Any) -> None:
        self.viewer, self.qtbot = viewer, qtbot
        _, widget = viewer.window.add_plugin_dock_widget(plugin, WIDGET)
        self.dock: EvidenceDock = widget

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.viewer.layers]

    def until(self, true: Callable[[], bool], seconds: float = 10) -> None:
        self.qtbot.waitUntil(true, timeout=int(seconds * 1000))

    def idle(self) -> None:
        self.until(lambda: not self.dock.state.busy)

    def open(self, path: str = "scan.nii.gz") -> None:
        self.dock.open_path(Path(path))
        self.idle()

    def click(self, button: Any) -> None:
        self.qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


@pytest.fixture
def window(make_napari_viewer_proxy: Any, plugin: str, qtbot: Any, engine: Any) -> Window:
    return Window(make_napari_viewer_proxy(), plugin, qtbot)


@pytest.fixture
def ready(window: Window, model_folder: Path) -> Window:
    """A window with a scan and a model."""
    window.open()
    window.dock.set_model(model_folder)
    assert window.dock.state.can_explain
    return window


def test_dock_comes_up_through_the_manifest_and_opens_a_scan_in_display_order(
    window: Window,
) -> None:
    form = window.dock.form
    assert isinstance(window.dock, EvidenceDock)
    assert not form.explain.isEnabled()
    assert form.explain.toolTip() == "Choose a scan and a model, then explain."
    assert form.disclaimer.text() == "Research use, not for diagnosis."
    assert form.error.textFormat() == Qt.TextFormat.PlainText  # no markup from files
    window.open()
    assert window.names == ["scan (CT)"]
    layer = window.viewer.layers[0]
    assert layer.data.shape == (21, 31, 41)
    assert [str(unit) for unit in layer.units] == ["millimeter"] * 3
    assert tuple(layer.axis_labels) == ("I", "P", "L")
    assert tuple(window.viewer.dims.axis_labels) == ("I", "P", "L")
    assert window.dock.state.scan.startswith("CT, 41 x 31 x 21")


def test_explain_shows_maps_table_letters_and_the_strongest_slice(
    ready: Window, finding_ras: Any
) -> None:
    ready.click(ready.dock.form.explain)
    assert ready.dock.form.cancel.isEnabled()
    ready.idle()
    assert ready.names == [
        "scan (CT)",
        "lowers the model's score: nodule",
        "raises the model's score: nodule",
    ]
    raises = ready.viewer.layers[2]
    assert raises.colormap.name == "med-gradcam for"
    assert ready.dock.form.table.rowCount() == len(ready.dock.state.rows) > 8
    assert "R 30 A 20 S 2" in ready.dock.form.status.text()
    assert ready.dock.form.warnings.text() == "A warning of the engine."
    assert abs(ready.viewer.dims.point[0] + finding_ras[2]) <= 1.5
    letter = {k: v.text for k, v in ready.viewer.canvas.overlays.items() if "med_gradcam" in k}
    assert (letter["med_gradcam_left"], letter["med_gradcam_top"]) == ("R", "A")


def test_fields_reach_the_engine_and_the_newest_result_is_the_one_seen(
    ready: Window, engine: Any
) -> None:
    form = ready.dock.form
    fields = {form.target: " nodule ", form.layer: "features.3", form.at: "ras:1,2,3"}
    for field, text in fields.items():
        field.setText(text)
    ready.click(form.explain)
    ready.idle()
    for field in fields:
        field.clear()
    ready.click(form.explain)
    ready.idle()
    assert engine.asked == [
        {"target": "nodule", "layer": "features.3", "at": "ras:1,2,3"},
        {"target": "auto", "layer": "auto", "at": None},
    ]
    assert [layer.visible for layer in ready.viewer.layers] == [True, False, False, True, True]


def test_cancel_is_prompt_and_leaves_no_layers(ready: Window, engine: Any) -> None:
    engine.steps, engine.seconds_per_step = 1000, 0.05
    ready.dock.explain()
    ready.until(lambda: engine.running == 1)
    worker = ready.dock.worker
    before = time.perf_counter()
    ready.click(ready.dock.form.cancel)
    ready.until(lambda: ready.dock.form.explain.isEnabled() and not worker.is_running)
    assert time.perf_counter() - before < 1
    ready.until(lambda: engine.ended == ["cancelled"], 2)
    ready.qtbot.wait(200)
    assert ready.names == ["scan (CT)"]
    assert (ready.dock.state.status, ready.dock.state.error) == ("Cancelled.", "")


def test_cancel_is_prompt_even_in_one_long_step_and_the_next_run_waits(
    ready: Window, engine: Any
) -> None:
    engine.steps, engine.seconds_per_step = 2, 1.5
    ready.dock.explain()
    ready.until(lambda: engine.running == 1)
    before = time.perf_counter()
    ready.dock.cancel()
    ready.until(ready.dock.form.explain.isEnabled)
    assert time.perf_counter() - before < 1
    engine.steps, engine.seconds_per_step = 2, 0.01
    ready.dock.explain()
    ready.idle()
    assert engine.ended == ["cancelled", "done"]
    assert engine.most_at_once == 1
    assert len(ready.names) == 3


def test_result_and_error_of_an_earlier_run_are_dropped(
    ready: Window, engine: Any, make_explanation: Callable[..., Explanation]
) -> None:
    engine.steps, engine.seconds_per_step = 1000, 0.02
    ready.dock.explain()
    stale = ready.dock.state.generation - 1
    answer = tasks.answer(make_explanation(engine.volume))
    ready.dock._on_outcome(job.Outcome(stale, answer))
    ready.dock._on_error(job.EngineError(stale, "late"))
    ready.dock._on_news(job.News(stale, Step(1, 2, "late")))
    assert ready.dock.state.busy
    assert ready.dock.state.error == ""
    assert ready.dock.state.status != "late"
    assert ready.names == ["scan (CT)"]
    ready.dock.cancel()
    ready.until(lambda: engine.running == 0)


def test_torch_error_is_shown_and_nothing_keeps_running(ready: Window, engine: Any) -> None:
    engine.raises = RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
    ready.dock.explain()
    worker = ready.dock.worker
    ready.idle()
    ready.until(lambda: not worker.is_running)
    assert "CUDA out of memory" in ready.dock.form.error.text()
    assert ready.dock.form.explain.isEnabled()
    assert ready.names == ["scan (CT)"]
    engine.raises = None
    ready.dock.explain()
    ready.idle()
    assert ready.dock.state.error == ""
    assert len(ready.names) == 3


def test_bad_file_is_one_red_sentence(window: Window) -> None:
    window.open("bad.nii.gz")
    assert window.dock.form.error.text() == "expected a NIfTI file, got 12 bytes of text."
    assert window.names == []
    window.open("scan.nii.gz")
    assert window.dock.form.error.text() == ""


def test_dock_that_opens_late_takes_the_scan_that_is_there(
    make_napari_viewer_proxy: Any, plugin: str, qtbot: Any, make_scan: Callable[..., Volume]
) -> None:
    viewer = make_napari_viewer_proxy()
    viewer.add_layer(Layer.create(*scan_layers(make_scan())[0]))
    viewer.add_image(np.zeros((3, 3)))
    assert Window(viewer, plugin, qtbot).dock.state.scan.startswith("CT")


def test_another_scan_hides_everything_of_the_one_before(
    ready: Window, engine: Any, make_scan: Callable[..., Volume]
) -> None:
    ready.dock.explain()
    ready.idle()
    engine.volume = make_scan("LPS", "MR")
    ready.open("other.nii.gz")
    assert [layer.visible for layer in ready.viewer.layers] == [False, False, False, True]
    assert ready.dock.state.rows == ()


def test_scan_opened_elsewhere_is_taken_stops_the_run_and_can_be_removed(
    ready: Window, engine: Any, make_scan: Callable[..., Volume]
) -> None:
    engine.steps, engine.seconds_per_step = 1000, 0.02
    ready.dock.explain()
    ready.until(lambda: engine.running == 1)
    ready.viewer.add_layer(Layer.create(*scan_layers(make_scan("LPS", "MR"))[0]))
    assert not ready.dock.state.busy
    ready.until(lambda: engine.ended == ["cancelled"], 2)
    assert ready.names == ["scan (CT)", "scan (MR)"]
    assert ready.dock.state.scan.startswith("MR")
    ready.viewer.layers.clear()
    assert ready.dock.state.scan == ""
    assert not ready.dock.form.explain.isEnabled()


def test_explanation_of_another_scan_is_warned_about(
    ready: Window,
    make_explanation: Callable[..., Explanation],
    make_scan: Callable[..., Volume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = tasks.answer(make_explanation(make_scan("LPS")))
    monkeypatch.setattr(tasks, "open_path", lambda *_args: found)
    ready.open("explanation.nii.gz")
    assert dock_module.OTHER_SCAN in ready.dock.form.warnings.text()


def test_point_under_the_mouse(ready: Window, finding_ras: Any) -> None:
    ready.viewer.cursor.position = tuple(-finding_ras[::-1])
    ready.dock.take_point()
    assert ready.dock.form.at.text() == "ras:30.0,20.0,25.0"
    assert ready.dock.form.status.text() == "Point at R 30 A 20 S 25 mm, patient's right."
    ready.viewer.cursor.position = (999.0, 0.0, 0.0)
    ready.dock.take_point()
    assert ready.dock.form.at.text() == "ras:30.0,20.0,25.0"


def test_flipped_camera_raises_the_alarm_and_turns_the_letters(ready: Window) -> None:
    camera, form = ready.viewer.scene.camera, ready.dock.form
    assert form.mirror.text() == ""
    camera.orientation = ("away", "down", "left")
    assert "flipped" in form.mirror.text()
    assert ready.viewer.canvas.overlays["med_gradcam_left"].text == "L"
    camera.orientation = ("towards", "down", "right")
    assert form.mirror.text() == ""


def is_listening(dock: EvidenceDock) -> bool:
    return dock._signs is not None


def test_closing_the_window_stops_the_run(
    make_napari_viewer_proxy: Any, plugin: str, qtbot: Any, engine: Any, model_folder: Path
) -> None:
    window = Window(make_napari_viewer_proxy(show=True), plugin, qtbot)
    window.open()
    window.dock.set_model(model_folder)
    engine.steps, engine.seconds_per_step = 1000, 0.02
    window.dock.explain()
    window.until(lambda: engine.running == 1)
    dock, worker = window.dock, window.dock.worker
    main = dock.window()
    assert main is not None
    main.hide()  # the first thing that happens to a window that closes
    window.until(lambda: engine.ended == ["cancelled"] and not worker.is_running, 3)
    assert not dock.state.busy
    assert not is_listening(dock)
    main.show()
    assert is_listening(dock)  # a window that was only hidden works on
    dock.explain()
    window.until(lambda: engine.running == 1)
    worker = dock.worker
    window.viewer.close()
    window.until(lambda: engine.ended == ["cancelled"] * 2 and not worker.is_running, 3)


def test_closing_the_dock_stops_the_run_and_lets_go_of_the_viewer(
    ready: Window, engine: Any, make_scan: Callable[..., Volume]
) -> None:
    engine.steps, engine.seconds_per_step = 1000, 0.02
    ready.dock.explain()
    ready.until(lambda: engine.running == 1)
    ready.viewer.window.remove_dock_widget(ready.dock)
    ready.until(lambda: engine.ended == ["cancelled"], 3)
    generation = ready.dock.state.generation
    ready.viewer.add_layer(Layer.create(*scan_layers(make_scan("LPS", "MR"))[0]))
    assert ready.dock.state.generation == generation
    assert ready.dock.state.scan.startswith("CT")


def test_shift_e_explains(
    make_napari_viewer_proxy: Any, plugin: str, qtbot: Any, engine: Any, model_folder: Path
) -> None:
    window = Window(make_napari_viewer_proxy(show=True), plugin, qtbot)
    window.open()
    window.dock.set_model(model_folder)
    main = window.dock.window()
    assert main is not None
    with qtbot.waitActive(main, timeout=3000):
        main.activateWindow()
    qtbot.keyClick(window.dock, Qt.Key.Key_E, Qt.KeyboardModifier.ShiftModifier)
    window.until(lambda: len(window.names) == 3)
