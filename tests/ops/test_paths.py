"""Every implementation of the operator against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from bsfa_compile.ops import chunked, cpu, cpu_heads, dispatch
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.tiles import Geometry, pack, unpack
from tests.ops.cases import Case, assert_close, cases
from tests.ops.paths import PATHS, Path, every_path, small_pieces


@every_path
@given(case=cases(), share=st.floats(0, 1), wide=st.booleans())
def test_equals_the_reference(path: Path, case: Case, share: float, wide: bool) -> None:
    q, k, v = case.qkv(torch.float64 if wide else torch.float32)
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    assert thresholds is not None
    out, lse, kept = case.reference(q, k, v, thresholds)
    result = path(q, k, v, case.call(), case.gate(thresholds))
    dropped, droppable = result.counts.sum(dim=0).tolist()
    assert 0 < dropped <= droppable
    assert torch.equal(unpack(result.tile_mask, case.geometry.k_blocks), kept)
    assert_close(result.out, out, 1e-12 if wide else 1e-5)
    assert_close(result.lse, lse, 1e-12 if wide else 1e-5)


@every_path
@given(case=cases(), columns=st.integers(1, 5))
def test_each_q_block_has_its_own_threshold(path: Path, case: Case, columns: int) -> None:
    q, k, v = case.qkv()
    low = case.thresholds(q, k, 0.2)
    assume(low is not None)
    assert low is not None
    step = torch.arange(columns) * 0.37
    thresholds = low[:, None] + step
    _, _, kept = case.reference(q, k, v, thresholds)
    near = case.statistics(q, k)
    g = case.geometry
    gaps = [
        abs(x - float(thresholds[h, min(g.first_block + i, columns - 1)]))
        for (_, h, i, _), x in near.items()
    ]
    assume(min(gaps) > 1e-4)
    result = path(q, k, v, case.call(), case.gate(thresholds))
    assert int(result.counts[:, 0].sum()) > 0 or columns > 1
    assert torch.equal(unpack(result.tile_mask, g.k_blocks), kept)


@pytest.mark.parametrize("path", PATHS[3:], ids=lambda path: path.__name__)
@given(case=cases(), share=st.floats(0, 1))
def test_int8_decides_as_the_reference_and_computes_exactly(
    path: Path, case: Case, share: float
) -> None:
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    assert thresholds is not None
    result = path(q, k, v, case.call(), case.gate(thresholds, "int8"))
    kept = unpack(result.tile_mask, case.geometry.k_blocks)
    wanted = case.tile_mask(q, k, thresholds, "int8")
    assert (kept != wanted).double().mean() < 0.01  # a statistic may lie on its threshold
    out, lse = case.attend(q, k, v, kept)
    assert_close(result.out, out)
    assert_close(result.lse, lse)


@every_path
@given(case=cases())
def test_minus_infinity_keeps_all_and_plus_infinity_what_is_always_kept(
    path: Path, case: Case
) -> None:
    q, k, v = case.qkv()
    g = case.geometry
    everything = torch.full((case.heads,), -math.inf)
    found = case.statistics(q, k)
    result = path(q, k, v, case.call(), case.gate(everything))
    out, lse, kept = case.reference(q, k, v, everything)
    assert torch.equal(unpack(result.tile_mask, g.k_blocks), kept)
    assert result.counts.tolist() == [[0, len(found) // case.heads]] * case.heads
    assert_close(result.out, out)
    assert_close(result.lse, lse)
    result = path(q, k, v, case.call(), case.gate(-everything))
    least = kept.clone()
    for (b, h, i, j), statistic in found.items():
        least[b, h, i, j] = statistic == math.inf
    assert torch.equal(unpack(result.tile_mask, g.k_blocks), least)
    out, lse = case.attend(q, k, v, least)
    assert_close(result.out, out)
    assert_close(result.lse, lse)


@every_path
def test_tiles_wide_as_by_default(path: Path) -> None:
    geometry = Geometry(q_len=500, k_len=700, q_start=200, is_causal=True)
    case = Case(kv_heads=2, groups=3, geometry=geometry, head_dim=32, value_dim=24, peak=4.0)
    q, k, v = case.qkv()
    k[:, :, 0] = 0.5 * q[0, 0].mean(dim=0)
    thresholds = case.thresholds(q, k, 0.6)
    assert thresholds is not None
    out, lse, kept = case.reference(q, k, v, thresholds)
    result = path(q, k, v, case.call(), case.gate(thresholds))
    dropped, droppable = result.counts.sum(dim=0).tolist()
    assert 0.4 < dropped / droppable < 0.8
    assert torch.equal(unpack(result.tile_mask, geometry.k_blocks), kept)
    assert_close(result.out, out)
    assert_close(result.lse, lse)


@given(case=cases(), share=st.floats(0, 1), pieces=st.booleans(), thin=st.booleans())
def test_attend_takes_any_tile_mask(case: Case, share: float, pieces: bool, thin: bool) -> None:
    """The gate's own mask, and one that a selector thinned."""
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    assert thresholds is not None
    kept = case.reference(q, k, v, thresholds)[2]
    if thin:
        kept &= torch.rand(kept.shape, generator=torch.Generator().manual_seed(case.seed)) < 0.7
    wanted = case.attend(q, k, v, kept)
    call = replace(case.call(), geometry=replace(case.geometry, sink_tiles=0))
    if pieces:
        with small_pieces():
            found = cpu.attend(q, k, v, call, pack(kept))
    else:
        found = cpu.attend(q, k, v, call, pack(kept))
    other = chunked.attention(q, k, v, call, tile_mask=pack(kept))
    for out, lse in (found, (other.out, other.lse)):
        assert_close(out, wanted[0])
        assert_close(lse, wanted[1])


@pytest.mark.parametrize(
    ("threads", "heads", "rows", "split"),
    [(1, 7, 128, 1), (2, 7, 128, 2), (2, 8, 128, 1), (4, 7, 128, 4), (16, 7, 128, 2), (2, 1, 9, 1)],
)
def test_rows_are_split_so_that_threads_have_equal_shares(
    threads: int, heads: int, rows: int, split: int
) -> None:
    with mock.patch.object(torch, "get_num_threads", lambda: threads):
        assert cpu_heads._row_split(heads, rows) == split


def test_no_path_waits_for_the_device_or_reads_it() -> None:
    """Under fake tensors any look at a value raises."""
    with FakeTensorMode():
        q, k = torch.empty(2, 4, 40, 8), torch.empty(2, 2, 50, 8)
        padding = torch.empty(2, 50, dtype=torch.bool)
        geometry = Geometry(q_len=40, k_len=50, is_causal=True, window=20, block_q=8, block_k=4)
        call = Call(
            geometry=geometry,
            q_start_tensor=torch.empty((), dtype=torch.int64),
            key_padding_mask=padding,
            scale=1.0,
            softcap=3.0,
        )
        for precision in ("exact", "int8"):
            gate = Gate(thresholds=torch.empty(4, 2), rule="relative", precision=precision)
            result = chunked.attention(q, k, k, call, gate=gate)
        assert result.out.shape == q.shape
        dispatch.attend_backward(
            result.out, result.lse, q, k, k, result.out, result.lse, result.tile_mask, call
        )
