"""Fingerprints see a model's structure and weights, and nothing that optimizing adds."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from bsfa_compile.calibrate import Thresholds, check, fingerprint
from bsfa_compile.calibrate.fingerprint import Model
from bsfa_compile.errors import InputError, ThresholdsError


class _Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU())


def _model(width: int = 8) -> _Model:
    torch.manual_seed(0)
    return _Model(width)


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x))


def test_structure_and_weights_are_told_apart() -> None:
    one = fingerprint(_model())
    assert one == fingerprint(_model())
    wider = fingerprint(_model(9))
    assert wider.structure != one.structure
    trained = _model()
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(0.01)
    assert fingerprint(trained).structure == one.structure
    assert fingerprint(trained).weights != one.weights
    other = _model()
    other.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    assert fingerprint(other).structure != one.structure


def test_what_optimizing_adds_is_not_seen() -> None:
    model = _model()
    before = fingerprint(model)
    model.attn.register_buffer("bsfa_thresholds_0", torch.zeros(4, 1), persistent=False)
    model.attn.register_buffer("bsfa_counters_0", torch.zeros(4, 2), persistent=True)
    model.attn.register_forward_pre_hook(lambda *_: None)
    model.compile(backend="eager")
    assert fingerprint(model) == before
    wrapped: Any = torch.compile(model, backend="eager")
    assert fingerprint(wrapped) == before


def test_traced_graphs() -> None:
    model, x = _Small(), torch.randn(2, 4)
    traced = torch.fx.symbolic_trace(model)
    exported = torch.export.export(model, (x,))
    for graph in (traced, exported, exported.module()):
        before = fingerprint(graph)
        assert before == fingerprint(graph)
    before = fingerprint(traced)
    traced.register_buffer("bsfa_thresholds_0", torch.zeros(1, 1))
    traced.graph.call_function(torch.relu, (next(iter(traced.graph.nodes)),))
    traced.recompile()
    assert fingerprint(traced) == before
    model.inner.weight.data.mul_(2)
    assert fingerprint(torch.fx.symbolic_trace(model)).weights != before.weights
    wrong: list[Any] = [3, None, "model"]
    for bad in wrong:
        with pytest.raises(InputError, match=r"an nn\.Module"):
            fingerprint(bad)


def test_odd_parameters() -> None:
    model = nn.Module()
    model.meta = nn.Parameter(torch.zeros(3, device="meta"))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.scalar = nn.Parameter(torch.tensor(1.0))
    model.narrow = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    model.strided = nn.Parameter(torch.randn(30, 40).t())
    model.integer = nn.Parameter(torch.arange(5), requires_grad=False)
    before = fingerprint(model)
    with torch.no_grad():
        model.strided.add_(1)
    assert fingerprint(model).weights != before.weights


def test_a_large_model_takes_less_than_a_second() -> None:
    with torch.device("cpu"):
        model = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(100))
    start = time.process_time()
    fingerprint(model)
    assert time.process_time() - start < 1


def _thresholds(model: Model, **heads: int) -> Thresholds:
    values = {name: torch.zeros(count, 1) for name, count in heads.items()}
    return Thresholds(values=values, fingerprint=fingerprint(model))


def test_check_accepts_its_model_and_warns_of_other_weights() -> None:
    model = _model()
    made = _thresholds(model, attn=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(made, model)
        check(made, model, sites={"attn": 4})
    with torch.no_grad():
        model.attn.weight.add_(1)
    with pytest.warns(UserWarning, match="weights"):
        check(made, model)


def test_check_names_every_site_that_does_not_fit() -> None:
    model = _model()
    made = _thresholds(model, attn=4, gone=2)
    with pytest.raises(ThresholdsError, match="no site gone"):
        check(made, model)
    with pytest.raises(ThresholdsError) as caught:
        check(made, model, sites={"attn": 8, "mlp": 2})
    for said in ("no site gone", "no thresholds for mlp", "attn has 8 heads, its thresholds 4"):
        assert said in str(caught.value)
    many = {f"s{i}": 1 for i in range(9)}
    with pytest.raises(ThresholdsError, match="and 4 more"):
        check(_thresholds(model, attn=4), model, sites={"attn": 4} | many)
    with pytest.raises(ThresholdsError, match="parameter shapes"):
        check(_thresholds(model, attn=4), _model(9))
    check(Thresholds(values={"attn": torch.zeros(1, 1), "attn#1": torch.zeros(1, 1)}), model)
