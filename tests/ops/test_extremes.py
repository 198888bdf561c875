"""Scores without bound, NaN, infinities and garbage under the mask, in every implementation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bsfa_compile.ops.tiles import Geometry, unpack
from tests.ops.cases import Case, assert_close
from tests.ops.paths import Path, every_path


@every_path
@pytest.mark.parametrize("rule", ["relative", "absolute"])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_scores_that_rise_without_end_do_not_overflow(
    path: Path, rule: str, direction: float
) -> None:
    """Scores grow by hundreds from tile to tile, upwards or downwards."""
    geometry = Geometry(q_len=16, k_len=64, block_q=8, block_k=4, sink_tiles=0)
    case = Case(geometry=geometry, groups=2, rule=rule, peak=1.0)
    q, k, v = case.qkv()
    q[..., 0] = 20.0
    k[..., 0] = direction * (torch.arange(64) + 20)
    found = case.statistics(q, k)
    thresholds = torch.full((2,), sorted(found.values())[len(found) // 2] - 0.1)
    out, lse, kept = case.reference(q, k, v, thresholds)
    result = path(q, k, v, case.call(), case.gate(thresholds))
    assert int(result.counts[:, 0].sum()) > 0
    assert torch.equal(unpack(result.tile_mask, geometry.k_blocks), kept)
    assert_close(result.out, out)
    assert_close(result.lse, lse)
    assert result.lse.abs().max() > 100


@every_path
def test_kept_tiles_may_rise_without_end_between_dropped_ones(path: Path) -> None:
    """With thresholds below 0, when the running maximum stands for that of the kept tiles."""
    geometry = Geometry(q_len=16, k_len=64, block_q=8, block_k=4, sink_tiles=0)
    case = Case(geometry=geometry, groups=2, peak=1.0)
    q, k, v = case.qkv()
    q[..., 0] = 20.0
    k[..., 0] = -torch.arange(64.0)
    k[:, :, (torch.arange(64) // 4) % 2 == 0] -= 100.0
    thresholds = torch.full((2,), -1.0)
    out, lse, kept = case.reference(q, k, v, thresholds)
    result = path(q, k, v, case.call(), case.gate(thresholds))
    assert kept[:, :, :2, 1::2].all() and not kept[:, :, :2, :-1:2].any()
    assert torch.equal(unpack(result.tile_mask, geometry.k_blocks), kept)
    assert_close(result.out, out)
    assert_close(result.lse, lse)


@every_path
def test_a_dropped_maximum_does_not_drown_what_is_kept(path: Path) -> None:
    """Thresholds above 0 may drop the tile with the largest scores, hundreds above the others."""
    geometry = Geometry(q_len=8, k_len=64, block_q=8, block_k=4)
    case = Case(geometry=geometry, groups=1, peak=1.0)
    q, k, v = case.qkv()
    q[..., 0] = 20.0
    k[..., 0] = 0.0
    k[:, :, 30] = 0.0
    k[:, :, 30, 0] = 100.0
    thresholds = torch.tensor([1e4])
    out, lse, kept = case.reference(q, k, v, thresholds)
    assert not kept[0, 0, 0, 7]
    result = path(q, k, v, case.call(), case.gate(thresholds))
    assert torch.equal(unpack(result.tile_mask, geometry.k_blocks), kept)
    assert_close(result.out, out)
    assert_close(result.lse, lse)


@every_path
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_not_a_number_stays_with_the_rows_that_see_it(path: Path, bad: float, where: str) -> None:
    """Its tiles are kept, its rows are NaN as in dense attention, other rows are untouched."""
    geometry = Geometry(q_len=32, k_len=32, is_causal=True, block_q=8, block_k=4)
    case = Case(geometry=geometry, groups=2)
    q, k, v = case.qkv()
    thresholds = torch.full((2,), -1.0)
    clean = path(q, k, v, case.call(), case.gate(thresholds))
    assert int(clean.counts[:, 0].sum()) > 0
    row = 13
    (q if where == "q" else k)[:, :, row, 3] = bad
    result = path(q, k, v, case.call(), case.gate(thresholds))
    wanted, lse, kept = case.reference(q, k, v, thresholds)
    assert torch.equal(unpack(result.tile_mask, 8), kept)
    touched = wanted.isnan().any(dim=-1)
    assert torch.equal(result.out.isnan().any(dim=-1), touched)
    untouched = ~touched
    assert untouched.any()
    assert_close(result.out[untouched], wanted[untouched])
    assert_close(result.lse[untouched], lse[untouched])
    if math.isnan(bad):
        assert touched.any()
        if where == "k":
            assert kept[:, :, 1:4, row // 4].all()


@every_path
def test_hidden_garbage_is_not_seen(path: Path) -> None:
    """NaN in K beyond the causal edge or under padding, in tiles that are computed."""
    geometry = Geometry(q_len=16, k_len=32, is_causal=True, block_q=8, block_k=8)
    case = Case(geometry=geometry)
    q, k, v = case.qkv()
    padding = torch.ones(1, 32, dtype=torch.bool)
    padding[:, 2] = False
    call = replace(case.call(), key_padding_mask=padding)
    thresholds = torch.full((2,), -1.0)
    clean = path(q, k, v, call, case.gate(thresholds))
    k[:, :, 2], k[:, :, 14:] = math.nan, math.inf
    result = path(q, k, v, call, case.gate(thresholds))
    assert torch.equal(clean.tile_mask, result.tile_mask)
    assert_close(result.out[:, :, :14], clean.out[:, :, :14].double())
    assert result.out[:, :, :14].isfinite().all()
