"""Runs the Hopper attention kernel on the CPU: `emulator/` holds what stands for the card."""

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

from bsfa_compile.ops import compiler, kernels_sm90, sm90_plan
from bsfa_compile.ops.kernels_sm90 import Built, Mask
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q, Geometry, pack, unpadded_tiles

EMULATOR = Path(__file__).parent / "emulator"
# Hidden: each library has state of its own. Memory is read as other types than it was written as.
_COMPILE = ["c++", "-std=c++20", "-O3", "-shared", "-fPIC", "-w"]
_COMPILE += ["-fvisibility=hidden", "-fno-strict-aliasing"]
_PROBE = "#include <ucontext.h>\nauto probe() { return &makecontext; }\n"


class EmulationError(Exception):
    """What the kernel did that it must not do on a card."""


class _TensorMap(ctypes.Structure):
    """TensorMap of emulator/fakes/base.cuh."""

    _fields_ = (
        ("gmem", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("shape", ctypes.c_int * 4),
        ("rows", ctypes.c_int),
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
    """`emulate_attend` of attend_main.cpp for a variant. edit: (old, new) text of the kernel."""
    with tempfile.TemporaryDirectory() as name:
        folder, library = Path(name), f"{name}/attend.so"
        shutil.copytree(compiler.SOURCES, folder / "cuda")
        for fake in (EMULATOR / "fakes").glob("*.cuh"):
            shutil.copy(fake, folder / "cuda" / "include")
        with mock.patch.object(compiler, "SOURCES", folder / "cuda"):
            text = compiler.read_source(built.variant.source)
        if edit is not None:
            assert text.count(edit[0]) == 1, f"the kernel has no single {edit[0]!r}"
            text = text.replace(*edit)
        (folder / "attend.inc").write_text(text)
        macros = dict(built.variant.defines) | {"THREADS": built.threads, "SMEM_BYTES": built.smem}
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        includes = [f"-I{EMULATOR}", f"-I{folder}"]
        command = [*_COMPILE, *defines, *includes, str(EMULATOR / "attend_main.cpp"), "-o", library]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        function = ctypes.CDLL(library).emulate_attend
    function.restype = ctypes.c_char_p
    return function


def _tensor_map(x: Tensor, rows: int, copies: ctypes.c_int) -> _TensorMap:
    """x [B, H, L, D]; a copy moves `rows` rows of 64 columns."""
    (batch, heads, length, width), (sb, sh, sl, _) = x.shape, x.stride()
    return _TensorMap(
        gmem=x.data_ptr(),
        strides=(sl, sh, sb),
        shape=(width, length, heads, batch),
        rows=rows,
        copies=ctypes.pointer(copies),
    )


def _pad_bits(padding: Tensor) -> Tensor:
    """One bit a key: int64 [B, tiles]."""
    batch, k_len = padding.shape
    keys = torch.nn.functional.pad(padding, (0, -k_len % BLOCK_K)).view(batch, -1, BLOCK_K)
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
    mask = Mask(
        causal=g.is_causal,
        window=g.window is not None,
        padded=padding is not None,
        softcap=softcap is not None,
    )
    bf16 = q.dtype == torch.bfloat16
    built = kernels_sm90.attend(d, dv, mask, bf16=bf16, listed=kept is not None)
    copies = [ctypes.c_int(0) for _ in range(3)]
    sizes = (BLOCK_Q, BLOCK_K, BLOCK_K)
    tensors = zip((q, k, v), sizes, copies, strict=True)
    maps = (_TensorMap * 3)(*(_tensor_map(*each) for each in tensors))

    out = torch.full((batch, g.q_len, heads, dv), torch.nan, dtype=q.dtype)
    lse = torch.full((batch, heads, g.q_len), torch.nan)
    all_tiles = torch.zeros(batch, heads, g.q_blocks, g.k_blocks, dtype=torch.bool)
    words = pack(all_tiles if kept is None else kept).contiguous()
    start, counter = torch.tensor([g.q_start]), torch.zeros(1, dtype=torch.int32)
    pad_bits = bounds = None
    if padding is not None:
        pad_bits = _pad_bits(padding)
        bounds = torch.tensor(unpadded_tiles(padding, batch, g.k_len), dtype=torch.int32)

    def at(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    tail = (g.q_len, g.k_len, g.window or 0, g.sink_tiles, *words.shape[2:])
    params = struct.Struct("<" + sm90_plan._ATTEND).pack(
        at(start if start_in_memory else None),
        at(pad_bits),
        at(bounds),
        0 if start_in_memory else g.q_start,
        struct.pack("<6i", *tail),
        batch * kv_heads,
        side_by_side or batch * kv_heads,
        at(None if kept is None else words),
        at(out),
        at(lse),
        at(sinks),
        at(counter),
        heads,
        kv_heads,
        batch * heads * g.q_blocks,
        scale,
        softcap or 0.0,
    )
    room = ctypes.create_string_buffer(params, len(params))
    failure = _function(built, edit)(maps, room, len(params), ctypes.c_uint(seed))
    if failure is not None:
        raise EmulationError(failure.decode())
    slabs = -(-d // 64)
    return Emulated(out=out.transpose(1, 2), lse=lse, items=copies[0].value // slabs)
