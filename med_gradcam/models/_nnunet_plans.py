"""What do plans.json and dataset.json of nnU-Net v2 say of the network and its labels?

Nothing named in them is imported: constructors are looked up in an allow-list of torch.nn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from med_gradcam.errors import ModelError
from med_gradcam.models._nnunet_net import Blocks, Plan, Size
from med_gradcam.target import Link

Json = Mapping[str, Any]
PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
KNOWN = ("3d_fullres", "3d_lowres")  # in this order, where nothing says which one was trained
_NORMS = ("InstanceNorm3d", "BatchNorm3d")
_DROPOUTS = ("Dropout", "Dropout3d")
_NONLINS = ("LeakyReLU", "ReLU", "ELU", "GELU", "SiLU", "Mish", "PReLU", "SELU", "Softplus")
_ARGUMENTS = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One configuration of the plans, what it inherits included; `notes` for people."""

    name: str
    content: Json
    notes: tuple[str, ...] = ()


def need(content: Json, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """The value of a key.

    Raises:
        ModelError: it is not there, or something else.
    """
    value = content.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ModelError(
            f"expected nnU-Net v2, whose {where} has {key!r}, got {short(value)}; was the folder "
            f"written by another version of nnU-Net?"
        )
    return value


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def configuration(plans: Json, wish: str | None) -> Configuration:
    """The configuration that was trained, `wish`, or the one that is most likely meant.

    Raises:
        ModelError: there is none for volumes, or it inherits from itself.
    """
    every = need(plans, "configurations", dict, "plans.json")
    name = wish or next((known for known in KNOWN if known in every), KNOWN[0])
    if not isinstance(every.get(name), dict):
        raise ModelError(
            f"expected the configuration {name!r} in plans.json, it has "
            f"{', '.join(map(str, every)) or 'none'}; use plans.json of the same training."
        )
    found: dict[str, Any] = dict(every[name])
    seen, parent = [name], found.get("inherits_from")
    while parent is not None:
        if parent in seen or not isinstance(every.get(parent), dict):
            raise ModelError(
                f"expected configurations in plans.json that inherit from one that is there, got "
                f"{' from '.join([*seen, str(parent)])}."
            )
        found = {**every[parent], **found}
        seen.append(parent)
        parent = every[parent].get("inherits_from")
    if found.get("previous_stage"):
        raise ModelError(
            f"expected a configuration that looks at the scan alone, got {name!r}, the second "
            f"stage of a cascade, whose input holds the first one's result; use 3d_fullres or "
            f"3d_lowres."
        )
    patch = need(found, "patch_size", list, f"configuration {name!r}")
    if len(patch) != 3:
        raise ModelError(
            f"expected a configuration for volumes, got {name!r} with patches of {len(patch)} "
            f"axes; use the folder of 3d_fullres or 3d_lowres."
        )
    notes: tuple[str, ...] = ()
    if wish is None and name != KNOWN[0]:
        notes = (f"plans.json has no {KNOWN[0]}: its configuration {name} was taken",)
    return Configuration(name, found, notes)


# ------------------------------------------------------------------------------ the network


def network(chosen: Configuration, channels: int, classes: int) -> tuple[Plan, Blocks]:
    """The numbers and building blocks of a configuration's network.

    Raises:
        ModelError: an architecture, a module or a number that is not on the list.
    """
    where = f"configuration {chosen.name!r}"
    kind, numbers = _architecture(chosen.content, where)
    residual = kind == RESIDUAL
    count = need(numbers, "n_stages", int, where)
    repeats = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    block = str(numbers.get("block") or "BasicBlockD").rpartition(".")[2]
    if block not in ("BasicBlockD", "BottleneckD"):
        raise ModelError(f"expected blocks BasicBlockD or BottleneckD in plans.json, got {block}.")
    narrow = numbers.get("bottleneck_channels") if block == "BottleneckD" else None
    if block == "BottleneckD" and narrow is None:
        raise ModelError("expected bottleneck_channels beside BottleneckD in plans.json, got none.")
    plan = Plan(
        residual,
        channels,
        classes,
        _whole(numbers, "features_per_stage", count, where),
        _sizes(numbers, "kernel_sizes", count, where),
        _sizes(numbers, "strides", count, where),
        _whole(numbers, repeats, count, where),
        _whole(numbers, "n_conv_per_stage_decoder", count - 1, where),
        numbers.get("stem_channels"),
        None if narrow is None else _whole(numbers, "bottleneck_channels", count, where),
    )
    _check_patch(chosen.content["patch_size"], plan.strides, where)
    return plan, _blocks(numbers)


def _check_patch(patch: Sequence[object], strides: Sequence[Size], where: str) -> None:
    """Refuse a patch whose maps could not be joined again on the way up."""
    whole = [n for n in patch if isinstance(n, int) and _positive(n)]
    total = [math.prod(stride[axis] for stride in strides) for axis in range(3)]
    if len(whole) != len(total) or any(n % t for n, t in zip(whole, total, strict=True)):
        raise ModelError(
            f"expected a patch_size of whole numbers that the product of the strides, "
            f"{total}, divides in the {where} of plans.json, got {short(patch)}; use the plans of "
            f"the same training."
        )


def _architecture(content: Json, where: str) -> tuple[str, Json]:
    """Which of the two networks, and its arguments; those of plans before 2.5 are put together."""
    if "architecture" in content:
        found = need(content, "architecture", dict, where)
        name = str(found.get("network_class_name"))
        numbers = need(found, "arch_kwargs", dict, where)
    elif "UNet_class_name" in content:
        name = f"dynamic_network_architectures.{content['UNet_class_name']}"
        numbers = _old_arguments(content, where)
    else:
        need(content, "architecture", dict, where)
    kind = name.rpartition(".")[2]
    if kind not in (PLAIN, RESIDUAL) or not name.startswith("dynamic_network_architectures."):
        raise ModelError(
            f"expected a network {PLAIN} or {RESIDUAL} of dynamic_network_architectures in "
            f"plans.json, got {short(name)}; build it in a Python factory and pass --trust code."
        )
    return kind, numbers


def _old_arguments(content: Json, where: str) -> Json:
    kernels = need(content, "conv_kernel_sizes", list, where)
    base = need(content, "UNet_base_num_features", int, where)
    most = need(content, "unet_max_num_features", int, where)
    repeats = need(content, "n_conv_per_stage_encoder", list, where)
    return {
        "n_stages": len(repeats),
        "features_per_stage": [min(base * 2**n, most) for n in range(len(repeats))],
        "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": kernels,
        "strides": content.get("pool_op_kernel_sizes"),
        "n_conv_per_stage": repeats,
        "n_blocks_per_stage": repeats,
        "n_conv_per_stage_decoder": content.get("n_conv_per_stage_decoder"),
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _whole(numbers: Json, key: str, count: int, where: str) -> list[int]:
    value = numbers.get(key)
    listed = [value] * count if isinstance(value, int) else value
    fits = isinstance(listed, list) and len(listed) == count
    if not fits or not all(isinstance(n, int) and n > 0 for n in listed or []):
        raise ModelError(
            f"expected {count} whole numbers above 0 as {key} in the {where} of plans.json, "
            f"got {short(value)}."
        )
    return list(listed or [])


def _sizes(numbers: Json, key: str, count: int, where: str) -> list[Size]:
    value = numbers.get(key)
    listed = [value] * count if isinstance(value, int) else value
    made: list[Size] = []
    for one in listed if isinstance(listed, list) and len(listed) == count else []:
        three = [one] * 3 if isinstance(one, int) else one
        if isinstance(three, list) and len(three) == 3 and all(_positive(n) for n in three):
            made.append((three[0], three[1], three[2]))
    if len(made) != count:
        raise ModelError(
            f"expected {count} sizes of three whole numbers as {key} in the {where} of plans.json, "
            f"got {short(value)}."
        )
    return made


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _blocks(numbers: Json) -> Blocks:
    if _module(numbers, "conv_op", ("Conv3d",)) is None:
        raise ModelError("expected conv_op torch.nn.Conv3d in plans.json, got none.")
    return Blocks(
        nn.Conv3d,
        nn.ConvTranspose3d,
        nn.AvgPool3d,
        bool(numbers.get("conv_bias", False)),
        _module(numbers, "norm_op", _NORMS),
        _arguments(numbers, "norm_op_kwargs"),
        _module(numbers, "dropout_op", _DROPOUTS),
        _arguments(numbers, "dropout_op_kwargs"),
        _module(numbers, "nonlin", _NONLINS),
        _arguments(numbers, "nonlin_kwargs"),
        bool(numbers.get("nonlin_first", False)),
    )


def _module(numbers: Json, key: str, allowed: Sequence[str]) -> type[nn.Module] | None:
    name = numbers.get(key)
    if name is None:
        return None
    last = str(name).rpartition(".")[2]
    if not str(name).startswith("torch.nn.") or last not in allowed:
        raise ModelError(
            f"expected {key} as torch.nn.{' or torch.nn.'.join(allowed)} in plans.json, "
            f"got {short(name)}."
        )
    found: type[nn.Module] = getattr(nn, last)
    return found


def _arguments(numbers: Json, key: str) -> Json:
    found = numbers.get(key) or {}
    simple = isinstance(found, dict) and all(isinstance(v, _ARGUMENTS) for v in found.values())
    if not simple or {"device", "dtype"} & set(found):
        raise ModelError(f"expected plain numbers as {key} in plans.json, got {short(found)}.")
    return found


# --------------------------------------------------------------------------------- the labels


def labels(dataset: Json) -> tuple[tuple[str, ...], Link]:
    """The names of the network's outputs, in their order, and the link they are meant for.

    Raises:
        ModelError: they are not written as nnU-Net v2 writes them.
    """
    named = dict(need(dataset, "labels", dict, "dataset.json"))
    if "background" not in named:
        raise ModelError(
            "expected a label 'background' in dataset.json, as nnU-Net v2 has it (name: number), "
            f"got {', '.join(map(str, list(named)[:4]))}; nnU-Net v1 cannot be read."
        )
    named.pop("ignore", None)
    if any(isinstance(value, list) and len(value) > 1 for value in named.values()):
        regions = [name for name, value in named.items() if _numbers(value) != {0}]
        order = dataset.get("regions_class_order")
        if not isinstance(order, list) or len(order) != len(regions):
            raise ModelError(
                f"expected regions_class_order with {len(regions)} numbers beside regions in "
                f"dataset.json, got {short(order)}."
            )
        return tuple(regions), "sigmoid"
    numbers = {name: _numbers(value) for name, value in named.items()}
    by_number = {next(iter(value)): name for name, value in numbers.items() if len(value) == 1}
    if sorted(by_number) != list(range(len(named))):
        raise ModelError(
            f"expected labels numbered from 0 without gaps in dataset.json, got "
            f"{short(dict(named))}."
        )
    return tuple(by_number[n] for n in range(len(named))), "softmax"


def _numbers(value: object) -> set[int]:
    listed = value if isinstance(value, list) else [value]
    try:
        return {int(one) for one in map(str, listed)}
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"expected whole numbers as labels in dataset.json, got {short(value)}."
        ) from error
