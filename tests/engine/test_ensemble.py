"""Is the score of several networks explained as it is delivered, and shared out among them?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam.ensemble import explain_ensemble, mean_of
from med_gradcam.errors import CannotExplainError, ModelError, UsageError
from med_gradcam.explaining import explained as alone
from med_gradcam.explanation import Explanation
from med_gradcam.members import turned
from med_gradcam.model import InputSpec, Model
from med_gradcam.models._averaged import Averaged, mirrored
from med_gradcam.opening import opened
from med_gradcam.prepare import prepare
from tests.engine.ensembles import SHAPE, Classifier, UNet, models, volume

MEANS = ("logits", "probabilities")


def delivered(nets: Sequence[nn.Module], images: Sequence[Any], mean: str, link: str) -> Any:
    """The mean of the members' outputs for the scan, written out member by member."""
    x = torch.tensor(volume().array)
    outs = []
    with torch.no_grad():
        for net in nets:
            for axes in ((), *images):
                dims = [a + 2 for a in axes]
                out = net(x[None].flip(dims) if dims else x[None])
                outs.append(out.flip(dims) if dims and out.ndim == 5 else out)
    made = torch.stack(outs)
    if mean == "logits":
        return made.mean(0)
    if link == "sigmoid":
        p = made.sigmoid().mean(0)
        return torch.log(p / (1 - p))
    return made.softmax(2).mean(0).log()


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mirrors", [(), (0, 2), [(1,), (0, 1, 2)]])
@pytest.mark.parametrize("kind", [UNet, Classifier])
def test_the_score_is_the_delivered_one_and_all_of_its_change_is_shared_out(
    kind: type[nn.Module], mirrors: Any, link: str, mean: str
) -> None:
    own = models(kind, 2, link)
    images = {(): [], (0, 2): [(0,), (2,), (0, 2)]}.get(tuple(mirrors), list(mirrors))
    out = delivered([m.net for m in own], images, mean, link)
    found = explain_ensemble(
        volume(), own, mirrors=mirrors, mean=mean, target="lesion-vs-organ", quick=True
    )
    total = found.total
    torch.testing.assert_close(mean_of(own, mirrors=mirrors, mean=mean).net(_x()), out)
    margin = out[0, 1] - out[0, 2]
    if kind is Classifier:
        assert total.score == pytest.approx(float(margin), abs=1e-5)
    assert len(found.members) == 2 * (1 + len(images))
    assert total.reference_score is not None
    change = total.score - total.reference_score
    assert sum(found.nets) == pytest.approx(change, rel=1e-4, abs=1e-6)
    assert total.evidence.sum(dtype=np.float64) == pytest.approx(change, rel=1e-4, abs=1e-6)
    assert total.status == "complete"
    assert total.residual == pytest.approx(0, abs=1e-4)
    assert [part.net for part in total.parts] == pytest.approx(list(found.nets))


def _mixed() -> Any:
    return [0, (1,)]


def _x() -> torch.Tensor:
    return torch.tensor(volume().array)[None]


def test_the_region_is_the_delivered_predictions_and_so_is_its_score() -> None:
    own = models(UNet, 3)
    out = delivered([m.net for m in own], [], "logits", "softmax")[0]
    margin = out[1] - torch.logsumexp(out[[0, 2]], 0)
    inside = out.argmax(0) == 1
    total = explain_ensemble(volume(), own, target="lesion").total
    assert total.score == pytest.approx(float(margin[inside].mean()), abs=1e-5)
    assert total.target.region is not None
    assert total.target.region.voxels == int(inside.sum())


def test_explain_takes_an_ensemble_as_one_model() -> None:
    model = mean_of(models(UNet, 3))
    one = mg.explain(volume(), model, target="lesion")
    other = explain_ensemble(volume(), models(UNet, 3), target="lesion").total
    np.testing.assert_array_equal(one.evidence, other.evidence)
    (many,) = mg.explain_many([volume()], model, target=["lesion"])
    np.testing.assert_array_equal(one.evidence, many.evidence)
    assert one.provenance.weights_sha256 == model.weights_sha256


def test_an_ensemble_of_one_is_that_one() -> None:
    (model,) = models(UNet, 1)
    alone = mg.explain(volume(), model, target="lesion", layer="first")
    found = explain_ensemble(volume(), model, target="lesion", layer="first")
    np.testing.assert_allclose(found.total.evidence, alone.evidence, atol=2e-6)
    assert found.total.score == pytest.approx(alone.score, abs=1e-6)
    assert not found.disagreement.evidence.any()


def test_the_same_network_thrice_says_it_thrice_and_does_not_disagree() -> None:
    (model,) = models(Classifier, 1)
    alone = mg.explain(volume(), model, target="lesion", layer="b")
    found = explain_ensemble(volume(), [model] * 3, target="lesion", layer="b")
    np.testing.assert_allclose(found.total.evidence, alone.evidence, atol=2e-6)
    np.testing.assert_allclose(found.nets, [sum(found.nets) / 3] * 3, atol=1e-6)
    assert found.disagreement.evidence.max() < 1e-6


def test_disagreement_is_the_spread_of_what_each_would_say_alone() -> None:
    own = models(Classifier, 3)
    found = explain_ensemble(volume(), own, target="lesion-vs-organ", layer="b")
    alone = [mg.explain(volume(), m, target="lesion-vs-organ", layer="b").evidence for m in own]
    np.testing.assert_allclose(found.total.evidence, np.mean(alone, axis=0), atol=1e-6)
    np.testing.assert_allclose(found.disagreement.evidence, np.std(alone, axis=0), atol=1e-6)
    spread = found.disagreement
    assert (spread.signed, spread.status, spread.unit) == (False, "no_sum", "log-odds")


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_mirrored_member_points_to_where_it_looked(axes: tuple[int, ...]) -> None:
    # One voxel decides; the mirrored member must point to it, and not to its mirror image.
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.see = nn.Conv3d(1, 1, 1)
            self.head = nn.Linear(int(np.prod(SHAPE)), 2, bias=False)
            nn.init.ones_(self.see.weight)
            nn.init.zeros_(self.see.bias)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.weight)
            place = torch.zeros(SHAPE)
            place[2, 3, 7] = 1.0
            with torch.no_grad():
                self.head.weight[1] = place.flatten()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.see(x).flatten(1))
            return out

    model = Model(Point().eval(), InputSpec(), ("a", "b"))
    found = explain_ensemble(volume(), model, mirrors=[axes], target="b", layer="see")
    here = np.array([2, 3, 7])
    there = np.array(
        [n - 1 - p if a in axes else p for a, (n, p) in enumerate(zip(SHAPE, here, strict=True))]
    )
    for one, place in zip(found.members, (here, there), strict=True):
        (hot,) = np.argwhere(one.evidence)
        world = one.grid.world_ras(hot)
        np.testing.assert_allclose(world, volume().grid.world_ras(place), atol=1e-9)
    hot = np.argwhere(found.total.evidence)
    assert sorted(hot.tolist()) == sorted([here.tolist(), there.tolist()])


def test_mirrored_cells_between_the_others_keep_their_place_and_sum() -> None:
    # Stride 2 on an even size: the mirrored cells' centres lie one voxel beside the others.
    (model,) = models(Classifier, 1)
    found = explain_ensemble(volume(), model, mirrors=[(0,)], target="lesion", layer="b")
    plain, mirror = found.members
    assert plain.grid.shape == mirror.grid.shape
    assert np.abs(plain.grid.affine - mirror.grid.affine).max() > 0.5
    assert found.total.evidence.sum() == pytest.approx(sum(found.nets), abs=1e-5)
    centres = [_centre(e) for e in (plain, mirror)]
    both = centres[0] * np.abs(plain.evidence).sum() + centres[1] * np.abs(mirror.evidence).sum()
    own = both / (np.abs(plain.evidence).sum() + np.abs(mirror.evidence).sum())
    assert np.linalg.norm(own - _centre(found.total)) < 2.0


def _centre(e: Explanation) -> npt.NDArray[np.float64]:
    weight = np.abs(e.evidence).astype(np.float64)
    index = np.argwhere(np.ones(e.grid.shape))
    world = e.grid.world_ras(index)
    return np.asarray((world * weight.reshape(-1, 1)).sum(0) / weight.sum())


def test_a_mirror_image_holds_the_same_voxels_in_the_same_places() -> None:
    ready = prepare(volume(), models(UNet, 1)[0])
    for count in product((False, True), repeat=3):
        axes = tuple(n for n, flip in enumerate(count) if flip)
        other = turned(ready, axes)
        index = np.argwhere(np.ones(SHAPE))[::37]
        world = other.grid.world_ras(index)
        back = np.rint(ready.grid.index_ijk(world)).astype(int)
        np.testing.assert_array_equal(other.raw[0][tuple(index.T)], ready.raw[0][tuple(back.T)])
        x = torch.tensor(ready.raw)[None]
        np.testing.assert_array_equal(mirrored(x, axes)[0].numpy(), other.raw)


def test_auto_tests_the_sum_against_the_delivered_score() -> None:
    found = explain_ensemble(volume(), models(Classifier, 2), target="lesion")
    total = found.total
    assert len({e.layer for e in found.members}) == 1
    assert total.layer == found.members[0].layer
    assert total.regions
    assert total.trials[0].layer == total.layer
    net = mean_of(models(Classifier, 2)).net
    with torch.no_grad():
        out = net(_x())[0]
    score = float(out[1] - torch.logsumexp(out[[0, 2]], 0))
    assert total.score == pytest.approx(score, abs=1e-5)


def test_members_of_different_shapes_are_added_on_the_finest_cells() -> None:
    (one,), (other,) = models(Classifier, 1), models(UNet, 1)

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = other.net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(x).mean((2, 3, 4))
            return out

    two = Model(Row().eval(), one.input, one.labels)
    found = explain_ensemble(volume(), [one, two], target="lesion")
    total = found.total
    assert total.layer == " | ".join(e.layer for e in found.members)
    change = total.score - (total.reference_score or 0)
    assert total.evidence.sum(dtype=np.float64) == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "integrated", "saliency", "occlusion"])
def test_other_methods_take_the_shares_too(method: str) -> None:
    found = explain_ensemble(
        volume(), models(Classifier, 2), target="lesion", method=method, quick=True
    )
    assert found.total.method == method
    assert found.total.evidence.any()
    if method == "integrated":
        assert found.total.residual == pytest.approx(0, abs=0.05)


def test_a_layer_that_is_no_cut_is_named_so() -> None:
    total = explain_ensemble(volume(), models(UNet, 2), target="lesion", layer="down").total
    assert total.status == "not_a_cut"
    assert total.bypassed is not None
    change = total.score - (total.reference_score or 0)
    left = change - total.evidence.sum(dtype=np.float64)
    assert total.bypassed == pytest.approx(left / change, abs=1e-3)
    assert any("is in no member's map" in w for w in total.warnings)


def test_layers_may_be_named_as_inspect_names_them() -> None:
    model = mean_of(models(UNet, 2))
    found = [
        mg.explain(volume(), model, target="lesion", layer=layer)
        for layer in ("first+down", "members.0.first+members.1.down")
    ]
    np.testing.assert_array_equal(found[0].evidence, found[1].evidence)


def test_one_cut_through_all_members_says_the_same() -> None:
    # The tapes of all members at once, through the mean itself: more memory, the same evidence.
    model = mean_of(models(UNet, 2))
    shares = mg.explain(volume(), model, target="lesion", layer="first", reference="value:0.5")
    cut = {"target": "lesion", "layer": "members.0.first+members.1.first"}
    with opened(volume(), model, {**cut, "reference": "value:0.5"}) as case:
        whole = alone(case)
    assert whole.status == "complete"
    assert whole.score == pytest.approx(shares.score, abs=1e-6)
    np.testing.assert_allclose(whole.evidence, shares.evidence, atol=1e-6)


def test_nothing_is_left_behind() -> None:
    own = models(UNet, 2)
    before = [{k: v.clone() for k, v in m.net.state_dict().items()} for m in own]
    for m in own:
        m.net.train()
    explain_ensemble(volume(), own, mirrors=[(0,)], target="lesion")
    for m, weights in zip(own, before, strict=True):
        assert all(torch.equal(weights[k], v) for k, v in m.net.state_dict().items())
        assert all(not mod._forward_hooks for mod in m.net.modules())
        assert all(p.requires_grad for p in m.net.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mean_of([]), ModelError, "expected one Model or a list of them"),
        (lambda: mean_of([nn.Identity()]), ModelError, "got Identity"),
        (
            lambda: mean_of([*models(UNet, 1), *models(UNet, 1, "sigmoid")]),
            ModelError,
            "models of the same link for one mean, got softmax and, as number 2, sigmoid",
        ),
        (lambda: mean_of(models(UNet, 1), mean="votes"), UsageError, "a mean of logits or prob"),
        (lambda: mean_of(models(UNet, 1), mirrors=(3,)), UsageError, "axes of 0, 1 and 2"),
        (lambda: mean_of(models(UNet, 1), mirrors=[(0,), (0,)]), UsageError, "different groups"),
        (lambda: mean_of(models(UNet, 1), mirrors=_mixed()), UsageError, "axes of 0, 1 and 2"),
        (
            lambda: mean_of(models(UNet, 1, "none"), mean="probabilities"),
            UsageError,
            "a link of softmax or sigmoid beside probabilities, got none",
        ),
        (
            lambda: mean_of(mean_of(models(UNet, 1), mirrors=(0,)), mirrors=(1,)),
            ModelError,
            "got a mean over mirrored scans",
        ),
        (
            lambda: mg.explain(volume(), mean_of(models(UNet, 2)), layer="all"),
            UsageError,
            "expected one layer",
        ),
        (
            lambda: explain_ensemble(volume(), models(UNet, 2), layer="nowhere"),
            UsageError,
            "nowhere",
        ),
        (
            lambda: explain_ensemble(volume(), models(UNet, 2), inputs={"age": 3}),
            UsageError,
            "no other inputs for the mean",
        ),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_mean_without_a_rule_is_refused() -> None:
    def strange(out: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = torch.linalg.svdvals(out).sum()
        return total

    with pytest.raises(CannotExplainError, match="a target whose change can be shared out"):
        explain_ensemble(volume(), models(Classifier, 2), target=strange)


def test_bare_modules_and_folds_are_flattened() -> None:
    nets = [m.net for m in models(UNet, 2)]
    found = explain_ensemble(volume(), nets, target="1", layer="first")
    assert len(found.members) == 2
    model = mean_of(models(UNet, 2))
    again = mean_of(model, mirrors=(0,))
    assert isinstance(again.net, Averaged)
    assert len(again.net.members) == 2
    assert again.weights_sha256 == model.weights_sha256
