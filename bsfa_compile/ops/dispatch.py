"""Which implementation runs a call, and when dense attention is the faster one.

On the CPU the choice is made per kv head from a sample: the gate judges one q block, about two
thirds down the sequence, and heads that skip too few of its tiles run dense. On CUDA the values of
thresholds cannot be read without waiting for the device, so shapes alone decide. The limits are
each device's own: see `crossover`.
"""

from __future__ import annotations

import dataclasses
from itertools import groupby

import torch
from torch import Tensor

from bsfa_compile.ops import chunked, chunked_backward, cpu, crossover, dense, launch
from bsfa_compile.ops.call import Call, Gate, Result, empty_out, lse_dtype
from bsfa_compile.ops.compiler import KernelUnavailable
from bsfa_compile.ops.visible import FEW_ROWS

_MANY_KEYS = 16384


def attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None, *, dense_if_faster: bool
) -> Result:
    """Attention over the tiles that the gate keeps; over all of them without a gate, or, if
    `dense_if_faster` allows it, where keeping all is faster."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    may_be_dense = dense_if_faster and dense.reason(q, k, v, call) is None
    if gate is None or (may_be_dense and _dense_by_shape(q, k, gate)):
        return _dense(q, k, v, call)
    if not q.is_cuda:
        run = _cpu_by_sample if may_be_dense else _sparse
        return run(q, k, v, call, gate)
    try:
        return launch.attention(q, k, v, call, gate)
    except KernelUnavailable:
        if may_be_dense:  # chunks of torch operations are slower
            return dense.attention(q, k, v, call)
        return chunked.attention(q, k, v, call, gate=gate)


def _rows(x: Tensor) -> Tensor:
    """x with each row in one piece: no kernel reads it otherwise, and torch's do not all refuse."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """Every tile kept. On CUDA by our own kernels: they beat torch's on long calls, and on short
    ones the tile mask and the counts would take dozens of small operations besides. A few rows
    over many keys are torch's, which splits the keys."""
    if q.is_cuda and not (_few_rows(call) and dense.reason(q, k, v, call) is None):
        try:
            return launch.attention(q, k, v, call, None)
        except KernelUnavailable:
            return _dense_by_torch(q, k, v, call)
    return _dense_by_torch(q, k, v, call)


def _few_rows(call: Call) -> bool:
    """Whether torch spreads the keys of each row over the card, as our kernels do not."""
    g = call.geometry
    plain = call.key_padding_mask is None and g.window is None and call.sinks is None
    return g.k_len > _MANY_KEYS and plain and g.q_blocks <= FEW_ROWS


def _dense_by_torch(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    if dense.reason(q, k, v, call) is None:
        return dense.attention(q, k, v, call)
    return _sparse(q, k, v, call, None)


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    q, k = _rows(q), _rows(k)
    try:
        return launch.tile_mask(q, k, call, gate)
    except KernelUnavailable:
        result = _sparse(q, k, None, call, gate)
        return result.tile_mask, result.counts


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    if q.device.type == "cpu":
        return cpu.attend(q, k, v, call, tiles)
    try:
        return launch.attend(q, k, v, tiles, call)
    except KernelUnavailable:
        result = chunked.attention(q, k, v, call, tile_mask=tiles)
        return result.out, result.lse


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) over the tiles of a packed tile mask."""
    return chunked_backward.attention_backward(grad_out, grad_lse, q, k, v, out, lse, tiles, call)


def _sparse(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> Result:
    """By the rule, without kernels. On the CPU `auto` precision is exact; int8 is emulated."""
    if q.device.type == "cpu" and (gate is None or gate.precision != "int8"):
        return cpu.attention(q, k, v, call, gate)
    return chunked.attention(q, k, v, call, gate=gate)


def _dense_by_shape(q: Tensor, k: Tensor, gate: Gate) -> bool:
    """Whether dense is faster whatever the scores are; reads thresholds on the CPU only."""
    least = crossover.of(q.device).tokens
    if q.shape[2] < least or k.shape[2] < least:
        return True
    return q.is_cpu and bool((gate.thresholds == -torch.inf).all())


def _cpu_by_sample(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate) -> Result:
    """Each kv head's queries sparse or dense, as the sample says."""
    groups = q.shape[1] // k.shape[1]
    skipped = _sampled_skip(q, k, call, gate).view(-1, groups).mean(dim=1)
    enough = (skipped >= crossover.of(q.device).skipped).tolist()
    runs = [
        (sparse, [kv for kv, _ in run])
        for sparse, run in groupby(enumerate(enough), lambda x: x[1])
    ]
    if len(runs) == 1:
        return _sparse(q, k, v, call, gate) if runs[0][0] else dense.attention(q, k, v, call)
    out, lse = empty_out(q, v), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    parts = []
    for sparse, members in runs:
        hkv = slice(members[0], members[-1] + 1)
        hq = slice(hkv.start * groups, hkv.stop * groups)
        sinks = None if call.sinks is None else call.sinks[hq]
        part = (q[:, hq], k[:, hkv], v[:, hkv], dataclasses.replace(call, sinks=sinks))
        if sparse:
            own = gate._replace(thresholds=gate.thresholds[hq])
            parts.append(_sparse(*part, own))
        else:
            parts.append(dense.attention(*part))
        out[:, hq], lse[:, hq] = parts[-1].out, parts[-1].lse
    return Result(
        out=out,
        lse=lse,
        tile_mask=torch.cat([part.tile_mask for part in parts], dim=1),
        counts=torch.cat([part.counts for part in parts]),
    )


def _sampled_skip(q: Tensor, k: Tensor, call: Call, gate: Gate) -> Tensor:
    """Fraction of visible tiles that each head [H] skips in one q block of the first batch row."""
    g = call.geometry
    row0, row1 = g.rows(2 * g.q_blocks // 3)
    sample = dataclasses.replace(g, q_start=g.q_start + row0, q_len=row1 - row0)
    padding = None if call.key_padding_mask is None else call.key_padding_mask[:1]
    one = dataclasses.replace(call, geometry=sample, key_padding_mask=padding, sinks=None)
    result = cpu.attention(q[:1, :, row0:row1], k[:1], None, one, gate)
    tile0, tile1 = sample.tiles(0)
    return result.counts[:, 0] / max(1, tile1 - tile0)
