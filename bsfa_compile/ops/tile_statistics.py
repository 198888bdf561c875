"""Host side of `cuda/sm80/observe.cu`: what calibration asks of a call, measured by a kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bsfa_compile.ops import kernels
from bsfa_compile.ops.call import Call
from bsfa_compile.ops.compiler import KernelUnavailable
from bsfa_compile.ops.driver import Kernel, Stage, load
from bsfa_compile.ops.sm80 import arch_of, padding, unsuited

_PARAMS = "8Q2q15i2f4x"  # Params of cuda/sm80/observe.cu
_SLOT_BYTES = {4: 544, 8: 576}  # that wait for one tile, by warps: SLOT there
_LONGEST = 2**29

# (device, dtype, head dim, softcap, padded)
_Key = tuple[int, torch.dtype, int, bool, bool]


def _key(q: Tensor, call: Call) -> _Key:
    flags = call.softcap is not None, call.key_padding_mask is not None
    return q.device.index, q.dtype, q.shape[3], *flags


@functools.cache
def _kernel(key: _Key) -> tuple[Kernel, kernels.Sm80Kernel]:
    device, dtype, d, softcap, padded = key
    arch = arch_of(device)
    chosen = kernels.observe_kernel(
        arch, bf16=dtype == torch.bfloat16, d=d, softcap=softcap, padded=padded
    )
    return load(chosen.variant, arch, device, chosen.smem), chosen


@functools.cache
def _unavailable(key: _Key) -> str | None:
    """Why the kernel cannot be had, asked once."""
    try:
        _kernel(key)
    except KernelUnavailable as error:
        return str(error)
    return None


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def reason(q: Tensor, k: Tensor, call: Call) -> str | None:
    """Why the kernel cannot measure this call; None if it can. q [1, H, Lq, D], k likewise."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"q is on {q.device}; the kernel needs CUDA"
    with torch.cuda.device(q.device):
        return unsuited(q, k, None, call) or _unavailable(_key(q, call))


def measure(
    q: Tensor, k: Tensor, call: Call, rows: tuple[int, int], tiles: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Statistics and softmax mass of the mask rows [first, stop) and tiles [first, stop) of a call.

    q [1, H, Lq, D], k [1, Hkv, Lk, D]. Returns statistic float32 [2, H, Q, T] (relative,
    absolute; -inf for tiles that are no candidates) and mass [H, Q, T] (summed over the rows that
    vote; -1 for tiles that are no candidates). `reason` said None. Does not wait for the device.
    """
    g, device = call.geometry, q.device.index
    heads, blocks, columns = q.shape[1], rows[1] - rows[0], tiles[1] - tiles[0]
    statistic = q.new_full((2, heads, blocks, columns), -torch.inf, dtype=torch.float32)
    mass = q.new_full((heads, blocks, columns), -1.0, dtype=torch.float32)
    with torch.cuda.device(device):
        kernel, chosen = _kernel(_key(q, call))
        stream = torch.cuda.current_stream(device).cuda_stream
        defines = dict(chosen.variant.defines)
        grid = min(heads * blocks, int(defines["MIN_BLOCKS"]) * _processors(device))
        slot = _SLOT_BYTES[int(defines["WARPS"])]
        scratch = q.new_empty((grid, columns, slot), dtype=torch.uint8)
        counter = q.new_zeros(1, dtype=torch.int32)
        held = None
        if call.key_padding_mask is not None:
            held = padding(call.key_padding_mask, g.k_len, stream)
        Stage(kernel, (grid, 1, 1), chosen.threads, chosen.smem, _PARAMS).run(
            stream,
            q.data_ptr(),
            k.data_ptr(),
            statistic.data_ptr(),
            mass.data_ptr(),
            scratch.data_ptr(),
            counter.data_ptr(),
            *((0, 0) if held is None else (x.data_ptr() for x in held)),
            q.stride(1),
            k.stride(1),
            q.stride(2),
            k.stride(2),
            g.q_start,
            heads,
            heads // k.shape[1],
            g.q_len,
            g.k_len,
            q.shape[3],
            rows[0],
            blocks,
            tiles[0],
            columns,
            min(g.sink_tiles, _LONGEST),
            g.is_causal,
            0 if g.window is None else min(g.window, _LONGEST),
            call.scale,
            0.0 if call.softcap is None else call.softcap,
            overlap=False,
        )
    return statistic, mass
