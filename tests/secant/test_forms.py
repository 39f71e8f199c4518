"""Are scripted, exported, compiled and half-precision networks shared out as the plain one is?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from med_gradcam.secant.pair import share
from med_gradcam.secant.rules import NoRuleError
from med_gradcam.tail import INPUT
from tests.secant.pairs import both, noise, off, shared

EXACT, COARSE = 1e-9, 0.05
X, R = noise(2, 4, 6, seed=1), noise(2, 4, 6, seed=2)


def small(*, pooled: bool = True) -> nn.Module:
    """`pooled`: places are averaged at the end, which leaves little of a change of noise."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.MaxPool3d(2),
        nn.Conv3d(4, 6, 3), nn.InstanceNorm3d(6, affine=True), nn.GELU(), nn.Conv3d(6, 6, 1),
        nn.SiLU(), nn.AdaptiveAvgPool3d(1 if pooled else 2), nn.Flatten(),
        nn.Linear(6 if pooled else 48, 3),
    )  # fmt: skip
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean = torch.randn(4)
                module.running_var = torch.rand(4) + 0.5
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                module.weight.mul_(3)
    return net.eval()


SCAN, OTHER = noise(2, 1, 10, 9, 8, seed=7), noise(2, 1, 10, 9, 8, seed=8)


class Hidden(nn.Module):
    """A network whose modules cannot be seen from outside."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = [inner]

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner[0](x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["script", "trace", "freeze", "export", "decomposed", "fx"])
def test_other_forms_of_a_network_give_the_same_evidence(form: str) -> None:
    net = small().double()
    for parameter in net.parameters():
        parameter.requires_grad = False
    made: Any
    if form == "script":
        made = torch.jit.script(net)
    elif form == "trace":
        made = torch.jit.trace(net, SCAN)
    elif form == "freeze":
        made = torch.jit.freeze(torch.jit.script(net))
    elif form == "fx":
        made = torch.fx.symbolic_trace(net)
    else:
        program = torch.export.export(net, (SCAN,))
        made = (program.run_decompositions() if form == "decomposed" else program).module()
    wanted = shared(net, SCAN, OTHER)
    assert off(wanted) <= EXACT
    for _ in range(3):  # a scripted network changes its mind after its first runs
        found = shared(Hidden(made), SCAN, OTHER)
        assert off(found) <= EXACT
        torch.testing.assert_close(found.evidence(INPUT), wanted.evidence(INPUT))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_operations_out_of_sight_are_noticed() -> None:
    """`optimize_for_inference` runs kernels that no dispatch mode sees."""
    net = small().float()
    for parameter in net.parameters():
        parameter.requires_grad = False
    made = torch.jit.optimize_for_inference(torch.jit.script(net))
    for _ in range(3):
        with pytest.raises(NoRuleError, match="no operation on the input"):
            shared(Hidden(made), SCAN.float(), OTHER.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_branch_is_followed_or_refused() -> None:
    @torch.jit.script
    def either(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() > 0) else x.sin()

    up, down = X.abs(), -R.abs()
    assert off(shared(Hidden(either), up, R.abs())) <= EXACT
    with pytest.raises(NoRuleError, match=r"control flow.*_local_scalar_dense"):
        shared(Hidden(either), up, down)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_network_is_shared_out() -> None:
    net = small().double()
    for parameter in net.parameters():
        parameter.requires_grad = False
    made = torch.compile(net)
    with torch.no_grad():
        made(SCAN)
    assert off(shared(Hidden(made), SCAN, OTHER)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("layer", [INPUT, "2", "6"])
def test_half_precision_to_a_few_per_cent(dtype: torch.dtype, layer: str) -> None:
    found = shared(small(pooled=False).to(dtype), SCAN.to(dtype), OTHER.to(dtype), [layer])
    assert off(found, layer) <= COARSE
    exact = shared(small(pooled=False).double(), SCAN, OTHER, [layer])
    both_ways = torch.stack([s.evidence(layer).flatten() for s in (found, exact)])
    assert float(torch.corrcoef(both_ways)[0, 1]) > 0.98


@pytest.mark.parametrize("outside", [True, False])
def test_mixed_precision_to_a_few_per_cent(outside: bool) -> None:
    net = small(pooled=False).float()

    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

    scan, other = SCAN.float(), OTHER.float()
    if outside:
        with torch.autocast("cpu", torch.bfloat16):
            found = shared(net, scan, other)
    else:
        found = shared(Mixed(), scan, other)
    assert off(found) <= COARSE
    assert found.multipliers[INPUT].dtype == torch.float32


def test_the_sweep_is_done_in_full_precision() -> None:
    net = small(pooled=False).float()
    scan, other = SCAN.float(), OTHER.float()
    wanted = shared(net, scan, other)
    runs = both(net, scan, other)
    with torch.autocast("cpu", torch.bfloat16):
        found = share(*runs, [INPUT])
    assert torch.equal(found.multipliers[INPUT], wanted.multipliers[INPUT])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_whatever_mode_the_caller_is_in(mode: Callable[[], Any]) -> None:
    net = small().double()
    with mode():
        case, reference = both(net, SCAN.clone(), OTHER.clone())
        found = share(case, reference, [INPUT])
    assert off(found) <= EXACT
    assert not found.multipliers[INPUT].requires_grad
