"""Which widgets does the dock consist of? Only building and showing; dock.py says what they do."""

from __future__ import annotations

import html

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFormLayout,
    QGroupBox,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_plugin.state import DISCLAIMER, DockState

CHOOSE = "choose a model …"
_TABLE_WIDTH, _TABLE_HEIGHT = 330, 160  # pixels
_RED = "color: #ff6b5e; font-weight: bold;"
_AMBER = "color: #f0b429;"


def label(style: str = "") -> QLabel:
    """A text that wraps and never reads its text as markup."""
    made = QLabel()
    made.setTextFormat(Qt.TextFormat.PlainText)
    made.setWordWrap(True)
    made.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    if style:
        made.setStyleSheet(style)
    return made


def button(text: str, tip: str) -> QPushButton:
    """A button with a tooltip."""
    made = QPushButton(text)
    made.setToolTip(tip)
    return made


def field(placeholder: str, tip: str) -> QLineEdit:
    """A text field with a tooltip."""
    made = QLineEdit()
    made.setPlaceholderText(placeholder)
    made.setToolTip(tip)
    return made


def _table() -> QTableWidget:
    made = QTableWidget(0, 2)
    across, down = made.horizontalHeader(), made.verticalHeader()
    if across is not None and down is not None:
        across.setVisible(False)
        across.setSectionResizeMode(0, QHeaderView.ResizeMode.ResizeToContents)
        across.setSectionResizeMode(1, QHeaderView.ResizeMode.Stretch)
        down.setVisible(False)
        down.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
    made.setEditTriggers(QTableWidget.EditTrigger.NoEditTriggers)
    made.setSelectionMode(QTableWidget.SelectionMode.NoSelection)
    made.setFocusPolicy(Qt.FocusPolicy.NoFocus)
    made.setWordWrap(True)
    made.setMinimumWidth(_TABLE_WIDTH)
    made.setMinimumHeight(_TABLE_HEIGHT)
    made.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
    return made


class Form:
    """The widgets of the dock, by name, laid out in `parent`."""

    def __init__(self, parent: QWidget) -> None:
        self.open_file = button("Open file …", "Open a NIfTI scan (.nii, .nii.gz).")
        self.open_folder = button(
            "Open folder …",
            "Open a folder with one DICOM series, or an explanation that was written before.",
        )
        self.scan, self.oblique = label(), label(_AMBER)
        self.model = QComboBox()
        self.model.setToolTip("The network to explain: a model folder with spec.json and weights.")
        self.model.setSizeAdjustPolicy(
            QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon
        )
        self.model.setMinimumContentsLength(12)
        self.browse = button("Browse …", "Choose a model folder.")
        self.target = field("predicted class", "What to explain: a label of the model, or A-vs-B.")
        self.layer = field("automatic", "The layer to look at: its name in the network.")
        self.at = field(
            "whole scan, or ras:X,Y,Z",
            "For networks that see a small box: its centre as ras:X,Y,Z, lps:X,Y,Z (mm) or "
            "ijk:I,J,K. Shift+A takes the point under the mouse.",
        )
        self.inputs: tuple[QWidget, ...] = (
            *(self.open_file, self.open_folder, self.model, self.browse),
            *(self.target, self.layer, self.at),
        )
        self.explain = button("Explain (Shift+E)", "")
        self.cancel = button("Cancel", "Stop the run; nothing is changed.")
        self.bar = QProgressBar()
        self.status, self.error = label(), label(_RED)
        self.mirror = label(_RED)
        self.table, self.warnings = _table(), label(_AMBER)
        self.disclaimer = label()
        self.disclaimer.setText(DISCLAIMER)
        self._lay_out(parent)

    def _lay_out(self, parent: QWidget) -> None:
        column = QVBoxLayout(parent)
        column.addWidget(self.mirror)
        column.addWidget(self._scan_box())
        column.addWidget(self._model_box())
        column.addLayout(_row(self.explain, self.cancel))
        for widget in (self.bar, self.status, self.error):
            column.addWidget(widget)
        column.addWidget(self._result_box(), stretch=1)
        column.addWidget(self.disclaimer)

    def _scan_box(self) -> QGroupBox:
        box = QGroupBox("Scan")
        column = QVBoxLayout(box)
        column.addLayout(_row(self.open_file, self.open_folder))
        column.addWidget(self.scan)
        column.addWidget(self.oblique)
        return box

    def _model_box(self) -> QGroupBox:
        box = QGroupBox("Model")
        rows = QFormLayout(box)
        rows.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
        rows.addRow(_row(self.model, self.browse))
        rows.addRow("Finding", self.target)
        rows.addRow("Layer", self.layer)
        rows.addRow("Point", self.at)
        return box

    def _result_box(self) -> QGroupBox:
        box = QGroupBox("Result")
        column = QVBoxLayout(box)
        column.addWidget(self.table, stretch=1)
        column.addWidget(self.warnings)
        return box

    def show_state(self, state: DockState) -> None:
        """Make every widget say what the state says."""
        self.scan.setText(state.scan or "No scan is open.")
        _text(self.oblique, state.oblique)
        _text(self.status, state.status)
        _text(self.error, state.error)
        self.error.setToolTip(f"<pre>{html.escape(state.details)}</pre>" if state.details else "")
        _text(self.warnings, "\n".join(state.warnings))
        for widget in self.inputs:
            widget.setEnabled(not state.busy)
        self.explain.setEnabled(state.can_explain)
        self.explain.setToolTip(state.missing or "Show what raises and lowers the model's score.")
        self.cancel.setEnabled(state.busy)
        self._show_progress(state)
        self._show_rows(state)

    def show_mirror(self, words: str) -> None:
        """Show or clear the alarm that the picture is flipped."""
        _text(self.mirror, words)

    def _show_progress(self, state: DockState) -> None:
        step = state.step
        self.bar.setVisible(state.busy)
        known = step is not None and step.total > 0
        self.bar.setRange(0, step.total if step is not None and known else 0)
        self.bar.setValue(step.done if step is not None and known else 0)

    def _show_rows(self, state: DockState) -> None:
        self.table.setVisible(bool(state.rows))
        self.table.setRowCount(len(state.rows))
        for row, pair in enumerate(state.rows):
            for column, text in enumerate(pair):
                self.table.setItem(row, column, QTableWidgetItem(text))


def _row(*widgets: QWidget) -> QHBoxLayout:
    made = QHBoxLayout()
    for widget in widgets:
        made.addWidget(widget)
    return made


def _text(widget: QLabel, text: str) -> None:
    """Show a text, or take no room for none."""
    widget.setText(text)
    widget.setVisible(bool(text))
