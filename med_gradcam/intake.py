"""What did the caller hand in, and what shall be remembered of the call?"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch

from med_gradcam import __version__
from med_gradcam.containers.opener import opened
from med_gradcam.detection import wrapped
from med_gradcam.errors import ImageError, ModelError, UsageError
from med_gradcam.geometry import Geometry
from med_gradcam.model import InputSpec, Model
from med_gradcam.models.python_factory import weights_digest
from med_gradcam.prepare import Prepared
from med_gradcam.progress import Progress
from med_gradcam.provenance import Provenance
from med_gradcam.reference import value_of
from med_gradcam.target import LINKS, Target
from med_gradcam.volume import Volume

# CLASS@mask:FILE and so on; a label may hold an @ of its own.
_PLACED = re.compile(r"(.+)@(mask|component|voxel|box):(.+)", re.DOTALL)
REFERENCES = ("auto", "tissue", "zero")
_COMPILED = "OptimizedModule"  # what torch.compile returns; by name, its own module loads slowly


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What the caller wants explained, as far as words say it.

    `classes`: auto, a label, an index or A-vs-B; `place`: "", mask, component, voxel or box, and
    its `where`; or a `mask` of the caller's; or a `function` of theirs; or a ready `target`.
    """

    classes: str
    place: str = ""
    where: str = ""
    mask: object = None
    function: Callable[[Any], Any] | None = None
    target: Target | None = None

    @property
    def whole(self) -> str:
        """The words of it, for the record: no name of a file."""
        if self.target is not None:
            return self.target.label
        if self.function is not None:
            return function_label(self.function)
        if not self.place:
            return self.classes
        where = ":file" if self.place == "mask" else f":{self.where}"
        return f"{self.classes}@{self.place}{where}"


def function_label(function: Callable[[Any], Any]) -> str:
    """What to call a target function of the caller's: its `label`, or its own name."""
    named = getattr(function, "label", None) or getattr(function, "__name__", "<lambda>")
    text = str(named)
    return "own function" if text == "<lambda>" or not text.isprintable() else text


def asked(target: object) -> Asked:
    """What is meant by the `target` of explain().

    A text or an index, a pair (classes, mask), a function of the raw output, or a Target.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(target, Target):
        return Asked("", target=target)
    if isinstance(target, tuple) and len(target) == 2:
        return Asked(str(target[0]), "mask", mask=target[1])
    if isinstance(target, (str, int, np.integer)) and not isinstance(target, bool):
        found = _PLACED.fullmatch(str(target))
        return Asked(str(target)) if found is None else Asked(found[1], found[2], found[3])
    if callable(target):
        return Asked("", function=target)
    raise UsageError(
        f"expected a target such as auto, a label, an index, A-vs-B, (label, mask) or a function, "
        f"got {type(target).__name__}."
    )


@dataclass(frozen=True, slots=True)
class Request:
    """The settings of one call of explain()."""

    target: Asked
    layer: str
    method: str
    reference: str | Volume | Sequence[Volume]
    at: str | None
    precise: bool
    device: str
    threads: int | None
    seed: int
    progress: Progress
    output: str = ""
    quick: bool = False
    alignment: Literal["nominal", "measured"] = "nominal"
    fast: bool = False
    accept_drift: bool = False

    def __post_init__(self) -> None:
        if self.alignment not in ("nominal", "measured"):
            raise UsageError(
                f"expected an alignment of nominal or measured, got {self.alignment!r}."
            )
        if self.seed < 0:
            raise UsageError(f"expected a seed of 0 or more, got {self.seed}.")
        if not isinstance(self.output, str):
            raise UsageError(
                f"expected the place of an output as text such as 'logits' or '[0]', "
                f"got {type(self.output).__name__}."
            )
        self._check_kinds()
        if not isinstance(self.reference, (str, Volume, list, tuple)):
            raise UsageError(
                f"expected a reference of auto, tissue, zero, value:X or a Volume (or several), "
                f"got {type(self.reference).__name__}."
            )

        if isinstance(self.reference, str) and self.reference not in REFERENCES:
            value_of(self.reference)  # also where the method has no use for it: a slip of the pen

    def _check_kinds(self) -> None:
        """What the settings are made of, before anything is run with them."""
        if not isinstance(self.method, str):
            raise UsageError(
                f"expected the name of a method such as 'secant', got {type(self.method).__name__}."
            )
        if self.threads is not None and not isinstance(self.threads, (int, np.integer)):
            raise UsageError(
                f"expected a whole number of threads or None, got {type(self.threads).__name__}."
            )
        check_progress(self.progress)

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


def check_progress(progress: object) -> None:
    """Refuse what cannot be called.

    Raises:
        UsageError: it is no function.
    """
    if not callable(progress):
        raise UsageError(
            f"expected a function of a Step as progress, got {type(progress).__name__}."
        )


def plain(model: object) -> object:
    """The network inside wrappers and programs (compiled, TorchScript, exported) as eager modules.

    Raises:
        ModelError: it is a program that cannot be opened.
    """
    return wrapped(opened(model))


def _uncompiled(model: Model) -> Model:
    """A Model without torch.compile's wrapper around its network."""
    net = plain(model.net)
    if net is model.net or not isinstance(net, torch.nn.Module):
        return model
    aliases = {
        name: path.removeprefix("_orig_mod.").removeprefix("module.")
        for name, path in model.aliases.items()
    }
    return replace(model, net=net, aliases=aliases)


@contextmanager
def eager(net: torch.nn.Module) -> Iterator[None]:
    """The network's modules themselves instead of what torch.compile made of them; then as before.

    Compiled code runs no hook and no forward that was exchanged after it was compiled.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in net.modules():
            own = module.__dict__
            if own.get("_compiled_call_impl") is not None:
                before.append((own, "_compiled_call_impl", own["_compiled_call_impl"]))
                own["_compiled_call_impl"] = None
            if type(module).__name__ == _COMPILED and "forward" in own:
                before.append((own, "forward", own["forward"]))
                own["forward"] = module.get_submodule("_orig_mod").__call__
        yield
    finally:
        for own, name, value in before:
            own[name] = value


def as_model(model: object, image: object, link: str | None) -> Model:
    """A Model as it is, or a bare torch module with as little assumed as possible."""
    model = plain(model)
    if isinstance(model, Model):
        if link is not None:
            raise UsageError("expected no link beside a Model, which has one of its own.")
        return _uncompiled(model)
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
    if array.ndim == 2:  # an image: a volume of one slice
        array = array[:, :, None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4:
        raise ImageError(
            f"expected an array (I, J), (I, J, K), (C, I, J, K) or (1, C, I, J, K), "
            f"got {array.shape}."
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
        "target": request.target.whole,
        "output": request.output or None,
        "layer": request.layer,
        "method": request.method,
        "reference": wish if isinstance(wish, str) else "file",
        "at": request.at,
        "precise": request.precise,
        "quick": request.quick,
        "alignment": request.alignment,
        "fast": request.fast,
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
