"""Host side of the Hopper kernels (`cuda/sm90`): reasons, workspace, descriptors, launches.

A call is a row of kernels, each handing the next an object in memory: K summed, K as int8, the
tile mask, the output, what the mask drops. What depends on shapes alone is a `Plan`, made once.
Nothing here reads the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.compiler import KernelUnavailable
from bsfa_compile.ops.driver import zero
from bsfa_compile.ops.kernels_sm90 import exact_sinks
from bsfa_compile.ops.sm80 import padding
from bsfa_compile.ops.sm90_limits import refusal
from bsfa_compile.ops.sm90_plan import MARKS, MOST_POSITIONS, Key, Plan
from bsfa_compile.ops.tensor_map import encode


def _empty_slow(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# On the current device. What compiled graphs allocate with, where torch still has it.
_empty: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_slow)


@functools.lru_cache(maxsize=1024)
def plan_for(key: Key) -> Plan | str:
    """The plan of such a call, its kernels loaded, or why there is none: asked once."""
    if (bad := refusal(key)) is not None:
        return bad
    plan = Plan(key)
    try:
        _ = plan.fill if key.rule is None else plan.gating
        if key.v_dtype is not None:
            _ = plan.attend_all if key.rule is None else plan.attend_listed
    except KernelUnavailable as error:
        return str(error)
    return plan


def plan_of(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Plan:
    """The plan of a call: kernels, grids and sizes, which its tensors' contents do not change.

    v None: the gate alone. Raises KernelUnavailable if these kernels cannot do the call.
    """
    g, values = call.geometry, k if v is None else v
    key = Key(
        q.get_device(),
        q.dtype,
        k.dtype,
        None if v is None else v.dtype,
        q.shape,
        k.shape,
        values.shape,
        q.stride(),
        k.stride(),
        values.stride(),
        g.block_q,
        g.block_k,
        g.is_causal,
        -1 if g.window is None else g.window,
        call.key_padding_mask is not None,
        0.0 if call.softcap is None else call.softcap,
        g.sink_tiles,
        call.scale,
        None if gate is None else gate.rule,
        gate is not None and gate.precision == "exact",
    )
    plan = plan_for(key)
    if isinstance(plan, str):
        raise KernelUnavailable(plan)
    if g.q_start + g.q_len > MOST_POSITIONS:
        raise KernelUnavailable(f"positions beyond {MOST_POSITIONS}")
    if (q.data_ptr() | k.data_ptr() | values.data_ptr()) % 16:
        raise KernelUnavailable("q, k or v does not start at a multiple of 16 bytes")
    return plan


def reason(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> str | None:
    """Why these kernels cannot do this call; None if they can. v None: the gate alone."""
    try:
        plan_of(q, k, v, call, gate)
    except KernelUnavailable as error:
        return str(error)
    return None


class _Run:
    """One call's stream and the parameters that its kernels share."""

    def __init__(self, q: Tensor, k: Tensor, call: Call, plan: Plan) -> None:
        self.plan, self.sinks = plan, call.sinks
        self.q_at, self.k_at = q.data_ptr(), k.data_ptr()
        self.stream = torch._C._cuda_getCurrentRawStream(plan.device)
        bits_at = bounds_at = start_at = 0
        if call.key_padding_mask is not None:
            # Kept alive until the kernels are queued.
            self.padding = padding(call.key_padding_mask, call.geometry.k_len, self.stream)
            bits_at, bounds_at = (x.data_ptr() for x in self.padding)
        if call.q_start_tensor is not None:
            start_at = call.q_start_tensor.data_ptr()
        self.shape = (start_at, bits_at, bounds_at, call.geometry.q_start, plan.shape)

    def decide(self, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
        """(tile mask, zeroed counts, workspace, whose second int is a zeroed counter)."""
        plan, stream = self.plan, self.stream
        tiles, counts = _empty(*plan.tiles, torch.int32), _empty(*plan.counts, torch.int64)
        room = _empty((plan.room,), (1,), torch.uint8)
        tiles_at, counts_at, base = tiles.data_ptr(), counts.data_ptr(), room.data_ptr()
        k8, meta, mean, sums, listed = map(base.__add__, plan.offsets)
        undecided = (listed, base + 12, base + MARKS, base + plan.raises)
        thresholds = gate.thresholds.contiguous()
        thresholds_at = thresholds.data_ptr()
        columns = 1 if thresholds.dim() == 1 else thresholds.shape[1]
        stages, keys = plan.gating, (self.k_at, plan.keys)

        zeros = (tiles_at, counts_at, base, *plan.zero_words)
        stages.sum_keys.run(stream, *keys, sums, *zeros, overlap=False)
        stages.quantise.run(stream, *keys, sums, k8, meta, mean)
        q_map = encode(self.q_at, plan.q_map)
        slot, tile = encode(k8, plan.slot_map), encode(k8, plan.tile_map)
        if plan.exact and plan.relative and exact_sinks(plan.d, plan.mask):
            tile = encode(self.k_at, plan.k_map)
        stages.gate.run(
            stream,
            q_map,
            slot,
            tile,
            *self.shape,
            *plan.gate_order,
            thresholds_at,
            meta,
            mean,
            tiles_at,
            *undecided,
            plan.listed,
            base,
            columns,
            *plan.gate_end,
        )
        if stages.resolve is not None:
            stages.resolve.run(
                stream,
                q_map,
                encode(self.k_at, plan.k_map),
                *self.shape,
                *plan.resolve_order,
                self.q_at,
                *plan.q_steps,
                self.k_at,
                *plan.k_steps,
                *undecided,
                plan.listed,
                thresholds_at,
                tiles_at,
                base + 8,
                columns,
                *plan.attend_end,
            )
        return tiles, counts, room

    def count(self, tiles: Tensor, counts: Tensor, *, overlap: bool) -> None:
        """Count what the tile mask of `decide` drops; overlap: beside the end of `attend`."""
        plan, pointers = self.plan, (tiles.data_ptr(), counts.data_ptr())
        tally = plan.gating.tally
        tally.run(self.stream, *self.shape, *pointers, plan.heads, plan.batch, overlap=overlap)

    def keep_all(self) -> tuple[Tensor, Tensor, int]:
        """(tile mask, counts, address of a zeroed counter, which lies behind the counts)."""
        plan, stream = self.plan, self.stream
        tiles = _empty(*plan.tiles, torch.int32)
        room = _empty((2 * plan.heads + 1,), (1,), torch.int64)
        tiles_at, counts_at = tiles.data_ptr(), room.data_ptr()
        counter = counts_at + 16 * plan.heads
        zero(tiles_at, plan.tile_bytes, stream)
        zero(counts_at, counter + 8 - counts_at, stream)
        pointers = tiles_at, counts_at
        plan.fill.run(stream, *self.shape, *pointers, plan.heads, plan.batch, overlap=False)
        return tiles, room.as_strided(*plan.counts), counter

    def attend(
        self, v: Tensor, tiles: Tensor | None, counter: int, *, overlap: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(out, lse); `counter`: address of a zeroed int."""
        plan = self.plan
        out, lse = _empty(*plan.out, plan.dtype), _empty(*plan.lse, torch.float32)
        sinks = None if self.sinks is None else self.sinks.contiguous()
        sinks_at = 0 if sinks is None else sinks.data_ptr()
        stage = plan.attend_all if tiles is None else plan.attend_listed
        stage.run(
            self.stream,
            encode(self.q_at, plan.q_map),
            encode(self.k_at, plan.k_map),
            encode(v.data_ptr(), plan.v_map),
            *self.shape,
            *plan.attend_order,
            0 if tiles is None else tiles.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            sinks_at,
            counter,
            *plan.attend_end,
            overlap=overlap,
        )
        return out, lse


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate)."""
    plan = plan_of(q, k, v, call, gate)
    run = _Run(q, k, call, plan)
    if gate is None:
        tiles, counts, counter = run.keep_all()
        out, lse = run.attend(v, None, counter)
    else:
        tiles, counts, room = run.decide(gate)
        out, lse = run.attend(v, tiles, room.data_ptr() + 4)
        run.count(tiles, counts, overlap=True)
    return Result(out, lse, tiles, counts)


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    run = _Run(q, k, call, plan_of(q, k, None, call, gate))
    tiles, counts, _ = run.decide(gate)
    run.count(tiles, counts, overlap=False)
    return tiles, counts


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    run = _Run(q, k, call, plan_of(q, k, v, call, None))
    counter = _empty((1,), (1,), torch.int32)
    zero(counter.data_ptr(), 4, run.stream)
    return run.attend(v, tiles.contiguous(), counter.data_ptr(), overlap=False)
