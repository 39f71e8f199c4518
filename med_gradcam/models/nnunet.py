"""A result folder of nnU-Net v2: plans.json, dataset.json and the checkpoints of its folds.

The network is built from the plans through an allow-list, the checkpoints are read as numbers;
nnU-Net itself is not needed. Several folds are averaged as nnU-Net does: their logits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from med_gradcam.errors import MedGradcamError, ModelError
from med_gradcam.model import Model
from med_gradcam.models import _archive, _nnunet_input, _nnunet_plans, _state_dict
from med_gradcam.models._averaged import UNMIRRORED, Averaged
from med_gradcam.models._nnunet_net import UNet
from med_gradcam.models._nnunet_plans import Json, need, short
from med_gradcam.running import first_line

TITLE = "nnU-Net v2 result folder (plans.json, dataset.json, fold_*), nothing is executed"
_FOLD = re.compile(r"fold_(\d+|all)")
_JSON = ("plans.json", "dataset.json")
_FILES = ("checkpoint_final.pth", "checkpoint_best.pth")
_TRAINED = re.compile(r".+__.+__(.+)")  # trainer, plans, configuration
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_SHOWN = 4


def sniff(path: str) -> bool:
    """Whether the path is a trainer's result folder, one of its folds, or the folder above it.

    One that lacks plans.json or dataset.json, too: load says which.
    """
    return any(_complete(f) or _begun(f) for f in _folders(Path(path)))


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The network of a folder, its folds averaged, in eval mode on the CPU.

    Raises:
        ModelError: a file is missing, of another version, or does not fit the others.
    """
    del trust  # nothing here needs any
    there = Path(path)
    folders = _folders(there)
    root = next((folder for folder in folders if _complete(folder)), None)
    if root is None:
        raise ModelError(_lacking(next(filter(_begun, folders), there)))
    try:
        return _model(root, there)
    except MedGradcamError as error:
        raise ModelError(f"{root.name}: {error}") from error


def _model(root: Path, there: Path) -> Model:
    plans, dataset = _json(root / "plans.json"), _json(root / "dataset.json")
    folds = [_fold(file) for file in _files(root, there)]
    chosen = _nnunet_plans.configuration(plans, _trained(root, folds))
    names, (labels, link) = _nnunet_input.channel_names(dataset), _nnunet_plans.labels(dataset)
    plan, how = _nnunet_plans.network(chosen, len(names), len(labels))
    nets = []
    for fold in folds:
        try:
            with torch.device("meta"):  # no memory for what a plan only declares
                net = UNet(plan, how)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"the numbers in plans.json make no network: {first_line(error)}."
            ) from error
        nets.append(_with_weights(net, fold))
    spec = _nnunet_input.input_spec(plans, chosen, names)
    title = str(plans.get("dataset_name", "dataset not named"))
    return Model(
        nets[0] if len(nets) == 1 else Averaged(nets).eval(),
        spec,
        labels,
        link,
        name=f"nnU-Net {title} {chosen.name}" + f", {len(nets)} folds" * (len(nets) > 1),
        weights_sha256=_digest(folds),
        task="segmentation",
        notes=(*chosen.notes, *_notes(folds)),
    )


def _folders(there: Path) -> list[Path]:
    """Where plans.json may lie: here, in the folder above a fold, or in one trained 3d_fullres."""
    if not there.is_dir():
        return []
    here = [there, there.parent] if _FOLD.fullmatch(there.name) else [there]
    trained = {
        match[1]: child
        for child in sorted(there.iterdir())
        if (match := _TRAINED.fullmatch(child.name)) and child.is_dir()
    }
    return here + [trained[name] for name in _nnunet_plans.KNOWN if name in trained]


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _JSON)


def _begun(folder: Path) -> bool:
    """Whether one of nnU-Net's files is there: one JSON, or a fold's checkpoint."""
    if any((folder / name).is_file() for name in _JSON):
        return True
    folds = (f for f in folder.iterdir() if _FOLD.fullmatch(f.name))
    return any((fold / name).is_file() for fold in folds for name in _FILES)


def _lacking(folder: Path) -> str:
    missing = [name for name in _JSON if not (folder / name).is_file()]
    return (
        f"expected {' and '.join(_JSON)} of nnU-Net in {folder.name!r}, found no "
        f"{' and no '.join(missing)}; copy the trainer's whole result folder."
    )


def _json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"expected readable JSON in {path.name}, got: {error}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"expected an object in {path.name}, got {type(found).__name__}.")
    return found


# ------------------------------------------------------------------------------ the checkpoints


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """One checkpoint: its folder's and file's name, what is in it, the file's SHA-256."""

    name: str
    file: str
    content: Mapping[str, Any]
    sha256: str


def _files(root: Path, there: Path) -> list[Path]:
    """The folds' checkpoints in order: the final one each, else the best."""
    one = there if _FOLD.fullmatch(there.name) else None
    folders = [one] if one else sorted(f for f in root.iterdir() if _FOLD.fullmatch(f.name))
    numbered = [f for f in folders if f.name != "fold_all"] or folders
    found = []
    for folder in numbered:
        there_are = [folder / name for name in _FILES if (folder / name).is_file()]
        found += there_are[:1]
    if not found:
        raise ModelError(
            f"expected {' or '.join(_FILES)} in a folder fold_0, fold_1 ... or fold_all, found "
            f"none."
        )
    return found


def _fold(path: Path) -> Fold:
    """A checkpoint as numbers and tensors.

    Raises:
        ModelError: it holds anything else, or is none of nnU-Net v2.
    """
    where = f"{path.parent.name}/{path.name}"
    if "data.pkl" not in _archive.names(str(path)):
        raise ModelError(f"expected a checkpoint as torch.save writes it in {where}.")
    archive = _archive.read(str(path))
    found: Any = _state_dict.data(archive, where)
    if not isinstance(found, dict) or not isinstance(found.get("network_weights"), dict):
        keys = ", ".join(map(str, list(found)[:_SHOWN])) if isinstance(found, dict) else ""
        raise ModelError(
            f"expected a checkpoint of nnU-Net v2 (network_weights, init_args) in {where}, got "
            f"{keys or type(found).__name__}; checkpoints of another version cannot be read."
        )
    return Fold(path.parent.name, where, found, archive.sha256)


def _trained(root: Path, folds: Sequence[Fold]) -> str | None:
    """The configuration that was trained: as the checkpoints say, else the folder's name."""
    said = set()
    for fold in folds:
        arguments = fold.content.get("init_args")
        name = arguments.get("configuration") if isinstance(arguments, dict) else None
        said |= {str(name)} if name is not None else set()
    if len(said) > 1:
        raise ModelError(
            f"expected folds of one configuration, got {', '.join(sorted(said))}; name one fold's "
            f"folder."
        )
    match = _TRAINED.fullmatch(root.name)
    return next(iter(said), match[1] if match else None)


def _notes(folds: Sequence[Fold]) -> tuple[str, ...]:
    axes = [fold.content.get("inference_allowed_mirroring_axes") or () for fold in folds]
    best = [fold.file for fold in folds if not fold.file.endswith(_FILES[0])]
    notes = [f"no {_FILES[0]}: {', '.join(best)} was taken"] if best else []
    return tuple([*notes, UNMIRRORED] if any(axes) else notes)


def _digest(folds: Sequence[Fold]) -> str:
    if len(folds) == 1:
        return folds[0].sha256
    return hashlib.sha256("".join(fold.sha256 for fold in folds).encode()).hexdigest()


# ---------------------------------------------------------------------------------- the weights


def _with_weights(net: UNet, fold: Fold) -> UNet:
    """The network with a fold's weights, all of them and no other."""
    given = _unwrapped(need(fold.content, "network_weights", dict, fold.file), fold.file)
    wanted = net.state_dict()
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    shapes = [
        f"{key} has {tuple(given[key].shape)}, the plans say {tuple(wanted[key].shape)}"
        for key in sorted(set(wanted) & set(given))
        if given[key].shape != wanted[key].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"missing: {', '.join(missing[:_SHOWN])}" if missing else "",
            f"not in the plans: {', '.join(extra[:_SHOWN])}" if extra else "",
            f"other shape: {'; '.join(shapes[:_SHOWN])}" if shapes else "",
        ]
        raise ModelError(
            f"the weights in {fold.file} do not fit plans.json "
            f"({'; '.join(part for part in parts if part)}); use the plans of the same training, "
            f"and for a trainer with a network of its own a Python factory."
        )
    floats = {k: t.float() if t.is_floating_point() else t for k, t in given.items()}
    bad = [k for k, t in floats.items() if not bool(t.isfinite().all())]
    if bad:
        raise ModelError(f"expected finite weights in {fold.file}, got NaN or inf in {bad[0]}.")
    net.load_state_dict(floats, assign=True)
    taken = net.state_dict()
    twice = [k for k, t in floats.items() if not torch.equal(taken[k], t)]
    if twice:
        raise ModelError(f"expected one value of each weight in {fold.file}, {twice[0]} has two.")
    return net.eval()


def _unwrapped(weights: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """The weights by the network's own names."""
    made = {}
    for key, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(
                f"expected tensors as network_weights in {where}, got {short(tensor)}."
            )
        name = str(key)
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        made[name] = tensor
    return made
