"""Every implementation of the operator against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bsfa_compile.ops import chunked, cpu, cpu_heads, dispatch
from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.tiles import Geometry, pack, unpack
from tests.ops.cases import Case, assert_close, cases

Path = Callable[[Tensor, Tensor, Tensor, Call, Gate | None], Result]


@contextmanager
def small_pieces() -> Iterator[None]:
    """One tile and one kv head at a time, as in long calls."""
    with (
        mock.patch.object(cpu_heads, "SCORES_AT_ONCE", 1),
        mock.patch.object(cpu, "HEADS_AT_ONCE", 1),
        mock.patch.object(chunked, "SCORES_AT_ONCE", 1),
    ):
        yield


def on_cpu_in_pieces(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    with small_pieces():
        return cpu.attention(q, k, v, call, gate)


def chunks(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    return chunked.attention(q, k, v, call, gate=gate)


def chunks_with_start_on_device(
    q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None
) -> Result:
    start = torch.tensor(call.geometry.q_start)
    moved = replace(call, geometry=replace(call.geometry, q_start=0), q_start_tensor=start)
    with small_pieces():
        return chunked.attention(q, k, v, moved, gate=gate)


PATHS: list[Path] = [cpu.attention, on_cpu_in_pieces, chunks, chunks_with_start_on_device]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)


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


@pytest.mark.parametrize("path", PATHS[2:], ids=lambda path: path.__name__)
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
