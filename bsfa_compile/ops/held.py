"""What a compiled graph assumes of a tensor's contents, and whether that still holds.

A mask that a model keeps as a buffer is read once, when the graph is built. Afterwards a look at
the tensor's identity, version and address tells that nothing was written to it; only a tensor that
is new or was written to is read again. (Writes that torch does not count, through `.data` or
numpy, are not seen.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bsfa_compile.errors import BsfaError

CHANGED = "a mask that the model keeps has changed, or its padding mask is not of 0 and 1"
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Band:
    """A table [..., rows, columns] is `on` where lower <= column - row <= upper, `off` elsewhere.

    lower, upper: None where there is no limit; both None: `on` everywhere, or a single number.
    """

    lower: int | None = None
    upper: int | None = None
    on: float
    off: float


@dataclass(frozen=True, kw_only=True)
class Padding:
    """A table [rows, keys] has a 1 in each row and nothing but 0 and 1."""


Claim = Band | Padding


def readable(tensor: object) -> bool:
    """Whether a value is a plain tensor whose contents can be read, and that nothing learns."""
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and tensor.dtype in (*_INTEGERS, *_FLOATS)
        and not tensor.is_meta
        and not tensor.requires_grad
    )


def band(tensor: Tensor) -> Band | None:
    """What limits on column - row say of a tensor, exactly; None if they do not say it all.

    tensor: [R, C] with any number of leading axes of size 1, or one floating number.
    """
    if tensor.dim() == 0 and tensor.is_floating_point():
        only = tensor.item()
        return None if math.isnan(only) else Band(on=only, off=only)
    if tensor.dim() < 2 or min(tensor.shape[-2:]) < 2 or tensor[..., 0, 0].numel() != 1:
        return None
    table = tensor.detach().reshape(tensor.shape[-2:])
    if not torch.equal(table[1:, 1:], table[:-1, :-1]):
        return None
    values = [*reversed(table[:, 0].tolist()), *table[0, 1:].tolist()]  # by column - row
    middle, on = len(table) - 1, table[0, 0].item()
    first, last = middle, middle
    while first > 0 and values[first - 1] == on:
        first -= 1
    while last < len(values) - 1 and values[last + 1] == on:
        last += 1
    others = {*values[:first], *values[last + 1 :]}
    if len(others) != 1 or any(math.isnan(number) for number in (*others, on)):
        return None
    return Band(
        lower=first - middle if first > 0 else None,
        upper=last - middle if last < len(values) - 1 else None,
        on=on,
        off=others.pop(),
    )


def is_padding(tensor: Tensor) -> bool:
    """Whether `Padding` is true of a tensor."""
    if tensor.dim() != 2 or tensor.dtype not in _INTEGERS or tensor.numel() == 0:
        return False
    ones = tensor == 1
    return bool(((tensor == 0) | ones).all() & ones.any(-1).all())


_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (stamp, claim, verdict)


def holds(tensor: Tensor, claim: Claim) -> bool:
    """Whether a claim is true of a tensor; read only if it is new or was written to."""
    if tensor.is_inference():  # these count no writes
        return _true(tensor, claim)
    now = (tensor._version, tensor.data_ptr(), claim)
    stamp, verdict = _seen.get(tensor, (None, False))
    if stamp != now:
        verdict = _true(tensor, claim)
        _seen[tensor] = (now, verdict)
    return bool(verdict)


def _true(tensor: Tensor, claim: Claim) -> bool:
    return is_padding(tensor) if isinstance(claim, Padding) else band(tensor) == claim


def _held(thresholds: Tensor, tensor: Tensor, claim: str) -> Tensor:
    """The thresholds, if a table is still the band that it was (see `encoded`)."""
    lower, upper, on, off = claim.split()
    limits = (None if limit == "None" else int(limit) for limit in (lower, upper))
    known = Band(lower=next(limits), upper=next(limits), on=float(on), off=float(off))
    if not holds(tensor, known):
        raise BsfaError(
            f"the attention mask that this program keeps in a buffer {tuple(tensor.shape)} has "
            "changed since it was optimized: optimize the original again with the new mask"
        )
    return thresholds.clone()


def encoded(claim: Band) -> str:
    """A claim as an argument of bsfa::held_v1."""
    return f"{claim.lower} {claim.upper} {float(claim.on)!r} {float(claim.off)!r}"


_LIBRARY = torch.library.Library("bsfa", "FRAGMENT")
_LIBRARY.define(
    "held_v1(Tensor thresholds, Tensor held, str claim) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.impl("held_v1", _held, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bsfa::held_v1", lambda thresholds, held, claim: torch.empty_like(thresholds), lib=_LIBRARY
)
held = torch.ops.bsfa.held_v1.default
