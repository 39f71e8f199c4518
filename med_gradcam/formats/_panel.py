"""How is one view drawn: scan in grey, evidence in colour, frame, letters, scale bar, inset?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from med_gradcam import paint
from med_gradcam.bundle import Bundle
from med_gradcam.calibration import Calibration
from med_gradcam.errors import UsageError
from med_gradcam.formats import _canvas
from med_gradcam.geometry import Geometry
from med_gradcam.maps import Side
from med_gradcam.projection import Plane

FRAME = (222, 222, 222)
BOX, BOX_OTHER = (80, 240, 170), (50, 180, 130)  # the explained box of a detector, and the others
_EMPTY_GREY, _GRID_GREY = 26, 48
_GRID_MM = (10, 20, 50, 100, 200)
_INSET_SHARE = 0.24
# The cells' box counts as a patch when it spans less of some image axis than this.
_PATCH_SHARE = 0.97
# A zoomed picture spans this many times the box, and at least so many mm; it is drawn when its
# pixels are at most this share of the whole picture's.
_ZOOM, _ZOOM_LEAST_MM, _ZOOM_WORTH = 2.0, 80.0, 0.75

Array = npt.NDArray[Any]
Box = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Field:
    """What a picture shows of a plane.

    `centre` is a (row, column) index of the plane, `size` (height, width) in pixels, which are
    square, of `mm_per_pixel`.
    """

    plane: Plane
    centre: tuple[float, float]
    mm_per_pixel: float
    size: tuple[int, int]

    def indices(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Row and column index of the plane at each pixel's centre."""
        rows, columns = (
            np.float64(centre) + (np.arange(count) - (count - 1) / 2) * self.mm_per_pixel / size_mm
            for centre, count, size_mm in zip(
                self.centre, self.size, self.plane.pixel_mm, strict=True
            )
        )
        return rows, columns

    def pixel(self, row: float, column: float) -> tuple[float, float]:
        """Where a row and column index lies in the picture: x, y in pixels."""
        y, x = (
            (at - centre) * size_mm / self.mm_per_pixel + (count - 1) / 2
            for at, centre, count, size_mm in zip(
                (row, column), self.centre, self.size, self.plane.pixel_mm, strict=True
            )
        )
        return x, y


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """What lies on a plane (rows, columns): the scan in grey under the coloured sides."""

    scan: Array | None
    window: paint.Window | None
    sides: Mapping[Side, Array]
    scale: Calibration


def checked_scan(bundle: Bundle) -> Array | None:
    """The first channel of the scan, or the mean of the three of an RGB one; None without a scan.

    Raises:
        UsageError: the scan lies on another grid than the maps.
    """
    volume, grid = bundle.volume, bundle.maps.signed.grid
    if volume is None:
        return None
    if volume.grid.shape != grid.shape or not np.allclose(volume.grid.affine, grid.affine):
        raise UsageError(
            f"expected a scan on the grid of the maps {grid.shape}, got {volume.grid.shape} or "
            f"another affine; draw the maps on the scan's grid first."
        )
    if volume.unit == "RGB":
        return np.asarray(volume.array.mean(axis=0))
    return np.asarray(volume.array[0])


def cells_box(cells: Geometry, image: Geometry) -> Box:
    """The box of the cells within the image: (2, 3), lowest and highest index of voxel edges."""
    counts = np.array(cells.shape)
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in counts))).reshape(3, -1).T
    index = image.index_ijk(cells.world_ras(corners))
    edge = np.array(image.shape) - 0.5
    ends = np.stack((index.min(axis=0), index.max(axis=0)))
    return np.asarray(np.clip(ends, -0.5, edge))


def is_patch(box: Box, image: Geometry) -> bool:
    """Whether the cells cover visibly less than the image."""
    return bool(((box[1] - box[0]) / np.array(image.shape) < _PATCH_SHARE).any())


def seen_box(plane: Plane, box: Box) -> Box:
    """A box of array indices as (2, 3) row, column, depth in a view."""
    ends = plane.row_column_depth(box)
    return np.stack((ends.min(axis=0), ends.max(axis=0)))


def whole_field(plane: Plane, room: tuple[int, int]) -> Field:
    """The whole plane, as large as it fits into `room` (height, width) pixels."""
    counts = plane.shape[:2]
    extent = [n * mm for n, mm in zip(counts, plane.pixel_mm, strict=True)]
    mm_per_pixel = max(mm / pixels for mm, pixels in zip(extent, room, strict=True))
    return Field(plane, ((counts[0] - 1) / 2, (counts[1] - 1) / 2), mm_per_pixel, room)


def picture(field: Field, layers: Layers) -> Image.Image:
    """Scan and evidence on square pixels."""
    rows, columns = field.indices()
    if layers.scan is None or layers.window is None:
        backdrop = _empty(field)
    else:
        values = paint.sample(layers.scan, rows, columns, outside=layers.window.low)
        backdrop = paint.grey(values, layers.window)
    sides = {side: paint.sample(shown, rows, columns) for side, shown in layers.sides.items()}
    return Image.fromarray(paint.blend(backdrop, sides, layers.scale))


def _empty(field: Field) -> paint.Bytes:
    """The image's extent as a grid, where there is no scan to show."""
    rows, columns = field.indices()
    inside = np.ones(field.size, dtype=bool)
    lines = np.zeros(field.size, dtype=bool)
    extent_mm = min(field.size) * field.mm_per_pixel
    step_mm = max((mm for mm in _GRID_MM if mm <= extent_mm / 3), default=_GRID_MM[0])
    for axis, (index, count, size_mm) in enumerate(
        zip((rows, columns), field.plane.shape, field.plane.pixel_mm, strict=False)
    ):
        at = (index + 0.5) * size_mm
        on = np.diff(np.floor(at / step_mm), prepend=np.floor((at[0] - 1e-3) / step_mm)) > 0
        within = (at >= 0) & (at <= count * size_mm)
        inside &= within[:, None] if axis == 0 else within
        lines |= on[:, None] if axis == 0 else on
    drawn = np.where(lines, _GRID_GREY, _EMPTY_GREY)
    return np.where(inside, drawn, 0).astype(np.uint8)


def box_frame(image: Image.Image, field: Field, seen: Box, words: str, *, bright: bool) -> None:
    """A detector's box (row, column, ...) in green, with its number at the upper left corner."""
    colour = BOX if bright else BOX_OTHER
    outline(image, field, seen, (0, 0, 0), 1)
    outline(image, field, seen, colour)
    left, top = (round(v) for v in field.pixel(seen[0, 0], seen[0, 1]))
    if words and 0 <= left < image.width - 20 and 16 <= top < image.height:
        _canvas.write_over(image, (left + 1, top - 3), words, _canvas.SMALL, "ls")


def outline(
    image: Image.Image,
    field: Field,
    seen: Box,
    colour: tuple[int, int, int] = FRAME,
    outside: int = 0,
) -> None:
    """A thin frame around a box (row, column, ...), `outside` pixels out of its sides."""
    left, top = field.pixel(seen[0, 0], seen[0, 1])
    right, bottom = field.pixel(seen[1, 0], seen[1, 1])
    o = outside
    sides = (round(left) - o, round(top) - o, round(right) + o, round(bottom) + o)
    ImageDraw.Draw(image).rectangle(sides, outline=colour)


def reticle(image: Image.Image, at: tuple[float, float]) -> None:
    """Four short lines that point at a place and leave it free."""
    x, y = (round(v) for v in at)
    draw = ImageDraw.Draw(image)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        line = (x + dx * 10, y + dy * 10, x + dx * 20, y + dy * 20)
        draw.line(line, fill=(0, 0, 0), width=3)
        draw.line(line, fill=_canvas.BRIGHT, width=1)


def finish(image: Image.Image, field: Field, caption: str) -> None:
    """Letters at the edges, a scale bar and a caption at the upper left."""
    width, height = image.size
    edges, size = field.plane.edges, 18
    _canvas.write_over(image, (8, height / 2), edges.left, size, "lm")
    _canvas.write_over(image, (width - 8, height / 2), edges.right, size, "rm")
    _canvas.write_over(image, (width / 2, 5), edges.top, size, "ma")
    _canvas.write_over(image, (width / 2, height - 9), edges.bottom, size, "ms")
    _canvas.write_over(image, (10, 7), caption, _canvas.SMALL, "la")
    _canvas.scale_bar(image, field.mm_per_pixel)


def inset(image: Image.Image, field: Field, layers: Layers) -> None:
    """The whole plane, small, at the lower right, with a frame where the picture lies in it."""
    side = round(min(image.size) * _INSET_SHARE)
    whole = whole_field(field.plane, (side, side))
    small = picture(whole, Layers(layers.scan, layers.window, {}, layers.scale))
    rows, columns = field.indices()
    outline(small, whole, np.array(((rows[0], columns[0]), (rows[-1], columns[-1]))))
    at = (image.width - side - 7, image.height - side - 7)
    ImageDraw.Draw(image).rectangle(
        (at[0] - 1, at[1] - 1, at[0] + side, at[1] + side), outline=_canvas.QUIET
    )
    image.paste(small, at)


def message(image: Image.Image, text: str) -> None:
    """Words across the upper part of a picture, on a dark band, clear of letters and middle."""
    lines = _canvas.wrapped(text, _canvas.NORMAL, image.width - 40)
    high, top = _canvas.paragraph_height(len(lines), _canvas.NORMAL), 42
    place = (0, top - 4, image.width, top + high + 4)
    under = image.crop(place)
    image.paste(Image.blend(under, Image.new("RGB", under.size), 0.65), place[:2])
    for number, line in enumerate(lines):
        y = top + round((number + 0.5) * _canvas.NORMAL * _canvas.LINE_HEIGHT)
        _canvas.write_over(image, (image.width / 2, y), line, _canvas.NORMAL, "mm")


def zoom_field(plane: Plane, seen: Box, room: tuple[int, int]) -> Field | None:
    """The surroundings of a box, about twice its size, kept inside the plane.

    None where that is nearly the whole plane anyway.
    """
    whole = whole_field(plane, room)
    sizes = np.array(plane.pixel_mm)
    extent_mm = (seen[1, :2] - seen[0, :2]) * sizes
    mm_per_pixel = max(_ZOOM_LEAST_MM, _ZOOM * float(extent_mm.max())) / min(room)
    if mm_per_pixel > _ZOOM_WORTH * whole.mm_per_pixel:
        return None
    half = np.array(room) * mm_per_pixel / sizes / 2
    counts = np.array(plane.shape[:2], dtype=np.float64)
    middle = seen[:, :2].mean(axis=0)
    inside = np.clip(middle, half - 0.5, np.maximum(counts - 0.5 - half, half - 0.5))
    row, column = np.where(2 * half >= counts, (counts - 1) / 2, inside).tolist()
    return Field(plane, (row, column), mm_per_pixel, room)
