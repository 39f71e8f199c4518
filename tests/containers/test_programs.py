"""Is what a program says of its network read rightly, and is each program checked itself?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import med_gradcam as mg
from med_gradcam.containers import opener
from med_gradcam.containers.opener import opened
from med_gradcam.containers.program_facts import input_channels
from med_gradcam.errors import ModelError
from tests.containers import onnx_small

pytestmark = pytest.mark.filterwarnings("ignore")
SCAN = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0))


def script(net: torch.nn.Module, x: torch.Tensor) -> Any:
    return torch.jit.script(net)


def trace(net: torch.nn.Module, x: torch.Tensor) -> Any:
    return torch.jit.trace(net, x, check_trace=False)


def frozen(net: torch.nn.Module, x: torch.Tensor) -> Any:
    return torch.jit.freeze(trace(net, x))


def export(net: torch.nn.Module, x: torch.Tensor) -> Any:
    return torch.export.export(net, (x,)).module()


ALL = pytest.mark.parametrize("make", [script, trace, frozen, export])


def quiet(make: Callable[..., Any], net: torch.nn.Module, x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(net, x)


class Late(torch.nn.Module):
    """Declares its second convolution first; its first has one group for each channel."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.second = second
        self.first = first
        self.head = torch.nn.LazyLinear(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3, 4)))  # type: ignore[no-any-return]


def late(first: torch.nn.Module, second: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    net = Late(first, second)
    net(x)
    return net.eval()


@ALL
def test_channels_are_those_of_the_convolution_that_runs_first(make: Any) -> None:
    x = torch.rand(1, 2, 8, 8, 8)
    net = late(torch.nn.Conv3d(2, 4, 3, groups=2), torch.nn.Conv3d(4, 5, 3), x)
    assert input_channels(opened(quiet(make, net, x))) == 2  # type: ignore[arg-type]


@ALL
def test_channels_of_a_transposed_convolution(make: Any) -> None:
    x = torch.rand(1, 3, 4, 4, 4)
    net = late(torch.nn.ConvTranspose3d(3, 6, 2, groups=3), torch.nn.Conv3d(6, 5, 3), x)
    assert input_channels(opened(quiet(make, net, x))) == 3  # type: ignore[arg-type]


class Stacked(torch.nn.Module):
    """Makes the channels of its convolution itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([x, x], 1)).mean((2, 3, 4))  # type: ignore[no-any-return]


@ALL
def test_channels_that_cannot_be_told(make: Any) -> None:
    made = quiet(make, Stacked().eval(), SCAN[None, None])
    assert input_channels(opened(made)) is None  # type: ignore[arg-type]


def test_the_note_says_which_channels(tmp_path: Path) -> None:
    x = torch.rand(1, 2, 8, 8, 8)
    net = late(torch.nn.Conv3d(2, 4, 3, groups=2), torch.nn.Conv3d(4, 5, 3), x)
    torch.jit.save(quiet(frozen, net, x), tmp_path / "net.ts")
    model = mg.load_model(tmp_path / "net.ts", trust="archive")
    assert model.input.channels == 2
    assert "2 input channels (its first convolution)" in model.notes[0]
    torch.jit.save(quiet(script, Stacked().eval(), x), tmp_path / "own.ts")
    model = mg.load_model(tmp_path / "own.ts", trust="archive")
    assert model.input.channels == 1
    assert "input channels cannot be told from it (1 assumed)" in model.notes[0]


# ----------------------------------------------------------------------- checked against itself


class Holds(torch.nn.Module):
    """An eager network with a program as its first part."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.part = part
        self.conv = torch.nn.Conv3d(4, 4, 3)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(self.part(x)))
        return self.head(x.mean((2, 3, 4)))  # type: ignore[no-any-return]


def block() -> torch.nn.Module:
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.ReLU(inplace=True)).eval()


@ALL
def test_a_program_as_a_part_gives_one_method_each_time(make: Any) -> None:
    net = Holds(quiet(make, block(), SCAN[None, None]))
    net.training = False
    found = [mg.explain(SCAN, net, target=0, method="secant", layer="conv") for _ in range(2)]
    assert [one.method for one in found] == ["secant", "secant"]
    assert np.array_equal(found[0].evidence, found[1].evidence)


def test_a_part_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from med_gradcam.containers import ordinary

    monkeypatch.setitem(ordinary._FORMS, "relu_", torch.abs)
    net = Holds(quiet(script, block(), SCAN[None, None])).eval()
    with pytest.raises(ModelError, match=r"its output differs by .* of the largest"):
        mg.explain(SCAN, net, target=0)


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float16, True), (torch.float32, False)])
def test_what_may_differ_follows_the_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fits: bool
) -> None:
    net = opened(quiet(script, block(), SCAN[None, None]).to(dtype))
    assert isinstance(net, torch.nn.Module)
    theirs = opener._source_gives
    monkeypatch.setattr(opener, "_source_gives", lambda *args: theirs(*args) * 1.004)
    if fits:
        assert opener.check_same(net, SCAN[None, None].to(dtype)) == 2.0
    else:
        with pytest.raises(ModelError, match=r"its output differs by 0\.004"):
            opener.check_same(net, SCAN[None, None])


@pytest.mark.parametrize("make", [trace, export])
def test_a_program_that_was_made_in_training_mode(make: Any) -> None:
    torch.manual_seed(2)
    net = torch.nn.Sequential(
        block(), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(864, 2)
    )
    made = quiet(make, net.train(), SCAN[None, None])
    with pytest.raises(ModelError, match=r"made in training mode.*call net.eval\(\) and export"):
        mg.explain(SCAN, made, target=0)


def test_a_dtype_that_onnxruntime_has_no_kernel_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from onnx import helper

    from med_gradcam.containers import onnx_whole

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("ReduceMean", ["y"], ["out"], axes=[2, 3, 4], keepdims=0),
    ]
    rng = np.random.default_rng(0)
    x, w = rng.random((1, 1, 5, 5, 5)), rng.normal(size=(2, 1, 3, 3, 3))
    made = onnx_small.made(nodes, {"x": x}, {"w": w}, ["out"], 17)
    net = onnx_small.opened(made, tmp_path)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnx_small.with_runtime(made, {"x": x})
    net.__dict__["_program"] = onnx_whole.Source(made)
    assert opener.check_same(net, torch.from_numpy(x)) == 2.0
