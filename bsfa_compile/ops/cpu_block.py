"""One q block on the CPU: scores of a few tiles at a time, the gate's decision, running softmax.

Scores are transposed, [H, n, block_k, R] for H heads, n tiles and R query rows, so that a tile is
one contiguous piece of memory: cheap to reduce over keys, cheap to gather. They are in log2 units,
because torch's exp2 is several times faster on CPUs than its exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa_compile.ops.gate import candidates, row_votes
from bsfa_compile.ops.tiles import Geometry

LOG2E = math.log2(math.e)
SCORES_AT_ONCE = 2**19  # scores computed at once, for each thread: a few MB, as caches are
HEADROOM = 64.0  # how far scores may exceed the base before it is moved
UNSET = -1e30  # base of a row that has seen nothing: below every score, but finite


class Scratch:
    """Buffers that are written over and over, so that they stay in the cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor that shares memory with earlier ones of that name."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=self._dtype)
        return self._held[name][:size].view(shape)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """K and V of one batch row in the score dtype, filled up with zeros to whole tiles."""

    k: Tensor  # [Hkv, T, block_k, D]
    v: Tensor | None  # [Hkv, T, block_k, Dv + 1]: a last column of ones sums the probabilities
    real: Tensor  # [T, block_k] False for padded and missing keys
    whole: list[bool]  # per tile, whether all of its keys are real
    bounds: tuple[int, int]  # tiles [first, stop) between the first and the last real key

    def of_heads(self, kv: slice) -> Keys:
        """The same for some of the kv heads."""
        v = None if self.v is None else self.v[kv]
        return Keys(k=self.k[kv], v=v, real=self.real, whole=self.whole, bounds=self.bounds)


class RowBlock:
    """The query rows of mask row `index` in one batch row, and what the mask hides from them."""

    def __init__(self, g: Geometry, keys: Keys, index: int, padding: Tensor | None) -> None:
        first, stop = keys.bounds
        tile0, tile1 = g.tiles(index)
        self.index = index
        self.rows = slice(*g.rows(index))  # query rows of the call
        self.tiles = max(tile0, first), min(tile1, stop)  # all tiles that may hold a visible key
        inner0, inner1 = g.droppable(index, first, stop)
        self.inner = min(inner0, self.tiles[1]), min(inner1, self.tiles[1])  # of them, droppable
        self.sink_stop = max(first + g.sink_tiles, self.tiles[0])
        self.votes: Tensor | None = None  # [R], None for all
        self.visible: Tensor | None = None  # of self.tiles, None for all
        votes = row_votes(g, index, padding)
        if votes is not None and not votes.all():
            self.votes = votes[0]
        if padding is not None:
            visible, _ = candidates(g, index, [keys.bounds], padding)
            self.visible = visible[0, self.tiles[0] - tile0 : self.tiles[1] - tile0]
        self._geometry = g
        self._keys = keys
        self._hidden: dict[tuple[int, ...], Tensor | None] = {}

    def hidden(self, tiles: Sequence[int]) -> Tensor | None:
        """Which scores of `tiles` are hidden: bool [n, block_k, R or 1]; None if none is."""
        at = tuple(tiles)
        if at not in self._hidden:
            self._hidden[at] = self._find_hidden(tiles)
        return self._hidden[at]

    def _find_hidden(self, tiles: Sequence[int]) -> Tensor | None:
        g, keys = self._geometry, self._keys
        first, last = g.q_start + self.rows.start, g.q_start + self.rows.stop - 1
        low, high = tiles[0] * g.block_k, (tiles[-1] + 1) * g.block_k - 1
        hidden = None
        if not all(keys.whole[j] for j in tiles):
            hidden = ~keys.real[torch.as_tensor(tiles)][..., None]
        late = g.is_causal and high > first
        early = g.window is not None and (
            low <= last - g.window or (not g.is_causal and high >= first + g.window)
        )
        if not (late or early):
            return hidden
        p = torch.arange(first, last + 1)
        key = torch.as_tensor(tiles)[:, None, None] * g.block_k + torch.arange(g.block_k)[:, None]
        if late:
            hidden = key > p if hidden is None else hidden | (key > p)
        if early and g.window is not None:
            outside = key <= p - g.window
            if not g.is_causal:
                outside = outside | (key >= p + g.window)
            hidden = outside if hidden is None else hidden | outside
        return hidden


class Softmax:
    """Running softmax of H heads x R rows: sums of exp2(score - base) times V."""

    def __init__(self, heads: int, rows: int, values: int, scratch: Scratch, like: Tensor) -> None:
        self._base = like.new_full((heads, 1, rows), UNSET)
        self._sums = like.new_zeros(heads, values, rows)
        self._scratch = scratch

    def make_room(self, top: Tensor) -> float:
        """Move the base if scores up to `top` [H, 1, R] are too high for the present one.

        Returns how far `top` exceeds the base afterwards, at most.
        """
        excess = float((top - self._base).amax())
        if excess <= HEADROOM:
            return max(excess, 0.0)
        base = torch.maximum(self._base, top)  # a NaN stays with its row
        self._sums.mul_(torch.exp2(self._base - base))
        self._base = base
        return 0.0

    def add(self, s: Tensor, v: Tensor) -> None:
        """Add all of the tiles s [H, n, block_k, R] (overwritten), v [Hkv, n, block_k, Dv + 1]."""
        heads, _, _, rows = s.shape
        groups = heads // len(v)
        p = s.view(heads, -1, rows).sub_(self._base).exp2_()
        v = v.flatten(1, 2).transpose(1, 2)
        for kv in range(len(v)):
            part = slice(kv * groups, (kv + 1) * groups)
            self._sums[part].baddbmm_(v[kv].expand(groups, -1, -1), p[part])

    def add_kept(self, s: Tensor, v: Tensor, first: int, keep: Tensor) -> None:
        """Add the tiles that keep [H, n] names, n counting from tile `first` of v."""
        head, tile = keep.nonzero().unbind(dim=1)
        count = head.shape[0]
        if count == 0:
            return
        heads, tiles, block_k, rows = s.shape
        p = self._scratch.take("p", count, block_k, rows)
        torch.index_select(s.flatten(0, 1), 0, torch.add(tile, head, alpha=tiles), out=p)
        p.sub_(self._base.index_select(0, head)).exp2_()
        in_v = tile + first
        if v.shape[0] > 1:
            kv = head.div(heads // v.shape[0], rounding_mode="floor")
            in_v = torch.add(in_v, kv, alpha=v.shape[1])
        values = self._scratch.take("values", count, block_k, v.shape[-1])
        torch.index_select(v.flatten(0, 1), 0, in_v, out=values)
        part = self._scratch.take("part", count, v.shape[-1], rows)
        torch.bmm(values.transpose(1, 2), p, out=part)
        self._sums.index_add_(0, head, part)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out [H, R, Dv], lse [H, R] natural log); 0 and -inf for rows that saw nothing."""
        total = self._sums[:, -1:]
        out = self._sums[:, :-1] / total.masked_fill(total == 0, 1.0)
        lse = (self._base + torch.log2(total)) / LOG2E
        return out.transpose(1, 2), lse[:, 0]
