"""Tile geometry: which tiles of the score matrix a mask leaves visible, and which are always kept.

One definition for the reference, the CPU path, the observer and the CUDA kernels (DESIGN: the
method). Query row `r` stands at absolute position `q_start + r`. A tile is BLOCK_Q absolute query
positions x BLOCK_K key positions; q block `b` covers the absolute positions
`b * block_q .. (b + 1) * block_q - 1` whatever part of them a call holds, so decisions do not
depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_Q = 128
BLOCK_K = 64
WORD = 32  # tiles per word of a packed tile mask


def mask_rows(q_len: int, block_q: int = BLOCK_Q) -> int:
    """Rows of a tile mask: the most q blocks that `q_len` rows can touch, wherever they start.

    It does not depend on `q_start`, which may be known only on the device; a row that no query
    touches stays zero.
    """
    return (q_len + block_q - 2) // block_q + 1


def mask_words(k_len: int, block_k: int = BLOCK_K) -> int:
    """Words (int32, 32 tiles each) in one row of a packed tile mask.

    At least two: torch.export would hold a number of words that may be 1 for constant.
    """
    words: int = torch.sym_max((-(-k_len // block_k) + WORD - 1) // WORD, 2)
    return words


def reached(
    q_start: int, q_len: int, k_len: int, is_causal: bool, window: int | None
) -> tuple[int, int]:
    """(tokens of the input up to a call's last query, most keys that one of its rows may see)."""
    tokens = min(q_start + q_len, k_len) if is_causal else max(q_len, k_len)
    if window is None:
        return tokens, tokens
    return tokens, min(tokens, window if is_causal else 2 * window - 1)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the tiles of one attention call lie.

    Mask row `i` of a call is the absolute q block `first_block + i`.
    `window` W: a query at position p sees keys p - W < key (and key < p + W if not causal).
    """

    q_len: int
    k_len: int
    q_start: int = 0
    is_causal: bool = False
    window: int | None = None
    sink_tiles: int = 1
    block_q: int = BLOCK_Q
    block_k: int = BLOCK_K

    @property
    def first_block(self) -> int:
        return self.q_start // self.block_q

    @property
    def q_blocks(self) -> int:
        """Rows of the tile mask (see `mask_rows`)."""
        return mask_rows(self.q_len, self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)

    def rows(self, i: int) -> tuple[int, int]:
        """Query rows [start, stop) of this call that lie in mask row `i`; empty if none."""
        lo = (self.first_block + i) * self.block_q - self.q_start
        return max(lo, 0), max(min(lo + self.block_q, self.q_len), lo, 0)

    def keys(self, i: int) -> tuple[int, int]:
        """Keys [start, stop) that causality and window leave to any row of mask row `i`."""
        start, stop = self.rows(i)
        if start >= stop:
            return 0, 0
        first, last = self.q_start + start, self.q_start + stop - 1
        lo, hi = 0, self.k_len
        if self.is_causal:
            hi = min(hi, last + 1)
        if self.window is not None:
            lo = max(lo, first - self.window + 1)
            if not self.is_causal:
                hi = min(hi, last + self.window)
        return (lo, hi) if lo < hi else (0, 0)

    def tiles(self, i: int) -> tuple[int, int]:
        """Tiles [start, stop) that hold the keys of mask row `i`."""
        lo, hi = self.keys(i)
        return lo // self.block_k, -(-hi // self.block_k)

    def always_kept(self, i: int, j: int, first_tile: int = 0, stop_tile: int = 2**31) -> bool:
        """Whether tile (i, j), visible, is kept whatever its scores.

        True if the causal or window edge cuts it (judged on the whole q block, so that chunking
        changes nothing), if it is the last visible one, or one of the first `sink_tiles`.
        First and last count within [first_tile, stop_tile), the tiles that hold unpadded keys.
        """
        low = (self.first_block + i) * self.block_q  # absolute positions of the whole q block
        high = low + self.block_q - 1
        key_low, key_high = j * self.block_k, min((j + 1) * self.block_k, self.k_len) - 1
        if j < first_tile + self.sink_tiles or j == min(self.tiles(i)[1], stop_tile) - 1:
            return True
        if self.is_causal and key_high > low:
            return True
        if self.window is None:
            return False
        if key_low <= high - self.window:
            return True
        return not self.is_causal and key_high >= low + self.window

    def droppable(self, i: int, first_tile: int = 0, stop_tile: int = 2**31) -> tuple[int, int]:
        """Tiles [start, stop) of mask row `i` that `always_kept` does not name: one run."""
        low = (self.first_block + i) * self.block_q
        tile0, tile1 = self.tiles(i)
        lo, hi = max(tile0, first_tile + self.sink_tiles), min(tile1, stop_tile) - 1
        if self.is_causal:
            hi = min(hi, (low + 1) // self.block_k)
        if self.window is not None:
            lo = max(lo, (low + self.block_q - 1 - self.window) // self.block_k + 1)
            if not self.is_causal:
                hi = min(hi, (low + self.window) // self.block_k)
        return lo, max(lo, hi)

    def visible(self, i: int, device: torch.device | None = None) -> Tensor | None:
        """What causality and window leave of mask row `i`: bool [rows, keys], None for all."""
        (start, stop), (lo, hi) = self.rows(i), self.keys(i)
        first, last = self.q_start + start, self.q_start + stop - 1
        causal_cuts = self.is_causal and hi - 1 > first
        window_cuts = self.window is not None and (
            lo <= last - self.window or (not self.is_causal and hi - 1 >= first + self.window)
        )
        if not (causal_cuts or window_cuts):
            return None
        p = torch.arange(first, last + 1, device=device)[:, None]
        key = torch.arange(lo, hi, device=device)[None, :]
        seen = key <= p if self.is_causal else torch.ones_like(key <= p)
        if self.window is not None:
            seen = seen & (key > p - self.window)
            if not self.is_causal:
                seen = seen & (key < p + self.window)
        return seen


def unpadded_tiles(
    key_padding_mask: Tensor | None, batch: int, k_len: int, block_k: int = BLOCK_K
) -> list[tuple[int, int]]:
    """For each batch row, the tiles [first, stop) between its first and last unpadded key."""
    if key_padding_mask is None or k_len == 0:
        return [(0, -(-k_len // block_k))] * batch
    bounds = []
    for row in key_padding_mask.bool():
        keys = row.nonzero()
        bounds.append(
            (int(keys[0]) // block_k, int(keys[-1]) // block_k + 1) if len(keys) else (0, 0)
        )
    return bounds


def pack(tiles: Tensor) -> Tensor:
    """Pack a bool tile mask [B, H, q_blocks, k_blocks] into int32 words, tile 0 in bit 0."""
    words = mask_words(tiles.shape[-1], 1)
    padded = torch.nn.functional.pad(tiles, (0, words * WORD - tiles.shape[-1]))
    bits = padded.unflatten(-1, (words, WORD)).to(torch.int64)
    packed = (bits << torch.arange(WORD, device=tiles.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(words: Tensor, k_blocks: int) -> Tensor:
    """Inverse of `pack`: bool [B, H, q_blocks, k_blocks]."""
    bits = (words[..., None].to(torch.int64) >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten(-2)[..., :k_blocks].bool()
