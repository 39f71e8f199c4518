"""Transformers: where tokens' cells lie, what class tokens take along, which layers are tried."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import observe
from med_gradcam.capture import capture
from med_gradcam.errors import CannotExplainError
from med_gradcam.graph import trace
from med_gradcam.layers import candidates
from med_gradcam.model import InputSpec, Model
from med_gradcam.tail import at_rest
from tests.engine import architectures, nets
from tests.engine.transformers import Vit

SIDES = (8, 12, 16)
PLAIN = {
    "fused": Vit,
    "by hand": lambda: Vit(fused=False),
    "no registers": lambda: Vit(registers=0),
    "class token last": lambda: Vit(behind=True),
}


def _scan(seed: int = 0, sides: tuple[int, ...] = SIDES) -> torch.Tensor:
    return torch.randn(1, 1, *sides, generator=torch.Generator().manual_seed(seed))


def _monai(name: str, **settings: Any) -> nn.Module:
    networks = architectures.monai_networks()
    return nets.made(lambda: getattr(networks, name)(**settings))


def _vit(**settings: Any) -> nn.Module:
    shape = {"in_channels": 1, "img_size": (16, 24, 32), "patch_size": (8, 8, 8)}
    size = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 3, "num_heads": 2}
    return _monai("ViT", **{**shape, **size, "post_activation": "none", **settings})


# ------------------------------------------------------------------------------------ the cells


@pytest.mark.parametrize("kind", ["conv", "perceptron"])
def test_cells_of_patches_lie_in_the_middle_of_their_patch(kind: str) -> None:
    """A patch of p voxels from p i on has its centre at p i + (p - 1) / 2."""
    net = _vit(classification=True, num_classes=2, proj_type=kind)
    found = mg.explain(_scan(sides=(16, 24, 32)).numpy(), net, layer="blocks.1")
    assert found.evidence.shape == (2, 3, 4)
    assert (found.cells.how, found.cells.uncertainty_voxels) == ("exact", None)
    assert (found.cells.start, found.cells.jump) == ((3.5,) * 3, (8.0,) * 3)


@pytest.mark.parametrize("cell", [(0, 0, 0), (1, 2, 0), (0, 1, 3)])
def test_a_changed_patch_changes_its_own_cell_of_the_embedding(cell: tuple[int, ...]) -> None:
    """By the values themselves, not by the recursion or the probe."""
    net = _vit(classification=True, num_classes=2)
    sides, changed = (16, 24, 32), _scan(sides=(16, 24, 32))
    i, j, k = (slice(8 * n, 8 * n + 8) for n in cell)
    changed[0, 0, i, j, k] += 1.0
    trace(net, (1, *sides))
    before, after = (
        capture(net, "patch_embedding", x, lambda _: lambda out: out[0][:, 0])[1].activation
        for x in (_scan(sides=sides), changed)
    )
    moved = (after - before).abs().amax(0)
    assert torch.nonzero(moved).tolist() == [[*cell]]


def test_blocks_of_a_swin_transformer_with_channels_last() -> None:
    """The same numbers once with channels last and once first: one map."""
    net = architectures.made("SwinUNETR")
    x = nets.scan(64)
    last, first = "swinViT.layers1.0.downsample", "swinViT.layers1.0"
    one, other = (mg.explain(x, net, layer=name, method="hirescam") for name in (last, first))
    assert one.evidence.shape == (16, 16, 16)
    assert np.array_equal(one.evidence, other.evidence)
    assert one.cells == other.cells
    block = mg.explain(x, net, layer="swinViT.layers2.0.blocks.1", quick=True)
    assert (block.evidence.shape, block.cells.jump) == ((16, 16, 16), (4.0,) * 3)
    assert block.cells.how == "exact"


def test_the_tokens_of_unetr_and_of_an_autoencoder() -> None:
    unetr = _monai(
        "UNETR", in_channels=1, out_channels=2, img_size=(32, 32, 32), feature_size=4,
        hidden_size=24, mlp_dim=32, num_heads=2,
    )  # fmt: skip
    found = mg.explain(nets.scan(32), unetr, layer="vit.blocks.5")
    assert (found.evidence.shape, found.cells.start) == ((2, 2, 2), (7.5,) * 3)
    assert found.status == "not_a_cut"  # the skips lead past it
    encoder = _monai(
        "ViTAutoEnc", in_channels=1, img_size=(16, 16, 16), patch_size=(4, 4, 4), hidden_size=24,
        mlp_dim=32, num_layers=2, num_heads=2,
    )  # fmt: skip
    box = "#0@box:ijk:8,8,8:4"
    found = mg.explain(nets.scan(16), encoder, layer="blocks.0", link="none", target=box)
    assert (found.status, found.evidence.shape) == ("complete", (4, 4, 4))
    assert float(found.evidence.sum()) == pytest.approx(
        found.score - (found.reference_score or 0.0), rel=1e-4
    )


# ------------------------------------------------------------------- tokens without a place


@pytest.mark.parametrize("how", PLAIN)
def test_cells_and_class_tokens_together_are_the_score_s_change(how: str) -> None:
    net = nets.made(PLAIN[how])
    x, other = _scan(), _scan(1)
    traced = trace(net, x.shape[1:])
    names = ["patch", "blocks.0", "blocks.1", "blocks.2", "norm"]
    with at_rest(net):
        (seen,) = observe.paired(net, names, (x, other), lambda _: [nets.score_of(1)], traced)
        change = float((net(x) - net(other))[0, 1])
    for name in names:
        shared = seen.found[name].shared
        assert shared is not None
        assert not shared.avoided[name]
        whole = float(shared.evidence(name).sum()) + shared.beside.get(name, 0.0)
        assert whole == pytest.approx(change, rel=1e-4)
        assert (name in shared.beside) == (name != "patch")
        capture_ = seen.found[name]
        again = capture_.tail.scores(capture_.activation[None], nets.score_of(1))
        assert float(again[0]) == pytest.approx(capture_.score, abs=1e-6)
    assert abs(seen.found["blocks.1"].shared.beside["blocks.1"]) > 1e-3 * abs(change)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["secant", "integrated"])
def test_the_share_of_the_class_token_is_told(method: str) -> None:
    net = nets.made(Vit)
    found = mg.explain(_scan().numpy(), net, layer="blocks.1", method=method)
    change = found.score - (found.reference_score or 0.0)
    assert found.status == "not_a_cut"
    assert found.bypassed is not None
    assert float(found.evidence.sum()) + found.bypassed * change == pytest.approx(change, rel=0.02)
    embedded = mg.explain(_scan().numpy(), net, layer="patch", method=method)
    assert embedded.status == "complete"


def test_a_tail_keeps_the_class_token_of_the_scan() -> None:
    """The score at the reference's cells, with the scan's own class and register tokens."""
    net = nets.made(Vit)
    x, other = _scan(), _scan(1)
    trace(net, x.shape[1:])
    raw: dict[str, torch.Tensor] = {}
    hook = net.get_submodule("blocks.1").register_forward_hook(
        lambda _m, _i, out: raw.update({str(len(raw)): out})
    )
    with torch.no_grad():
        net(x), net(other)
    hook.remove()
    mixed = torch.cat([raw["0"][:, :3], raw["1"][:, 3:]], 1)
    with torch.no_grad():
        wanted = net.head(net.norm(net.blocks[2](mixed))[:, 0])[0]  # type: ignore[operator,index]
    found, there = (nets.captured(net, "blocks.1", one) for one in (x, other))
    for index in range(3):
        score = nets.score_of(index)
        assert float(found.tail.scores(there.activation[None], score)[0]) == pytest.approx(
            float(wanted[index]), abs=1e-6
        )


@pytest.mark.parametrize("read", ["class", "mean", "both", "first"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_what_only_the_class_token_is_read_of_is_known_without_a_run(
    read: str, fused: bool, behind: bool
) -> None:
    """The graph on shapes says of every layer whether the gradient at its cells is zero."""
    net = nets.made(lambda: Vit(read, fused=fused, behind=behind))
    x = _scan()
    silent = set()
    for info in trace(net, x.shape[1:]).layers:
        try:
            _, found = capture(net, info.name, x, lambda _: lambda out: out[:, 0])
            zero = not bool(found.gradient().any())
        except CannotExplainError as error:
            zero = error.reason == "zero gradient"
        assert info.silent == zero, info.name
        silent |= {info.name} if zero else set()
    assert ("norm" in silent) == (read == "class")
    assert "blocks.1" not in silent


def test_attention_that_torch_fuses_on_a_real_run_looks_at_all_tokens() -> None:
    """Where a network needs values, it is followed on zeros, with the operations of the machine."""

    class Reads(Vit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = float(x.sum())  # which shapes alone cannot tell
            return super().forward(x)

    infos = trace(nets.made(Reads), (1, *SIDES)).layers
    assert {i.name for i in infos if i.silent} >= {"norm", "blocks.2"}
    assert not any(i.silent for i in infos if i.name.startswith(("patch", "blocks.0", "blocks.1")))


def test_a_layer_of_which_only_the_class_token_is_read_is_refused() -> None:
    net = nets.made(Vit)
    with pytest.raises(CannotExplainError, match="only tokens without a place") as caught:
        mg.explain(_scan().numpy(), net, layer="blocks.2")
    assert caught.value.reason == "class token"


def test_fast_is_refused_where_a_class_token_comes_along() -> None:
    net = nets.made(Vit)
    with pytest.raises(CannotExplainError, match="run it without --fast"):
        mg.explain(_scan().numpy(), net, layer="blocks.1", fast=True)
    found = mg.explain(_scan().numpy(), net, layer="patch", fast=True)
    assert found.status == "complete"


# ----------------------------------------------------------------------------- what is tried


def _tried(net: nn.Module, sides: tuple[int, ...] = SIDES) -> list[str]:
    return [i.name for i in candidates(Model(net, InputSpec()), trace(net, (1, *sides)))]


def test_auto_tries_a_transformer_at_several_depths() -> None:
    assert _tried(nets.made(Vit)) == ["blocks.1", "blocks.0", "patch"]
    assert _tried(nets.made(lambda: Vit("mean"))) == ["norm", "blocks", "blocks.1", "patch"]
    large = _vit(classification=True, num_classes=2, num_layers=6)
    embedding = "patch_embedding.patch_embeddings"
    assert _tried(large, (16, 24, 32)) == ["blocks.4", "blocks.3", "blocks.1", embedding]


def test_auto_takes_what_the_causal_test_says() -> None:
    net = nets.made(lambda: Vit("mean"))
    found = mg.explain(_scan().numpy(), net)
    slopes = {t.layer: t.slope for t in found.trials if t.slope is not None}
    assert found.layer in slopes
    assert {t.layer for t in found.trials} == {"norm", "blocks", "blocks.1", "patch"}
    near = min(slopes.values(), key=lambda slope: abs(slope - 1))
    assert abs(slopes[found.layer] - 1) <= abs(near - 1) + 0.1


def test_a_norm_over_channels_is_no_trap_and_one_over_tokens_is() -> None:
    """LayerNorm of tokens (1, N, C) takes no channel's mean over places."""

    class Normed(nn.Module):
        def __init__(self, *, over_tokens: bool) -> None:
            super().__init__()
            self.patch, self.over = nn.Conv3d(1, 6, 4, 4), over_tokens
            self.layer, self.norm = nn.Tanh(), nn.LayerNorm(24 if over_tokens else 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch(x).flatten(2)
            x = self.norm(self.layer(x if self.over else x.transpose(1, 2)))
            x = torch.tanh(x)
            out: torch.Tensor = self.head(x.mean(2 if self.over else 1))
            return out

    for over in (True, False):
        net = nets.made(partial(Normed, over_tokens=over))
        info = trace(net, (1, *SIDES)).find("layer")
        assert info is not None
        assert info.feeds_norm == over


def test_the_network_is_left_as_it_was() -> None:
    net = nets.made(Vit)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    mg.explain(_scan().numpy(), net, layer="blocks.0", method="integrated")
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in net.modules())
