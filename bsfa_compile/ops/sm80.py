"""Host side of the portable kernels (`cuda/sm80`): reasons, buffers, parameters, launches.

One pass decides and computes. Runs on any card of compute capability 8.0 or newer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bsfa_compile.ops import kernels
from bsfa_compile.ops.call import Call, Gate, Result, empty_out
from bsfa_compile.ops.compiler import KernelUnavailable, arch_for
from bsfa_compile.ops.driver import Kernel, Stage, load, zero
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q, mask_rows, mask_words

_PARAMS = "12Q6q15i2f4x"  # Params of cuda/sm80/attention.cu
_PADDING_PARAMS = "3Q2qi4x"  # Params of cuda/sm80/padding.cu
_LONGEST = 2**29  # positions, so that device arithmetic on them stays within an int
_FURTHEST = 2**25  # elements between rows
_DTYPES = (torch.bfloat16, torch.float16)
_RULES = {"relative": kernels.RELATIVE, "absolute": kernels.ABSOLUTE}


def _decide(gate: Gate | None) -> int:
    return kernels.KEEP_ALL if gate is None else _RULES[gate.rule]


@functools.cache
def arch_of(device: int) -> str:
    """What to build for, for CUDA device `device`."""
    return arch_for(torch.cuda.get_device_capability(device))


# (device, dtype, head dim of q and k, of v, DECIDE, attend, softcap, padded)
_Key = tuple[int, torch.dtype, int, int, int, bool, bool, bool]


def _key(q: Tensor, v: Tensor | None, decide: int, call: Call) -> _Key:
    width = q.shape[3] if v is None else v.shape[3]
    flags = v is not None, call.softcap is not None, call.key_padding_mask is not None
    return q.device.index, q.dtype, q.shape[3], width, decide, *flags


@functools.cache
def _kernel(key: _Key) -> tuple[Kernel, int, int]:
    """(kernel, threads, bytes of shared memory)."""
    device, dtype, d, dv, decide, attend, softcap, padded = key
    arch = arch_of(device)
    chosen = kernels.sm80_kernel(
        arch,
        bf16=dtype == torch.bfloat16,
        d=d,
        dv=dv,
        decide=decide,
        attend=attend,
        softcap=softcap,
        padded=padded,
    )
    return load(chosen.variant, arch, device, chosen.smem), chosen.threads, chosen.smem


@functools.lru_cache(maxsize=1024)
def _stage(key: _Key, grid: tuple[int, int, int]) -> Stage:
    kernel, threads, smem = _kernel(key)
    return Stage(kernel, grid, threads, smem, _PARAMS)


@functools.lru_cache(maxsize=64)
def _padding_stage(device: int, batch: int) -> Stage:
    kernel = load(kernels.PADDING, arch_of(device), device)
    return Stage(kernel, (batch, 1, 1), 1024, 0, _PADDING_PARAMS)


@functools.cache
def _unavailable(key: _Key) -> str | None:
    """Why the kernel cannot be had, asked once."""
    try:
        _kernel(key)
    except KernelUnavailable as error:
        return str(error)
    return None


def _misaligned(name: str, x: Tensor) -> str | None:
    """Why the kernel cannot read x with 16-byte copies."""
    stride = x.stride()
    if stride[3] != 1 and x.shape[3] > 1:
        return f"{name}'s last dimension has stride {stride[3]}; the kernels need 1"
    if x.data_ptr() % 16 or any(
        s % 8 for s, n in zip(stride[:3], x.shape[:3], strict=True) if n > 1
    ):
        return f"{name}'s rows (strides {stride}) do not start at multiples of 16 bytes"
    if stride[2] >= _FURTHEST:
        return f"{name}'s rows are {stride[2]} elements apart; the kernels take up to {_FURTHEST}"
    return None


def unsuited(q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> str | None:
    """Why the portable kernels cannot take these tensors and this mask; None if they can."""
    g = call.geometry
    if q.dtype not in _DTYPES or k.dtype != q.dtype or (v is not None and v.dtype != q.dtype):
        return f"the kernels take bfloat16 or float16, all alike; q is {q.dtype}, k {k.dtype}"
    if (g.block_q, g.block_k) != (BLOCK_Q, BLOCK_K):
        return f"the kernels have {BLOCK_Q} x {BLOCK_K} tiles, not {g.block_q} x {g.block_k}"
    if not call.scale > 0:
        return f"the kernels need a positive scale, not {call.scale}"
    if q.numel() == 0 or k.numel() == 0 or (v is not None and v.numel() == 0):
        return "an empty input"
    if max(g.q_start + g.q_len, g.k_len) > _LONGEST:
        return f"positions beyond {_LONGEST}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (bad := _misaligned(name, x)):
            return bad
    return None


def reason(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> str | None:
    """Why these kernels cannot do this call; None if they can. v None: the gate alone."""
    if gate is not None and gate.precision == "int8":
        return "int8 decisions are not built for this card; precision 'exact' or 'auto' is"
    return unsuited(q, k, v, call) or _unavailable(_key(q, v, _decide(gate), call))


def _check(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> None:
    if (bad := reason(q, k, v, call, gate)) is not None:
        raise KernelUnavailable(bad)


def padding(mask: Tensor, k_len: int, stream: int) -> tuple[Tensor, Tensor]:
    """A key padding mask [B, Lk] as (bits [B, tiles] int64, bounds [B, 2] int32)."""
    batch, tiles = mask.shape[0], -(-k_len // BLOCK_K)
    bits = torch.empty((batch, tiles), dtype=torch.int64, device=mask.device)
    bounds = torch.empty((batch, 2), dtype=torch.int32, device=mask.device)
    pointers = mask.data_ptr(), bits.data_ptr(), bounds.data_ptr()
    stage = _padding_stage(mask.device.index, batch)
    stage.run(stream, *pointers, *mask.stride(), k_len, overlap=False)
    return bits, bounds


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    call: Call,
    decide: int,
    *,
    tile_mask: Tensor,
    thresholds: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    g = call.geometry
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)
    key_bits = bounds = None
    if call.key_padding_mask is not None:
        key_bits, bounds = padding(call.key_padding_mask, g.k_len, stream)
    columns = 1
    if thresholds is not None:
        thresholds = thresholds.contiguous()
        columns = 1 if thresholds.dim() == 1 else thresholds.shape[1]
    sinks = None if call.sinks is None else call.sinks.contiguous()
    if counts is not None:  # the kernel adds to it
        zero(counts.data_ptr(), counts.numel() * 8, stream)
    values = k if v is None else v
    batch, heads, _, width = q.shape
    q_stride, k_stride, v_stride = q.stride(), k.stride(), values.stride()
    grid = (tile_mask.shape[2], heads, batch)
    _stage(_key(q, v, decide, call), grid).run(
        stream,
        q.data_ptr(),
        k.data_ptr(),
        values.data_ptr(),
        _pointer(out),
        _pointer(lse),
        _pointer(thresholds),
        tile_mask.data_ptr(),
        _pointer(counts),
        _pointer(key_bits),
        _pointer(bounds),
        _pointer(sinks),
        _pointer(call.q_start_tensor),
        q_stride[0],
        q_stride[1],
        k_stride[0],
        k_stride[1],
        v_stride[0],
        v_stride[1],
        q_stride[2],
        k_stride[2],
        v_stride[2],
        g.q_start,
        heads,
        heads // k.shape[1],
        g.q_len,
        g.k_len,
        width,
        values.shape[3],
        columns,
        tile_mask.shape[3],
        min(g.sink_tiles, _LONGEST),
        g.is_causal,
        0 if g.window is None else min(g.window, _LONGEST),
        call.scale,
        0.0 if call.softcap is None else call.softcap,
        overlap=False,
    )


def _decision(q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Buffers (tile mask, counts), not cleared."""
    g = call.geometry
    shape = (q.shape[0], q.shape[1], mask_rows(g.q_len), mask_words(g.k_len))
    tile_mask = q.new_empty(shape, dtype=torch.int32)
    return tile_mask, q.new_empty((q.shape[1], 2), dtype=torch.int64)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate)."""
    _check(q, k, v, call, gate)
    tile_mask, counts = _decision(q, call)
    out, lse = empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    thresholds = None if gate is None else gate.thresholds
    buffers = {"tile_mask": tile_mask, "counts": counts, "out": out, "lse": lse}
    _run(q, k, v, call, _decide(gate), thresholds=thresholds, **buffers)
    return Result(out=out, lse=lse, tile_mask=tile_mask, counts=counts)


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    _check(q, k, None, call, gate)
    tiles, counts = _decision(q, call)
    t = gate.thresholds
    _run(q, k, None, call, _decide(gate), thresholds=t, tile_mask=tiles, counts=counts)
    return tiles, counts


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    _check(q, k, v, call, None)
    out, lse = empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    _run(q, k, v, call, kernels.GIVEN, tile_mask=tiles.contiguous(), out=out, lse=lse)
    return out, lse
