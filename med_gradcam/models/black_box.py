"""A model that gives nothing but predictions: a server, or a program, explained by these alone.

A URL of a server that speaks KServe's protocols (v2, Triton's, or v1); or a file spec.json, or a
folder with one, of format `med-gradcam-model/1` that has `endpoint` (such a URL, or an object with
`url`, and `input` and `output` where it has several tensors) or `command` (a list of texts with
{input} and {output}) instead of layers, beside `input`, `labels` and `link` as ever, and
`outputs` (logits or probabilities), `batch` and `timeout_s`. Only voxels are handed over, never a
name. A server elsewhere, and one that a file names, needs --trust network; a command --trust code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from med_gradcam.blackbox import How, Outputs, made
from med_gradcam.errors import MedGradcamError, ModelError, UntrustedModelError
from med_gradcam.model import InputSpec, Model
from med_gradcam.models import _blackbox_command, _blackbox_kserve, _trust
from med_gradcam.models import _spec as description
from med_gradcam.target import Link

TITLE = (
    "KServe or Triton URL, or spec.json with an endpoint (needs --trust network) or a command "
    "(needs --trust code): predictions only"
)
_URL = re.compile(r"(kserve\+)?https?://.*", re.DOTALL)
_MOST_BYTES = 2**20  # of a spec
_KEYS = ("endpoint", "command")


def sniff(path: str) -> bool:
    """Whether the text is a URL, or names a spec with an endpoint or a command."""
    if _URL.fullmatch(path):
        return True
    spec = _spec(_file(path))
    return spec is not None and any(key in spec for key in _KEYS)


def load(path: str, trust: Collection[str] = ()) -> Model:
    """The model behind a URL or a spec; a server is asked what it takes.

    Raises:
        UntrustedModelError: voxels would go to another machine, or where a file says, or a command
            would run, and the user has not agreed to that.
        ModelError: the spec is off, or the server does not answer as it should.
    """
    if _URL.fullmatch(path):
        at = _blackbox_kserve.endpoint(path)
        if not at.wire.address.here:
            _check_network(trust, f"the voxels would be sent to {at.wire.address.words}")
        return _served(at, {})
    file = _file(path)
    spec = _spec(file) or {}
    try:
        return _specified(spec, file, trust)
    except UntrustedModelError:
        raise
    except MedGradcamError as error:
        raise ModelError(f"{file.parent.name}/{file.name}: {error}") from error


def _specified(spec: Mapping[str, Any], file: Path, trust: Collection[str]) -> Model:
    if spec.get("format") != description.FORMAT:
        raise ModelError(f"expected format {description.FORMAT!r}, got {spec.get('format')!r}.")
    if "endpoint" in spec and "command" in spec:
        raise ModelError("expected an endpoint or a command, got both.")
    if "command" in spec:
        what = f"{file.name!r} names a program that would run with your rights"
        _trust.need("code", trust, _trust.digest(file.read_bytes()), what)
        how = _how(spec, str(spec.get("name", "black box")))
        takes = _takes(spec, file)
        timeout = _seconds(spec, 600.0)
        run = _blackbox_command.command(spec["command"], file.parent.resolve(), takes, timeout)
        if run.kinds["input"] == ".nii.gz" and how.batch != 1:
            raise ModelError(f"expected a batch of 1 for {{input.nii.gz}}, got {how.batch}.")
        return made(run, how, takes, _labels(spec))
    url, names = _endpoint(spec["endpoint"])
    at = _blackbox_kserve.endpoint(url, _seconds(spec, 60.0), names)
    where = at.wire.address.words
    _check_network(trust, f"{file.name!r} says that the voxels go to {where}")
    return _served(at, spec, _takes(spec, file))


def _served(
    at: _blackbox_kserve.Endpoint, spec: Mapping[str, Any], takes: InputSpec | None = None
) -> Model:
    """The model at a server; without a spec it takes what the server says that it takes."""
    ask = _blackbox_kserve.connect(at)
    where, called = at.wire.address.words, at.model.rpartition("/models/")[2]
    version = ask.version if isinstance(ask, _blackbox_kserve.V2) else ""
    name = f"{called.partition('/')[0]}{f', version {version}' if version else ''} at {where}"
    remark = "" if at.wire.address.here else f"the voxels were sent to {where}"
    how = _how(spec, str(spec.get("name", name)), remark)
    if isinstance(ask, _blackbox_kserve.V2):
        takes = _fitting(ask, takes, how)
    return made(ask, how, takes or InputSpec(), _labels(spec))


def _fitting(ask: _blackbox_kserve.V2, takes: InputSpec | None, how: How) -> InputSpec:
    """What the network takes, as the spec and the server agree."""
    i, j, k = ask.sides
    own = (i, j, k) if min(i, j, k) > 0 else None
    if takes is None:
        takes = InputSpec(channels=max(ask.channels, 1), patch=own)
    patch = takes.patch or (-1, -1, -1)
    told = (takes.channels, *patch)
    if any(
        -1 not in pair and len(set(pair)) > 1
        for pair in zip((ask.channels, i, j, k), told, strict=True)
    ):
        raise ModelError(
            f"expected an input of {told} (channels, voxels; -1 for any), the server takes "
            f"{(ask.channels, i, j, k)}."
        )
    if own and not takes.patch:
        raise ModelError(
            f"expected the patch {list(own)} in the spec, which the server takes only."
        )
    if ask.most is not None and ask.most != how.batch:
        raise ModelError(
            f"expected a batch of {ask.most}, which the server takes, got {how.batch}."
        )
    return takes


def _check_network(trust: Collection[str], why: str) -> None:
    if _trust.NETWORK not in _trust.agreed(trust):
        raise UntrustedModelError(f"{why}; if they may, say --trust {_trust.NETWORK}.")


def _file(path: str) -> Path:
    there = Path(path)
    return there if there.suffix == ".json" else there / "spec.json"


def _spec(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where it holds none."""
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return None
        spec = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return spec if isinstance(spec, dict) else None


def _endpoint(value: object) -> tuple[str, tuple[str, str]]:
    """The URL of an endpoint, and the names of its input and output."""
    given = {"url": value} if isinstance(value, str) else value
    known = ("url", "input", "output")
    fits = isinstance(given, dict) and set(given) <= set(known) and "url" in given
    if (
        not fits
        or not isinstance(given, dict)
        or not all(isinstance(v, str) for v in given.values())
    ):
        raise ModelError(
            f"expected an endpoint as a URL, or an object with url, input and output as texts, got "
            f"{value!r}."
        )
    return given["url"], (given.get("input", ""), given.get("output", ""))


def _how(spec: Mapping[str, Any], name: str, remark: str = "") -> How:
    link: Link = spec.get("link", "softmax")
    outputs: Outputs = spec.get("outputs", "logits")
    batch = spec.get("batch", 1)
    return How(name, link, outputs, batch, remark)  # checked there


def _labels(spec: Mapping[str, Any]) -> tuple[str, ...]:
    labels = spec.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"expected a list of texts as labels, got {labels!r}.")
    return tuple(labels)


def _takes(spec: Mapping[str, Any], file: Path) -> InputSpec:
    if not isinstance(spec.get("input"), dict):
        raise ModelError(f"expected the key 'input' (an object), got {spec.get('input')!r}.")
    return description.input_of(spec["input"], file.parent)


def _seconds(spec: Mapping[str, Any], otherwise: float) -> float:
    value = spec.get("timeout_s", otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86400:
        raise ModelError(f"expected timeout_s in seconds, above 0 and within a day, got {value!r}.")
    return float(value)
