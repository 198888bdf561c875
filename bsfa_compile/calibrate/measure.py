"""One attention call -> the statistics of its tiles, streamed over heads and q blocks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import GATES
from bsfa_compile.calibrate.sample import Sample, blocks, finite, unpad
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.ops import tile_statistics
from bsfa_compile.ops.call import Call
from bsfa_compile.ops.gate import (
    block_statistic,
    block_visible,
    raw_scores,
    row_votes,
    score_dtype,
    tile_row_max,
)
from bsfa_compile.ops.tiles import Geometry, unpadded_tiles

# Scores held at a time: few enough for the caches of a CPU, enough to keep its threads, or a
# GPU, at work between two launches. One head of one q block is the least.
_SCORES_CPU = 2**23
_SCORES_DEVICE = 2**26
_TILES_DEVICE = 2**22  # tiles whose statistics a kernel writes at a time; 150 bytes each in all


def measure(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    *,
    key_padding_mask: Tensor | None,
    softcap: float | None,
    scale: float,
    into: SiteStatistics,
) -> int:
    """Add every candidate tile of a call to `into`: q [B, H, Lq, D], k [B, Hkv, Lk, D].

    key_padding_mask bool [B, Lk], True for a real key. Each batch row is a sample of its own,
    computed alone and without its padding, so a batch gives exactly the integers its samples
    give one by one (left padding by whole tiles; else its tiles are cut elsewhere). A
    sample with a single query row is a decoding step and is left out. Returns how many samples
    were added.
    """
    mask = None if key_padding_mask is None else key_padding_mask.bool().cpu()
    added = 0
    for b in range(q.shape[0]):
        row = None if mask is None else mask[b if mask.shape[0] > 1 else 0]
        sample = unpad(q[b : b + 1], k[b : b + 1], row, geometry)
        if sample is not None:
            added += _measure_sample(sample, softcap=softcap, scale=scale, into=into)
    return added


def _measure_sample(
    sample: Sample, *, softcap: float | None, scale: float, into: SiteStatistics
) -> bool:
    g, mask = sample.geometry, sample.mask
    bounds = unpadded_tiles(mask, 1, g.k_len, g.block_k)
    rows, columns = blocks(sample, bounds[0])
    if sum(rows.values()) < 2:
        return False
    if not finite(sample):
        into.refused += 1
        return False
    found = {g.first_block + i: len(tiles) for i, tiles in columns.items()}
    voting = {g.first_block + i: count for i, count in rows.items()}
    into.add_sample(length=sample.length, rows=voting, blocks=found)
    columns = {i: tiles for i, tiles in columns.items() if tiles}
    call = _call(sample, softcap=softcap, scale=scale)
    slow = tile_statistics.reason(sample.q, sample.k, call)
    if sample.q.device.type == "cuda" and slow is not None:
        _say_slow(slow)
    if columns and slow is None:
        for first, stop in _runs(columns, sample.q.shape[1] * g.k_blocks):
            found_tiles = [columns[i] for i in range(first, stop) if i in columns]
            span = min(t[0] for t in found_tiles), max(t[-1] for t in found_tiles) + 1
            part = tile_statistics.measure(sample.q, sample.k, call, (first, stop), span)
            into.add_blocks(g.first_block + first, *part)
        return True
    k = sample.k.to(score_dtype(sample.q)).contiguous()
    for i, tiles in columns.items():
        seen = _Visible(g, i, mask, sample.q.device)
        parts = [
            _tiles_of(
                sample.q[:, heads],
                k[:, kv_heads],
                seen,
                bounds=bounds,
                scale=scale,
                softcap=softcap,
            )
            for heads, kv_heads in _head_ranges(sample, seen.scores)
        ]
        index = torch.tensor(tiles, device=sample.q.device) - g.tiles(i)[0]
        statistic = torch.cat([part[0] for part in parts], dim=1)[:, :, index]
        mass = torch.cat([part[1] for part in parts])[:, index]
        into.add_tiles(g.first_block + i, statistic, mass)
    return True


@functools.cache
def _say_slow(reason: str) -> None:
    """Once for each reason."""
    warnings.warn(f"calibration is slow, without its CUDA kernel: {reason}", stacklevel=2)


def _call(sample: Sample, *, softcap: float | None, scale: float) -> Call:
    return Call(
        geometry=sample.geometry,
        q_start_tensor=None,
        key_padding_mask=None if sample.mask is None else sample.mask.to(sample.q.device),
        scale=scale,
        softcap=softcap,
    )


def _runs(columns: Mapping[int, Sequence[int]], tiles_per_row: int) -> Iterator[tuple[int, int]]:
    """The mask rows of `columns` in runs [first, stop) of at most `_TILES_DEVICE` tiles."""
    first, last, step = min(columns), max(columns), max(1, _TILES_DEVICE // tiles_per_row)
    for start in range(first, last + 1, step):
        stop = min(start + step, last + 1)
        if any(i in columns for i in range(start, stop)):
            yield start, stop


def _head_ranges(sample: Sample, scores_per_head: int) -> Iterator[tuple[slice, slice]]:
    """Ranges (q heads, kv heads) whose scores of one q block fit the budget."""
    heads, kv_heads = sample.q.shape[1], sample.k.shape[1]
    group = heads // kv_heads
    budget = _SCORES_CPU if sample.q.device.type == "cpu" else _SCORES_DEVICE
    fit = max(1, budget // max(1, scores_per_head))
    step = fit // group * group if fit >= group else fit
    for kv in range(0, kv_heads, max(1, step // group)):
        stop = min(kv_heads, kv + max(1, step // group))
        for h in range(kv * group, stop * group, step):
            yield slice(h, min(h + step, stop * group)), slice(kv, stop)


class _Visible:
    """What the mask hides of mask row `i`, built once for all heads: few columns, most often."""

    def __init__(self, g: Geometry, i: int, mask: Tensor | None, device: torch.device) -> None:
        self.geometry, self.i = g, i
        self.first, stop = (tile * g.block_k for tile in g.tiles(i))
        row0, row1 = g.rows(i)
        self.rows = slice(row0, row1)
        self.keys = slice(self.first, min(stop, g.k_len))
        self.missing = stop - self.keys.stop  # columns past the last key
        self.scores = (row1 - row0) * (stop - self.first)
        on_device = torch.ones(1, g.k_len, dtype=torch.bool) if mask is None else mask
        hidden = ~block_visible(g, i, on_device.to(device))
        columns = hidden.flatten(0, -2).any(dim=0).nonzero()[:, 0]
        first, last = (int(columns[0]), int(columns[-1])) if len(columns) else (0, -1)
        self.columns = slice(first, last + 1)
        self.hidden = hidden[:, None, :, self.columns]
        votes = row_votes(g, i, mask)
        self.votes = None if votes is None else votes.to(device)


def _tiles_of(
    q: Tensor,
    k: Tensor,
    seen: _Visible,
    *,
    bounds: list[tuple[int, int]],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Statistics [2, H, T] (axis 0: `GATES`) and softmax mass [H, T] of the tiles of a block."""
    g = seen.geometry
    s = raw_scores(q[:, :, seen.rows], k[:, :, seen.keys], scale, softcap)
    if seen.missing:
        s = torch.nn.functional.pad(s, (0, seen.missing))
    s[..., seen.columns].masked_fill_(seen.hidden, -torch.inf)
    row_max = tile_row_max(s, g.block_k)
    statistic = [
        block_statistic(row_max, g, seen.i, gate=gate, bounds=bounds, votes=seen.votes)
        for gate in GATES
    ]
    return torch.cat(statistic), _tile_mass(s, row_max, g, seen.votes)


def _tile_mass(s: Tensor, row_max: Tensor, g: Geometry, votes: Tensor | None) -> Tensor:
    """Softmax mass [H, T] of each tile, summed over the rows that vote. Overwrites `s`.

    s [1, H, R, T * block_k], row_max [1, H, R, T]; a row whose scores hold a NaN counts as lost
    in every tile, so that no threshold is built on it.
    """
    if votes is not None:
        s.masked_fill_(~votes[:, None, :, None], -torch.inf)
        row_max = row_max.masked_fill(~votes[:, None, :, None], -torch.inf)
    peak = row_max.amax(dim=3, keepdim=True)
    weights = s.sub_(peak.masked_fill(peak == -torch.inf, 0.0)).exp_()
    total = weights.sum(dim=3)
    share = total.reciprocal().masked_fill_(total == 0, 0.0)
    columns: Tensor = (share[:, :, None] @ weights)[0, :, 0]
    mass = columns.unflatten(1, (-1, g.block_k)).sum(dim=2)
    lost: Tensor = mass.nan_to_num(nan=float(s.shape[2]))
    return lost
