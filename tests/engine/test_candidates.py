"""Does auto look at cuts, with more behind them than single cells, as the graph says?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import flow, layers
from med_gradcam.errors import CannotExplainError
from med_gradcam.graph import LayerInfo, Trace, trace
from med_gradcam.layers import candidates, passed_over
from med_gradcam.model import InputSpec, Model
from med_gradcam.secant import pair
from med_gradcam.tail import at_rest
from tests.engine import architectures, nets


def _names(net: nn.Module, size: int) -> list[str]:
    return [i.name for i in candidates(Model(net, InputSpec()), trace(net, (1, size, size, size)))]


def _info(net: nn.Module, name: str, size: int = 16) -> LayerInfo:
    info = trace(net, (1, size, size, size)).find(name)
    assert info is not None
    return info


def _meshnet() -> nn.Module:
    """Dilated convolutions at one resolution, a 1x1x1 convolution at the end."""
    blocks: list[nn.Module] = []
    for n, dilation in enumerate((1, 2, 4, 2, 1)):
        inside = 5 if n else 1
        blocks += [
            nn.Conv3d(inside, 5, 3, padding=dilation, dilation=dilation),
            nn.BatchNorm3d(5),
            nn.ReLU(),
        ]
    return nn.Sequential(*blocks, nn.Conv3d(5, 3, 1))


# -------------------------------------------------------------------------------- MONAI's networks

WANTED = {
    "resnet18": (32, ["layer4", "layer3", "layer2", "layer1"]),
    "resnet50": (32, ["layer4", "layer3", "layer2", "layer1"]),
    "SEResNet50": (96, ["layer4", "layer3", "layer2", "layer1"]),
    "DenseNet121": (
        64,
        ["class_layers.relu", *(f"features.transition{n}.conv" for n in (3, 2, 1))],
    ),
    "BasicUNet": (32, ["conv_0"]),
    "UNet": (32, ["model.0"]),
    "SegResNet": (32, ["down_layers.0"]),
    "DynUNet": (32, ["input_block"]),
    "VNet": (32, ["in_tr"]),
}


@pytest.mark.parametrize("name", WANTED)
def test_the_candidates_of_monai_s_networks_are_the_last_cut_of_each_resolution(name: str) -> None:
    size, wanted = WANTED[name]
    assert _names(architectures.made(name), size) == wanted


def _vit() -> Any:
    return architectures.monai_networks().ViT(
        1, (16, 16, 16), (8, 8, 8), 24, 48, 3, 2, classification=True, num_classes=3
    )


def _attention_unet() -> Any:
    return architectures.monai_networks().AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2))


def test_of_other_networks_too() -> None:
    embedding = "patch_embedding.patch_embeddings"  # behind blocks.2 only the class token is read
    assert _names(nets.made(_vit), 16) == ["blocks.1", "blocks.0", "patch_embedding", embedding]
    assert _names(nets.made(_attention_unet), 16) == ["model.0"]
    assert _names(nets.made(_meshnet), 16) == ["5"]


# ------------------------------------------------------------------------------- paths past a layer


def _whole(output: Any) -> list[Any]:
    """The sum of all that the network puts out, as a score."""

    def score(out: Any) -> torch.Tensor:
        first = out[0] if isinstance(out, (list, tuple)) else out
        total: torch.Tensor = first.flatten(1).sum(1)
        return total

    return [score]


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("BasicUNet", 32), ("UNet", 16), ("SegResNet", 16), ("DynUNet", 16)],
)
def test_the_graph_on_shapes_says_of_every_layer_what_the_tape_of_a_real_run_says(
    name: str, size: int
) -> None:
    net = architectures.made(name)
    traced = trace(net, (1, size, size, size))
    once = [info for info in traced.layers if info.runs == 1 and info.context > 0]
    with at_rest(net):
        (run,) = pair.run_all(net, [i.name for i in once], nets.batch(nets.scan(size)), _whole)
    told = {info.name: info.past for info in once}
    assert told == {info.name: run.tape.passes_by([info.name]) for info in once}
    assert set(told.values()) == {False, True}


class InPlace(nn.Module):
    """What is written in place, through a view or into a buffer is seen to lead on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.layer = nets.conv(1, 4, 2), nets.conv(4, 4)
        self.head, self.how = nets.Pooled(4), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu_(self.stem(x))
        layer = self.layer(stem)
        if self.how == "buffer":
            buffer = stem.new_zeros(stem.shape)
            buffer[:, :2] = layer[:, :2]
            buffer[:, 2:] = layer[:, 2:]
        elif self.how == "past":
            buffer = stem.new_zeros(stem.shape)
            buffer[:, :2] = layer[:, :2]
            buffer[:, 2:] = stem[:, 2:]
        elif self.how == "view":
            buffer = torch.zeros_like(stem)
            buffer.flatten(2).add_(layer.flatten(2))
        else:
            buffer = torch.cat(layer.chunk(2, 1)[::-1], 1)
        out: torch.Tensor = self.head(buffer)
        return out


@pytest.mark.parametrize(
    ("how", "past"), [("buffer", False), ("past", True), ("view", False), ("chunk", False)]
)
def test_what_is_written_in_place_or_through_a_view_is_followed(how: str, past: bool) -> None:
    net = nets.made(lambda: InPlace(how))
    assert _info(net, "layer").past == past
    assert not _info(net, "stem").past


METHODS = ("secant", "integrated", "gradcam", "hirescam")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_cut_of_a_unet_and_names_what_it_passed_over(
    method: str, quick: bool
) -> None:
    net = nets.made(_attention_unet)
    made = mg.explain(nets.volume(), net, target=1, method=method, quick=quick)
    assert made.layer == "model.0"
    assert made.status == ("complete" if method in METHODS[:2] else "no_sum")
    wanted = ("model.1.submodule.1.submodule", "not a cut")
    assert wanted in [(t.layer, t.refused) for t in made.trials]


class NoCut(nn.Module):
    """Two levels, each with a path past it, from the input on."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nets.conv(1, 4, 2), nets.conv(4, 4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = torch.relu(self.fine(x))
        both = torch.relu(self.coarse(fine)).mean((2, 3, 4)) + fine.mean((2, 3, 4))
        out: torch.Tensor = self.head(both + x.mean((2, 3, 4)))
        return out


@pytest.mark.parametrize("method", METHODS)
def test_where_no_layer_is_a_cut_quick_takes_the_finest_and_says_so(method: str) -> None:
    made = mg.explain(nets.volume(), nets.made(NoCut), target=0, method=method, quick=True)
    assert made.layer == "fine"
    (said,) = [w for w in made.warnings if w.startswith("no layer is a cut here")]
    assert "--layer @input" in said
    assert any("the finest layer was taken untested" in w for w in made.warnings)
    if method == "secant":
        assert made.status == "not_a_cut"
        assert made.bypassed


def test_without_the_dominators_the_bottleneck_would_be_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted fault: every value is said to be on all paths."""
    monkeypatch.setattr(
        flow.Flow, "cuts", lambda self, ends: frozenset(range(len(self.made))), raising=True
    )
    found = _names(nets.made(_attention_unet), 16)
    assert found[0] == "model.1.submodule.1.submodule"


# ------------------------------------------------------------- layers that are no more than logits


def _sees_only_itself(net: nn.Module, name: str, size: int) -> bool:
    """Whether a change of one cell changes that place alone; norms move all others a little."""
    at = (size // 2,) * 3
    kicked = torch.zeros((size,) * 3)
    kicked[at] = 1.0

    def kick(module: nn.Module, inputs: object, out: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return out + kicked if out.shape[2:] == kicked.shape else out

    x = nets.batch(nets.scan(size))
    with torch.no_grad():
        before = net(x)
        handle = net.get_submodule(name).register_forward_hook(kick)
        after = net(x)
        handle.remove()
    moved = (after - before).abs().amax((0, 1))
    own = float(moved[at])
    moved[at] = 0.0
    return float(moved.max()) < 0.02 * own


@pytest.mark.parametrize("maker", [_meshnet, _attention_unet])
def test_a_layer_is_pointwise_exactly_where_a_kick_stays_in_its_place(
    maker: Callable[[], nn.Module],
) -> None:
    net = nets.made(maker)
    fine = [i for i in trace(net, (1, 16, 16, 16)).layers if i.shape[1:] == (16, 16, 16)]
    told = {i.name: i.pointwise for i in fine}
    assert told == {i.name: _sees_only_itself(net, i.name, 16) for i in fine}
    assert set(told.values()) == {False, True}


def _outside(made: mg.Explanation, mask: np.ndarray[Any, Any]) -> float:
    size = np.abs(mg.draw(made).signed.values).astype(float)
    return float(size[~mask].sum() / size.sum())


def _mask(size: int) -> np.ndarray[Any, Any]:
    mask = np.zeros((size,) * 3, dtype=bool)
    mask[(slice(size // 3, size // 3 + size // 4),) * 3] = True
    return mask


def _basic_unet() -> Any:
    monai = architectures.monai_networks()
    return monai.BasicUNet(3, 1, 3, features=(4, 4, 8, 8, 8, 4))


@pytest.mark.parametrize(
    ("maker", "size", "late"), [(_basic_unet, 32, "upcat_1"), (_meshnet, 16, "14")]
)
def test_auto_shows_what_lies_outside_the_region_and_a_late_layer_says_that_it_cannot(
    maker: Callable[[], nn.Module], size: int, late: str
) -> None:
    net, mask = nets.made(maker), _mask(size)
    auto = mg.explain(nets.volume(size), net, target=(1, mask))
    input_ = mg.explain(nets.volume(size), net, target=(1, mask), layer="@input")
    assert auto.status == "complete"
    assert _outside(auto, mask) > 0.5 * _outside(input_, mask) > 0.2
    named = mg.explain(nets.volume(size), net, target=(1, mask), layer=late)
    assert _outside(named, mask) < 1e-6
    words = f"behind the layer {late!r} each cell only sees itself"
    assert len([w for w in named.warnings if words in w]) == 1
    assert not any("only sees itself" in w for w in (*auto.warnings, *input_.warnings))


def test_of_targets_from_one_pair_each_says_it() -> None:
    net = nets.made(_meshnet)
    mask = _mask(16)
    wanted: Any = [(0, mask), (1, mask)]
    made = mg.explain_many([nets.volume()], net, target=wanted, layer="14")
    assert len(made) == 2
    for e in made:
        assert len([w for w in e.warnings if "only sees itself" in w]) == 1


def test_where_all_layers_are_pointwise_the_input_is_taken() -> None:
    net = nets.made(lambda: nn.Sequential(nets.conv(1, 4), nn.ReLU(), nn.Conv3d(4, 3, 1)))
    mask = _mask(12)
    made = mg.explain(nets.volume(12), net, target=(1, mask))
    assert (made.layer, made.status) == ("@input", "complete")
    assert _outside(made, mask) > 0.1
    with pytest.raises(CannotExplainError, match="name the layer beside the input"):
        mg.explain(nets.volume(12), net, target=(1, mask), method="guided_gradcam")


def test_little_context_is_better_than_none() -> None:
    """One convolution behind the layer is all there is in this decoder."""
    net = nets.made(
        lambda: nn.Sequential(nets.conv(1, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2, 2))
    )
    assert _info(net, "1").context < layers.HALF
    assert _names(net, 8) == ["1"]


def test_a_gate_or_a_statistic_is_no_look_aside() -> None:
    net = nets.made(
        lambda: nn.Sequential(
            nets.conv(1, 6), nn.ReLU(), nets.conv(6, 6), nets.Gate(6), nn.Conv3d(6, 3, 1)
        )
    )
    assert [_info(net, n).pointwise for n in "0123"] == [False, False, True, True]
    assert _names(net, 16) == ["1"]


def test_a_classifier_has_no_pointwise_layers() -> None:
    net = nets.made(nets.pooled_linear)
    assert all((i.context, i.pointwise) == (1.0, False) for i in _traced(net).layers)


def _traced(net: nn.Module) -> Trace:
    return trace(net, (1, 16, 16, 16))


def test_the_author_s_layers_are_kept_but_for_those_that_say_nothing() -> None:
    net = nets.made(_attention_unet)
    deep, first, last = "model.1.submodule.1.submodule", "model.0", "model.1"
    for own, wanted in (
        ({"a": deep, "b": first}, [first]),
        ({"a": deep}, [deep]),
        ({"a": last, "b": deep}, [deep]),
    ):
        model = Model(net, InputSpec(), aliases=own)
        assert [i.name for i in candidates(model, _traced(net))] == wanted, own
    model = Model(net, InputSpec(), aliases={"a": deep, "b": first})
    assert passed_over(model, _traced(net)) == [(deep, "not a cut")]


# ------------------------------------------------------- maps of logits behind a row of scores


class Boxed(nn.Module):
    """The logits of a segmentation network summed over a box: a row of scores."""

    def __init__(self, *, pointwise: bool = True) -> None:
        super().__init__()
        self.first, self.mixed = nets.conv(1, 6), nn.Sequential(nets.conv(6, 8), nn.ReLU())
        self.wide = nn.Sequential(nets.conv(8, 8), nn.ReLU())
        self.last = nn.Conv3d(8, 3, 1) if pointwise else nets.conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.last(self.wide(self.mixed(torch.relu(self.first(x)))))
        return torch.as_tensor(logits[:, :, 4:12, 4:12, 4:12].flatten(2).sum(-1))


@pytest.mark.parametrize("pointwise", [True, False])
def test_logits_that_are_summed_over_a_box_are_no_layer(*, pointwise: bool) -> None:
    net = nets.made(lambda: Boxed(pointwise=pointwise))
    found = trace(net, (1, 16, 16, 16))
    assert {i.name for i in found.layers if i.logits} == {"last"}
    wide = found.find("wide")
    assert wide is not None
    assert wide.pointwise is pointwise
    made = mg.explain(nets.volume(), net, target=1)
    assert made.layer not in ("last", "wide" if pointwise else "last")


def test_a_coarse_map_of_logits_is_no_layer_but_what_it_is_made_of_is() -> None:
    """Class activation maps: a map per class, averaged."""
    net = nets.made(
        lambda: nn.Sequential(
            nets.conv(1, 6, 2), nn.ReLU(), nets.conv(6, 8, 2), nn.ReLU(), nn.Conv3d(8, 3, 1),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        )
    )  # fmt: skip
    found = trace(net, (1, 16, 16, 16))
    assert [i.name for i in found.layers if i.logits] == ["4"]
    names = [i.name for i in layers.candidates(mg.Model(net, InputSpec(channels=1)), found)]
    assert names[0] in ("2", "3")
    assert "4" not in names


def test_as_many_channels_as_scores_are_no_logits_where_weights_follow() -> None:
    net = nets.made(lambda: nets.Body(nets.Pooled(3, 3), channels=3))
    assert not any(i.logits for i in trace(net, (1, 16, 16, 16)).layers)
