"""The CUDA kernels as one thing: the first family that can do a call runs it.

Hopper has kernels of its own; the portable ones run wherever those cannot, and on every other card
of compute capability 8.0 or newer. A family that cannot do a call raises `KernelUnavailable`, which
says why; so does each function here if none can.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bsfa_compile.ops import sm80, sm90
from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.compiler import KernelUnavailable


@functools.cache
def _families(device: int) -> tuple[ModuleType, ...]:
    """The families that a card has, the fastest first."""
    if torch.version.hip is not None:
        return ()
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0):
        return sm90, sm80
    return (sm80,) if capability >= (8, 0) else ()


def _on(device: int) -> contextlib.AbstractContextManager[object]:
    """Make a device current, if it is not."""
    if torch.cuda.current_device() == device:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _run(name: str, q: Tensor, *rest: Any) -> Any:
    """What the function `name` of the first family that can do the call returns."""
    if not q.is_cuda:
        raise KernelUnavailable(f"q is on {q.device}; the kernels run on CUDA")
    device, reasons = q.get_device(), []
    with _on(device):
        for family in _families(device):
            try:
                return getattr(family, name)(q, *rest)
            except KernelUnavailable as error:
                reasons.append(str(error))
    lacking = "the kernels need an NVIDIA card of compute capability 8.0 or newer"
    raise KernelUnavailable("; ".join(dict.fromkeys(reasons)) or lacking)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    """Attention over the tiles that the gate keeps (all without a gate)."""
    result: Result = _run("attention", q, k, v, call, gate)
    return result


def tile_mask(q: Tensor, k: Tensor, call: Call, gate: Gate) -> tuple[Tensor, Tensor]:
    """The decision alone: (packed tile mask, counts)."""
    found: tuple[Tensor, Tensor] = _run("tile_mask", q, k, call, gate)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of a packed tile mask: (out, lse)."""
    found: tuple[Tensor, Tensor] = _run("attend", q, k, v, tiles, call)
    return found
