"""Do the channels of a layer add up to the map and the score, at the right places?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import channel_table, channels
from med_gradcam.channels import FAINT, Concepts, concepts, concepts_of
from med_gradcam.errors import UnknownNameError, UsageError
from med_gradcam.samples import folder
from tests.tiny import affine_of, volume


def small(norm: Callable[[int], nn.Module] = nn.BatchNorm3d) -> nn.Sequential:
    """Three layers with places, two norms and a head with a hidden layer."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), norm(6), nn.ReLU(),
        nn.MaxPool3d(2), nn.Conv3d(6, 12, 3, padding=1), norm(12), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.3)
    return net.eval()


def scan(seed: int = 0, size: int = 12, count: int = 1) -> torch.Tensor:
    """Noise with a bright cube, (C, I, J, K)."""
    array = 0.3 * torch.randn((count, *(size,) * 3), generator=torch.Generator().manual_seed(seed))
    array[:, 3:6, 4:8, 5:9] += 2
    return array


def rows(found: Concepts) -> float:
    """Everything that the table lists, added up."""
    assert found.residual is not None
    return sum(c.net for c in found.channels) + found.others.net + found.residual


def difference(found: Concepts) -> float:
    e = found.explanation
    assert e.reference_score is not None
    return e.score - e.reference_score


# ------------------------------------------------------------------------------------- the sums


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, lambda n: nn.InstanceNorm3d(n, affine=True)])
@pytest.mark.parametrize("layer", ["2", "6", "auto", "@input"])
def test_the_rows_add_up_to_the_score(norm: Callable[[int], nn.Module], layer: str) -> None:
    found = concepts(scan(), small(norm), target=1, layer=layer, most=4)
    e = found.explanation
    assert rows(found) == pytest.approx(difference(found), abs=1e-4)
    assert found.residual == pytest.approx(0, abs=1e-4)
    assert found.net == pytest.approx(e.sum_for - e.sum_against, abs=1e-4)
    listed: list[channels.Channel | channels.Others] = [*found.channels, found.others]
    for row in listed:
        assert row.share == pytest.approx(row.net / difference(found), rel=1e-9)
        assert row.net == pytest.approx(row.sum_for - row.sum_against, abs=1e-9)


@pytest.mark.parametrize("method", ["secant", "integrated", "hirescam", "gradcam"])
def test_the_channels_add_up_to_the_map_cell_by_cell(method: str) -> None:
    net = small()
    settings = {"target": 2, "layer": "6", "method": method, "precise": True}
    explanation, terms = channels._terms(scan(), net, settings)
    alone = mg.explain(scan(), net, **settings)  # type: ignore[arg-type]
    assert np.array_equal(explanation.evidence, alone.evidence)
    assert alone.method == method
    off = np.abs(terms.sum(0).numpy() - alone.evidence).max()
    bound = 0.01 if method == "integrated" else 1e-6  # another quadrature of the same integral
    assert off <= bound * np.abs(alone.evidence).max()


def pooled(count: int = 1) -> nn.Sequential:
    """A convolution, a ReLU, the mean over places and one linear layer."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv3d(count, 5, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, 2),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("method", ["secant", "integrated", "hirescam", "gradcam"])
def test_behind_a_mean_and_one_linear_layer_a_channel_is_its_weight_times_its_mean(
    method: str,
) -> None:
    net, x = pooled(), scan()
    settings: dict[str, Any] = {"target": 1, "layer": "1", "link": "sigmoid", "method": method}
    found = concepts(x, net, reference="value:0.5", most=5, **settings)
    with torch.no_grad():
        here, there = (net[:2](v[None])[0].mean(dim=(1, 2, 3)) for v in (x, x * 0 + 0.5))
        head = net[4]
        assert isinstance(head, nn.Linear)
        change = here - there if method in ("secant", "integrated") else here
        truth = (head.weight[1] * change).numpy()
    assert sorted(c.index for c in found.channels) == list(range(5))
    for channel in found.channels:
        assert channel.net == pytest.approx(float(truth[channel.index]), abs=1e-5)
    sizes = [abs(c.net) for c in found.channels]
    assert sizes == sorted(sizes, reverse=True)


def test_most_and_the_others() -> None:
    every = concepts(scan(), small(), target=1, layer="6", most=99)
    assert (len(every.channels), every.others.count, every.others.net) == (12, 0, 0.0)
    few = concepts(scan(), small(), target=1, layer="6", most=2)
    assert [c.index for c in few.channels] == [c.index for c in every.channels[:2]]
    rest = every.channels[2:]
    assert few.others.count == 10
    for name in ("net", "sum_for", "sum_against"):
        total = sum(getattr(c, name) for c in rest)
        assert getattr(few.others, name) == pytest.approx(total, abs=1e-9)


def test_the_input_gives_the_sequences_of_a_study() -> None:
    """Behind a linear network a sequence's evidence is its own part of the score."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv3d(3, 2, 1, bias=False), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    ).eval()
    x = scan(count=3)
    found = concepts(x, net, target=0, layer="@input", link="sigmoid", reference="zero")
    conv = net[0]
    assert isinstance(conv, nn.Conv3d)
    for channel in found.channels:
        weight = float(conv.weight[0, channel.index, 0, 0, 0].detach())
        mean = float(x[channel.index].double().mean())
        assert channel.net == pytest.approx(weight * mean, abs=1e-5)


def test_what_flows_past_the_layer_is_the_residual() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv3d(1, 4, 3, padding=1)
            self.past = nn.Conv3d(1, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head((self.layer(x) + self.past(x)).relu().mean((2, 3, 4)))
            return out

    torch.manual_seed(0)
    found = concepts(scan(), Past().eval(), target=1, layer="layer")
    assert found.explanation.status == "not_a_cut"
    assert found.residual is not None
    assert abs(found.residual) > 0.01 * abs(difference(found))
    assert rows(found) == pytest.approx(difference(found), abs=1e-4)


# ----------------------------------------------------------------------------------- the places


class TwoBlobs(nn.Module):
    """Channel 0 speaks for what is bright, channel 1 against what is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AvgPool3d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.both(x).mean(dim=(2, 3, 4))
        return 100 * (pooled[:, :1] - pooled[:, 1:])

    def both(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(torch.cat([x.relu(), (-x).relu()], 1))
        return out


def blobs() -> torch.Tensor:
    x = torch.zeros(1, 16, 12, 10)
    x[0, 4:6, 2:4, 6:8] = 3.0  # cell 2, 1, 3
    x[0, 10:12, 8:10, 2:4] = -1.0  # cell 5, 4, 1
    x[0, 0:2, 0:2, 0:2] = 2.0  # cell 0, 0, 0
    x[0, 14:16, 0:2, 0:2] = 3.0 * FAINT * 0.9  # fainter than what is listed
    return x


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL"])
def test_a_channel_is_placed_where_it_speaks(axes: str) -> None:
    affine = affine_of(axes, (0.8, 1.2, 3.0), (10, -20, 30))
    found = concepts(blobs(), TwoBlobs(), layer="layer", link="sigmoid", affine=affine, most=2)
    bright, dark = sorted(found.channels, key=lambda c: c.index)

    def world(*cell: int) -> list[float]:
        place: list[float] = (affine @ [*(2 * n + 0.5 for n in cell), 1])[:3].tolist()
        return place

    share = 100 / (8 * 6 * 5)
    assert [p.evidence for p in bright.places] == pytest.approx([3 * share, 2 * share], rel=1e-5)
    assert list(bright.places[0].ras_mm) == pytest.approx(world(2, 1, 3))
    assert list(bright.places[1].ras_mm) == pytest.approx(world(0, 0, 0))
    assert [p.evidence for p in dark.places] == pytest.approx([-share], rel=1e-5)
    assert list(dark.places[0].ras_mm) == pytest.approx(world(5, 4, 1))
    x, y, z = world(5, 4, 1)
    letters = f"{'RL'[x < 0]} {abs(x):.0f} {'AP'[y < 0]} {abs(y):.0f} {'SI'[z < 0]} {abs(z):.0f} mm"
    assert dark.places[0].words == letters
    assert dark.places[0].side == f"patient's {'left' if x < 0 else 'right'}"


def test_a_shipped_scan_has_its_core_where_it_was_planted() -> None:
    home = folder()
    model = mg.load_model(home / "nets" / "ct_nodule")
    found = concepts(mg.read(home / "ct" / "core.nii.gz"), model, layer="block1", most=3)
    assert rows(found) == pytest.approx(difference(found), abs=1e-4)
    truth = mg.read(home / "ct" / "core_mask_core.nii.gz")
    middle = truth.grid.world_ras(np.argwhere(np.asarray(truth.array)[0] > 0).mean(0))
    top = found.channels[0].places[0]
    assert top.evidence > 0
    assert np.linalg.norm(np.array(top.ras_mm) - middle) < 15


# ---------------------------------------------------------------------------------- several scans


def cohort() -> Sequence[torch.Tensor]:
    """Scan n is bright by SIZES[n]; scan 3 is dark."""
    x = [torch.zeros(1, 8, 8, 8) for _ in range(5)]
    for n, bright in enumerate((1.0, 5.0, 3.0, -4.0, 2.0)):
        x[n][0, 2:4, 4:6, 0:2] = bright
        x[n][0, 7, 7, 7] = 0.01
    return x


def test_a_channel_has_the_scans_where_it_is_strongest() -> None:
    found = concepts_of(cohort(), TwoBlobs(), layer="layer", link="sigmoid", reference="zero")
    assert [c.index for c in found.channels] == [0, 1]
    bright, dark = found.channels
    assert [s.scan for s in bright.scans] == [1, 2, 4]
    assert dark.scans[0].scan == 3
    share = 100 / 64
    assert bright.scans[0].net == pytest.approx(5 * share, rel=1e-3)
    assert dark.scans[0].net == pytest.approx(-4 * share, rel=1e-3)
    for seen in (bright.scans[0], dark.scans[0]):
        assert seen.place is not None
        assert list(seen.place.ras_mm) == pytest.approx([2.5, 4.5, 0.5])
    assert bright.scans[0].place is not None
    assert bright.scans[0].place.evidence == pytest.approx(5 * share, rel=1e-3)
    assert dark.scans[1].place is None  # silent there
    for n, one in enumerate(cohort()):
        alone = concepts(one, TwoBlobs(), layer="layer", link="sigmoid", reference="zero")
        nets = {c.index: c.net for c in alone.channels}
        assert found.nets[n] == pytest.approx((nets[0], nets[1]), abs=1e-6)
    size = np.abs(np.array(found.nets)).mean(0)
    assert [c.mean_size for c in found.channels] == pytest.approx(size.tolist())
    assert [c.mean_net for c in found.channels] == pytest.approx(np.mean(found.nets, 0).tolist())


def test_layer_and_target_of_the_first_scan_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = small(), [scan(0), scan(3), scan(5) * -2]
    first = mg.explain(given[0], net)
    asked: list[tuple[str, object]] = []
    real = channels._terms

    def terms(image: object, model: object, settings: dict[str, Any]) -> Any:
        asked.append((settings["layer"], settings["target"]))
        return real(image, model, settings)

    monkeypatch.setattr(channels, "_terms", terms)
    found = concepts_of(given, net, most=3)
    assert asked == [("auto", "auto"), *[(first.layer, first.target)] * 2]
    assert (found.layer, found.target) == (first.layer, first.target.label)
    scores = [mg.explain(x, net, target=first.target, layer=first.layer).score for x in given]
    assert found.scores == pytest.approx(scores, abs=1e-5)
    assert len(found.channels) == 3


# ------------------------------------------------------------------------ refusals and care taken


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "eigencam"}, "whose map is a sum over channels .gradcam, hirescam, integrated"),
        ({"most": 0}, "at least one channel to list, got 0"),
        ({"layer": "all"}, "expected one layer for concepts, got 'all'"),
        ({"layer": "2+6"}, "expected one layer for concepts, got '2.6'"),
    ],
)
def test_refusals(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        concepts(scan(), small(), **{"target": 1, **settings})


def test_names_that_are_not_known() -> None:
    with pytest.raises(
        UnknownNameError, match=r"known method, got 'secnt'; near ones of .*: secant"
    ):
        concepts(scan(), small(), method="secnt")
    with pytest.raises(UnknownNameError, match=r"known setting, got 'refrence'; .*reference"):
        concepts(scan(), small(), refrence="zero")
    with pytest.raises(UnknownNameError, match="known layer, got 'block9'"):
        concepts(scan(), small(), layer="block9")


@pytest.mark.parametrize("images", ["scan.nii.gz", scan(), 3])
def test_a_cohort_is_a_list(images: Any) -> None:
    with pytest.raises(UsageError, match="expected a list of scans"):
        concepts_of(images, small())


def test_an_empty_cohort() -> None:
    with pytest.raises(UsageError, match="at least one scan and one channel, got 0, 8"):
        concepts_of([], small())


def test_where_secant_has_no_rule_another_method_takes_over() -> None:
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
    net = Odd().eval()
    alone = mg.explain(scan(), net, target=1, layer="first")
    assert alone.method == "integrated", "the operation has a rule by now: take another"
    found = concepts(scan(), net, target=1, layer="first", most=4)
    assert found.explanation.method == "integrated"
    assert any("has no rule" in text for text in found.explanation.warnings)
    assert rows(found) == pytest.approx(difference(found), abs=1e-4)
    assert found.net == pytest.approx(difference(found), rel=0.05, abs=0.02)


def test_the_network_comes_back_as_it_was() -> None:
    net = small().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    concepts(scan(), net, target=1, layer="6")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_constant_of_a_network_has_no_share() -> None:
    """The score of its reference: nothing to share out, and no division by nothing."""
    flat = volume(np.zeros((8, 8, 8), dtype=np.float32) + np.eye(8, dtype=np.float32)[:, :, None])
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    found = concepts(flat, net, target=1, layer="0", link="sigmoid", reference=flat)
    assert found.net == 0
    assert all(c.share is None and c.places == () for c in found.channels)


# ---------------------------------------------------------------------------- for files and people


def test_the_record() -> None:
    found = concepts(scan(), small(), target=1, layer="6", most=3)
    record = channel_table.as_record(found)
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert record["format"] == "med-gradcam-concepts/1"
    total = sum(row["net"] for row in record["channels"]) + record["others"]["net"]
    change = record["score"] - record["reference_score"]
    assert total + record["residual"] == pytest.approx(change, abs=1e-9)
    assert record["net"] == pytest.approx(total)
    assert [row["index"] for row in record["channels"]] == [c.index for c in found.channels]
    place, written = found.channels[0].places[0], record["channels"][0]["places"][0]
    assert written["evidence"] == place.evidence
    assert written["ras_mm"] == [round(v, 3) for v in place.ras_mm]


def test_the_table() -> None:
    found = concepts(scan(), small(), target=1, layer="6", most=3)
    lines = channel_table.as_text(found).splitlines()
    assert lines[0].startswith("class 1 at the layer 6, 12 channels: score ")
    for channel in found.channels:
        line = next(x for x in lines if x.split()[:1] == [str(channel.index)])
        assert f"{channel.net:+.3f}" in line
        assert channel.places[0].words in line
    table = [x.split() for x in lines]
    assert next(x for x in table if x[1:2] == ["others"])[0] == "9"
    assert next(x for x in table if x[:1] == ["all"])[1] == f"{difference(found):+.3f}"
    look = concepts(scan(), small(), target=1, layer="6", most=3, method="hirescam")
    text = channel_table.as_text(look)
    assert "promises no sum with the score" in text
    assert "residual" not in text
