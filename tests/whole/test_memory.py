"""Does a CT of 512 x 512 x 300 voxels stay within the scan, its reference and two maps?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCAN_GIB = 512 * 512 * 300 * 4 / 2**30  # in single precision; the file's own int16 is half of it
PROGRAM = """
import json, resource
import numpy as np
import med_gradcam as mg
from tests.whole.nets import classifier, patched, segmenter

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

rng = np.random.default_rng(0)
array = np.empty((1, 512, 512, 300), np.int16)
for k in range(300):
    array[0, :, :, k] = rng.normal(-850, 80, (512, 512))
array[0, 200:260, 200:260, 100:150] = 40
scan = mg.Volume(array, mg.Geometry((512, 512, 300), np.diag([0.7, 0.7, 1, 1])), "CT", "HU")
# torch and what it loads on first use, with a small part of the scan
part = np.ascontiguousarray(array[:, 180:308, 180:308, 80:144])
small = mg.Volume(part, mg.Geometry((128, 128, 64), np.eye(4)), "CT", "HU")
HOW
explain(small)
before = peak()
w = explain(scan)
print(json.dumps({"before": before, "peak": peak(), "windows": len(w.windows), "net": w.net}))
"""
POOLED = """
model = patched(classifier(outputs=2), (64, 64, 64))
def explain(v):
    return mg.explain_whole(v, model, target="1", layer="4", overlap=0.0)
"""
DENSE = """
net = segmenter(classes=2)
def explain(v):
    x, y, z = v.grid.world_ras([n / 2.2 for n in v.grid.shape])
    target = f"1@box:ras:{x},{y},{z}:40"
    given = {"target": target, "layer": "1", "overlap": 0.25, "link": "softmax"}
    return mg.explain_whole(v, net, window=(64,) * 3, **given)
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("how", "scans"),
    [
        (POOLED, 4.5),  # prepared once, and what it takes to find the reference tissue
        (DENSE, 9.0),  # and the sum of importances, the lattice of cells and the map
    ],
)
def test_the_peak_is_a_few_scans(how: str, scans: float) -> None:
    root = Path(__file__).resolve().parents[2]
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("HOW", how)],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(made.stdout)
    assert found["windows"] > 300
    assert found["peak"] - found["before"] < scans * SCAN_GIB
