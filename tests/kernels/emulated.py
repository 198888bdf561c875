"""Runs Hopper kernels on the CPU: `emulator/` holds what stands for the card."""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

from bsfa_compile.ops import compiler, kernels_sm90, sm90_plan
from bsfa_compile.ops.kernels_sm90 import Built, Mask
from bsfa_compile.ops.quantise import quantise_keys
from bsfa_compile.ops.reference import INT8_MARGIN
from bsfa_compile.ops.tiles import (
    BLOCK_K,
    BLOCK_Q,
    Geometry,
    mask_words,
    pack,
    unpack,
    unpadded_tiles,
)

EMULATOR = Path(__file__).parent / "emulator"
# Hidden: each library has state of its own. Memory is read as other types than it was written as.
_COMPILE = ["c++", "-std=c++20", "-O3", "-shared", "-fPIC", "-w"]
_COMPILE += ["-fvisibility=hidden", "-fno-strict-aliasing"]
TILE_SHIFT = 9  # of an entry of undecided.cuh
_PROBE = "#include <ucontext.h>\nauto probe() { return &makecontext; }\n"


class EmulationError(Exception):
    """What the kernel did that it must not do on a card."""


class _TensorMap(ctypes.Structure):
    """TensorMap of emulator/fakes/base.cuh."""

    _fields_ = (
        ("gmem", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("shape", ctypes.c_int * 4),
        ("box", ctypes.c_int * 2),
        ("element", ctypes.c_int),
        ("copies", ctypes.POINTER(ctypes.c_int)),
    )


@dataclass(frozen=True, kw_only=True)
class Emulated:
    """out [B, H, Lq, Dv], lse [B, H, Lq], and how many items were begun that have tiles."""

    out: Tensor
    lse: Tensor
    items: int


@functools.cache
def lacking() -> str | None:
    """Why nothing can be emulated here; None if it can."""
    if sys.platform != "linux":
        return f"the emulator's fibers need Linux, this is {sys.platform}"
    if shutil.which("c++") is None:
        return "the emulator needs a C++ compiler, there is no c++"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_PROBE)
        command = [*_COMPILE, "-Wl,-z,defs", str(source), "-o", f"{folder}/probe.so"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"c++ has no C++20 or no ucontext: {done.stderr[-300:]}" if done.returncode else None


@functools.cache
def _function(built: Built, edit: tuple[str, str] | None) -> Any:
    """`emulate` of main.cpp for a variant. edit: (old, new) text of the kernel."""
    with tempfile.TemporaryDirectory() as name:
        folder, library = Path(name), f"{name}/kernel.so"
        shutil.copytree(compiler.SOURCES, folder / "cuda")
        for fake in (EMULATOR / "fakes").glob("*.cuh"):
            shutil.copy(fake, folder / "cuda" / "include")
        with mock.patch.object(compiler, "SOURCES", folder / "cuda"):
            text = compiler.read_source(built.variant.source)
        if edit is not None:
            assert text.count(edit[0]) == 1, f"the kernel has no single {edit[0]!r}"
            text = text.replace(*edit)
        (folder / "kernel.inc").write_text(text)
        macros = dict(built.variant.defines) | {"KERNEL": built.variant.entry}
        macros |= {"CTA_THREADS": built.threads, "SMEM_BYTES": built.smem}
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        includes = [f"-I{EMULATOR}", f"-I{folder}"]
        command = [*_COMPILE, *defines, *includes, str(EMULATOR / "main.cpp"), "-o", library]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        function = ctypes.CDLL(library).emulate
    function.restype = ctypes.c_char_p
    return function


def _tensor_map(x: Tensor, rows: int, copies: ctypes.c_int, columns: int = 64) -> _TensorMap:
    """x [B, H, L, D]; a copy moves `rows` rows of `columns` columns."""
    (batch, heads, length, width), size = x.shape, x.element_size()
    sb, sh, sl, _ = (size * s for s in x.stride())
    return _TensorMap(
        gmem=x.data_ptr(),
        strides=(sl, sh, sb),
        shape=(width, length, heads, batch),
        box=(columns, rows),
        element=size,
        copies=ctypes.pointer(copies),
    )


class _Shape:
    """Shape of spans.cuh, and the tensors that it points to."""

    def __init__(self, g: Geometry, padding: Tensor | None, *, in_memory: bool) -> None:
        self.start = torch.tensor([g.q_start]) if in_memory else None
        self.pad_bits = self.bounds = None
        if padding is not None:
            self.pad_bits = _pad_bits(padding)
            bounds = unpadded_tiles(padding, len(padding), g.k_len)
            self.bounds = torch.tensor(bounds, dtype=torch.int32)
        self.words = mask_words(g.k_len)
        tail = (g.q_len, g.k_len, g.window or 0, g.sink_tiles, g.q_blocks, self.words)
        pointers = (_at(x) for x in (self.start, self.pad_bits, self.bounds))
        self.packed = (*pointers, 0 if in_memory else g.q_start, struct.pack("<6i", *tail))


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run(
    built: Built, maps: Any, layout: str, values: Any, seed: int, edit: tuple[str, str] | None
) -> None:
    params = struct.Struct("<" + layout).pack(*values)
    room = ctypes.create_string_buffer(params, len(params))
    failure = _function(built, edit)(maps, room, len(params), ctypes.c_uint(seed))
    if failure is not None:
        raise EmulationError(failure.decode())


def _mask_of(g: Geometry, padding: Tensor | None, softcap: float | None) -> Mask:
    return Mask(
        causal=g.is_causal,
        window=g.window is not None,
        padded=padding is not None,
        softcap=softcap is not None,
    )


def _pad_bits(padding: Tensor) -> Tensor:
    """One bit a key: int64 [B, tiles]."""
    batch, k_len = padding.shape
    keys = pad(padding, (0, -k_len % BLOCK_K)).view(batch, -1, BLOCK_K)
    return (keys.long() << torch.arange(BLOCK_K)).sum(-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor | None,
    geometry: Geometry,
    *,
    scale: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    start_in_memory: bool = False,
    side_by_side: int | None = None,
    seed: int = 0,
    edit: tuple[str, str] | None = None,
) -> Emulated:
    """q [B, H, Lq, D], k, v in 16 bits; kept [B, H, q_blocks, k_blocks], None: all tiles.

    start_in_memory: as if q_start were known to the device only. side_by_side: kv heads worked on
    at a time. seed: which warps rest when, 0 for none. edit: see `_function`.
    """
    g, (batch, heads, _, d), dv, kv_heads = geometry, q.shape, v.shape[3], k.shape[1]
    mask, bf16 = _mask_of(g, padding, softcap), q.dtype == torch.bfloat16
    built = kernels_sm90.attend(d, dv, mask, bf16=bf16, listed=kept is not None)
    copies = [ctypes.c_int(0) for _ in range(3)]
    sizes = (BLOCK_Q, BLOCK_K, BLOCK_K)
    tensors = zip((q, k, v), sizes, copies, strict=True)
    maps = (_TensorMap * 3)(*(_tensor_map(*each) for each in tensors))

    out = torch.full((batch, g.q_len, heads, dv), torch.nan, dtype=q.dtype)
    lse = torch.full((batch, heads, g.q_len), torch.nan)
    words = None if kept is None else pack(kept).contiguous()
    shape = _Shape(g, padding, in_memory=start_in_memory)
    counter = torch.zeros(1, dtype=torch.int32)
    values = (
        *shape.packed,
        batch * kv_heads,
        side_by_side or batch * kv_heads,
        _at(words),
        _at(out),
        _at(lse),
        _at(sinks),
        _at(counter),
        heads,
        kv_heads,
        batch * heads * g.q_blocks,
        scale,
        softcap or 0.0,
    )
    _run(built, maps, sm90_plan._ATTEND, values, seed, edit)
    slabs = -(-d // 64)
    return Emulated(out=out.transpose(1, 2), lse=lse, items=copies[0].value // slabs)


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Tiles [B, H, q_blocks, k_blocks]: kept; left to `resolve`, as tiles or row by row."""

    kept: Tensor
    undecided: Tensor


class _Keys:
    """K as `quantise.cu` leaves it."""

    def __init__(self, k: Tensor) -> None:
        (batch, heads, k_len, d), row = k.shape, kernels_sm90.row_bytes(k.shape[3])
        keys = quantise_keys(k, BLOCK_K, torch.float32)
        self.values = torch.zeros(1, batch * heads, k_len, row, dtype=torch.int8)
        self.values[0, ..., :d] = keys.values[:, :, :k_len].flatten(0, 1)
        self.groups = -(-k_len // kernels_sm90.GROUP_KEYS)
        pairs = torch.zeros(batch * heads, 2 * self.groups, 2, 2)  # two scales, two norms
        for i, of in enumerate((keys.scales, keys.norms * (INT8_MARGIN / 12**0.5))):
            tiles = pad(of.flatten(0, 1), (0, 4 * self.groups - of.shape[2]))
            pairs[:, :, i] = tiles.unflatten(1, (-1, 2))
        self.meta = pairs.contiguous()
        self.channels = torch.zeros(batch * heads, 2, row)
        self.channels[:, 0, :d] = keys.mean.flatten(0, 2)
        self.channels[:, 1, :d] = keys.spread.flatten(0, 2)


def decide(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    geometry: Geometry,
    *,
    relative: bool,
    exact: bool,
    scale: float,
    padding: Tensor | None = None,
    softcap: float | None = None,
    start_in_memory: bool = False,
    side_by_side: int | None = None,
    seed: int = 0,
    edit: tuple[str, str] | None = None,
) -> Decided:
    """The gate on q [B, H, Lq, D], k in 16 bits; thresholds [H, n] float32. See `attend`."""
    g, (batch, heads, _, d), kv_heads = geometry, q.shape, k.shape[1]
    mask, bf16 = _mask_of(g, padding, softcap), q.dtype == torch.bfloat16
    built = kernels_sm90.gate(d, mask, bf16=bf16, relative=relative, exact=exact)
    keys, row = _Keys(k), kernels_sm90.row_bytes(d)
    in_16_bits = exact and relative and kernels_sm90.exact_sinks(d, mask)
    copies, slab = ctypes.c_int(0), min(row, 128)
    maps = (_TensorMap * 3)(
        _tensor_map(q, BLOCK_Q, copies),
        _tensor_map(keys.values, kernels_sm90.SLOT_KEYS, copies, slab),
        _tensor_map(k, BLOCK_K, copies)
        if in_16_bits
        else _tensor_map(keys.values, BLOCK_K, copies, slab),
    )
    shape = _Shape(g, padding, in_memory=start_in_memory)
    kept, may, raising = torch.zeros(3, batch, heads, g.q_blocks, shape.words, dtype=torch.int32)
    listed = torch.zeros(64 * kept.numel(), 2, dtype=torch.int32)
    count, counter = torch.zeros(2, 1, dtype=torch.int32)
    units = kernels_sm90.gate_units(d, mask)
    items = -(-g.q_blocks * (heads // kv_heads) // units) * batch * kv_heads
    values = (
        *shape.packed,
        batch * kv_heads,
        side_by_side or batch * kv_heads,
        *(_at(x) for x in (thresholds, keys.meta, keys.channels, kept)),
        *(_at(x) for x in (listed, count, may, raising)),
        len(listed),
        _at(counter),
        thresholds.shape[1],
        keys.groups,
        heads,
        kv_heads,
        items,
        scale,
        softcap or 0.0,
    )
    _run(built, maps, sm90_plan._GATE, values, seed, edit)
    undecided = unpack(may | raising, g.k_blocks)
    lines = undecided.view(-1, g.k_blocks)
    for line, code in listed[: int(count)].tolist():
        lines[line, code >> TILE_SHIFT] = True
    return Decided(kept=unpack(kept, g.k_blocks), undecided=undecided)
