"""The Hopper kernels against the reference: decisions, output, log-sum-exp, counts, bad inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsfa_compile.ops import reference, sm90
from bsfa_compile.ops.tiles import unpack
from tests.gpu.sm90_cases import FP16, INF, NAN, RELATIVE, Case, Run

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

DROPPING = [
    *RELATIVE,
    Case(d=96, threshold=-0.3, q_len=700),
    Case(rule="absolute", threshold=5.0, q_len=900),
    Case(rule="absolute", threshold=5.0, causal=False, q_len=300, k_len=777),
    Case(rule="absolute", softcap=20.0, threshold=5.0, q_len=700),
    Case(rule="absolute", window=500, threshold=5.0, q_len=1200),
    Case(rule="absolute", spread=4.0, threshold=5.0, q_len=900),
]
KEEPING = [
    Case(threshold=None),
    Case(threshold=None, causal=False, q_len=200, k_len=333),
    Case(threshold=None, window=50, padding=40, batch=2, softcap=10.0, q_len=400),
    Case(threshold=-INF, q_len=300),
    Case(threshold=INF, q_len=200, k_len=100),
    Case(window=100, causal=False, q_len=500, k_len=600),
    Case(padding=133, causal=False, batch=2, q_len=300, k_len=500),
    Case(padding=450, batch=2, q_len=500),
]


@pytest.mark.parametrize("case", DROPPING, ids=str)
def test_sparse(case: Case) -> None:
    assert Run(case).check() > 0, "nothing was dropped"


@pytest.mark.parametrize("case", KEEPING, ids=str)
def test_dense_or_nearly(case: Case) -> None:
    Run(case).check()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    q_len=st.integers(1, 700),
    k_len=st.integers(1, 700),
    q_start=st.integers(0, 300),
    causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]),
    d=st.sampled_from([64, 128]),
    sinks=st.integers(0, 3),
    threshold=st.sampled_from([-1.0, -0.3, 0.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(heads: tuple[int, int], **kwargs: Any) -> None:
    Run(Case(heads=heads[0], kv_heads=heads[1], **kwargs)).check()


def test_mask_and_attention_apart() -> None:
    run = Run(Case(q_len=900))
    result = run()
    assert run.gate is not None
    tiles, counts = sm90.tile_mask(run.q, run.k, run.call, run.gate)
    assert torch.equal(tiles, result.tile_mask)
    assert torch.equal(counts, result.counts)
    assert counts[:, 0].sum() > 0
    out, lse = sm90.attend(run.q, run.k, run.v, tiles, run.call)
    assert torch.equal(out, result.out)
    assert torch.equal(lse, result.lse)


def test_graph_replays_with_other_thresholds() -> None:
    run = Run(Case(q_len=900))
    assert run.gate is not None
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for threshold in (-2.0, -0.3, 0.0):
        run.gate.thresholds.fill_(threshold)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("nats", [8.0, 14.0, 60.0, 95.0, 300.0])
@pytest.mark.parametrize(
    "case",
    [
        Case(threshold=None, q_len=900),
        Case(q_len=900, batch=2),
        Case(q_len=900, dtype=FP16),
        Case(threshold=None, causal=False, d=64, q_len=300, k_len=900, dtype=FP16),
        Case(threshold=0.0, d=256, q_len=900),
    ],
    ids=str,
)
def test_late_score_far_above_the_first(case: Case, nats: float) -> None:
    """Weights overflow where a row's maximum over its first step is taken for the whole."""
    run = Run(case)
    run.q[:, 1, ::4, 9] = 8.0
    run.k[:, 0, 600, 9] = nats * case.d**0.5 / 8
    run.k[:, 0, 400, 9] = nats * case.d**0.5 / 16
    run.check()


@pytest.mark.parametrize("threshold", [None, -INF, -0.3])
def test_many_items_of_which_some_are_done_again(threshold: float | None) -> None:
    run = Run(Case(threshold=threshold, q_len=4096, heads=24, kv_heads=8))
    run.q[:, ::3, ::50, 9] = 8.0
    run.q[:, 1, :, 9] = 8.0
    run.k[:, :, 2000, 9] = 200 * 128**0.5 / 8
    result = run()
    kept = unpack(result.tile_mask, run.g.k_blocks)[:, :, : run.g.q_len // 128]
    assert (threshold == -0.3) == (int(result.counts[:, 0].sum()) > 0)
    allowed = kept.repeat_interleave(128, 2).repeat_interleave(64, 3).tril()
    k, v = (x.float().repeat_interleave(3, 1) for x in (run.k, run.v))
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(run.q.float(), k, v, attn_mask=allowed)
    error = (result.out.float() - exact).norm() / exact.norm()
    assert error < 4e-3
    for a, b in zip(run(), result, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_numbers_keep_their_tiles(bad: float) -> None:
    run = Run(Case(threshold=0.0, q_len=900))
    clean = unpack(run().tile_mask, run.g.k_blocks)
    (visible,) = run.masks(-INF)
    run.q[0, 1, 700, 5] = bad
    kept = unpack(run().tile_mask, run.g.k_blocks)
    assert torch.equal(kept[0, 1, 5].cpu(), visible[0, 1, 5]), "the row's block keeps all"
    kept[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(kept, clean), "no other block is touched"
    run.k[0, 0, 3, 7] = bad
    kept = unpack(run().tile_mask, run.g.k_blocks)
    assert torch.equal(kept[0, :2].cpu(), visible[0, :2]), "the kv head keeps all"
    assert torch.equal(kept[0, 2:], clean[0, 2:])


@pytest.mark.parametrize("where", ["q", "k", "both"])
def test_outlier_channel_never_drops_a_maximum(where: str) -> None:
    run = Run(Case(threshold=0.0, q_len=1500))
    if where != "k":
        run.q[..., 17] *= 1000
    if where != "q":
        run.k[..., 17] *= 1000
    kept = unpack(run().tile_mask, run.g.k_blocks).cpu()
    q, k = run.q.cpu().double(), run.k.cpu().double()
    s = reference.scores(q, k, run.call.scale)
    s = s.masked_fill(~reference.visibility(run.g, None, 1)[:, None], -INF)
    holder = s.argmax(-1) // run.g.block_k  # [B, H, Lq]
    block = torch.arange(run.g.q_len) // run.g.block_q
    assert kept[:, :, block].gather(3, holder[..., None]).all()


def test_long_context() -> None:
    run = Run(Case(threshold=0.0, q_len=131072, heads=2, kv_heads=1))
    result = run()
    dropped, candidates = result.counts.sum(0).tolist()
    assert 0.5 < dropped / candidates < 1
    assert torch.isfinite(result.out).all()
    rows = torch.randint(0, run.g.q_len, (16,)).tolist()
    kept = unpack(result.tile_mask, run.g.k_blocks)
    k, v = run.k[0, 0].double(), run.v[0, 0].double()
    for h in range(2):
        for row in rows:
            seen = kept[0, h, row // 128].repeat_interleave(64)
            seen[row + 1 :] = False
            s = (k @ run.q[0, h, row].double()) * run.call.scale
            weights = torch.softmax(s.masked_fill(~seen, -INF), 0)
            error = (result.out[0, h, row].double() - weights @ v).norm() / (weights @ v).norm()
            assert error < 0.02


def test_reasons() -> None:
    run = Run(Case(q_len=128))
    q, k, v, call, gate = run.q, run.k, run.v, run.call, run.gate
    assert gate is not None
    assert "float32" in str(sm90.reason(q.float(), k, v, call, gate))
    assert "broadcast" in str(sm90.reason(q, k, v[:, :1].expand(v.shape), call, gate))
    negative = dataclasses.replace(call, scale=-1.0)
    assert "scale" in str(sm90.reason(q, k, v, negative, gate))
