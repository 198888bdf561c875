"""Which implementation runs a call."""

from __future__ import annotations

from torch import Tensor

from bsfa_compile.ops import chunked, chunked_backward, cpu
from bsfa_compile.ops.call import Call, Gate, Result


def attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None, *, dense_if_faster: bool
) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate)."""
    if q.device.type == "cpu" and (gate is None or gate.precision != "int8"):
        return cpu.attention(q, k, v, call, gate)
    return chunked.attention(q, k, v, call, gate=gate)


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    if q.device.type == "cpu" and gate.precision != "int8":
        result = cpu.attention(q, k, None, call, gate)
    else:
        result = chunked.attention(q, k, None, call, gate=gate)
    return result.tile_mask, result.counts


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    if q.device.type == "cpu":
        return cpu.attend(q, k, v, call, tiles)
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
