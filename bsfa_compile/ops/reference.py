"""The oracle: block-sparse attention written as it is defined, in plain loops. Read this first.

Slow and quadratic in memory on purpose. Kernels and the CPU path are tested against it. Scores,
statistics and thresholds are scaled logits in natural-log units. Works in the dtype it is given;
pass float64 for the exact answer.

Shapes: q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv], H a multiple of Hkv.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bsfa_compile.ops.tiles import Geometry, unpadded_tiles

INT8_MARGIN = 3.0  # standard deviations of each of the two rounding errors, see `int8_scores`


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """All scores [B, H, Lq, Lk]: scale * q.k, softcapped if asked."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = (q @ k.transpose(-1, -2)) * scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def visibility(geometry: Geometry, key_padding_mask: Tensor | None, batch: int) -> Tensor:
    """Which scores the mask leaves: bool [B, Lq, Lk]."""
    p = geometry.q_start + torch.arange(geometry.q_len)[:, None]
    key = torch.arange(geometry.k_len)[None, :]
    seen = torch.ones(geometry.q_len, geometry.k_len, dtype=torch.bool)
    if geometry.is_causal:
        seen &= key <= p
    if geometry.window is not None:
        seen &= key > p - geometry.window
        if not geometry.is_causal:
            seen &= key < p + geometry.window
    seen = seen.expand(batch, -1, -1)
    return seen if key_padding_mask is None else seen & key_padding_mask[:, None, :]


def padding_rows(geometry: Geometry, key_padding_mask: Tensor | None, batch: int) -> Tensor:
    """Query rows that are padding themselves and so have no vote: bool [B, Lq].

    Known only for causal attention, where query and key positions are the same axis.
    """
    rows = torch.zeros(batch, geometry.q_len, dtype=torch.bool)
    if key_padding_mask is None or not geometry.is_causal:
        return rows
    positions = geometry.q_start + torch.arange(geometry.q_len)
    known = positions < geometry.k_len
    rows[:, known] = ~key_padding_mask[:, positions[known]]
    return rows


def visiting_order(tiles: list[int], first_tile: int, sink_tiles: int) -> list[int]:
    """Sink tiles first, then from the last visible tile downwards."""
    sinks = [j for j in tiles if j < first_tile + sink_tiles]
    return sinks + [j for j in reversed(tiles) if j >= first_tile + sink_tiles]


def tile_statistics(
    s: Tensor,
    seen: Tensor,
    votes: Tensor,
    order: list[int],
    block_k: int,
    gate: str,
    margin: Tensor | None = None,
) -> dict[int, float]:
    """Statistic of each tile of one (batch, head, q block), in visiting order.

    s, seen [rows, Lk]; votes [rows]; margin [rows, k_blocks]: what quantisation may have taken
    from the statistic (0 in exact precision). Relative: max over rows of (row max in the tile -
    running row max before it). Absolute: max of the tile's visible scores. NaN marks a NaN.
    """
    hidden = s.masked_fill(~(seen & votes[:, None]), -math.inf)
    running = hidden.new_full(hidden.shape[:1], -math.inf)
    out: dict[int, float] = {}
    for j in order:
        tile = hidden[:, j * block_k : (j + 1) * block_k]
        row_max = tile.amax(dim=1)
        value = row_max - running if gate == "relative" else row_max
        value = torch.where(row_max == -math.inf, -math.inf, value)
        if margin is not None:
            value = value + margin[:, j]
        out[j] = float(value.amax())
        running = torch.maximum(running, row_max)
    return out


def tile_mask(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    geometry: Geometry,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    gate: str = "relative",
    precision: str = "exact",
) -> Tensor:
    """The decision: bool [B, H, q_blocks, k_blocks], True where a visible tile is kept.

    thresholds [H, n]: column of q block i (absolute), the last one past the end.
    """
    batch, heads = q.shape[:2]
    g = geometry
    if precision == "int8":
        s, margin = int8_scores(q, k, scale, g, add_mean=gate == "absolute" or softcap is not None)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
    else:
        s, margin = scores(q, k, scale, softcap), None
    seen = visibility(g, key_padding_mask, batch)
    votes = ~padding_rows(g, key_padding_mask, batch)
    bounds = unpadded_tiles(key_padding_mask, batch, g.k_len, g.block_k)
    kept = torch.zeros(batch, heads, g.q_blocks, g.k_blocks, dtype=torch.bool)
    for i in range(g.q_blocks):
        row0, row1 = g.rows(i)
        column = min(g.first_block + i, thresholds.shape[1] - 1)
        for b in range(batch):
            block_seen = seen[b, row0:row1]
            visible = [
                j
                for j in range(*g.tiles(i))
                if block_seen[:, j * g.block_k : (j + 1) * g.block_k].any()
            ]
            order = visiting_order(visible, bounds[b][0], g.sink_tiles)
            for h in range(heads):
                statistic = tile_statistics(
                    s[b, h, row0:row1],
                    block_seen,
                    votes[b, row0:row1],
                    order,
                    g.block_k,
                    gate,
                    None if margin is None else margin[b, h, row0:row1],
                )
                threshold = float(thresholds[h, column])
                for j in visible:
                    kept[b, h, i, j] = g.always_kept(i, j, *bounds[b]) or not (
                        statistic[j] < threshold
                    )
    return kept


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    geometry: Geometry,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention over the kept tiles: (out [B, H, Lq, Dv], lse [B, H, Lq]).

    A row that sees nothing gives 0 and -inf. Skipped tiles leave numerator and denominator.
    sinks [H]: logits of one more column per head, without a value, that no gate looks at: it is
    in every row's denominator and so in lse.
    """
    g = geometry
    row_block = (g.q_start + torch.arange(g.q_len)) // g.block_q - g.first_block
    key_block = torch.arange(g.k_len) // g.block_k
    allowed = kept[:, :, row_block][:, :, :, key_block]
    allowed = allowed & visibility(g, key_padding_mask, q.shape[0])[:, None]
    s = scores(q, k, scale, softcap).masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(s, dim=-1) if g.k_len else s.new_full(s.shape[:-1], -math.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return p @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), lse


def int8_scores(
    q: Tensor, k: Tensor, scale: float, geometry: Geometry, *, add_mean: bool
) -> tuple[Tensor, Tensor]:
    """Scores from int8 q and k, and the margin by which they may be wrong.

    K loses its mean over keys per (batch, kv head): in the relative gate it cancels, else
    q.mean(K) is added back. Each channel of what is left is divided by its root mean square over
    keys to the power 3/4, and Q multiplied by it: else channels much larger than the others, which
    RoPE turns so that they are not in the mean, would make the steps coarse. Then one scale per
    query row and one per key tile (absmax / 127).
    Returns scores [B, H, Lq, Lk] and margin [B, H, Lq, k_blocks]: INT8_MARGIN standard deviations
    of what rounding Q and of what rounding K does, (sq |k| + sk |q|) * scale / sqrt(12), |k| the
    largest norm in the tile. Added up they are 3 to 4.2 standard deviations of both together.
    """
    g = geometry
    groups = q.shape[1] // k.shape[1]
    mean = k.mean(dim=2, keepdim=True)
    centred = k - mean
    fourth_root = centred.square().mean(dim=2, keepdim=True).sqrt().sqrt()
    spread = fourth_root * fourth_root.sqrt()
    centred = centred * torch.where(spread == 0, 0.0, 1 / spread)
    raw, q = q, q * spread.repeat_interleave(groups, dim=1)
    tail = g.k_blocks * g.block_k - g.k_len
    tiled = torch.nn.functional.pad(centred, (0, 0, 0, tail)).unflatten(2, (-1, g.block_k))
    tiny = torch.finfo(torch.float32).tiny
    sk = (tiled.abs().amax(dim=(3, 4)) / 127).clamp_min(tiny)
    sq = (q.abs().amax(dim=3) / 127).clamp_min(tiny)
    k8 = (tiled / sk[..., None, None]).round().flatten(2, 3)[:, :, : g.k_len]
    q8 = (q / sq[..., None]).round()
    k_norm = tiled.norm(dim=4).amax(dim=3).repeat_interleave(groups, dim=1)
    sk = sk.repeat_interleave(groups, dim=1)
    per_key = sk.repeat_interleave(g.block_k, dim=2)[:, :, None, : g.k_len]
    s = (q8 @ k8.repeat_interleave(groups, 1).transpose(-1, -2)) * sq[..., None] * per_key * scale
    if add_mean:
        s = s + (raw @ mean.repeat_interleave(groups, 1).transpose(-1, -2)) * scale
    error = sq[..., None] * k_norm[:, :, None] + sk[:, :, None] * q.norm(dim=3)[..., None]
    return s, error * (INT8_MARGIN * scale / math.sqrt(12))
