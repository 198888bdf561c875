"""One batch row of an attention call without its padding, and which of its tiles are candidates."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bsfa_compile.ops.gate import row_votes
from bsfa_compile.ops.tiles import Geometry


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch row without its outer padding: q [1, H, Lq, D], k [1, Hkv, Lk, D].

    mask [1, Lk] on the CPU, None if no padding is left; `geometry` counts positions from the
    first key that is left.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    geometry: Geometry

    @property
    def length(self) -> int:
        """Tokens the last query row can look at."""
        g = self.geometry
        keys = min(g.k_len, g.q_start + g.q_len) if g.is_causal else g.k_len
        return keys if self.mask is None else int(self.mask[0, :keys].sum())


def unpad(q: Tensor, k: Tensor, mask: Tensor | None, geometry: Geometry) -> Sample | None:
    """Cut off keys and rows that are outer padding; None if no query row or key is left.

    mask bool [Lk]. The left end is cut in whole tiles of both axes, so that no tile moves. A
    causal row whose own position is a padded key is padding too; other rows all stay.
    """
    g = geometry
    lo, hi, row0, row1 = 0, g.k_len, 0, g.q_len
    if g.is_causal:
        hi = min(hi, g.q_start + g.q_len)
    if mask is not None:
        keys = mask[:hi].nonzero()[:, 0]
        if len(keys) == 0:
            return None
        first, stop = int(keys[0]), int(keys[-1]) + 1
        if g.is_causal or g.window is None:
            tile = math.lcm(g.block_q, g.block_k)
            lo = first // tile * tile
        if not g.is_causal or g.q_start + g.q_len <= g.k_len:
            hi = stop
            row1 = min(row1, hi - g.q_start) if g.is_causal else row1
        if g.is_causal:
            row0 = max(lo - g.q_start, 0)
    if row0 >= row1 or lo >= hi:
        return None
    kept_mask = None if mask is None or bool(mask[lo:hi].all()) else mask[None, lo:hi]
    start = max(g.q_start - lo, 0) if g.is_causal else g.q_start
    cut = replace(g, q_len=row1 - row0, k_len=hi - lo, q_start=start)
    return Sample(q=q[:, :, row0:row1], k=k[:, :, lo:hi], mask=kept_mask, geometry=cut)


# For each mask row that has a row with a vote: how many it has, and its candidate tiles.
Blocks = tuple[Mapping[int, int], Mapping[int, Sequence[int]]]


@functools.lru_cache(maxsize=16)  # the layers of a model ask the same
def _blocks(g: Geometry) -> Blocks:
    rows = {i: stop - start for i in range(g.q_blocks) for start, stop in [g.rows(i)]}
    rows = {i: count for i, count in rows.items() if count}
    return rows, {i: range(*g.droppable(i)) for i in rows}


def blocks(sample: Sample, bounds: tuple[int, int]) -> Blocks:
    """bounds: the tiles [first, stop) that hold unpadded keys."""
    mask = sample.mask
    return _blocks(sample.geometry) if mask is None else _padded(sample.geometry, mask, bounds)


def _padded(g: Geometry, mask: Tensor, bounds: tuple[int, int]) -> Blocks:
    filled = [bool(part.any()) for part in mask[0].split(g.block_k)]
    rows, columns = {}, {}
    for i, count in _blocks(g)[0].items():
        votes = row_votes(g, i, mask)
        voting = count if votes is None else int(votes.sum())
        if voting:
            rows[i] = voting
            columns[i] = [j for j in range(*g.droppable(i, *bounds)) if filled[j]]
    return rows, columns


def finite(sample: Sample) -> bool:
    """Whether what is not padding is finite: one NaN would dilute what the other samples say."""
    g, q, k, mask = sample.geometry, sample.q, sample.k, sample.mask
    if mask is not None:
        votes = [row_votes(g, i, mask) for i in _blocks(g)[0]]
        if g.is_causal:
            q = q[:, :, torch.cat([own[0] for own in votes if own is not None]).to(q.device)]
        k = k[:, :, mask[0].to(k.device)]
    largest = [torch.linalg.vector_norm(x, torch.inf) for x in (q, k)]  # NaN if one is
    return bool(torch.stack(largest).isfinite().all())
