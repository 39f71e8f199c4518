"""What do plans.json and dataset.json of nnU-Net v2 say of the network's input?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from med_gradcam.errors import ModelError
from med_gradcam.model import InputSpec
from med_gradcam.models._nnunet_plans import Configuration, Json, need, short
from med_gradcam.models._nnunet_recipe import ORDERS, SCHEMES, Channel, NnunetRecipe

_MR = ("T1", "T2", "FLAIR", "MR", "ADC", "DWI", "SWI", "DCE", "PD")
_OTHER = {"CT": "CT", "PT": "PT", "PET": "PT"}
_READERS = {
    "SimpleITKIO": "kji",
    "NibabelIO": "kji",
    "SimpleITKIOWithReorient": "SAR",
    "NibabelIOWithReorient": "SAR",
}


def channel_names(dataset: Json) -> tuple[str, ...]:
    """What the input's channels are called."""
    key = "channel_names" if "channel_names" in dataset else "modality"
    named = need(dataset, key if key in dataset else "channel_names", dict, "dataset.json")
    try:
        return tuple(str(named[str(n)]) for n in range(len(named)))
    except KeyError as error:
        raise ModelError(
            f"expected channel_names numbered from 0 in dataset.json, got {short(dict(named))}."
        ) from error


def modality(names: Sequence[str]) -> str | None:
    """CT, MR or PT where all channels' names say so, or one for each as PT+CT; else None."""
    words = [name.upper() for name in names]
    known = [_OTHER.get(word, "MR" if word.startswith(_MR) else "") for word in words]
    if not all(known):
        return None
    return known[0] if len(set(known)) == 1 else "+".join(known)


def input_spec(plans: Json, chosen: Configuration, names: Sequence[str]) -> InputSpec:
    """The network's input, with nnU-Net's own way to it.

    Raises:
        ModelError: a reader, a scheme or a way to resample that is not known.
    """
    where = f"configuration {chosen.name!r}"
    reader = str(plans.get("image_reader_writer", "SimpleITKIO"))
    if reader not in _READERS:
        raise ModelError(
            f"expected a reader of {', '.join(_READERS)} in plans.json, got {short(reader)}: "
            f"how it turns a scan's axes is not known."
        )
    turn = need(plans, "transpose_forward", list, "plans.json")
    if sorted(turn) != [0, 1, 2]:
        raise ModelError(f"expected transpose_forward as an order of 0, 1, 2, got {short(turn)}.")
    spacing = _three(need(chosen.content, "spacing", list, where), "spacing", where)
    patch = _three(chosen.content["patch_size"], "patch_size", where)
    recipe = NnunetRecipe(
        _channels(plans, chosen, len(names)),
        spacing,
        **_resampling(chosen.content, where),
    )
    return InputSpec(
        channels=len(names),
        modality=modality(names),
        axes="".join(_READERS[reader][n] for n in turn),
        patch=(int(patch[0]), int(patch[1]), int(patch[2])),
        spacing_mm=spacing,
        recipe=recipe,
        padding=0.0,
    )


def _three(value: Sequence[Any], key: str, where: str) -> tuple[float, float, float]:
    fits = len(value) == 3 and all(isinstance(n, (int, float)) and n > 0 for n in value)
    if not fits:
        raise ModelError(
            f"expected three numbers above 0 as {key} in the {where} of plans.json, "
            f"got {short(value)}."
        )
    return float(value[0]), float(value[1]), float(value[2])


def _resampling(content: Json, where: str) -> dict[str, Any]:
    name = str(content.get("resampling_fn_data", "resample_data_or_seg_to_shape"))
    if name == "no_resampling_data_or_seg_to_shape":
        return {"resample": False}
    given = content.get("resampling_fn_data_kwargs") or {}
    order, order_z = given.get("order", 3), given.get("order_z", 0)
    apart = given.get("force_separate_z")
    known = order in ORDERS and order_z in ORDERS and apart in (None, True, False)
    if name != "resample_data_or_seg_to_shape" or not known:
        raise ModelError(
            f"expected resample_data_or_seg_to_shape of order 0, 1 or 3 in the {where} of "
            f"plans.json, got {short(name)} with {short(given)}."
        )
    return {"order": int(order), "order_z": int(order_z), "apart": apart}


def _channels(plans: Json, chosen: Configuration, count: int) -> tuple[Channel, ...]:
    where = f"configuration {chosen.name!r}"
    schemes = need(chosen.content, "normalization_schemes", list, where)
    masked = chosen.content.get("use_mask_for_norm") or [False] * count
    if len(schemes) != count or len(masked) != count:
        raise ModelError(
            f"expected {count} normalization_schemes and use_mask_for_norm, one per channel of "
            f"dataset.json, got {short(schemes)} and {short(masked)}."
        )
    key = "foreground_intensity_properties_per_channel"
    old = "foreground_intensity_properties_by_modality"
    measured = plans.get(key, plans.get(old)) or {}
    return tuple(
        _channel(str(scheme), bool(inside), measured.get(str(n)) or {})
        for n, (scheme, inside) in enumerate(zip(schemes, masked, strict=True))
    )


def _channel(scheme: str, inside: bool, measured: Json) -> Channel:  # noqa: FBT001 - from the plan
    if scheme not in SCHEMES:
        raise ModelError(
            f"expected a normalisation of {', '.join(SCHEMES)} in plans.json, got {short(scheme)}."
        )
    if scheme != "CTNormalization":
        return Channel(scheme, inside and scheme == "ZScoreNormalization")
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    number = (int, float)
    mean, sd, low, high = (
        float(need(measured, key, number, "foreground_intensity_properties_per_channel"))
        for key in keys
    )
    if low >= high:
        raise ModelError(
            f"expected percentile_00_5 below percentile_99_5 in plans.json, got {low} and {high}."
        )
    return Channel(scheme, masked=False, mean=mean, sd=sd, low=low, high=high)
