"""Pictures: maximum projections of the evidence in three views, and an overview page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from med_gradcam import paint
from med_gradcam.bundle import Bundle
from med_gradcam.formats import _canvas, _panel, _words
from med_gradcam.formats._overview import (
    box_key,
    frame_words,
    header_lines,
    overview,
    title_row,
)
from med_gradcam.formats._scene import Scene, scene
from med_gradcam.formats._store import store
from med_gradcam.maps import Side
from med_gradcam.projection import VIEWS, Plane, Projection, View, project, project_scan

TITLE = "PNG pictures: MIP of the evidence for and against in three views, and an overview"
_TITLES: dict[Side, str] = {
    "for": "Evidence for",
    "against": "Evidence against",
    "strength": "Map without a sign, target",
}
_WHAT: dict[Side, str] = {
    "for": f"What {_words.MEANS['for']}",
    "against": f"What {_words.MEANS['against']}",
    "strength": "Where the map is strong",
}

Backdrop = tuple[_panel.Array, paint.Window] | None
_WHOLE, _ZOOM, _GAP, _LEAST = 620, 480, 16, 300
_SEEN_FROM: dict[View, str] = {
    "axial": "axial (seen from the feet)",
    "coronal": "coronal (seen from the front)",
    "sagittal": "sagittal (seen from the patient's left)",
}
# A CT voxel counts as at most and at least this many HU in a mean along the rays.
_CT_LIMITS = (-1000.0, 700.0)
# The mean's window begins at one percentile; the other is drawn at this share of white, so that
# colours stand out.
_BACKDROP_PERCENTILES, _BACKDROP_WHITE = (2.0, 99.7), 0.75


def save(bundle: Bundle, folder: Path) -> list[Path]:
    """Write overview.png and mip_{axial,coronal,sagittal}_{for,against}.png; returns the files.

    A map without a sign has mip_{axial,coronal,sagittal}_strength.png instead.

    Raises:
        UsageError: the scan lies on another grid than the maps.
    """
    ready = scene(bundle)
    written = [store(overview(ready), folder / "overview.png")]
    for view in VIEWS:
        backdrops = _backdrops(ready, ready.planes[view])
        for side, heatmap in ready.sides.items():
            page = mip(ready, project(heatmap, view), side, backdrops)
            written.append(store(page, folder / f"mip_{view}_{side}.png"))
    return written


def mip(
    ready: Scene, projection: Projection, side: Side, backdrops: tuple[Backdrop, Backdrop]
) -> Image.Image:
    """One side's maximum projection over the scan's mean, with a zoomed part for a patch.

    `backdrops`: the scan's mean along whole rays, and within the cells' box.
    """
    panels = _panels(ready, projection, side, backdrops)
    widths = [panel.width for panel in panels]
    legend = _canvas.MARGIN + sum(widths) + _GAP * (len(panels) - 1) + 24
    sheet_width = legend + _canvas.LEGEND_WIDTH
    width = sheet_width - 2 * _canvas.MARGIN
    what = _canvas.wrapped(_what(ready, projection, side), _canvas.NORMAL, width)
    lines = [(line, _canvas.BRIGHT) for line in what] + header_lines(ready.explanation, width)
    notes = _canvas.wrapped("; ".join(_notes(ready)), _canvas.SMALL, width)
    top = _canvas.MARGIN + round(_canvas.TITLE * 1.6)
    body = top + _canvas.paragraph_height(len(lines), _canvas.NORMAL) + 16
    foot = body + panels[0].height + 16
    height = foot + _canvas.paragraph_height(len(notes), _canvas.SMALL) + _canvas.MARGIN - 8
    image = _canvas.sheet(sheet_width, height)
    title_row(image, f"{_TITLES[side]}: {_words.clean(ready.explanation.target.label, 32)}")
    _canvas.write_lines(image, (_canvas.MARGIN, top), lines, _canvas.NORMAL)
    x = _canvas.MARGIN
    for panel in panels:
        image.paste(panel, (x, body))
        x += panel.width + _GAP
    bar = min(300, panels[0].height - 90 - 50 * bool(ready.frames))
    heatmap = ready.sides[side]
    end = _canvas.colour_bar(image, (legend, body), bar, side, heatmap.scale, heatmap.unit)
    box_key(image, (legend, end + 18), ready)
    _canvas.write_lines(image, (_canvas.MARGIN, foot), _canvas.quiet(notes), _canvas.SMALL)
    return image


def _panels(
    ready: Scene, projection: Projection, side: Side, backdrops: tuple[Backdrop, Backdrop]
) -> list[Image.Image]:
    plane = projection.plane
    seen = _panel.seen_box(plane, ready.box)
    height_mm, width_mm = (n * mm for n, mm in zip(plane.shape[:2], plane.pixel_mm, strict=True))
    height = round(min(_WHOLE, max(_LEAST, _WHOLE * height_mm / width_mm)))
    fields = [_panel.whole_field(plane, (height, _WHOLE))]
    zoomed = _panel.zoom_field(plane, seen, (height, min(_ZOOM, height))) if ready.patch else None
    if zoomed is not None:
        fields.append(zoomed)
    panels = []
    for field, backdrop, caption in zip(fields, backdrops, ("whole scan", "zoomed"), strict=False):
        scan, window = backdrop or (None, None)
        layers = _panel.Layers(scan, window, {side: projection.values}, projection.scale)
        panel = _panel.picture(field, layers)
        if ready.patch:
            _panel.outline(panel, field, seen)
        for frame in reversed(ready.frames):
            box = _panel.seen_box(plane, frame.corners)
            _panel.box_frame(panel, field, box, frame_words(frame), bright=frame.explained)
        _panel.finish(panel, field, caption if len(fields) > 1 else "")
        panels.append(panel)
    if ready.peak(side) is None:
        _panel.message(panels[0], ready.nothing(side))
    return panels


def _what(ready: Scene, projection: Projection, side: Side) -> str:
    text = f"{_WHAT[side]}: maximum along the rays, {_SEEN_FROM[projection.view]}."
    peak = ready.peak(side)
    if peak is None:
        return text
    density = _words.tied(f"{_words.number(peak.density)} {ready.maps.signed.unit}")
    return f"{text} Strongest at {peak.words}, {density}."


def _notes(ready: Scene) -> list[str]:
    notes = ready.notes("scan")
    if ready.window is not None:
        notes[1] = "scan in grey: its mean along the same rays"
    return notes


def _backdrops(ready: Scene, plane: Plane) -> tuple[Backdrop, Backdrop]:
    """The scan's mean along whole rays, and within the depth of the cells' box."""
    if ready.scan is None:
        return None, None
    limits = _CT_LIMITS if ready.scan_unit == "HU" else None
    whole = project_scan(ready.scan, plane, limits=limits)
    if not ready.patch:
        return (whole, _stretched(whole)), None
    axis = plane.how.order[2]
    first = int(np.floor(ready.box[0, axis] + 0.5))
    stop = max(first + 1, int(np.ceil(ready.box[1, axis] + 0.5)))
    stop = min(stop, plane.shape[2])
    near = project_scan(ready.scan, plane, slab=(min(first, stop - 1), stop), limits=limits)
    return (whole, _stretched(whole)), (near, _stretched(near))


def _stretched(mean: _panel.Array) -> paint.Window:
    low, high = np.percentile(mean, _BACKDROP_PERCENTILES).tolist()
    width = max((high - low) / _BACKDROP_WHITE, 1e-6)
    return paint.Window(low + width / 2, width, "mean")
