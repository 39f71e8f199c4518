"""Expected gradients: integrated gradients, averaged over several references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from med_gradcam.capture import Capture
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Measure, Reference
from med_gradcam.methods import Bound, Evidence, integrated
from med_gradcam.methods._noise import textures
from med_gradcam.prepare import Prepared
from med_gradcam.reference import ReferenceInput, from_scan, grain
from med_gradcam.volume import Volume

PAIRS = 2  # references are the reference input plus, and minus, each of these textures

TITLE = "expected gradients: integrated gradients against several references; adds up"
SOURCE = (
    "Erion et al., arXiv:1906.10670, eq. 3; the references are the scans of a set that is given, "
    "else the reference input with seeded textures of the scan's own voxel-to-voxel noise, added "
    "and subtracted"
)
CANNOT_SHOW = (
    "voxels at which scan and references are alike; and it is relative to the mean score of its "
    "references, which is not exactly that of the reference input"
)
SIGNED = True
UNIT: Measure = "score"
LEVEL: Literal["layer", "input"] = "input"
BESIDE = False
USES_REFERENCE = True
PROMISES_SUM = True
REFERENCES = "with 4 seeded textures of the scan's noise, their mean"  # of the reference input


def evidence(capture: Capture, bound: Bound) -> Evidence:
    """Signed evidence per voxel (I, J, K), relative to the references' mean score.

    The residual is the mean of what the integrals miss.

    Raises:
        UsageError: the capture has no baseline.
    """
    found = []
    for baseline in _references(capture):
        one = replace(capture, baseline=baseline, passes=0.0)
        if capture.baselines:  # scans far apart: each integral has a bound of its own
            one.reference_score = float(one.scores(baseline[None])[0])
        found.append(integrated.evidence(one, bound))
        capture.passes += one.passes
    values = torch.stack([e.values for e in found]).mean(0)
    start = sum(e.start_score or 0.0 for e in found) / len(found)
    missed = abs(capture.score - start - float(values.sum()))
    converged = all(e.converged for e in found) and missed <= bound.of(capture.score - start)
    return Evidence(values, start, converged, sum(e.nodes for e in found), reference_score=start)


def given(
    method: str, scans: Sequence[object], ready: Callable[[Volume], Prepared], prepared: Prepared
) -> ReferenceInput:
    """Several reference scans of the user's, each made `ready` as the scan `prepared` is.

    Raises:
        UsageError: another method, none at all, no Volume, another size or place.
    """
    if method != "expected_gradients":
        raise UsageError(
            f"expected one reference for the method {method!r}, got a list of {len(scans)}; only "
            f"'expected_gradients' takes the mean over several."
        )
    volumes = [scan for scan in scans if isinstance(scan, Volume)]
    if not volumes or len(volumes) < len(scans):
        kinds = ", ".join(sorted({type(scan).__name__ for scan in scans})) or "none"
        raise UsageError(f"expected a list of Volumes as references, got {kinds}.")
    found = [from_scan(ready(volume), prepared) for volume in volumes]
    words = f"the mean of {len(found)} given reference scans"
    every = tuple(one.raw for one in found)
    return replace(found[0], every=every, reference=Reference("file", None, words))


def _references(capture: Capture) -> Iterator[torch.Tensor]:
    """The scans that were given (C, I, J, K), else the reference input with each texture."""
    if capture.baselines:
        yield from capture.baselines
        return
    base = capture.baseline
    if base is None:
        raise UsageError(
            "expected a reference input for the method 'expected_gradients', got none."
        )
    channels = capture.input[0].float().cpu().numpy()
    sd = torch.tensor([grain(channel) for channel in channels], dtype=torch.float64)
    for texture in textures(base.shape, PAIRS, capture.seed):
        step = (sd[:, None, None, None] * texture).to(base)
        yield base + step
        yield base - step
