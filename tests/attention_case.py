"""One call of an attention kernel, whichever test makes it: its shapes, mask and random inputs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bsfa_compile.ops.tiles import Geometry, unpadded_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """The defaults are a small causal GQA prefill with a sink that every query sees."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 600
    k_len: int | None = None
    d: int = 128
    dv: int | None = None
    dtype: torch.dtype = torch.bfloat16
    q_start: int = 0
    on_device: bool = False  # q_start is known to the device only
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: int = 1
    padding: int = 0  # padded keys of batch row b: padding * (b + 1), left if > 0, else right
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            q_len=self.q_len,
            k_len=self.k_len or self.q_start + self.q_len,
            q_start=self.q_start,
            is_causal=self.causal,
            window=self.window,
            sink_tiles=self.sinks,
        )

    def random_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normal q, k, v [B, L, H, D] float32 of the case's seed, the sink not yet planted."""
        torch.manual_seed(self.seed)
        k_len = self.geometry.k_len
        return (
            torch.randn(self.batch, self.q_len, self.heads, self.d),
            torch.randn(self.batch, k_len, self.kv_heads, self.d),
            torch.randn(self.batch, k_len, self.kv_heads, self.dv or self.d),
        )

    def key_padding_mask(self) -> Tensor | None:
        """True where a key counts, [B, Lk]."""
        if not self.padding:
            return None
        k_len = self.geometry.k_len
        mask = torch.ones(self.batch, k_len, dtype=torch.bool)
        for b, row in enumerate(mask):
            n = abs(self.padding) * (b + 1) % k_len
            row[slice(None, n) if self.padding > 0 else slice(k_len - n, None)] = False
        return mask


def free_tiles(g: Geometry, visible: Tensor, padding: Tensor | None) -> Tensor:
    """Of the visible tiles [B, H, q_blocks, k_blocks] those that are not always kept."""
    free = torch.zeros_like(visible)
    bounds = unpadded_tiles(padding, len(visible), g.k_len)
    for b, i, j in visible[:, 0].nonzero().tolist():
        free[b, :, i, j] = not g.always_kept(i, j, *bounds[b])
    return free


def plant_sink(q: Tensor, k: Tensor) -> None:
    """Key 0 scores about +6.4 for every query of q, k [B, L, H, D], at head dim 128."""
    q[..., :8] = 2.0
    k[:, 0, :, :8] = 4.5
