"""Does inspect say of a compiled network what it says of the plain one?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import med_gradcam as mg
from med_gradcam import inspection
from med_gradcam.errors import ModelError
from tests.engine import nets


def _net() -> nn.Module:
    return nets.made(nets.batch_normed)


def _compiled() -> Any:
    return torch.compile(_net(), backend="eager")


def _in_place() -> nn.Module:
    net = _net()
    net.compile(backend="eager")
    return net


def _in_part() -> nn.Module:
    net: Any = _net()
    net.first = torch.compile(net.first, backend="eager")
    return net  # type: ignore[no-any-return]


COMPILED = {"whole": _compiled, "in place": _in_place, "in part": _in_part}


def _said(net: nn.Module, **settings: Any) -> dict[str, Any]:
    patch = (16, 16, 16)
    return mg.inspect(mg.Model(net, mg.InputSpec(patch=patch), **settings), every=True)


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_network_is_inspected_as_the_plain_one(how: str) -> None:
    net = COMPILED[how]()
    wanted, made = _said(_net()), _said(net)
    if how == "in part":  # its first part is a layer of its own, as explain names it
        held = [row for row in made["layers"] if not row["layer"].startswith("first._orig_mod")]
        made["layers"] = [
            {**row, "kind": "Sequential"} if row["layer"] == "first" else row for row in held
        ]
        wanted["layers"] = [r for r in wanted["layers"] if not r["layer"].startswith("first.")]
    assert made == wanted
    assert any(row["placed"] == "exact" for row in made["layers"])


def test_the_names_that_inspect_lists_are_those_that_explain_takes() -> None:
    net = _compiled()
    (name, *_) = _said(net, aliases={"mine": "_orig_mod.first"})["candidates"]
    assert mg.explain(nets.volume(), net, layer=name, method="gradcam").layer == name == "first"


def test_inspect_leaves_it_compiled() -> None:
    net = _in_place()
    call = net.__dict__["_compiled_call_impl"]
    _said(net)
    assert net.__dict__["_compiled_call_impl"] is call is not None


def test_a_bare_module_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"expected a Model \(med_gradcam\.load_model\)"):
        inspection.inspect(_compiled())


def test_a_recipe_and_what_it_leaves_out_are_named() -> None:
    def own(array: Any, spacing_mm: Any) -> Any:
        raise AssertionError((array, spacing_mm))  # nothing is prepared here

    for given in ({"recipe": own}, {"recipe_on": lambda grid: own}):
        spec = mg.InputSpec(patch=(16, 16, 16), **given)
        report = mg.inspect(mg.Model(_net(), spec, drift=("Mine", "Other")))
        said = inspection.as_text(report)
        assert "intensity the model's own recipe" in said
        assert "steps of its own that are not done here: Mine; Other\n" in said
    plain = inspection.as_text(mg.inspect(mg.Model(_net(), mg.InputSpec(patch=(16, 16, 16)))))
    assert "intensity none" in plain
    assert "not done here" not in plain
