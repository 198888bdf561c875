"""All tiles of a call at once: which are visible, which of them are droppable.

Needed where nothing is dropped (dense attention), for the tile mask and the counts. Computed on
the device without waiting for it. Decode has one or two mask rows and must be quick: there the
host knows the tiles and fills in the words.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops.call import Call
from bsfa_compile.ops.gate import always_kept
from bsfa_compile.ops.tiles import WORD, Geometry, mask_words, pack

FEW_ROWS = 4


def unpadded_limits(call: Call, batch: int, device: torch.device) -> Tensor:
    """`tiles.unpadded_tiles` as a tensor [B, 2]; [1, 2] without padding."""
    g, mask = call.geometry, call.key_padding_mask
    if mask is None or g.k_blocks == 0:
        return torch.arange(0, g.k_blocks + 1, max(g.k_blocks, 1), device=device)[:2].expand(1, 2)
    tiles = torch.arange(g.k_blocks, device=device)
    held = F.pad(mask, (0, g.k_blocks * g.block_k - g.k_len))
    held = held.view(batch, g.k_blocks, g.block_k).any(dim=2)
    stop = torch.where(held, tiles + 1, 0).amax(dim=1)
    first = torch.where(held, tiles, g.k_blocks).amin(dim=1)
    return torch.stack((torch.minimum(first, stop), stop), dim=1)


def visible_tiles(call: Call, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(visible, droppable), each bool [B or 1, q_blocks, k_blocks]."""
    g = call.geometry
    start: int | Tensor = g.q_start
    if call.q_start_tensor is not None:
        start = call.q_start_tensor.to(device)
    i = torch.arange(g.q_blocks, device=device)[:, None]
    low = (i + start // g.block_q) * g.block_q
    first = low.clamp_min(start)
    last = (low + g.block_q).clamp_max(start + g.q_len) - 1
    lo, hi = torch.zeros_like(low), torch.full_like(low, g.k_len)
    if g.is_causal:
        hi = hi.minimum(last + 1)
    if g.window is not None:
        lo = (first - g.window + 1).clamp_min(0)
        if not g.is_causal:
            hi = hi.minimum(last + g.window)
    hi = torch.where((first <= last) & (lo < hi), hi, lo)  # no keys: lo == hi
    j = torch.arange(g.k_blocks, device=device)
    from_key = lo.maximum(j * g.block_k)
    to_key = hi.minimum((j + 1) * g.block_k)
    visible = (from_key < to_key)[None]
    if call.key_padding_mask is not None:
        before = F.pad(call.key_padding_mask.cumsum(dim=1), (1, 0))  # real keys before each key
        at = [x.clamp(0, g.k_len).flatten() for x in (to_key, from_key)]
        real = before.index_select(1, at[0]) - before.index_select(1, at[1])
        visible = visible & (real.view(batch, *from_key.shape) > 0)
    stop = -(-hi // g.block_k)
    limits = unpadded_limits(call, batch, device)[:, None]
    return visible, visible & ~always_kept(g, low, j, stop, limits)


def _signed(bits: int) -> int:
    """A word of 32 bits as int32."""
    return bits - 2**32 if bits >= 2**31 else bits


def _fill(words: Tensor, start: int, stop: int) -> None:
    """Set tiles [start, stop) in words [..., n] that are zero: few operations, no host copy."""
    first, last = start // WORD, (stop - 1) // WORD
    head, tail = -1 << start % WORD, (1 << (stop - 1) % WORD + 1) - 1
    if first == last:
        words[..., first] = _signed(head & tail)
        return
    words[..., first : last + 1] = -1
    if start % WORD:
        words[..., first] = head
    if stop % WORD:
        words[..., last] = _signed(tail)


@functools.lru_cache(maxsize=256)
def _droppable(geometry: Geometry) -> int:
    """How many droppable tiles a call without padding has, per head and batch row."""
    runs = (geometry.droppable(i) for i in range(geometry.q_blocks))
    return sum(stop - start for start, stop in runs)


def nothing_dropped(call: Call, q: Tensor) -> tuple[Tensor, Tensor]:
    """Tile mask (packed) and counts of a call on q [B, H, Lq, D] that keeps every tile."""
    g, (batch, heads) = call.geometry, q.shape[:2]
    words = q.new_zeros(batch, heads, g.q_blocks, mask_words(g.k_len, g.block_k), dtype=torch.int32)
    counts = q.new_zeros(heads, 2, dtype=torch.int64)
    if call.key_padding_mask is None and call.q_start_tensor is None:
        counts[:, 1] = _droppable(g) * batch
        if g.q_blocks <= FEW_ROWS:
            for i in range(g.q_blocks):
                if g.tiles(i) != (0, 0):
                    _fill(words[:, :, i], *g.tiles(i))
            return words, counts
        visible, _ = visible_tiles(call, batch, q.device)
    else:
        visible, droppable = visible_tiles(call, batch, q.device)
        counts[:, 1] = droppable.sum() * (batch // len(droppable) if batch else 0)
    return words.copy_(pack(visible[:, None])), counts
