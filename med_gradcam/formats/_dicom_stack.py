"""Do slices make one straight, complete stack, and where does it lie in the patient?

Positions decide, never file names or InstanceNumber. A stack is accepted when every slice lies
within 0.1 mm (or a tenth of the slice distance, if that is less) of an evenly spaced line along the
slice normal; everything else is refused with file names and millimetres.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import ImageError
from med_gradcam.formats._dicom_headers import Slice

Array = npt.NDArray[np.float64]

TOLERANCE_MM = 0.1
_SAME_PLACE_MM = 1e-3
# Two cosines or spacings count as equal up to here.
_COSINE, _SPACING_MM = 1e-4, 1e-4
# DICOM's LPS+ to our RAS+: the only place where a scan's axes are turned round.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def some(names: Sequence[str], most: int = 4) -> str:
    """A few file names for a message: "a.dcm, b.dcm and 7 more"."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def check_same(slices: Sequence[Slice], what: str, value: Callable[[Slice], object]) -> None:
    """Refuse slices that differ in a header value, naming those of the smaller groups.

    Raises:
        ImageError: there is more than one value; numbers count as equal up to 1e-4.
    """
    groups: list[tuple[object, list[Slice]]] = []
    for one in slices:
        mine = value(one)
        for theirs, members in groups:
            if _equal(mine, theirs):
                members.append(one)
                break
        else:
            groups.append((mine, [one]))
    if len(groups) == 1:
        return
    groups.sort(key=lambda group: -len(group[1]))
    odd = [one.name for _, members in groups[1:] for one in members]
    raise ImageError(
        f"expected one {what} in the series, got {len(groups)} (most slices have "
        f"{_words(groups[0][0])}; {some(odd)}: {_words(groups[1][0])}); "
        f"move the slices that do not belong into a folder of their own."
    )


def _equal(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and a and isinstance(a[0], float):
        return len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=_SPACING_MM))
    return a == b


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    return "none" if value is None else str(value)


def _require_geometry(slices: Sequence[Slice]) -> None:
    wanted: tuple[tuple[str, int, Callable[[Slice], tuple[float, ...]]], ...] = (
        ("ImagePositionPatient", 3, lambda s: s.position_lps),
        ("ImageOrientationPatient", 6, lambda s: s.orientation_lps),
        ("PixelSpacing", 2, lambda s: s.spacing_mm),
    )
    for keyword, count, value in wanted:
        bad = [s.name for s in slices if len(value(s)) != count]
        if bad:
            raise ImageError(
                f"expected {count} numbers as {keyword} in every slice, got none or others in "
                f"{some(bad)}; without them nobody knows where the slice lies. "
                f"Export the original images again."
            )
    bad = [s.name for s in slices if min(s.spacing_mm) <= 0]
    if bad:
        raise ImageError(f"expected a positive PixelSpacing, got another one in {some(bad)}.")


def axes_lps(one: Slice) -> tuple[Array, Array, Array]:
    """Unit vectors (LPS) along columns' index, rows' index and their cross product.

    Raises:
        ImageError: the orientation is not two unit vectors at a right angle.
    """
    row, column = np.array(one.orientation_lps[:3]), np.array(one.orientation_lps[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 1e-2 or abs(float(row @ column)) > 1e-2:
        raise ImageError(
            f"expected two unit vectors at a right angle as ImageOrientationPatient, got "
            f"{_words(one.orientation_lps)} in {one.name}."
        )
    row = row / lengths[0]
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def stack(slices: Sequence[Slice]) -> tuple[list[Slice], Array]:
    """The slices ascending along row x column, and the affine (4, 4) index -> RAS+ mm.

    Index order is (column, row, slice).

    Raises:
        ImageError: they are no straight, evenly spaced, complete stack; the message names the
            files and the millimetres.
    """
    _require_geometry(slices)
    check_same(slices, "ImageOrientationPatient", lambda s: s.orientation_lps)
    check_same(slices, "PixelSpacing (mm)", lambda s: s.spacing_mm)
    row, column, normal = axes_lps(slices[0])
    position = np.array([s.position_lps for s in slices])
    depth = position @ normal
    order = np.argsort(depth, kind="stable")
    ordered, position, depth = [slices[i] for i in order], position[order], depth[order]
    _check_places(ordered, position, depth)
    _check_tilt(ordered, position, normal)
    _check_steps(ordered, depth)
    step_mm = (depth[-1] - depth[0]) / (len(ordered) - 1)
    between_rows, between_columns = ordered[0].spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = row * between_columns
    affine[:3, 1] = column * between_rows
    affine[:3, 2] = normal * step_mm
    affine[:3, 3] = position[0]
    return ordered, LPS_TO_RAS @ affine


def _check_places(ordered: Sequence[Slice], position: Array, depth: Array) -> None:
    """Refuse several slices at one depth: doubles, time points or tiles."""
    starts = [0, *(np.flatnonzero(np.diff(depth) > _SAME_PLACE_MM) + 1).tolist(), len(ordered)]
    counts = np.diff(starts)
    if counts.max() == 1:
        return
    if len(counts) > 1 and counts.min() == counts.max():
        raise ImageError(
            f"expected one slice per position, got {counts[0]} at each of {len(counts)} positions: "
            f"this is a 4D series (time points, echoes or phases), {len(ordered)} files; put the "
            f"slices of one volume into a folder of their own (--each-time takes several folders)."
        )
    first = int(starts[int(np.argmax(counts > 1))])
    names = [s.name for s in ordered[first : first + int(counts.max())]]
    at = " ".join(f"{v:.2f}" for v in position[first])
    raise ImageError(
        f"expected one slice per position, got {int((counts - 1).sum())} too many: {some(names)} "
        f"lie at the same place (LPS {at} mm); remove the doubles."
    )


def _check_tilt(ordered: Sequence[Slice], position: Array, normal: Array) -> None:
    offset = position - position[0]
    sideways = np.linalg.norm(offset - np.outer(offset @ normal, normal), axis=1)
    worst = int(np.argmax(sideways))
    height = float((offset @ normal)[worst])
    if sideways[worst] <= min(TOLERANCE_MM, 0.1 * abs(height)):
        return
    angle = float(np.degrees(np.arctan2(sideways[worst], abs(height))))
    raise ImageError(
        f"expected slices stacked along their normal, got a stack that shifts sideways by "
        f"{sideways[worst]:.2f} mm over {abs(height):.2f} mm ({angle:.1f} degrees, gantry tilt) "
        f"between {ordered[0].name} and {ordered[worst].name}; resample it to a straight grid "
        f"first, for example with dcm2niix."
    )


def _check_steps(ordered: Sequence[Slice], depth: Array) -> None:
    steps = np.diff(depth)
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])
    ideal = depth[0] + np.arange(len(depth)) * (depth[-1] - depth[0]) / len(steps)
    off = np.abs(depth - ideal)
    if off.max() <= min(TOLERANCE_MM, 0.1 * usual):
        return
    wide = np.flatnonzero(steps > 1.5 * usual).tolist()
    whole = np.abs(steps / usual - np.round(steps / usual)) < 0.1
    if wide and whole.all():
        holes = [
            f"{round(steps[i] / usual) - 1} between {ordered[i].name} and {ordered[i + 1].name} "
            f"({steps[i]:.2f} mm apart)"
            for i in wide
        ]
        total = int(np.round(steps[wide] / usual).sum()) - len(wide)
        raise ImageError(
            f"expected a slice every {usual:.2f} mm, but {total} missing: {some(holes)}; "
            f"export the complete series again."
        )
    worst = int(np.argmax(np.abs(steps - usual)))
    raise ImageError(
        f"expected evenly spaced slices, got distances from {steps.min():.2f} to "
        f"{steps.max():.2f} mm ({steps[worst]:.2f} mm between {ordered[worst].name} and "
        f"{ordered[worst + 1].name}); resample the series to an even grid first, for example with "
        f"dcm2niix."
    )
