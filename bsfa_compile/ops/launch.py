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


def supported(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> str | None:
    """Why no kernel can do this call; None if one can. v None: the decision alone.

    Builds the kernel if it has to: a kernel that cannot be built is a reason too.
    """
    if q.device.type != "cuda":
        return f"q is on {q.device}; the kernels run on CUDA"
    if torch.version.hip is not None:
        return "the kernels are CUDA; this torch is built for ROCm"
    with _on(q):
        family, reasons = _choose(q, k, v, call, gate)
    return reasons if family is None else None


def _family(q: Tensor, k: Tensor, v: Tensor | None, call: Call, gate: Gate | None) -> ModuleType:
    families = _families(q.device.index)
    if len(families) == 1:  # `supported` said yes
        return families[0]
    family, reasons = _choose(q, k, v, call, gate)
    if family is None:
        raise RuntimeError(f"no kernel for this call: {reasons}")
    return family


def attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None, *, dense_if_faster: bool = False
) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate). `supported` said yes.

    dense_if_faster: a permission that no kernel here needs.
    """
    with _on(q):
        result: Result = _family(q, k, v, call, gate).attention(q, k, v, call, gate)
    return result


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    with _on(q):
        found: tuple[Tensor, Tensor] = _family(q, k, None, call, gate).tile_mask(q, k, call, gate)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    with _on(q):
        found: tuple[Tensor, Tensor] = _family(q, k, v, call, None).attend(q, k, v, tiles, call)
    return found
