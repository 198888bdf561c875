"""The gate: scores of one q block -> statistic per tile -> which tiles are kept.

Used by the CPU path, by every device without a kernel and by the observer, so that all of them
share one definition with the reference. Scores, statistics and thresholds are scaled logits in
natural-log units. Mask row `i` is the absolute q block `g.first_block + i`; T counts the tiles of
`g.tiles(i)` and R the query rows of `g.rows(i)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops.tiles import Geometry

Bounds = Sequence[tuple[int, int]] | Tensor  # per batch row, tiles [first, stop): unpadded_tiles()


def score_dtype(q: Tensor) -> torch.dtype:
    """The dtype scores are computed in: float32, or float64 if q is."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def raw_scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Unmasked scores [B, H, R, C] of q [B, H, R, D] and k [B, Hkv, C, D], without repeating k."""
    batch, heads, rows, dim = q.shape
    dtype = score_dtype(q)
    grouped = q.to(dtype).reshape(batch, k.shape[1], -1, dim)  # a kv head's q heads side by side
    s = (grouped @ k.to(dtype).transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        s = s.div_(softcap).tanh_().mul_(softcap)
    return s.view(batch, heads, rows, k.shape[2])


def block_visible(g: Geometry, i: int, key_padding_mask: Tensor | None) -> Tensor:
    """What the whole mask leaves of mask row `i`: bool [B or 1, R or 1, T * block_k]."""
    (row0, row1), (lo, hi), (tile0, tile1) = g.rows(i), g.keys(i), g.tiles(i)
    first, stop = tile0 * g.block_k, tile1 * g.block_k
    device = None if key_padding_mask is None else key_padding_mask.device
    seen = g.visible(i, device) if row0 < row1 and lo < hi else None
    if seen is None:
        seen = torch.ones(1, hi - lo, dtype=torch.bool, device=device)
    if key_padding_mask is None:
        return F.pad(seen, (lo - first, stop - hi))[None]
    return F.pad(seen[None] & key_padding_mask[:, None, lo:hi], (lo - first, stop - hi))


def block_scores(
    q: Tensor,
    k: Tensor,
    g: Geometry,
    i: int,
    *,
    key_padding_mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Scores of mask row `i`: float32 (float64 if q is) [B, H, R, T * block_k].

    The first column is key `g.tiles(i)[0] * g.block_k`; -inf where the mask hides the score.
    """
    (row0, row1), (tile0, tile1) = g.rows(i), g.tiles(i)
    first, stop = tile0 * g.block_k, tile1 * g.block_k
    s = raw_scores(q[:, :, row0:row1], k[:, :, first:stop], scale, softcap)
    seen = block_visible(g, i, key_padding_mask).to(s.device)
    s = F.pad(s, (0, stop - first - s.shape[-1]))
    return s.masked_fill(~seen[:, None], -math.inf)


def tile_row_max(s: Tensor, block_k: int) -> Tensor:
    """Maximum of each row in each tile: [B, H, R, T * block_k] -> [B, H, R, T]. Keeps NaN."""
    return s.view(*s.shape[:-1], s.shape[-1] // block_k, block_k).amax(dim=-1)


def row_votes(g: Geometry, i: int, key_padding_mask: Tensor | None) -> Tensor | None:
    """Which rows of mask row `i` have a say: bool [B, R], None for all.

    A causal row whose own position is a padded key is padding itself.
    """
    if key_padding_mask is None or not g.is_causal:
        return None
    row0, row1 = g.rows(i)
    first, stop = (min(g.q_start + row, g.k_len) for row in (row0, row1))
    own = key_padding_mask[:, first:stop]
    return F.pad(own, (0, row1 - row0 - own.shape[1]), value=True)


def block_statistic(
    row_max: Tensor,
    g: Geometry,
    i: int,
    *,
    gate: str,
    bounds: Bounds,
    votes: Tensor | None,
    margin: Tensor | None = None,
) -> Tensor:
    """Statistic [B, H, T] of the tiles of mask row `i`, from each row's maximum [B, H, R, T].

    Relative: max over rows of (row max in the tile - running row max before it), tiles visited
    sink first, then from the last downwards. Absolute: max over rows. Rows without a vote and
    hidden scores (-inf) count for nothing; a NaN marks its tile. margin [B, H, R, T] is added to
    each row's value: what a quantised score may have lost.
    """
    sinks = sink_tiles(g, i, bounds, row_max.device) if gate == "relative" else None
    return statistic(row_max, sinks, votes=votes, margin=margin)


def statistic(
    row_max: Tensor, sinks: Tensor | None, *, votes: Tensor | None, margin: Tensor | None
) -> Tensor:
    """`block_statistic` with the sink tiles [B, T] given; None for the absolute gate."""
    if row_max.shape[2] == 0 or row_max.shape[3] == 0:
        return row_max.new_full((*row_max.shape[:2], row_max.shape[3]), -math.inf)
    if votes is not None:
        row_max = row_max.masked_fill(~votes[:, None, :, None], -math.inf)
    value = row_max
    if sinks is not None:
        value = torch.where(
            row_max == -math.inf, -math.inf, row_max - running_before(row_max, sinks)
        )
    if margin is not None:
        value = value + margin
    return value.amax(dim=2)


def running_before(row_max: Tensor, sinks: Tensor) -> Tensor:
    """Running maximum of each row before each tile, [B, H, R, T], in visiting order.

    sinks [B, T] marks the tiles visited first, upwards; the others follow downwards.
    """
    sinks = sinks[:, None, None]
    of_sinks = row_max.masked_fill(~sinks, -math.inf)
    below = F.pad(of_sinks[..., :-1].cummax(dim=-1).values, (1, 0), value=-math.inf)
    above = row_max[..., 1:].flip(-1).cummax(dim=-1).values.flip(-1)
    above = F.pad(above, (0, 1), value=-math.inf)
    return torch.where(sinks, below, torch.maximum(above, of_sinks.amax(dim=-1, keepdim=True)))


def sink_tiles(g: Geometry, i: int, bounds: Bounds, device: torch.device | None = None) -> Tensor:
    """Which tiles of mask row `i` are sinks: bool [B, T]."""
    first = torch.as_tensor(bounds, device=device).reshape(-1, 2)[:, :1]
    return torch.arange(*g.tiles(i), device=device) < first + g.sink_tiles


def candidates(
    g: Geometry, i: int, bounds: Bounds, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the tiles of mask row `i`: (visible bool [B, T], droppable bool [B, T]).

    Droppable: visible and not always kept (see `Geometry.always_kept`, here over all tiles).
    """
    device = None if key_padding_mask is None else key_padding_mask.device
    limits = torch.as_tensor(bounds, device=device).reshape(-1, 2)
    (lo, hi), (tile0, tile1) = g.keys(i), g.tiles(i)
    j = torch.arange(tile0, tile1, device=device)
    if key_padding_mask is None:
        visible = torch.ones(len(limits), tile1 - tile0, dtype=torch.bool, device=device)
    else:
        edges = (lo - tile0 * g.block_k, tile1 * g.block_k - hi)
        visible = F.pad(key_padding_mask[:, lo:hi], edges).unflatten(-1, (-1, g.block_k)).any(-1)
    low = (g.first_block + i) * g.block_q
    return visible, visible & ~always_kept(g, low, j, tile1, limits)


def always_kept(
    g: Geometry, low: int | Tensor, j: Tensor, stop: int | Tensor, limits: Tensor
) -> Tensor:
    """`Geometry.always_kept` for tiles j [T] of the q block from absolute position `low`: [B, T].

    `stop`: one past the last tile causality and window leave; limits [B, 2]: unpadded tiles.
    `low` and `stop` may be known on the device alone, and be [rows, 1] with limits [B, 1, 2] for
    the tiles of many q blocks at once: [B, rows, T].
    """
    high = low + g.block_q - 1
    key_low, key_high = j * g.block_k, ((j + 1) * g.block_k).clamp_max(g.k_len) - 1
    last = limits[..., 1:].clamp_max(stop) - 1
    kept = (j < limits[..., :1] + g.sink_tiles) | (j == last)
    if g.is_causal:
        kept = kept | (key_high > low)
    if g.window is not None:
        kept = kept | (key_low <= high - g.window)
        if not g.is_causal:
            kept = kept | (key_high >= low + g.window)
    return kept


def threshold_column(thresholds: Tensor, g: Geometry, i: int) -> Tensor:
    """Thresholds [H] of mask row `i` out of [H] or [H, n]; past the last entry the last holds."""
    if thresholds.dim() == 1:
        return thresholds
    return thresholds[:, min(g.first_block + i, thresholds.shape[1] - 1)]


def kept_tiles(statistic: Tensor, column: Tensor, visible: Tensor, droppable: Tensor) -> Tensor:
    """The decision for one mask row: bool [B, H, T]. `not (x < t)`: a NaN keeps its tile."""
    below = statistic < column[:, None]
    return visible[:, None] & ~(droppable[:, None] & below)
