"""How do the time points of a series look side by side, at one place and on one scale?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from med_gradcam import paint
from med_gradcam.bundle import Bundle
from med_gradcam.formats import _canvas, _panel, _words
from med_gradcam.formats._overview import title_row
from med_gradcam.formats._scene import Scene, scene
from med_gradcam.formats._store import store
from med_gradcam.projection import View, slice_scan

_PANEL, _GAP, _HEADING, _ACROSS = 330, 12, 30, 4
_VIEW: View = "axial"


def save(bundles: Sequence[Bundle | None], path: Path) -> Path:
    """Write one axial slice per time point, through the strongest place of all."""
    return store(strip([None if one is None else scene(one) for one in bundles]), path)


def strip(scenes: Sequence[Scene | None]) -> Image.Image:
    """One panel per time point, at least one of which has a map; scans in one grey window."""
    window = _one_window([one.window for one in scenes if one is not None])
    made = [None if one is None else replace(one, window=window) for one in scenes]
    first = max((one for one in made if one is not None), key=_strongest)
    return _sheet(made, first)


def _strongest(one: Scene) -> float:
    return max((peak.density for peak in one.peaks), default=0.0)


def _one_window(windows: Sequence[paint.Window | None]) -> paint.Window | None:
    """A window that shows what any of these shows."""
    known = [w for w in windows if w is not None]
    if not known:
        return None
    low, high = min(w.low for w in known), max(w.high for w in known)
    return paint.Window((low + high) / 2, high - low, "common")


def _sheet(scenes: Sequence[Scene | None], first: Scene) -> Image.Image:
    middle = tuple(float(n) for n in first.box.mean(axis=0).round())
    best = max(first.peaks, key=lambda peak: peak.density, default=None)
    index = middle if best is None else best.index_ijk
    row, column, depth = first.planes[_VIEW].row_column_depth(index).tolist()
    across = min(_ACROSS, len(scenes))
    down = -(-len(scenes) // across)
    width = _canvas.MARGIN + across * (_PANEL + _GAP) + 12 + _canvas.LEGEND_WIDTH
    number = next(n for n, one in enumerate(scenes, 1) if one is first)
    lines = _words_of(first, index, number, width - 2 * _canvas.MARGIN)
    top = _canvas.MARGIN + round(_canvas.TITLE * 1.6)
    body = top + _canvas.paragraph_height(len(lines), _canvas.NORMAL) + 12
    needed = len(first.sides) * 250
    height = body + max(down * (_HEADING + _PANEL + _GAP), needed) + _canvas.MARGIN
    image = _canvas.sheet(width, height)
    title_row(image, f"Time points: {_words.clean(first.explanation.target.label, 40)}")
    _canvas.write_lines(image, (_canvas.MARGIN, top), lines, _canvas.NORMAL)
    for n, one in enumerate(scenes):
        x = _canvas.MARGIN + (n % across) * (_PANEL + _GAP)
        y = body + (n // across) * (_HEADING + _PANEL + _GAP)
        _canvas.write(image, (x, y + 4), _heading(one, n), _canvas.NORMAL, _canvas.BRIGHT)
        panel = _panel_of(one or first, round(depth), empty=one is None)
        _panel.reticle(
            panel, _panel.whole_field(first.planes[_VIEW], panel.size).pixel(row, column)
        )
        image.paste(panel, (x, y + _HEADING))
    x, y = _canvas.MARGIN + across * (_PANEL + _GAP) + 12, body + _HEADING - 4
    scale = first.maps.signed.scale
    for side in first.sides:
        y = _canvas.colour_bar(image, (x, y), 150, side, scale, first.maps.signed.unit) + 22
    return image


def _words_of(
    first: Scene, index: tuple[float, ...], number: int, width: float
) -> list[_canvas.Line]:
    from med_gradcam.geometry import point_words

    e = first.explanation
    where = point_words(first.grid.world_ras(index))
    text = (
        f"Axial slice through the strongest place of all ({where}, time point {number}); "
        f"{_words.method(e)}; each time point relative to a reference of its own "
        f"({_words.clean(e.reference.kind)}); {_words.scale(first.maps.signed.scale)}."
    )
    return [(line, _canvas.TEXT) for line in _canvas.wrapped(text, _canvas.NORMAL, width)]


def _heading(one: Scene | None, n: int) -> str:
    if one is None:
        return f"{n + 1}: nothing to explain"
    e = one.explanation
    against = "" if e.reference_score is None else f", reference {_words.number(e.reference_score)}"
    return f"{n + 1}: score {_words.number(e.score)}{against}"


def _panel_of(one: Scene, depth: int, *, empty: bool) -> Image.Image:
    plane = one.planes[_VIEW]
    field = _panel.whole_field(plane, (_PANEL, _PANEL))
    shown = {} if empty else one.sides
    layers = _panel.Layers(
        None if one.scan is None or empty else slice_scan(one.scan, plane, depth),
        one.window,
        {side: slice_scan(h.values, plane, depth) for side, h in shown.items()},
        one.maps.signed.scale,
    )
    panel = _panel.picture(field, layers)
    _panel.finish(panel, field, "")
    if empty:
        _panel.message(panel, "no map at this time point")
    return panel
