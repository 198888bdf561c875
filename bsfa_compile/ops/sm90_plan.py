"""What a call on Hopper needs that follows from its shapes: kernels, grids, sizes, offsets.

Parameters of the kernels are packed here, in the order of the structs in `cuda/sm90/*.cu`.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bsfa_compile.ops import kernels_sm90 as built
from bsfa_compile.ops.driver import Stage, load
from bsfa_compile.ops.tensor_map import BFLOAT16, FLOAT16, UINT8, Tiling
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q, mask_rows, mask_words

ARCH = "sm_90a"
MOST_KEYS = 0x7FFF * BLOCK_K  # the step word of attend.cu has 15 bits a tile
MOST_POSITIONS = 2**29
MARKS = 256  # where in the workspace lie the masks of what int8 leaves undecided
_MOST_LISTED = 2**24  # rows of 16 keys that int8 may leave undecided; what is beyond is marked
# Bytes that CTAs work on at a time: what the L2 cache holds, since CTAs whose lists differ drift
# apart along K.
_GATE_SHARE, _ATTEND_SHARE = 20 * 2**20, 34 * 2**20

# Parameters of the kernels: formats of their structs, see `driver.Stage`.
_MAP = "128s"
_SHAPE_TAIL = struct.Struct("<6i")
_SHAPE = "3Qq24s"  # Shape in cuda/include/spans.cuh
_KEYS_TAIL = struct.Struct("<3q4i")
_KEYS = "Q40s"  # Keys of quantise.cu
_ZEROS = "3Q3q"  # Zeros of quantise.cu
_GATE = _SHAPE + "2i8Qi4xQ5i2f4x"  # Params of gate.cu
_RESOLVE = _SHAPE + "2iQ3qQ3q4Qi4x3Q4i2f"  # Params of resolve.cu
_ATTEND = _SHAPE + "2i5Q3i2f4x"  # Params of attend.cu


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _contiguous(*shape: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides)."""
    return shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Key(NamedTuple):
    """What a plan follows from. A named tuple: it is hashed at every call."""

    device: int
    q_dtype: torch.dtype
    k_dtype: torch.dtype
    v_dtype: torch.dtype | None  # None: the gate alone; the other two are then k's
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    block_q: int
    block_k: int
    causal: bool
    window: int  # -1: none
    padded: bool
    softcap: float  # 0: none
    sink_tiles: int
    scale: float
    rule: str | None  # of the gate, if there is one
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Gating:
    """The kernels that decide, in their order."""

    sum_keys: Stage
    quantise: Stage
    gate: Stage
    resolve: Stage | None  # exact decisions
    tally: Stage


def _rows(kind: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int) -> Tiling:
    """q, k or v [B, H, L, D], of which a copy moves `rows` rows of 64 columns."""
    (batch, heads, length, width), (sb, sh, sl, _) = shape, strides
    shape_ = (width, length, heads, batch)
    return Tiling(dtype=kind, shape=shape_, strides=(sl, sh, sb), box=(64, rows))


class Plan:
    """Kernels are loaded when first asked for; the rest is arithmetic."""

    def __init__(self, key: Key) -> None:
        self.batch, self.heads, q_len, self.d = key.q_shape
        _, self.kv_heads, k_len, _ = key.k_shape
        self.device, self.dv = key.device, key.v_shape[3]
        self.relative, self.exact = key.rule == "relative", key.exact
        self.mask = built.Mask(
            causal=key.causal, window=key.window >= 0, padded=key.padded, softcap=key.softcap > 0
        )
        self.dtype, self.bf16 = key.q_dtype, key.q_dtype == torch.bfloat16
        self.rows, words = mask_rows(q_len), mask_words(k_len)
        self.kv_total = self.batch * self.kv_heads
        self.k_len, self.row = k_len, built.row_bytes(self.d)
        # Shapes and strides of what a call writes.
        self.tiles = _contiguous(self.batch, self.heads, self.rows, words)
        self.counts = _contiguous(self.heads, 2)
        self.lse = _contiguous(self.batch, self.heads, q_len)
        row = self.heads * self.dv
        self.out = (self.batch, self.heads, q_len, self.dv), (q_len * row, self.dv, row, 1)
        window = min(max(key.window, 0), MOST_POSITIONS)
        sink_tiles = min(key.sink_tiles, MOST_POSITIONS)
        self.shape = _SHAPE_TAIL.pack(q_len, k_len, window, sink_tiles, self.rows, words)

        chunk = built.sum_chunk(k_len)
        self.chunks, self.groups = -(-k_len // chunk), -(-k_len // built.GROUP_KEYS)
        self.keys = _KEYS_TAIL.pack(*key.k_strides[:3], self.kv_heads, k_len, chunk, self.chunks)
        mask_size = self.batch * self.heads * self.rows * words
        # Workspace: counters (work of gate, attention, resolve; what is listed), at MARKS masks of
        # what int8 leaves undecided; K as int8, its metadata, its mean and spread, their partial
        # sums; a list of what int8 leaves undecided.
        marks = (2 if self.relative else 1) if key.exact else 0
        zeroed = MARKS // 4 + marks * mask_size
        channels = 2 * self.row
        floats = (self.groups * built.GROUP_META, channels, self.chunks * channels)
        sizes = [4 * zeroed, self.kv_total * k_len * self.row]
        sizes += [4 * self.kv_total * n for n in floats]
        self.listed = min(8 * mask_size, _MOST_LISTED) if marks == 1 else 0
        places = [0]
        for size in (*sizes, 8 * self.listed):
            places.append(places[-1] + _aligned(size))
        self.offsets, self.room = tuple(places[1:6]), places[6]
        self.q_steps, self.k_steps = key.q_strides[:3], key.k_strides[:3]
        self.raises = MARKS + 4 * mask_size  # where the second of the masks lies
        self.zero_words = (mask_size, 4 * self.heads, zeroed)
        self.tile_bytes = 4 * mask_size
        per_kv = self.heads // self.kv_heads
        units = built.gate_units(self.d, self.mask)
        self.gate_items = -(-self.rows * per_kv // units) * self.kv_total
        self.items = self.batch * self.heads * self.rows

        heads, score = (self.heads, self.kv_heads), (key.scale, key.softcap)
        self.gate_order = self._order(_GATE_SHARE, self.row)
        self.gate_end = (self.groups, *heads, self.gate_items, *score)
        self.resolve_order = self._order(_GATE_SHARE, 2 * self.d)
        self.attend_order = self._order(_ATTEND_SHARE, 2 * (self.d + self.dv))
        self.attend_end = (*heads, self.items, *score)

        kind = BFLOAT16 if self.bf16 else FLOAT16
        self.q_map = _rows(kind, key.q_shape, key.q_strides, BLOCK_Q)
        self.k_map = _rows(kind, key.k_shape, key.k_strides, BLOCK_K)
        self.v_map = _rows(kind, key.v_shape, key.v_strides, BLOCK_K)
        slab, extent = min(self.row, 128), self.row * k_len
        self.slot_map, self.tile_map = (
            Tiling(
                dtype=UINT8,
                shape=(self.row, k_len, self.kv_total, 1),
                strides=(self.row, extent, extent * self.kv_total),
                box=(slab, keys),
            )
            for keys in (built.SLOT_KEYS, BLOCK_K)
        )
        self.processors = torch.cuda.get_device_properties(key.device).multi_processor_count

    def _stage(self, what: built.Built, grid: tuple[int, int], *layout: str) -> Stage:
        kernel = load(what.variant, ARCH, self.device, what.smem)
        return Stage(kernel, (*grid, 1), what.threads, what.smem, *layout)

    def _order(self, share: int, bytes_per_key: int) -> tuple[int, int]:
        """(kv heads of all batch rows, how many of them to work on at a time)."""
        width = max(1, min(share // (bytes_per_key * self.k_len), self.kv_total))
        return self.kv_total, width

    def _tally(self, *, fill: bool) -> Stage:
        what = built.tally(self.mask, fill=fill)
        grid = -(-self.items * 32 // what.threads), 1
        return self._stage(what, grid, _SHAPE, "Q", "Q", "i", "i")

    def _attend(self, *, listed: bool) -> Stage:
        what = built.attend(self.d, self.dv, self.mask, bf16=self.bf16, listed=listed)
        grid = min(self.processors, self.items), 1
        return self._stage(what, grid, _MAP, _MAP, _MAP, _ATTEND)

    @functools.cached_property
    def gating(self) -> Gating:
        """The kernels of the gate."""
        d, mask, bf16, resolve = self.d, self.mask, self.bf16, None
        if self.exact:
            what = built.resolve(d, mask, bf16=bf16, relative=self.relative)
            resolve = self._stage(what, (min(self.processors, self.items), 1), _MAP, _MAP, _RESOLVE)
        gate = built.gate(d, mask, bf16=bf16, relative=self.relative, exact=self.exact)
        grid = min(self.processors, self.gate_items), 1
        chunks, groups = (self.chunks, self.kv_total), (self.groups, self.kv_total)
        return Gating(
            sum_keys=self._stage(built.sum_keys(d, bf16=bf16), chunks, _KEYS, "Q", _ZEROS),
            quantise=self._stage(built.quantise_keys(d, bf16=bf16), groups, _KEYS, *"QQQQ"),
            gate=self._stage(gate, grid, _MAP, _MAP, _MAP, _GATE),
            resolve=resolve,
            tally=self._tally(fill=False),
        )

    @functools.cached_property
    def fill(self) -> Stage:
        """Writes the mask that keeps every visible tile."""
        return self._tally(fill=True)

    @functools.cached_property
    def attend_listed(self) -> Stage:
        """Attention over the tiles of a mask."""
        return self._attend(listed=True)

    @functools.cached_property
    def attend_all(self) -> Stage:
        """Attention over every visible tile."""
        return self._attend(listed=False)
