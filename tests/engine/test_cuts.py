"""Do layers that share a score out between them say so, all of it, and what they leave out?"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.errors import CannotExplainError, UsageError
from med_gradcam.secant import pair
from med_gradcam.secant.tape import Tape
from med_gradcam.tail import at_rest
from tests.engine import architectures, nets

# All levels of each U-Net: what comes before them reaches the score through one of them.
LEVELS = {
    "BasicUNet": ["conv_0", "down_1", "down_2", "down_3", "down_4"],
    "UNet": [
        "model.0",
        "model.1.submodule.0",
        "model.1.submodule.1.submodule.0",
        "model.1.submodule.1.submodule.1.submodule",
    ],
    "SegResNet": [f"down_layers.{n}" for n in range(4)],
    "DynUNet": ["input_block", "downsamples.0", "downsamples.1", "bottleneck"],
}
SCAN = nets.volume(32)


def _explain(name: str, layer: str, **settings: Any) -> mg.Explanation:
    return mg.explain(SCAN, architectures.made(name), target=1, layer=layer, **settings)


@cache
def _whole(name: str) -> mg.Explanation:
    return _explain(name, "+".join(LEVELS[name]))


def _change(made: mg.Explanation) -> float:
    assert made.reference_score is not None
    return made.score - made.reference_score


# ---------------------------------------------------------------------------------- whole cuts


@pytest.mark.parametrize("name", LEVELS)
def test_all_levels_of_a_unet_share_the_whole_score_out(name: str) -> None:
    made = _whole(name)
    change = _change(made)
    assert made.method == "secant"
    assert made.status == "complete"
    assert {part.layer for part in made.parts} == set(LEVELS[name])
    assert sum(part.net for part in made.parts) == pytest.approx(change, rel=1e-4)
    assert made.residual is not None
    assert abs(made.residual) <= 1e-4 * abs(change)
    assert made.sum_for - made.sum_against == pytest.approx(change, rel=1e-4)
    assert all(part.net != 0 for part in made.parts)


@pytest.mark.parametrize("name", LEVELS)
def test_the_map_lies_on_the_finest_level_s_cells(name: str) -> None:
    made = _whole(name)
    finest = min(part.jump for part in made.parts)
    assert made.cells.jump == finest
    assert made.cell_mm == pytest.approx(finest)
    assert made.evidence.shape == made.grid.shape == tuple(int(32 / j) for j in finest)


def test_a_part_is_what_the_layer_carries_alone() -> None:
    """The deepest level of a cut is the map of that level for itself."""
    alone = _explain("DynUNet", "bottleneck")
    part = next(p for p in _whole("DynUNet").parts if p.layer == "bottleneck")
    assert float(alone.evidence.sum(dtype=float)) == pytest.approx(part.net, rel=1e-5)


def test_the_order_of_the_names_and_blanks_do_not_matter() -> None:
    made = _explain("DynUNet", " + ".join(reversed(LEVELS["DynUNet"])))
    assert np.array_equal(made.evidence, _whole("DynUNet").evidence)
    assert made.parts == _whole("DynUNet").parts


def test_a_cut_costs_one_pair() -> None:
    assert _whole("UNet").cost_in_forwards <= 4.0


# ----------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("name", ["BasicUNet", "DynUNet"])
def test_a_cut_without_its_top_level_says_how_much_it_leaves_out(name: str) -> None:
    some = LEVELS[name][1:]
    made = _explain(name, "+".join(some))
    carried = sum(part.net for part in made.parts)
    assert made.status == "not_a_cut"
    assert made.bypassed == pytest.approx(1 - carried / _change(made), abs=1e-4)
    top = next(part for part in _whole(name).parts if part.layer == LEVELS[name][0])
    assert made.bypassed == pytest.approx(top.net / _change(made), abs=1e-4)
    (said,) = [words for words in made.warnings if "flows past" in words]
    assert all(layer in said for layer in some), "the whole cut is named"


@pytest.mark.parametrize("name", ["UNet", "DynUNet", "SegResNet"])
def test_the_bottleneck_of_a_unet_is_not_a_cut(name: str) -> None:
    made = _explain(name, LEVELS[name][-1])
    share = float(made.evidence.sum(dtype=float)) / _change(made)
    assert made.status == "not_a_cut"
    assert made.bypassed is not None
    assert made.bypassed == pytest.approx(1 - share, abs=1e-4)
    assert made.bypassed > 0.1
    assert any(f"{made.bypassed:.0%} of the score's difference" in w for w in made.warnings)
    assert made.residual == pytest.approx(made.bypassed * _change(made), rel=1e-3)


@pytest.mark.parametrize("past", [0.5, 2.0])
def test_the_share_that_passes_by_is_that_of_the_other_path(past: float) -> None:
    """Two paths add up to the score, so each one's share is known."""
    net = nets.made(lambda: nets.Skip(past))
    whole = mg.explain(nets.volume(), net, layer="layer+side")
    made = mg.explain(nets.volume(), net, layer="layer")
    other = mg.explain(nets.volume(), net, layer="side")
    sums = [float(e.evidence.sum(dtype=float)) for e in (made, other)]
    assert [part.net for part in whole.parts] == pytest.approx(sums, rel=1e-5, abs=1e-7)
    assert whole.status == "complete"
    assert sum(sums) == pytest.approx(_change(whole), rel=1e-4)
    assert (made.status, other.status) == ("not_a_cut", "not_a_cut")
    assert made.bypassed == pytest.approx(sums[1] / sum(sums), abs=1e-4)


def test_where_a_part_of_the_change_is_lost_integrated_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted fault: a rule that loses a tenth of what passes."""
    real = pair.Shared.evidence
    monkeypatch.setattr(pair.Shared, "evidence", lambda self, layer: 0.9 * real(self, layer))
    made = mg.explain(nets.volume(), nets.made(nets.gated), layer="first")
    assert made.method == "integrated"
    assert any("loses part of the change" in words for words in made.warnings)
    with pytest.raises(CannotExplainError, match="loses part of the change; name one layer"):
        mg.explain(nets.volume(), nets.made(nets.Skip), layer="layer+side")


# ------------------------------------------------------------------------ what cannot be a cut


def test_only_secant_shares_a_score_out_over_several_layers() -> None:
    for method in ("gradcam", "integrated"):
        with pytest.raises(UsageError, match=r"expected one layer .* got 2; only 'secant'"):
            mg.explain(nets.volume(), nets.made(nets.Skip), layer="layer+side", method=method)


def test_a_cut_needs_a_rule_for_every_operation() -> None:
    class Curl(nets.Skip):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stem = self.stem(x)
            both = torch.atan2(self.layer(stem), 1 + self.side(stem).square())
            out: torch.Tensor = self.head(both.mean(dim=(2, 3, 4)))
            return out

    with pytest.raises(CannotExplainError, match=r"atan2.*name one layer") as caught:
        mg.explain(nets.volume(), nets.made(Curl), layer="layer+side")
    assert caught.value.reason == "no rule"


def test_the_scan_itself_may_be_part_of_a_cut() -> None:
    """Of a layer and the scan before it, all goes through both: no part is told twice."""
    net = nets.made(nets.gated)
    one = mg.explain(nets.volume(), net, layer="@input")
    assert one.status == "complete"
    assert one.evidence.shape == (16, 16, 16)
    both = mg.explain(nets.volume(), net, layer="first+@input")
    assert both.status == "complete"
    assert sum(part.net for part in both.parts) == pytest.approx(_change(both), rel=1e-4)


# ------------------------------------------------------------------------- the automatic layer


@pytest.mark.parametrize("name", LEVELS)
def test_the_automatic_layer_is_a_cut_where_there_is_one(name: str) -> None:
    """Of BasicUNet the four coarsest candidates are none: the finer one is looked at, too."""
    made = _explain(name, "auto")
    assert made.status == "complete"
    refused = {trial.layer for trial in made.trials if trial.refused == "not a cut"}
    assert refused
    assert made.layer not in refused
    assert made.cost_in_forwards <= 20


def test_where_no_layer_is_a_cut_one_is_taken_and_told() -> None:
    class Past(nets.Skip):
        """A path from the input to the score that avoids all layers."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x) + x.mean(dim=(2, 3, 4))
            return out

    made = mg.explain(nets.volume(), nets.made(Past))
    assert made.status == "not_a_cut"
    assert made.bypassed is not None
    assert made.bypassed != 0


def test_without_the_paths_known_a_bottleneck_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: no path is seen to lead past a layer."""
    monkeypatch.setattr(Tape, "passes_by", lambda self, layers: False)
    made = _explain("UNet", "model.1.submodule.1.submodule.1")
    assert made.method == "integrated", "the loss is seen, and another method takes over"


# --------------------------------------------------------------------- what is no volumetric layer


def test_the_residual_stream_of_a_transformer_is_complete_at_every_block() -> None:
    """Tokens are no cells, so this goes through the pair itself."""
    torch.manual_seed(0)
    net = architectures.monai_networks().ViT(
        1, (16, 16, 16), (8, 8, 8), 24, 48, 3, 2, classification=True, num_classes=3
    )
    net.eval()
    layers = ["patch_embedding", "blocks.0", "blocks.1", "blocks.2", "norm"]
    x, other = (nets.batch(nets.scan(seed=seed)) for seed in (0, 5))

    def choose(_: Any) -> Any:
        return lambda output: output[0][:, 1]

    with at_rest(net):
        here, there = (pair.run(net, layers, one, choose) for one in (x, other))
        change = float(here.score - there.score)
        shared = pair.share(here, there, layers)
    for layer in layers:
        assert not shared.past[layer]
        a, b = (run.activations[layer].double() for run in (here, there))
        total = float(((a - b) * shared.multipliers[layer].double()).sum())
        assert total == pytest.approx(change, rel=1e-4), layer


def test_each_token_of_a_linear_head_has_its_own_share() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(64, 5), nn.Linear(5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.embed(x.reshape(1, 8, 64)).sum(1))
            return out

    net = nets.made(Tokens)
    with at_rest(net):
        here, there = (
            pair.run(net, ["embed"], nets.batch(nets.scan(8, seed)), lambda _: nets.score_of())
            for seed in (0, 5)
        )
        shared = pair.share(here, there, ["embed"])
    change = here.activations["embed"] - there.activations["embed"]
    wanted = change @ nets.weight(net, "head")[0]
    made = (change * shared.multipliers["embed"]).sum(-1)
    assert torch.allclose(made, wanted, rtol=1e-5, atol=1e-7)
