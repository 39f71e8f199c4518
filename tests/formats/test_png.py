"""Do the pictures show the right side, honest colours and words, and nothing about the patient?"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from med_gradcam.bundle import Bundle
from med_gradcam.calibration import Calibration
from med_gradcam.errors import UsageError
from med_gradcam.explanation import Cells, Explanation, Reference
from med_gradcam.formats import _canvas, _panel, _words, png
from med_gradcam.formats._overview import overview
from med_gradcam.formats._scene import scene
from med_gradcam.geometry import Geometry, cells, reorient, reorient_array, reorientation
from med_gradcam.maps import draw
from med_gradcam.projection import VIEWS, plane_of, project
from med_gradcam.provenance import Provenance, Source
from med_gradcam.target import Target
from med_gradcam.volume import Volume

NAMES = {"overview.png"} | {
    f"mip_{view}_{side}.png" for view in VIEWS for side in ("for", "against")
}
# A scan in RAS, 48 x 48 x 40 voxels of 4 x 4 x 5 mm, the middle of the body at 0 mm.
GRID = Geometry(
    (48, 48, 40), np.array([[4.0, 0, 0, -94], [0, 4, 0, -94], [0, 0, 5, -100], [0, 0, 0, 1]])
)
RIGHT_LESION, LEFT_RIM = (60.0, 20.0, 30.0), (-60.0, -20.0, -30.0)
NODULE = Target("class", "nodule", (1,), "softmax")
FIXED = Calibration("nodule", "integrated", "block4", 2.0, 0.4, 12)


def body() -> npt.NDArray[np.int16]:
    x, y, z = np.moveaxis(GRID.world_ras(np.moveaxis(np.indices(GRID.shape), 0, -1)), -1, 0)
    array = np.full(GRID.shape, -1000, dtype=np.int16)
    array[(x / 85) ** 2 + (y / 70) ** 2 < 1] = 40
    array[((abs(x) - 40) / 30) ** 2 + (y / 45) ** 2 < 1] = -850
    array[abs(z) > 90] = 40
    return array


def explanation(image: Geometry = GRID, amount: float = 1.0, **changes: Any) -> Explanation:
    """Cells of 8 voxels over the whole scan: for at the right lesion, against at the left rim."""
    shape = tuple(n // 8 for n in image.shape)
    grid = cells(image, (8, 8, 8), (3.5, 3.5, 3.5), shape)
    evidence = np.zeros(shape, dtype=np.float32)
    for place, value in ((RIGHT_LESION, 60.0 * amount), (LEFT_RIM, -25.0 * amount)):
        i, j, k = grid.index_ijk(place).round().astype(int).tolist()
        evidence[i, j, k] = value
    made = Explanation(
        evidence=evidence,
        grid=grid,
        image=image,
        score=-4.6 + float(evidence.sum()),
        reference_score=-4.6,
        target=NODULE,
        method="integrated",
        layer="block4",
        reference=Reference("tissue", -850.0, "uniform lung (-850 HU)"),
        cells=Cells((8, 8, 8), (3.5, 3.5, 3.5), (40, 40, 40), "exact"),
        status="complete",
        cost_in_forwards=9.0,
        provenance=Provenance({}, {}, ("00",), "00", "net"),
        calibration=FIXED,
    )
    return made.replace(**changes)


def bundle(made: Explanation, *, with_scan: bool = True, **scan: Any) -> Bundle:
    how = reorientation(GRID, made.image.axcodes)
    array = np.ascontiguousarray(reorient_array(body(), how))
    volume = Volume(array[None], made.image, "CT", "HU", **scan)
    return Bundle(made, draw(made), volume if with_scan else None)


def tinted(picture: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Where a picture is orange, and where it is blue."""
    red, blue = picture[..., 0].astype(int), picture[..., 2].astype(int)
    return red - blue > 25, blue - red > 25


def panel(made: Explanation, view: str) -> tuple[npt.NDArray[np.uint8], _panel.Field]:
    ready = scene(bundle(made))
    plane = plane_of(made.image, view)
    field = _panel.whole_field(plane, (400, 400))
    sides = {side: project(heatmap, view).values for side, heatmap in ready.sides.items()}
    layers = _panel.Layers(None, None, sides, ready.maps.signed.scale)
    return np.asarray(_panel.picture(field, layers)), field


def test_saves_seven_pictures_that_hold_pixels_and_nothing_else(tmp_path: Path) -> None:
    written = png.save(bundle(explanation()), tmp_path)
    assert {path.name for path in written} == NAMES == {p.name for p in tmp_path.iterdir()}
    for path in written:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert image.info == {}
            assert image.width >= 600


def test_the_right_side_is_on_the_left_of_axial_and_coronal_pictures_in_every_orientation() -> None:
    for order, flips in itertools.product(
        itertools.permutations("RAS"), itertools.product((False, True), repeat=3)
    ):
        opposite = {"R": "L", "A": "P", "S": "I"}
        axes = "".join(opposite[c] if flip else c for c, flip in zip(order, flips, strict=True))
        made = explanation(reorient(GRID, reorientation(GRID, axes)))
        for view in VIEWS:
            orange, blue = tinted(panel(made, view)[0])
            (y, x), (v, u) = (np.argwhere(m).mean(axis=0) - 200 for m in (orange, blue))
            # Lesion: right, anterior, superior. Rim: left, posterior, inferior.
            assert x < -20 < 20 < u, (axes, view)
            assert y < -10 < 10 < v, (axes, view)


def test_the_picture_is_true_to_the_millimetre() -> None:
    for view, rows, columns in (("axial", 1, 0), ("coronal", 2, 0), ("sagittal", 2, 1)):
        made = explanation()
        picture, field = panel(made, view)
        place = made.grid.world_ras(made.grid.index_ijk(RIGHT_LESION).round())
        y, x = np.argwhere(tinted(picture)[0]).mean(axis=0)
        centre = GRID.world_ras((np.array(GRID.shape) - 1) / 2)
        mm = field.mm_per_pixel
        expected = (centre - place)[[rows, columns]] / mm + 199.5
        np.testing.assert_allclose((y, x), expected, atol=2.0 / mm)
        row, column, _ = field.plane.row_column_depth(GRID.index_ijk(place))
        np.testing.assert_allclose(field.pixel(row, column), expected[::-1], atol=1e-6)


def test_the_overview_shows_orange_and_blue_on_their_sides() -> None:
    picture = np.asarray(overview(scene(bundle(explanation()))))
    orange, blue = tinted(picture)
    top = picture.shape[0] // 2
    # First row, first panel: the axial layer through the lesion in the patient's right lung.
    ys, xs = np.nonzero(orange[:top, _canvas.MARGIN : _canvas.MARGIN + 432])
    assert xs.mean() < 216
    ys, xs = np.nonzero(blue[top:, _canvas.MARGIN : _canvas.MARGIN + 432])
    assert ys.size > 100
    assert xs.mean() > 216


def test_a_fixed_scale_gives_one_colour_for_one_density_in_two_cases() -> None:
    one = panel(explanation(), "axial")[0]
    grid = explanation().grid
    evidence = explanation().evidence.copy()
    evidence[tuple(grid.index_ijk((0.0, -60.0, 0.0)).round().astype(int))] = 900.0
    other = panel(explanation(evidence=evidence), "axial")[0]
    orange = tinted(one)[0]
    here = orange & (np.arange(400)[:, None] < 190) & (np.arange(400) < 190)
    assert here.sum() > 200
    np.testing.assert_array_equal(one[here], other[here])


def test_nothing_above_the_floor_stays_grey_and_says_so(
    written_words: list[str],
) -> None:
    ready = scene(bundle(explanation(amount=0.01)))
    assert ready.peaks == ()
    picture = np.asarray(overview(ready))
    orange, blue = tinted(picture[150:, : _canvas.MARGIN + 3 * 432 + 28])
    assert not orange.any()
    assert not blue.any()
    assert any("no evidence above the model's noise floor" in w for w in written_words)


@pytest.fixture
def written_words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text as it is put on a sheet."""
    texts: list[str] = []
    for name in ("write", "write_over"):
        inner = getattr(_canvas, name)

        def spy(image: Image.Image, at: Any, text: str, *rest: Any, inner: Any = inner) -> None:
            texts.append(text)
            inner(image, at, text, *rest)

        monkeypatch.setattr(_canvas, name, spy)
    return texts


def said(texts: list[str]) -> str:
    return " ".join(texts).replace("\u00a0", " ")


def test_the_overview_says_what_a_reader_needs(written_words: list[str]) -> None:
    overview(scene(bundle(explanation())))
    words = said(written_words)
    for wanted in (
        "Target: nodule",
        "Model score 30.4 log-odds (probability above 0.9999)",
        "relative to uniform lung (-850 HU), model score there -4.60 log-odds (probability 0.010)",
        "Evidence for 60.0, against 25.0, net 35.0 of a score difference of 35.0 log-odds",
        "The map adds up to the score's difference from the reference",
        "Method integrated at layer block4",
        "cells 32.0 x 32.0 x 40.0 mm (exact positions), each sees 160 x 160 x 200 mm",
        "smallest localisable finding 80 mm",
        "raises the model's score",
        "lowers the model's score",
        "log-odds per mL",
        "colour scale: fixed for this model (learnt from 12 scans)",
        "lung window (-1350 to 150 HU)",
        "(patient's right)",
        "(patient's left)",
        "Research use. Not for diagnostic use.",
    ):
        assert wanted in words, wanted
    for letter in "RLAPSI":
        assert letter in written_words


def test_an_uncalibrated_model_is_named_as_such(written_words: list[str]) -> None:
    overview(scene(bundle(explanation(calibration=None))))
    assert "colour scale: this case only (model not calibrated)" in said(written_words)


def test_a_regression_has_its_own_unit_and_no_probability(written_words: list[str]) -> None:
    score = Target("regression", "age", (0,), "none")
    made = explanation(target=score, status="no_sum", reference_score=None, calibration=None)
    overview(scene(bundle(made)))
    words = said(written_words)
    assert "score per mL" in words
    assert "probability" not in words
    assert "log-odds" not in words
    assert "not relative to a reference" in words


def test_a_map_without_log_odds_does_not_claim_them(written_words: list[str]) -> None:
    made = explanation(
        measure="relative units", status="no_sum", reference_score=None, calibration=None
    )
    overview(scene(bundle(made)))
    words = said(written_words)
    assert "Model score 30.4 log-odds" in words  # the score has them
    assert words.count("log-odds") == 1
    assert "Evidence for 60.0, against 25.0, net 35.0 relative units" in words
    assert "relative units per mL" in words


def test_trouble_is_told(written_words: list[str]) -> None:
    made = explanation(status="not_a_cut", bypassed=0.21, warnings=("something is odd",))
    overview(scene(bundle(made)))
    words = said(written_words)
    assert "flows past this layer or has no place: it is not in the map (21%)" in words
    assert "Warning: something is odd" in words


def test_labels_from_files_are_tamed(written_words: list[str], tmp_path: Path) -> None:
    label = "no\x1b[31mdule\n\t\u202eb\u00f6se " + "very " * 60 + "long"
    made = explanation(target=Target("class", label, (1,), "softmax"), layer="x" * 400)
    png.save(bundle(made), tmp_path)
    assert all(text.replace("\u00a0", " ").isascii() for text in written_words)
    assert all(text.isprintable() or "\u00a0" in text for text in written_words)
    assert max(len(text) for text in written_words) < 260
    assert {path.name for path in tmp_path.iterdir()} == NAMES


def test_nothing_of_the_source_reaches_a_picture(written_words: list[str], tmp_path: Path) -> None:
    secret = "Quixote^Dulcinea"
    source = Source("nifti", "", paths=(f"/data/{secret}.nii",), notes=(secret,))
    png.save(bundle(explanation(), source=source), tmp_path)
    assert secret not in said(written_words)
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "case", ["plain", "long", "empty", "one side", "patch", "no scan", "no sign"]
)
def test_no_text_overlaps_another_or_leaves_the_sheet(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = {
        "plain": explanation(),
        "long": explanation(
            target=Target("class", "WIDE " * 12, (1,), "softmax"),
            warnings=("w " * 90, "v" * 200),
            status="not_a_cut",
            bypassed=0.5,
            calibration=None,
        ),
        "empty": explanation(amount=0.01),
        "one side": explanation(evidence=np.maximum(explanation().evidence, 0)),
        "patch": patch(),
        "no scan": explanation(),
        "no sign": bare(),
    }[case]
    boxes: dict[int, list[tuple[float, float, float, float, str]]] = {}
    sheets: list[Image.Image] = []
    inner = _canvas.write

    def spy(image: Image.Image, at: tuple[int, int], text: str, *rest: Any) -> None:
        size = rest[0] if rest else _canvas.NORMAL
        sheets.append(image)
        end = at[0] + _canvas.width_of(text, size)
        boxes.setdefault(id(image), []).append((at[0], at[1] + 3, end, at[1] + size, text))
        inner(image, at, text, *rest)

    monkeypatch.setattr(_canvas, "write", spy)
    png.save(bundle(made, with_scan=case != "no scan"), tmp_path)
    sizes = {id(image): image.size for image in sheets}
    assert len(boxes) == (4 if case == "no sign" else 7)
    for sheet, found in boxes.items():
        width, height = sizes[sheet]
        for left, top, right, bottom, text in found:
            assert 0 < left < right <= width - 4, text
            assert 0 < top < bottom <= height - 4, text
        for a, b in itertools.combinations(found, 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (a, b)


def test_a_title_shrinks_and_is_then_cut() -> None:
    assert _canvas.fitted("short", (28, 20), 300.0) == ("short", 28)
    text, size = _canvas.fitted("WIDE " * 40, (28, 20), 300.0)
    assert size == 20
    assert text.endswith("...")
    assert _canvas.width_of(text, size) <= 300.0


def patch() -> Explanation:
    """Cells over a small part of the scan around the right lesion."""
    grid = cells(GRID, (2, 2, 2), (34.5, 24.5, 22.5), (5, 5, 4))
    evidence = np.zeros((5, 5, 4), dtype=np.float32)
    evidence[2, 2, 1], evidence[4, 0, 0] = 3.0, -2.0
    field = Cells((2, 2, 2), (34.5, 24.5, 22.5), (9, 9, 9), "exact")
    return explanation(grid=grid, evidence=evidence, cells=field)


def test_a_patch_is_framed_and_zoomed(written_words: list[str]) -> None:
    ready = scene(bundle(patch()))
    assert ready.patch
    np.testing.assert_allclose(ready.box[0], (33.5, 23.5, 21.5))
    np.testing.assert_allclose(ready.box[1], (43.5, 33.5, 29.5))
    plane = ready.planes["axial"]
    seen = _panel.seen_box(plane, ready.box)
    field = _panel.zoom_field(plane, seen, (400, 400))
    assert field is not None
    assert field.mm_per_pixel * 400 == pytest.approx(80.0)
    for row, column in seen[:, :2]:
        x, y = field.pixel(row, column)
        assert 50 < x < 350
        assert 50 < y < 350
    frame = Image.new("RGB", (400, 400))
    _panel.outline(frame, field, seen)
    lit = np.argwhere(np.asarray(frame)[..., 0] > 0)
    np.testing.assert_allclose(lit.max(axis=0) - lit.min(axis=0), 10 * 4 / 0.2, atol=1.5)
    overview(ready)
    assert _words.BOX_WORDS in said(written_words)
    assert not scene(bundle(explanation())).patch


def test_a_zoom_stays_within_the_scan() -> None:
    plane = plane_of(GRID, "axial")
    corner = np.array(((-0.5, -0.5, 0.0), (4.5, 4.5, 3.0)))
    field = _panel.zoom_field(plane, corner, (400, 400))
    assert field is not None
    rows, columns = field.indices()
    assert rows[0] > -0.5
    assert columns[0] > -0.5
    whole = np.array(((-0.5, -0.5, 0.0), (40.0, 40.0, 3.0)))
    assert _panel.zoom_field(plane, whole, (400, 400)) is None


def test_a_scan_on_another_grid_is_refused(tmp_path: Path) -> None:
    made = explanation()
    shifted = GRID.affine.copy()
    shifted[0, 3] += 4
    volume = Volume(body()[None], Geometry(GRID.shape, shifted), "CT", "HU")
    with pytest.raises(UsageError, match="scan on the grid of the maps"):
        png.save(Bundle(made, draw(made), volume), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (-0.5, "-0.50"),
        (0.02, "0.020"), (0.00012, "1.2e-04"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float, words: str) -> None:
    assert _words.number(value) == words


def test_probabilities_are_never_rounded_to_certainty() -> None:
    assert "above 0.9999" in _words.score_at(NODULE, 30.0)
    assert "probability 0.00002)" in _words.score_at(NODULE, -10.82)
    assert "below 0.000001" in _words.score_at(NODULE, -40.0)


def test_an_oblique_scan_says_that_it_is_one(written_words: list[str]) -> None:
    angle = np.radians(12)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = Geometry(GRID.shape, rotation @ GRID.affine)
    overview(scene(bundle(explanation(image), with_scan=False)))
    assert "oblique scan (12 degrees), shown along its own axes" in said(written_words)


@pytest.mark.real
def test_a_real_chest_ct_is_shown_as_lung(real_data: Path, tmp_path: Path) -> None:
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    folder = str(real_data / "ct_chest_c3n00247" / "dicom")
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    image = reader.Execute()
    array = np.ascontiguousarray(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0))
    affine = np.diag((-image.GetSpacing()[0], -image.GetSpacing()[1], image.GetSpacing()[2], 1.0))
    affine[:3, 3] = np.array(image.GetOrigin()) * (-1, -1, 1)
    grid = Geometry((array.shape[0], array.shape[1], array.shape[2]), affine)
    around = cells(grid, (8, 8, 4), (92.5, 143.5, 3.5), (6, 6, 6))
    evidence = np.zeros((6, 6, 6), dtype=np.float32)
    evidence[2, 2, 2] = 5
    made = explanation().replace(
        image=grid, grid=around, evidence=evidence, calibration=None,
        cells=Cells((8, 8, 4), (92.5, 143.5, 3.5), (30, 30, 20), "exact"),
    )  # fmt: skip
    ready = scene(Bundle(made, draw(made), Volume(array[None], grid, "CT", "HU")))
    assert ready.window is not None
    assert ready.window.name == "lung"
    assert ready.patch
    (peak,) = ready.peaks
    assert "patient's right" in peak.words.replace("\u00a0", " ")
    written = png.save(Bundle(made, ready.maps, Volume(array[None], grid, "CT", "HU")), tmp_path)
    assert {path.name for path in written} == NAMES


def bare() -> Explanation:
    """A map without a sign, in relative units, as eigencam makes it."""
    return explanation(
        evidence=np.abs(explanation().evidence), signed=False, measure="relative units",
        status="no_sum", reference_score=None, calibration=None, method="eigencam",
    )  # fmt: skip


def test_a_map_without_a_sign_is_one_colour_and_speaks_of_no_side(
    written_words: list[str], tmp_path: Path
) -> None:
    written = png.save(bundle(bare()), tmp_path)
    assert {path.name for path in written} == {
        "overview.png",
        *(f"mip_{view}_strength.png" for view in VIEWS),
    }
    words = said(written_words).replace("not what raises or lowers the score", "")
    for wanted in (
        "Map without a sign, target: nodule",
        "This map, in relative units, has no sign: it shows where it is strong",
        "Where the map is strongest: R ",
        "Where the map is strong: maximum along the rays",
        "map strength (no sign)",
    ):
        assert wanted in words, wanted
    for wrong in ("vidence", "raises", "lowers", "against"):
        assert wrong not in words, wrong
    assert words.count("log-odds") == words.count("Model score") == 4
    picture = np.asarray(panel(bare(), "axial")[0]).astype(int)
    red, green, blue = (picture[..., n] for n in range(3))
    purple = (red > green + 20) & (blue > green + 20)
    assert purple.sum() > 100
    assert not ((abs(red - blue) > 60) & purple).any()


def test_nothing_above_the_floor_of_a_map_without_a_sign(written_words: list[str]) -> None:
    made = bare().replace(evidence=0.01 * bare().evidence, calibration=FIXED)
    overview(scene(bundle(made)))
    words = said(written_words)
    assert "othing above the model's noise floor" in words
    assert "vidence" not in words


def test_a_method_without_a_reference_adds_up_to_the_score(written_words: list[str]) -> None:
    overview(scene(bundle(explanation(reference_score=None))))
    assert "The map adds up to the score." in said(written_words)
