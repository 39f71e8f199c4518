"""How does a picture become a file that holds nothing but its pixels?"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image


def store(image: Image.Image, path: Path) -> Path:
    """Write a PNG with nothing but pixels in it."""
    with path.open("wb") as file:
        image.save(file, format="PNG", compress_level=2)
        file.flush()
        os.fsync(file.fileno())
    return path
