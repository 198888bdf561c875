"""Host side of the Hopper kernels (`cuda/sm90`): reasons, workspace, descriptors, launches.

A call is a row of kernels, each handing the next an object in memory: K summed, K as int8, the
tile mask, its counts, the output. What depends on shapes alone is a `Plan`, made once. Nothing
here reads the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bsfa_compile.ops.call import Call, Gate, Result, empty_out
from bsfa_compile.ops.compiler import KernelUnavailable
from bsfa_compile.ops.driver import launch, load
from bsfa_compile.ops.kernels import PADDING
from bsfa_compile.ops.kernels_sm90 import exact_sinks
from bsfa_compile.ops.sm90_plan import (
    ARCH,
    MARKS,
    MOST_KEYS,
    MOST_POSITIONS,
    PADDING_PARAMS,
    POINTER,
    SHAPE,
    ZEROS,
    Key,
    Plan,
    plan_for,
)
from bsfa_compile.ops.tensor_map import encode
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q

_DTYPES = (torch.bfloat16, torch.float16)


def _unreadable(name: str, x: Tensor) -> str | None:
    """Why the copy engine cannot read x."""
    strides, width = x.stride(), x.shape[3]
    if width > 256 or width % 8:
        return f"{name} has head dim {width}; the Hopper kernels need a multiple of 8 up to 256"
    if strides[3] != 1:
        return f"{name}'s last dimension has stride {strides[3]}; the kernels need 1"
    steps = [s for s, n in zip(strides[:3], x.shape[:3], strict=True) if n > 1]
    if 0 in steps:
        return f"{name} is broadcast (strides {strides}); the copy engine cannot read that"
    if x.data_ptr() % 16 or any(s % 8 or s < 0 for s in steps):
        return f"{name}'s rows (strides {strides}) do not start at multiples of 16 bytes"
    return None


def reason(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> str | None:
    """Why these kernels cannot do this call; None if they can. v None: the gate alone."""
    g = call.geometry
    if q.dtype not in _DTYPES or k.dtype != q.dtype or (v is not None and v.dtype != q.dtype):
        return f"the kernels take bfloat16 or float16, all alike; q is {q.dtype}, k {k.dtype}"
    if (g.block_q, g.block_k) != (BLOCK_Q, BLOCK_K):
        return f"the kernels have {BLOCK_Q} x {BLOCK_K} tiles, not {g.block_q} x {g.block_k}"
    if not call.scale > 0:
        return f"the kernels need a positive scale, not {call.scale}"
    if q.numel() == 0 or k.numel() == 0:
        return "an empty q or k"
    if g.k_len > MOST_KEYS or g.q_start + g.q_len > MOST_POSITIONS:
        return f"{g.k_len} keys; the Hopper kernels take {MOST_KEYS}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (bad := _unreadable(name, x)) is not None:
            return bad
    try:
        plan = plan_of(q, k, v, call, gate)
        _ = plan.gating if gate is not None else plan.fill
        if v is not None:
            _ = plan.attend_listed if gate is not None else plan.attend_all
    except KernelUnavailable as error:
        return str(error)
    return None


def plan_of(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Plan:
    """The plan of a call: kernels, grids and sizes, which its tensors' contents do not change."""
    g = call.geometry
    key = Key(
        device=q.device.index,
        dtype=q.dtype,
        q_shape=q.shape,
        k_shape=k.shape,
        k_strides=k.stride(),
        dv=k.shape[3] if v is None else v.shape[3],
        causal=g.is_causal,
        window=-1 if g.window is None else g.window,
        padded=call.key_padding_mask is not None,
        softcap=0.0 if call.softcap is None else call.softcap,
        sink_tiles=g.sink_tiles,
        scale=call.scale,
        relative=gate is not None and gate.rule == "relative",
        exact=gate is not None and gate.precision == "exact",
    )
    return plan_for(key)


def _padding(mask: Tensor, k_len: int, stream: int) -> tuple[Tensor, Tensor]:
    """A key padding mask [B, Lk] as (bits [B, tiles] int64, bounds [B, 2] int32)."""
    batch, tiles = mask.shape[0], -(-k_len // BLOCK_K)
    bits = torch.empty((batch, tiles), dtype=torch.int64, device=mask.device)
    bounds = torch.empty((batch, 2), dtype=torch.int32, device=mask.device)
    params = PADDING_PARAMS.pack(
        mask.data_ptr(), bits.data_ptr(), bounds.data_ptr(), mask.stride(0), mask.stride(1), k_len
    )
    kernel = load(PADDING, ARCH, mask.device.index)
    launch(kernel, (batch, 1, 1), 1024, 0, (params,), stream=stream)
    return bits, bounds


@functools.lru_cache(maxsize=4096)
def _map(pointer: int, kind: int, shape: torch.Size, strides: tuple[int, ...], rows: int) -> bytes:
    """Descriptor of q, k or v [B, H, L, D] that moves `rows` rows of 64 columns."""
    batch, heads, length, width = shape
    sb, sh, sl, _ = strides
    return encode(pointer, kind, (width, length, heads, batch), (sl, sh, sb), (64, rows))


class _Run:
    """One call's stream and the parameters that its kernels share."""

    def __init__(self, q: Tensor, k: Tensor, call: Call, plan: Plan) -> None:
        self.q, self.k, self.plan, self.sinks = q, k, plan, call.sinks
        self.stream = torch.cuda.current_stream(q.device.index).cuda_stream
        self.padding = None  # kept alive until the kernels are queued
        if call.key_padding_mask is not None:
            self.padding = _padding(call.key_padding_mask, call.geometry.k_len, self.stream)
        bits, bounds = (0, 0) if self.padding is None else (x.data_ptr() for x in self.padding)
        start = 0 if call.q_start_tensor is None else call.q_start_tensor.data_ptr()
        self.shape = SHAPE.pack(start, bits, bounds, call.geometry.q_start) + plan.shape

    def map(self, x: Tensor, rows: int) -> bytes:
        return _map(x.data_ptr(), self.plan.kind, x.shape, x.stride(), rows)

    def decide(self, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
        """(tile mask, counts, workspace, whose second int is a zeroed counter)."""
        plan, device = self.plan, self.q.device
        tiles = torch.empty(plan.mask_shape, dtype=torch.int32, device=device)
        counts = torch.empty(plan.counts_shape, dtype=torch.int64, device=device)
        room = torch.empty(plan.room, dtype=torch.uint8, device=device)
        tiles_at, counts_at, base = tiles.data_ptr(), counts.data_ptr(), room.data_ptr()
        k8, meta, mean, sums, listed = (base + offset for offset in plan.offsets)
        undecided = (listed, base + 12, base + MARKS, base + plan.raises)
        thresholds = gate.thresholds.contiguous()
        thresholds_at = thresholds.data_ptr()
        columns = 1 if thresholds.dim() == 1 else thresholds.shape[1]
        stages, stream, q_map = plan.gating, self.stream, self.map(self.q, BLOCK_Q)

        keys, at = POINTER.pack(self.k.data_ptr()) + plan.keys, POINTER.pack(sums)
        zeros = ZEROS.pack(tiles_at, counts_at, base, *plan.zero_words)
        stages.sum_keys.run((keys, at, zeros), stream, overlap=False)
        outputs = (POINTER.pack(x) for x in (k8, meta, mean))
        stages.quantise.run((keys, at, *outputs), stream)
        slot, tile = plan.k8_maps(k8)
        if gate.precision == "exact" and gate.rule == "relative" and exact_sinks(plan.d, plan.mask):
            tile = self.map(self.k, BLOCK_K)
        pointers = (thresholds_at, meta, mean, tiles_at, *undecided, base)
        params = self.shape + plan.gate_params(pointers, columns)
        stages.gate.run((q_map, slot, tile, params), stream)
        if stages.resolve is not None:
            rows = tuple(n for x in (self.q, self.k) for n in (x.data_ptr(), *x.stride()[:3]))
            resolved = (*undecided, thresholds_at, tiles_at, base + 8)
            params = self.shape + plan.resolve_params(rows, resolved, columns)
            stages.resolve.run((q_map, self.map(self.k, BLOCK_K), params), stream)
        stages.tally.run((self.shape, *plan.tally_args(tiles_at, counts_at)), stream)
        return tiles, counts, room

    def attend(
        self, v: Tensor, tiles: Tensor | None, counter: int, *, overlap: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(out, lse); `counter`: address of a zeroed int."""
        plan, q = self.plan, self.q
        out, lse = empty_out(q, v), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        stage = plan.attend_all if tiles is None else plan.attend_listed
        mask = 0 if tiles is None else tiles.data_ptr()
        sinks = None if self.sinks is None else self.sinks.contiguous()
        sinks_at = 0 if sinks is None else sinks.data_ptr()
        pointers = (mask, out.data_ptr(), lse.data_ptr(), sinks_at, counter)
        params = self.shape + plan.attend_params(pointers)
        maps = (self.map(q, BLOCK_Q), self.map(self.k, BLOCK_K), self.map(v, BLOCK_K))
        stage.run((*maps, params), self.stream, overlap=overlap)
        return out, lse


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate)."""
    plan = plan_of(q, k, v, call, gate)
    run = _Run(q, k, call, plan)
    if gate is not None:
        tiles, counts, room = run.decide(gate)
        out, lse = run.attend(v, tiles, room.data_ptr() + 4)
        return Result(out=out, lse=lse, tile_mask=tiles, counts=counts)
    tiles = torch.zeros(plan.mask_shape, dtype=torch.int32, device=q.device)
    heads = plan.counts_shape[0]
    zeros = torch.zeros(2 * heads + 1, dtype=torch.int64, device=q.device)
    counts = zeros[:-1].view(heads, 2)
    arguments = (run.shape, *plan.tally_args(tiles.data_ptr(), counts.data_ptr()))
    plan.fill.run(arguments, run.stream, overlap=False)
    out, lse = run.attend(v, None, counts.data_ptr() + counts.nbytes)
    return Result(out=out, lse=lse, tile_mask=tiles, counts=counts)


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    tiles, counts, _ = _Run(q, k, call, plan_of(q, k, None, call, gate)).decide(gate)
    return tiles, counts


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    run = _Run(q, k, call, plan_of(q, k, v, call, None))
    return run.attend(v, tiles.contiguous(), counter.data_ptr(), overlap=False)
