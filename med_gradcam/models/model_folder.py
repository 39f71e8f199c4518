"""A model as a folder: spec.json says what it is, weights.safetensors or weights.pt its weights.

Format `med-gradcam-model/1`. Nothing in the folder is executed: layers are named in an allow-list,
weights are plain numbers. `layers` is a list of [name, arguments] for one nn.Sequential, where name
is a torch.nn module, "Sequential" with nested layers, or a constructor of monai.networks.nets; or
`network` names one such constructor alone.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from med_gradcam.errors import ModelError, ResourceError
from med_gradcam.model import Model
from med_gradcam.models import _spec, _state_dict
from med_gradcam.running import first_line, is_memory

TITLE = (
    "folder with spec.json + weights.safetensors or weights.pt (med-gradcam-model/1), nothing is "
    "executed"
)
FORMAT, _input = _spec.FORMAT, _spec.input_of

_LAYERS = frozenset(
    """
    Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear Bilinear
    Flatten Unflatten Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout
    BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d
    GroupNorm LayerNorm RMSNorm LocalResponseNorm ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU
    SELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign Softmax LogSoftmax LogSigmoid
    Hardtanh Hardswish Hardsigmoid Threshold MaxPool1d MaxPool2d MaxPool3d AvgPool1d
    AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d Upsample PixelShuffle
    ConstantPad3d ZeroPad3d ReflectionPad3d ReplicationPad3d ChannelShuffle
    """.split()
)
_MONAI = frozenset(
    """
    DenseNet DenseNet121 DenseNet169 DenseNet201 DenseNet264 ResNet resnet10 resnet18
    resnet34 resnet50 resnet101 SENet SEResNet50 SEResNet101 SEResNext50 EfficientNetBN
    HighResNet Classifier Regressor Discriminator ViT UNet BasicUNet AttentionUnet SegResNet
    DynUNet UNETR SwinUNETR VNet FullyConnectedNet
    """.split()
)


def sniff(path: str) -> bool:
    """Whether the path is a folder with a spec.json, or that file."""
    there = Path(path)
    return (there / "spec.json").is_file() or (there.name == "spec.json" and there.is_file())


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The model in a folder, in eval mode on the CPU.

    Raises:
        ModelError: spec.json or the weights are off, naming the file and the key.
    """
    del trust  # nothing here needs any
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    spec = _spec.read(folder / "spec.json")
    net = _network(spec, folder)
    weights = folder / "weights.safetensors"
    if not weights.is_file() and (folder / "weights.pt").is_file():
        weights = folder / "weights.pt"
    return _spec.model(net, spec, folder, _load_weights(net, weights))


def _network(spec: Mapping[str, Any], folder: Path) -> torch.nn.Module:
    try:
        if "network" in spec:
            return _build(spec["network"])
        return _sequential(_spec.key(spec, "layers", list, folder))
    except ModelError as error:
        raise ModelError(f"{_spec.name_of(folder)}: {error}") from error


def _sequential(layers: Any) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(_build(layer) for layer in layers))


def _build(layer: Any) -> torch.nn.Module:
    well_formed = isinstance(layer, list) and len(layer) == 2 and isinstance(layer[0], str)
    if not well_formed:
        raise ModelError(f"expected a layer as [name, arguments], got {layer!r}.")
    name, arguments = layer
    if name == "Sequential" and isinstance(arguments, list):
        return _sequential(arguments)
    if not isinstance(arguments, dict):
        raise ModelError(f"expected the arguments of {name} as an object, got {arguments!r}.")
    short = name.removeprefix("monai.networks.nets.")
    if name in _LAYERS:
        make = getattr(torch.nn, name)
    elif short != name and short in _MONAI:
        make = getattr(_monai_nets(), short)
    else:
        raise ModelError(
            f"expected a layer of torch.nn or monai.networks.nets that is on the allow-list, got "
            f"{name!r}; for anything else write a Python factory and pass --trust code."
        )
    for key in ("device", "dtype"):
        if key in arguments:
            raise ModelError(f"the arguments of {name} do not fit: {key!r} is chosen by the user.")
    signature = inspect.signature(make)
    if "pretrained" in signature.parameters:
        arguments = {**arguments, "pretrained": False}  # weights come from the folder alone
    return _made(name, make, arguments)


def _made(name: str, make: Any, arguments: dict[str, Any]) -> torch.nn.Module:
    try:
        inspect.signature(make).bind(**arguments)
        net: torch.nn.Module = make(**arguments)
    except (MemoryError, RuntimeError) as error:
        if is_memory(error):
            raise ResourceError(f"not enough memory for {name} with {arguments}.") from error
        raise ModelError(f"the arguments of {name} do not fit: {first_line(error)}.") from error
    except Exception as error:  # constructors raise whatever they like
        why = first_line(error)
        if "import" in type(error).__name__.lower():  # MONAI's OptionalImportError
            raise ModelError(
                f"{name} needs a package that is not installed ({why}): "
                f"pip install 'med_gradcam[monai]' and what it names."
            ) from error
        raise ModelError(f"the arguments of {name} do not fit: {why}.") from error
    return net


def _monai_nets() -> Any:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise ModelError(
            "the model needs MONAI, which is not installed: pip install 'med_gradcam[monai]'."
        ) from error
    return nets


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _load_weights(net: torch.nn.Module, path: Path) -> str:
    """Load the weights, all of them and no other; returns the file's SHA-256."""
    tensors, sha256 = _read_weights(path)
    _check_fit(net, tensors, path)
    net.load_state_dict(tensors, strict=False)
    return sha256


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    if path.suffix == ".pt":
        return _state_dict.read(path)
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    try:
        raw = path.read_bytes()
        return load_tensors(raw), hashlib.sha256(raw).hexdigest()
    except OSError as error:
        raise ModelError(
            f"expected readable weights in {_spec.name_of(path)}, got: {error.strerror}."
        ) from error
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"expected safetensors in {_spec.name_of(path)}, got: {error}.") from error


def _check_fit(net: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse weights that are not those of the network, or are no numbers."""
    wanted = net.state_dict()
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    shapes = [
        f"{k} has {tuple(tensors[k].shape)}, the spec says {tuple(wanted[k].shape)}"
        for k in sorted(set(wanted) & set(tensors))
        if tensors[k].shape != wanted[k].shape
    ]
    # Batch norms saved by old torch have no counter of batches; it plays no part in eval mode.
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    shapes += [
        f"{k} holds {_kind(tensors[k])}, the spec says {_kind(wanted[k])}"
        for k in sorted(set(wanted) & set(tensors))
        if tensors[k].is_floating_point() != wanted[k].is_floating_point()
    ]
    if missing or extra or shapes:
        parts = [
            f"missing: {', '.join(missing[:4])}" if missing else "",
            f"not in the spec: {', '.join(extra[:4])}" if extra else "",
            f"other shape or kind: {'; '.join(shapes[:3])}" if shapes else "",
        ]
        raise ModelError(
            f"the weights in {_spec.name_of(path)} do not fit spec.json "
            f"({'; '.join(p for p in parts if p)}); use the pair that was saved together."
        )
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ModelError(
            f"expected finite weights in {_spec.name_of(path)}, got NaN or inf in {bad[0]}."
        )
