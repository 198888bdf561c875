"""The public function `block_sparse_attention`, and the one place where its inputs are checked."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bsfa_compile.errors import InputError
from bsfa_compile.ops.library import attention
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATES = ("relative", "absolute")
PRECISIONS = ("auto", "exact", "int8")


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Any,
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
    Differentiable in q, k and v, with the same tiles left out of the gradients.

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
        gate: "relative" (row maximum in the tile less the row's running maximum) or "absolute".
        precision: of the decision only: "exact", "int8", or "auto" (int8 where the card's kernels
            have it, exact elsewhere).
        sink_tiles: so many first visible tiles are always kept.
        return_lse: also return the log-sum-exp of the kept scores [batch, heads, q_len].
        dense_if_faster: allow computing *more* than the rule keeps, up to dense attention, where
            that is faster: short inputs, decode, thresholds that are all -inf, few tiles skipped.

    Returns:
        [batch, heads, q_len, value_dim] over [batch, q_len, heads, value_dim] storage, and the
        log-sum-exp if asked. A row that sees no key gives 0 and -inf.

    Raises:
        InputError: an argument has a wrong shape, dtype, device or value.
    """
    _check_tensors(q, k, v)
    _check_thresholds(thresholds, q)
    _check_padding(key_padding_mask, k)
    start = _check_start(q_start)
    _check_numbers(q, window=window, softcap=softcap, scale=scale, sink_tiles=sink_tiles)
    _check_int("block_q", block_q, 1)
    _check_int("block_k", block_k, 1)
    _check_name("gate", gate, GATES)
    _check_name("precision", precision, PRECISIONS)
    out, lse, _, _ = attention(
        q,
        k,
        v,
        None if thresholds is None else thresholds.to(torch.float32),
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
    )
    return (out, lse) if return_lse else out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    wanted = "[batch, heads, length, head_dim]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is {type(x).__name__}; wanted a tensor {wanted}.")
        if x.dim() != 4:
            raise InputError(
                f"{name} has shape {_shape(x)}; wanted 4 dimensions {wanted}. "
                f"Add the missing ones with unsqueeze."
            )
        if x.dtype not in DTYPES:
            raise InputError(
                f"{name} has dtype {x.dtype}; wanted one of {', '.join(map(str, DTYPES))}. "
                f"Convert q, k and v to one of them."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise InputError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; wanted one "
                f"dtype and one device. Convert with {name}.to(q)."
            )
    shapes = f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"{shapes} do not belong together; wanted one batch size, and k and v alike in batch, "
            f"heads and length."
        )
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise InputError(f"{shapes}: q and k must have the same head_dim, at least 1.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"{shapes}: {q.shape[1]} query heads over {k.shape[1]} key heads; wanted a multiple. "
            f"Is the layout [batch, heads, length, head_dim]?"
        )


def _check_thresholds(thresholds: Tensor | None, q: Tensor) -> None:
    if thresholds is None:
        return
    heads = q.shape[1]
    if not isinstance(thresholds, Tensor) or not thresholds.dtype.is_floating_point:
        kind = thresholds.dtype if isinstance(thresholds, Tensor) else type(thresholds).__name__
        raise InputError(
            f"thresholds are {kind}; wanted a float32 tensor [heads] or [heads, n]. "
            f"For one number t use torch.full(({heads},), t)."
        )
    shape = thresholds.shape
    if len(shape) not in (1, 2) or shape[0] != heads or (len(shape) == 2 and shape[1] == 0):
        raise InputError(
            f"thresholds have shape {_shape(thresholds)}; wanted [heads] = [{heads}] or "
            f"[heads, n] = [{heads}, n >= 1]."
        )
    if thresholds.device != q.device:
        raise InputError(
            f"thresholds are on {thresholds.device}, q is on {q.device}; wanted one device. "
            f"Move them with thresholds.to(q.device)."
        )


def _check_padding(mask: Tensor | None, k: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"key_padding_mask is {kind}; wanted a bool tensor, True for real keys. "
            f"Convert a 0/1 attention mask with .bool()."
        )
    if mask.shape != (k.shape[0], k.shape[2]):
        raise InputError(
            f"key_padding_mask has shape {_shape(mask)}; wanted [batch, k_len] = "
            f"[{k.shape[0]}, {k.shape[2]}]. Causality and windows have their own arguments."
        )
    if mask.device != k.device:
        raise InputError(
            f"key_padding_mask is on {mask.device}, k on {k.device}; wanted one device."
        )


def _check_start(q_start: int | Tensor) -> int:
    """The integer to pass for q_start: 0 if it is a tensor."""
    if isinstance(q_start, Tensor):
        if q_start.dim() != 0 or q_start.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"q_start is a tensor of shape {_shape(q_start)} and dtype {q_start.dtype}; wanted "
                f"an int or a 0-d int64 tensor. Queries of one call share one start."
            )
        return 0
    _check_int("q_start", q_start, 0)
    return q_start


def _check_numbers(
    q: Tensor, *, window: int | None, softcap: float | None, scale: float | None, sink_tiles: int
) -> None:
    if window is not None:
        _check_int("window", window, 1)
    _check_int("sink_tiles", sink_tiles, 0)
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(
                f"{name} is {value!r}; wanted a positive finite number, or None for "
                f"{'no cap' if name == 'softcap' else f'head_dim ** -0.5 = {q.shape[3] ** -0.5}'}."
            )


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise InputError(f"{name} is {value!r} ({type(value).__name__}); wanted an int.")
    if value < least:
        raise InputError(f"{name} is {value}; wanted at least {least}.")


def _check_name(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise InputError(f"{name} is {value!r}; wanted one of {', '.join(map(repr, names))}.")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
