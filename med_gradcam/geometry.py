"""Where does a grid of voxels lie in the patient: shape, affine (index -> RAS+ mm), frame?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from med_gradcam.errors import GeometryError

Frame = Literal["patient", "slide"]
Array = npt.NDArray[np.float64]

# Letters of RAS+: a positive step along world axis 0 goes to the patient's right, and so on.
_POSITIVE, _NEGATIVE = "RAS", "LPI"
_SIDES = {"R": "patient's right", "L": "patient's left"}


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """A voxel grid: `shape` (I, J, K) and `affine` 4x4 float64, index -> mm in RAS+.

    `frame` is patient or slide; `frame_uid` the DICOM frame of reference, where known.

    Raises:
        GeometryError: the shape is not three positive integers, or the affine is not a finite,
            non-singular 4x4 matrix with last row (0, 0, 0, 1).
    """

    shape: tuple[int, int, int]
    affine: Array
    frame: Frame = "patient"
    frame_uid: str | None = None

    def __post_init__(self) -> None:
        given: tuple[float, ...] = tuple(self.shape)
        if len(given) != 3 or not all(n >= 1 and n == n // 1 for n in given):
            raise GeometryError(f"expected a shape of three positive integers, got {self.shape}.")
        shape = tuple(int(n) for n in given)
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(
                f"expected a finite 4x4 affine, got shape {affine.shape}: {affine.tolist()}."
            )
        if not np.array_equal(affine[3], (0, 0, 0, 1)):
            raise GeometryError(f"expected the last affine row 0 0 0 1, got {affine[3].tolist()}.")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() == 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
            raise GeometryError(
                f"expected an affine that spans space, got a singular one: {affine.tolist()}."
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geometry):
            return NotImplemented
        return (self.shape, self.frame, self.frame_uid) == (
            other.shape,
            other.frame,
            other.frame_uid,
        ) and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes(), self.frame, self.frame_uid))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along each index axis, mm."""
        a, b, c = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return a, b, c

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, mL."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def axcodes(self) -> str:
        """Letters of the patient direction each index axis points to most, e.g. "LPS"."""
        return "".join(
            (_POSITIVE if sign > 0 else _NEGATIVE)[axis] for axis, sign in self._closest()
        )

    @property
    def oblique_degrees(self) -> float:
        """Largest angle between an index axis and the patient axis it points to most."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        cosines = [abs(unit[axis, i]) for i, (axis, _) in enumerate(self._closest())]
        return float(np.degrees(np.arccos(np.clip(min(cosines), 0, 1))))

    @property
    def is_orthogonal(self) -> bool:
        """Whether the index axes stand at right angles (no shear), to 1e-4."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(unit.T @ unit - np.eye(3)).max() < 1e-4)

    def _closest(self) -> list[tuple[int, int]]:
        """(world axis, sign) for each index axis; each world axis is used once."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        found: dict[int, tuple[int, int]] = {}
        weight = np.abs(unit).copy()
        for _ in range(3):
            world, index = np.unravel_index(int(np.argmax(weight)), (3, 3))
            found[int(index)] = (int(world), 1 if unit[world, index] > 0 else -1)
            weight[world, :] = weight[:, index] = -1
        return [found[i] for i in range(3)]

    def world_ras(self, index_ijk: npt.ArrayLike) -> Array:
        """RAS+ mm of 0-based (fractional) indices, shape (..., 3)."""
        index = np.asarray(index_ijk, dtype=np.float64)
        return np.asarray(index @ self.affine[:3, :3].T + self.affine[:3, 3])

    def index_ijk(self, world_ras: npt.ArrayLike) -> Array:
        """Fractional 0-based index of points given in RAS+ mm, shape (..., 3)."""
        points = np.asarray(world_ras, dtype=np.float64) - self.affine[:3, 3]
        return np.asarray(np.linalg.solve(self.affine[:3, :3], points.reshape(-1, 3).T).T).reshape(
            points.shape
        )

    def contains(self, index_ijk: npt.ArrayLike) -> bool:
        """Whether a (fractional) index lies within the voxels of the grid."""
        index = np.asarray(index_ijk, dtype=np.float64)
        return bool((index >= -0.5).all() and (index <= np.array(self.shape) - 0.5).all())


@dataclass(frozen=True, slots=True)
class Reorientation:
    """How one grid's axes become another's: new axis n is old axis `order[n]`, flipped or not."""

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]


def check_axcodes(axes: str) -> str:
    """The three letters, one of each pair R/L, A/P, S/I, in upper case; or the file's own axes.

    These are a permutation of "ijk": "kji" takes them in reverse, as SimpleITK's arrays have them.

    Raises:
        GeometryError: they are not such letters.
    """
    if sorted(axes) == ["i", "j", "k"]:
        return axes
    pairs = [{"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}.get(c, -1) for c in axes.upper()]
    if sorted(pairs) != [0, 1, 2]:
        raise GeometryError(
            f"expected axis letters such as 'RAS' or 'SPL' (one of each pair R/L, A/P, S/I), or "
            f"'ijk' in any order for the file's own axes, got {axes!r}."
        )
    return axes.upper()


def reorientation(grid: Geometry, axes: str) -> Reorientation:
    """The axis permutation and flips that bring `grid` closest to `axes`, e.g. "SPL"."""
    wanted, have = check_axcodes(axes), grid.axcodes
    if wanted.islower():
        i, j, k = ("ijk".index(axis) for axis in wanted)
        return Reorientation((i, j, k), (False, False, False))
    opposite = dict(zip("RASLPI", "LPIRAS", strict=True))
    order = tuple(next(i for i, h in enumerate(have) if h in (w, opposite[w])) for w in wanted)
    flip = tuple(have[i] != w for i, w in zip(order, wanted, strict=True))
    return Reorientation((order[0], order[1], order[2]), (flip[0], flip[1], flip[2]))


def reorient(grid: Geometry, how: Reorientation) -> Geometry:
    """The same voxels' grid after the array was transposed and flipped by `how`."""
    shape = tuple(grid.shape[i] for i in how.order)
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for new, (old, flipped) in enumerate(zip(how.order, how.flip, strict=True)):
        step[old, new] = -1 if flipped else 1
        step[old, 3] = grid.shape[old] - 1 if flipped else 0
    return Geometry((shape[0], shape[1], shape[2]), grid.affine @ step, grid.frame, grid.frame_uid)


def reorient_array(array: npt.NDArray[np.generic], how: Reorientation) -> npt.NDArray[np.generic]:
    """A view of `array` (..., I, J, K) with its last three axes transposed and flipped by `how`."""
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + i for i in how.order))
    steps = tuple(slice(None, None, -1) if f else slice(None) for f in how.flip)
    return moved[(..., *steps)]


def crop(grid: Geometry, start: Sequence[int], shape: Sequence[int]) -> Geometry:
    """The grid of `array[start : start + shape]`; start may be negative (padding)."""
    move = np.eye(4)
    move[:3, 3] = start
    i, j, k = (int(n) for n in shape)
    return Geometry((i, j, k), grid.affine @ move, grid.frame, grid.frame_uid)


def cells(
    grid: Geometry, jump: Sequence[float], start: Sequence[float], shape: Sequence[int]
) -> Geometry:
    """The grid of cells whose cell i has its centre at voxel index start + i * jump of `grid`."""
    step = np.diag([*(float(j) for j in jump), 1.0])
    step[:3, 3] = start
    i, j, k = (int(n) for n in shape)
    return Geometry((i, j, k), grid.affine @ step, grid.frame, grid.frame_uid)


def point_words(world_ras: npt.ArrayLike) -> str:
    """A point for people, with letters: "R 34 P 12 S 88 mm"."""
    point = np.asarray(world_ras, dtype=np.float64)
    parts = [
        f"{(_POSITIVE if value >= 0 else _NEGATIVE)[axis]} {abs(value):.0f}"
        for axis, value in enumerate(point.tolist())
    ]
    return " ".join(parts) + " mm"


def side_words(world_ras: npt.ArrayLike) -> str:
    """Which side of the scanner's midline a point lies on: "patient's right"."""
    x = float(np.asarray(world_ras, dtype=np.float64)[0])
    return _SIDES["R" if x > 0 else "L"] if abs(x) >= 0.5 else "midline"
