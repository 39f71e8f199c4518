"""Which head scans are shipped?"""

from __future__ import annotations

from pathlib import Path

from .brain import BRAIN_GRID, render_brain, steady_brain_pool
from .cases import BASE_LOG_ODDS
from .files import write_json
from .shipped import LEFT, RIGHT, Wish, make, write

MR_WISHES = (
    Wish("core", 9101, {"core": RIGHT}, 1),
    Wish("rim", 9102, {"rim": LEFT}, 1),
    Wish("both", 9103, {"core": LEFT, "rim": RIGHT}, 0),
    Wish("healthy", 9104, {}, 0),
)


def make_mr(folder: Path) -> None:
    """Render the head MR scans as NIfTI in R, A, S order."""
    cases, pool = [], steady_brain_pool()
    for wish in MR_WISHES:
        shipped = make(wish, render_brain(wish.seed), pool)
        cases.append(write(shipped, BRAIN_GRID, folder, "RAS"))
        print("mr", wish.name, flush=True)
    write_json(
        folder / "truth.json",
        {
            "modality": "MR",
            "unit": "a.u.",
            "healthy_log_odds": BASE_LOG_ODDS,
            "log_odds_of": "tumour",
            "cases": cases,
        },
    )
