"""Checks of what a caller gives; nothing further down checks again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bsfa_compile.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATES = ("relative", "absolute")
PRECISIONS = ("auto", "exact", "int8")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes, devices and head counts of q, k and v."""
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
    batch, heads, _, width = q.shape
    kv_batch, kv_heads, k_len, kv_width = k.shape
    if batch != kv_batch or v.shape[:3] != (kv_batch, kv_heads, k_len):
        raise InputError(
            f"{_shapes(q, k, v)} do not belong together; wanted one batch size, and k and v alike "
            f"in batch, heads and length."
        )
    if width != kv_width or width == 0:
        raise InputError(f"{_shapes(q, k, v)}: q and k must have the same head_dim, at least 1.")
    if kv_heads == 0 or heads % kv_heads:
        raise InputError(
            f"{_shapes(q, k, v)}: {heads} query heads over {kv_heads} key heads; wanted a "
            f"multiple. Is the layout [batch, heads, length, head_dim]?"
        )


def check_thresholds(thresholds: Tensor | None, q: Tensor) -> None:
    """Shape, dtype and device of thresholds; their values are not read."""
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


def check_padding(mask: Tensor | None, k: Tensor) -> None:
    """Shape, dtype and device of key_padding_mask."""
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


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Shape, dtype and device of sinks; their values are not read."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point:
        kind = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise InputError(f"sinks are {kind}; wanted a floating tensor [heads], one logit a head.")
    if sinks.shape != (q.shape[1],):
        raise InputError(
            f"sinks have shape {_shape(sinks)}; wanted [heads] = [{q.shape[1]}]. "
            f"How many first tiles are always kept is sink_tiles."
        )
    if sinks.device != q.device:
        raise InputError(f"sinks are on {sinks.device}, q is on {q.device}; wanted one device.")


def check_start(q_start: int | Tensor) -> int:
    """Type and range of q_start; returns the integer to pass, 0 if it is a tensor."""
    if isinstance(q_start, Tensor):
        if q_start.dim() != 0 or q_start.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"q_start is a tensor of shape {_shape(q_start)} and dtype {q_start.dtype}; wanted "
                f"an int or a 0-d int64 tensor. Queries of one call share one start."
            )
        return 0
    check_int("q_start", q_start, 0)
    return q_start


def check_numbers(
    q: Tensor, *, window: int | None, softcap: float | None, scale: float | None, sink_tiles: int
) -> None:
    """Ranges of the scalar arguments."""
    if window is not None:
        check_int("window", window, 1)
    check_int("sink_tiles", sink_tiles, 0)
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(
                f"{name} is {value!r}; wanted a positive finite number, or None for "
                f"{'no cap' if name == 'softcap' else f'head_dim ** -0.5 = {q.shape[3] ** -0.5}'}."
            )


def check_int(name: str, value: object, least: int) -> None:
    """An int (a symbolic one too, but no bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise InputError(f"{name} is {value!r} ({type(value).__name__}); wanted an int.")
    if value < least:
        raise InputError(f"{name} is {value}; wanted at least {least}.")


def check_name(name: str, value: str, names: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in names:
        raise InputError(f"{name} is {value!r}; wanted one of {', '.join(map(repr, names))}.")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
