"""Host side of the Hopper kernels (`cuda/sm90`): reasons, workspace, descriptors, launches.

A call is a row of kernels, each handing the next an object in memory: K summed, K as int8, the
tile mask, its counts, the output. What depends on shapes alone is a `Plan`, made once. Nothing
here reads the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.compiler import KernelUnavailable
from bsfa_compile.ops.kernels_sm90 import exact_sinks
from bsfa_compile.ops.sm80 import padding
from bsfa_compile.ops.sm90_plan import MARKS, MOST_KEYS, MOST_POSITIONS, Key, Plan, plan_for
from bsfa_compile.ops.tensor_map import encode
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q

_DTYPES = (torch.bfloat16, torch.float16)


def _unreadable(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> str | None:
    """Why the copy engine cannot read a tensor, wherever it starts."""
    width = shape[3]
    if width > 256 or width % 8:
        return f"{name} has head dim {width}; the Hopper kernels need a multiple of 8 up to 256"
    if strides[3] != 1:
        return f"{name}'s last dimension has stride {strides[3]}; the kernels need 1"
    steps = [s for s, n in zip(strides[:3], shape[:3], strict=True) if n > 1]
    if 0 in steps:
        return f"{name} is broadcast (strides {strides}); the copy engine cannot read that"
    if any(s % 8 or s < 0 for s in steps):
        return f"{name}'s rows (strides {strides}) do not start at multiples of 16 bytes"
    return None


@functools.lru_cache(maxsize=1024)
def _refusal(key: Key) -> str | None:
    """Why these kernels cannot do such a call, asked once: whatever its tensors' addresses are."""
    dtypes = {key.q_dtype, key.k_dtype, key.v_dtype or key.q_dtype}
    if key.q_dtype not in _DTYPES or len(dtypes) > 1:
        return (
            f"the kernels take bfloat16 or float16, all alike; q is {key.q_dtype}, k {key.k_dtype}"
        )
    if (key.block_q, key.block_k) != (BLOCK_Q, BLOCK_K):
        return f"the kernels have {BLOCK_Q} x {BLOCK_K} tiles, not {key.block_q} x {key.block_k}"
    if not key.scale > 0:
        return f"the kernels need a positive scale, not {key.scale}"
    if 0 in key.q_shape or 0 in key.k_shape:
        return "an empty q or k"
    if key.k_shape[2] > MOST_KEYS:
        return f"{key.k_shape[2]} keys; the Hopper kernels take {MOST_KEYS}"
    for name, shape, strides in (
        ("q", key.q_shape, key.q_strides),
        ("k", key.k_shape, key.k_strides),
        ("v", key.v_shape, key.v_strides),
    ):
        if (bad := _unreadable(name, shape, strides)) is not None:
            return bad
    try:
        plan = plan_for(key)
        _ = plan.fill if key.rule is None else plan.gating
        if key.v_dtype is not None:
            _ = plan.attend_all if key.rule is None else plan.attend_listed
    except KernelUnavailable as error:
        return str(error)
    return None


def reason(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> str | None:
    """Why these kernels cannot do this call; None if they can. v None: the gate alone."""
    refusal = _refusal(_key(q, k, v, call, gate))
    if refusal is not None:
        return refusal
    if call.geometry.q_start + call.geometry.q_len > MOST_POSITIONS:
        return f"positions beyond {MOST_POSITIONS}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
    return None


def _key(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Key:
    g, values = call.geometry, k if v is None else v
    return Key(
        q.device.index,
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


def plan_of(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Plan:
    """The plan of a call: kernels, grids and sizes, which its tensors' contents do not change."""
    return plan_for(_key(q, k, v, call, gate))


class _Run:
    """One call's stream and the parameters that its kernels share."""

    def __init__(self, q: Tensor, k: Tensor, call: Call, plan: Plan) -> None:
        self.q, self.plan, self.sinks = q, plan, call.sinks
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
        """(tile mask, counts, workspace, whose second int is a zeroed counter)."""
        plan, stream, empty = self.plan, self.stream, self.q.new_empty_strided
        tiles = empty(*plan.tiles, dtype=torch.int32)
        counts = empty(*plan.counts, dtype=torch.int64)
        room = empty((plan.room,), (1,), dtype=torch.uint8)
        tiles_at, counts_at, base = tiles.data_ptr(), counts.data_ptr(), room.data_ptr()
        k8, meta, mean, sums, listed = [base + offset for offset in plan.offsets]
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
        stages.tally.run(stream, *self.shape, tiles_at, counts_at, plan.heads, plan.batch)
        return tiles, counts, room

    def attend(
        self, v: Tensor, tiles: Tensor | None, counter: int, *, overlap: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(out, lse); `counter`: address of a zeroed int."""
        plan, empty = self.plan, self.q.new_empty_strided
        out, lse = empty(*plan.out), empty(*plan.lse, dtype=torch.float32)
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
    if gate is not None:
        tiles, counts, room = run.decide(gate)
        out, lse = run.attend(v, tiles, room.data_ptr() + 4)
        return Result(out=out, lse=lse, tile_mask=tiles, counts=counts)
    tiles = torch.zeros(plan.tiles[0], dtype=torch.int32, device=q.device)
    zeros = torch.zeros(2 * plan.heads + 1, dtype=torch.int64, device=q.device)
    counts = zeros[:-1].view(plan.heads, 2)
    pointers = (tiles.data_ptr(), counts.data_ptr())
    plan.fill.run(run.stream, *run.shape, *pointers, plan.heads, plan.batch, overlap=False)
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
