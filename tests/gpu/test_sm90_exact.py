"""Exact decisions on Hopper against the reference: int8, then 16 bits where int8 cannot tell."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsfa_compile.ops import gate as gating
from bsfa_compile.ops import sm90, sm90_plan
from bsfa_compile.ops.tiles import unpack
from tests.gpu.sm90_cases import CLOSE, FP16, INF, NAN, RELATIVE, Case, Run

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

RELATIVE_TOO = [
    Case(sinks=0, threshold=0.2, q_len=2200, kv_heads=1),
    Case(softcap=20.0, threshold=0.0, q_len=1100, d=192, kv_heads=1),
]
# Thresholds amid the tiles' maxima, so that int8 leaves some of them open.
ABSOLUTE = [
    Case(threshold=4.6, q_len=900),
    Case(threshold=4.6, q_len=900, dtype=FP16),
    Case(threshold=4.6, q_len=1100, kv_heads=1, sinks=0),
    Case(threshold=4.8, q_len=900, d=64),
    Case(threshold=4.8, q_len=700, d=80),
    Case(threshold=4.4, q_len=700, d=192, dv=128),
    Case(threshold=4.4, q_len=900, d=256),
    Case(threshold=4.6, q_start=77, q_len=500),
    Case(threshold=4.4, q_start=1000, q_len=130, on_device=True),
    Case(threshold=2.5, q_start=1000, q_len=1),
    Case(threshold=4.6, heads=3, kv_heads=3, q_len=700, batch=2),
    Case(threshold=4.6, heads=7, kv_heads=1, q_len=700, heads_first=True),
    Case(threshold=3.0, heads=6, columns=3, q_len=700),
    Case(threshold=4.6, causal=False, q_len=300, k_len=777),
    Case(threshold=4.6, softcap=20.0, q_len=700),
    Case(threshold=4.6, window=500, q_len=1200),
    Case(threshold=4.6, padding=-70, batch=2, q_len=700),
    Case(threshold=4.6, padding=70, batch=2, q_len=700, causal=False),
    Case(threshold=4.6, spread=4.0, q_len=900),
]
CASES = [dataclasses.replace(c, precision="exact") for c in (*RELATIVE, *RELATIVE_TOO)]
CASES += [dataclasses.replace(c, precision="exact", rule="absolute") for c in ABSOLUTE]
RULES = [
    Case(precision="exact", threshold=-0.3, q_len=900),
    Case(precision="exact", rule="absolute", threshold=4.6, q_len=900),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse(case: Case) -> None:
    assert Run(case).check() > 0, "nothing was dropped"


@pytest.mark.parametrize(
    "change", [{"threshold": -INF}, {"threshold": INF}, {"window": 100, "causal": False}], ids=str
)
@pytest.mark.parametrize("case", RULES, ids=["relative", "absolute"])
def test_extremes(case: Case, change: dict[str, Any]) -> None:
    Run(dataclasses.replace(case, q_len=500, **change)).check()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    q_len=st.integers(1, 700),
    k_len=st.integers(1, 700),
    q_start=st.integers(0, 300),
    causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]),
    d=st.sampled_from([64, 128]),
    sinks=st.integers(0, 3),
    gate=st.sampled_from([("relative", -0.3), ("relative", 0.0), ("absolute", 4.6)]),
    seed=st.integers(0, 99),
)
def test_any_shape(heads: tuple[int, int], gate: tuple[str, float], **kwargs: Any) -> None:
    rule, threshold = gate
    Run(
        Case(
            heads=heads[0],
            kv_heads=heads[1],
            rule=rule,
            threshold=threshold,
            precision="exact",
            **kwargs,
        )
    ).check()


@pytest.mark.parametrize("case", RULES, ids=["relative", "absolute"])
def test_int8_alone_would_differ(case: Case) -> None:
    exact, int8 = (
        unpack(run().tile_mask, run.g.k_blocks)
        for run in (Run(case), Run(dataclasses.replace(case, precision="int8")))
    )
    assert (int8 & ~exact).any(), "int8 keeps what it cannot decide"
    assert not (exact & ~int8).any()


@pytest.mark.parametrize("case", RULES, ids=["relative", "absolute"])
def test_graph_replays_with_other_thresholds(case: Case) -> None:
    run = Run(case)
    assert run.gate is not None
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for shift in (-1.0, -0.2, 0.2):
        run.gate.thresholds.fill_((case.threshold or 0.0) + shift)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("case", RULES, ids=["relative", "absolute"])
def test_bad_numbers_are_judged_as_the_reference_does(case: Case, bad: float) -> None:
    run = Run(case)
    run.q[0, 1, 700, 5] = bad
    for place in (None, 400):  # then a key as well
        if place is not None:
            run.k[0, 0, place, 7] = bad
        kept = unpack(run().tile_mask, run.g.k_blocks).cpu()
        visible, least, most = run.masks(-INF, CLOSE["exact"], -CLOSE["exact"])
        assert not (least & ~kept).any(), "dropped a tile that the rule keeps"
        assert not (kept & ~most).any(), "kept a tile that the rule drops"
        assert (visible & ~kept).any()


@pytest.mark.parametrize("d", [64, 128, 256])
def test_tiles_with_much_undecided(d: int) -> None:
    """Rows in pairs: what is open is never one row alone, so whole tiles are marked."""
    run = Run(dataclasses.replace(RULES[1], d=d, q_len=1100))
    run.q[:, :, 1::2] = run.q[:, :, ::2]
    assert run.check() > 0


def test_no_room_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Run(RULES[1])()
    monkeypatch.setattr(sm90_plan, "_MOST_LISTED", 5)
    sm90.plan_for.cache_clear()
    assert Run(RULES[1]).check() > 0
    assert torch.equal(Run(RULES[1])().tile_mask, wanted.tile_mask)
    sm90.plan_for.cache_clear()


@pytest.mark.parametrize("where", ["q", "k", "both"])
def test_outlier_channel(where: str) -> None:
    run = Run(Case(precision="exact", rule="absolute", threshold=30.0, q_len=900))
    if where != "k":
        run.q[..., 17] *= 10
    if where != "q":
        run.k[..., 17] *= 10
    assert run.gate is not None
    run.thresholds[:] = {"q": 7.0, "k": 7.0, "both": 60.0}[where]
    run.gate.thresholds.copy_(run.thresholds)
    assert run.check() > 0


@pytest.mark.parametrize(("rule", "threshold"), [("relative", -0.3), ("absolute", 4.9)])
def test_long_context(rule: str, threshold: float) -> None:
    case = Case(precision="exact", rule=rule, threshold=threshold, q_len=131072, kv_heads=1)
    run = Run(dataclasses.replace(case, heads=2))
    result = run()
    dropped, candidates = result.counts.sum(0).tolist()
    assert 0.05 < dropped / candidates < 1
    kept = unpack(result.tile_mask, run.g.k_blocks)
    bounds = ((0, run.g.k_blocks),)
    for i in (3, 500, 777, 1023):
        scale, (tile0, tile1) = run.call.scale, run.g.tiles(i)
        s = gating.block_scores(
            run.q.double(),
            run.k.double(),
            run.g,
            i,
            key_padding_mask=None,
            scale=scale,
            softcap=None,
        )
        statistic = gating.block_statistic(
            gating.tile_row_max(s, run.g.block_k), run.g, i, gate=rule, bounds=bounds, votes=None
        )
        _, droppable = gating.candidates(run.g, i, bounds, None)
        clear = (statistic - threshold).abs() > CLOSE["exact"]
        wanted = ~(droppable.cuda() & (statistic < threshold))
        assert torch.equal(kept[:, :, i, tile0:tile1] & clear, wanted & clear)
        assert math.isfinite(float(result.out[0, :, i * 128].float().norm()))
