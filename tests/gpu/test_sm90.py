"""The Hopper kernels against the reference: decisions, output, log-sum-exp, counts, bad inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops import reference, sm90
from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.tiles import Geometry, mask_rows, mask_words, unpack, unpadded_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]
INF, NAN = math.inf, math.nan
CLOSE = {"int8": 1e-3, "exact": 1e-4}  # decisions may differ for statistics this near the threshold
FP16 = torch.float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; the defaults are a small causal GQA prefill with a sink that every query sees."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 600
    k_len: int | None = None
    d: int = 128
    dv: int | None = None
    dtype: torch.dtype = torch.bfloat16
    q_start: int = 0
    on_device: bool = False  # q_start is known to the device only
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: int = 1
    rule: str = "relative"
    precision: str = "int8"
    threshold: float | None = -0.5  # None: dense
    columns: int = 0  # thresholds [H, columns], drawn at random up to twice `threshold`
    padding: int = 0  # padded keys of batch row b: padding * (b + 1), left if > 0, else right
    heads_first: bool = False  # [B, H, L, D] storage
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            q_len=self.q_len,
            k_len=self.k_len or self.q_start + self.q_len,
            q_start=self.q_start,
            is_causal=self.causal,
            window=self.window,
            sink_tiles=self.sinks,
        )


class Run:
    """A case on the card, its result, and what the reference needs."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case, self.g = case, case.geometry
        q, k, v = (
            torch.randn(case.batch, length, heads, d)
            for length, heads, d in (
                (case.q_len, case.heads, case.d),
                (self.g.k_len, case.kv_heads, case.d),
                (self.g.k_len, case.kv_heads, case.dv or case.d),
            )
        )
        k += 0.5 * torch.randn(1, 1, case.kv_heads, case.d)  # the mean that quantising removes
        q[..., :8] = 2.0
        k[:, 0, :, :8] = 4.5

        def place(x: Tensor) -> Tensor:
            x = x.to("cuda", case.dtype)
            return x.transpose(1, 2).contiguous() if case.heads_first else x.transpose(1, 2)

        self.q, self.k, self.v = place(q), place(k), place(v)
        self.padding = None
        if case.padding:
            self.padding = torch.ones(case.batch, self.g.k_len, dtype=torch.bool)
            for b, row in enumerate(self.padding):
                n = abs(case.padding) * (b + 1) % self.g.k_len
                row[slice(None, n) if case.padding > 0 else slice(self.g.k_len - n, None)] = False
        columns = max(case.columns, 1)
        self.thresholds = torch.full((case.heads, columns), case.threshold or 0.0)
        if case.columns:
            self.thresholds *= 2 * torch.rand(self.thresholds.shape)
            self.thresholds[0, 0] = -INF
        start = torch.tensor(case.q_start, device="cuda") if case.on_device else None
        self.call = Call(
            geometry=dataclasses.replace(self.g, q_start=0) if case.on_device else self.g,
            q_start_tensor=start,
            key_padding_mask=None if self.padding is None else self.padding.cuda(),
            scale=case.d**-0.5,
            softcap=case.softcap,
        )
        self.gate = None
        if case.threshold is not None:
            t = self.thresholds.cuda()
            self.gate = Gate(thresholds=t, rule=case.rule, precision=case.precision)

    def __call__(self) -> Result:
        assert sm90.reason(self.q, self.k, self.v, self.call, self.gate) is None
        return sm90.attention(self.q, self.k, self.v, self.call, self.gate)

    def poison(self) -> None:
        """Leave NaN and set bits where the next results will be put."""
        c, dv = self.case, self.v.shape[3]
        shapes = (c.batch * c.q_len * c.heads, dv), (c.batch * c.q_len * c.heads,)
        spoiled = [torch.full(s, NAN, device="cuda", dtype=c.dtype) for s in shapes[:1]]
        spoiled += [torch.full(shapes[1], NAN, device="cuda")]
        words = c.batch * c.heads * mask_rows(c.q_len) * mask_words(self.g.k_len)
        spoiled += [torch.full((words,), -1, device="cuda", dtype=torch.int32)]
        room = sm90.plan_of(self.q, self.k, self.v, self.call, self.gate).room
        spoiled += [torch.full((room,), 255, device="cuda", dtype=torch.uint8)]
        del spoiled

    def masks(self, *shifts: float) -> list[Tensor]:
        """The reference's tile masks with the thresholds moved by each shift."""
        q, k = self.q.cpu().float(), self.k.cpu().float()
        c = self.case
        precision = "exact" if c.threshold is None else c.precision
        return [
            reference.tile_mask(
                q,
                k,
                self.thresholds + shift,
                self.g,
                key_padding_mask=self.padding,
                scale=self.call.scale,
                softcap=c.softcap,
                gate=c.rule,
                precision=precision,
            )
            for shift in shifts
        ]

    def check(self) -> float:
        """Compare everything; returns the share of visible tiles that were dropped."""
        self.poison()
        result, c = self(), self.case
        kept = unpack(result.tile_mask.cpu(), self.g.k_blocks)
        (visible,) = self.masks(-INF)
        if c.threshold is None:
            assert torch.equal(kept, visible)
        else:
            close = CLOSE[c.precision]
            least, most = self.masks(close, -close)
            assert not (least & ~kept).any(), "dropped a tile that the rule keeps"
            assert not (kept & ~most).any(), "kept a tile that the rule drops"
        counts = result.counts.cpu()
        assert torch.equal(counts[:, 0], (visible & ~kept).sum((0, 2, 3)))
        assert torch.equal(counts[:, 1], self.candidates(visible))
        q, k, v = (x.cpu().double() for x in (self.q, self.k, self.v))
        scale, softcap = self.call.scale, c.softcap
        out, lse = reference.attention(
            q, k, v, kept, self.g, key_padding_mask=self.padding, scale=scale, softcap=softcap
        )
        assert result.out.transpose(1, 2).is_contiguous()
        seen = lse > -INF
        assert torch.equal(result.lse.cpu() > -INF, seen)
        torch.testing.assert_close(result.lse.cpu()[seen].double(), lse[seen], atol=1e-4, rtol=1e-5)
        error = (result.out.cpu().double() - out).norm()
        assert error <= 1.5 * self.low_precision_error(kept, out) + 1e-6 * out.norm()
        assert not result.out.cpu()[~seen].any()
        for again in (self(), self()):
            for a, b in zip(dataclasses.astuple(again), dataclasses.astuple(result), strict=True):
                assert torch.equal(a, b)
        return float((visible & ~kept).sum() / visible.sum())

    def candidates(self, visible: Tensor) -> Tensor:
        """Visible tiles of each head that are not always kept."""
        free = torch.zeros_like(visible)
        bounds = unpadded_tiles(self.padding, self.case.batch, self.g.k_len)
        for b, i, j in visible[:, 0].nonzero().tolist():
            free[b, :, i, j] = not self.g.always_kept(i, j, *bounds[b])
        return free.sum((0, 2, 3))

    def low_precision_error(self, kept: Tensor, out: Tensor) -> Tensor:
        """What torch's attention errs by on the same tiles in the same dtype."""
        c, g = self.case, self.g
        rows = (g.q_start + torch.arange(g.q_len)) // g.block_q - g.first_block
        allowed = kept[:, :, rows][..., torch.arange(g.k_len) // g.block_k]
        allowed &= reference.visibility(g, self.padding, c.batch)[:, None]
        if c.softcap is not None:  # torch has none: rounding the weights is most of the error
            exact: Tensor = out.norm() * torch.finfo(c.dtype).eps
            return exact
        groups = c.heads // c.kv_heads
        k, v = (x.repeat_interleave(groups, 1) for x in (self.k, self.v))
        low = F.scaled_dot_product_attention(
            self.q, k, v, attn_mask=allowed.cuda(), scale=self.call.scale
        )
        error: Tensor = (low.cpu().double().nan_to_num() - out).norm()
        return error


DROPPING = [
    Case(),
    Case(threshold=0.0, q_len=1100, kv_heads=1),
    Case(threshold=0.2, q_len=700),
    Case(dtype=FP16, q_len=700),
    Case(d=64, q_len=900),
    Case(d=96, threshold=-0.3, q_len=700),
    Case(d=80, threshold=-0.3, q_len=700),
    Case(d=192, dv=128, threshold=0.0, q_len=700),
    Case(d=256, threshold=0.0, q_len=900),
    Case(q_start=77, q_len=500),
    Case(q_start=1000, q_len=130, on_device=True),
    Case(q_start=1000, q_len=1),
    Case(heads=3, kv_heads=3, q_len=700, batch=2),
    Case(heads=7, kv_heads=1, threshold=0.0, q_len=700),
    Case(heads=6, columns=3, q_len=700),
    Case(heads_first=True, q_len=600, k_len=500),
    Case(sinks=3, threshold=0.0, q_len=900),
    Case(causal=False, threshold=-0.1, q_len=300, k_len=777),
    Case(rule="absolute", threshold=5.0, q_len=900),
    Case(rule="absolute", threshold=5.0, causal=False, q_len=300, k_len=777),
    Case(softcap=20.0, threshold=0.0, q_len=700),
    Case(rule="absolute", softcap=20.0, threshold=5.0, q_len=700),
    Case(rule="absolute", window=500, threshold=5.0, q_len=1200),
    Case(padding=-70, batch=2, q_len=700),
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
        for a, b in zip(dataclasses.astuple(captured), dataclasses.astuple(run()), strict=True):
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
