"""Targets: each promise recomputed from the calibration data by the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.calibrate.grid import EDGES
from bsfa_compile.calibrate.predict import predict
from bsfa_compile.calibrate.solve import Budget, Sparsity, Target, TopK, solve
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import CalibrationError, InputError
from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry

GATES = ("relative", "absolute")
LENGTH = 160
GEOMETRY = Geometry(q_len=LENGTH, k_len=LENGTH, is_causal=True, block_q=16, block_k=8)
HEADS = 4

Data = tuple[dict[str, SiteStatistics], dict[str, list[tuple[Tensor, Tensor]]]]


@pytest.fixture(scope="module", name="data")
def make_data(
    observed: Callable[..., SiteStatistics], inputs: Callable[..., tuple[Tensor, Tensor]]
) -> Data:
    """Two sites, two samples each, of different sharpness."""
    sites: dict[str, SiteStatistics] = {}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site, sharpness in (("flat", 0.4), ("sharp", 1.2)):
        calls[site] = []
        for seed in (1, 2):
            q, k = inputs(seed, (1, HEADS, 2, LENGTH, LENGTH), torch.float64)
            calls[site].append((q * sharpness, k))
        first, second = (observed(q, k, GEOMETRY) for q, k in calls[site])
        sites[site] = first.merge(second)
    return sites, calls


def _measured(
    calls: list[tuple[Tensor, Tensor]], thresholds: Tensor, gate: str
) -> tuple[Tensor, Tensor]:
    """Fraction of candidate tiles dropped and mass lost per row, per head, by the reference."""
    lost = torch.zeros(HEADS, dtype=torch.float64)
    dropped = torch.zeros(HEADS, dtype=torch.float64)
    g = GEOMETRY
    visible = torch.zeros(g.q_blocks, g.k_blocks, dtype=torch.bool)
    droppable = visible.clone()
    for i in range(g.q_blocks):
        for j in range(*g.tiles(i)):
            visible[i, j] = True
            droppable[i, j] = not g.always_kept(i, j)
    for q, k in calls:
        kept = reference.tile_mask(q, k, thresholds, g, scale=1.0, gate=gate)
        away = visible & ~kept
        assert not (away & ~droppable).any()
        dropped += away[0].sum(dim=(1, 2))
        seen = reference.visibility(g, None, 1)
        p = torch.softmax(
            reference.scores(q, k, 1.0).masked_fill(~seen[:, None], -math.inf), dim=-1
        )
        row_block, key_block = torch.arange(LENGTH) // 16, torch.arange(LENGTH) // 8
        gone = away[:, :, row_block][:, :, :, key_block]
        lost += (p * gone)[0].sum(dim=(1, 2))
    return dropped / (int(droppable.sum()) * len(calls)), lost / (LENGTH * len(calls))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("eps", [0.0, 0.003, 0.03, 0.3])
def test_budget_holds_and_is_used_up(data: Data, eps: float, gate: str) -> None:
    sites, calls = data
    solved = solve(sites, Budget(eps), gate)
    for name, site in sites.items():
        values = solved[name]
        assert values.shape == (HEADS, 1) and values.dtype == torch.float32
        dropped, lost = _measured(calls[name], values, gate)
        told = predict(site, values, gate)
        assert told.exact
        torch.testing.assert_close(told.dropped, dropped)
        torch.testing.assert_close(told.lost, lost, atol=1e-6, rtol=0)
        assert (lost <= eps).all()
        if gate == "relative":
            assert (values <= 0).all()
        if eps:
            assert (dropped > 0).all()
        # One edge higher breaks the budget, unless the cap or the last tile stopped it.
        up = torch.searchsorted(EDGES, values, right=True).clamp_max(len(EDGES) - 1)
        _, more = _measured(calls[name], EDGES[up], gate)
        stopped = (values[:, 0] == 0) if gate == "relative" else (dropped == 1)
        assert ((more > eps) | stopped).all()


@pytest.mark.parametrize("gate", GATES)
@settings(max_examples=30, deadline=None)
@given(eps=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_budget_never_lowers_a_threshold(
    data: Data, gate: str, eps: tuple[float, float]
) -> None:
    low, high = (solve(data[0], Budget(value), gate) for value in sorted(eps))
    assert all((low[name] <= high[name]).all() for name in low)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.2])
def test_sparsity_is_reached_within_a_bin(data: Data, fraction: float, gate: str) -> None:
    sites, calls = data
    solved = solve(sites, Sparsity(fraction), gate)
    measured = {name: _measured(calls[name], solved[name], gate) for name in sites}
    reached = torch.stack([dropped for dropped, _ in measured.values()]).mean()
    total = sum(site.candidates * HEADS for site in sites.values())
    largest = max(int(site.counts[:, :, 1:-1].max()) for site in sites.values())
    assert fraction <= float(reached) + 1e-12
    assert float(reached) <= fraction + largest / total + 1e-12
    if fraction == 0:
        return
    # Equal lost mass: the level reached is a budget that gives the same drop in every head.
    level = max(float(predict(sites[n], solved[n], gate).lost.max()) for n in sites)
    same = solve(sites, Budget(min(1.0, level * (1 + 1e-9) + 1e-12)), gate)
    for name in sites:
        again, _ = _measured(calls[name], same[name], gate)
        torch.testing.assert_close(again, measured[name][0])


def test_sparsity_beyond_the_cap_gives_the_most(data: Data) -> None:
    sites, _ = data
    most = solve(sites, Sparsity(1.0), "relative")
    assert all((value == 0).all() for value in most.values())
    everything = solve(sites, Sparsity(1.0), "absolute")
    for name, site in sites.items():
        assert (predict(site, everything[name], "absolute").dropped == 1).all()


def _paper(site: list[tuple[Tensor, Tensor]], k_best: int, literal: Any, gate: str) -> Tensor:
    """The paper's thresholds, literally: mean over samples of the k / k+1 midpoint."""
    blocks = GEOMETRY.q_len // GEOMETRY.block_q
    out = torch.full((HEADS, blocks), -math.inf, dtype=torch.float64)
    for h in range(HEADS):
        for block in range(blocks):
            middles = []
            for q, k in site:
                found = sorted(
                    (t[3][gate] for t in literal(q, k, GEOMETRY).tiles if t[:2] == (h, block)),
                    reverse=True,
                )
                if len(found) > k_best:
                    middles.append((found[k_best - 1] + found[k_best]) / 2)
            if middles:
                out[h, block] = sum(middles) / len(middles)
    return out


@pytest.mark.parametrize("k_best", [1, 3, 8])
def test_top_k_is_the_papers_definition(
    data: Data, literal: Callable[..., Any], k_best: int
) -> None:
    sites, calls = data
    cache = {id(q): literal(q, k, GEOMETRY) for q, k in calls["sharp"]}
    for gate in GATES:
        want = _paper(calls["sharp"], k_best, lambda q, k, g: cache[id(q)], gate)
        want = want.clamp_max(0) if gate == "relative" else want
        got = solve(sites, TopK(k_best), gate)["sharp"]
        torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=1e-6)
        assert got.isfinite().any() and (got[:, 0] == -math.inf).all()
    dropped, _ = _measured(calls["sharp"], solve(sites, TopK(k_best), "absolute")["sharp"], gate)
    assert (dropped > 0).all()


def test_one_infinite_sample_does_not_poison_the_mean() -> None:
    site = SiteStatistics(1, block_q=16, block_k=8, sink_tiles=1, max_k=4)
    long, short = {0: 0, 1: 3}, {0: 0, 1: 1}
    site.add_sample(length=32, rows={0: 16, 1: 16}, blocks=long)
    site.add_tiles(1, torch.tensor([[[-1.0, -2.0, -4.0]]] * 2), torch.ones(1, 3))
    site.add_sample(length=24, rows={0: 16, 1: 8}, blocks=short)
    site.add_tiles(1, torch.tensor([[[-9.0]]] * 2), torch.ones(1, 1))
    solved = solve({"a": site}, TopK(1), "absolute")["a"]
    assert solved.tolist() == [[-math.inf, -1.5]]
    assert solve({"a": site}, TopK(2), "absolute")["a"].tolist() == [[-math.inf, -3.0]]
    assert solve({"a": site}, TopK(3), "absolute")["a"].tolist() == [[-math.inf, -math.inf]]


def test_one_odd_sample_does_not_move_the_mean() -> None:
    site = SiteStatistics(1, block_q=16, block_k=8, sink_tiles=1, max_k=4)
    odd = SiteStatistics(1, block_q=16, block_k=8, sink_tiles=1, max_k=4)
    for value, into in ((-1.0, site), (-3.0, site), (-2.0, site), (9e5, odd)):
        into.add_sample(length=32, rows={0: 16, 1: 16}, blocks={0: 0, 1: 2})
        into.add_tiles(1, torch.full((2, 1, 2), value), torch.ones(1, 2))
    assert solve({"a": site}, TopK(1), "absolute")["a"].tolist() == [[-math.inf, -2.0]]
    for both in (site.merge(odd), odd.merge(site)):
        assert solve({"a": both}, TopK(1), "absolute")["a"].tolist() == [[-math.inf, -1.5]]


def test_a_block_without_a_sample_takes_the_nearest_earlier() -> None:
    site = SiteStatistics(1, block_q=16, block_k=8, sink_tiles=1, max_k=4)
    for block, value in ((2, -1.0), (5, -3.0)):
        site.add_sample(length=100, rows={block: 16}, blocks={block: 2})
        site.add_tiles(block, torch.full((2, 1, 2), value), torch.ones(1, 2))
    solved = solve({"a": site}, TopK(1), "absolute")["a"][0].tolist()
    assert solved == [-math.inf, -math.inf, -1.0, -1.0, -1.0, -3.0]


def test_a_head_without_candidates_stays_dense(observed: Callable[..., SiteStatistics]) -> None:
    q = k = torch.randn(1, 2, 16, 8)
    short = observed(q, k, Geometry(q_len=16, k_len=16, is_causal=True, block_q=16, block_k=8))
    targets: tuple[Target, ...] = (Budget(0.5), Sparsity(0.5), TopK(2))
    for target in targets:
        for gate in GATES:
            assert (solve({"a": short}, target, gate)["a"] == -math.inf).all()
    assert short.rows == 16 and short.candidates == 0


def test_what_cannot_be_solved_says_so(data: Data) -> None:
    with pytest.raises(CalibrationError, match="max_k=9"):
        solve(data[0], TopK(9), "absolute")
    with pytest.raises(CalibrationError, match="no attention"):
        solve({}, Budget(0.1), "relative")
    with pytest.raises(InputError, match="gate"):
        solve(data[0], Budget(0.1), "both")
    fractions: list[Any] = [-0.1, 1.5, math.nan, "x", True]
    for bad in fractions:
        with pytest.raises(InputError, match="from 0 to 1"):
            Budget(bad)
        with pytest.raises(InputError, match="from 0 to 1"):
            Sparsity(bad)
    numbers: list[Any] = [0, -1, 2.0, True]
    for bad in numbers:
        with pytest.raises(InputError, match="at least 1"):
            TopK(bad)


def test_prediction_between_edges_is_marked_as_an_estimate(data: Data) -> None:
    site = data[0]["sharp"]
    solved = solve(data[0], Budget(0.05), "relative")["sharp"]
    low, high = predict(site, solved - 1, "relative"), predict(site, solved, "relative")
    between = predict(site, solved - 0.007, "relative")
    assert high.exact and not between.exact
    assert (low.dropped <= between.dropped).all() and (between.dropped <= high.dropped).all()
    dense = predict(site, torch.full((HEADS, 1), -math.inf), "relative")
    assert dense.exact and (dense.dropped == 0).all() and (dense.lost == 0).all()
    by_block = solve(data[0], TopK(3), "absolute")["sharp"]
    told = predict(site, by_block, "absolute")
    assert not told.exact and (told.dropped > 0).all() and (told.dropped < 1).all()
