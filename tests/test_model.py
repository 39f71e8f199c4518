"""Does the description of a network refuse what no network can be?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from med_gradcam.calibration import Calibration, from_case
from med_gradcam.errors import GeometryError, ModelError
from med_gradcam.model import InputSpec, Model, Step

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("z", ((1.0,),), r"intensity step of clip, scale, threshold, .*zscore, got 'z'"),
        ("zscore", ((1.0,),), "expected 2 arguments for the intensity step 'zscore', got 1"),
        ("zscore", ((1.0,), (2.0,)), "expected 0 or 1 as the switches of zscore, got 1.0 and 2.0"),
        ("minmax_scale", ((1.0,), (1.0,)), "expected minmax_scale low < high, got 1.0 and 1.0"),
        ("normalise_nonzero", ((0.0,), (0.0,)), "standard deviations other than 0"),
        ("threshold", ((0.0,), (1.0,)), "expected 3 arguments for the intensity step 'threshold'"),
        ("clip", ((1.0,),), "expected 2 arguments for the intensity step 'clip', got 1"),
        ("scale", (), "expected 1 arguments for the intensity step 'scale', got 0"),
        ("clip", ((), (1.0,)), "arguments for the intensity step 'clip'"),
        ("clip", ((5.0,), (-5.0,)), "expected clip low < high, got 5.0 and -5.0"),
        ("clip", ((NAN,), (5.0,)), "expected finite numbers in the intensity step 'clip'"),
        ("scale", ((float("inf"),),), "expected finite numbers in the intensity step 'scale'"),
        ("quantile_scale", ((-0.1,), (0.9,)), "quantiles 0 <= low < high <= 1, got -0.1 and 0.9"),
        ("quantile_scale", ((0.9,), (0.1,)), "quantiles 0 <= low < high <= 1"),
        ("normalise", ((0.0, 0.0), (1.0, 0.0)), "standard deviations other than 0"),
    ],
)
def test_no_step(name: str, arguments: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Step(name, arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channels": 0}, "at least one input channel, got 0"),
        ({"patch": (4, 4)}, r"three positive numbers as patch, got \(4, 4\)"),
        ({"patch": (4, 0, 4)}, r"three positive numbers as patch, got \(4, 0, 4\)"),
        ({"spacing_mm": (1.0, -1.0, 1.0)}, "three positive numbers as spacing_mm"),
        ({"spacing_mm": (1.0, NAN, 1.0)}, "three positive numbers as spacing_mm"),
        ({"min_patch": (0, 1, 1)}, "three positive numbers as min_patch"),
        ({"interpolation": "sinc"}, "an interpolation of linear, cubic, got 'sinc'"),
        ({"intensity": (["clip", -1, 1],)}, "expected intensity steps as Step"),
    ],
)
def test_no_input(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        InputSpec(**changes)


def test_axes_that_are_none() -> None:
    with pytest.raises(GeometryError, match="expected axis letters such as 'RAS' or 'SPL'"):
        InputSpec(axes="XYZ")
    assert InputSpec(axes="lia").axes == "LIA"


def test_no_model() -> None:
    net = torch.nn.Identity()
    with pytest.raises(ModelError, match="expected different labels, got"):
        Model(net, InputSpec(), labels=("a", "a"))
    with pytest.raises(ModelError, match="expected a link of softmax, sigmoid, none, got 'exp'"):
        Model(net, InputSpec(), link="exp")  # type: ignore[arg-type]


def test_aliases_cannot_be_changed_afterwards() -> None:
    names = {"block1": "4"}
    model = Model(torch.nn.Identity(), InputSpec(), aliases=names)
    names["block1"] = "5"
    assert model.aliases["block1"] == "4"
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.aliases["x"] = "y"  # type: ignore[index]


def test_a_calibration_is_for_one_target_method_and_layer() -> None:
    fixed = Calibration("nodule", "integrated", "4", 2.0, 0.5, 20)
    model = Model(torch.nn.Identity(), InputSpec(), calibration=(fixed,))
    assert model.scale_for("nodule", "integrated", "4") is fixed
    assert model.scale_for("nodule", "gradcam", "4") is None
    assert not fixed.of_case


def test_the_scale_of_a_case() -> None:
    case = from_case(3.0, "t", "m", "l")
    assert (case.peak_per_ml, case.of_case) == (3.0, True)
    assert case.floor_per_ml == pytest.approx(0.3)
    assert from_case(0.0, "t", "m", "l").peak_per_ml == 1.0


@pytest.mark.parametrize(("peak", "floor"), [(0.0, 0.0), (1.0, 2.0), (1.0, -0.1), (NAN, 0.0)])
def test_no_calibration(peak: float, floor: float) -> None:
    with pytest.raises(ModelError, match=r"0 <= floor <= peak .* and peak > 0 in a calibration"):
        Calibration("t", "m", "l", peak, floor, 1)
