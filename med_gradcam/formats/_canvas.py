"""How are text, colour bars and pictures put on a dark sheet?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from med_gradcam import paint
from med_gradcam.calibration import Calibration
from med_gradcam.formats import _words
from med_gradcam.maps import Side

Colour = tuple[int, int, int]
Line = tuple[str, Colour]
Pixels = tuple[int, int]

GROUND: Colour = (17, 19, 22)
BRIGHT: Colour = (240, 240, 240)
TEXT: Colour = (200, 203, 207)
QUIET: Colour = (142, 147, 153)
WARN: Colour = (240, 228, 66)
MARGIN = 28
LEGEND_WIDTH = 236
LINE_HEIGHT = 1.45
SMALL, NORMAL, TITLE = 14, 16, 28
_BAR_WIDTH, _BAR_GROUND = 22, 40


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable face."""
    return ImageFont.load_default(size)


def _words_at(text: str, size: int) -> tuple[list[tuple[float, str]], float]:
    """Each word with its offset, and the width of the line, pixels.

    Words are set one by one: the face kerns its spaces away ("permL").
    """
    face, gap, offset = font(size), 0.28 * size, 0.0
    placed: list[tuple[float, str]] = []
    for word in text.split():
        placed.append((offset, word))
        offset += face.getlength(word) + gap
    return placed, max(0.0, offset - gap)


def width_of(text: str, size: int) -> float:
    """Width of a line, pixels."""
    return _words_at(text, size)[1]


def fitted(text: str, sizes: Sequence[int], width: float) -> tuple[str, int]:
    """The text at the largest of the sizes (descending) at which it fits, else cut at the last."""
    for size in sizes:
        if width_of(text, size) <= width:
            return text, size
    cut = text
    while cut and width_of(f"{cut}...", sizes[-1]) > width:
        cut = cut[:-1].rstrip()
    return f"{cut}...", sizes[-1]


def wrapped(text: str, size: int, width: float) -> list[str]:
    """The lines into which words fall within a width in pixels; an over-long word is cut.

    Words tied by a no-break space stay on one line.
    """
    lines: list[str] = []
    for word in text.split(" "):
        whole = word
        while width_of(whole, size) > width and len(whole) > 1:
            whole = whole[:-1]
        if lines and width_of(f"{lines[-1]} {whole}", size) <= width:
            lines[-1] += f" {whole}"
        else:
            lines.append(whole)
    return lines


def sheet(width: int, height: int) -> Image.Image:
    """An empty dark sheet."""
    return Image.new("RGB", (width, height), GROUND)


def write(
    image: Image.Image, at: Pixels, text: str, size: int = NORMAL, colour: Colour = TEXT
) -> None:
    """One line of text with its upper left corner at a pixel."""
    draw = ImageDraw.Draw(image)
    for offset, word in _words_at(text, size)[0]:
        draw.text((at[0] + offset, at[1]), word, fill=colour, font=font(size))


def write_over(
    image: Image.Image, at: tuple[float, float], text: str, size: int, anchor: str
) -> None:
    """Text on a picture: light, with a dark edge, so that it reads on any ground.

    `anchor` is Pillow's: left, middle or right, then ascender, middle or baseline.
    """
    placed, width = _words_at(text, size)
    left = at[0] - width * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]]
    draw = ImageDraw.Draw(image)
    for offset, word in placed:
        draw.text(
            (left + offset, at[1]),
            word,
            fill=BRIGHT,
            font=font(size),
            anchor=f"l{anchor[1]}",
            stroke_width=2,
            stroke_fill=(0, 0, 0),
        )


def quiet(lines: Sequence[str]) -> list[Line]:
    """Lines in the colour of notes."""
    return [(line, QUIET) for line in lines]


def paragraph_height(count: int, size: int) -> int:
    """Height of some lines, pixels."""
    return round(count * size * LINE_HEIGHT)


def write_lines(image: Image.Image, at: Pixels, lines: Sequence[Line], size: int) -> int:
    """Some lines below each other; returns where the next one would begin, pixels from the top."""
    for number, (line, colour) in enumerate(lines):
        write(image, (at[0], at[1] + round(number * size * LINE_HEIGHT)), line, size, colour)
    return at[1] + paragraph_height(len(lines), size)


def colour_bar(
    image: Image.Image, at: Pixels, height: int, side: Side, scale: Calibration, unit: str
) -> int:
    """One side's bar with peak, floor and zero, its words and unit; returns its lower end."""
    x, y = at
    width = LEGEND_WIDTH - MARGIN
    title = [(line, BRIGHT) for line in wrapped(_words.MEANS[side], NORMAL, width)]
    y = write_lines(image, (x, y), title, NORMAL)
    y = write_lines(image, (x, y), quiet([unit]), SMALL) + 8
    values = np.linspace(scale.peak_per_ml, 0, height, dtype=np.float32)[:, None]
    values = np.repeat(values, _BAR_WIDTH, axis=1)
    backdrop = np.full(values.shape, _BAR_GROUND, dtype=np.uint8)
    image.paste(Image.fromarray(paint.blend(backdrop, {side: values}, scale)), (x, y))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x - 1, y - 1, x + _BAR_WIDTH, y + height), outline=QUIET)
    for value, words in _ticks(scale):
        tick = y + round((1 - value / scale.peak_per_ml) * (height - 1))
        draw.line((x + _BAR_WIDTH + 1, tick, x + _BAR_WIDTH + 6, tick), fill=QUIET)
        write(image, (x + _BAR_WIDTH + 11, tick - SMALL // 2 - 2), words, SMALL)
    return y + height


def _ticks(scale: Calibration) -> list[tuple[float, str]]:
    """Values on a colour bar, none so near another that their numbers touch."""
    peak, floor = scale.peak_per_ml, scale.floor_per_ml
    top = _words.number(peak)
    ticks = [(peak, top if scale.of_case else f"{top} and more")]
    if floor > peak * 0.03:
        ticks.append((floor, f"{_words.number(floor)}, floor"))
    if floor > peak * 0.15 or floor <= peak * 0.03:
        ticks.append((0.0, "0"))
    middle = (peak + floor) / 2
    if floor < peak * 0.7:
        ticks.append((middle, _words.number(middle)))
    return ticks


def scale_bar(image: Image.Image, mm_per_pixel: float) -> None:
    """A bar of a round length in mm at the lower left of a picture, a fifth to a half as wide."""
    width, height = image.size
    room_mm = 0.34 * width * mm_per_pixel
    lengths = [n * 10.0**p for p in range(-2, 4) for n in (1, 2, 5)]
    length_mm = max((mm for mm in lengths if mm <= room_mm), default=lengths[0])
    x, y, long = 12, height - 14, round(length_mm / mm_per_pixel)
    draw = ImageDraw.Draw(image)
    draw.rectangle((x - 1, y - 2, x + long + 1, y + 3), fill=(0, 0, 0))
    draw.rectangle((x, y - 1, x + long, y + 2), fill=BRIGHT)
    write_over(image, (x, y - 6), f"{length_mm:g} mm", SMALL, "ls")
