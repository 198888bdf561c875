"""Attention sinks: equal to a dense softmax with one more column, on every path."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.errors import InputError
from bsfa_compile.ops import crossover, dense, dispatch, library, reference
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.ops.call import Call
from bsfa_compile.ops.crossover import Crossover
from bsfa_compile.ops.tiles import Geometry, pack, unpack
from tests.ops.cases import Case, assert_close, cases
from tests.ops.paths import Path, every_path


def sinks_of(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """[H], from far below to far above the scores; the first head has none."""
    made = torch.Generator().manual_seed(case.seed + 7)
    sinks = 6 * torch.randn(case.heads, generator=made, dtype=torch.float64)
    sinks[0] = -math.inf
    return sinks.to(dtype)


def with_column(case: Case, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, sinks: Tensor) -> Any:
    """The definition: softmax over the kept scores and a column of logits, then cut off."""
    g = case.geometry
    row_block = (g.q_start + torch.arange(g.q_len)) // g.block_q - g.first_block
    tiles = kept[:, :, row_block].repeat_interleave(g.block_k, dim=3)[..., : g.k_len]
    seen = tiles & reference.visibility(g, case.key_padding_mask(), case.batch)[:, None]
    s = reference.scores(q, k, case.scale, case.softcap).masked_fill(~seen, -math.inf)
    column = sinks[:, None, None].expand(case.batch, -1, g.q_len, 1)
    whole = torch.cat([s, column], dim=3)
    p = torch.softmax(whole, dim=3)[..., :-1].nan_to_num(0.0)
    out = p @ v.repeat_interleave(case.groups, dim=1)
    return out, torch.logsumexp(whole, dim=3)


@every_path
@given(cases(), st.floats(0, 1))
def test_sparse_equals_a_softmax_with_one_more_column(path: Path, case: Case, share: float) -> None:
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    assert thresholds is not None
    kept = case.reference(q, k, v, thresholds)[2]
    sinks = sinks_of(case)
    wanted = with_column(case, q.double(), k.double(), v.double(), kept, sinks.double())
    call = Call(**{**vars(case.call()), "sinks": sinks})
    found = path(q, k, v, call, case.gate(thresholds))
    assert int(found.counts[:, 0].sum()) > 0
    assert torch.equal(found.tile_mask, pack(kept)), "sinks must not decide"
    assert_close(found.out, wanted[0])
    assert_close(found.lse, wanted[1])


@given(cases())
def test_the_oracle_and_torchs_kernels_agree(case: Case) -> None:
    q, k, v = case.qkv()
    kept = case.tile_mask(q.double(), k.double(), torch.full((case.heads,), -math.inf).double())
    sinks = sinks_of(case, torch.float64)
    doubles = q.double(), k.double(), v.double()
    wanted = with_column(case, *doubles, kept, sinks)
    out, lse = reference.attention(
        *doubles,
        kept,
        case.geometry,
        key_padding_mask=case.key_padding_mask(),
        scale=case.scale,
        softcap=case.softcap,
        sinks=sinks,
    )
    assert_close(out, wanted[0], 1e-12)
    assert_close(lse, wanted[1], 1e-12)
    call = Call(**{**vars(case.call()), "sinks": sinks.float()})
    if dense.reason(q, k, v, call) is None:
        result = dense.attention(q, k, v, call)
        assert_close(result.out, wanted[0])
        assert_close(result.lse, wanted[1])


CASE = Case(
    batch=2,
    kv_heads=2,
    padding=0.9,
    geometry=Geometry(q_len=20, k_len=30, q_start=10, is_causal=True, block_q=8, block_k=4),
)


def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """The operator's arguments up to the sinks, dropping some tiles; its sinks; the packed mask."""
    inputs, g = CASE.qkv(dtype), CASE.geometry
    thresholds = CASE.thresholds(*inputs[:2])
    assert thresholds is not None
    kept = CASE.reference(*inputs, thresholds)[2]
    config = (CASE.rule, "exact", g.sink_tiles, g.block_q, g.block_k, False)
    sinks = sinks_of(CASE, torch.float64 if dtype == torch.float64 else torch.float32)
    return (*inputs, thresholds, *CASE.mask_arguments(), *config), sinks, pack(kept)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    values, sinks, words = arguments(torch.float32)
    q, k, v, _, *rest = values
    tensors = tuple(x.requires_grad_(grad) for x in (q, k, v))
    sinks = sinks.requires_grad_(grad)
    assert int(library.attention(*values, sinks)[3][:, 0].sum()) > 0
    torch.library.opcheck(library.attention, (*tensors, *values[3:], sinks))
    torch.library.opcheck(library.attention, (*tensors, *values[3:], None))
    blocks = CASE.geometry.block_q, CASE.geometry.block_k
    torch.library.opcheck(library.attend, (*tensors, words, *rest[:7], *blocks, sinks))


def test_gradients_equal_those_of_the_definition_and_finite_differences() -> None:
    values, sinks, words = arguments(torch.float64)
    rest, blocks = values[3:], (CASE.geometry.block_q, CASE.geometry.block_k)
    q, k, v = (x.requires_grad_() for x in values[:3])
    sinks = sinks.nan_to_num(neginf=-2.0).requires_grad_()
    out, lse, found, counts = library.attention(q, k, v, *rest, sinks)
    assert int(counts[:, 0].sum()) > 0 and torch.equal(found, words)

    def whole(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(library.attention(*x[:3], *rest, x[3])[:2])

    def over_mask(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(library.attend(*x[:3], words, *rest[1:8], *blocks, x[3]))

    for run in (whole, over_mask):
        assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)
    weight_out, weight_lse = torch.randn_like(out), torch.randn_like(lse)
    inputs = (q, k, v, sinks)
    ours = torch.autograd.grad((out, lse), inputs, (weight_out, weight_lse))
    kept = CASE.reference(q.detach(), k.detach(), v.detach(), values[3])[2]
    wanted = with_column(CASE, q, k, v, kept, sinks)
    theirs = torch.autograd.grad(wanted, inputs, (weight_out, weight_lse))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, 1e-10)
    assert float(ours[3].abs().min()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_public_function_compiled(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in CASE.qkv())
    thresholds = CASE.thresholds(q.float(), k.float())
    assert thresholds is not None
    sinks, padding = sinks_of(CASE, dtype), CASE.key_padding_mask()

    def run(q: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            q,
            k,
            v,
            thresholds,
            is_causal=True,
            q_start=10,
            key_padding_mask=padding,
            sinks=sinks,
            return_lse=True,
            block_q=8,
            block_k=4,
        )

    kept = CASE.tile_mask(q.double(), k.double(), thresholds.double())
    everything = CASE.tile_mask(q.double(), k.double(), torch.full_like(thresholds, -math.inf))
    assert kept.sum() < everything.sum()
    doubles = q.double(), k.double(), v.double()
    wanted = with_column(CASE, *doubles, kept, sinks.double())
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        out, lse = function(q, sinks)
        assert_close(out, wanted[0], limit)
        assert_close(lse, wanted[1], 1e-5)


def test_some_heads_sparse_and_some_dense() -> None:
    """The CPU's choice by sample gives every head its own sink, and none a say."""
    q, k, v = CASE.qkv()
    thresholds = CASE.thresholds(q, k)
    assert thresholds is not None
    sinks = sinks_of(CASE)
    call = Call(**{**vars(CASE.call()), "sinks": sinks})
    always = Crossover(tokens=0)
    with mock.patch.object(crossover, "of", lambda _: always):
        every = dispatch.attention(q, k, v, call, CASE.gate(thresholds), dense_if_faster=True)
    skipped = torch.tensor([1.0, 1.0, 0.0, 0.0])
    with (
        mock.patch.object(crossover, "of", lambda _: replace(always, skipped=0.5)),
        mock.patch.object(dispatch, "_sampled_skip", lambda *args: skipped),
    ):
        found = dispatch.attention(q, k, v, call, CASE.gate(thresholds), dense_if_faster=True)
    assert every.counts[:, 0].sum() > found.counts[:, 0].sum() > 0
    assert not found.counts[2:, 0].any()
    for result in (every, found):
        kept = unpack(result.tile_mask, CASE.geometry.k_blocks)
        wanted = with_column(CASE, q.double(), k.double(), v.double(), kept, sinks.double())
        assert_close(result.out, wanted[0])
        assert_close(result.lse, wanted[1])


def test_a_row_that_sees_no_key_has_its_sink_alone() -> None:
    q, k, v = CASE.qkv()
    nothing = torch.zeros(2, 30, dtype=torch.bool)
    sinks = torch.tensor([1.0, -2.0, 0.0, -math.inf])
    out, lse = block_sparse_attention(
        q, k, v, key_padding_mask=nothing, sinks=sinks, return_lse=True
    )
    assert not out.any() and torch.equal(lse, sinks[:, None].expand_as(lse))


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        (torch.zeros(3), ["[3]", "[heads] = [4]", "sink_tiles"]),
        (torch.zeros(4, 1), ["[4, 1]"]),
        (torch.zeros(4).int(), ["torch.int32", "floating"]),
        (2, ["sinks are int"]),
        (torch.zeros(4, device="meta"), ["meta", "cpu"]),
    ],
)
def test_wrong_sinks_are_refused(sinks: Any, said: list[str]) -> None:
    q, k, v = CASE.qkv()
    with pytest.raises(InputError) as caught:
        block_sparse_attention(q, k, v, sinks=sinks)
    for words in said:
        assert words in str(caught.value)
