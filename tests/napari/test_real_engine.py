"""Does the dock drive the real engine: a tiny trained-like network, run, cancelled, refused?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import med_gradcam
from med_gradcam.volume import Volume
from napari_plugin.dock import EvidenceDock

pytestmark = pytest.mark.gui
STAGE = {"kernel_size": 3, "padding": 1}
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("Conv3d", {"in_channels": 1, "out_channels": 4, **STAGE}),
    ("ReLU", {}),
    ("MaxPool3d", {"kernel_size": 2}),
    ("Conv3d", {"in_channels": 4, "out_channels": 4, **STAGE}),
    ("ReLU", {}),
    ("AdaptiveAvgPool3d", {"output_size": 1}),
    ("Flatten", {}),
    ("Linear", {"in_features": 4, "out_features": 2}),
]


@pytest.fixture
def tiny_net(tmp_path: Path) -> Path:
    """A model folder: a net that answers to brightness, written as any user would."""
    torch.manual_seed(1)
    modules = [getattr(torch.nn, name)(**arguments) for name, arguments in LAYERS]
    net = torch.nn.Sequential(*modules)
    folder = tmp_path / "tiny"
    folder.mkdir()
    spec = {
        "format": "med-gradcam-model/1",
        "name": "tiny",
        "task": "classification",
        "labels": ["clear", "bright"],
        "link": "softmax",
        "input": {
            "modality": "CT",
            "axes": "SPL",
            "channels": 1,
            "patch": None,
            "spacing_mm": None,
            "intensity": [["clip", -1000, 1000], ["scale", 0.001]],
        },
        "layers": LAYERS,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    save_file(net.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture
def dock(
    make_napari_viewer_proxy: Any,
    plugin: str,
    tiny_net: Path,
    make_scan: Callable[..., Volume],
    monkeypatch: pytest.MonkeyPatch,
    qtbot: Any,
) -> EvidenceDock:
    viewer = make_napari_viewer_proxy()
    _, made = viewer.window.add_plugin_dock_widget(plugin, "Evidence maps (3D Grad-CAM)")
    monkeypatch.setattr(med_gradcam, "read", lambda _path: make_scan("LPS"))
    made.open_path(Path("scan.nii.gz"))
    qtbot.waitUntil(lambda: not made.state.busy, timeout=20_000)
    made.set_model(tiny_net)
    return made  # type: ignore[no-any-return]


def test_explain_adds_up(dock: EvidenceDock, qtbot: Any, tmp_path: Path) -> None:
    dock.explain()
    qtbot.waitUntil(lambda: not dock.state.busy, timeout=60_000)
    assert dock.state.error == ""
    assert len(dock.viewer.layers) == 3
    against, supporting = (layer.data for layer in list(dock.viewer.layers)[1:])
    table = dict(dock.state.rows)
    net = float(table["Net evidence"].split()[0])
    voxel_ml = 2.0 * 2.5 * 3.0 / 1000
    drawn = (supporting.sum(dtype=np.float64) - against.sum(dtype=np.float64)) * voxel_ml
    assert drawn == pytest.approx(net, abs=0.02)


def test_cancel_restores_the_model(dock: EvidenceDock, qtbot: Any, tiny_net: Path) -> None:
    model = dock._models.load(tiny_net)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    modes = [module.training for module in model.net.modules()]
    dock.explain()
    worker = dock.worker
    qtbot.waitUntil(lambda: dock.state.step is not None, timeout=20_000)
    dock.cancel()
    qtbot.waitUntil(lambda: not worker.is_running and not dock._control.lock.locked(), timeout=5000)
    assert len(dock.viewer.layers) == 1
    assert all(torch.equal(before[name], value) for name, value in model.net.state_dict().items())
    assert [module.training for module in model.net.modules()] == modes
    for module in model.net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_refusals_are_shown_in_the_engines_words(dock: EvidenceDock, qtbot: Any) -> None:
    refusals = {
        "target": ("brite", "expected a known class, got 'brite'; near ones of 2: bright"),
        "layer": ("conv9", "expected a known layer, got 'conv9'"),
        "at": ("here", "expected .*'here'"),
    }
    for name, (text, words) in refusals.items():
        field = getattr(dock.form, name)
        field.setText(text)
        dock.explain()
        qtbot.waitUntil(lambda: not dock.state.busy, timeout=20_000)
        assert re.search(words, dock.form.error.text()), dock.form.error.text()
        field.clear()
    assert len(dock.viewer.layers) == 1
