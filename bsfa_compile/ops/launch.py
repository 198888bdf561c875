"""The CUDA kernels as one thing: which family runs a call, or why none can.

Hopper has kernels of its own; the portable ones run wherever those cannot, and on every other card
of compute capability 8.0 or newer.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType

import torch
from torch import Tensor

from bsfa_compile.ops import sm80, sm90
from bsfa_compile.ops.call import Call, Gate, Result


@functools.cache
def _families(device: int) -> tuple[ModuleType, ...]:
    """The families that a card has, the fastest first."""
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0):
        return sm90, sm80
    return (sm80,) if capability >= (8, 0) else ()


def _choose(
    q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None
) -> tuple[ModuleType | None, str]:
    """The first family that can do the call, or the reasons of all."""
    reasons = []
    for family in _families(q.device.index):
        reason = family.reason(q, k, v, call, gate)
        if reason is None:
            return family, ""
        if reason not in reasons:
            reasons.append(reason)
    return None, "; ".join(reasons) or "the kernels need a card of compute capability 8.0 or newer"


def _on(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make q's device current, if it is not."""
    if torch.cuda.current_device() == q.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(q.device)


def find(
    q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None
) -> tuple[ModuleType | None, str]:
    """The family of kernels that does this call, or None and why none can.

    v None: the decision alone. Builds the kernel if it has to: a kernel that cannot be built is a
    reason too.
    """
    if q.device.type != "cuda":
        return None, f"q is on {q.device}; the kernels run on CUDA"
    if torch.version.hip is not None:
        return None, "the kernels are CUDA; this torch is built for ROCm"
    with _on(q):
        return _choose(q, k, v, call, gate)


def attention(
    family: ModuleType, q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None
) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate), by a family found."""
    with _on(q):
        result: Result = family.attention(q, k, v, call, gate)
    return result


def tile_mask(
    family: ModuleType, q: Tensor, k: Tensor, call: Call, gate: Gate
) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    with _on(q):
        found: tuple[Tensor, Tensor] = family.tile_mask(q, k, call, gate)
    return found


def attend(
    family: ModuleType, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    with _on(q):
        found: tuple[Tensor, Tensor] = family.attend(q, k, v, tiles, call)
    return found
