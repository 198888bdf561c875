"""What the Hopper kernels cannot do, told from types, shapes and strides."""

from __future__ import annotations

import torch

from bsfa_compile.ops.sm90_plan import MOST_KEYS, Key
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


def refusal(key: Key) -> str | None:
    """Why these kernels cannot do such a call, wherever its tensors lie."""
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
    return None
