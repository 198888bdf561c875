"""What optimize and its like refuse: one clear error, before any work, and nothing is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

import bsfa_compile as bsfa
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_retarget_needs_a_calibration_or_thresholds() -> None:
    model = toy.Toy()
    with pytest.raises(bsfa.ThresholdsError, match="not optimized"):
        bsfa.retarget(model, bsfa.Budget(0.1))
    bsfa.apply(model, toy.thresholds(toy.sites()), **toy.EAGER)
    with pytest.raises(bsfa.ThresholdsError, match="without a calibration"):
        bsfa.retarget(model, bsfa.Budget(0.1))
    bsfa.retarget(model, toy.thresholds(toy.sites()))
    with pytest.raises(bsfa.ThresholdsError, match="columns"):
        bsfa.retarget(model, toy.thresholds(toy.sites(), columns=5))
    with pytest.raises(bsfa.ThresholdsError, match="other sites"):
        bsfa.retarget(model, toy.thresholds(toy.sites(1)))


def test_an_input_that_the_model_fails_on_is_named() -> None:
    with pytest.raises(
        bsfa.CalibrationError, match=r"input 1 .*float32 \[1, 5, 3\].*1 inputs before"
    ):
        bsfa.calibrate(toy.Toy(), [toy.sample(), torch.randn(1, 5, 3)], progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "budget"},
        {"gate": "sharp"},
        {"precision": "int4"},
        {"max_length": 0},
        {"sink_tiles": -1},
        {"held_out": [toy.sample()]},
        {"target": bsfa.Quality(error=0.1), "held_out": ["text"]},
    ],
)
def test_wrong_arguments_cost_no_forward_pass(wrong: dict[str, Any]) -> None:
    model, calls = toy.Toy(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(bsfa.InputError):
        bsfa.optimize(model, [toy.sample()], **wrong, progress=False)
    assert not calls


def test_wrong_models_and_thresholds_are_refused() -> None:
    model, x = toy.Toy(), toy.sample()
    compiled = torch.compile(model)
    before = toy.traces(model)
    with pytest.raises(bsfa.InputError, match=r"torch\.compile"):
        bsfa.optimize(cast(Any, compiled), x, progress=False)
    for refused in (bsfa.report, bsfa.revert):
        with pytest.raises(bsfa.InputError, match="NoneType"):
            refused(cast(Any, None))
    with pytest.raises(bsfa.InputError, match="got dict"):
        bsfa.apply(model, cast(Any, {}))
    with pytest.raises(bsfa.InputError, match=r"nn\.Module"):
        bsfa.calibrate(cast(Any, toy.run), x, progress=False)
    with pytest.raises(bsfa.ThresholdsError):
        bsfa.apply(model, toy.thresholds(toy.sites(3)))
    with torch.device("meta"):
        empty = toy.Toy()
    with pytest.raises(bsfa.InputError, match="meta"):
        bsfa.apply(empty, toy.thresholds(toy.sites()))
    assert toy.traces(model) == before
