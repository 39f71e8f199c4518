"""A MONAI Bundle, folder or zip, read as data: nothing in it is executed.

The network comes from the literal network_def of its configuration through an allow-list, weights
from models/, labels and modality from metadata.json, preprocessing from the literal transforms.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from med_gradcam import _plugins
from med_gradcam.errors import MedGradcamError, ModelError
from med_gradcam.model import InputSpec, Model
from med_gradcam.models import _bundle_drift, _bundle_meta, _bundle_net, _bundle_weights
from med_gradcam.models._bundle_config import Config, read_config
from med_gradcam.models._bundle_files import Files, files_of, is_bundle
from med_gradcam.models._bundle_transforms import Pipeline, pipeline
from med_gradcam.target import Link

TITLE = "MONAI Bundle, folder or zip (configs/, models/), nothing is executed"
_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_TRAINING = ("train.json", "train.yaml", "train.yml")
_METADATA = "configs/metadata.json"
_WINDOWS = ("SlidingWindowInferer", "SlidingWindowInfererAdapt", "SliceInferer")


def sniff(path: str) -> bool:
    """Whether the path is a folder or zip with the configurations of a bundle."""
    return is_bundle(path)


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The model of a bundle, in eval mode on the CPU.

    Raises:
        ModelError: a file is missing, names code, or does not fit the others.
    """
    files = files_of(path)
    config = _config(files)
    definition, source = _definition(files, config)
    plan = _bundle_net.plan(definition, source.where)
    facts = _facts(files, plan)
    weights = _bundle_weights.find(files, _named_weights(config))
    if weights is None:
        net, digest, notes = _program(files, trust)
    else:
        net = _bundle_net.build(plan, weights.size)
        digest, notes = _bundle_weights.load(net, files, weights)
    steps = _pipeline(config, facts)
    try:
        model = Model(
            net=net,
            input=_input(config, files, facts, steps),
            labels=facts.labels,
            link=_link(config, len(facts.labels)),
            name=facts.name,
            weights_sha256=digest,
            licence=facts.licence,
            task=facts.task,
            notes=(*plan.notes, *notes, *facts.notes, *steps.notes, *_window_notes(config)),
            drift=steps.drift,
        )
    except MedGradcamError as error:
        raise ModelError(f"{files.name}: {error}") from error
    if not steps.literal:
        return model
    return replace(model, source_input=_bundle_drift.source(steps))


def _config(files: Files) -> Config:
    for name in (*_CONFIGS, *_TRAINING):
        if files.has(f"configs/{name}"):
            return Config(files, f"configs/{name}", read_config(files, f"configs/{name}"))
    raise ModelError(
        f"expected configs/inference.json or .yaml in the bundle {files.name}, found none."
    )


def _definition(files: Files, config: Config) -> tuple[Any, Config]:
    """The resolved network_def, and the configuration that has it."""
    for key in ("network_def", "network"):
        if config.data.get(key):
            return config.get(key), config
    for name in _TRAINING:
        path = f"configs/{name}"
        if path != config.name and files.has(path):
            other = Config(files, path, read_config(files, path))
            if other.data.get("network_def"):
                return other.get("network_def"), other
    raise ModelError(
        f"expected a network_def in {config.where} or configs/train.json, found none; "
        f"describe the network there, or write a Python factory and pass --trust code."
    )


def _facts(files: Files, plan: _bundle_net.Plan) -> _bundle_meta.Facts:
    if not files.has(_METADATA):
        raise ModelError(
            f"expected {_METADATA} in the bundle {files.name}, which names input channels, "
            f"modality and labels (network_data_format), found none; add one, or describe the "
            f"network in a model folder (spec.json)."
        )
    meta = read_config(files, _METADATA)
    facts = _bundle_meta.facts(meta, plan, f"{files.name}/{_METADATA}")
    licence = facts.licence
    if licence.startswith("not stated") and files.has("LICENSE"):
        licence = licence.replace("not stated", "see the bundle's LICENSE", 1)
    return replace(facts, licence=licence)


def _named_weights(config: Config) -> str | None:
    """The file of models/ that the configuration's checkpoint loader names, if it says one."""
    loaders = [config.data.get("checkpointloader"), *_listed(config.data.get("handlers"))]
    for loader in loaders:
        if isinstance(loader, dict) and "load_path" in loader:
            try:
                return str(config.resolved(loader["load_path"])).rsplit("/", 1)[-1]
            except ModelError:
                return None
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _program(files: Files, trust: Collection[str]) -> tuple[Any, str, tuple[str, ...]]:
    """The network of models/model.ts, which is all there is."""
    if not files.has("models/model.ts"):
        raise ModelError(
            f"expected models/model.safetensors or models/model.pt in the bundle {files.name}, "
            f"found none; put the weights there."
        )
    there = files.local("models/model.ts")
    module = _plugins.load("models", "torchscript")
    model: Model = module.load(str(there), trust)
    return model.net, model.weights_sha256, ("the network is the bundle's TorchScript program",)


def _pipeline(config: Config, facts: _bundle_meta.Facts) -> Pipeline:
    found = config.data.get("preprocessing")
    if found is None and config.name.startswith("configs/train"):
        held = config.data.get("validate")
        found = held.get("preprocessing") if isinstance(held, dict) else None
    if not found:
        said = "the bundle declares no preprocessing: the scan's voxels are taken as they are"
        return Pipeline((), None, (said,))
    loose = replace(config, lenient=True)  # a transform that is code is named, not fatal
    raw = loose.resolved(found) if isinstance(found, str) else found
    held = raw.get("transforms") if isinstance(raw, dict) else raw
    listed = loose.resolved(held)
    if not isinstance(listed, list):
        raise ModelError(
            f"expected a list of transforms as preprocessing in {config.where}, "
            f"got {type(listed).__name__}; give their list as plain data."
        )
    return pipeline(listed, facts.inputs)


def _input(config: Config, files: Files, facts: _bundle_meta.Facts, steps: Pipeline) -> InputSpec:
    window = _window(config)
    patch = facts.shape if facts.is_patch and "inferer" not in config.data else None
    least = None if window or patch else _bundle_meta.smallest(read_config(files, _METADATA))
    return InputSpec(
        channels=facts.channels,
        modality=facts.modality,
        axes=steps.axes,
        patch=window or patch,
        min_patch=least,
        recipe_on=steps.on if steps.stages else None,
        padding=0.0 if window else None,
    )


def _inferer(config: Config) -> dict[str, Any]:
    found = config.data.get("inferer")
    return found if isinstance(found, dict) and isinstance(found.get("_target_"), str) else {}


def _window(config: Config) -> tuple[int, int, int] | None:
    """The window of a sliding-window inferer."""
    inferer = _inferer(config)
    if "roi_size" not in inferer:
        return None
    try:
        size = config.resolved(inferer["roi_size"])
    except ModelError:
        return None
    listed = [size] * 3 if isinstance(size, int) else size
    whole = isinstance(listed, list) and len(listed) == 3
    if not whole or not all(isinstance(n, int) and n > 0 for n in listed):
        return None
    return listed[0], listed[1], listed[2]


def _window_notes(config: Config) -> tuple[str, ...]:
    inferer = _inferer(config)
    own = str(inferer.get("_target_", "")).rsplit(".", 1)[-1]
    notes = []
    if own and own != "SimpleInferer" and own not in _WINDOWS:
        notes.append(f"the bundle's own way to run its network ({own}) is not done here")
    if inferer.get("padding_mode", "constant") != "constant" or inferer.get("cval", 0) != 0:
        notes.append("a scan smaller than the window is padded with 0, not as the bundle does")
    return tuple(notes)


def _link(config: Config, labels: int) -> Link:
    """The link, softmax or sigmoid, as the bundle's postprocessing says."""
    post = config.data.get("postprocessing")
    held = post.get("transforms") if isinstance(post, dict) else None
    for one in _listed(held):
        target = one.get("_target_", "") if isinstance(one, dict) else ""
        if str(target).rsplit(".", 1)[-1].startswith("Activations"):
            if one.get("sigmoid") is True:
                return "sigmoid"
            if one.get("softmax") is True:
                return "softmax"
    return "sigmoid" if labels == 1 else "softmax"
