"""Chunks of a prompt, padded batches, empty and single-token inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops import library
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.ops.tiles import Geometry, mask_rows, unpack
from tests.ops.cases import Case, assert_close

CAUSAL = Geometry(q_len=40, k_len=40, is_causal=True, block_q=8, block_k=4)


@given(
    st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=4),
    st.sampled_from([None, 13]),
    st.sampled_from(["relative", "absolute"]),
    st.integers(0, 99),
    st.booleans(),
)
def test_chunked_prefill_equals_one_shot(
    chunks: list[int], window: int | None, rule: str, seed: int, as_tensor: bool
) -> None:
    """Chunks on block boundaries over a growing cache: the same tiles, the same numbers."""
    total = sum(chunks)
    geometry = Geometry(
        q_len=total, k_len=total, is_causal=True, window=window, block_q=8, block_k=4
    )
    case = Case(kv_heads=2, geometry=geometry, rule=rule, seed=seed)
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, 0.5)
    assume(thresholds is not None)
    assert thresholds is not None
    thresholds = thresholds[:, None] + 0.1 * torch.arange(3)
    out, lse, kept, counts = case.run(q, k, v, thresholds)
    assert int(counts[:, 0].sum()) > 0
    start, seen = 0, torch.zeros_like(counts)
    for rows in chunks:
        stop = start + rows
        place = (torch.tensor(start), 0) if as_tensor else (None, start)
        part, part_lse, words, part_counts = library.attention(
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            thresholds,
            None,
            *place,
            True,
            window,
            None,
            case.scale,
            rule,
            "exact",
            1,
            8,
            4,
            False,
        )
        blocks = slice(start // 8, stop // 8)
        mine = unpack(words, stop // 4)[:, :, : rows // 8]
        assert torch.equal(mine, kept[:, :, blocks, : stop // 4])
        assert_close(part, out[:, :, start:stop], 1e-6)
        assert_close(part_lse, lse[:, :, start:stop], 1e-6)
        seen += part_counts
        start = stop
    assert torch.equal(seen, counts)


@pytest.mark.parametrize("left", [0, 4, 8, 24])
@pytest.mark.parametrize("right", [0, 3, 8])
@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_padded_rows_equal_unpadded_ones(left: int, right: int, rule: str) -> None:
    """Padding of whole tiles on the left (q blocks move along when it is whole blocks), any on
    the right; pad queries have no vote and garbage in the padding is not seen."""
    case = Case(kv_heads=2, geometry=CAUSAL, rule=rule)
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, 0.5)
    assert thresholds is not None
    out, lse, _, counts = case.run(q, k, v, thresholds)
    assert int(counts[:, 0].sum()) > 0

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, left, right), value=50.0)

    padding = F.pad(torch.ones(1, 40, dtype=torch.bool), (left, right))
    result = block_sparse_attention(
        padded(q),
        padded(k),
        padded(v),
        thresholds,
        is_causal=True,
        key_padding_mask=padding,
        scale=case.scale,
        gate=rule,
        block_q=8,
        block_k=4,
        return_lse=True,
    )
    if left % 8 == 0:
        assert_close(result[0][:, :, left : left + 40], out)
        assert_close(result[1][:, :, left : left + 40], lse)
    dense = block_sparse_attention(
        padded(q),
        padded(k),
        padded(v),
        is_causal=True,
        key_padding_mask=padding,
        scale=case.scale,
    )
    assert_close(
        dense[:, :, left : left + 40],
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=True),
    )
    assert not result[0][:, :, :left].any()
    assert bool((result[1][:, :, :left] == -math.inf).all())


@pytest.mark.parametrize("q_len", [0, 1, 3])
@pytest.mark.parametrize("k_len", [0, 1, 70])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("dense_if_faster", [False, True])
@pytest.mark.parametrize("thresholds", [None, -1.0])
def test_empty_and_one_token_inputs(
    q_len: int, k_len: int, batch: int, dense_if_faster: bool, thresholds: float | None
) -> None:
    geometry = Geometry(q_len=q_len, k_len=k_len, q_start=max(k_len - q_len, 0), is_causal=True)
    case = Case(batch=batch, kv_heads=2, geometry=geometry, padding=0.9)
    q, k, v = case.qkv()
    limits = None if thresholds is None else torch.full((4,), thresholds)
    out, lse, kept, counts = case.run(q, k, v, limits, dense_if_faster=dense_if_faster)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and counts.shape == (4, 2)
    assert kept.shape == (batch, 4, mask_rows(q_len), -(-k_len // 64))
    wanted, wanted_lse = case.attend(q, k, v, kept)
    assert_close(out, wanted)
    assert_close(lse, wanted_lse)


@pytest.mark.parametrize("dense_if_faster", [False, True])
def test_rows_that_see_nothing_give_0_and_minus_infinity(dense_if_faster: bool) -> None:
    case = Case(batch=2, geometry=CAUSAL)
    q, k, v = case.qkv()
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :20] = False
    padding[1] = False
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        torch.full((2,), -1.0),
        is_causal=True,
        key_padding_mask=padding,
        block_q=8,
        block_k=4,
        return_lse=True,
        dense_if_faster=dense_if_faster,
    )
    blind = torch.zeros(2, 40, dtype=torch.bool)
    blind[0, :20], blind[1] = True, True
    blind = blind[:, None].expand_as(lse)
    assert not out[blind].any()
    assert bool((lse[blind] == -math.inf).all())
    assert out[~blind].isfinite().all() and out[~blind].any()
    assert lse[~blind].isfinite().all()
