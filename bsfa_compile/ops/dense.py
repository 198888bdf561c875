"""Dense attention for every mask a call can have, by torch's fused kernels, never N^2 in memory.

A causal mask whose query starts at q_start is two fused calls, the past (no mask) and the present
(top-left causal), joined by their log-sum-exps. Windows and padding take a mask for a few query
rows at a time. `reason` says what these kernels cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from bsfa_compile.ops.call import Call, Result, empty_out, join_sinks, lse_dtype
from bsfa_compile.ops.visible import nothing_dropped

MASKED_ROWS = 256  # query rows that share one piece of mask

Fused = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]


def reason(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Why torch's fused kernels cannot do this call; None if they can."""
    g = call.geometry
    if call.softcap is not None:
        return "torch's fused attention has no softcap"
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "an empty input"
    if call.q_start_tensor is not None and (g.is_causal or g.window is not None):
        return "only the device knows where the query starts"
    if q.is_cuda and q.dtype == torch.float64:
        return "no fused attention for float64 on CUDA"
    if not (q.is_cuda or q.is_cpu):
        return f"no fused attention known for {q.device.type}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """Attention over everything the mask leaves. `reason` said None."""
    fused = _fused_cpu if q.device.type == "cpu" else _fused_cuda
    if call.key_padding_mask is None and call.geometry.window is None:
        out, lse = _unmasked(q, k, v, call, fused)
    else:
        out, lse = _masked(q, k, v, call, fused)
    tile_mask, counts = nothing_dropped(call, q)
    wanted = q.new_empty(q.shape[:3], dtype=lse.dtype)
    out, lse = _laid(out, empty_out(q, v)), _laid(lse, wanted)
    join_sinks(out, lse, call.sinks)
    return Result(out=out, lse=lse, tile_mask=tile_mask, counts=counts)


def _laid(x: Tensor, wanted: Tensor) -> Tensor:
    """x with the strides of `wanted`, copied into it only if it lies otherwise."""
    return x if x.stride() == wanted.stride() else wanted.copy_(x)


def _fused_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    width, values = q.shape[3], v.shape[3]
    if width != values:  # the kernel wants one head dim: fill up with zeros
        q, k = (F.pad(x, (0, max(values - width, 0))) for x in (q, k))
        v = F.pad(v, (0, max(width - values, 0)))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=is_causal, attn_mask=bias, scale=scale
    )
    return out[..., :values], lse


def _fused_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """What torch would pick, called so that it returns its log-sum-exp."""
    groups = q.shape[1] // k.shape[1]
    if mask is None and q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0:
        choice = torch._fused_sdp_choice(
            q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=groups > 1
        )
        if choice == SDPBackend.CUDNN_ATTENTION.value:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, is_causal, False, scale=scale
            )
            return out, lse.reshape(q.shape[:3])
        if choice == SDPBackend.FLASH_ATTENTION.value:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, is_causal, False, scale=scale
            )
            return out, lse
    return _efficient_cuda(q, k, v, mask, is_causal, scale)


def _efficient_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Any mask, float32 and Dv != D; the one kernel here that needs K and V repeated for GQA."""
    values, groups = v.shape[3], q.shape[1] // k.shape[1]
    q, k, v = (F.pad(x, (0, -x.shape[3] % 8)) for x in (q, k, v))
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    bias = None
    if mask is not None:  # rows of the bias must start at multiples of 16 bytes
        batch, _, rows, keys = mask.shape
        room = torch.zeros(batch, 1, rows, keys + -keys % 16, dtype=q.dtype, device=q.device)
        bias = room[..., :keys].masked_fill_(~mask, -math.inf)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], keys)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, is_causal, scale=scale
    )
    return out[..., :values], lse[:, :, : q.shape[2]]


def _unmasked(q: Tensor, k: Tensor, v: Tensor, call: Call, fused: Fused) -> tuple[Tensor, Tensor]:
    """Neither window nor padding: causal from q_start, or everything."""
    g = call.geometry
    if not g.is_causal:
        return fused(q, k, v, None, False, call.scale)
    past, present = min(g.q_start, g.k_len), min(g.q_start + g.q_len, g.k_len)
    if past == 0:
        return fused(q, k[:, :, :present], v[:, :, :present], None, True, call.scale)
    if g.q_len == 1 or past == present:  # all rows see the same keys
        return fused(q, k[:, :, :present], v[:, :, :present], None, False, call.scale)
    before = fused(q, k[:, :, :past], v[:, :, :past], None, False, call.scale)
    now = slice(past, present)
    return join(*before, *fused(q, k[:, :, now], v[:, :, now], None, True, call.scale))


def join(out0: Tensor, lse0: Tensor, out1: Tensor, lse1: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: outputs weigh by exp(lse)."""
    lse = torch.logaddexp(lse0, lse1)
    weight = torch.exp(lse1 - lse)[..., None]
    return torch.lerp(out0.to(lse.dtype), out1.to(lse.dtype), weight).to(out0.dtype), lse


def _masked(q: Tensor, k: Tensor, v: Tensor, call: Call, fused: Fused) -> tuple[Tensor, Tensor]:
    """Windows and padding: a few query rows at a time, with their piece of the mask."""
    g = call.geometry
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    everything = not g.is_causal and g.window is None
    step = g.q_len if everything else MASKED_ROWS
    for row in range(0, g.q_len, step):
        stop = min(row + step, g.q_len)
        first, last = g.q_start + row, g.q_start + stop - 1
        lo, hi = 0, g.k_len
        if g.is_causal:
            hi = min(hi, last + 1)
        if g.window is not None:
            lo = max(lo, first - g.window + 1)
            hi = hi if g.is_causal else min(hi, last + g.window)
        rows = slice(row, stop)
        if lo >= hi:
            out[:, :, rows], lse[:, :, rows] = 0, -math.inf
            continue
        seen = _piece(call, first, last, lo, hi, q.device)
        keys = slice(lo, hi)
        part = fused(q[:, :, rows], k[:, :, keys], v[:, :, keys], seen, False, call.scale)
        unseeing = ~seen.any(dim=-1)
        out[:, :, rows] = part[0].masked_fill(unseeing[..., None], 0.0)
        lse[:, :, rows] = part[1].masked_fill(unseeing, -math.inf)
    return out, lse


def _piece(call: Call, first: int, last: int, lo: int, hi: int, device: torch.device) -> Tensor:
    """What the mask leaves of positions first..last and keys lo..hi-1: bool [B or 1, 1, R, C]."""
    g, padding = call.geometry, call.key_padding_mask
    seen = torch.ones(1, 1, 1, hi - lo, dtype=torch.bool, device=device)
    if g.is_causal or g.window is not None:
        p = torch.arange(first, last + 1, device=device)[:, None]
        key = torch.arange(lo, hi, device=device)
        if g.is_causal:
            seen = seen & (key <= p)
        if g.window is not None:
            seen = seen & (key > p - g.window)
            if not g.is_causal:
                seen = seen & (key < p + g.window)
    return seen if padding is None else seen & padding[:, None, None, lo:hi]
