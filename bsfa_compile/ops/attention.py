"""The public function `block_sparse_attention`, checked, differentiable, for any device."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from bsfa_compile.ops import validation
from bsfa_compile.ops.call import lse_dtype
from bsfa_compile.ops.library import attention
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None = None,
    *,
    is_causal: bool = False,
    q_start: int | Tensor = 0,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    gate: str = "relative",
    precision: str = "auto",
    sink_tiles: int = 1,
    return_lse: Literal[False] = False,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    dense_if_faster: bool = False,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None = None,
    *,
    is_causal: bool = False,
    q_start: int | Tensor = 0,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    gate: str = "relative",
    precision: str = "auto",
    sink_tiles: int = 1,
    return_lse: Literal[True],
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    dense_if_faster: bool = False,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None = None,
    *,
    is_causal: bool = False,
    q_start: int | Tensor = 0,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    gate: str = "relative",
    precision: str = "auto",
    sink_tiles: int = 1,
    return_lse: bool = False,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    dense_if_faster: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention that leaves out the tiles of scores that cannot matter.

    A tile is `block_q` absolute query positions x `block_k` keys. Every score is looked at; a tile
    whose statistic lies below its threshold takes no part in the softmax; the rest is exact.
    Differentiable in q, k, v and sinks, with the same tiles left out of the gradients.

    Args:
        q: [batch, heads, q_len, head_dim], any strides.
        k: [batch, kv_heads, k_len, head_dim]; heads is a multiple of kv_heads (GQA, not copied).
        v: [batch, kv_heads, k_len, value_dim].
        thresholds: [heads] or [heads, n] (column: absolute q block, the last one holds beyond n),
            scaled logits in natural-log units. -inf keeps all tiles, +inf only those always kept;
            a NaN keeps its tiles. None: dense attention.
        is_causal: a query at position p sees keys <= p. Query row r stands at q_start + r.
        q_start: position of the first query row: int, or 0-d integer tensor (read on its device).
        window: a query at p sees only keys > p - window (and < p + window if not causal).
        key_padding_mask: bool [batch, k_len], True for real keys.
        softcap: scores become softcap * tanh(score / softcap).
        scale: multiplies q.k; default head_dim ** -0.5.
        sinks: [heads], logits of one more column that has no value: exp(sink) joins the
            denominator of each row of the head, as in GPT-OSS. Natural-log units, neither scaled
            nor softcapped; it counts in the log-sum-exp; the gate does not look at it.
        gate: "relative" (row maximum in the tile less the row's running maximum) or "absolute".
        precision: of the decision only: "exact", "int8", or "auto" (int8 where the card's kernels
            have it, exact elsewhere).
        sink_tiles: so many first visible tiles are always kept.
        return_lse: also return the log-sum-exp of the kept scores (and the sink)
            [batch, heads, q_len].
        dense_if_faster: allow computing *more* than the rule keeps, up to dense attention, where
            that is faster: short inputs, decode, thresholds that are all -inf, few tiles skipped.

    Returns:
        [batch, heads, q_len, value_dim] over [batch, q_len, heads, value_dim] storage, and the
        log-sum-exp if asked. A row that sees no key gives 0 and -inf (its sink, if there is one).

    Raises:
        InputError: an argument has a wrong shape, dtype, device or value.
    """
    validation.check_tensors(q, k, v)
    validation.check_thresholds(thresholds, q)
    validation.check_padding(key_padding_mask, k)
    validation.check_sinks(sinks, q)
    start = validation.check_start(q_start)
    validation.check_numbers(q, window=window, softcap=softcap, scale=scale, sink_tiles=sink_tiles)
    validation.check_int("block_q", block_q, 1)
    validation.check_int("block_k", block_k, 1)
    validation.check_name("gate", gate, validation.GATES)
    validation.check_name("precision", precision, validation.PRECISIONS)
    out, lse, _, _ = attention(
        q,
        k,
        v,
        None if thresholds is None else thresholds.float(),
        key_padding_mask,
        q_start if isinstance(q_start, Tensor) else None,
        start,
        bool(is_causal),
        window,
        softcap,
        scale,
        gate,
        precision,
        sink_tiles,
        block_q,
        block_k,
        dense_if_faster,
        None if sinks is None else sinks.to(lse_dtype(q.dtype)),
    )
    return (out, lse) if return_lse else out
