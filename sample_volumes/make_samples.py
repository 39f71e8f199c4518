"""Which command renders the sample scans? `python make_samples.py [ct] [mr]` writes them here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from builder.cases import BASE_LOG_ODDS, Scene
from builder.chest import CHEST_GRID, render_chest
from builder.dicom_series import write_ct_series
from builder.files import write_checksums, write_json
from builder.pools import steady_chest_pool
from builder.shipped import LEFT, RIGHT, Wish, make, write

HERE = Path(__file__).resolve().parent

CT_WISHES = (
    Wish("core", 9001, {"core": RIGHT}, 1),
    Wish("rim", 9002, {"rim": LEFT}, 1),
    Wish("both", 9003, {"core": RIGHT, "rim": LEFT}, 1),
    Wish("healthy", 9004, {}, 0),
)


def make_ct() -> None:
    """Render the chest CT scans: NIfTI with left-pointing first axis, and one DICOM series."""
    folder, cases = HERE / "ct", []
    pool = steady_chest_pool()
    for wish in CT_WISHES:
        chest = render_chest(wish.seed)
        shipped = make(wish, Scene(chest.hu, chest.lung_depth_mm), pool)
        cases.append(write(shipped, CHEST_GRID, folder, "LAS"))
        if wish.name == "core":
            write_ct_series(folder / "core_dicom", shipped.scan, CHEST_GRID, "core")
            cases[-1]["dicom"] = "core_dicom"
        print("ct", wish.name, np.asarray(shipped.scan).shape, flush=True)
    write_json(
        folder / "truth.json",
        {
            "modality": "CT",
            "unit": "HU",
            "healthy_log_odds": BASE_LOG_ODDS,
            "log_odds_of": "malignant",
            "cases": cases,
        },
    )


def main() -> None:
    """Render what was asked for, or everything."""
    wanted = sys.argv[1:] or ["ct", "mr"]
    if "ct" in wanted:
        make_ct()
    if "mr" in wanted:
        from builder.brain_samples import make_mr

        make_mr(HERE / "mr")
    write_checksums(HERE)


if __name__ == "__main__":
    main()
