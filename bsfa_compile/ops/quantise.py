"""The int8 gate's scores, emulated with floats that hold integers. See `reference.int8_scores`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops.reference import INT8_MARGIN


@dataclass(frozen=True, kw_only=True)
class QuantisedKeys:
    """K less its mean, over `spread`, rounded to int8 with one scale per tile of each kv head."""

    values: Tensor  # [B, Hkv, T * block_k, D], whole numbers
    scales: Tensor  # [B, Hkv, T]
    norms: Tensor  # [B, Hkv, T], largest norm of a key in the tile
    mean: Tensor  # [B, Hkv, 1, D], over keys
    spread: Tensor  # [B, Hkv, 1, D], of keys in each channel: Q is multiplied by it


def quantise_keys(k: Tensor, block_k: int, dtype: torch.dtype) -> QuantisedKeys:
    """Quantise k [B, Hkv, Lk, D]; the last tile is filled up with zeros."""
    k = k.to(dtype)
    batch, heads, keys, dim = k.shape
    tiles = -(-keys // block_k)
    mean = k.mean(dim=2, keepdim=True)
    k = k - mean
    fourth_root = k.square().mean(dim=2, keepdim=True).sqrt().sqrt()
    spread = fourth_root * fourth_root.sqrt()
    k = k * torch.where(spread == 0, 0.0, 1 / spread)
    tiled = F.pad(k, (0, 0, 0, tiles * block_k - keys))
    tiled = tiled.view(batch, heads, tiles, block_k, dim)
    scales = (tiled.abs().amax(dim=(3, 4)) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return QuantisedKeys(
        values=(tiled / scales[..., None, None]).round().flatten(2, 3),
        scales=scales,
        norms=tiled.norm(dim=4).amax(dim=3),
        mean=mean,
        spread=spread,
    )


def int8_block_scores(
    q: Tensor, keys: QuantisedKeys, tiles: tuple[int, int], scale: float, *, adds_mean: bool
) -> tuple[Tensor, Tensor]:
    """Unmasked scores [B, H, R, T * block_k] of q [B, H, R, D] in `tiles`, margin [B, H, R, T]."""
    batch, heads, rows, _ = q.shape
    raw = q.to(keys.values.dtype)
    q = raw * keys.spread.repeat_interleave(heads // keys.spread.shape[1], dim=1)
    kv_heads, cut = keys.values.shape[1], slice(*tiles)
    block_k = keys.values.shape[2] // keys.scales.shape[2]
    sq = (q.abs().amax(dim=3, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    sk = keys.scales[:, :, None, cut]
    values = keys.values[:, :, tiles[0] * block_k : tiles[1] * block_k]
    s = grouped((q / sq).round()) @ values.transpose(-1, -2)
    s = s * grouped(sq) * sk.repeat_interleave(block_k, dim=3) * scale
    if adds_mean:
        s = s + (grouped(raw) @ keys.mean.transpose(-1, -2)) * scale
    norm = q.norm(dim=3, keepdim=True)
    error = grouped(sq) * keys.norms[:, :, None, cut] + sk * grouped(norm)
    margin = error * (INT8_MARGIN * scale / math.sqrt(12))
    shape = (batch, heads, rows, -1)
    return s.view(shape), margin.view(shape)
