"""Does every method cost what docs/methods.md says, and is what a result says of it true?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import _plugins
from med_gradcam.explanation import Explanation
from med_gradcam.graph import trace
from tests.engine import nets
from tests.engine.work import counted

NAMES = _plugins.names("methods")
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
SIZE, LAYER = 32, "layer2"
ROUNDED = 0.011  # the reported number has two decimals


@cache
def resnet18() -> nn.Module:
    from monai.networks.nets.resnet import ResNet

    torch.manual_seed(0)
    return ResNet("basic", [2, 2, 2, 2], [4, 8, 16, 32], n_input_channels=1, num_classes=2).eval()


@cache
def _explained(name: str) -> tuple[Explanation, float]:
    """The result, and the multiply-adds really done, in forwards."""
    net, method = resnet18(), _plugins.load("methods", name)
    with torch.no_grad():
        _, forward = counted(lambda: net(nets.batch(nets.scan(SIZE))))
    at = LAYER if method.LEVEL == "layer" or method.BESIDE else "auto"
    made, work = counted(
        lambda: mg.explain(nets.volume(SIZE), net, target=1, method=name, layer=at)
    )
    return made, work / forward - 1  # less the pass on shapes, which computes nothing


def prices(text: str) -> dict[str, str]:
    """The last column of the page's table of papers, by method."""
    section = text.split("\n## Papers, limits, cost\n")[1].split("\n## ", maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("`"): row[-1] for row in rows}


def forwards(price: str, sizes: Mapping[str, float]) -> tuple[float, float]:
    """The least and the most of a price such as "2 F + 4 T + N T, N at most 2048".

    `sizes`: the channels C and cells N of the layer, and what F and T are in forwards.
    """
    total, *limits = price.split(", ")
    known = dict(sizes)
    for limit in limits:
        letter, most = limit.split(" at most ")
        known[letter] = min(known[letter], float(most))
    least = most_of_all = 0.0
    for term in total.split(" + "):
        count, unit = term.rsplit(" ", 1)
        low, _, high = count.partition(" to ")
        least += (known[low] if low in known else float(low)) * known[unit]
        high = high or low
        most_of_all += (known[high] if high in known else float(high)) * known[unit]
    return least, most_of_all


def _sizes() -> dict[str, float]:
    traced = trace(resnet18(), (1, SIZE, SIZE, SIZE))
    info = traced.find(LAYER)
    assert info is not None
    channels, i, j, k = info.shape
    return {"C": channels, "N": i * j * k, "F": 1.0, "T": traced.tail_share(LAYER)}


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_cost_is_the_work_done(name: str) -> None:
    made, done = _explained(name)
    assert made.method == name
    assert made.cost_in_forwards == pytest.approx(done, rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_states_the_cost(name: str) -> None:
    least, most = forwards(prices(PAGE.read_text("utf-8"))[name], _sizes())
    assert least - ROUNDED <= _explained(name)[0].cost_in_forwards <= most + ROUNDED
    assert least > 0


def test_the_page_has_a_price_for_every_method() -> None:
    assert sorted(prices(PAGE.read_text("utf-8"))) == list(NAMES)


def test_a_price_is_read_as_written() -> None:
    sizes = {"C": 8.0, "N": 5000.0, "F": 1.0, "T": 0.5}
    assert forwards("2 F", sizes) == (2, 2)
    assert forwards("3 F + 21 to 516 T", sizes) == (13.5, 261)
    assert forwards("3 F + C F + 4 T, C at most 64", sizes) == (13, 13)
    assert forwards("2 F + 4 T + N T, N at most 2048", sizes) == (1028, 1028)
    with pytest.raises((KeyError, ValueError)):
        forwards("3 F + some T", sizes)
    with pytest.raises((KeyError, ValueError)):
        forwards("cheap", sizes)


@pytest.mark.parametrize(("name", "was"), [("saliency", "6 F"), ("gradcam", "1 F + 3 T")])
def test_another_price_would_not_pass(name: str, was: str) -> None:
    """Planted faults: a price that the method once had, and a few runs of the tail too many."""
    least, _ = forwards(was, _sizes())
    assert _explained(name)[0].cost_in_forwards < least - ROUNDED
    text = re.sub(rf"(?m)^(\| `{name}` \|.*\| )[^|]*\|$", rf"\g<1>{was} |", PAGE.read_text("utf-8"))
    assert prices(text)[name] == was


class Attention(nn.Module):
    """Patches that look at each other: products of two things that follow from the scan."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.keys = nn.Conv3d(1, 16, 4, stride=4), nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        seen = (tokens @ self.keys(tokens).transpose(1, 2) / 4).softmax(-1) @ tokens
        out: torch.Tensor = self.head((tokens + seen).mean(1))
        return out


def test_fullgrad_counts_the_slopes_of_attention() -> None:
    """They are taken along the scan; those of convolutions are known and cost nothing."""
    net = nets.made(Attention)
    with torch.no_grad():
        _, forward = counted(lambda: net(nets.batch(nets.scan(24))))

    def done(name: str) -> tuple[float, float]:
        made, work = counted(lambda: mg.explain(nets.volume(24), net, target=1, method=name))
        return made.cost_in_forwards, work / forward - 1

    (said, real), (plain, without) = done("fullgrad"), done("saliency")
    assert real - 2 * without > 1  # more than two gradients
    assert said - 2 * plain == pytest.approx(real - 2 * without, rel=0.15)
