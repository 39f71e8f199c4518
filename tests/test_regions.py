"""Are regions of a map worth what Shapley values say, on the grid where they were drawn?"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import region_table, regions
from med_gradcam.errors import CannotExplainError, UnknownNameError, UsageError
from med_gradcam.metrics import shapley as game
from med_gradcam.regions import RegionValues, shapley
from med_gradcam.samples import folder
from tests.tiny import affine_of, volume

SIDE = 12
Labels = npt.NDArray[np.int16]


def small() -> nn.Sequential:
    """Two layers with places and a head in which places interact."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for module in (net[7], net[9]):
            assert isinstance(module, nn.Linear)
            module.weight.mul_(6)
    return net


def linear() -> nn.Sequential:
    """The tail behind layer 1 adds up its places."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv3d(1, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * SIDE**3, 2)
    ).eval()


def scan(seed: int = 0) -> torch.Tensor:
    """Noise with a bright cube."""
    array = 0.3 * torch.randn((1, SIDE, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    array[:, 3:6, 4:8, 5:9] += 3
    return array


def slabs(count: int = 3) -> Labels:
    """Labels 1, 2, ... along the first axis, of equal width, and a part that has none."""
    labels = np.zeros((SIDE,) * 3, dtype=np.int16)
    labels[:, :10] = (1 + np.arange(SIDE) * count // SIDE)[:, None, None]
    return labels


def rows(found: RegionValues) -> list[regions.RegionValue]:
    return [*found.regions, found.elsewhere]


def whole(found: RegionValues) -> float:
    e = found.explanation
    assert e.reference_score is not None
    return e.score - e.reference_score


# ------------------------------------------------------------------------------------- the axioms


@pytest.mark.parametrize("layer", ["1", "4", "@input"])
@pytest.mark.parametrize("how", ["components", "slabs"])
def test_values_and_nets_both_add_up(layer: str, how: str) -> None:
    wish: Any = slabs() if how == "slabs" else how
    found = shapley(scan(), small(), target=1, layer=layer, regions=wish, most=5)
    assert sum(r.value for r in rows(found)) == found.total
    assert found.total == pytest.approx(whole(found), abs=1e-4)
    assert found.residual == pytest.approx(0, abs=1e-4)
    assert found.start_score == pytest.approx(found.explanation.reference_score, abs=1e-4)
    e = found.explanation
    assert sum(r.net for r in rows(found)) == pytest.approx(e.sum_for - e.sum_against, abs=1e-5)
    assert found.exact
    assert found.passes == 2 ** len(rows(found))


def test_behind_a_linear_tail_the_map_and_the_values_are_the_same() -> None:
    found = shapley(scan(), linear(), target=1, layer="1", link="sigmoid", regions=slabs(4))
    assert max(abs(r.value) for r in rows(found)) > 0.1
    for row in rows(found):
        assert row.deviation == pytest.approx(0, abs=1e-4)
        assert row.deviation == row.net - row.value


def test_where_places_interact_they_part() -> None:
    """Guards the test above."""
    found = shapley(scan(), small(), target=1, layer="4", regions=slabs(4))
    assert max(abs(r.deviation) for r in rows(found)) > 0.01 * abs(whole(found))


class Twins(nn.Module):
    """Blind to the order of places, and not additive."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 30 * self.first(x).mean((2, 3, 4)) ** 3
        return out


def test_equals_get_the_same_and_a_dummy_gets_nothing() -> None:
    x = torch.zeros(1, SIDE, SIDE, SIDE)
    x[0, :4, 2, 3], x[0, 4:8, 2, 3], x[0, 5, 2, 5] = 9.0, 9.0, 2.0  # slab 3 is like the reference
    labels = slabs()
    labels[5, 2, 5] = 0
    found = shapley(x, Twins(), layer="first", link="sigmoid", reference="zero", regions=labels)
    one, two, dummy = (r.value for r in found.regions)
    assert one == pytest.approx(two, rel=1e-5)
    assert dummy == pytest.approx(0, abs=1e-6)
    assert found.elsewhere.value > 0
    assert one > 10 * found.elsewhere.value
    mean = np.array([36, 36, 2.0]) / SIDE**3  # the closed form of a cube of a sum of three
    a, b, c = mean
    wanted = 30 * (a**3 + 1.5 * a * a * (b + c) + 1.5 * a * (b * b + c * c) + 2 * a * b * c)
    assert one == pytest.approx(wanted, rel=1e-4)


# ---------------------------------------------------------------------------- the error bar


def test_a_sample_lies_within_its_error_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"target": 1, "layer": "4", "regions": slabs(6)}
    exact = shapley(scan(), small(), **given)
    monkeypatch.setattr(game, "EXACT", 3)
    monkeypatch.setattr(game.shapley, "__defaults__", (200,))
    off = []
    for seed in range(4):
        sampled = shapley(scan(), small(), seed=seed, **given)
        assert not sampled.exact
        assert sampled.total == pytest.approx(exact.total, abs=1e-4)
        for row, true in zip(rows(sampled), rows(exact), strict=True):
            assert (row.number, row.net) == (true.number, true.net)
            assert 0 < row.standard_error < 0.1 * abs(whole(exact))
            off.append((row.value - true.value) / row.standard_error)
    assert np.abs(off).max() < 4
    assert 0.4 < np.sqrt(np.mean(np.square(off))) < 1.7


def test_more_than_ten_labels_are_sampled() -> None:
    found = shapley(scan(), small(), target=1, layer="1", regions=slabs(12))
    assert len(found.regions) == 12
    assert not found.exact
    assert found.passes < 2**12
    assert found.total == pytest.approx(whole(found), abs=1e-4)


# ------------------------------------------------------------------------------- where they lie


@pytest.mark.parametrize("axes", ["RAS", "SPL"])
def test_a_component_is_what_is_coloured(axes: str) -> None:
    """Two blobs that raise and one that lowers, largest net evidence first."""
    x = torch.zeros(1, 16, 12, 10)
    x[0, 4:6, 2:4, 6:8], x[0, 10:12, 8:10, 2:4], x[0, 12:14, 2:4, 2:4] = 3.0, -5.0, 2.0
    net = nn.Sequential(nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    affine = affine_of(axes, (0.8, 1.2, 3.0), (10, -20, 30))
    given: dict[str, Any] = {"layer": "0", "link": "sigmoid", "affine": affine}
    found = shapley(x, net, reference="zero", **given)
    share = 8 / (16 * 12 * 10)
    assert [r.number for r in found.regions] == [1, 2, 3]
    line = np.array([0.25, 0.75, 0.75, 0.25])  # a cell of two voxels, as it is drawn
    drawn = np.einsum("i,j,k->ijk", line, line, line) / 8
    for row, worth in zip(found.regions, (-5, 3, 2), strict=True):
        seen = drawn[abs(worth) * drawn >= 0.1 * 5 * drawn.max()].sum()  # the rest is elsewhere
        assert row.net == pytest.approx(worth * share * seen, rel=1e-5)
        assert row.value == pytest.approx(row.net, abs=1e-6)
    signed = mg.draw(found.explanation).signed
    assert np.array_equal(found.labels > 0, np.abs(signed.values) >= signed.floor)
    assert not found.labels.flags.writeable
    first = found.regions[0]
    assert first.ras_mm is not None
    middle = (affine @ [10.5, 8.5, 2.5, 1])[:3].tolist()
    assert list(first.ras_mm) == pytest.approx(middle, abs=0.01)
    assert first.words.endswith(f"mm ({first.side})")
    assert first.side == f"patient's {'left' if middle[0] < 0 else 'right'}"
    assert first.ml == pytest.approx(float((found.labels == 1).sum()) * 0.8 * 1.2 * 3 / 1000)
    fewer = shapley(x, net, reference="zero", most=1, **given)
    assert [r.net for r in fewer.regions] == pytest.approx([first.net])
    assert fewer.elsewhere.net == pytest.approx(-first.net, abs=1e-6)  # -5 + 3 + 2


def test_a_label_s_net_is_what_the_drawn_map_holds_in_it() -> None:
    found = shapley(scan(), small(), target=1, layer="4", regions=slabs())
    signed = mg.draw(found.explanation).signed
    for row in found.regions:
        inside = signed.values[slabs() == row.number].sum(dtype=float) * signed.grid.voxel_ml
        assert row.net == pytest.approx(inside, abs=1e-5)


@pytest.mark.parametrize("kind", ["array", "tensor", "volume", "float", "bool", "names"])
def test_label_maps_may_come_in_many_forms(kind: str) -> None:
    labels = (slabs() == 2).astype(np.int16)
    forms: dict[str, Any] = {
        "array": labels,
        "tensor": torch.tensor(labels)[None],
        "volume": volume(labels, modality=None),
        "float": labels.astype(np.float32),
        "bool": labels > 0,
    }
    given: dict[str, Any] = {"target": 1, "layer": "1"}
    wanted = shapley(scan(), small(), regions=labels, **given)
    made = shapley(scan(), small(), regions=forms.get(kind, labels), names={1: "liver"}, **given)
    assert [r.value for r in made.regions] == [r.value for r in wanted.regions]
    assert (made.regions[0].name, wanted.regions[0].name) == ("liver", "region 1")


def test_a_label_outside_what_the_network_sees_is_worth_nothing() -> None:
    home = folder()
    model = mg.load_model(home / "nets" / "ct_nodule")
    image = mg.read(home / "ct" / "core.nii.gz")
    core = np.asarray(mg.read(home / "ct" / "core_mask_core.nii.gz").array)[0] > 0
    seen = mg.explain(image, model, layer="block1", target=1)
    corner = np.round(seen.image.index_ijk(seen.grid.world_ras((0, 0, 0)))).astype(int)
    labels = core.astype(np.int16)
    far = tuple(0 if at > n // 2 else n - 1 for at, n in zip(corner, labels.shape, strict=True))
    labels[far] = 7
    found = shapley(image, model, layer="block1", target=1, regions=labels)
    alone = shapley(image, model, layer="block1", target=1, regions=core)
    assert [r.number for r in found.regions] == [1, 7]
    if mg.draw(seen).signed.values[far] == 0:
        assert (found.regions[1].net, found.regions[1].value) == (0, 0)
    assert found.regions[0].value == pytest.approx(alone.regions[0].value, abs=1e-4)
    assert found.regions[0].value > 1.0
    signed = mg.draw(found.explanation).signed  # the model's axes are not those of the file
    assert model.input.axes != image.grid.axcodes
    inside = signed.values[labels == 1].sum(dtype=float) * signed.grid.voxel_ml
    assert found.regions[0].net == pytest.approx(inside, abs=1e-4)


# ------------------------------------------------------------------------- methods, cost, care


@pytest.mark.parametrize("method", ["integrated", "hirescam", "gradcam", "integrated_gradients"])
def test_maps_of_other_methods_are_held_against_the_same_values(method: str) -> None:
    layer = "auto" if method == "integrated_gradients" else "4"
    found = shapley(scan(), small(), target=1, layer=layer, method=method, regions=slabs())
    other = "@input" if layer == "auto" else "4"
    wanted = shapley(scan(), small(), target=1, layer=other, regions=slabs())
    assert found.explanation.method == method
    assert [r.value for r in rows(found)] == pytest.approx(
        [r.value for r in rows(wanted)], abs=1e-4
    )
    assert (found.residual is None) == (method in ("hirescam", "gradcam"))


def test_where_secant_has_no_rule_integrated_takes_over() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            strongest = self.first(x).flatten(2).topk(40, dim=2)[0]
            out: torch.Tensor = self.head(strongest.mean(2))
            return out

    torch.manual_seed(0)
    found = shapley(scan(), Odd().eval(), target=1, layer="first", regions=slabs())
    assert found.explanation.method == "integrated"
    assert found.total == pytest.approx(whole(found), abs=1e-4)


def test_what_flows_past_the_layer_is_the_residual() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.past = (nn.Conv3d(1, 4, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head((self.layer(x) + self.past(x)).relu().mean((2, 3, 4)))
            return out

    torch.manual_seed(0)
    found = shapley(scan(), Past().eval(), target=1, layer="layer", regions=slabs())
    assert found.residual is not None
    assert abs(found.residual) > 0.01 * abs(whole(found))
    e = found.explanation
    assert found.total == pytest.approx(e.score - found.start_score, abs=1e-4)
    assert found.total + found.residual == pytest.approx(whole(found), abs=1e-9)


def test_the_cost_is_the_map_and_the_runs() -> None:
    found = shapley(scan(), small(), target=1, layer="@input", regions=slabs(2))
    # 8 coalitions, the tail tried twice; scan, scan again and reference.
    assert found.passes == 8
    assert found.forwards == pytest.approx(found.explanation.cost_in_forwards + 8 + 2 + 3)


def test_the_network_comes_back_as_it_was() -> None:
    net = small().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    shapley(scan(), net, target=1, layer="4", regions=slabs())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "eigencam"}, "a signed method in the score's own unit, .* got 'eigencam'"),
        ({"method": "saliency"}, "a signed method in the score's own unit"),
        ({"layer": "all"}, "expected one layer for Shapley values, got 'all'"),
        ({"layer": "1+4"}, "expected one layer for Shapley values"),
        ({"most": 0}, "expected 1 to 10 components, got 0"),
        ({"most": 11}, "expected 1 to 10 components, got 11"),
        ({"regions": "lobes"}, "expected regions of 'components' or a label map, got 'lobes'"),
        ({"regions": slabs()[:3]}, r"on the scan's grid \(12, 12, 12\), got int16 \(3, 12, 12\)"),
        ({"regions": None}, "expected 'components' or a label map .* got object"),
        ({"regions": slabs() * 0}, "expected 1 to 256 regions in a label map, got 0"),
        ({"regions": np.arange(SIDE**3).reshape((SIDE,) * 3)}, "1 to 256 regions .* got 1727"),
        ({"regions": slabs() - 1}, "whole numbers from 0 in a label map, got values from -1"),
        ({"regions": slabs() / 2}, "whole numbers from 0"),
        ({"regions": slabs() * np.nan}, "whole numbers from 0"),
        (
            {"regions": volume(slabs(), affine_of("RAS", origin=(9, 0, 0)), None)},
            "a label map on the scan's own grid, got one that lies 9.0 mm off",
        ),
    ],
)
def test_refusals(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        shapley(scan(), small(), **{"target": 1, "layer": "4", **settings})


def test_unknown_settings_and_a_map_without_a_coloured_part() -> None:
    with pytest.raises(UnknownNameError, match="known setting, got 'region'"):
        shapley(scan(), small(), region=slabs())
    flat = volume(np.eye(8, dtype=np.float32)[:, :, None] + np.zeros((8, 8, 8), np.float32))
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    with pytest.raises(CannotExplainError, match="parts of the map that are coloured, got none"):
        shapley(flat, net, target=1, layer="0", link="sigmoid", reference=flat)


# ---------------------------------------------------------------------------- for files and people


def test_the_record() -> None:
    found = shapley(scan(), small(), target=1, layer="4", regions=slabs())
    record = region_table.as_record(found)
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert record["format"] == "med-gradcam-regions/1"
    every = [*record["regions"], record["elsewhere"]]
    assert sum(r["value"] for r in every) == pytest.approx(record["total"], abs=1e-9)
    assert record["total"] == pytest.approx(record["score"] - record["start_score"], abs=1e-4)
    for written, row in zip(every, rows(found), strict=True):
        assert (written["net"], written["deviation"]) == (row.net, row.deviation)
    assert record["elsewhere"]["ras_mm"] is None


def test_the_table() -> None:
    found = shapley(scan(), small(), target=1, layer="4", regions=slabs(), names={2: "middle lobe"})
    lines = region_table.as_text(found).splitlines()
    assert lines[0].startswith("class 1 at the layer 4: score ")
    middle = next(x for x in lines if x.startswith("middle lobe"))
    row = found.regions[1]
    for text in (f"{row.net:+.3f}", f"{row.value:+.3f}", f"{row.deviation:+.3f}", row.words):
        assert text in middle
    assert "exact" in middle
    total = next(x.split() for x in lines if x.startswith("all "))
    assert total[2] == f"{found.total:+.3f}"
    assert any(x.startswith("16 runs of what lies behind the layer") for x in lines)
