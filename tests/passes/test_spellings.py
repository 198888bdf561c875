"""Attention in every spelling that people use: taken over, and computed as the reference does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from bsfa_compile.passes.sites import Site, find
from tests import toy
from tests.passes.spellings import HEADS, LENGTH, SINK, SPELLINGS, Attend, Attention


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def open_thresholds() -> Thresholds:
    return Thresholds(values={"(model)": torch.full((HEADS, 1), -math.inf)}, **toy.BLOCKS)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_operator(name: str) -> None:
    attend, meaning = SPELLINGS[name]
    module, x = Attention(attend), toy.sample(LENGTH, batch=2)
    dense = toy.run(module, x)
    bsfa.apply(module, open_thresholds(), fullgraph=True, **toy.EAGER)
    assert torch.allclose(toy.run(module, x), dense)
    values = torch.tensor([[-0.1], [-0.2]])
    bsfa.retarget(module, Thresholds(values={"(model)": values}, **toy.BLOCKS))
    got = toy.run(module, x)
    (rate,) = toy.skipped(module).values()
    assert rate is not None and rate > 0

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"is_causal": False, **toy.BLOCKS, **meaning}
        out = bsfa.block_sparse_attention(q, k, v, values, **options)
        assert isinstance(out, Tensor)
        return out

    assert torch.allclose(got, toy.run(Attention(operator), x))
    assert not torch.allclose(got, dense)


EXPORTED = [
    "bool_mask",
    "chosen_by_where",
    "of_mbart",
    "in_place",
    "einsum_of_sequences",
    "baddbmm",
]


@pytest.mark.parametrize("name", [*EXPORTED, "sink_column"])
def test_exported_spellings(name: str) -> None:
    module, x = Attention(SPELLINGS[name][0]), toy.sample(LENGTH)
    dense = toy.run(module, x)
    program = torch.export.export(module, (x,))
    calibration = bsfa.calibrate(program, x, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    solved = calibration.thresholds(bsfa.Sparsity(0.3), "absolute")
    made = bsfa.apply(program, solved, dense_if_faster=False)
    made.validate()
    changed = toy.run(made.module(), x)
    assert not torch.allclose(changed, dense)
    assert all(rate is not None and rate > 0 for rate in toy.skipped(made).values())


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(dim=-2) @ v


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-1, -2)).softmax(dim=-1), 0.1, training=True) @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(dim=-1)
    return weights @ v + weights.mean()


def learned_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.mean()).softmax(dim=-1) @ v


def einsum_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bgkd->bqk", q, k).softmax(dim=-1)
    out: Tensor = torch.einsum("bqk,bhkd->bhqd", weights, v)
    return out


def column_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(dim=-1)[..., :-1] @ v[:, :, 1:]


def sink_of_every_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = torch.cat([q @ k.transpose(-1, -2), q[..., :1]], dim=-1)
    return both.softmax(dim=-1)[..., :-1] @ v


def read_before_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    seen = scores[:, :, :1]
    scores.mul_(2.0)
    return scores.softmax(dim=-1) @ v + seen.mean()


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT).softmax(dim=-2).mT @ v


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return weights @ v / weights.sum(dim=-1, keepdim=True)


def of_logarithms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT, dim=-1).exp() @ v


def rid_of_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(dim=-1).nan_to_num() @ v


def less_maximum_then_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.tanh(scores - scores.amax(dim=-1, keepdim=True)).softmax(dim=-1) @ v


def less_maximum_before_the_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores = scores - scores.amax(dim=-1, keepdim=True)
    both = torch.cat([scores, SINK.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return both.softmax(dim=-1)[..., :-1] @ v


REFUSED = [
    (other_axis, "another axis"),
    (dropping, "dropout"),
    (weights_returned, "used elsewhere"),
    (learned_temperature, "by a tensor"),
    (einsum_over_heads, ""),
    (column_dropped, "last column"),
    (sink_of_every_row, "per head"),
    (read_before_written, "'mul_'"),
    (keys_first, "another axis"),
    (softmax_by_hand, "'exp'"),
    (of_logarithms, "'log_softmax'"),
    (rid_of_nan, "'nan_to_num'"),
    (less_maximum_then_capped, "'sub'"),
    (less_maximum_before_the_sink, "'sub'"),
]


@pytest.mark.parametrize(("attend", "reason"), REFUSED)
def test_what_the_operator_cannot_do_stays_and_says_why(attend: Attend, reason: str) -> None:
    module, x = Attention(attend), toy.sample(LENGTH)
    found: list[Site] = []

    def looking(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        found.extend(find(gm))
        gm.recompile()
        return gm.forward

    compiled: Any = torch.compile(module, backend=looking, fullgraph=True)
    got = toy.run(compiled, x)
    (site,) = found
    assert site.reason is not None
    assert reason in site.reason
    if reason != "dropout":
        assert torch.equal(got, toy.run(module, x))  # looking changes nothing
