"""What no gate can beat: the tiles with the least softmax mass are dropped, known beforehand.

A tile is dropped if its mass, summed over its query rows, is below one limit for the whole model,
which loses the least mass for so many tiles. It computes every tile's mass first, so it saves
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from bsfa_compile.ops import library, tile_statistics
from bsfa_compile.ops.call import Call
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q, Geometry, pack

_LEAST, _MOST, _BINS = -64.0, 8.0, 1 << 14  # log2 of a tile's mass in rows
_NAME = "bsfa_oracle"


def tile_masses(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Softmax mass [H, q blocks, key tiles] in rows, -1 for tiles that are always kept or hidden.

    q [1, H, L, D], k [1, Hkv, L, D].
    """
    g, heads = call.geometry, q.shape[1]
    ranges = [g.droppable(i) for i in range(g.q_blocks)]
    mass = q.new_full((heads, g.q_blocks, g.k_blocks), -1.0, dtype=torch.float32)
    found = [i for i, (first, stop) in enumerate(ranges) if first < stop]
    if not found:
        return mass
    if tile_statistics.reason(q, k, call) is None:
        rows = found[0], found[-1] + 1
        mass[:, slice(*rows)] = tile_statistics.measure(q, k, call, rows, (0, g.k_blocks))[1]
        return mass
    keys = k.repeat_interleave(heads // k.shape[1], dim=1).float()
    for i in found:
        (row0, row1), (lo, hi), (first, stop) = g.rows(i), g.keys(i), ranges[i]
        s = q[0, :, row0:row1].float() @ keys[0, :, lo:hi].transpose(1, 2) * call.scale
        seen = g.visible(i, q.device)
        s = s if seen is None else s.masked_fill(~seen, -torch.inf)
        at = lo // g.block_k
        ends = (lo - at * g.block_k, -hi % g.block_k)
        by_tile = torch.nn.functional.pad(s.softmax(dim=-1).sum(dim=1), ends)
        tiles = by_tile.unflatten(1, (-1, g.block_k)).sum(dim=2)
        mass[:, i, first:stop] = tiles[:, first - at : stop - at]
    return mass


@functools.lru_cache(maxsize=4)  # the layers of a model ask the same
def _visible(g: Geometry, device: torch.device) -> Tensor:
    """Which tiles the mask leaves: bool [q blocks, key tiles]."""
    seen = torch.zeros(g.q_blocks, g.k_blocks, dtype=torch.bool)
    for i in range(g.q_blocks):
        seen[i, slice(*g.tiles(i))] = True
    return seen.to(device)


class Oracle:
    """The attention of a model: watches masses until `limit` is set, then drops what is below."""

    def __init__(self) -> None:
        self.limit: float | None = None
        self.dropped: Tensor | int = 0
        self._seen: Tensor | int = 0

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """A transformers attention function, for one document without padding."""
        scale = q.shape[3] ** -0.5 if scaling is None else scaling
        g = Geometry(
            q_len=q.shape[2], k_len=k.shape[2], is_causal=True, window=sliding_window, sink_tiles=1
        )
        call = Call(
            geometry=g, q_start_tensor=None, key_padding_mask=None, scale=scale, softcap=None
        )
        mass = tile_masses(q, k, call)
        kept = torch.ones_like(mass, dtype=torch.bool)
        if self.limit is None:
            logs = mass[mass >= 0].log2().clamp(_LEAST, _MOST)
            self._seen = self._seen + torch.histc(logs.float(), _BINS, _LEAST, _MOST).long().cpu()
        else:
            kept = (mass < 0) | (mass >= self.limit)
            self.dropped = self.dropped + (~kept).sum()
        kept &= _visible(g, q.device)
        mask = (None, None, 0, True, sliding_window, None, scale)
        out, _lse = library.attend(q, k, v, pack(kept[None]), *mask, BLOCK_Q, BLOCK_K)
        return out.transpose(1, 2).contiguous(), None

    def solve(self, wanted: float) -> None:
        """Set the limit that drops about so many of the tiles watched; counters start at zero."""
        assert isinstance(self._seen, Tensor), "some data were watched"
        below = int((self._seen.cumsum(0) < wanted).sum())
        self.limit = 2.0 ** (_LEAST + (_MOST - _LEAST) * below / _BINS)
        self.dropped = 0


@contextmanager
def attending(model: Any, watch: Sequence[Callable[[], object]]) -> Iterator[Oracle]:
    """Inside, the model attends by an oracle, which has watched the calls in `watch`."""
    oracle, before = Oracle(), model.config._attn_implementation
    AttentionInterface.register(_NAME, oracle.attend)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    model.set_attn_implementation(_NAME)
    try:
        for call in watch:
            call()
        yield oracle
    finally:
        model.set_attn_implementation(before)
