"""The dock: open a scan, choose a model, explain, see what raises and lowers the model's score.

It holds one frozen DockState, changes it only through state.py, and shows it through form.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.layers import Layer
from napari.qt.threading import create_worker
from qtpy.QtCore import QEvent, QObject
from qtpy.QtGui import QKeySequence, QShortcut, QShowEvent  # type: ignore[attr-defined]
from qtpy.QtWidgets import QFileDialog, QWidget

from napari_plugin import job, state, tasks
from napari_plugin.canvas import MIRRORED, Signs, ours, scan_of
from napari_plugin.form import CHOOSE, Form
from napari_plugin.layers import Floats, LayerData, shown
from napari_plugin.samples import sample_models

if TYPE_CHECKING:
    import napari.viewer

    from med_gradcam.volume import Volume


OTHER_SCAN = "This explanation may be of another scan than the open one: the voxels differ."


class EvidenceDock(QWidget):
    """The dock widget "Evidence maps (3D Grad-CAM)"."""

    def __init__(self, napari_viewer: napari.viewer.Viewer, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.viewer = napari_viewer
        self.state = state.DockState()
        self.form = Form(self)
        self.worker: Any = None
        self._control = job.Control()
        self._models = tasks.Models()
        self._volume: Volume | None = None
        self._scan_layers: list[Layer] = []
        self._map_layers: list[Layer] = []
        self._window: QObject | None = None
        self._signs: Signs | None = None
        self._connect()
        self._attach()
        self._fill_models()
        self._adopt_newest()
        self._show()

    # -- what the user does ------------------------------------------------------------------

    def choose_file(self) -> None:
        """Ask for a NIfTI file and open it."""
        chosen, _ = QFileDialog.getOpenFileName(
            self, "Open a scan", "", "NIfTI (*.nii *.nii.gz);;All files (*)"
        )
        if chosen:
            self.open_path(Path(chosen))

    def choose_folder(self) -> None:
        """Ask for a DICOM or explanation folder and open it."""
        chosen = QFileDialog.getExistingDirectory(self, "Open a DICOM series or an explanation")
        if chosen:
            self.open_path(Path(chosen))

    def choose_model(self) -> None:
        """Ask for a model folder."""
        chosen = QFileDialog.getExistingDirectory(self, "Choose a model folder")
        if chosen:
            self.set_model(Path(chosen))

    def set_model(self, folder: Path) -> None:
        """Make a model folder the one to explain."""
        known = [self.form.model.itemData(row) for row in range(self.form.model.count())]
        if folder not in known:
            self.form.model.addItem(folder.name, folder)
            known.append(folder)
        self.form.model.setCurrentIndex(known.index(folder))

    def open_path(self, path: Path) -> None:
        """Open a scan or an explanation folder."""
        if not self.state.busy:
            self._start("opening", "Opening", partial(tasks.open_path, path))

    def explain(self) -> None:
        """Explain the scan with the model, as the fields say."""
        model = self.form.model.currentData()
        if not self.state.can_explain or self._volume is None or model is None:
            return
        fields = (self.form.target, self.form.layer, self.form.at)
        question = tasks.Question(Path(model), *(field.text().strip() for field in fields))
        self._start(
            "explaining",
            "Explaining",
            partial(tasks.explain, question, self._volume, self._models),
        )

    def cancel(self) -> None:
        """Stop the run and forget about it."""
        if self.state.busy:
            self._halt()
            self._set(state.stopped(self.state, "Cancelled."))

    def take_point(self) -> None:
        """Put the point under the mouse into the point field."""
        position = tuple(self.viewer.cursor.position)[-3:]
        if self._volume is None or len(position) != 3:
            return
        grid = self._volume.grid
        point = shown(grid).point_ras(position)
        if not grid.contains(grid.index_ijk(point)):
            return
        self.form.at.setText(state.point_text(tuple(point.tolist())))
        self._set(state.said(self.state, f"Point at {state.where_words(point)}."))

    # -- what the worker says ----------------------------------------------------------------

    def _start(self, phase: state.Phase, status: str, work: job.Work) -> None:
        self._set(state.started(self.state, phase, status))
        self.worker = create_worker(
            job.relay,
            self.state.generation,
            work,
            self._control,
            self._control.renew(),
            _connect={
                "yielded": self._on_news,
                "returned": self._on_outcome,
                "errored": self._on_error,
            },
        )

    def _on_news(self, news: job.News) -> None:
        if news.generation == self.state.generation and news.step is not None:
            self._set(state.stepped(self.state, news.step))

    def _on_outcome(self, outcome: job.Outcome) -> None:
        if outcome.generation != self.state.generation:
            return
        if isinstance(outcome.value, tasks.Opened):
            self._set(state.told(state.stopped(self.state, "")))
            self._look_at(self._add(outcome.value.layers))
        elif isinstance(outcome.value, tasks.Answer):
            self._show_answer(outcome.value)
        else:
            self._set(state.stopped(self.state, "Cancelled."))

    def _on_error(self, error: Exception) -> None:
        if getattr(error, "generation", self.state.generation) != self.state.generation:
            return
        words = error.sentence if isinstance(error, job.EngineError) else job.sentence(error)
        self._set(state.failed(self.state, words, getattr(error, "details", "")))

    def _show_answer(self, answer: tasks.Answer) -> None:
        _hide(self._map_layers)
        self._map_layers = self._add(answer.layers)
        for layer in self._map_layers:
            layer.colorbar.visible = True
        if answer.look_at is not None:
            self._go_to(answer.look_at)
        other = self._volume is not None and not answer.is_about(self._volume)
        self._set(state.with_result(self.state, answer.explanation, answer.scale, answer.peak))
        if other:
            self._set(state.warned(self.state, OTHER_SCAN))

    # -- what the viewer says ----------------------------------------------------------------

    def _on_inserted(self, event: Any) -> None:
        layer = event.value
        volume = scan_of(layer)
        if volume is None:
            return
        layer.contrast_limits_range = ours(layer)["range"]
        if _same(volume, self._volume):
            self._scan_layers.append(layer)
            return
        if self.state.busy:  # the run is about the scan before
            self.cancel()
        _hide([*self._scan_layers, *self._map_layers])
        self._scan_layers, self._map_layers = [layer], []
        self._volume = volume
        self._set(state.with_scan(self.state, self._volume))

    def _on_removed(self, event: Any) -> None:
        layer = event.value
        if layer in self._map_layers:
            self._map_layers.remove(layer)
        if layer not in self._scan_layers:
            return
        self._scan_layers.remove(layer)
        if not self._scan_layers:
            self.cancel()
            self._volume = None
            self._set(state.with_scan(self.state, None))

    def _adopt_newest(self) -> None:
        """Take the newest scan of ours that the viewer shows already."""
        scans = [layer for layer in self.viewer.layers if scan_of(layer) is not None]
        if scans:
            self._volume = scan_of(scans[-1])
            self._map_layers = [one for one in self._map_layers if one in self.viewer.layers]
            self._scan_layers = [one for one in scans if _same(scan_of(one), self._volume)]
            self._set(state.with_scan(self.state, self._volume))

    def _on_view(self, _event: Any = None) -> None:
        mirrored = self._signs is not None and self._signs.mirrored
        self.form.show_mirror(MIRRORED if mirrored else "")

    # -- the inside --------------------------------------------------------------------------

    def _connect(self) -> None:
        form = self.form
        form.open_file.clicked.connect(self.choose_file)
        form.open_folder.clicked.connect(self.choose_folder)
        form.browse.clicked.connect(self.choose_model)
        form.explain.clicked.connect(self.explain)
        form.cancel.clicked.connect(self.cancel)
        form.model.currentIndexChanged.connect(self._on_model)
        for keys, deed in (("Shift+E", self.explain), ("Shift+A", self.take_point)):
            QShortcut(QKeySequence(keys), self).activated.connect(deed)
        self.destroyed.connect(self._control.stop)

    def _fill_models(self) -> None:
        self.form.model.addItem(CHOOSE, None)
        for name, folder in sample_models().items():
            self.form.model.addItem(f"sample: {name}", folder)

    def _on_model(self) -> None:
        chosen = self.form.model.currentData()
        self._set(state.with_model(self.state, Path(chosen).name if chosen else ""))

    def _add(self, layers: Sequence[LayerData]) -> list[Layer]:
        made = [Layer.create(*one) for one in layers]
        for layer in made:
            self.viewer.add_layer(layer)
        return made

    def _go_to(self, world_mm: Floats) -> None:
        """Show the slices through a point of the layers' world."""
        last = self.viewer.dims.ndim
        self.viewer.dims.set_point(tuple(range(last - 3, last)), tuple(world_mm.tolist()))

    def _look_at(self, layers: Sequence[Layer]) -> None:
        """Show the middle of a newly opened scan."""
        low, high = layers[0].extent.world
        self._go_to((low + high) / 2)
        self.viewer.reset_view()

    def _set(self, new: state.DockState) -> None:
        self.state = new
        self._show()

    def _show(self) -> None:
        self.form.show_state(self.state)
        self._on_view()

    def _halt(self) -> None:
        """Tell the worker and the work in its thread to stop; neither is waited for."""
        self._control.stop()
        if self.worker is not None:
            self.worker.quit()
            self.worker = None

    def _attach(self) -> None:
        """Listen to the viewer and put the letters on its canvas."""
        self._signs = Signs(self.viewer)
        for event, deed in self._listeners():
            event.connect(deed)

    def shut(self) -> None:
        """Stop everything and let go of the viewer: the window or the dock closes."""
        if self._signs is None:
            return
        self._halt()
        self.state = state.stopped(self.state, "")
        for event, deed in self._listeners():
            event.disconnect(deed)
        self._signs.remove()
        self._signs = None

    def _listeners(self) -> tuple[tuple[Any, Callable[[Any], None]], ...]:
        events = self.viewer.layers.events
        return (
            (events.inserted, self._on_inserted),
            (events.removed, self._on_removed),
            (self.viewer.dims.events.ndisplay, self._on_view),
            (self.viewer.scene.camera.events.orientation, self._on_view),
        )

    def showEvent(self, event: QShowEvent | None) -> None:  # noqa: N802
        """Watch the window, whose closing no dock is told of."""
        if self._signs is None:
            self._attach()
            self._adopt_newest()
            self._show()
        window = self.window()
        if window is not None and window is not self._window:
            self._window = window
            window.installEventFilter(self)
        super().showEvent(event)

    def changeEvent(self, event: QEvent | None) -> None:  # noqa: N802
        """Stop everything when the dock is taken out of the window."""
        if event and event.type() == QEvent.Type.ParentChange and self.parent() is None:
            self.shut()
        super().changeEvent(event)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:  # noqa: N802
        """Stop everything when the window has closed (not when it is only minimised)."""
        hidden = event is not None and event.type() == QEvent.Type.Hide and not event.spontaneous()
        if hidden and watched is self._window:
            self.shut()
        return False


def _same(one: Volume | None, other: Volume | None) -> bool:
    """Whether two volumes are the same voxels in the same place."""
    return one is not None and other is not None and one.source.sha256 == other.source.sha256


def _hide(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.visible = False
