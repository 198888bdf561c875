"""What a call on Hopper needs that follows from its shapes: kernels, grids, sizes, offsets.

Parameters of the kernels are packed here, in the order of the structs in `cuda/sm90/*.cu`.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bsfa_compile.ops import kernels_sm90 as built
from bsfa_compile.ops.driver import Kernel, launch, load
from bsfa_compile.ops.tensor_map import BFLOAT16, FLOAT16, UINT8, encode
from bsfa_compile.ops.tiles import BLOCK_K, mask_rows, mask_words

ARCH = "sm_90a"
MOST_KEYS = 0x7FFF * BLOCK_K  # the step word of attend.cu has 15 bits a tile
MOST_POSITIONS = 2**29
MARKS = 256  # where in the workspace lie the masks of what int8 leaves undecided
_MOST_LISTED = 2**24  # rows of 16 keys that int8 may leave undecided; what is beyond is marked
# Bytes that CTAs work on at a time. More than the L2 cache holds: all CTAs walk K in step, so what
# one of them brings the others find.
_GATE_SHARE, _ATTEND_SHARE = 20 * 2**20, 70 * 2**20

SHAPE = struct.Struct("<3Qq")  # first half of Shape in cuda/include/spans.cuh
_SHAPE_TAIL = struct.Struct("<6i")
PADDING_PARAMS = struct.Struct("<3Q2qi4x")  # Params of cuda/sm80/padding.cu
POINTER, _INT = struct.Struct("<Q"), struct.Struct("<i")
_KEYS_TAIL = struct.Struct("<3q4i")  # Keys of quantise.cu, after the pointer
ZEROS = struct.Struct("<3Q3q")  # Zeros of quantise.cu
_GATE = struct.Struct("<2i8Qi4xQ5i2f4x")  # Params of gate.cu, after the Shape
_RESOLVE = struct.Struct("<2iQ3qQ3q4Qi4x3Q4i2f")  # Params of resolve.cu, after the Shape
_ATTEND = struct.Struct("<2i5Q3i2f4x")  # Params of attend.cu, after the Shape


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A loaded kernel and its launch."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    smem: int

    def run(self, args: tuple[bytes, ...], stream: int, *, overlap: bool = True) -> None:
        """Queue it. overlap: it may start while its predecessor, one of ours, still runs."""
        launch(
            self.kernel, self.grid, self.threads, self.smem, args, stream=stream, overlap=overlap
        )


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


class Key(NamedTuple):
    """What a plan follows from. A named tuple: it is hashed at every call."""

    device: int
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    k_strides: tuple[int, ...]
    dv: int
    causal: bool
    window: int  # -1: none
    padded: bool
    softcap: float  # 0: none
    sink_tiles: int
    scale: float
    relative: bool
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Gating:
    """The kernels that decide, in their order."""

    sum_keys: Stage
    quantise: Stage
    gate: Stage
    resolve: Stage | None  # exact decisions
    tally: Stage


class Plan:
    """Kernels are loaded when first asked for; the rest is arithmetic."""

    def __init__(self, key: Key) -> None:
        self.batch, self.heads, q_len, self.d = key.q_shape
        _, self.kv_heads, k_len, _ = key.k_shape
        self.device, self.dv, self.relative = key.device, key.dv, key.relative
        self.exact = key.exact
        self.mask = built.Mask(
            causal=key.causal, window=key.window >= 0, padded=key.padded, softcap=key.softcap > 0
        )
        self.bf16 = key.dtype == torch.bfloat16
        self.kind = BFLOAT16 if self.bf16 else FLOAT16
        self.scale, self.softcap = key.scale, key.softcap
        self.rows, words = mask_rows(q_len), mask_words(k_len)
        self.kv_total = self.batch * self.kv_heads
        self.k_len, self.row = k_len, built.row_bytes(self.d)
        self.mask_shape = (self.batch, self.heads, self.rows, words)
        self.counts_shape = (self.heads, 2)
        window = min(max(key.window, 0), MOST_POSITIONS)
        sink_tiles = min(key.sink_tiles, MOST_POSITIONS)
        self.shape = _SHAPE_TAIL.pack(q_len, k_len, window, sink_tiles, self.rows, words)

        chunk = built.sum_chunk(k_len)
        self.chunks, self.groups = -(-k_len // chunk), -(-k_len // built.GROUP_KEYS)
        self.keys = _KEYS_TAIL.pack(*key.k_strides[:3], self.kv_heads, k_len, chunk, self.chunks)
        mask_size = self.batch * self.heads * self.rows * words
        # Workspace: counters (work of gate, attention, resolve; what is listed), at MARKS masks of
        # what int8 leaves undecided; K as int8, its metadata, its mean, the partial sums; a list of
        # what int8 leaves undecided.
        marks = (2 if key.relative else 1) if key.exact else 0
        zeroed = MARKS // 4 + marks * mask_size
        floats = (self.groups * built.GROUP_META, self.row, self.chunks * self.row)
        sizes = [4 * zeroed, self.kv_total * k_len * self.row]
        sizes += [4 * self.kv_total * n for n in floats]
        self.listed = min(8 * mask_size, _MOST_LISTED) if marks == 1 else 0
        places = [0]
        for size in (*sizes, 8 * self.listed):
            places.append(places[-1] + _aligned(size))
        self.offsets, self.room = tuple(places[1:6]), places[6]
        self.raises = MARKS + 4 * mask_size  # where the second of the masks lies
        self.zero_words = (mask_size, 4 * self.heads, zeroed)
        per_kv = self.heads // self.kv_heads
        self.pairs = (self.rows * per_kv + 1) // 2 * self.kv_total
        self.items = self.batch * self.heads * self.rows
        self.processors = torch.cuda.get_device_properties(key.device).multi_processor_count

    def _stage(self, what: built.Built, *grid: int) -> Stage:
        kernel = load(what.variant, ARCH, self.device, what.smem)
        x, y = (*grid, 1)[:2]
        return Stage(kernel=kernel, grid=(x, y, 1), threads=what.threads, smem=what.smem)

    def _width(self, share: int, bytes_per_key: int) -> int:
        """kv heads to work on at a time."""
        return max(1, min(share // (bytes_per_key * self.k_len), self.kv_total))

    def _tally(self, *, fill: bool) -> Stage:
        what = built.tally(self.mask, fill=fill)
        return self._stage(what, -(-self.items * 32 // what.threads))

    def _attend(self, *, listed: bool) -> Stage:
        what = built.attend(self.d, self.dv, self.mask, bf16=self.bf16, listed=listed)
        return self._stage(what, min(self.processors, self.items))

    @functools.cached_property
    def gating(self) -> Gating:
        """The kernels of the gate."""
        d, mask, bf16 = self.d, self.mask, self.bf16
        gate = built.gate(d, mask, bf16=bf16, relative=self.relative, exact=self.exact)
        resolve = None
        if self.exact:
            what = built.resolve(d, mask, bf16=bf16, relative=self.relative)
            resolve = self._stage(what, min(self.processors, self.items))
        return Gating(
            sum_keys=self._stage(built.sum_keys(d, bf16=bf16), self.chunks, self.kv_total),
            quantise=self._stage(built.quantise_keys(d, bf16=bf16), self.groups, self.kv_total),
            gate=self._stage(gate, min(self.processors, self.pairs)),
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

    def gate_params(self, pointers: tuple[int, ...], columns: int) -> bytes:
        """pointers: thresholds, metadata, mean, tile mask, list, its count, both masks, counter."""
        return _GATE.pack(
            self.kv_total,
            self._width(_GATE_SHARE, self.row),
            *pointers[:-1],
            self.listed,
            pointers[-1],
            columns,
            self.groups,
            self.heads,
            self.kv_heads,
            self.pairs,
            self.scale,
            self.softcap,
        )

    def resolve_params(
        self, rows: tuple[int, ...], pointers: tuple[int, ...], columns: int
    ) -> bytes:
        """rows: q's address and strides, k's; pointers: list, its count, both masks, thresholds,
        tile mask, counter."""
        return _RESOLVE.pack(
            self.kv_total,
            self._width(_GATE_SHARE, 2 * self.d),
            *rows,
            *pointers[:4],
            self.listed,
            *pointers[4:],
            columns,
            self.heads,
            self.kv_heads,
            self.items,
            self.scale,
            self.softcap,
        )

    def attend_params(self, pointers: tuple[int, ...]) -> bytes:
        """pointers: tile mask, out, lse, sinks, counter."""
        return _ATTEND.pack(
            self.kv_total,
            self._width(_ATTEND_SHARE, 2 * (self.d + self.dv)),
            *pointers,
            self.heads,
            self.kv_heads,
            self.items,
            self.scale,
            self.softcap,
        )

    def tally_args(self, tiles: int, counts: int) -> tuple[bytes, ...]:
        """Arguments of the tally after the Shape."""
        return (
            POINTER.pack(tiles),
            POINTER.pack(counts),
            _INT.pack(self.heads),
            _INT.pack(self.batch),
        )

    def k8_maps(self, pointer: int) -> tuple[bytes, bytes]:
        """Descriptors of K in int8 that move a slot's keys, and one tile's."""
        row, extent = self.row, self.row * self.k_len
        shape, strides = (row, self.k_len, self.kv_total, 1), (row, extent, extent * self.kv_total)
        slab, keys = min(row, 128), built.slot_keys(self.d, self.mask)
        slot = encode(pointer, UINT8, shape, strides, (slab, keys))
        return slot, encode(pointer, UINT8, shape, strides, (slab, BLOCK_K))


@functools.lru_cache(maxsize=1024)
def plan_for(key: Key) -> Plan:
    """The plan of such a call."""
    return Plan(key)
