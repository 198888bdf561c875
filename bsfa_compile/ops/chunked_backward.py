"""Gradients of block-sparse attention over a given tile mask, in plain torch operations.

The derivative of the very function that ran forward: the tiles it skipped are skipped here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bsfa_compile.ops.call import Call, empty_out
from bsfa_compile.ops.chunked import blocks, heads_in_turns, masked_scores, padded_values, spread
from bsfa_compile.ops.gate import score_dtype
from bsfa_compile.ops.tiles import unpack


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile_mask: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) like q, k, v, over [B, L, heads, dim] storage; one q block at a time.

    grad_out, out [B, H, Lq, Dv]; grad_lse, lse [B, H, Lq]; tile_mask packed.
    """
    g, dtype = call.geometry, score_dtype(q)
    kept = unpack(tile_mask, g.k_blocks)
    tail = g.k_blocks * g.block_k - g.k_len
    dq = q.new_zeros(q.shape, dtype=dtype)
    dk = k.new_zeros(*k.shape[:2], g.k_len + tail, k.shape[3], dtype=dtype)
    dv = v.new_zeros(*v.shape[:2], g.k_len + tail, v.shape[3], dtype=dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(dim=-1) - grad_lse
    for block in blocks(call, q.shape[0], q.device):
        i, cut = block.index, slice(*block.tiles)
        keys = slice(block.tiles[0] * g.block_k, block.tiles[1] * g.block_k)
        for hq, hkv in heads_in_turns(q, k, block):
            q_block = q[:, hq].index_select(2, block.rows).to(dtype)
            d_out = grad_out[:, hq].index_select(2, block.rows).to(dtype)
            rows_lse = lse[:, hq].index_select(2, block.rows)[..., None]
            rows_delta = delta[:, hq].index_select(2, block.rows)[..., None]
            s = masked_scores(q_block, k[:, hkv], block, call)
            allowed = spread(kept[:, hq, i, cut], g.block_k) & (s != -math.inf)
            p = torch.where(allowed, torch.exp(s - rows_lse), 0.0)
            shape = (p.shape[0], dk[:, hkv].shape[1], -1)
            grouped = p.reshape(*shape, p.shape[-1])
            d_grouped = d_out.reshape(*shape, d_out.shape[-1])
            dv[:, hkv, keys] += grouped.transpose(-1, -2) @ d_grouped
            values = padded_values(v[:, hkv], block, g.block_k, dtype)
            dp = (d_grouped @ values.transpose(-1, -2)).view(p.shape)
            ds = torch.where(allowed, p * (dp - rows_delta), 0.0)
            if call.softcap is not None:
                ds = ds * (1 - (torch.where(allowed, s, 0.0) / call.softcap) ** 2)
            ds = (ds * call.scale).reshape(grouped.shape)
            key_block = padded_values(k[:, hkv], block, g.block_k, dtype)
            dq_block = (ds @ key_block).view(q_block.shape)
            inside = block.inside[:, None]
            dq[:, hq].index_add_(2, block.rows, torch.where(inside, dq_block, 0.0))
            dk[:, hkv, keys] += ds.transpose(-1, -2) @ q_block.reshape(*shape, q.shape[-1])
    return (
        empty_out(q, q).copy_(dq),
        empty_out(k, k).copy_(dk[:, :, : g.k_len]),
        empty_out(v, v).copy_(dv[:, :, : g.k_len]),
    )
