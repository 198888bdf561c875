"""Calls on a CUDA card that no kernel of ours takes: torch's fused kernels and plain chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import chunked, dense
from bsfa_compile.ops.call import Call, Result
from bsfa_compile.ops.tiles import Geometry, unpack
from tests.ops.cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]

MASKS = {
    "everything": Geometry(q_len=150, k_len=300),
    "causal": Geometry(q_len=300, k_len=300, is_causal=True),
    "chunk": Geometry(q_len=130, k_len=300, q_start=170, is_causal=True),
    "chunk before the cache's end": Geometry(q_len=100, k_len=300, q_start=60, is_causal=True),
    "decode": Geometry(q_len=1, k_len=300, q_start=299, is_causal=True),
    "window": Geometry(q_len=200, k_len=300, q_start=100, is_causal=True, window=90),
    "window both ways": Geometry(q_len=300, k_len=300, window=70),
}


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Any wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(call: Call) -> Call:
    padding = call.key_padding_mask
    return replace(call, key_padding_mask=None if padding is None else padding.cuda())


def check(case: Case, result: Result, inputs: tuple[Tensor, ...], kept: Tensor) -> None:
    """Within twice what float64 rounded to this dtype's dense attention would err."""
    q, k, v = inputs
    out, lse = case.attend(q, k, v, kept)
    found = unpack(result.tile_mask.cpu(), case.geometry.k_blocks)
    assert torch.equal(found, kept)
    limit = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}[q.dtype]
    assert float((result.out.cpu().double() - out).abs().max()) < limit
    seeing = lse > -math.inf
    assert torch.equal(result.lse.cpu() > -math.inf, seeing)
    assert float((result.lse.cpu().double() - lse)[seeing].abs().max()) < 1e-2
    assert result.out.transpose(1, 2).is_contiguous() and result.lse.is_contiguous()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("padding", [None, 0.8])
@pytest.mark.parametrize("dims", [(64, 64), (20, 12)])
def test_fused_kernels_under_every_mask(
    name: str, dtype: torch.dtype, groups: int, padding: float | None, dims: tuple[int, int]
) -> None:
    case = Case(
        batch=2,
        kv_heads=2,
        groups=groups,
        geometry=MASKS[name],
        head_dim=dims[0],
        value_dim=dims[1],
        padding=padding,
        peak=1.0,
    )
    q, k, v = case.qkv(dtype)
    call = moved(case.call())
    assert dense.reason(q.cuda(), k.cuda(), v.cuda(), call) is None
    on_card = (q.cuda(), k.cuda(), v.cuda())
    with waiting_forbidden():
        result = dense.attention(*on_card, call)
    kept = case.reference(q, k, v, torch.full((case.heads,), -math.inf))[2]
    check(case, result, (q, k, v), kept)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padding", [None, 0.8])
@pytest.mark.parametrize("start_on_device", [False, True])
def test_chunks_obey_the_rule(
    name: str, dtype: torch.dtype, padding: float | None, start_on_device: bool
) -> None:
    geometry = replace(MASKS[name], block_q=32, block_k=16)
    case = Case(
        batch=2, kv_heads=2, geometry=geometry, head_dim=32, value_dim=16, padding=padding, peak=3.0
    )
    q, k, v = case.qkv(dtype)
    thresholds = case.thresholds(q, k, 0.5)
    assert thresholds is not None
    call = moved(case.call())
    if start_on_device:
        start = torch.tensor(geometry.q_start, device="cuda")
        call = replace(call, geometry=replace(geometry, q_start=0), q_start_tensor=start)
    gate = case.gate(thresholds.cuda())
    on_card = (q.cuda(), k.cuda(), v.cuda())
    chunked.attention(*on_card, call, gate=gate)  # cuBLAS may wait once, when it is set up
    with waiting_forbidden():
        result = chunked.attention(*on_card, call, gate=gate)
    kept = case.reference(q, k, v, thresholds)[2]
    assert int(result.counts[:, 0].sum()) > 0
    check(case, result, (q, k, v), kept)
