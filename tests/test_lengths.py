"""Inputs longer than thresholds hold for: said once, by every way a model runs, and reported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from bsfa_compile.html import render
from bsfa_compile.ops.tiles import reached
from tests import toy, zoo

MADE_ON, WITHIN, BEYOND = 96, 120, 200  # 120 = 1.25 * 96
MATCH = "inputs of 200 tokens; thresholds were made on up to 96: .* max_length=200 "


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", name="calibration")
def make_calibration() -> Calibration:
    data = [toy.sample(MADE_ON), toy.sample(64)]
    made = bsfa.calibrate(toy.Toy(), data, **toy.BLOCKS, progress=False)
    return replace(made, fingerprint=None)  # a traced program has another


def exported() -> ExportedProgram:
    lengths = {"x": {1: torch.export.Dim("length", min=2, max=4096)}}
    return torch.export.export(toy.Toy(), (toy.sample(64),), dynamic_shapes=lengths)


Runs = tuple[Any, Callable[[int], object]]


def graphs(given: Thresholds, dynamic: bool | None = None) -> Runs:
    model = bsfa.apply(toy.Toy(), given, dynamic=dynamic, **toy.EAGER)
    return model, lambda length: toy.run(model, toy.sample(length))


def symbolic(given: Thresholds) -> Runs:
    traced = fx.symbolic_trace(toy.Toy())
    model = bsfa.apply(traced, given, dense_if_faster=False, example=toy.sample())
    return model, lambda length: toy.run(model, toy.sample(length))


def program(given: Thresholds) -> Runs:
    model = bsfa.apply(exported(), given, dense_if_faster=False)
    module: Any = model.module()
    return model, lambda length: toy.run(module, toy.sample(length))


def door(given: Thresholds) -> Runs:
    model = zoo.build("llama").double()
    model.set_attn_implementation("bsfa")
    values = {name: torch.full((4, 1), -0.02) for name in zoo.ZOO["llama"].sites}
    if given.curves is not None:
        values = {name: value.expand(4, 16).clone() for name, value in values.items()}
        given = replace(given, curves={name: torch.zeros(4, 3) for name in values})
    bsfa.apply(model, replace(given, values=values), compile=False, dense_if_faster=False)
    return model, lambda length: zoo.output(model, zoo.inputs("llama", length, 1))


WAYS = [
    graphs,
    pytest.param(lambda given: graphs(given, dynamic=True), id="dynamic"),
    symbolic,
    program,
    door,
]


@pytest.mark.parametrize("make", WAYS)
def test_it_is_said_once(make: Callable[[Thresholds], Runs], calibration: Calibration) -> None:
    model, run = make(calibration.thresholds(bsfa.Budget(0.2)))
    assert bsfa.report(model).longest == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (MADE_ON, 50, WITHIN):
            run(length)
    report = bsfa.report(model)
    assert (report.longest, report.lengths, report.reach) == (WITHIN, (64, MADE_ON), MADE_ON)
    with pytest.warns(UserWarning, match=MATCH):
        run(BEYOND)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(BEYOND)
        run(BEYOND + 50)
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())
    report = bsfa.report(model)
    told = "longest input 250 tokens, calibrated on 64 to 96, thresholds for up to 96"
    assert told in str(report) and told in render(report)
    assert json.loads(report.to_json())["longest"] == BEYOND + 50


@pytest.mark.parametrize("make", [graphs, program, door])
def test_a_fit_holds_as_far_as_its_columns(
    make: Callable[[Thresholds], Runs], calibration: Calibration
) -> None:
    model, run = make(calibration.thresholds(bsfa.Budget(0.2), max_length=256))
    assert bsfa.report(model).reach == 256
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(BEYOND)
    with pytest.warns(UserWarning, match="inputs of 330 tokens; .* up to 256: "):
        run(330)


def test_a_cache_counts_and_decoding_says_nothing(calibration: Calibration) -> None:
    model, _ = door(calibration.thresholds(bsfa.Budget(0.2)))
    tokens: Tensor = zoo.inputs("llama", BEYOND, 1)["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = model(tokens[:, :MADE_ON]).past_key_values
        for i in range(MADE_ON, MADE_ON + 40):
            model(tokens[:, i : i + 1], past_key_values=cache)
    with torch.no_grad(), pytest.warns(UserWarning, match=MATCH):
        model(tokens[:, MADE_ON + 40 :], past_key_values=cache)


def test_thresholds_that_drop_nothing_hold_everywhere(calibration: Calibration) -> None:
    solved = calibration.thresholds(bsfa.Budget(0.2))
    values = {name: torch.full_like(value, -torch.inf) for name, value in solved.values.items()}
    assert solved.reach == MADE_ON and replace(solved, values=values).reach is None
    assert replace(solved, lengths=()).reach is None


@pytest.mark.parametrize(
    ("span", "wanted"),
    [
        ((0, 80, 80, True, None), (80, 80)),
        ((40, 80, 4096, True, None), (120, 120)),  # a static cache is longer than what is in it
        ((40, 80, 120, True, 64), (120, 64)),
        ((0, 80, 200, False, None), (200, 200)),
        ((0, 200, 200, False, 64), (200, 127)),
    ],
)
def test_what_a_call_reaches(span: Any, wanted: tuple[int, int]) -> None:
    assert reached(*span) == wanted
