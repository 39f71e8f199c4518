"""How do scans and evidence maps become napari layers, the right way round? No Qt, no torch.

Arrays are shown with their axes towards Inferior, Posterior and Left (I, P, L), with positive
scale: the only order in which napari's slices are radiological and its 3D view is not mirrored.
The world of the layers is (-S, P, L) mm. An oblique scan is shown along its own axes, at its true
centre; its true affine stays in the layer's metadata and all read-outs use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from med_gradcam.explanation import Explanation
from med_gradcam.geometry import Geometry, reorient, reorient_array, reorientation
from med_gradcam.maps import Heatmap, Maps, Side
from med_gradcam.paint import OPACITY, RAMPS, window_for
from med_gradcam.volume import Volume

KEY = "med_gradcam"  # our entry in a layer's metadata
AXES = "IPL"
LayerData = tuple[npt.NDArray[Any], dict[str, Any], str]
Floats = npt.NDArray[np.float64]

OBLIQUE_FROM_DEGREES = 1.0
_RAS_TO_SHOWN = np.array([[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
_WORDS: dict[Side, str] = {
    "for": "raises the model's score",
    "against": "lowers the model's score",
    "strength": "map without a sign",
}
_MAX_NAME = 60


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A grid as it is shown: `grid` in I, P, L order, `scale` and `translate` in mm."""

    grid: Geometry
    scale: tuple[float, float, float]
    translate: tuple[float, float, float]

    def point_ras(self, world_mm: npt.ArrayLike) -> Floats:
        """The true RAS+ mm of a point of the layers' world, by the scan's own affine."""
        index = (np.asarray(world_mm, dtype=np.float64) - self.translate) / self.scale
        return self.grid.world_ras(index)

    def point_world(self, index_ipl: npt.ArrayLike) -> Floats:
        """The point of the layers' world of an index into the array as shown."""
        return np.asarray(np.multiply(index_ipl, self.scale) + self.translate, dtype=np.float64)


def shown(grid: Geometry) -> Shown:
    """How a grid is shown."""
    ipl = reorient(grid, reorientation(grid, AXES))
    centre = (np.array(ipl.shape) - 1) / 2
    corner = _RAS_TO_SHOWN @ ipl.world_ras(centre) - centre * ipl.spacing_mm
    i, p, l_ = (float(value) for value in corner)
    return Shown(ipl, ipl.spacing_mm, (i, p, l_))


def oblique_words(grid: Geometry) -> str:
    """What a reader must know about a tilted scan; empty where there is nothing to know."""
    degrees = grid.oblique_degrees
    if not grid.is_orthogonal:
        return (
            f"The slices are sheared (tilted gantry, {degrees:.0f} degrees): the picture is "
            "skewed; the points named here are true."
        )
    if degrees < OBLIQUE_FROM_DEGREES:
        return ""
    return (
        f"Oblique scan ({degrees:.0f} degrees): shown along its own axes, letters name the nearest "
        "direction; the points named here are true."
    )


def _common(grid: Geometry, kind: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords every layer on a grid has."""
    at = shown(grid)
    return {
        "scale": at.scale,
        "translate": at.translate,
        "units": ("mm", "mm", "mm"),
        "axis_labels": tuple(AXES),
        "rgb": False,
        "multiscale": False,
        "metadata": {
            KEY: {
                "kind": kind,
                "axes": AXES,
                "affine_ras": at.grid.affine.tolist(),
                "oblique_degrees": grid.oblique_degrees,
                "orthogonal": grid.is_orthogonal,
                **words,
            }
        },
    }


def short(text: str, most: int = _MAX_NAME) -> str:
    """One line of a text that came from a file, cut to at most so many letters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def scan_layers(volume: Volume) -> list[LayerData]:
    """One grey layer per channel of a scan."""
    how = reorientation(volume.grid, AXES)
    title = f"scan ({volume.modality})" if volume.modality else "scan"
    made: list[LayerData] = []
    for channel, values in enumerate(volume.array):
        window = window_for(volume, values)
        words = {"unit": volume.unit, "modality": volume.modality, "channel": channel}
        keywords = {
            **_common(volume.grid, "scan", words),
            "name": title if volume.array.shape[0] == 1 else f"{title}, channel {channel + 1}",
            "colormap": "gray",
            "contrast_limits": (window.low, window.high),
            "blending": "translucent_no_depth",
            "visible": channel == 0,
        }
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        low, high = float(native.min()), float(native.max())
        keywords["metadata"][KEY]["volume"] = volume
        keywords["metadata"][KEY]["range"] = (min(low, window.low), max(high, window.high))
        made.append((reorient_array(native, how), keywords, "image"))
    return made


def ramp(side: Side) -> dict[str, Any]:
    """Napari's description of a side's colour map: clear at the floor, then as the pictures are."""
    colours = np.array(RAMPS[side], dtype=np.float64) / 255
    return {
        "name": f"med-gradcam {side}",
        "colors": np.column_stack([colours, OPACITY]).tolist(),
        "controls": [0.0, 1.0],
        "interpolation": "linear",
        "low_color": (0.0, 0.0, 0.0, 0.0),
    }


def scale_words(heatmap: Heatmap) -> str:
    """Where the colour scale comes from."""
    if heatmap.scale.of_case:
        return "colours of this scan alone"
    return f"colours of the model ({heatmap.scale.volumes} scans)"


def _map_layer(side: Side, heatmap: Heatmap, explanation: Explanation) -> LayerData:
    how = reorientation(heatmap.grid, AXES)
    words = {
        "words": _WORDS[side],
        "unit": heatmap.unit,
        "scale": scale_words(heatmap),
        "target": explanation.target.label,
        "method": explanation.method,
        "layer": explanation.layer,
        "score": explanation.score,
        "reference_score": explanation.reference_score,
        "relative_to": short(explanation.reference.words),
        "status": explanation.status,
        "model": explanation.provenance.model_name,
        "weights_sha256": explanation.provenance.weights_sha256,
        "input_sha256": list(explanation.provenance.input_sha256),
        "versions": dict(explanation.provenance.versions),
        "utc": explanation.provenance.utc,
        "use": "research use, not for diagnosis",
    }
    keywords = {
        **_common(heatmap.grid, side, words),
        "name": f"{_WORDS[side]}: {short(explanation.target.label)}",
        "colormap": ramp(side),
        "contrast_limits": (min(heatmap.floor, heatmap.peak * (1 - 1e-6)), heatmap.peak),
        "blending": "translucent_no_depth",
        "rendering": "mip",
    }
    return reorient_array(heatmap.values, how), keywords, "image"


def map_layers(explanation: Explanation, maps: Maps) -> list[LayerData]:
    """The layers of evidence against and for (for on top), on one fixed scale.

    A map without a sign is one layer.
    """
    sides = reversed(maps.sides.items())
    return [_map_layer(side, heatmap, explanation) for side, heatmap in sides]


@dataclass(frozen=True, slots=True, eq=False)
class Peak:
    """Where the evidence is strongest: in the layers' world and in RAS+ mm."""

    world_mm: Floats
    ras_mm: Floats


def strongest(maps: Maps) -> Peak | None:
    """The voxel with the most net evidence, or strength; None where nothing reaches the floor."""
    if maps.coloured_share == 0:
        return None
    size, grid = np.abs(maps.signed.values), maps.signed.grid
    at, point = shown(grid), grid.world_ras(np.unravel_index(int(np.argmax(size)), size.shape))
    return Peak(at.point_world(np.round(at.grid.index_ijk(point))), point)
