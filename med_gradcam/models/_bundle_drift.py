"""Does our input for a bundle's network equal the one its own preprocessing makes?

The bundle's literal transforms are run by MONAI on the same files: classes of monai.transforms that
our own readers know, built with literals. Nothing else of the bundle is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ImageError, ModelError
from med_gradcam.model import Source
from med_gradcam.models._bundle_transforms import Pipeline
from med_gradcam.models._bundle_words import Above
from med_gradcam.running import first_line

Floats = npt.NDArray[np.float32]
_OLD = {"AddChannel": "EnsureChannelFirst", "AsChannelFirst": "EnsureChannelFirst"}
_NOT_HERE = ("device", "lazy", "reader", "meta_keys", "meta_key_postfix", "keys", "image_only")
_KEY = "image"
_DTYPES = ("float32", "float64", "float")


def source(steps: Pipeline) -> Source:
    """What the bundle's own transforms make of image files: array (C, i, j, k) and affine."""

    def made(paths: Sequence[str]) -> tuple[Floats, npt.NDArray[np.float64]]:
        return _run(steps, paths)

    return made


def _run(steps: Pipeline, paths: Sequence[str]) -> tuple[Floats, npt.NDArray[np.float64]]:
    try:
        from monai import transforms
    except ImportError as error:
        raise ModelError(
            "comparing with the bundle's own preprocessing needs MONAI, which is not installed: "
            "pip install 'med_gradcam[monai]'."
        ) from error
    several = len(steps.keys) > 1
    if several and len(paths) != len(steps.keys):
        raise ImageError(f"expected {len(steps.keys)} images, got {len(paths)}.")
    case: Any = (
        dict(zip(steps.keys, paths, strict=True))
        if several
        else {_KEY: paths[0] if len(paths) == 1 else list(paths)}
    )
    keys: list[str] = list(steps.keys) if several else [_KEY]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, values in steps.literal:
                case = _transform(transforms, name, values, keys)(case)
                keys = [str(values["name"])] if name == "ConcatItems" else keys
    except Exception as error:  # MONAI raises whatever it likes
        raise ModelError(
            f"the bundle's own preprocessing fails on this image: {first_line(error)}."
        ) from error
    image = case[keys[0]]
    affine = np.asarray(getattr(image, "affine", np.full((4, 4), np.nan)), dtype=np.float64)
    return np.ascontiguousarray(np.asarray(image), dtype=np.float32), affine


def _transform(transforms: Any, name: str, values: dict[str, Any], keys: list[str]) -> Any:
    known = getattr(transforms, f"{_OLD.get(name, name)}d")
    if name in _OLD:
        return known(keys=keys)
    given = {k: _literal(k, v) for k, v in values.items() if k not in _NOT_HERE}
    if "source_key" in given:
        given["source_key"] = keys[0]
    return known(keys=keys, **given)


def _literal(name: str, value: Any) -> Any:
    """A setting as MONAI takes it."""
    if isinstance(value, Above):
        limit = value.limit
        return lambda x: x > limit
    if name == "dtype" and value in _DTYPES:
        return np.dtype("float32" if value == "float" else value).type
    return value
