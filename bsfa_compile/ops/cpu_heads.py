"""The heads of one q block on the CPU, going through their tiles in visiting order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bsfa_compile.ops.cpu_block import (
    HEADROOM,
    LOG2E,
    SCORES_AT_ONCE,
    Keys,
    RowBlock,
    Scratch,
    Softmax,
)

LEAST_ROWS = 32  # products of fewer rows are slow


class Running:
    """The relative gate's memory: each row's running maximum over the tiles visited."""

    def __init__(self, like: Tensor) -> None:
        heads, _, rows = like.shape
        self.maximum = like.new_full((heads, 1, rows), -math.inf)
        self._all_seen = False

    def visit(self, row_max: Tensor) -> None:
        """Take note of tiles [H, n, R] that are kept in any case."""
        self.maximum = torch.maximum(self.maximum, row_max.amax(dim=1, keepdim=True))

    def statistic(self, row_max: Tensor) -> Tensor:
        """Statistic [H, n] of tiles visited from the last downwards; takes note of them."""
        self._all_seen = self._all_seen or bool((self.maximum > -math.inf).all())
        down = torch.cat((self.maximum, row_max.flip(1)), dim=1)
        running = down.cummax(dim=1).values
        value = down[:, 1:] - running[:, :-1]
        if not self._all_seen:  # -inf less -inf: a row that has seen nothing yet
            value.masked_fill_(down[:, 1:] == -math.inf, -math.inf)
        self.maximum = running[:, -1:]
        return value.amax(dim=2).flip(1)


class Heads:
    """Query heads [H, R, D] over the keys of their Hkv heads.

    Inside, the rows of a head may be split among several heads: H and R below are those.
    """

    def __init__(
        self,
        q: Tensor,
        keys: Keys,
        block: RowBlock,
        scratch: Scratch,
        scale: float,
        softcap: float | None,
    ) -> None:
        heads, rows, width = q.shape
        self._split = _row_split(heads, rows)
        heads, rows = heads * self._split, rows // self._split
        self._keys = keys
        self._block = block
        self._scratch = scratch
        self._cap = softcap
        factor = scale * LOG2E if softcap is None else scale / softcap
        q = q.reshape(heads, rows, width).transpose(1, 2)
        self._q = (q.to(keys.k.dtype) * factor).contiguous()
        self._rise = 0.0  # no row's running maximum exceeds the softmax base by more
        at_once = SCORES_AT_ONCE * max(2, torch.get_num_threads())
        self._at_once = max(1, at_once // (heads * rows * keys.k.shape[2]))
        if keys.v is not None:
            self._softmax = Softmax(heads, rows, keys.v.shape[-1], scratch, self._q)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out [H, R, Dv], lse [H, R] natural log); 0 and -inf for rows that saw nothing."""
        out, lse = self._softmax.result()
        heads = len(out) // self._split
        return out.reshape(heads, -1, out.shape[-1]), lse.reshape(heads, -1)

    def _scores(self, tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores [H, n, block_k, R] of `tiles` (in scratch) and row maxima [H, n, R]."""
        s = self._raw_scores(tiles)
        hidden = self._block.hidden(tiles)
        if hidden is None:
            return s, s.amax(dim=2)
        n, block_k, rows = hidden.shape  # rows may be 1: the same for all
        split = 1 if rows == 1 else self._split
        hidden = hidden.view(n, block_k, split, rows // split).permute(2, 0, 1, 3)
        # Adding -inf is ten times faster than masked_fill_ but turns hidden NaN and inf into NaN.
        bias = torch.where(hidden, -math.inf, 0.0).to(s.dtype)
        s.view(-1, split, *s.shape[1:]).add_(bias)
        row_max = s.amax(dim=2)
        if bool(row_max.isnan().any()):
            s = self._raw_scores(tiles)
            s.view(-1, split, *s.shape[1:]).masked_fill_(hidden, -math.inf)
            row_max = s.amax(dim=2)
        return s, row_max

    def _raw_scores(self, tiles: Sequence[int]) -> Tensor:
        heads, _, rows = self._q.shape
        kv_heads, _, block_k, _ = self._keys.k.shape
        s = self._scratch.take("s", heads, len(tiles) * block_k, rows)
        k = _pick(self._keys.k, tiles).flatten(1, 2)
        if kv_heads == heads:
            torch.bmm(k, self._q, out=s)
        else:
            groups = heads // kv_heads
            for kv in range(kv_heads):
                part = slice(kv * groups, (kv + 1) * groups)
                torch.bmm(k[kv].expand(groups, -1, -1), self._q[part], out=s[part])
        if self._cap is not None:
            s.tanh_().mul_(self._cap * LOG2E)
        return s.view(heads, len(tiles), block_k, rows)

    def _voting(self, row_max: Tensor) -> Tensor:
        votes = self._block.votes
        if votes is None:
            return row_max
        by_split = votes.view(self._split, 1, -1)
        parts = row_max.view(-1, self._split, *row_max.shape[1:])
        return parts.masked_fill(~by_split, -math.inf).flatten(0, 1)

    def _take(self, tiles: Sequence[int], running: Running | None = None) -> None:
        """Take all of `tiles` into the softmax, and into the running maximum if there is one."""
        for first in range(0, len(tiles), self._at_once):
            piece = tiles[first : first + self._at_once]
            s, row_max = self._scores(piece)
            if running is not None:
                running.visit(self._voting(row_max))
            if self._keys.v is not None:
                rise = self._softmax.make_room(row_max.amax(dim=1, keepdim=True))
                self._rise = max(self._rise, rise)
                self._softmax.add(s, _pick(self._keys.v, piece))

    def take_all(self, tiles: Sequence[int]) -> None:
        """Attend to all of `tiles`; those that an edge cuts apart, so that few need a mask."""
        inner = range(*self._block.inner)
        self._take([j for j in tiles if j not in inner])
        self._take([j for j in tiles if j in inner])

    def judge(self, thresholds: Tensor, *, relative: bool, capped: bool) -> Tensor:
        """Go through all tiles in visiting order; which of `block.inner` are kept: bool [H, n].

        thresholds [H] in log2 units; capped: none is above 0.
        """
        block = self._block
        running = Running(self._q) if relative else None
        sinks = range(block.tiles[0], min(block.sink_stop, block.inner[0]))
        self._take([*sinks, *range(block.inner[1], block.tiles[1])], running)
        keep = torch.empty(len(thresholds), block.inner[1] - block.inner[0], dtype=torch.bool)
        stop = block.inner[1]
        while stop > block.inner[0]:
            start = max(block.inner[0], stop - self._at_once)
            s, row_max = self._scores(range(start, stop))
            voting = self._voting(row_max)
            found = voting.amax(dim=2) if running is None else running.statistic(voting)
            if self._split > 1:
                found = found.view(len(keep), self._split, -1).amax(dim=1)
            kept = ~(found < thresholds[:, None])
            keep[:, start - block.inner[0] : stop - block.inner[0]] = kept
            if self._split > 1:
                kept = kept.repeat_interleave(self._split, dim=0)
            if self._keys.v is not None:
                if running is not None and capped and block.votes is None:
                    self._follow(found, running)
                else:
                    top = row_max.masked_fill(~kept[..., None], -math.inf)
                    self._softmax.make_room(top.amax(dim=1, keepdim=True))
                self._softmax.add_kept(s, self._keys.v, start, kept)
            stop = start
        self._take(range(sinks.stop, block.inner[0]))  # the window's lower edge is visited last
        return keep

    def _follow(self, found: Tensor, running: Running) -> None:
        """Make room for tiles of statistic `found` [H, n], thresholds being <= 0.

        Then no dropped tile holds a row's maximum: the running maximum is that of the kept tiles,
        and it rises by no more than the statistic. One small reduction instead of a large one.
        """
        self._rise += max(float(found.amax()), 0.0)
        if not self._rise <= HEADROOM:
            self._rise = self._softmax.make_room(running.maximum)


def _row_split(heads: int, rows: int) -> int:
    """Into how many to split each head's rows, so that torch's threads have equal shares.

    Unequal shares cost twice: threads wait, and since every operation deals the data out anew,
    cores read what another has just written.
    """
    threads = torch.get_num_threads()

    def busy(split: int) -> float:
        rounds = -(-heads * split // threads)
        return heads * split / (rounds * threads)

    fitting = [split for split in (1, 2, 4) if rows % split == 0 and rows // split >= LEAST_ROWS]
    return max(fitting, key=lambda split: (round(busy(split), 1), -split), default=1)


def _pick(x: Tensor, tiles: Sequence[int]) -> Tensor:
    """The tiles [Hkv, n, ...] of x [Hkv, T, ...], copied only if they do not follow each other."""
    if tiles[-1] - tiles[0] + 1 == len(tiles):
        return x[:, tiles[0] : tiles[-1] + 1]
    return x.index_select(1, torch.as_tensor(tiles))
