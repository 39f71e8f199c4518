"""How does the picture say which side is which: letters at its edges, a legend, a mirror alarm?

The letters follow from the axes that are shown and from how the camera shows them; the user can
flip both in napari's preferences, so nothing here is taken for granted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from napari.components.overlays import TextOverlay

from med_gradcam.maps import Side
from med_gradcam.volume import Volume
from napari_plugin.layers import AXES, KEY

if TYPE_CHECKING:
    import napari.viewer

_OPPOSITE = dict(zip("IPLSAR", "SARIPL", strict=True))
_PLACES = {
    "top": "top_center",
    "bottom": "bottom_center",
    "left": "middle_left",
    "right": "middle_right",
}
_LINE = 40  # letters of the legend's longest line
_PREFIX = "med_gradcam_"
MIRRORED = (
    "The picture is flipped by napari's camera settings: left and right may be exchanged. "
    "See Preferences, axis orientation."
)
NOT_FOR_DIAGNOSIS = "research use, not for diagnosis"


def letters(displayed: Sequence[int], vertical: str, horizontal: str) -> dict[str, str]:
    """Edge of the picture -> letter, for two displayed axes (0 I, 1 P, 2 L), first one vertical.

    `vertical` is up or down and `horizontal` left or right: where larger indices are drawn.
    """
    down, right = (AXES[axis] for axis in displayed)
    if vertical == "up":
        down = _OPPOSITE[down]
    if horizontal == "left":
        right = _OPPOSITE[right]
    return {"top": _OPPOSITE[down], "bottom": down, "left": _OPPOSITE[right], "right": right}


def is_mirrored(ndisplay: int, vertical: str, horizontal: str, handedness: str) -> bool:
    """Whether the camera shows the world other than napari does by default."""
    return (vertical, horizontal) != ("down", "right") or (ndisplay == 3 and handedness != "right")


def ours(layer: Any) -> dict[str, Any]:
    """Our entry in a layer's metadata; empty for the layers of others."""
    entry = layer.metadata.get(KEY)
    return entry if isinstance(entry, dict) else {}


def scan_of(layer: Any) -> Volume | None:
    """The scan a layer of ours shows; None for maps and for the layers of others."""
    volume = ours(layer).get("volume")
    return volume if isinstance(volume, Volume) else None


def legend(entries: Sequence[dict[str, Any]]) -> str:
    """What the colours mean, by the newest map among our layers' entries; empty without a map."""
    newest = next((e for e in reversed(entries) if e["kind"] in get_args(Side)), None)
    if newest is None:
        return ""
    meaning = (
        ("purple: where the map is strong, no sign", newest["unit"])
        if newest["kind"] == "strength"
        else ("orange raises the model's score,", f"blue lowers it ({newest['unit']})")
    )
    lines = (
        *meaning,
        f"relative to {newest['relative_to']}",
        newest["scale"],
        NOT_FOR_DIAGNOSIS,
    )
    return "\n".join(textwrap.shorten(line, _LINE, placeholder=" …") for line in lines)


class Signs:
    """The letters and the legend on one viewer's canvas, right whatever axes and camera show."""

    def __init__(self, viewer: napari.viewer.Viewer) -> None:
        self._viewer = viewer
        self._events = (
            viewer.dims.events.order,
            viewer.dims.events.ndisplay,
            viewer.scene.camera.events.orientation,
            viewer.layers.events.inserted,
            viewer.layers.events.removed,
        )
        for event in self._events:
            event.connect(self.refresh)
        self.refresh()

    @property
    def mirrored(self) -> bool:
        """Whether the picture shown now is flipped."""
        camera = self._viewer.scene.camera
        vertical, horizontal = (str(way) for way in camera.orientation2d)
        return is_mirrored(self._viewer.dims.ndisplay, vertical, horizontal, str(camera.handedness))

    def refresh(self, _event: object = None) -> None:
        """Write the letters and the legend for what is shown now."""
        entries = [entry for entry in map(ours, self._viewer.layers) if entry]
        edges = self._edges() if entries else {}
        for edge, place in _PLACES.items():
            self._write(edge, place, edges.get(edge, ""), 16)
        self._write("legend", "bottom_left", legend(entries), 8)

    def remove(self) -> None:
        """Take everything off the canvas."""
        for event in self._events:
            event.disconnect(self.refresh)
        overlays = self._viewer.canvas.overlays
        for name in [n for n in overlays if n.startswith(_PREFIX)]:
            overlays[name].visible = False

    def _edges(self) -> dict[str, str]:
        dims = self._viewer.dims
        if dims.ndisplay != 2 or dims.ndim < len(AXES):
            return {}
        displayed = [axis - (dims.ndim - len(AXES)) for axis in dims.displayed]
        vertical, horizontal = (str(way) for way in self._viewer.scene.camera.orientation2d)
        return letters(displayed, vertical, horizontal) if min(displayed) >= 0 else {}

    def _write(self, name: str, place: str, text: str, size: float) -> None:
        overlays = self._viewer.canvas.overlays
        key = _PREFIX + name
        if key not in overlays:
            if not text:
                return
            overlays[key] = TextOverlay(text=text, position=place, font_size=size, visible=True)
        overlays[key].text = text
        overlays[key].visible = bool(text)
