"""What was rewritten in an exported graph is exported, saved and compiled again, at any length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests import toy, zoo

LENGTH = torch.export.Dim("length", min=2, max=1024)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def exported(module: nn.Module, *, strict: bool) -> ExportedProgram:
    """A program for any length."""
    return torch.export.export(
        module, (toy.sample(64),), dynamic_shapes={"x": {1: LENGTH}}, strict=strict
    )


class Again(nn.Module):
    """An exported module under another signature, so that its one input is called x."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


@pytest.mark.parametrize("strict", [False, True])
def test_an_optimized_program_is_exported_again(strict: bool) -> None:
    thresholds = toy.thresholds(toy.sites())
    made = bsfa.apply(exported(toy.Toy(), strict=strict), thresholds, dense_if_faster=False)
    wanted, rates = toy.expected(toy.Toy(), thresholds, toy.sample(150))
    assert all(rate > 0 for rate in rates.values())
    again = exported(Again(made.module()), strict=strict)
    assert sum("attention_v1" in str(node.target) for node in again.graph.nodes) == 2
    held = io.BytesIO()
    torch.export.save(again, held)
    held.seek(0)
    loaded = torch.export.load(held).module()
    assert torch.allclose(toy.run(loaded, toy.sample(150)), wanted)
    compiled: Any = torch.compile(loaded, backend="aot_eager")
    assert torch.allclose(toy.run(compiled, toy.sample(150)), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_a_hugging_face_program_serves_all_lengths(name: str) -> None:
    module = zoo.build(name).double()
    given = zoo.left_padded(zoo.inputs(name, 120), (0, 40))
    tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
    shapes = {key: {1: LENGTH} if key in tensors else None for key in given}
    with torch.no_grad():
        # Without this torch 2.11 takes a relation that holds for all lengths for a constraint.
        program = torch.export.export(
            module,
            (),
            given,
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    calibration = bsfa.calibrate(program, given, **toy.BLOCKS, progress=False)
    assert list(calibration.sites) == list(zoo.ZOO[name].sites)
    assert calibration.dense == {}
    open_ = {n: torch.full((s.heads, 1), -torch.inf) for n, s in calibration.sites.items()}
    made = bsfa.apply(program, Thresholds(values=open_, **toy.BLOCKS), dense_if_faster=False)
    sparse = bsfa.apply(
        program, calibration.thresholds(bsfa.Sparsity(0.3), "absolute"), dense_if_faster=False
    )
    for length in (120, 187):
        given = zoo.left_padded(zoo.inputs(name, length), (0, 40))
        rows = given["attention_mask"].bool()
        dense = zoo.output(module, given)[rows]
        assert torch.allclose(zoo.output(made.module(), given)[rows], dense)
        assert not torch.allclose(zoo.output(sparse.module(), given)[rows], dense)
    assert any(rate for rate in toy.skipped(sparse).values())
