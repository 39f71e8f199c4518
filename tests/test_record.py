"""Does an explanation come back equal from its JSON, and does the JSON keep its schema?"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from med_gradcam.calibration import Calibration
from med_gradcam.errors import ImageError
from med_gradcam.explanation import Cells, Explanation, LayerTrial, Measure, Reference, Region
from med_gradcam.geometry import Geometry, cells
from med_gradcam.maps import draw
from med_gradcam.record import FORMAT, from_record, to_json, to_record
from med_gradcam.target import Target
from tests.tiny import affine_of, explained, provenance

SCHEMA = Path(__file__).parents[1] / "med_gradcam" / "schema" / "explanation.schema.json"
IMAGE = Geometry((8, 8, 8), affine_of("LPS", (0.7, 0.7, 1.1), (1 / 3, 2 / 7, -1e-9), (1, 2, 3)))
GRID = cells(IMAGE, (2, 2, 2), (0.5, 0.5, 0.5), (4, 4, 4))
EVIDENCE = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)

text = st.text(max_size=12)
number = st.floats(-1e9, 1e9, allow_nan=False)
maybe = st.none() | number
point = st.tuples(number, number, number)
targets = st.one_of(
    st.builds(Target, st.just("class"), text, st.tuples(st.integers(0, 9)), st.just("softmax")),
    st.builds(Target, st.just("regression"), text, st.tuples(st.integers(0, 9)), st.just("none")),
    st.builds(Target, st.just("contrast"), text, st.just((3, 1)), st.just("sigmoid")),
)
changes = st.fixed_dictionaries(
    {},
    optional={
        "score": number,
        "reference_score": maybe,
        "target": targets,
        "method": text,
        "layer": text,
        "reference": st.builds(Reference, text, maybe, text),
        "cells": st.builds(
            Cells,
            *[st.tuples(*[st.floats(0.1, 100)] * 3)] * 3,
            st.sampled_from(["exact", "measured", "assumed"]),
            st.none() | st.tuples(*[st.floats(0, 50)] * 3),
        ),
        "status": st.sampled_from(["complete", "not_converged", "not_a_cut", "no_sum"]),
        "cost_in_forwards": number,
        "measure": st.sampled_from(get_args(Measure)),
        "bypassed": maybe,
        "modality": st.none() | text,
        "calibration": st.none()
        | st.builds(Calibration, text, text, text, st.just(3.0), st.just(0.25), st.integers(1, 50)),
        "regions": st.lists(st.builds(Region, point, number, text, number, number), max_size=3).map(
            tuple
        ),
        "trials": st.lists(st.builds(LayerTrial, text, maybe, maybe, text), max_size=3).map(tuple),
        "warnings": st.lists(text, max_size=3).map(tuple),
        "provenance": st.fixed_dictionaries(
            {
                "versions": st.dictionaries(text, text, max_size=2),
                "parameters": st.dictionaries(text, st.none() | text | st.booleans(), max_size=3),
                "uids": st.dictionaries(text, text | st.lists(text, max_size=2), max_size=2),
                "notes": st.lists(text, max_size=2).map(tuple),
                "input_sha256": st.lists(text, max_size=2).map(tuple),
                "seed": st.integers(0, 2**31),
            }
        ).map(lambda fields: provenance(**fields)),
    },
)


def validator() -> Any:
    if importlib.util.find_spec("jsonschema") is None:
        return None
    jsonschema = importlib.import_module("jsonschema")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


VALIDATOR = validator()


def problems(record: dict[str, Any]) -> list[str]:
    """What the schema has against a record; without jsonschema only its keys are compared."""
    if VALIDATOR is None:
        wanted = json.loads(SCHEMA.read_text(encoding="utf-8"))["required"]
        return [] if list(record) == wanted else [f"keys {sorted({*record} ^ {*wanted})}"]
    return [error.message for error in VALIDATOR.iter_errors(record)]


@given(changes, st.booleans())
def test_every_field_comes_back_equal(fields: dict[str, Any], with_maps: bool) -> None:
    e = explained(EVIDENCE, GRID, IMAGE, **fields)
    text = to_json(to_record(e, draw(e) if with_maps else None))
    assert from_record(json.loads(text), EVIDENCE) == e
    assert problems(json.loads(text)) == []


def test_the_keys_that_scripts_rely_on() -> None:
    e = explained(EVIDENCE, GRID, IMAGE)
    record = json.loads(to_json(to_record(e, draw(e))))
    assert record["format"] == FORMAT == "med-gradcam-explanation/1"
    keys = """unit score reference_score probability sum_for sum_against residual outside_image
        status target method layer reference cells cell_mm peaks verdict receptive_field_mm
        cost_in_forwards smallest_localisable_mm regions provenance"""
    assert set(keys.split()) <= set(record)
    assert {"kind", "label", "index"} <= set(record["target"])
    assert {"kind", "value"} <= set(record["reference"])
    difference = record["score"] - record["reference_score"]
    net = record["sum_for"] - record["sum_against"]
    assert record["residual"] == pytest.approx(difference - net)
    assert {"ras_mm", "lps_mm", "words"} <= set(record["peaks"][0])
    assert record["verdict"] is None


@pytest.mark.parametrize("link", ["softmax", "none"])
def test_results_from_before_there_were_other_units_are_read(link: str) -> None:
    target = Target("class" if link == "softmax" else "regression", "x", (1,), link)  # type: ignore[arg-type]
    e = explained(EVIDENCE, GRID, IMAGE, target=target)
    old = json.loads(to_json(to_record(e)))
    for key in ("score_unit", "parts", "notices", "signed"):
        del old[key]
    assert old["unit"] == e.target.unit
    assert from_record(old, EVIDENCE) == e


def test_a_map_without_a_sign_has_no_words_for_and_against() -> None:
    e = explained(np.abs(EVIDENCE), GRID, IMAGE, signed=False, measure="relative units")
    record = json.loads(to_json(to_record(e, draw(e))))
    assert (record["signed"], record["sum_for"], record["sum_against"]) == (False, None, None)
    assert record["target"]["words"] is None
    assert {peak["polarity"] for peak in record["peaks"]} == {"strength"}
    assert from_record(record, np.abs(EVIDENCE)) == e
    assert problems(record) == []
    signed = to_record(e.replace(signed=True), draw(e.replace(signed=True)))
    assert (signed["signed"], signed["sum_against"]) == (True, 0.0)


def test_a_unit_that_there_is_not_is_a_damaged_record() -> None:
    record = {**to_record(explained(EVIDENCE, GRID, IMAGE)), "unit": "volts"}
    with pytest.raises(ImageError, match=r"expected a measure of .* got 'volts'"):
        from_record(record, EVIDENCE)


def test_the_schema_names_every_key_and_no_other() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    record = to_record(explained(EVIDENCE, GRID, IMAGE), None)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == set(schema["properties"]) == set(record)
    assert schema["properties"]["format"]["const"] == FORMAT


@pytest.mark.parametrize(
    "spoil",
    [
        {"format": "x"},
        {"score": None},
        {"status": "fine"},
        {"peaks": None},
        {"cell_mm": [1, 2]},
        {"surprise": 1},
        {"target": {"kind": "class"}},
    ],
)
def test_the_schema_has_something_against_a_spoilt_record(spoil: dict[str, Any]) -> None:
    if VALIDATOR is None:
        pytest.skip("jsonschema is not installed")
    assert problems({**to_record(explained(EVIDENCE, GRID, IMAGE), None), **spoil}) != []


def test_numbers_that_json_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"score": float("nan")})


def test_a_scale_of_the_case_comes_back_as_none() -> None:
    e = explained(EVIDENCE, GRID, IMAGE)
    record = to_record(e, draw(e))
    assert record["colour_scale"]["volumes"] == 0
    back = from_record(record, EVIDENCE)
    assert isinstance(back, Explanation)
    assert back.calibration is None
