"""NIfTI: scans in; evidence cells and maps out, with geometry that every reader agrees on."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from med_gradcam.bundle import Bundle
from med_gradcam.errors import GeometryError, ImageError
from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry
from med_gradcam.maps import Heatmap
from med_gradcam.provenance import Source
from med_gradcam.record import from_record, to_json, to_record
from med_gradcam.volume import Volume, digest

TITLE = "NIfTI-1/2 (.nii, .nii.gz): reads scans, writes evidence cells and maps"

_JSON_EXTENSION = 6  # "comment": plain text that every reader skips
_SCANNER, _NONE = 1, 0
_ESTIMATE = 1001
_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}


def sniff(path: Path) -> bool:
    """Whether the path is a file named .nii or .nii.gz."""
    return path.is_file() and path.name.lower().endswith((".nii", ".nii.gz"))


def read(path: Path) -> Volume:
    """A scan (1, I, J, K) in the file's own axis order; sform wins over qform.

    Raises:
        ImageError: truncated, not three-dimensional, without orientation, or not of real numbers.
    """
    image = _open(path)
    shape = _shape(image, path)
    if len(shape) > 3:
        raise ImageError(
            f"expected one volume (three axes), got several volumes of shape {shape} in "
            f"{path.name!r}; say which one (--time N or read(path, time=N), from 1 to {shape[3]}), "
            f"or explain each of them (--each-time, or read_series and explain_series)."
        )
    return _volume(_voxels(image, path).reshape(shape), _affine(image, path), path)


def read_all(path: Path) -> list[Volume]:
    """All volumes of a file (I, J, K) or (I, J, K, T), in order, each (1, I, J, K).

    Raises:
        ImageError: as read(), but for several volumes.
    """
    image = _open(path)
    shape = _shape(image, path)
    placed = _affine(image, path)
    array = _voxels(image, path).reshape(shape if len(shape) > 3 else (*shape, 1))
    found = []
    for n in range(array.shape[3]):
        try:
            found.append(_volume(np.ascontiguousarray(array[..., n]), placed, path))
        except ImageError as error:
            raise ImageError(f"volume {n + 1} of {array.shape[3]}: {error}") from error
    return found


def _shape(image: Any, path: Path) -> tuple[int, ...]:
    """The shape (I, J, K), or (I, J, K, T) of several volumes; axes of one entry are left out."""
    shape = tuple(int(n) for n in image.shape)
    space, more = shape[:3], [n for n in shape[3:] if n != 1]
    if len(space) != 3 or min(space) < 2 or len(more) > 1:
        kind = "several axes beside space" if len(more) > 1 else "a two-dimensional image"
        raise ImageError(
            f"expected one volume (three axes), or several (four), got {kind} of shape {shape} in "
            f"{path.name!r}; extract one volume, or give the channels as separate files."
        )
    return (*space, *more)


def _volume(
    array: npt.NDArray[Any], placed: tuple[npt.NDArray[np.float64], tuple[str, ...]], path: Path
) -> Volume:
    affine, notes = placed
    i, j, k = array.shape
    try:
        grid = Geometry((i, j, k), affine)
        source = Source("nifti", digest(array[None], grid), (str(path),), notes=notes)
        return Volume(array[None], grid, None, "a.u.", source)
    except (ImageError, GeometryError) as error:
        raise type(error)(f"{path.name}: {error}") from error


def _open(path: Path) -> Any:
    packed = path.name.lower().endswith(".gz")
    try:
        raw = _decompress(path.read_bytes()) if packed else b""
        size = len(raw) if packed else path.stat().st_size
    except Exception as error:
        raise _damaged(path, error) from error
    try:
        image = _parse(raw) if packed else nib.load(path)
    except MemoryError:
        raise
    except Exception as error:  # nibabel raises a dozen kinds for headers that make no sense
        raise ImageError(
            f"expected a NIfTI file, but {path.name!r} cannot be read: {_first_line(error, path)}."
        ) from error
    if not isinstance(image, nib.Nifti1Image):
        raise ImageError(f"expected a NIfTI file, {path.name!r} is {type(image).__name__}.")
    wanted = math.prod(int(n) for n in image.shape) * image.get_data_dtype().itemsize
    if wanted > size:  # asked before numpy sets that much memory aside
        raise _damaged(path, OSError(f"its header tells of {wanted} bytes, it has {size}"))
    return image


def _decompress(data: bytes) -> bytes:
    """What a gzip file holds, to its end, so that its checksum is held against it."""
    try:
        from isal import igzip
    except ImportError:
        return gzip.decompress(data)
    unpacked: bytes = igzip.decompress(data)  # type: ignore[no-untyped-call]
    return unpacked


def _parse(data: bytes) -> Any:
    """The image in the bytes of a .nii file: NIfTI-2 says so by the size of its header."""
    two = (540).to_bytes(4, "little"), (540).to_bytes(4, "big")
    return (nib.Nifti2Image if data[:4] in two else nib.Nifti1Image).from_bytes(data)


def _first_line(error: BaseException, path: Path) -> str:
    """The error's first line, with the file's name in the place of its path."""
    lines = str(error).replace(str(path), path.name).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _damaged(path: Path, error: BaseException) -> ImageError:
    return ImageError(
        f"expected all voxels of {path.name!r}, but the file is cut short or damaged "
        f"({_first_line(error, path)}); copy it again."
    )


def _affine(image: Any, path: Path) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    header = image.header
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform == 0 and qform == 0:
        raise ImageError(
            f"expected an orientation in {path.name!r}, but both its qform and sform codes are 0, "
            f"so left and right are not known; set one of them (with nibabel or fslorient)."
        )
    affine = np.array(image.affine, dtype=np.float64)
    notes: list[str] = []
    if sform > 0 and qform > 0:
        notes += _disagreement(header, affine, image.shape)
    try:
        unit = header.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    factor = _MM_PER_UNIT.get(unit, 1.0)
    if factor != 1.0:
        affine[:3] *= factor
        notes.append(f"coordinates in {unit} converted to mm")
    return affine, tuple(notes)


def _disagreement(
    header: Any, affine: npt.NDArray[np.float64], shape: tuple[int, ...]
) -> list[str]:
    """How far the qform is off the sform at the scan's corners, where that is over 1 mm."""
    try:
        off = affine - header.get_qform()
    except ValueError:  # its quaternion is no rotation
        return ["the qform is damaged; the sform was used"]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]])).reshape(3, -1)
    apart = np.abs(off[:3, :3] @ corners + off[:3, 3:]).max()
    return (
        [f"sform and qform differ by up to {apart:.1f} mm; the sform was used"]
        if apart > 1.0
        else []
    )


def _voxels(image: Any, path: Path) -> npt.NDArray[Any]:
    try:
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from error
    if array.dtype.kind not in "iuf":
        raise ImageError(
            f"expected real numbers as voxels in {path.name!r}, got {array.dtype} "
            f"(colour or complex images are not read)."
        )
    if array.dtype.kind == "f" and array.dtype != np.float32:
        with np.errstate(over="ignore"):  # what is too large becomes infinite and is refused
            array = array.astype(np.float32)
    return np.asarray(array)


# -------------------------------------------------------------------------------------- writing


def save(bundle: Bundle, folder: Path) -> list[Path]:
    """explanation.nii.gz (the native cells) and, on the image grid, signed, for and against.

    A map without a sign has strength.nii.gz instead of the three.
    """
    e, maps = bundle.explanation, bundle.maps
    return [
        write_explanation(e, folder / "explanation.nii.gz", to_record(e, maps)),
        *(_write_map(heatmap, folder / f"{heatmap.polarity}.nii.gz") for heatmap in maps.written),
    ]


def write_explanation(explanation: Explanation, path: Path, record: dict[str, Any]) -> Path:
    """The cells with their exact affine; the whole record rides in a header extension."""
    intent = _intent(explanation.unit, "cell")
    image = _image(explanation.evidence, explanation.grid, intent, signed=explanation.signed)
    text = to_json(record).encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension(_JSON_EXTENSION, text))
    return _write(image, path)


def read_explanation(path: Path) -> Explanation:
    """The Explanation in an explanation.nii.gz, equal to the one that was written.

    Raises:
        ImageError: the file holds no such record.
    """
    there = path / "explanation.nii.gz" if path.is_dir() else path
    if not there.is_file():
        raise ImageError(f"expected an explanation.nii.gz, found none: {there.name!r}.")
    image = _open(there)
    for extension in image.header.extensions:
        if extension.get_code() != _JSON_EXTENSION:
            continue
        content = extension.get_content()
        raw = content if isinstance(content, bytes) else str(content).encode()
        try:
            record = json.loads(raw.rstrip(b"\0").decode())
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        if isinstance(record, dict) and "cell_grid" in record:
            return from_record(record, _voxels(image, there))
    raise ImageError(
        f"expected an explanation written by med_gradcam, but {there.name!r} holds no record."
    )


def _write_map(heatmap: Heatmap, path: Path) -> Path:
    intent, signed = _intent(heatmap.unit, "mL"), heatmap.polarity != "strength"
    image = _image(heatmap.values, heatmap.grid, intent, signed=signed)
    image.header["cal_max"] = heatmap.peak
    image.header["cal_min"] = -heatmap.peak if heatmap.polarity == "signed" else 0.0
    return _write(image, path)


def _intent(unit: str, per: str) -> str:
    """The unit in the 15 characters that an intent name has."""
    if "input unit" in unit:
        return f"gradient/{per}"
    word = next(w for w in ("log-odds", "relative", "score") if unit.startswith(w))
    return f"{word}/{per}"


def _image(values: npt.NDArray[np.float32], grid: Geometry, unit: str, *, signed: bool) -> Any:
    image = nib.Nifti1Image(np.asarray(values, dtype=np.float32), None)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(_ESTIMATE, (), name=unit[:15])
    what = "Evidence map" if signed else "Map without a sign"
    image.header["descrip"] = f"{what}, research use, not for diagnosis".encode()
    image.set_sform(grid.affine, _SCANNER)
    if grid.is_orthogonal:
        image.set_qform(grid.affine, _SCANNER)
    else:
        image.header["qform_code"] = _NONE
        image.header.set_zooms(grid.spacing_mm)
    image.update_header()
    return image


def _write(image: Any, path: Path) -> Path:
    path.write_bytes(_compress(image.to_bytes()))
    return path


def _compress(data: bytes) -> bytes:
    """Gzip without name or time, so that equal content gives equal files."""
    try:
        from isal import igzip
    except ImportError:
        return gzip.compress(data, 4, mtime=0)
    packed: bytes = igzip.compress(data, 1, mtime=0)
    return packed
