"""What did the caller hand in, and what shall be remembered of the call?"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from med_gradcam import __version__
from med_gradcam.errors import ImageError, ModelError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.model import InputSpec, Model
from med_gradcam.models.python_factory import weights_digest
from med_gradcam.prepare import Prepared
from med_gradcam.progress import Progress
from med_gradcam.provenance import Provenance
from med_gradcam.target import LINKS
from med_gradcam.volume import Volume


@dataclass(frozen=True, slots=True)
class Request:
    """The settings of one call of explain()."""

    target: str
    layer: str
    method: str
    reference: str | Volume
    at: str | None
    precise: bool
    device: str
    threads: int | None
    seed: int
    progress: Progress

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"expected a seed of 0 or more, got {self.seed}.")
        if not isinstance(self.reference, (str, Volume)):
            raise UsageError(
                f"expected a reference of auto, tissue, zero, value:X or a Volume, "
                f"got {type(self.reference).__name__}."
            )

    @contextmanager
    def threads_set(self) -> Iterator[None]:
        """Torch's thread count for the time of the call."""
        if self.threads is None:
            yield
            return
        if self.threads < 1:
            raise UsageError(f"expected at least one thread, got {self.threads}.")
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def on_device(self, model: Model) -> Iterator[torch.device]:
        """The network on the wished device ("auto": where it is), and back afterwards."""
        here = next(model.net.parameters(), torch.empty(0)).device
        if self.device == "auto":
            yield here
            return
        try:
            wished = torch.device(self.device)
            torch.empty(1, device=wished)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"expected a device such as auto, cpu or cuda that this machine has, "
                f"got {self.device!r}."
            ) from error
        model.net.to(wished)
        try:
            yield wished
        finally:
            model.net.to(here)


def as_model(model: object, image: object, link: str | None) -> Model:
    """A Model as it is, or a bare torch module with as little assumed as possible."""
    if isinstance(model, Model):
        if link is not None:
            raise UsageError("expected no link beside a Model, which has one of its own.")
        return model
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "expected a plain torch module, got TorchScript, which cannot be explained yet; use "
            "the module it was made from."
        )
    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"expected a Model (med_gradcam.load_model) or a torch module, "
            f"got {type(model).__name__}."
        )
    if link is not None and link not in LINKS:
        raise UsageError(f"expected a link of {', '.join(LINKS)}, got {link!r}.")
    channels = image.array.shape[0] if isinstance(image, Volume) else _array(image).shape[0]
    return Model(
        model,
        InputSpec(channels=channels),
        link=link or "softmax",  # checked above
        name=type(model).__name__,
        weights_sha256=weights_digest(model),
    )


def as_volume(image: object, affine: object, model: Model) -> Volume:
    """A Volume as it is, or a bare array or tensor on voxels of 1 mm (or on `affine`)."""
    if isinstance(image, Volume):
        if affine is not None:
            raise UsageError("expected no affine beside a Volume, which has one of its own.")
        return image
    array = _array(image)
    matrix = np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)
    i, j, k = (int(n) for n in array.shape[1:])
    grid = Geometry((i, j, k), matrix)
    return Volume(
        array, grid, model.input.modality, "HU" if model.input.modality == "CT" else "a.u."
    )


def _array(image: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if isinstance(image, torch.Tensor):
        if image.is_complex():
            raise ImageError(f"expected real numbers, got a tensor of {image.dtype}.")
        image = image.detach().cpu().float().numpy()
    array = np.asarray(image)
    if array.dtype.kind not in "iufb":
        raise ImageError(
            f"expected a Volume (med_gradcam.read), an array or tensor, got {type(image).__name__}."
        )
    if array.ndim == 5 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4:
        raise ImageError(
            f"expected an array (I, J, K), (C, I, J, K) or (1, C, I, J, K), got {array.shape}."
        )
    return array.astype(np.float32)


def _versions() -> dict[str, str]:
    found = {"med_gradcam": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "nibabel", "pydicom", "highdicom", "SimpleITK"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance(
    request: Request, volume: Volume, model: Model, prepared: Prepared, where: torch.device
) -> Provenance:
    """What is written beside a result: nothing that names a person or a file."""
    source = volume.source
    uids: dict[str, object] = {}
    if source.study_uid is not None:
        uids = {
            "study": source.study_uid,
            "series": source.series_uid,
            "sop_instances": list(source.sop_uids),
            "frame_of_reference": volume.grid.frame_uid,
        }
    wish = request.reference
    parameters = {
        "target": request.target,
        "layer": request.layer,
        "method": request.method,
        "reference": "file" if isinstance(wish, Volume) else wish,
        "at": request.at,
        "precise": request.precise,
    }
    first = next(model.net.parameters(), torch.empty(0))
    return Provenance(
        versions=_versions(),
        parameters=parameters,
        input_sha256=(source.sha256,),
        weights_sha256=model.weights_sha256,
        model_name=model.name,
        uids=uids,
        device=str(where),
        dtype=str(first.dtype).removeprefix("torch."),
        seed=request.seed,
        utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        notes=prepared.notes,
    )
