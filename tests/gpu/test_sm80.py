"""The portable kernels against the float64 reference: decisions, output, log-sum-exp, counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.ops import reference, sm80
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.tiles import Geometry, unpack
from tests.attention_case import free_tiles

pytestmark = pytest.mark.gpu
INF = math.inf
CLOSE = 1e-3  # a decision may differ where the statistic is this near the threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; the defaults are a small causal GQA prefill."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 600
    k_len: int = 600
    d: int = 128
    dv: int = 128
    dtype: torch.dtype = torch.bfloat16
    q_start: int = 0
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: int = 1
    rule: str = "relative"
    thresholds: tuple[float, ...] | None = (-0.5,)
    padding: tuple[tuple[int, int], ...] | None = (
        None  # padded keys [start, stop) of each batch row
    )
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            q_len=self.q_len,
            k_len=self.k_len,
            q_start=self.q_start,
            is_causal=self.causal,
            window=self.window,
            sink_tiles=self.sinks,
        )

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in [B, H, L, D] shape over [B, L, H, D] storage, as models make them."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(length: int, heads: int, d: int, *, tiled: bool = False) -> Tensor:
            x = torch.randn(self.batch, length, heads, -(-d // 8) * 8, generator=generator)
            if tiled:  # tiles that matter and tiles that do not
                loud = torch.rand(-(-length // 64), generator=generator) < 0.5
                loud[0] = True
                x *= torch.where(loud, 1.5, 0.1).repeat_interleave(64)[:length, None, None]
            return x.to(self.dtype).to(device).transpose(1, 2)[..., :d]

        return (
            normal(self.q_len, self.heads, self.d),
            normal(self.k_len, self.kv_heads, self.d, tiled=True),
            normal(self.k_len, self.kv_heads, self.dv),
        )

    def mask(self) -> Tensor | None:
        if self.padding is None:
            return None
        keys = torch.ones(self.batch, self.k_len, dtype=torch.bool)
        for row, (start, stop) in zip(keys, self.padding, strict=True):
            row[start:stop] = False
        return keys

    def gate(self) -> Gate | None:
        if self.thresholds is None:
            return None
        t = torch.tensor([self.thresholds] * self.heads, dtype=torch.float32)
        return Gate(thresholds=t, rule=self.rule, precision="exact")

    def call(self, *, device_start: bool = False) -> Call:
        g = self.geometry
        start = torch.tensor(self.q_start, device="cuda") if device_start else None
        mask = self.mask()
        return Call(
            geometry=dataclasses.replace(g, q_start=0) if device_start else g,
            q_start_tensor=start,
            key_padding_mask=None if mask is None else mask.cuda(),
            scale=self.d**-0.5,
            softcap=self.softcap,
        )


def reference_tiles(case: Case, q: Tensor, k: Tensor, shift: float) -> Tensor:
    """Tiles the reference keeps with its thresholds moved by `shift`."""
    thresholds = torch.tensor([case.thresholds or (-INF,)] * case.heads, dtype=torch.float64)
    return reference.tile_mask(
        q.double(),
        k.double(),
        thresholds + shift,
        case.geometry,
        key_padding_mask=case.mask(),
        scale=case.d**-0.5,
        softcap=case.softcap,
        gate=case.rule,
    )


def dense_error(
    case: Case, tensors: tuple[Tensor, Tensor, Tensor], kept: Tensor, exact: Tensor
) -> float:
    """What torch's own attention loses in this dtype, given the tiles as an elementwise mask."""
    g = case.geometry
    row_block = (g.q_start + torch.arange(g.q_len)) // g.block_q - g.first_block
    allowed = kept[:, :, row_block][:, :, :, torch.arange(g.k_len) // g.block_k]
    allowed &= reference.visibility(g, case.mask(), case.batch)[:, None]
    q, k, v = tensors
    q, k, v = (x.repeat_interleave(case.heads // x.shape[1], 1) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed.cuda())
    seen = allowed.any(-1)[..., None]
    return float(torch.where(seen, (out.cpu().double() - exact).abs(), 0).max())


def rounding(case: Case, weighed: Tensor, exact: Tensor) -> Tensor:
    """What it may cost each output that the weights and the output are each rounded once.

    weighed: the output for |v|. Where a call has few outputs, torch's largest error says little.
    """
    return torch.finfo(case.dtype).eps / 2 * (weighed + exact.abs()) * 1.01


def check(case: Case, *, device_start: bool = False) -> tuple[int, int]:
    """Everything about one call; returns its (dropped, candidates)."""
    q, k, v = case.tensors()
    on_card = case.tensors("cuda")
    gate, g = case.gate(), case.geometry
    call = case.call(device_start=device_start)
    on_gate = gate and gate._replace(thresholds=gate.thresholds.cuda())
    assert sm80.reason(*on_card, call, on_gate) is None
    result = sm80.attention(*on_card, call, on_gate)

    kept = unpack(result.tile_mask.cpu(), g.k_blocks)
    surely, possibly = (reference_tiles(case, q, k, shift) for shift in (CLOSE, -CLOSE))
    assert not (surely & ~kept).any(), "dropped a tile that the rule keeps"
    assert not (kept & ~possibly).any(), "kept a tile that the rule drops"
    visible = reference.tile_mask(
        q.double(), k.double(), torch.full((case.heads, 1), -INF), g,
        key_padding_mask=case.mask(), scale=1.0,
    )  # fmt: skip
    assert result.counts[:, 0].tolist() == (visible & ~kept).sum((0, 2, 3)).tolist()
    assert result.counts[:, 1].tolist() == candidates(case, visible).tolist()

    def attention(values: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention(
            q.double(), k.double(), values, kept, g,
            key_padding_mask=case.mask(), scale=case.d**-0.5, softcap=case.softcap,
        )  # fmt: skip

    exact, exact_lse = attention(v.double())
    weighed, _ = attention(v.double().abs())
    assert result.out.stride() == (
        case.q_len * case.heads * case.dv, case.dv, case.heads * case.dv, 1
    ) or 1 in (case.batch, case.q_len, case.heads, case.dv)  # fmt: skip
    out = result.out.cpu().double()
    assert out.isfinite().all()
    budget = 2**-7 if case.dtype == torch.bfloat16 else 2**-10
    if case.softcap is None:
        budget = 1.5 * dense_error(case, on_card, kept, exact)
    allowed = rounding(case, weighed, exact).clamp(min=budget + 1e-6)
    assert ((out - exact).abs() <= allowed).all(), (float((out - exact).abs().max()), budget)
    empty = exact_lse == -INF
    assert (out[empty] == 0).all()
    assert torch.equal(result.lse.cpu() == -INF, empty)
    lse_error = torch.where(empty, 0.0, (result.lse.cpu() - exact_lse).abs()).max()
    assert lse_error < 2e-4, lse_error

    if on_gate is not None:
        tiles, counts = sm80.tile_mask(on_card[0], on_card[1], call, on_gate)
        assert torch.equal(tiles, result.tile_mask)
        assert torch.equal(counts, result.counts)
    attended, lse = sm80.attend(*on_card, result.tile_mask, call)
    assert ((attended.cpu().double() - exact).abs() <= allowed).all()
    assert torch.allclose(lse, result.lse, atol=2e-4)
    dropped, of = result.counts.sum(0).tolist()
    return dropped, of


def candidates(case: Case, visible: Tensor) -> Tensor:
    """Visible tiles that are not always kept, per head."""
    return free_tiles(case.geometry, visible, case.mask()).sum((0, 2, 3))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "absolute": {"rule": "absolute", "thresholds": (3.4,)},
    "per block": {"thresholds": (-0.2, -0.8, -INF, -0.4)},
    "dense": {"thresholds": None},
    "minus inf": {"thresholds": (-INF,)},
    "plus inf": {"thresholds": (INF,)},
    "positive": {"thresholds": (0.3,)},
    "no sinks": {"sinks": 0, "q_len": 500, "k_len": 500},
    "three sinks": {"sinks": 3},
    "not causal": {"causal": False, "q_len": 300, "k_len": 650},
    "chunk": {"q_len": 200, "k_len": 700, "q_start": 437},
    "queries past the keys": {"q_len": 300, "k_len": 210, "q_start": 90},
    "window": {"window": 200},
    "window, not causal": {"window": 150, "causal": False, "q_len": 430, "k_len": 500},
    "softcap": {"softcap": 4.0, "thresholds": (-0.3,)},
    "left padding": {"batch": 2, "padding": ((0, 133), (0, 0)), "thresholds": (-0.4,)},
    "right padding": {"batch": 2, "padding": ((471, 600), (0, 600)), "causal": False},
    "hole": {"padding": ((130, 325),), "sinks": 2},
    "batch and MHA": {"batch": 3, "heads": 2, "kv_heads": 2, "q_len": 300, "k_len": 300},
    "MQA": {"heads": 5, "kv_heads": 1},
    "d 64": {"d": 64, "dv": 64},
    "d 96": {"d": 96, "dv": 96},
    "d 192": {"d": 192, "dv": 192},
    "d 256": {"d": 256, "dv": 256},
    "d 192, dv 128": {"d": 192, "dv": 128},
    "d 64, dv 128": {"d": 64, "dv": 128},
    "d 80, dv 36": {"d": 80, "dv": 36},
    "d 33, dv 7": {"d": 33, "dv": 7, "thresholds": (-0.3,)},
    "long": {"heads": 1, "kv_heads": 1, "q_len": 200, "k_len": 70000, "q_start": 69800},
    "one query": {"q_len": 1, "k_len": 500, "q_start": 499},
    "one key": {"q_len": 3, "k_len": 1, "causal": False},
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = Case(**CASES[name])
    dropped, of = check(case)
    if case.thresholds not in (None, (-INF,)) and of:
        assert dropped, "the case is meant to drop tiles"


def test_start_on_the_device() -> None:
    dropped, _ = check(Case(q_len=200, k_len=700, q_start=437), device_start=True)
    assert dropped


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 2))
    k_len = draw(st.integers(1, 500))
    batch = draw(st.integers(1, 2))
    d = draw(st.sampled_from((64, 128)))
    span = st.tuples(st.integers(0, k_len), st.integers(0, k_len)).map(lambda x: (min(x), max(x)))
    check(
        Case(
            batch=batch,
            heads=kv_heads * draw(st.integers(1, 2)),
            kv_heads=kv_heads,
            q_len=draw(st.integers(1, 400)),
            k_len=k_len,
            d=d,
            dv=d,
            q_start=draw(st.integers(0, 300)),
            causal=draw(st.booleans()),
            window=draw(st.none() | st.integers(1, 300)),
            sinks=draw(st.integers(0, 3)),
            rule=draw(st.sampled_from(("relative", "absolute"))),
            thresholds=(draw(st.sampled_from((-2.0, -0.5, -0.1, 3.0))),),
            padding=draw(st.none() | st.tuples(*[span] * batch)),
            seed=draw(st.integers(0, 99)),
        )
    )


def test_strides_do_not_matter() -> None:
    case = Case(batch=2, q_len=300, k_len=300, heads=4, kv_heads=4)
    packed = torch.randn(2, 300, 3, 4, 128, device="cuda").bfloat16().permute(2, 0, 3, 1, 4)
    gate = Gate(
        thresholds=torch.full((4,), -0.5, device="cuda"), rule="relative", precision="exact"
    )
    viewed = sm80.attention(packed[0], packed[1], packed[2], case.call(), gate)
    q, k, v = packed.contiguous()
    copied = sm80.attention(q, k, v, case.call(), gate)
    broadcast = sm80.attention(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), case.call(), gate)
    shared = sm80.attention(q, k[:, :1], v[:, :1], case.call(), gate)
    assert torch.equal(viewed.out, copied.out)
    assert torch.equal(broadcast.out, shared.out)


def test_nan_keeps_its_tile() -> None:
    case = Case(thresholds=(INF,))
    q, k, v = case.tensors("cuda")
    k[0, 0, 200] = float("nan")
    gate = Gate(thresholds=torch.full((4,), INF, device="cuda"), rule="relative", precision="exact")
    result = sm80.attention(q, k, v, case.call(), gate)
    kept = unpack(result.tile_mask, case.geometry.k_blocks)
    assert kept[0, :2, 2:5, 3].all()
    assert not kept[0, 2:, 2:5, 3].any()
    assert result.out[0, 2:].isfinite().all()


def test_every_output_is_written() -> None:
    case = Case(q_len=333, k_len=421, batch=2, causal=False)
    q, k, v = case.tensors("cuda")
    gate = Gate(
        thresholds=torch.full((4,), -0.5, device="cuda"), rule="relative", precision="exact"
    )
    first = sm80.attention(q, k, v, case.call(), gate)
    expected = [first.out.clone(), first.lse.clone(), first.tile_mask.clone(), first.counts.clone()]
    del first
    for poison in (float("nan"), 7.0):  # what the allocator hands out again
        held = [torch.full_like(x, poison if x.is_floating_point() else 2**30) for x in expected]
        del held
        again = sm80.attention(q, k, v, case.call(), gate)
        for x, y in zip(
            (again.out, again.lse, again.tile_mask, again.counts), expected, strict=True
        ):
            assert torch.equal(x, y)
        del again


def test_repeated_runs_are_identical() -> None:
    case = Case(q_len=2000, k_len=2000, heads=8)
    q, k, v = case.tensors("cuda")
    gate = Gate(
        thresholds=torch.full((8,), -0.5, device="cuda"), rule="relative", precision="exact"
    )
    first = sm80.attention(q, k, v, case.call(), gate)
    for _ in range(10):
        again = sm80.attention(q, k, v, case.call(), gate)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)
        assert torch.equal(again.tile_mask, first.tile_mask)


def test_graph_replay_with_other_thresholds_and_start() -> None:
    case = Case(q_len=256, k_len=1024, q_start=512)
    q, k, v = case.tensors("cuda")
    thresholds = torch.full((4, 1), -0.5, device="cuda")
    gate = Gate(thresholds=thresholds, rule="relative", precision="exact")
    call = case.call(device_start=True)
    assert call.q_start_tensor is not None
    sm80.attention(q, k, v, call, gate)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sm80.attention(q, k, v, call, gate)
    dropped = []
    for threshold, start in ((-0.5, 512), (-0.2, 700), (-INF, 700), (-0.5, 512)):
        thresholds.fill_(threshold)
        call.q_start_tensor.fill_(start)
        graph.replay()
        fresh = sm80.attention(q, k, v, call, gate)
        assert torch.equal(captured.out, fresh.out)
        assert torch.equal(captured.tile_mask, fresh.tile_mask)
        assert torch.equal(captured.counts, fresh.counts)
        dropped.append(int(captured.counts[:, 0].sum()))
    assert dropped[0] == dropped[3] > 0
    assert dropped[2] == 0 < dropped[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "bfloat16 or float16"),
        (lambda q, k, v: (q, k[..., ::2], v), "stride"),
        (lambda q, k, v: (q[..., 1:], k[..., 1:], v), "16 bytes"),
        (lambda q, k, v: (torch.cat((q, q, q), -1), torch.cat((k, k, k), -1), v), "head_dim"),
    ],
)
def test_reasons(change: Any, words: str) -> None:
    case = Case()
    q, k, v = change(*case.tensors("cuda"))
    reason = sm80.reason(q, k, v, case.call(), None)
    assert reason is not None
    assert words in reason
