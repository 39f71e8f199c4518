"""What do all pictures of one explanation share: scan, window, planes, the cells' box, peaks?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from med_gradcam import paint
from med_gradcam.bundle import Bundle
from med_gradcam.explanation import Explanation
from med_gradcam.formats import _panel, _words
from med_gradcam.geometry import Geometry, point_words, side_words
from med_gradcam.maps import Heatmap, Maps, Side
from med_gradcam.projection import VIEWS, Plane, View, plane_of
from med_gradcam.target import Box

_OBLIQUE_DEGREES = 2.0
# Evidence outside the scan is mentioned from this share of all evidence on.
_LOST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Peak:
    """The strongest voxel of one side: index, RAS+ mm, density in the map's unit."""

    side: Side
    index_ijk: tuple[int, int, int]
    ras_mm: tuple[float, float, float]
    density: float

    @property
    def words(self) -> str:
        """Where it lies, for people."""
        return _words.tied(f"{point_words(self.ras_mm)} ({side_words(self.ras_mm)})")


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A detector's box in a picture: its corners (2, 3) as indices of the scan's voxels."""

    box: Box
    corners: _panel.Box
    explained: bool


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """One explanation, ready to be drawn."""

    explanation: Explanation
    maps: Maps
    scan: _panel.Array | None
    window: paint.Window | None
    scan_unit: str
    box: _panel.Box
    patch: bool
    planes: dict[View, Plane]
    peaks: tuple[Peak, ...]
    frames: tuple[Frame, ...] = ()

    @property
    def grid(self) -> Geometry:
        """The grid of scan and maps."""
        return self.maps.signed.grid

    @property
    def sides(self) -> dict[Side, Heatmap]:
        """The maps that are coloured."""
        return self.maps.sides

    def peak(self, side: Side) -> Peak | None:
        """The strongest place of a side; None when it does not reach the floor."""
        return next((peak for peak in self.peaks if peak.side == side), None)

    def nothing(self, side: Side | None = None) -> str:
        """Said where nothing of a side is coloured, or (None) nothing at all."""
        if not self.maps.has_sign:
            side = "strength"
        elif not self.peaks:
            side = None
        return _words.nothing(self.maps.signed.scale, side)

    def notes(self, backdrop: str) -> list[str]:
        """What a reader must know beside the numbers, in short phrases."""
        notes = [_words.scale(self.maps.signed.scale)]
        if self.window is not None:
            low, high = _words.number(self.window.low), _words.number(self.window.high)
            unit = f" {self.scan_unit}" if self.scan_unit == "HU" else ""
            notes.append(f"{backdrop} in grey, {self.window.name} window ({low} to {high}{unit})")
        if self.patch:
            notes.append(_words.BOX_WORDS)
        notes += _words.frames([frame.box for frame in self.frames])
        lost = sum(heatmap.outside_image for heatmap in self.sides.values())
        if lost > _LOST_SHARE * (self.explanation.sum_for + self.explanation.sum_against):
            amount = f"{_words.number(lost)} {self.explanation.unit}"
            what = "evidence" if self.maps.has_sign else "strength"
            notes.append(f"{what} of {amount} lies outside the scan, undrawn")
        if self.grid.oblique_degrees > _OBLIQUE_DEGREES:
            notes.append(
                f"oblique scan ({self.grid.oblique_degrees:.0f} degrees), shown along its own "
                f"axes: letters name the closest direction"
            )
        return notes


def scene(bundle: Bundle) -> Scene:
    """Gather what the pictures share.

    Raises:
        UsageError: the scan lies on another grid than the maps.
    """
    grid = bundle.maps.signed.grid
    scan, volume = _panel.checked_scan(bundle), bundle.volume
    box = _panel.cells_box(bundle.explanation.grid, grid)
    patch = _panel.is_patch(box, grid)
    window = None
    if scan is not None and volume is not None:
        window = paint.window_for(volume, _inside(scan, box) if patch else scan)
    found = [_peak(heatmap, side) for side, heatmap in bundle.maps.sides.items()]
    return Scene(
        bundle.explanation,
        bundle.maps,
        scan,
        window,
        volume.unit if volume is not None else "",
        box,
        patch,
        {view: plane_of(grid, view) for view in VIEWS},
        tuple(peak for peak in found if peak is not None),
        _frames(bundle.explanation, grid),
    )


def _frames(explanation: Explanation, grid: Geometry) -> tuple[Frame, ...]:
    """The boxes of a detector, the explained one first."""
    region = explanation.target.region
    order = ["RLAPSI".index(letter) // 2 for letter in grid.axcodes]
    made = []
    for n, box in enumerate(() if region is None else region.boxes):
        half = np.array([box.size_mm[axis] for axis in order]) / grid.spacing_mm / 2
        middle = grid.index_ijk(box.centre_ras_mm)
        made.append(Frame(box, np.stack((middle - half, middle + half)), n == 0))
    return tuple(made)


def _inside(scan: _panel.Array, box: _panel.Box) -> _panel.Array:
    """The scan's voxels within a box of edges."""
    first = np.maximum(np.floor(box[0] + 0.5), 0).astype(int)
    stop = np.maximum(np.ceil(box[1] + 0.5).astype(int), first + 1)
    cut: _panel.Array = scan[tuple(slice(a, b) for a, b in zip(first, stop, strict=True))]
    return cut if cut.size else scan


def _peak(heatmap: Heatmap, side: Side) -> Peak | None:
    i, j, k = (int(n) for n in np.unravel_index(heatmap.values.argmax(), heatmap.values.shape))
    density = float(heatmap.values[i, j, k])
    if not (density > 0 and density >= heatmap.floor):
        return None
    right, anterior, superior = heatmap.grid.world_ras((i, j, k)).tolist()
    return Peak(side, (i, j, k), (right, anterior, superior), density)
