"""Models under other backends of torch.compile than ours: what runs dense is counted and told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests import toy, zoo


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def door() -> Any:
    model = zoo.build("llama", layers=1)
    model.set_attn_implementation("bsfa")
    return model


def test_attn_implementation_without_thresholds_compiles_as_sdpa() -> None:
    model, given = door(), zoo.inputs("llama", 90)
    wanted = zoo.output(model, given)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(zoo.output(compiled, given), wanted)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_attn_implementation_with_thresholds_says_that_it_runs_dense(backend: str) -> None:
    model, given = door(), zoo.inputs("llama", 90)
    dense = zoo.output(model, given)
    values = {zoo.ZOO["llama"].sites[0]: torch.full((4, 1), -0.02)}
    thresholds = Thresholds(values=values, **toy.BLOCKS)
    bsfa.apply(model, thresholds, compile=False, dense_if_faster=False)
    sparse = zoo.output(model, given)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    compiled: Any = torch.compile(model, backend=backend)
    with pytest.warns(UserWarning, match='other than "bsfa"'):
        assert torch.allclose(zoo.output(compiled, given), dense, atol=1e-4)
    assert bsfa.report(model).calls == {"sparse": 1, "eager": 1}
    torch._dynamo.reset()
    options: Any = {"thresholds": thresholds, **toy.EAGER}
    ours: Any = torch.compile(model, backend="bsfa", options=options)
    assert torch.allclose(zoo.output(ours, given), sparse)


def test_torch_compile_of_an_optimized_model_leaves_it_sparse() -> None:
    model, x = toy.Toy(), toy.sample()
    dense = toy.run(model, x)
    bsfa.apply(model, toy.thresholds(toy.sites()), **toy.EAGER)
    sparse = toy.run(model, x)
    assert not torch.allclose(sparse, dense)
    compiled: Any = torch.compile(model)
    assert torch.allclose(toy.run(compiled, x), sparse)
    assert bsfa.report(model).calls == {"sparse": 4}
