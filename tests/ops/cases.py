"""Random attention calls with small tiles, and thresholds that are sure to drop some of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.ops import library, reference
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.tiles import Geometry, unpack, unpadded_tiles

GAP = 1e-3  # thresholds keep this distance from every statistic, so that rounding decides nothing


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call; tensors follow from the seed."""

    batch: int = 1
    kv_heads: int = 1
    groups: int = 2
    geometry: Geometry
    head_dim: int = 8
    value_dim: int = 8
    padding: float | None = None  # fraction of keys that are real, None for no mask
    softcap: float | None = None
    rule: str = "relative"
    peak: float = 3.0  # q is so many times normal: peaky scores, so that tiles differ
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def qkv(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]."""
        random = torch.Generator().manual_seed(self.seed)
        g = self.geometry

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        q = self.peak * normal(self.batch, self.heads, g.q_len, self.head_dim)
        k = normal(self.batch, self.kv_heads, g.k_len, self.head_dim)
        v = normal(self.batch, self.kv_heads, g.k_len, self.value_dim)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def key_padding_mask(self) -> Tensor | None:
        """bool [B, Lk] with holes anywhere."""
        if self.padding is None:
            return None
        random = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.geometry.k_len, generator=random) < self.padding

    def call(self) -> Call:
        """What the implementations are given."""
        return Call(
            geometry=self.geometry,
            q_start_tensor=None,
            key_padding_mask=self.key_padding_mask(),
            scale=self.scale,
            softcap=self.softcap,
        )

    def gate(self, thresholds: Tensor, precision: str = "exact") -> Gate:
        return Gate(thresholds=thresholds, rule=self.rule, precision=precision)

    def mask_arguments(self) -> tuple[object, ...]:
        """The operators' arguments key_padding_mask ... scale."""
        g = self.geometry
        padding = self.key_padding_mask()
        return padding, None, g.q_start, g.is_causal, g.window, self.softcap, self.scale

    def statistics(self, q: Tensor, k: Tensor) -> dict[tuple[int, int, int, int], float]:
        """The reference's statistic of every droppable tile (b, h, i, j)."""
        g, padding = self.geometry, self.key_padding_mask()
        s = reference.scores(q.double(), k.double(), self.scale, self.softcap)
        seen = reference.visibility(g, padding, self.batch)
        votes = ~reference.padding_rows(g, padding, self.batch)
        bounds = unpadded_tiles(padding, self.batch, g.k_len, g.block_k)
        found = {}
        for i, b in itertools.product(range(g.q_blocks), range(self.batch)):
            rows = slice(*g.rows(i))
            tiles = [
                j
                for j in range(*g.tiles(i))
                if seen[b, rows, j * g.block_k : (j + 1) * g.block_k].any()
            ]
            order = reference.visiting_order(tiles, bounds[b][0], g.sink_tiles)
            for h in range(self.heads):
                values = reference.tile_statistics(
                    s[b, h, rows], seen[b, rows], votes[b, rows], order, g.block_k, self.rule
                )
                for j in tiles:
                    if not g.always_kept(i, j, *bounds[b]):
                        found[b, h, i, j] = values[j]
        return found

    def thresholds(self, q: Tensor, k: Tensor, share: float = 0.5) -> Tensor | None:
        """Thresholds [H] that drop about `share` of each head's droppable tiles; None if they
        cannot drop any tile."""
        found = self.statistics(q, k)
        chosen = torch.full((self.heads,), -torch.inf)
        for h in range(self.heads):
            own = sorted(x for (_, head, _, _), x in found.items() if head == h)
            pairs = [
                (low, high)
                for low, high in itertools.pairwise([*own, own[-1] + 1.0] if own else [])
                if high - low > 2 * GAP
            ]
            if pairs:
                low, high = pairs[min(int(share * len(pairs)), len(pairs) - 1)]
                chosen[h] = min(high, 1.0) - 1.0 if low == -torch.inf else (low + high) / 2
        return None if (chosen == -torch.inf).all() else chosen

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The oracle in float64: (out, lse, kept)."""
        kept = self.tile_mask(q.double(), k.double(), thresholds.double())
        out, lse = self.attend(q, k, v, kept)
        return out, lse, kept

    def tile_mask(
        self, q: Tensor, k: Tensor, thresholds: Tensor, precision: str = "exact"
    ) -> Tensor:
        """The oracle's decision: bool [B, H, q_blocks, k_blocks]."""
        return reference.tile_mask(
            q,
            k,
            thresholds.reshape(self.heads, -1),
            self.geometry,
            key_padding_mask=self.key_padding_mask(),
            scale=self.scale,
            softcap=self.softcap,
            gate=self.rule,
            precision=precision,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The oracle over given tiles, in float64."""
        return reference.attention(
            q.double(),
            k.double(),
            v.double(),
            kept,
            self.geometry,
            key_padding_mask=self.key_padding_mask(),
            scale=self.scale,
            softcap=self.softcap,
        )

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        thresholds: Tensor | None,
        *,
        precision: str = "exact",
        dense_if_faster: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operator: (out, lse, kept bool, counts)."""
        g = self.geometry
        config = (self.rule, precision, g.sink_tiles, g.block_q, g.block_k, dense_if_faster)
        out, lse, words, counts = library.attention(
            q, k, v, thresholds, *self.mask_arguments(), *config
        )
        return out, lse, unpack(words, g.k_blocks), counts

    def moved(self, **changes: Any) -> Case:
        """The same case with another geometry."""
        return replace(self, geometry=replace(self.geometry, **changes))


@st.composite
def geometries(draw: st.DrawFn, max_q: int = 40, max_k: int = 56) -> Geometry:
    """Small calls: no multiple of a tile, chunks in the middle of a sequence, keys past the end."""
    q_len, k_len = draw(st.integers(1, max_q)), draw(st.integers(1, max_k))
    return Geometry(
        q_len=q_len,
        k_len=k_len,
        q_start=draw(st.sampled_from([0, 0, 3, 16, k_len])),
        is_causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, None, 1, 13, 15, 30])),
        sink_tiles=draw(st.sampled_from([0, 1, 1, 2])),
        block_q=draw(st.sampled_from([8, 8, 16, 6])),
        block_k=draw(st.sampled_from([4, 4, 8, 3, 1])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any call that the operator takes."""
    return Case(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        geometry=draw(geometries()),
        value_dim=draw(st.sampled_from([4, 8, 12])),
        padding=draw(st.sampled_from([None, None, 0.9, 0.5, 0.1])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        rule=draw(st.sampled_from(["relative", "relative", "absolute"])),
        peak=draw(st.sampled_from([1.0, 4.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_close(out: Tensor, wanted: Tensor, limit: float = 1e-5) -> None:
    """Equal to `limit`, relative to values of the size of the wanted ones; -inf equals -inf."""
    finite = torch.where(wanted.isfinite(), wanted, 0.0)
    size = max(1.0, float(finite.abs().amax()) if finite.numel() else 1.0)
    torch.testing.assert_close(out.double(), wanted.double(), atol=limit * size, rtol=0.0)
