"""Takes a picture of napari with the dock and a result, to be looked at.

xvfb-run -a python tests/napari/shot.py SCAN MODEL OUT.png [POINT]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from napari_plugin.dock import EvidenceDock

MANIFEST = Path(__file__).resolve().parents[2] / "napari_plugin" / "napari.yaml"
WIDGET = "Evidence maps (3D Grad-CAM)"
TIMEOUT_S = 300
SETTLE_S = 1.5


def until(true: Callable[[], bool], seconds: float) -> None:
    """Let Qt work until something is true."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.01)


def run(dock: EvidenceDock, scan: Path, model: Path, point: str) -> None:
    """Open, choose, explain; exits with the dock's words where that fails."""
    dock.open_path(scan)
    until(lambda: not dock.state.busy, TIMEOUT_S)
    dock.set_model(model)
    dock.form.at.setText(point)
    dock.explain()
    until(lambda: not dock.state.busy, TIMEOUT_S)
    if dock.state.error:
        raise SystemExit(dock.state.error)


def main(scan: str, model: str, out: str, point: str = "") -> None:
    """The picture, written to `out`."""
    import napari
    from npe2 import PluginManager, PluginManifest

    manager = PluginManager.instance()
    manager.discover()
    if "med-gradcam" not in manager:
        manager.register(PluginManifest.from_file(MANIFEST))
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1400, 900)
    _, dock = viewer.window.add_plugin_dock_widget("med-gradcam", WIDGET)
    run(dock, Path(scan), Path(model), point)
    until(lambda: False, SETTLE_S)
    viewer.screenshot(out, canvas_only=False, flash=False)
    viewer.close()


if __name__ == "__main__":
    sys.path.insert(0, str(MANIFEST.parents[1]))
    main(*sys.argv[1:])
