"""What every test may use: the root of the repository and the folder of real scans."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "MED_GRADCAM_REAL_DATA"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans and trained networks; skips where it is not set."""
    value = os.environ.get(VARIABLE)
    if not value:
        pytest.skip(f"{VARIABLE} is not set: no real scans here")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{VARIABLE}={value} is no folder")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent
