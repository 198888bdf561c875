"""Block-sparse attention in plain torch operations, one q block at a time, on any device.

It obeys the rule and never holds more than one q block's scores, but computes skipped tiles like
kept ones: it is what runs where there is no kernel. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops.call import Call, Gate, Result, empty_out, join_sinks, lse_dtype
from bsfa_compile.ops.gate import always_kept, kept_tiles, raw_scores, score_dtype, statistic
from bsfa_compile.ops.quantise import QuantisedKeys, int8_block_scores, quantise_keys
from bsfa_compile.ops.tiles import pack, unpack
from bsfa_compile.ops.visible import unpadded_limits

SCORES_AT_ONCE = 2**24  # elements; heads are taken in turns to stay below it


@dataclass(frozen=True, kw_only=True)
class Block:
    """One mask row on the device: which rows, tiles and scores it has."""

    index: int
    number: Tensor  # absolute q block, 0-d
    rows: Tensor  # [block_q] query rows, clamped into the call
    inside: Tensor  # [block_q] whether the row exists
    tiles: tuple[int, int]
    seen: Tensor  # [B or 1, block_q, T * block_k] what the mask leaves
    visible: Tensor  # [B or 1, T]
    droppable: Tensor  # [B, T]
    sinks: Tensor  # [B, T]
    votes: Tensor | None  # [B, block_q]


def blocks(call: Call, batch: int, device: torch.device) -> Iterator[Block]:
    """The mask rows that hold any visible tile (all of them if only the device knows q_start)."""
    g, padding = call.geometry, call.key_padding_mask
    limits = unpadded_limits(call, batch, device).expand(batch, 2)
    for i in range(g.q_blocks if g.k_blocks and g.q_len else 0):
        start: int | Tensor = g.q_start
        tile0, tile1 = g.tiles(i)
        if call.q_start_tensor is not None:
            start = call.q_start_tensor.to(device)
            tile0, tile1 = 0, g.k_blocks
        if tile0 == tile1:
            continue
        low = (torch.as_tensor(start, device=device) // g.block_q + i) * g.block_q
        p = low + torch.arange(g.block_q, device=device)
        rows = p - start
        inside = (rows >= 0) & (rows < g.q_len)
        key = torch.arange(tile0 * g.block_k, tile1 * g.block_k, device=device)
        seen = inside[:, None] & (key < g.k_len)
        if g.is_causal:
            seen = seen & (key <= p[:, None])
        if g.window is not None:
            seen = seen & (key > p[:, None] - g.window)
            if not g.is_causal:
                seen = seen & (key < p[:, None] + g.window)
        j = torch.arange(tile0, tile1, device=device)
        reached = seen.view(g.block_q, -1, g.block_k).any(dim=2).any(dim=0)
        stop = torch.where(reached, j + 1, 0).amax()
        votes, seen = None, seen[None]
        if padding is not None:
            held = F.pad(padding, (0, g.k_blocks * g.block_k - g.k_len))
            seen = seen & held[:, None, tile0 * g.block_k : tile1 * g.block_k]
            if g.is_causal:
                votes = padding[:, p.clamp(0, g.k_len - 1)] | (p >= g.k_len)
        visible = seen.view(len(seen), g.block_q, -1, g.block_k).any(dim=3).any(dim=1)
        yield Block(
            index=i,
            number=low // g.block_q,
            rows=rows.clamp(0, g.q_len - 1),
            inside=inside,
            tiles=(tile0, tile1),
            seen=seen,
            visible=visible,
            droppable=visible & ~always_kept(g, low, j, stop, limits),
            sinks=j < limits[:, :1] + g.sink_tiles,
            votes=votes,
        )


def decide(
    q: Tensor, s: Tensor, block: Block, call: Call, gate: Gate, keys: QuantisedKeys | None
) -> Tensor:
    """Which tiles of a block are kept, [B, H, T], from its exact scores s (unused in int8)."""
    bk, margin = call.geometry.block_k, None
    if keys is not None:
        adds_mean = gate.rule == "absolute" or call.softcap is not None  # else it cancels
        s, margin = int8_block_scores(q, keys, block.tiles, call.scale, adds_mean=adds_mean)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        s = s.masked_fill(~block.seen[:, None], -math.inf)
    row_max = s.view(*s.shape[:-1], -1, bk).amax(dim=-1)
    sinks = block.sinks if gate.rule == "relative" else None
    found = statistic(row_max, sinks, votes=block.votes, margin=margin)
    column = gate.thresholds
    if column.dim() == 2:
        at = block.number.clamp_max(column.shape[1] - 1).reshape(1)
        column = column.index_select(1, at)[:, 0]
    return kept_tiles(found, column, block.visible, block.droppable)


def masked_scores(q: Tensor, k: Tensor, block: Block, call: Call) -> Tensor:
    """Exact scores [B, H, block_q, T * block_k] of a block's rows q, -inf where hidden."""
    bk, (tile0, tile1) = call.geometry.block_k, block.tiles
    s = raw_scores(q, k[:, :, tile0 * bk : tile1 * bk], call.scale, call.softcap)
    s = F.pad(s, (0, (tile1 - tile0) * bk - s.shape[-1]))
    return s.masked_fill(~block.seen[:, None], -math.inf)


def heads_in_turns(q: Tensor, k: Tensor, block: Block) -> Iterator[tuple[slice, slice]]:
    """Slices of (q heads, kv heads) whose scores of one block fit `SCORES_AT_ONCE`."""
    groups = q.shape[1] // k.shape[1]
    each = q.shape[0] * groups * block.seen.shape[1] * block.seen.shape[2]
    step = max(1, SCORES_AT_ONCE // max(1, each))
    for first in range(0, k.shape[1], step):
        stop = min(first + step, k.shape[1])
        yield slice(first * groups, stop * groups), slice(first, stop)


def padded_values(v: Tensor, block: Block, block_k: int, dtype: torch.dtype) -> Tensor:
    """V (or K) of a block's tiles [B, Hkv, T * block_k, Dv]; the last tile filled with zeros."""
    first, stop = block.tiles[0] * block_k, block.tiles[1] * block_k
    part = v[:, :, first:stop].to(dtype)
    return F.pad(part, (0, 0, 0, stop - first - part.shape[2]))


def spread(tiles: Tensor, block_k: int) -> Tensor:
    """Per tile -> per key: [B, H, T] -> [B, H, 1, T * block_k]."""
    return tiles.repeat_interleave(block_k, dim=-1)[:, :, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    call: Call,
    *,
    gate: Gate | None = None,
    tile_mask: Tensor | None = None,
) -> Result:
    """Attention over the tiles that `gate` keeps, or `tile_mask` (packed) says, or all.

    Without v only the decision is made: out and lse are left unset.
    """
    g, dtype = call.geometry, score_dtype(q)
    batch, heads, rows = q.shape[:3]
    given = None if tile_mask is None else unpack(tile_mask, g.k_blocks)
    kept = torch.zeros(batch, heads, g.q_blocks, g.k_blocks, dtype=torch.bool, device=q.device)
    counts = torch.zeros(heads, 2, dtype=torch.int64, device=q.device)
    out = empty_out(q, q if v is None else v).zero_()
    lse = q.new_zeros(batch, heads, rows, dtype=lse_dtype(q.dtype))
    quantised = None
    if gate is not None and gate.precision == "int8" and g.k_len:
        quantised = quantise_keys(k, g.block_k, dtype)
    for block in blocks(call, batch, q.device):
        i, cut = block.index, slice(*block.tiles)
        counts[:, 1] += block.droppable.sum()
        for hq, hkv in heads_in_turns(q, k, block):
            q_block = q[:, hq].index_select(2, block.rows)
            s = masked_scores(q_block, k[:, hkv], block, call)
            keep = block.visible[:, None].expand(batch, s.shape[1], -1)
            if given is not None:
                keep = keep & given[:, hq, i, cut]
            elif gate is not None:
                part = None if quantised is None else _heads(quantised, hkv)
                keep = decide(q_block, s, block, call, _gate_heads(gate, hq), part)
            kept[:, hq, i, cut] = keep
            counts[hq, 0] += (block.droppable[:, None] & ~keep).sum(dim=(0, 2))
            if v is None:
                continue
            s = s.masked_fill(~spread(keep, g.block_k), -math.inf)
            part_out, part_lse = _softmax_v(s, padded_values(v[:, hkv], block, g.block_k, dtype))
            _put(out[:, hq], part_out, block)
            _put(lse[:, hq], part_lse, block)
    _hide_unseeing(lse, call)
    join_sinks(out, lse, call.sinks)
    return Result(out=out, lse=lse, tile_mask=pack(kept), counts=counts)


def _heads(keys: QuantisedKeys, hkv: slice) -> QuantisedKeys:
    return QuantisedKeys(
        values=keys.values[:, hkv],
        scales=keys.scales[:, hkv],
        norms=keys.norms[:, hkv],
        mean=keys.mean[:, hkv],
        spread=keys.spread[:, hkv],
    )


def _gate_heads(gate: Gate, hq: slice) -> Gate:
    return Gate(thresholds=gate.thresholds[hq], rule=gate.rule, precision=gate.precision)


def _softmax_v(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    top = s.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    p = torch.exp(s - top)
    total = p.sum(dim=-1, keepdim=True)
    weighted = p.reshape(v.shape[0], v.shape[1], -1, p.shape[-1]) @ v
    weighted = weighted.view(*p.shape[:3], v.shape[-1])
    out = weighted / total.masked_fill(total == 0, 1.0)
    return out, (top + torch.log(total))[..., 0]


def _put(whole: Tensor, part: Tensor, block: Block) -> None:
    """Add a block's rows to `whole` [B, H, Lq, ...], zero so far; rows outside add nothing."""
    inside = block.inside.view(-1, *[1] * (whole.dim() - 3))
    whole.index_add_(2, block.rows, torch.where(inside, part, 0).to(whole.dtype))


def _hide_unseeing(lse: Tensor, call: Call) -> None:
    """Rows whose q block sees no tile, so that no block wrote them, have lse -inf."""
    g = call.geometry
    if g.k_len == 0:
        lse.fill_(-math.inf)
    elif call.q_start_tensor is None:
        for i in range(g.q_blocks):
            if g.tiles(i) == (0, 0):
                lse[:, :, slice(*g.rows(i))] = -math.inf
