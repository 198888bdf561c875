"""The gate against the reference, and what the rule promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.ops import gate, reference
from bsfa_compile.ops.quantise import int8_block_scores, quantise_keys
from bsfa_compile.ops.tiles import Geometry, unpadded_tiles
from tests.ops.cases import Case, cases


def block_masks(case: Case, q: Tensor, k: Tensor, thresholds: Tensor) -> Tensor:
    """The decision by `gate`'s functions alone: bool [B, H, q_blocks, k_blocks]."""
    g, padding = case.geometry, case.key_padding_mask()
    bounds = unpadded_tiles(padding, case.batch, g.k_len, g.block_k)
    kept = torch.zeros(case.batch, case.heads, g.q_blocks, g.k_blocks, dtype=torch.bool)
    for i in range(g.q_blocks):
        s = gate.block_scores(
            q, k, g, i, key_padding_mask=padding, scale=case.scale, softcap=case.softcap
        )
        statistic = gate.block_statistic(
            gate.tile_row_max(s, g.block_k),
            g,
            i,
            gate=case.rule,
            bounds=bounds,
            votes=gate.row_votes(g, i, padding),
        )
        visible, droppable = gate.candidates(g, i, bounds, padding)
        column = gate.threshold_column(thresholds, g, i)
        kept[:, :, i, slice(*g.tiles(i))] = gate.kept_tiles(statistic, column, visible, droppable)
    return kept


@given(cases(), st.floats(0, 1))
def test_decisions_equal_the_reference(case: Case, share: float) -> None:
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    assert thresholds is not None
    wanted = case.reference(q, k, v, thresholds)[2]
    everything = case.reference(q, k, v, torch.full((case.heads,), -torch.inf))[2]
    assert wanted.sum() < everything.sum()
    assert torch.equal(block_masks(case, q, k, thresholds), wanted)


@given(cases())
def test_block_scores_are_the_references_where_seen(case: Case) -> None:
    q, k, _ = case.qkv()
    g, padding = case.geometry, case.key_padding_mask()
    seen = reference.visibility(g, padding, case.batch)[:, None]
    wanted = reference.scores(q.double(), k.double(), case.scale, case.softcap)
    wanted = wanted.masked_fill(~seen, -math.inf)
    for i in range(g.q_blocks):
        s = gate.block_scores(
            q, k, g, i, key_padding_mask=padding, scale=case.scale, softcap=case.softcap
        )
        first, stop = (tile * g.block_k for tile in g.tiles(i))
        part = wanted[:, :, slice(*g.rows(i)), first:stop]
        assert s.shape[-1] == stop - first
        assert bool((s[..., part.shape[-1] :] == -math.inf).all())
        torch.testing.assert_close(s[..., : part.shape[-1]].double(), part, atol=1e-4, rtol=0)


@given(cases(), st.floats(0, 0.9), st.floats(0.01, 3))
def test_raising_a_threshold_never_adds_a_tile(case: Case, share: float, more: float) -> None:
    q, k, _ = case.qkv()
    low = case.thresholds(q, k, share)
    assume(low is not None)
    assert low is not None
    fewer, many = block_masks(case, q, k, low + more), block_masks(case, q, k, low)
    assert not (fewer & ~many).any()
    assert fewer.sum() < block_masks(case, q, k, torch.full_like(low, -torch.inf)).sum()


def masks_by_hand(case: Case, q: Tensor, k: Tensor, threshold: float, over_kept: bool) -> Tensor:
    """The relative gate with the running maximum over kept or over all computed tiles."""
    g = case.geometry
    s = reference.scores(q.double(), k.double(), case.scale)
    seen = reference.visibility(g, None, 1)[0]
    kept = torch.zeros(1, case.heads, g.q_blocks, g.k_blocks, dtype=torch.bool)
    for i in range(g.q_blocks):
        order = reference.visiting_order(list(range(*g.tiles(i))), 0, g.sink_tiles)
        rows = slice(*g.rows(i))
        for h in range(case.heads):
            hidden = s[0, h, rows].masked_fill(~seen[rows], -math.inf)
            running = hidden.new_full(hidden.shape[:1], -math.inf)
            for j in order:
                row_max = hidden[:, j * g.block_k : (j + 1) * g.block_k].amax(dim=1)
                rise = torch.where(row_max == -math.inf, -math.inf, row_max - running).amax()
                keep = g.always_kept(i, j) or not bool(rise < threshold)
                kept[0, h, i, j] = keep
                if keep or not over_kept:
                    running = torch.maximum(running, row_max)
    return kept


@given(cases(), st.floats(-6, 0))
def test_thresholds_up_to_0_never_drop_a_rows_maximum(case: Case, threshold: float) -> None:
    case = Case(**{**vars(case), "padding": None, "softcap": None, "rule": "relative", "batch": 1})
    q, k, v = case.qkv()
    over_kept = masks_by_hand(case, q, k, threshold, over_kept=True)
    assert torch.equal(over_kept, masks_by_hand(case, q, k, threshold, over_kept=False))
    kept = case.reference(q, k, v, torch.full((case.heads,), threshold))[2]
    assert torch.equal(kept, over_kept)
    g = case.geometry
    seen = reference.visibility(g, None, 1)[:, None]
    s = reference.scores(q.double(), k.double(), case.scale).masked_fill(~seen, -math.inf)
    row_block = (g.q_start + torch.arange(g.q_len)) // g.block_q - g.first_block
    allowed = kept[:, :, row_block].repeat_interleave(g.block_k, dim=3)[..., : g.k_len]
    best = s.masked_fill(~allowed, -math.inf).amax(dim=-1)
    assert torch.equal(best, s.amax(dim=-1))


def test_thresholds_above_0_may_drop_a_rows_maximum() -> None:
    """The converse, so that the test above is known to be able to fail."""
    case = Case(geometry=Geometry(q_len=32, k_len=64, block_q=8, block_k=4, sink_tiles=0), groups=1)
    q, k, _ = case.qkv()
    by_kept = masks_by_hand(case, q, k, 1.0, over_kept=True)
    assert not torch.equal(by_kept, masks_by_hand(case, q, k, 1.0, over_kept=False))


@given(cases(), st.floats(0, 1))
def test_a_nan_keeps_its_tile(case: Case, share: float) -> None:
    case = Case(**{**vars(case), "padding": None})
    q, k, _ = case.qkv()
    found = sorted(case.statistics(q, k))
    assume(found)
    b, h, i, j = found[int(share * (len(found) - 1))]
    g = case.geometry
    key = max(g.keys(i)[0], j * g.block_k)
    thresholds = torch.full((case.heads,), 1e4)
    before = block_masks(case, q, k, thresholds)
    k[b, h // case.groups, key] = math.nan
    after = block_masks(case, q, k, thresholds)
    assert not before[b, h, i, j] or case.statistics(*case.qkv()[:2])[b, h, i, j] == math.inf
    assert after[b, h, i, j]
    assert not (before & ~after).any()


@given(cases())
def test_int8_scores_and_margins_equal_the_reference(case: Case) -> None:
    q, k, _ = case.qkv(torch.float64)
    g = case.geometry
    for adds_mean in (False, True):
        wanted, margin = reference.int8_scores(q, k, case.scale, g, add_mean=adds_mean)
        keys = quantise_keys(k, g.block_k, torch.float64)
        s, found = int8_block_scores(q, keys, (0, g.k_blocks), case.scale, adds_mean=adds_mean)
        torch.testing.assert_close(s[..., : g.k_len], wanted)
        torch.testing.assert_close(found, margin)
        exact = reference.scores(q, k, case.scale)
        centre = 0.0 if adds_mean else reference.scores(q, k.mean(dim=2, keepdim=True), case.scale)
        per_key = margin.repeat_interleave(g.block_k, dim=3)[..., : g.k_len]
        off = (wanted - (exact - centre)).abs() > per_key + 1e-9
        assert off.double().mean() < 0.01  # the margin is 3 to 4.2 standard deviations


def turned(x: Tensor) -> Tensor:
    """x [..., L, D] turned by its position as RoPE does."""
    length, dim = x.shape[-2:]
    angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    low, high = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


@settings(derandomize=True, max_examples=8)
@given(st.sampled_from([30.0, 100.0, 300.0]), st.integers(3, 6), st.integers(0, 99))
def test_int8_takes_channels_that_rope_turns(size: float, count: int, seed: int) -> None:
    """Outlier channels of K that are in no mean: with one step for all channels nearly all tiles
    are kept."""
    random = torch.Generator().manual_seed(seed)
    length, dim, few = 1024, 64, 8
    q, k = (torch.randn(1, heads, length, dim, generator=random) for heads in (2, 1))
    large = few + torch.randperm(dim // 2 - few, generator=random)[:count]
    k[..., large] += size * (1 + torch.rand(count, generator=random))
    for half in (large, large + dim // 2):
        q[..., half] /= size
    q, k = turned(q), turned(k)
    q[..., :few], k[..., :few] = 2.0, torch.randn(1, 1, length, few, generator=random)
    k[:, :, 0, :few] = 8.0
    geometry = Geometry(q_len=length, k_len=length, sink_tiles=1)

    def kept(threshold: float, precision: str) -> Tensor:
        limits = torch.full((2, 1), threshold)
        return reference.tile_mask(
            q, k, limits, geometry, scale=dim**-0.5, gate="relative", precision=precision
        )

    candidates = int((kept(-math.inf, "exact") & ~kept(math.inf, "exact")).sum())
    exact, int8 = kept(-10.0, "exact"), kept(-10.0, "int8")
    assert (~exact).sum() - (~kept(-math.inf, "exact")).sum() > 0.5 * candidates
    assert (int8 & ~exact).sum() < 0.1 * candidates
    assert (exact & ~int8).sum() < 0.01 * candidates


@pytest.mark.parametrize("keys", [1, 100])
def test_int8_leaves_out_channels_that_all_keys_share(keys: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 1, keys, 8)
    k[..., 3] = 5.0
    q[..., 3] = 1e6
    s, margin = reference.int8_scores(
        q, k, 1.0, Geometry(q_len=64, k_len=keys, is_causal=False), add_mean=False
    )
    wanted = reference.scores(q.double(), (k - k.mean(dim=2, keepdim=True)).double(), 1.0)
    assert margin.max() < 0.3
    assert (s - wanted).abs().max() < 0.3
