"""The CPU path: every score is computed once, only kept tiles are exponentiated and meet V.

Tiles are visited in the order of the relative gate, so each decision falls while its scores are
still in the cache. Beyond the inputs in the score dtype, memory is one small score buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops.call import Call, Gate, Result, empty_out, join_sinks, lse_dtype
from bsfa_compile.ops.cpu_block import LOG2E, Keys, RowBlock, Scratch
from bsfa_compile.ops.cpu_heads import Heads
from bsfa_compile.ops.gate import score_dtype, threshold_column
from bsfa_compile.ops.tiles import Geometry, pack, unpack, unpadded_tiles

HEADS_AT_ONCE = 8


def attention(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Result:
    """Attention over the tiles that the gate keeps, judged in exact scores; all without a gate.

    Without v only the decision is made: out and lse then mean nothing.
    """
    g, dtype = call.geometry, score_dtype(q)
    out, lse = _outputs(q, q if v is None else v)
    kept = torch.zeros(q.shape[0], q.shape[1], g.q_blocks, g.k_blocks, dtype=torch.bool)
    droppable = torch.zeros(q.shape[0], g.q_blocks, g.k_blocks, dtype=torch.bool)
    thresholds = None if gate is None else gate.thresholds.to(dtype) * LOG2E
    capped = thresholds is not None and bool((thresholds <= 0).all())
    prepared = _prepare(k, v, call, dtype)
    scratch = Scratch(dtype)
    for b, i in _blocks(g, prepared):
        keys, padding = prepared[b]
        block = RowBlock(g, keys, i, padding)
        rows, tiles, inner = block.rows, slice(*block.tiles), slice(*block.inner)
        droppable[b, i, inner] = True
        kept[b, :, i, tiles] = True
        for hq, hkv in _heads_in_turns(q, k):
            own = keys.of_heads(hkv)
            heads = Heads(q[b, hq, rows], own, block, scratch, call.scale, call.softcap)
            if gate is None or thresholds is None:
                heads.take_all(range(*block.tiles))
            else:
                column = threshold_column(thresholds[hq], g, i)
                relative = gate.rule == "relative"
                kept[b, hq, i, inner] = heads.judge(column, relative=relative, capped=capped)
            if v is not None:
                out[b, hq, rows], lse[b, hq, rows] = heads.result()
        if block.visible is not None:
            kept[b, :, i, tiles] &= block.visible
            droppable[b, i, tiles] &= block.visible
    join_sinks(out, lse, call.sinks)
    dropped = (droppable[:, None] & ~kept).sum(dim=(0, 2, 3))
    counts = torch.stack((dropped, droppable.sum().expand_as(dropped)), dim=1)
    return Result(out=out, lse=lse, tile_mask=pack(kept), counts=counts)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, tile_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (out, lse) over the tiles of a packed tile mask; others are not even scored."""
    g, groups = call.geometry, q.shape[1] // k.shape[1]
    out, lse = _outputs(q, v)
    kept = unpack(tile_mask, g.k_blocks)
    prepared = _prepare(k, v, call, score_dtype(q))
    scratch = Scratch(score_dtype(q))
    for b, i in _blocks(g, prepared):
        keys, padding = prepared[b]
        block = RowBlock(g, keys, i, padding)
        for h in range(q.shape[1]):
            head, own = slice(h, h + 1), keys.of_heads(slice(h // groups, h // groups + 1))
            heads = Heads(q[b, head, block.rows], own, block, scratch, call.scale, call.softcap)
            listed: list[int] = kept[b, h, i].nonzero()[:, 0].tolist()
            heads.take_all([j for j in listed if block.tiles[0] <= j < block.tiles[1]])
            out[b, head, block.rows], lse[b, head, block.rows] = heads.result()
    join_sinks(out, lse, call.sinks)
    return out, lse


def _blocks(g: Geometry, keys: list[tuple[Keys, Tensor | None]]) -> list[tuple[int, int]]:
    """(batch row, mask row) of every q block that sees any tile."""
    found = []
    for b, (own, _) in enumerate(keys):
        for i in range(g.q_blocks):
            tile0, tile1 = g.tiles(i)
            if max(tile0, own.bounds[0]) < min(tile1, own.bounds[1]):
                found.append((b, i))
    return found


def _heads_in_turns(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (q heads, kv heads): whole kv groups, about `HEADS_AT_ONCE` q heads."""
    groups = q.shape[1] // k.shape[1]
    step = max(1, HEADS_AT_ONCE // groups)
    for first in range(0, k.shape[1], step):
        stop = min(first + step, k.shape[1])
        yield slice(first * groups, stop * groups), slice(first, stop)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of rows that see nothing."""
    lse = q.new_full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype))
    return empty_out(q, v).zero_(), lse


def _prepare(
    k: Tensor, v: Tensor | None, call: Call, dtype: torch.dtype
) -> list[tuple[Keys, Tensor | None]]:
    """For each batch row its keys and its padding mask [1, Lk]."""
    g, padding = call.geometry, call.key_padding_mask
    batch, heads, keys, _ = k.shape
    tail = g.k_blocks * g.block_k - keys
    shape = (batch, heads, g.k_blocks, g.block_k)
    k = F.pad(k.to(dtype), (0, 0, 0, tail)).reshape(*shape, k.shape[3]).contiguous()
    if v is not None:
        v = F.pad(F.pad(v.to(dtype), (0, 1), value=1.0), (0, 0, 0, tail))
        v = v.reshape(*shape, v.shape[3])
    real = torch.ones(batch, keys, dtype=torch.bool) if padding is None else padding
    real = F.pad(real, (0, tail)).view(batch, g.k_blocks, g.block_k)
    whole = real.all(dim=2).tolist()
    bounds = unpadded_tiles(padding, batch, keys, g.block_k)
    return [
        (
            Keys(
                k=k[b],
                v=None if v is None else v[b],
                real=real[b],
                whole=whole[b],
                bounds=bounds[b],
            ),
            None if padding is None else padding[b : b + 1],
        )
        for b in range(batch)
    ]
