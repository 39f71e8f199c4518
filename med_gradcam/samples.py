"""Where are the small volumes and trained networks that come with the package?"""

from __future__ import annotations

from pathlib import Path

from med_gradcam.errors import ImageError

_HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """The sample_volumes folder: inside an installed package, or beside it in a checkout.

    Raises:
        ImageError: it is in neither place.
    """
    for place in (_HERE / "_samples", _HERE.parent / "sample_volumes"):
        if (place / "nets").is_dir():
            return place
    raise ImageError(
        "expected sample_volumes in the package or beside it, found neither; reinstall the "
        "package or clone the repository."
    )
