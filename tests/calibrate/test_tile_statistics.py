"""Many q blocks added at once, as the calibration kernel gives them, are the same statistics."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.calibrate import measure
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.ops import kernels, tile_statistics
from bsfa_compile.ops.call import Call
from bsfa_compile.ops.compiler import read_source
from bsfa_compile.ops.tiles import Geometry, unpadded_tiles

Observed = Callable[..., SiteStatistics]
Inputs = Callable[..., tuple[Tensor, Tensor]]


def _as_the_kernel(
    q: Tensor, k: Tensor, call: Call, rows: tuple[int, int], tiles: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`tile_statistics.measure` in torch operations."""
    g, mask = call.geometry, call.key_padding_mask
    bounds = unpadded_tiles(mask, 1, g.k_len, g.block_k)
    shape = (q.shape[1], rows[1] - rows[0], tiles[1] - tiles[0])
    statistic = torch.full((2, *shape), -torch.inf, dtype=torch.float64)
    mass = torch.full(shape, -1.0, dtype=torch.float64)
    for i in range(*rows):
        seen = measure._Visible(g, i, mask, q.device)
        if seen.votes is not None and not seen.votes.any():
            continue
        found = measure._tiles_of(q, k, seen, bounds=bounds, scale=call.scale, softcap=call.softcap)
        for j in range(*g.droppable(i, *bounds[0])):
            if mask is None or mask[0, j * g.block_k : (j + 1) * g.block_k].any():
                at, column = j - g.tiles(i)[0], j - tiles[0]
                statistic[:, :, i - rows[0], column] = found[0][:, :, at]
                mass[:, i - rows[0], column] = found[1][:, at]
    return statistic, mass


@given(
    seed=st.integers(0, 2**31),
    config=st.sampled_from([{"is_causal": True}, {}, {"is_causal": True, "window": 30}]),
    q_start=st.integers(0, 20),
    hole=st.booleans(),
    at_once=st.sampled_from([1, 40, 100, 2**22]),
)
def test_many_blocks_at_once(
    observed: Observed,
    inputs: Inputs,
    seed: int,
    config: dict[str, Any],
    q_start: int,
    hole: bool,
    at_once: int,
) -> None:
    q, k = inputs(seed, (1, 4, 2, 90, 110))
    mask = torch.ones(1, 110, dtype=torch.bool)
    mask[:, 20:47] = not hole
    g = Geometry(q_len=90, k_len=110, q_start=q_start, block_q=16, block_k=8, **config)
    want = observed(q, k, g, mask)
    with (
        patch.object(measure, "_TILES_DEVICE", at_once),
        patch.object(tile_statistics, "reason", lambda *args: None),
        patch.object(tile_statistics, "measure", side_effect=_as_the_kernel) as kernel,
    ):
        got = observed(q, k, g, mask)
    assert got.equal(want) and want.candidates > 0
    assert kernel.call_count > 1 or at_once > 1


def test_the_kernel_is_for_cuda(inputs: Inputs) -> None:
    q, k = inputs(0)
    call = Call(
        geometry=Geometry(q_len=96, k_len=96),
        q_start_tensor=None,
        key_padding_mask=None,
        scale=1.0,
        softcap=None,
    )
    assert "needs CUDA" in str(tile_statistics.reason(q, k, call))


def test_parameters_and_slots_are_as_the_kernel_reads_them() -> None:
    """Eight-byte fields first, so that Python and C agree on the offsets."""
    source = read_source("sm80/observe.cu")
    body = source[source.index("struct Params {") : source.index("#define Q_BYTES")]
    fields = [line.split("//")[0].strip() for line in body.splitlines()[1:] if ";" in line]
    names = [name for field in fields for name in field.rstrip("};").split(",") if name.strip()]
    pointers = sum("*" in name for name in names)
    assert pointers == 8 and len(names) == 8 + 2 + 15 + 2
    size = struct.calcsize("<" + tile_statistics._PARAMS)  # as `driver.Stage` packs it
    assert size == struct.calcsize("8P2q15i2f4x")
    for warps, size in tile_statistics._SLOT_BYTES.items():
        assert size == 4 * (128 + 2 * warps) and size % 16 == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_every_head_dim_fits_every_card(arch: str) -> None:
    per_block = {"sm_80": 163, "sm_90a": 227, "sm_100": 227}.get(arch, 99) * 1024
    for d in range(8, 257, 8):
        kernel = kernels.observe_kernel(arch, bf16=True, d=d)
        assert kernel.smem + 516 <= per_block
        assert kernel.threads // 32 in tile_statistics._SLOT_BYTES
