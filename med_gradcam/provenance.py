"""From what, with what and when was a result made, without saying whose scan it was?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from med_gradcam.errors import InputError


@dataclass(frozen=True, slots=True)
class Source:
    """Where a volume came from. `paths` stay inside the process; no output ever holds them.

    `kind` is nifti, dicom or array; `sha256` the digest of the voxels and their affine;
    `sop_uids` one per slice along the volume's last axis; `notes` what the reader had to decide.
    """

    kind: str
    sha256: str
    paths: tuple[str, ...] = ()
    study_uid: str | None = None
    series_uid: str | None = None
    sop_uids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("nifti", "dicom", "array"):
            raise InputError(f"expected a source kind nifti, dicom or array, got {self.kind!r}.")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a result was made of; every field is safe to write into a file that travels.

    `parameters` holds the settings of the call; `versions` the packages; `input_sha256` and
    `weights_sha256` the digests; `uids` DICOM study, series and SOP instances of the source.
    """

    versions: dict[str, str]
    parameters: dict[str, Any]
    input_sha256: tuple[str, ...]
    weights_sha256: str
    model_name: str
    uids: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    utc: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.utc and not self.utc.endswith("Z"):
            raise InputError(f"expected a UTC time that ends in Z, got {self.utc!r}.")
