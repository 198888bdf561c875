"""Statistics: equal to their definition, exact, independent of order, batching and padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsfa_compile.calibrate import measure
from bsfa_compile.calibrate.grid import BINS, EDGES, UNIT, ZERO_EDGE
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import CalibrationError
from bsfa_compile.ops.tiles import Geometry

Observed = Callable[..., SiteStatistics]
Inputs = Callable[..., tuple[Tensor, Tensor]]
GATES = ("relative", "absolute")


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call of any geometry, with any padding, on tiles of a few rows and keys."""
    causal, heads = draw(st.booleans()), draw(st.sampled_from([(2, 1), (2, 2), (6, 2)]))
    q_len, k_len = draw(st.integers(2, 30)), draw(st.integers(1, 40))
    q_start = draw(st.integers(0, 20))
    batch = draw(st.integers(1, 3))
    mask = None
    if draw(st.booleans()):
        left, right = draw(st.integers(0, k_len)), draw(st.integers(0, k_len))
        mask = torch.zeros(batch, k_len, dtype=torch.bool)
        mask[:, left : k_len - right // 3] = True
        for hole in draw(st.lists(st.integers(0, batch * k_len - 1), max_size=4)):
            mask.view(-1)[hole] ^= True
    geometry = Geometry(
        q_len=q_len,
        k_len=k_len,
        q_start=q_start,
        is_causal=causal,
        window=draw(st.one_of(st.none(), st.integers(1, 30))),
        sink_tiles=draw(st.integers(0, 2)),
        block_q=draw(st.sampled_from([4, 8])),
        block_k=draw(st.sampled_from([2, 4, 8])),
    )
    softcap = draw(st.sampled_from([None, 20.0]))
    shape = (batch, *heads, q_len, k_len)
    return {"g": geometry, "mask": mask, "softcap": softcap, "shape": shape}


@settings(max_examples=60, deadline=None)
@given(call=calls(), seed=st.integers(0, 2**31))
def test_equals_the_definition(
    literal: Callable[..., Any], observed: Observed, inputs: Inputs, call: dict[str, Any], seed: int
) -> None:
    q, k = inputs(seed, call.pop("shape"))
    want, got = literal(q, k, **call), observed(q, k, **call)
    heads = q.shape[1]
    assert got.rows == want.rows
    assert {b: n for b, n in enumerate(got.reached.tolist()) if n} == want.reached
    assert got.candidates * heads == len(want.tiles)
    for g, gate in enumerate(GATES):
        counts = torch.zeros(heads, BINS, dtype=torch.int64)
        mass = torch.zeros(heads, BINS, dtype=torch.float64)
        mids: dict[tuple[int, int, int], list[float]] = {}
        by_block: dict[tuple[int, int, int], list[float]] = {}
        for h, block, b, values, tile_mass in want.tiles:
            place = int((values[gate] >= EDGES.double()).sum())
            counts[h, place] += 1
            mass[h, place] += tile_mass
            by_block.setdefault((h, block, b), []).append(values[gate])
        for (h, block, _), found in by_block.items():
            found.sort(reverse=True)
            for rank in range(1, min(8, len(found) - 1) + 1):
                middle = (found[rank - 1] + found[rank]) / 2
                if math.isfinite(middle):
                    mids.setdefault((h, block, rank), []).append(middle)
        assert torch.equal(got.counts[g], counts)
        error = (got.mass[g].double() / UNIT - mass).abs()
        assert (error <= counts * 1.01 / UNIT + 1e-9).all()
        assert int(got.mid_votes[g].sum()) == sum(map(len, mids.values()))
        for (h, block, rank), found in mids.items():
            assert int(got.mid_votes[g, h, block, rank - 1]) == len(found)
            total = int(got.mid_sums[g, h, block, rank - 1]) / UNIT
            assert total == pytest.approx(sum(found), abs=len(found) / UNIT)


def test_edges_are_exact_and_symmetric() -> None:
    assert EDGES.dtype == torch.float32 and bool((EDGES.diff() > 0).all())
    assert EDGES[ZERO_EDGE] == 0 and torch.equal(EDGES, -EDGES.flip(0))
    assert torch.equal(EDGES * 64, (EDGES * 64).round())
    near = EDGES[EDGES.abs() <= 4]
    assert bool((near.diff() == 1 / 64).all())


@pytest.fixture(scope="module", name="pieces")
def make_pieces(inputs: Inputs, observed: Observed) -> list[SiteStatistics]:
    made = []
    for seed, length in enumerate((96, 40, 130, 96)):
        q, k = inputs(seed, (1, 4, 2, length, length), torch.float32)
        g = Geometry(q_len=length, k_len=length, is_causal=True, block_q=16, block_k=8)
        made.append(observed(q, k, g))
    return made


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), split=st.integers(1, 3))
def test_merge_is_associative_and_commutative(
    pieces: list[SiteStatistics], order: list[int], split: int
) -> None:
    straight = pieces[0].merge(pieces[1]).merge(pieces[2]).merge(pieces[3])
    shuffled = [pieces[i] for i in order]
    left, right = shuffled[0], shuffled[split]
    for piece in shuffled[1:split]:
        left = left.merge(piece)
    for piece in shuffled[split + 1 :]:
        right = right.merge(piece)
    assert left.merge(right).equal(straight)
    assert straight.candidates == sum(piece.candidates for piece in pieces) > 0
    assert straight.lengths == {40, 96, 130} and straight.samples == 4


def test_merge_leaves_operands_alone_and_refuses_other_settings(
    pieces: list[SiteStatistics],
) -> None:
    one, two = pieces[:2]
    copy = one.to("cpu")
    one.merge(two)
    assert one.equal(copy) and not one.equal(two)
    other = SiteStatistics(4, block_q=16, block_k=16, sink_tiles=1, max_k=8)
    with pytest.raises(CalibrationError, match="block_k"):
        one.merge(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_its_samples(
    inputs: Inputs, observed: Observed, side: str, dtype: torch.dtype
) -> None:
    """Bit for bit: same integers, whatever stands in the padding, NaN included."""
    lengths = (96, 64, 33) if side == "right" else (96, 64, 32)
    q, k = inputs(3, (3, 4, 2, 96, 96), dtype)
    mask = torch.zeros(3, 96, dtype=torch.bool)
    alone = None
    for b, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(96 - length, 96)
        mask[b, real] = True
        g = Geometry(q_len=length, k_len=length, is_causal=True, block_q=32, block_k=8)
        one = observed(q[b : b + 1, :, real].clone(), k[b : b + 1, :, real].clone(), g)
        alone = one if alone is None else alone.merge(one)
    q.masked_fill_(~mask[:, None, :, None], math.nan)
    k.masked_fill_(~mask[:, None, :, None], math.nan)
    g = Geometry(q_len=96, k_len=96, is_causal=True, block_q=32, block_k=8)
    batched = observed(q, k, g, mask)
    assert alone is not None and batched.equal(alone)
    assert batched.candidates > 0 and batched.rows == sum(lengths)


def test_batching_and_a_static_cache_change_nothing(inputs: Inputs, observed: Observed) -> None:
    q, k = inputs(4, (2, 4, 2, 80, 80), torch.float32)
    g = Geometry(q_len=80, k_len=80, is_causal=True, block_q=16, block_k=8)
    batched = observed(q, k, g)
    alone = observed(q[:1], k[:1], g).merge(observed(q[1:], k[1:], g))
    assert batched.equal(alone)
    cache = torch.nn.functional.pad(k, (0, 0, 0, 100))
    long = Geometry(q_len=80, k_len=180, is_causal=True, block_q=16, block_k=8)
    assert observed(q, cache, long).equal(batched)


def test_chunks_of_whole_tiles_add_up_to_the_prompt(inputs: Inputs, observed: Observed) -> None:
    q, k = inputs(5, (1, 4, 2, 96, 96), torch.float64)
    whole = observed(q, k, Geometry(q_len=96, k_len=96, is_causal=True, block_q=16, block_k=8))
    parts = []
    for start in (0, 32, 64):
        stop = start + 32
        g = Geometry(q_len=32, k_len=stop, q_start=start, is_causal=True, block_q=16, block_k=8)
        parts.append(observed(q[:, :, start:stop], k[:, :, :stop], g))
    chunked = parts[0].merge(parts[1]).merge(parts[2])
    assert torch.equal(chunked.counts, whole.counts)
    assert torch.equal(chunked.mid_sums, whole.mid_sums)
    assert torch.equal(chunked.reached, whole.reached)


def test_a_nan_tile_is_never_dropped_and_costs_its_rows(inputs: Inputs, observed: Observed) -> None:
    q, k = inputs(6, (1, 2, 2, 64, 64), torch.float32)
    k[0, :, 20] = 3e38  # finite, but its scores overflow to inf and NaN
    g = Geometry(q_len=64, k_len=64, is_causal=True, block_q=16, block_k=8)
    got = observed(q, k, g)
    assert (got.counts[:, :, -1] > 0).all()
    later = got.mass[1, 0].sum() / UNIT
    assert later >= 2 * 16  # blocks whose rows see the NaN count as lost in every tile
    assert bool((got.mass >= 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_sample_that_is_not_finite_is_left_out(
    inputs: Inputs, observed: Observed, value: float, where: str
) -> None:
    """In a batch too: what the good sample says stays as it is."""
    q, k = inputs(7, (2, 2, 2, 64, 64), torch.float32)
    g = Geometry(q_len=64, k_len=64, is_causal=True, block_q=16, block_k=8)
    good = observed(q[:1], k[:1], g)
    (q if where == "query" else k)[1, 0, 40, 3] = value
    got = observed(q, k, g)
    assert got.refused == 1 and got.samples == 1 and got.candidates > 0
    got.refused = 0
    assert got.equal(good)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return out


def test_memory_is_one_q_block_of_scores(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SCORES_CPU", 2**18)
    heads, length = 4, 2048
    q = torch.randn(1, heads, length, 8)
    k = torch.randn(1, heads, length, 8)
    mode: Any = _Largest
    with mode() as largest:
        got = observed(q, k, Geometry(q_len=length, k_len=length, is_causal=True))
    assert got.candidates == sum(max(0, 2 * i - 1) for i in range(16))
    assert largest.numel <= 128 * length < heads * length * length // 60
