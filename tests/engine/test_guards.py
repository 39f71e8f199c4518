"""Is a map refused, with the reason, wherever it would be a picture of nothing?"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.capture import check_norm_trap
from med_gradcam.errors import CannotExplainError, ModelError, ResourceError, UnknownNameError
from med_gradcam.graph import trace
from med_gradcam.methods import Bound, gradcam, hirescam
from med_gradcam.model import InputSpec, Model
from tests.engine import nets

METHODS = ("integrated", "gradcam", "hirescam")
BY_MEANS = ("gradcam", "xgradcam", "shapleycam")  # channels weighted by the mean of their gradient


class Trapped(nn.Module):
    """`layer` feeds straight into `norm`."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nets.conv(1, 6, 2)
        self.norm = nn.InstanceNorm3d(6) if norm is None else norm
        self.act, self.more = nn.LeakyReLU(), nets.conv(6, 6, 2)
        self.last, self.head = nn.ReLU(), nets.Pooled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.last(self.more(self.act(self.norm(self.layer(x))))))
        return out


def _explain(net: nn.Module, method: str = "integrated", layer: str = "layer") -> mg.Explanation:
    return mg.explain(
        nets.volume(), net, layer=layer, method=method, target=0, reference=nets.volume(seed=5)
    )


def _reason(net: nn.Module, method: str = "integrated", layer: str = "layer") -> tuple[str, str]:
    with pytest.raises(CannotExplainError, match=r".") as caught:
        _explain(net, method, layer)
    return caught.value.reason, str(caught.value)


# ---------------------------------------------------------------------------------- the norm trap


@pytest.mark.parametrize("method", BY_MEANS)
@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm3d(6),
        nn.InstanceNorm3d(6, affine=True),
        nn.GroupNorm(6, 6),
        nn.LayerNorm([8, 8, 8]),
        nn.BatchNorm3d(6, track_running_stats=False),
    ],
)
def test_a_layer_straight_before_a_norm_is_refused_by_name(method: str, norm: nn.Module) -> None:
    reason, message = _reason(nets.made(lambda: Trapped(norm)), method)
    assert reason == "norm trap"
    assert "feeds straight into an Instance, Group or LayerNorm" in message
    assert "--layer auto" in message


NO_TRAP: list[Callable[[], nn.Module]] = [
    lambda: nn.InstanceNorm3d(6, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(2, 6),
    lambda: nn.GroupNorm(1, 6),
    lambda: nn.RMSNorm([8, 8, 8]),
    lambda: ChannelNorm(6),
]


class ChannelNorm(nn.Module):
    """A LayerNorm over the channels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return out


@pytest.mark.parametrize("method", ["secant", *METHODS, *BY_MEANS[1:]])
@pytest.mark.parametrize("norm", range(len(NO_TRAP)))
def test_a_norm_that_leaves_each_channel_s_mean_is_no_trap(method: str, norm: int) -> None:
    """Stored statistics, groups of several channels, root mean squares, norms over channels."""
    net = nets.made(lambda: Trapped(NO_TRAP[norm]()))
    info = trace(net, (1, 16, 16, 16)).find("layer")
    assert info is not None
    assert not info.feeds_norm
    gradient = nets.captured(net, "layer", nets.batch(nets.scan())).gradient().double()
    weights = gradient.mean(dim=(1, 2, 3)).abs().max()
    assert float(weights) > 1e-4 * float(gradient.abs().mean(dim=(1, 2, 3)).max())
    assert _explain(net, method).layer == "layer"


@pytest.mark.parametrize("method", BY_MEANS)
def test_a_trap_that_only_the_numbers_show_is_refused(method: str) -> None:
    """A norm written by hand: no operation of that name, but the weights are rounding noise."""

    class ByHand(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean(dim=(2, 3, 4), keepdim=True)
            return (x - mean) / (((x - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt()

    net = nets.made(lambda: Trapped(ByHand()))
    info = trace(net, (1, 16, 16, 16)).find("layer")
    assert info is not None
    assert not info.feeds_norm
    reason, message = _reason(net, method)
    assert reason == "norm trap"
    assert "what follows the layer 'layer' removes each channel's mean" in message


@pytest.mark.parametrize("feeds", [False, True])
def test_the_numbers_decide_and_agree_with_the_sentence(feeds: bool) -> None:
    """No layer is called a trap whose largest weight is no rounding noise beside the gradient."""
    plain = nets.captured(nets.made(nets.gated), "first", nets.batch(nets.scan()))
    check_norm_trap(plain, feeds_norm=feeds)
    trapped = nets.captured(nets.made(Trapped), "layer", nets.batch(nets.scan()))
    with pytest.raises(CannotExplainError, match="every Grad-CAM weight is zero") as caught:
        check_norm_trap(trapped, feeds_norm=feeds)
    said = re.search(r"largest weight (\S+), mean size of the gradient (\S+)\)", str(caught.value))
    assert said is not None
    assert float(said[1]) < 1e-5 * float(said[2])


@pytest.mark.parametrize("method", ["secant", "integrated", "hirescam"])
def test_a_norm_behind_the_layer_is_no_trap_for_methods_without_channel_means(method: str) -> None:
    made = _explain(nets.made(Trapped), method)
    balanced = "balanced_by_construction" in made.notices
    assert balanced == (method == "hirescam")
    if method != "hirescam":
        assert made.status == "complete"


def test_guided_gradcam_is_refused_where_its_gradcam_is_noise() -> None:
    net = nets.made(Trapped)
    net.register_module("act", nn.ReLU())  # it knows no other rectifier
    assert _reason(net, "guided_gradcam")[0] == "norm trap"
    assert _explain(net, "guided_gradcam", "act").evidence.any()


def test_behind_instance_norm_both_classic_maps_are_rounding_noise() -> None:
    """Why the trap is refused: Grad-CAM's weights are zero, and HiResCAM's for equals against."""
    capture = nets.captured(nets.made(Trapped), "layer", nets.batch(nets.scan()))
    loose = Bound(float("inf"), 0.0)
    size = float(capture.gradient().abs().mean(dim=(1, 2, 3)).max())
    assert float(capture.gradient().mean(dim=(1, 2, 3)).abs().max()) < 1e-6 * size
    hires = hirescam.evidence(capture, loose).values
    assert abs(float(hires.sum())) < 1e-4 * float(hires.abs().sum())
    assert float(gradcam.evidence(capture, loose).values.abs().max()) < 1e-5 * float(
        hires.abs().max()
    )
    with pytest.raises(CannotExplainError, match="largest weight"):
        check_norm_trap(capture, feeds_norm=False)


@pytest.mark.parametrize("layer", ["norm", "act", "more", "last"])
def test_layers_that_do_not_feed_a_norm_are_taken(layer: str) -> None:
    assert _explain(nets.made(Trapped), layer=layer).layer == layer


def test_batch_norm_in_eval_mode_is_no_trap() -> None:
    assert _explain(nets.made(lambda: Trapped(nn.BatchNorm3d(6)))).layer == "layer"


def test_a_layer_that_feeds_a_norm_and_something_else_is_no_trap() -> None:
    class Split(Trapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.layer(x)
            both = torch.add(input=self.norm(layer), other=layer)
            out: torch.Tensor = self.head(torch.relu(self.more(both)))
            return out

    assert _explain(nets.made(Split)).layer == "layer"


class TrappedLast(nn.Module):
    """The last layer of the coarse resolution is the trap."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU())
        self.coarse, self.head = nets.conv(6, 6, 2), nets.Pooled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.instance_norm(self.coarse(self.fine(x)))
        out: torch.Tensor = self.head(torch.relu(normed))
        return out


@pytest.mark.parametrize("method", BY_MEANS[:2])
def test_auto_passes_a_trap_over_and_names_it(method: str) -> None:
    made = _explain(nets.made(TrappedLast), method, "auto")
    assert made.layer == "fine"
    assert ("coarse", "norm trap") in [(t.layer, t.refused) for t in made.trials]
    assert "layer 'coarse' was passed over: norm trap" in made.warnings


def test_auto_refuses_when_no_candidate_passes() -> None:
    net = nets.made(TrappedLast)
    model = Model(net, InputSpec(), aliases={"deep": "coarse"}, weights_sha256="0")
    with pytest.raises(CannotExplainError, match=r"norm"):
        mg.explain(nets.volume(), model, target=0, method="gradcam")


def test_guards_are_what_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: without the trap's guard the same call paints noise."""
    monkeypatch.setattr("med_gradcam.case.check_norm_trap", lambda *_a, **_k: None)
    made = _explain(nets.made(Trapped), "gradcam")
    honest = _explain(nets.made(Trapped), "hirescam")
    assert 0 < np.abs(made.evidence).max() < 1e-5 * np.abs(honest.evidence).max()


# ------------------------------------------------------------------------- dead, broken, constant


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_influence_is_refused(method: str) -> None:
    class Dead(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.layer, self.other, self.head = (
                nets.conv(1, 6, 2),
                nets.conv(1, 6, 2),
                nets.Pooled(),
            )
            self.how = how

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.layer(x)
            if self.how == "times zero":
                out: torch.Tensor = self.head(self.other(x) + 0.0 * layer)
            else:
                out = self.head(self.other(x))
            return out

    for how in ("times zero", "unused"):
        reason, message = _reason(nets.made(lambda how=how: Dead(how)), method)  # type: ignore[misc]
        assert reason == "zero gradient", how
        assert "does not depend on the layer 'layer'" in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["layer", "auto"])
def test_broken_weights_are_refused(method: str, bad: float, layer: str) -> None:
    net = nets.made(Trapped)
    nets.weight(net, "head.head")[0, 0] = bad
    reason, message = _reason(net, method, layer)
    assert reason == "not finite"
    assert "NaN or infinite" in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_what_is_broken_within_is_refused_though_the_score_is_finite(
    method: str, where: str
) -> None:
    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 6, 2), nets.Pooled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if where == "activation":
                layer = torch.nan_to_num(self.layer(x))
            else:
                layer = self.layer(x)  # the root of what is negative is left out, not its slope
                layer = torch.where(layer > 0, torch.sqrt(layer), 0.0)
            out: torch.Tensor = self.head(layer)
            return out

    net = nets.made(Within)
    if where == "activation":
        nets.weight(net, "layer", "bias")[0] = float("nan")
    reason, message = _reason(net, method)
    assert reason == "not finite"
    assert f"the {where} of the layer 'layer' holds NaN" in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_scan", [False, True])
def test_a_constant_scan_is_refused(method: str, with_scan: bool) -> None:
    flat = np.full((1, 16, 16, 16), 40.0, dtype=np.float32)
    reference = nets.volume(seed=5) if with_scan else "zero"
    with pytest.raises(CannotExplainError, match="the scan is constant \\(40 everywhere") as caught:
        mg.explain(
            nets.as_volume(flat),
            nets.made(nets.gated),
            layer="first",
            method=method,
            reference=reference,
        )
    assert caught.value.reason == "constant volume"


def test_the_reference_itself_has_no_evidence_and_says_so() -> None:
    e = mg.explain(nets.volume(), nets.made(nets.gated), layer="first", reference=nets.volume())
    assert not e.evidence.any()
    assert e.status == "complete"
    assert any("nothing raises or lowers it" in w for w in e.warnings)


# ------------------------------------------------------------------------------ layers that cannot


class Odd(nn.Module):
    """A shared module, one that never runs, a vector, and the output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.never = nets.conv(1, 6, 2), nets.conv(6, 6), nets.conv(6, 6)
        self.head, self.out = nn.Linear(6, 2), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.relu(self.shared(self.a(x)))
        two = torch.relu(self.shared(one))
        out: torch.Tensor = self.out(self.head(two.mean(dim=(2, 3, 4)))[:, :, None, None, None])
        return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layer", "reason", "words"),
    [
        ("shared", "shared layer", "runs 2 times"),
        ("never", "logits", "never ran"),
        ("head", "logits", "is a vector"),
        ("out", "logits", "network's output itself"),
    ],
)
def test_layers_that_cannot_be_explained(method: str, layer: str, reason: str, words: str) -> None:
    found, message = _reason(nets.made(Odd), method, layer)
    assert found == reason
    assert words in message
    assert layer in message


def test_auto_takes_none_of_them() -> None:
    assert _explain(nets.made(Odd), layer="auto").layer == "a"


def test_of_a_shared_encoder_the_true_reason_is_said() -> None:
    """Both halves of the scan go through one encoder: each layer runs twice."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nets.conv(1, 6, 2), nn.ReLU())
            self.head = nets.Pooled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = (self.encoder(half) for half in x.chunk(2, dim=2))
            out: torch.Tensor = self.head(left - right)
            return out

    net = nets.made(Siamese)
    for method in ("secant", *METHODS):
        reason, message = _reason(net, method, "auto")
        assert reason == "shared layer"
        assert "run several times (shared, such as 'encoder')" in message
        assert "@input" in message
    assert _explain(net, "secant", "@input").status == "complete"


def test_an_unknown_layer_lists_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="expected a known layer, got 'shraed'") as caught:
        _explain(nets.made(Odd), layer="shraed")
    assert "shared" in str(caught.value)


def test_without_places_there_is_no_layer() -> None:
    net = nets.made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4096, 2)))
    with pytest.raises(CannotExplainError, match="more than one cell along each axis"):
        _explain(net, layer="auto")


def test_an_extra_output_may_be_explained_but_not_the_scores() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 6, 2), nets.Pooled()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            layer = self.layer(x)
            return self.head(torch.relu(layer)), {"features": layer}

    made = _explain(nets.made(Extra))
    assert (made.layer, made.status) == ("layer", "complete")


# ----------------------------------------------------------------- networks that do not fit a scan


def test_a_network_that_forgets_the_batch_axis_is_refused_with_the_reason() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 6, 2), nets.Pooled(outputs=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(torch.relu(self.layer(x))).squeeze()
            return out

    for method in METHODS:
        reason, message = _reason(nets.made(Squeezed), method)
        assert reason == "output"
        assert "one row of scores per scan" in message


def _too_deep() -> nn.Module:
    return nn.Sequential(nets.conv(1, 4, 2), *[nn.MaxPool3d(2) for _ in range(5)], nets.Pooled(4))


def _too_narrow() -> nn.Module:
    down = [nets.conv(4, 4, 2) for _ in range(3)]
    return nn.Sequential(nets.conv(1, 4, 2), *down, nn.InstanceNorm3d(4), nets.Pooled(4))


def _wants_two() -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nets.conv(1, 4)

        def forward(self, x: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x).mean(dim=(2, 3, 4)) + age
            return out

    return Two()


def _asserts() -> nn.Module:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nets.conv(1, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] == 96, "expected 96 voxels"
            out: torch.Tensor = self.layer(x)
            return out

    return Fixed()


@pytest.mark.parametrize("maker", [_too_deep, _too_narrow, _wants_two, _asserts])
@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_fails_on_a_scan_is_named_with_its_own_words(
    maker: Callable[[], nn.Module], method: str
) -> None:
    with pytest.raises(ModelError, match=r"to run on an input of shape \(1, 1, 16, 16, 16\), it"):
        mg.explain(nets.volume(), nets.made(maker), layer="auto", method=method, link="none")


def test_two_dimensional_networks_are_told_so() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ModelError, match="two-dimensional convolutions only"):
        mg.explain(nets.volume(), net.eval())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", ResourceError),
        ("CUDA out of memory. Tried to allocate 20.00 GiB", ResourceError),
        ("more than one element refers to a single memory location", ModelError),
        ("required rank 4 tensor to use channels_last memory format", ModelError),
    ],
)
def test_only_a_lack_of_memory_is_called_one(text: str, kind: type[Exception]) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nets.conv(1, 6, 2), nets.Pooled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not x.is_meta:
                raise RuntimeError(text)
            out: torch.Tensor = self.head(self.layer(x))
            return out

    with pytest.raises(kind, match=r"memory"):
        _explain(nets.made(Fails))


@pytest.mark.parametrize(("last", "link"), [("Softmax", "softmax"), ("Sigmoid", "sigmoid")])
def test_a_network_that_ends_in_its_link_function_is_refused(last: str, link: str) -> None:
    torch.manual_seed(0)
    end = torch.nn.Softmax(1) if last == "Softmax" else torch.nn.Sigmoid()
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2), end,
    )  # fmt: skip
    for method in ("integrated", "gradcam"):
        with pytest.raises(CannotExplainError, match=r"puts out logits .* got probabilities"):
            mg.explain(torch.rand(8, 8, 8), net, target=1, method=method, link=link, layer="1")
    assert mg.explain(torch.rand(8, 8, 8), net[:-1], target=1, link=link, layer="1").evidence.any()


def test_a_functional_softmax_at_the_end_is_refused_too() -> None:
    class Ends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv3d(1, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.conv(x).mean((2, 3, 4)), 1)

    with pytest.raises(CannotExplainError, match="got probabilities"):
        mg.explain(torch.rand(8, 8, 8), Ends(), target=0, layer="conv")


def test_odd_calls_are_sentences() -> None:
    scan, net = torch.rand(8, 8, 8), nets.made(nets.gated)
    with pytest.raises(mg.MedGradcamError, match="expected a known layer, got '4'"):
        mg.explain(scan, net, layer=4)  # type: ignore[arg-type]
    with pytest.raises(mg.MedGradcamError, match="expected a seed of 0 or more, got -1"):
        mg.explain(scan, net, seed=-1)
    with pytest.raises(mg.MedGradcamError, match="expected a reference of auto"):
        mg.explain(scan, net, reference=scan)  # type: ignore[arg-type]
    with pytest.raises(mg.MedGradcamError, match="no affine beside a Volume"):
        mg.explain(nets.volume(), net, affine=torch.eye(4))
    with pytest.raises(mg.MedGradcamError, match="no link beside a Model"):
        mg.explain(scan, Model(net, InputSpec()), link="sigmoid")
    with pytest.raises(mg.MedGradcamError, match="expected a TorchScript network, got one without"):
        mg.explain(scan, torch.jit.ScriptModule())
    with pytest.raises(mg.MedGradcamError, match=r"real numbers, got a tensor of torch\.complex64"):
        mg.explain(torch.complex(scan, scan), net)
    with torch.inference_mode():
        frozen = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3))
    with pytest.raises(mg.MedGradcamError, match=r"made inside torch\.inference_mode"):
        mg.explain(scan, frozen)


def test_noise_before_the_layer_is_noticed() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nets.made(nets.gated)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x + 0.5 * torch.randn_like(x))  # type: ignore[no-any-return]

    with pytest.raises(CannotExplainError, match="the same score twice") as caught:
        mg.explain(nets.volume(), Noisy(), layer="inner.first")
    assert caught.value.reason == "not repeatable"
