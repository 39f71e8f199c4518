"""Is our input for a network the one that its own pipeline would have made of the same file?

A model may carry its source's own preprocessing. It is run on the files of a scan, placed beside
ours by the affines, and where the two inputs differ at all the network says by how much its outputs
do. More than 1e-4 is refused unless the user accepts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from med_gradcam import outputs
from med_gradcam.errors import ModelError
from med_gradcam.loading import load_model, read
from med_gradcam.model import Model
from med_gradcam.prepare import Prepared, prepare
from med_gradcam.volume import Volume, digest

MOST = 1e-4  # of any output, in the network's own unit
_SAME_VOXELS = 0.01  # share of a voxel by which the two grids may lie apart


def drift(model_path: str, image_path: str | Sequence[str], at: str | None = None) -> float:
    """The greatest difference of any output between our input and the model's own pipeline's.

    Infinite where the voxels lie elsewhere; 0 where the inputs are the same.

    Raises:
        ModelError, ImageError: model or image cannot be read or compared.
    """
    model, volume = load_model(model_path), read(image_path)
    return difference(model, volume, prepare(volume, model, at))


def difference(model: Model, volume: Volume, prepared: Prepared) -> float:
    """The same for a model and a scan that are loaded; costs two predictions if inputs differ.

    Raises:
        ModelError: the model has no pipeline of its own, or it fails.
    """
    if model.source_input is None:
        raise ModelError(f"expected a model with preprocessing of its own, got {model.name!r}.")
    ours = prepared.network_input()
    theirs = _beside(*model.source_input(volume.source.paths), prepared, ours)
    if theirs is None:
        return math.inf
    if np.array_equal(ours, theirs):
        return 0.0
    return _apart(model.net, ours, theirs)


def _beside(
    array: npt.NDArray[np.float32],
    affine: npt.NDArray[np.float64],
    prepared: Prepared,
    ours: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32] | None:
    """Their input on our patch, ours beside their scan; None where the grids do not fit."""
    if array.ndim != 4 or array.shape[0] != ours.shape[0]:
        return None
    if np.isnan(affine).any():  # they do not say where it lies
        return array if array.shape == ours.shape else None
    between = np.linalg.solve(affine, prepared.grid.affine)
    corners = np.array([[0, 0, 0, 1], [*ours.shape[1:], 1]]) @ between.T
    first = np.round(between[:3, 3]).astype(int)
    wanted = np.array([first, first + ours.shape[1:]])
    if np.abs(corners[:, :3] - wanted).max() > _SAME_VOXELS:
        return None
    theirs, inside, source = ours.copy(), [slice(None)], [slice(None)]
    for start, n, size in zip(first.tolist(), ours.shape[1:], array.shape[1:], strict=True):
        low, high = max(start, 0), min(start + n, size)
        if high <= low:
            return None
        source.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    theirs[tuple(inside)] = array[tuple(source)]
    return theirs


def _apart(
    net: torch.nn.Module, ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]
) -> float:
    where = next(net.parameters(), torch.empty(0))
    with torch.no_grad():
        first, second = (
            [t for _, t in outputs.tensors(net(torch.from_numpy(x)[None].to(where)))]
            for x in (ours, theirs)
        )
    pairs = zip(first, second, strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def checked(model: Model, volume: Volume, prepared: Prepared, *, accept: bool) -> Prepared:
    """The same scan, with what was found written down.

    Raises:
        ModelError: our input is not the pipeline's own, and the user did not accept that.
    """
    if model.drift:
        what = f"these of its steps cannot be done here: {'; '.join(model.drift)}"
    elif model.source_input is None:
        return prepared
    elif volume.source.kind != "nifti" or not volume.source.paths:
        said = "not compared with the model's own preprocessing: the scan is no NIfTI file"
        return replace(prepared, notes=(*prepared.notes, said))
    else:
        what = _found(model, volume, prepared)
    if not what:
        return prepared
    if not accept:
        raise ModelError(
            f"expected the input that the preprocessing of {model.name!r} makes of this scan, but "
            f"{what}; pass --accept-drift (accept_drift=True) to explain it nevertheless."
        )
    said = f"the model's own preprocessing differs, which was accepted: {what}"
    return replace(prepared, notes=(*prepared.notes, said))


def _found(model: Model, volume: Volume, prepared: Prepared) -> str:
    """What is off, in words; "" where all is well."""
    try:
        apart = difference(model, volume, prepared)
    except ModelError as error:
        return f"the two could not be compared ({error})".replace(".)", ")")
    if apart <= MOST:
        return ""
    if digest(volume.array, volume.grid) != volume.source.sha256:
        return ""  # the voxels are not those of the file any more
    if math.isinf(apart):
        return "its voxels lie elsewhere than ours"
    return f"its outputs differ by {apart:.2g} (at most {MOST:g} is taken as the same)"
