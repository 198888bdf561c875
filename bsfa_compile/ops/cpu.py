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

from bsfa_compile.ops.call import Call, Gate, Result, empty_out, lse_dtype
from bsfa_compile.ops.cpu_block import LOG2E, Keys, RowBlock, Scratch
from bsfa_compile.ops.cpu_heads import Heads
from bsfa_compile.ops.gate import score_dtype, threshold_column
from bsfa_compile.ops.tiles import pack, unpack, unpadded_tiles

HEADS_AT_ONCE = 8


def attention(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Result:
    """Attention over the tiles that the gate keeps, judged in exact scores; all without a gate.

    Without v only the decision is made: out and lse then mean nothing.
    """
    g = call.geometry
    out, lse = _outputs(q, q if v is None else v)
    kept = torch.zeros(q.shape[0], q.shape[1], g.q_blocks, g.k_blocks, dtype=torch.bool)
    droppable = torch.zeros(q.shape[0], g.q_blocks, g.k_blocks, dtype=torch.bool)
    thresholds = None if gate is None else gate.thresholds.to(score_dtype(q)) * LOG2E
    capped = thresholds is not None and bool((thresholds <= 0).all())
    scratch = Scratch(score_dtype(q))
    for b, keys, block in _row_blocks(k, v, call, score_dtype(q)):
        i, rows, tiles = block.index, slice(block.start, block.stop), slice(*block.tiles)
        inner = slice(*block.inner)
        droppable[b, i, inner] = True
        kept[b, :, i, tiles] = True
        for hq, hkv in _heads_in_turns(q, k):
            heads = Heads(
                q[b, hq, rows],
                keys.of_heads(hkv),
                block,
                scratch,
                scale=call.scale,
                softcap=call.softcap,
            )
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
    dropped = (droppable[:, None] & ~kept).sum(dim=(0, 2, 3))
    counts = torch.stack((dropped, droppable.sum().expand_as(dropped)), dim=1)
    return Result(out=out, lse=lse, tile_mask=pack(kept), counts=counts)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, tile_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (out, lse) over the tiles of a packed tile mask; others are not even scored."""
    groups = q.shape[1] // k.shape[1]
    out, lse = _outputs(q, v)
    kept = unpack(tile_mask, call.geometry.k_blocks)
    scratch = Scratch(score_dtype(q))
    for b, keys, block in _row_blocks(k, v, call, score_dtype(q)):
        rows = slice(block.start, block.stop)
        for h in range(q.shape[1]):
            head = slice(h, h + 1)
            own = keys.of_heads(slice(h // groups, h // groups + 1))
            one = Heads(
                q[b, head, rows], own, block, scratch, scale=call.scale, softcap=call.softcap
            )
            listed: list[int] = kept[b, h, block.index].nonzero()[:, 0].tolist()
            one.take_all([j for j in listed if block.tiles[0] <= j < block.tiles[1]])
            out[b, head, rows], lse[b, head, rows] = one.result()
    return out, lse


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


def _row_blocks(
    k: Tensor, v: Tensor | None, call: Call, dtype: torch.dtype
) -> Iterator[tuple[int, Keys, RowBlock]]:
    """Batch row by batch row, its keys and each of its q blocks that sees any tile."""
    g = call.geometry
    bounds = unpadded_tiles(call.key_padding_mask, k.shape[0], g.k_len, g.block_k)
    for b, bound in enumerate(bounds):
        padding = None if call.key_padding_mask is None else call.key_padding_mask[b : b + 1]
        keys = _prepare(k[b], None if v is None else v[b], padding, bound, g.block_k, dtype)
        for i in range(g.q_blocks):
            block = RowBlock(g, keys, i, padding)
            if block.start < block.stop and block.tiles[0] < block.tiles[1]:
                yield b, keys, block


def _prepare(
    k: Tensor,
    v: Tensor | None,
    padding: Tensor | None,
    bounds: tuple[int, int],
    block_k: int,
    dtype: torch.dtype,
) -> Keys:
    """Keys of one batch row: k [Hkv, Lk, D], v [Hkv, Lk, Dv], padding [1, Lk]."""
    keys = k.shape[1]
    tiles = -(-keys // block_k)
    tail = tiles * block_k - keys
    shape = (k.shape[0], tiles, block_k)
    real = k.new_ones(keys, dtype=torch.bool) if padding is None else padding[0]
    real = F.pad(real, (0, tail)).view(tiles, block_k)
    whole: list[bool] = real.all(dim=1).tolist()
    if v is not None:
        v = F.pad(F.pad(v.to(dtype), (0, 1), value=1.0), (0, 0, 0, tail)).reshape(
            *shape, v.shape[-1] + 1
        )
    return Keys(
        k=F.pad(k.to(dtype), (0, 0, 0, tail)).reshape(*shape, k.shape[-1]).contiguous(),
        v=v,
        real=real,
        whole=whole,
        bounds=bounds,
    )
