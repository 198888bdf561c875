"""What the operator promises its caller, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops import library, reference
from bsfa_compile.ops.tiles import Geometry, mask_rows, mask_words, pack
from tests.ops.cases import Case, assert_close, cases

CAUSAL = Geometry(q_len=40, k_len=40, is_causal=True, block_q=8, block_k=4)


def sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's dense attention under the case's mask."""
    seen = reference.visibility(case.geometry, case.key_padding_mask(), case.batch)[:, None]
    out: Tensor = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=case.scale, enable_gqa=True
    )
    return out


@given(cases(), st.booleans(), st.booleans())
def test_minus_infinity_and_no_thresholds_equal_sdpa(
    case: Case, given_thresholds: bool, dense: bool
) -> None:
    case = Case(**{**vars(case), "softcap": None})
    q, k, v = case.qkv()
    thresholds = torch.full((case.heads,), -math.inf) if given_thresholds else None
    out, lse, kept, counts = case.run(q, k, v, thresholds, dense_if_faster=dense)
    assert counts[:, 0].sum() == 0
    sees = kept.any(dim=-1).any()
    assert sees or not out.any()
    assert_close(out, sdpa(case, q, k, v))
    s = reference.scores(q.double(), k.double(), case.scale)
    seen = reference.visibility(case.geometry, case.key_padding_mask(), case.batch)[:, None]
    assert_close(lse, s.masked_fill(~seen, -math.inf).logsumexp(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, 0.8])
@pytest.mark.parametrize("sparse", [True, False])
def test_low_precision_errs_no_more_than_sdpa_in_it(
    dtype: torch.dtype, padding: float | None, sparse: bool
) -> None:
    """The budget: twice what dense attention in this dtype errs from float64."""
    geometry = Geometry(q_len=200, k_len=200, is_causal=True, block_q=16, block_k=8)
    case = Case(batch=2, kv_heads=2, geometry=geometry, head_dim=32, padding=padding, peak=2.0)
    q, k, v = case.qkv(dtype)
    thresholds = case.thresholds(q, k, 0.6) if sparse else torch.full((4,), -math.inf)
    assert thresholds is not None
    out, lse, kept, counts = case.run(q, k, v, thresholds)
    wanted, wanted_lse, wanted_kept = case.reference(q, k, v, thresholds)
    assert torch.equal(kept, wanted_kept)
    assert (int(counts[:, 0].sum()) > 0) == sparse
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact = sdpa(case, q.double(), k.double(), v.double())
    budget = 2 * (sdpa(case, q, k, v).double() - exact).abs().max()
    assert (out.double() - wanted).abs().max() <= budget
    assert_close(lse, wanted_lse, 1e-5)


@given(cases(), st.floats(0, 1))
def test_grouped_heads_equal_repeated_keys(case: Case, share: float) -> None:
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    repeated = Case(**{**vars(case), "kv_heads": case.heads, "groups": 1})
    k_all, v_all = (x.repeat_interleave(case.groups, dim=1) for x in (k, v))
    grouped = case.run(q, k, v, thresholds)
    alone = repeated.run(q, k_all, v_all, thresholds)
    assert int(grouped[3][:, 0].sum()) > 0
    assert torch.equal(grouped[2], alone[2])
    assert torch.equal(grouped[3], alone[3])
    assert_close(grouped[0], alone[0])
    assert_close(grouped[1], alone[1])


@given(cases(), st.floats(0, 1))
def test_the_steps_alone_equal_the_whole(case: Case, share: float) -> None:
    """gate_v1 makes the mask that attention_v1 returns, attend_v1 consumes it."""
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k, share)
    assume(thresholds is not None)
    g, mask = case.geometry, case.mask_arguments()
    out, lse, kept, counts = case.run(q, k, v, thresholds)
    assert int(counts[:, 0].sum()) > 0
    words, own = library.gate(
        q, k, thresholds, *mask, case.rule, "exact", g.sink_tiles, g.block_q, g.block_k
    )
    assert torch.equal(words, pack(kept))
    assert torch.equal(own, counts)
    again = library.attend(q, k, v, words, *mask, g.block_q, g.block_k)
    assert_close(again[0], out)
    assert_close(again[1], lse)


@given(cases(), st.booleans())
def test_layout_of_the_outputs(case: Case, dense: bool) -> None:
    """[B, L, H, Dv] storage, whatever the strides of the inputs."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv())
    thresholds = None if dense else torch.zeros(case.heads)
    g = case.geometry
    out, lse, words, counts = library.attention(
        q,
        k,
        v,
        thresholds,
        *case.mask_arguments(),
        case.rule,
        "auto",
        g.sink_tiles,
        g.block_q,
        g.block_k,
        False,
    )
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous() and words.is_contiguous()
    wanted = (case.batch, case.heads, mask_rows(g.q_len, g.block_q), mask_words(g.k_len, g.block_k))
    assert words.shape == wanted and words.dtype == torch.int32
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("dense", [False, True])
def test_inputs_of_any_strides(dense: bool) -> None:
    case = Case(kv_heads=2, geometry=CAUSAL)
    q, k, v = case.qkv()
    thresholds = None if dense else case.thresholds(q, k)
    straight = case.run(q, k, v, thresholds)
    assert (int(straight[3][:, 0].sum()) == 0) == dense
    every_other = [torch.stack((x, x + 9), dim=-1)[..., 0] for x in (q, k, v)]
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    for q, k, v in (every_other, turned):
        result = case.run(q, k, v, thresholds)
        assert torch.equal(result[2], straight[2])
        assert_close(result[0], straight[0], 1e-6)


def test_inputs_are_not_written_to() -> None:
    case = Case(kv_heads=2, geometry=CAUSAL, padding=0.9)
    inputs = case.qkv()
    copies = [x.clone() for x in inputs]
    thresholds = case.thresholds(*inputs[:2])
    case.run(*inputs, thresholds)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_auto_precision_on_the_cpu_is_exact() -> None:
    case = Case(geometry=CAUSAL, peak=1.0)
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k)
    auto = case.run(q, k, v, thresholds, precision="auto")
    exact = case.run(q, k, v, thresholds, precision="exact")
    assert int(auto[3][:, 0].sum()) > 0
    assert torch.equal(auto[0], exact[0]) and torch.equal(auto[2], exact[2])
