"""Dense attention by torch's fused kernels: every mask, and when it is chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from bsfa_compile.ops import cpu, crossover, dense
from bsfa_compile.ops.crossover import Crossover
from bsfa_compile.ops.tiles import Geometry, unpack
from tests.ops.cases import Case, assert_close, cases

ALWAYS = Crossover(tokens=0, skipped=0.65)  # no call is too short


@given(cases(), st.sampled_from([1, 7, 256]), st.booleans())
def test_equals_the_reference_under_every_mask(case: Case, rows: int, wide: bool) -> None:
    case = Case(**{**vars(case), "softcap": None})
    q, k, v = case.qkv(torch.float64 if wide else torch.float32)
    call = case.call()
    assert dense.reason(q, k, v, call) is None
    with mock.patch.object(dense, "MASKED_ROWS", rows):
        result = dense.attention(q, k, v, call)
    out, lse, kept = case.reference(q, k, v, torch.full((case.heads,), -math.inf))
    assert_close(result.out, out, 1e-12 if wide else 1e-5)
    assert_close(result.lse, lse, 1e-12 if wide else 1e-5)
    assert torch.equal(unpack(result.tile_mask, case.geometry.k_blocks), kept)
    assert result.counts[:, 0].sum() == 0
    assert result.counts[0, 1] * case.heads == len(case.statistics(q, k))


@pytest.mark.parametrize("start", [0, 1, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_chunk_errs_no_more_than_sdpa_with_a_mask(start: int, dtype: torch.dtype) -> None:
    geometry = Geometry(q_len=300, k_len=300 + start, q_start=start, is_causal=True)
    case = Case(batch=2, kv_heads=2, geometry=geometry, head_dim=32, value_dim=32, peak=2.0)
    q, k, v = case.qkv(dtype)
    out = dense.attention(q, k, v, case.call()).out
    wanted = case.reference(q, k, v, torch.full((4,), -math.inf))[0]
    mask = torch.arange(300 + start) <= start + torch.arange(300)[:, None]
    peer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    budget = 2 * (peer.double() - wanted).abs().max() + 1e-6
    assert (out.double() - wanted).abs().max() <= budget


def test_says_what_it_cannot_do() -> None:
    case = Case(geometry=Geometry(q_len=4, k_len=4, is_causal=True))
    q, k, v = case.qkv()
    call = case.call()
    assert dense.reason(q, k, v, call) is None
    assert "softcap" in str(dense.reason(q, k, v, replace(call, softcap=1.0)))
    assert "empty" in str(dense.reason(q, k[:, :, :0], v[:, :, :0], call))
    on_device = replace(call, q_start_tensor=torch.tensor(0))
    assert "query starts" in str(dense.reason(q, k, v, on_device))
    assert "meta" in str(dense.reason(q.to("meta"), k, v, call))


@given(cases(), st.floats(0, 1))
def test_dense_if_faster_computes_a_superset_of_the_rule(case: Case, share: float) -> None:
    """Which superset is told by the mask, and the numbers are exact over it."""
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    by_rule = case.run(q, k, v, thresholds)
    assert int(by_rule[3][:, 0].sum()) > 0
    with mock.patch.object(crossover, "of", lambda _: ALWAYS):
        out, lse, kept, counts = case.run(q, k, v, thresholds, dense_if_faster=True)
    assert not (by_rule[2] & ~kept).any()
    wanted, wanted_lse = case.attend(q, k, v, kept)
    assert_close(out, wanted)
    assert_close(lse, wanted_lse)
    everything = case.run(q, k, v, torch.full((case.heads,), -math.inf))[2]
    assert counts[:, 0].tolist() == (everything & ~kept).sum(dim=(0, 2, 3)).tolist()
    assert torch.equal(counts[:, 1], by_rule[3][:, 1])


@pytest.mark.parametrize("skips", [[0.0, 0.9], [0.9, 0.0, 0.9, 0.9], [0.9, 0.9], [0.0, 0.0]])
def test_kv_heads_that_skip_little_run_dense_and_the_others_sparse(skips: list[float]) -> None:
    geometry = Geometry(q_len=384, k_len=384, is_causal=True, block_q=16, block_k=8)
    case = Case(kv_heads=len(skips), groups=2, geometry=geometry, peak=4.0)
    q, k, v = case.qkv()
    few, most = case.thresholds(q, k, 0.05), case.thresholds(q, k, 0.95)
    assert few is not None and most is not None
    thresholds = torch.where(torch.tensor(skips).repeat_interleave(2) > 0.5, most, few)
    by_rule = case.run(q, k, v, thresholds)
    with mock.patch.object(crossover, "of", lambda _: ALWAYS):
        out, lse, kept, counts = case.run(q, k, v, thresholds, dense_if_faster=True)
    for kv, share in enumerate(skips):
        heads = slice(2 * kv, 2 * kv + 2)
        if share > 0.5:
            assert torch.equal(kept[:, heads], by_rule[2][:, heads])
            assert torch.equal(counts[heads], by_rule[3][heads])
            assert bool((counts[heads, 0] > 0).all())
        else:
            assert not counts[heads, 0].any()
            assert by_rule[3][heads, 0].any()
    wanted, wanted_lse = case.attend(q, k, v, kept)
    assert_close(out, wanted)
    assert_close(lse, wanted_lse)


@pytest.mark.parametrize(
    ("q_len", "thresholds", "dense_run"),
    [(1, -1.0, True), (64, -1.0, True), (4096, -math.inf, True), (4096, math.inf, False)],
)
def test_dense_runs_where_it_is_faster(q_len: int, thresholds: float, dense_run: bool) -> None:
    """Decode, short calls and thresholds that keep all are dense; a call that skips is not."""
    geometry = Geometry(q_len=q_len, k_len=4096, q_start=4096 - q_len, is_causal=True)
    case = Case(geometry=geometry, groups=1, head_dim=4, value_dim=4)
    q, k, v = case.qkv()
    limits = torch.full((1,), thresholds)
    with (
        mock.patch.object(dense, "attention", wraps=dense.attention) as spy,
        mock.patch.object(cpu, "attention", wraps=cpu.attention) as sparse,
    ):
        counts = case.run(q, k, v, limits, dense_if_faster=True)[3]
        assert bool(spy.called) == dense_run
        assert bool(sparse.called) != dense_run  # not even for a sample
        assert (int(counts[:, 0].sum()) == 0) == dense_run
        spy.reset_mock()
        case.run(q, k, v, limits)
        assert not spy.called
