"""How does one page show the scan, the evidence for and against, and what they are relative to?"""

from __future__ import annotations

from PIL import Image, ImageDraw

from med_gradcam.explanation import Explanation
from med_gradcam.formats import _canvas, _panel, _words
from med_gradcam.formats._scene import Frame, Peak, Scene
from med_gradcam.geometry import point_words
from med_gradcam.maps import Side
from med_gradcam.projection import VIEWS, View, slice_scan

_PANEL, _GAP, _HEADING = 432, 14, 34
_BAR = 300
_BAR_TOP = 56
_ACROSS = 3 * _PANEL + 2 * _GAP
_WIDTH = _canvas.MARGIN + _ACROSS + 24 + _canvas.LEGEND_WIDTH
_STRONGEST: dict[Side, str] = {
    "for": "Where it most raises the model's score",
    "against": "Where it most lowers the model's score",
    "strength": "Where the map is strongest",
}


def overview(scene: Scene) -> Image.Image:
    """One row of three views through the strongest place of each side above the floor."""
    width = _WIDTH - 2 * _canvas.MARGIN
    header = header_lines(scene.explanation, width)
    notes = _canvas.wrapped("; ".join(scene.notes("scan")), _canvas.SMALL, width)
    rows = max(1, len(scene.peaks))
    top = _canvas.MARGIN + round(_canvas.TITLE * 1.6)
    body = top + _canvas.paragraph_height(len(header), _canvas.NORMAL) + 12
    foot = body + rows * (_HEADING + _PANEL + _GAP) + 6
    height = foot + _canvas.paragraph_height(len(notes), _canvas.SMALL) + _canvas.MARGIN - 8
    image = _canvas.sheet(_WIDTH, height)
    label = _words.clean(scene.explanation.target.label)
    signed = scene.maps.has_sign
    title_row(image, f"Target: {label}" if signed else f"Map without a sign, target: {label}")
    x = _canvas.MARGIN
    _canvas.write_lines(image, (x, top), header, _canvas.NORMAL)
    peaks: tuple[Peak | None, ...] = scene.peaks or (None,)
    for number, peak in enumerate(peaks):
        _row(image, body + number * (_HEADING + _PANEL + _GAP), scene, peak)
    legend = (x + _ACROSS + 24, body + _HEADING - 4)
    room = rows * (_HEADING + _PANEL + _GAP) - _HEADING
    _legend(image, legend, room, scene)
    _canvas.write_lines(image, (x, foot), _canvas.quiet(notes), _canvas.SMALL)
    return image


def title_row(image: Image.Image, title: str) -> None:
    """The title at the upper left, the words on research use at the upper right."""
    margin, research = _canvas.MARGIN, _words.RESEARCH_USE
    right = image.width - margin - round(_canvas.width_of(research, _canvas.NORMAL))
    _canvas.write(image, (right, margin + 7), research, _canvas.NORMAL, _canvas.WARN)
    words, size = _canvas.fitted(title, (_canvas.TITLE, 24, 20), right - 2 * margin)
    _canvas.write(image, (margin, margin - 4), words, size, _canvas.BRIGHT)


def header_lines(explanation: Explanation, width: float) -> list[_canvas.Line]:
    """Score, reference, ledger, method, resolution and warnings, wrapped to a width in pixels."""
    doubtful = explanation.status in ("not_converged", "not_a_cut")
    plain, warn = _canvas.TEXT, _canvas.WARN
    sentences = [
        (f"{_words.score(explanation)}; {_words.relative(explanation)}.", plain),
        (f"{_words.sums(explanation)}.", plain),
        (f"{_words.status(explanation)}.", warn if doubtful else plain),
        (f"{_words.method(explanation)}: {_words.cells(explanation)}.", plain),
    ]
    sentences += [(f"Warning: {_words.clean(w, 180)}", warn) for w in explanation.warnings[:2]]
    return [
        (line, colour)
        for sentence, colour in sentences
        for line in _canvas.wrapped(sentence, _canvas.NORMAL, width)
    ]


def _row(image: Image.Image, top: int, scene: Scene, peak: Peak | None) -> None:
    index: tuple[float, float, float]
    if peak is None:
        i, j, k = scene.box.mean(axis=0).round().tolist()
        index = (i, j, k)
        words = scene.nothing()
        words = f"{words[0].upper()}{words[1:]}; shown: {point_words(_ras(scene, index))}"
    else:
        index = peak.index_ijk
        unit = scene.maps.signed.unit
        words = f"{_STRONGEST[peak.side]}: {peak.words}, {_words.number(peak.density)} {unit}"
    _canvas.write(image, (_canvas.MARGIN, top + 6), words, 18, _canvas.BRIGHT)
    for number, view in enumerate(VIEWS):
        panel = _view(scene, view, index, pointed=peak is not None)
        image.paste(panel, (_canvas.MARGIN + number * (_PANEL + _GAP), top + _HEADING))


def _ras(scene: Scene, index: tuple[float, float, float]) -> tuple[float, float, float]:
    r, a, s = scene.grid.world_ras(index).tolist()
    return r, a, s


def _view(
    scene: Scene, view: View, index: tuple[float, float, float], *, pointed: bool
) -> Image.Image:
    """One panel: the layer through a voxel, zoomed to the box where that helps."""
    plane = scene.planes[view]
    row, column, depth = plane.row_column_depth(index).tolist()
    at, room = round(depth), (_PANEL, _PANEL)
    layers = _panel.Layers(
        None if scene.scan is None else slice_scan(scene.scan, plane, at),
        scene.window,
        {side: slice_scan(shown.values, plane, at) for side, shown in scene.sides.items()},
        scene.maps.signed.scale,
    )
    seen = _panel.seen_box(plane, scene.box)
    zoomed = _panel.zoom_field(plane, seen, room) if scene.patch else None
    field = zoomed or _panel.whole_field(plane, room)
    panel = _panel.picture(field, layers)
    if scene.patch:
        _panel.outline(panel, field, seen)
    for frame in reversed(scene.frames):  # the explained one last, on top
        box = _panel.seen_box(plane, frame.corners)
        if box[0, 2] - 0.5 <= at <= box[1, 2] + 0.5:
            _panel.box_frame(panel, field, box, frame_words(frame), bright=frame.explained)
    if pointed:
        _panel.reticle(panel, field.pixel(row, column))
    _panel.finish(panel, field, view)
    if zoomed is not None:
        _panel.inset(panel, field, layers)
    if not pointed:
        _panel.message(panel, scene.nothing())
    return panel


def frame_words(frame: Frame) -> str:
    """The number of a box; nothing for one that the detector did not keep."""
    return str(frame.box.number) if frame.box.number else ""


def _legend(image: Image.Image, at: tuple[int, int], room: int, scene: Scene) -> None:
    """The colour bars, one below the other."""
    x, y = at
    scale, unit = scene.maps.signed.scale, scene.maps.signed.unit
    height = min(_BAR, room // len(scene.sides) - _BAR_TOP - 40 - 30 * bool(scene.frames))
    for side in scene.sides:
        y = _canvas.colour_bar(image, (x, y), height, side, scale, unit) + 26
    width = _canvas.LEGEND_WIDTH - _canvas.MARGIN
    missing = [
        scene.nothing(side) for side in scene.sides if scene.peaks and scene.peak(side) is None
    ]
    for words in missing:
        lines = _canvas.wrapped(words, _canvas.SMALL, width)
        y = _canvas.write_lines(image, (x, y), _canvas.quiet(lines), _canvas.SMALL)
    box_key(image, (x, y), scene)


def box_key(image: Image.Image, at: tuple[int, int], scene: Scene) -> int:
    """What the green frames are, with a sample of each; returns the lower end."""
    x, y = at
    keys = [("the explained box", _panel.BOX), ("the detector's others", _panel.BOX_OTHER)]
    for words, colour in keys[: len(scene.frames)]:
        ImageDraw.Draw(image).rectangle((x, y + 3, x + 16, y + 15), outline=colour)
        _canvas.write(image, (x + 24, y + 1), words, _canvas.SMALL)
        y += 22
    return y
