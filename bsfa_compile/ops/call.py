"""What one attention call computes: the validated configuration that every path is given."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsfa_compile.ops.tiles import Geometry


@dataclass(frozen=True, kw_only=True)
class Call:
    """Mask and score function of one call on q [B, H, Lq, D], k [B, Hkv, Lk, D].

    `q_start_tensor` is set only where the query's start is known on the device alone; then
    `geometry.q_start` is 0 and means nothing. `scale` multiplies q.k, natural-log units. sinks
    [H], natural-log logits, join each row's denominator, not the decision.
    """

    geometry: Geometry
    q_start_tensor: Tensor | None
    key_padding_mask: Tensor | None
    scale: float
    softcap: float | None
    sinks: Tensor | None = None


class Gate(NamedTuple):
    """How tiles are judged: thresholds [H] or [H, n] float32, rule and precision.

    A named tuple, as `Result` is: every call makes one, and frozen classes are slow to make.
    """

    thresholds: Tensor
    rule: str
    precision: str


class Result(NamedTuple):
    """out [B, H, Lq, Dv], lse [B, H, Lq], packed tile mask, counts [H, 2] (see library)."""

    out: Tensor
    lse: Tensor
    tile_mask: Tensor
    counts: Tensor


def make_call(
    q: Tensor,
    k: Tensor,
    mask: Sequence[Any],
    *,
    sink_tiles: int,
    block_q: int,
    block_k: int,
    sinks: Tensor | None = None,
) -> Call:
    """The call that an operator's arguments describe.

    mask: (key_padding_mask, q_start_tensor, q_start, is_causal, window, softcap, scale) as in the
    operators' schemas. A `q_start_tensor` is read here only if it lives on the CPU.
    """
    key_padding_mask, q_start_tensor, q_start, is_causal, window, softcap, scale = mask
    if q_start_tensor is not None:
        on_host = q_start_tensor.device.type == "cpu"
        q_start = int(q_start_tensor) if on_host else 0
        q_start_tensor = None if on_host else q_start_tensor
    q_len, width = q.shape[2:]
    scale = width**-0.5 if scale is None else scale
    blocks = sink_tiles, block_q, block_k
    plain = _plain(q_len, k.shape[2], q_start, is_causal, window, *blocks, scale, softcap)
    if key_padding_mask is None and q_start_tensor is None and sinks is None:
        return plain
    return Call(
        geometry=plain.geometry,
        q_start_tensor=q_start_tensor,
        key_padding_mask=key_padding_mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )


@functools.lru_cache(maxsize=1024)
def _plain(
    q_len: int,
    k_len: int,
    q_start: int,
    is_causal: bool,
    window: int | None,
    sink_tiles: int,
    block_q: int,
    block_k: int,
    scale: float,
    softcap: float | None,
) -> Call:
    """A call without tensors of its own. Kept, as layers repeat it."""
    geometry = Geometry(
        q_len=q_len,
        k_len=k_len,
        q_start=q_start,
        is_causal=is_causal,
        window=window,
        sink_tiles=sink_tiles,
        block_q=block_q,
        block_k=block_k,
    )
    return Call(
        geometry=geometry,
        q_start_tensor=None,
        key_padding_mask=None,
        scale=scale,
        softcap=softcap,
    )


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> None:
    """Let sinks [H] join the softmax behind out [B, H, Lq, Dv] and lse [B, H, Lq], in place."""
    if sinks is None:
        return
    column = sinks.to(lse.dtype)[:, None]
    share = torch.exp(lse - torch.logaddexp(lse, column)).masked_fill(lse == -torch.inf, 0.0)
    out.mul_(share[..., None])
    lse.copy_(torch.logaddexp(lse, column))


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """An output [B, H, Lq, Dv] over [B, Lq, H, Dv] storage, which models read back for free."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
