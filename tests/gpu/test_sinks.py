"""Attention sinks in the kernels' epilogues: one more logit in each row's denominator."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import library, reference, sm80, sm90
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.tiles import Geometry, unpack

pytestmark = pytest.mark.gpu
FAMILIES = [pytest.param(sm80, id="sm80"), pytest.param(sm90, id="sm90", marks=pytest.mark.sm90)]


def inputs(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 8, 700, d] and k, v [2, 2, 700, d]; every query scores about 20 on keys 0 and 200."""
    made = torch.Generator("cuda").manual_seed(d)
    q = 2.5 * torch.randn(2, 700, 8, d, device="cuda", generator=made)
    k, v = torch.randn(2, 2, 700, 2, d, device="cuda", generator=made)
    q[..., 0] = 8.0
    k[:, [0, 200], :, 0] = 2.5 * d**0.5
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def on_host(x: Tensor) -> Tensor:
    return x.detach().double().cpu()


def call_of(q: Tensor, sinks: Tensor | None, *, padded: bool = False) -> Call:
    mask = None
    if padded:
        mask = torch.ones(2, 700, dtype=torch.bool, device="cuda")
        mask[1, :200] = False
    return Call(
        geometry=Geometry(q_len=700, k_len=700, is_causal=True),
        q_start_tensor=None,
        key_padding_mask=mask,
        scale=q.shape[3] ** -0.5,
        softcap=None,
        sinks=sinks,
    )


def logits() -> Tensor:
    """[8]: none, one that takes all, and others around the scores' log-sum-exps."""
    return torch.tensor([-math.inf, 200.0, -200.0, 0.0, 15.0, 18.0, 20.0, 24.0], device="cuda")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("d", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_the_denominator_has_one_more_term(
    family: ModuleType, d: int, dtype: torch.dtype, sparse: bool, padded: bool
) -> None:
    q, k, v = inputs(d, dtype)
    call = call_of(q, logits(), padded=padded)
    gate = None
    if sparse:
        limits = torch.full((8,), -1.0, device="cuda")
        precision = "exact" if family is sm80 else "int8"
        gate = Gate(thresholds=limits, rule="relative", precision=precision)
    assert family.reason(q, k, v, call, gate) is None
    found = family.attention(q, k, v, call, gate)
    plain = family.attention(q, k, v, dataclasses.replace(call, sinks=None), gate)
    assert torch.equal(found.tile_mask, plain.tile_mask)
    assert (int(found.counts[:, 0].sum()) > 0) == sparse

    kept = unpack(found.tile_mask, call.geometry.k_blocks).cpu()
    mask = None if call.key_padding_mask is None else call.key_padding_mask.cpu()
    out, lse = reference.attention(
        on_host(q),
        on_host(k),
        on_host(v),
        kept,
        call.geometry,
        key_padding_mask=mask,
        scale=call.scale,
        sinks=on_host(logits()),
    )
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(found.out.double().cpu(), out, atol=limit, rtol=limit)
    torch.testing.assert_close(found.lse.double().cpu(), lse, atol=1e-3, rtol=1e-5)
    assert torch.equal(found.out[:, 0], plain.out[:, 0])  # -inf is no sink

    again_out, again_lse = family.attend(q, k, v, found.tile_mask, call)
    torch.testing.assert_close(again_out, found.out, atol=limit, rtol=limit)
    torch.testing.assert_close(again_lse, found.lse, atol=1e-3, rtol=1e-5)


def test_the_operator_and_its_gradients() -> None:
    """Long enough that the kernels run; gradients against float64 over the same tiles."""
    q, k, v = inputs(64, torch.bfloat16)
    sinks = logits()[3:].repeat(2)[:8].requires_grad_()
    mask = (None, None, 0, True, None, None, None)
    thresholds = torch.full((8,), -1.0, device="cuda")
    config = ("relative", "auto", 1, 128, 64, False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, words, counts = library.attention(*leaves, thresholds, *mask, *config, sinks)
    assert int(counts[:, 0].sum()) > 0
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum() + lse.sum(), [*leaves, sinks])

    doubles = [on_host(x).requires_grad_() for x in (*leaves, sinks)]
    kept = unpack(words, 11).cpu()
    wanted_out, wanted_lse = reference.attention(
        doubles[0],
        doubles[1],
        doubles[2],
        kept,
        Geometry(q_len=700, k_len=700, is_causal=True),
        scale=64**-0.5,
        sinks=doubles[3],
    )
    total = (wanted_out * on_host(weight)).sum() + wanted_lse.sum()
    for mine, other in zip(ours, torch.autograd.grad(total, doubles), strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(on_host(mine), other, atol=2e-2 * size, rtol=0.0)
