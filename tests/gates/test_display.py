"""The window tests have a display: a Qt window opens and is painted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytestqt.qtbot import QtBot


@pytest.mark.gui
def test_a_window_opens_and_is_painted(qtbot: QtBot) -> None:
    from qtpy.QtGui import QColor
    from qtpy.QtWidgets import QWidget

    window = QWidget()
    qtbot.addWidget(window)
    palette = window.palette()
    palette.setColor(window.backgroundRole(), QColor("#ff8000"))
    window.setPalette(palette)
    window.resize(60, 40)
    with qtbot.waitExposed(window):
        window.show()
    assert window.grab().toImage().pixelColor(30, 20).name() == "#ff8000"
