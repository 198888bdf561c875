"""The masks of attn_implementation="bsfa": what they show is kept, not the N^2 of them.

transformers makes masks from functions of index tensors, mask_function(batch, head, query, key).
Such a function is called once with the symbols of this file in their place; what comes out says
whether it is causal, a window, or something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

MaskFunction = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Scores whose key - query lies between two limits, both included; None: no limit."""

    least: int | None = None
    most: int | None = None
    device: str = "cpu"

    def __and__(self, other: object) -> Shown:
        """What both show."""
        if not isinstance(other, Shown):
            return NotImplemented
        least = [x for x in (self.least, other.least) if x is not None]
        most = [x for x in (self.most, other.most) if x is not None]
        return Shown(least=max(least, default=None), most=min(most, default=None))

    def to(self, *_: object) -> Shown:
        """Masks are moved to a device before they are joined."""
        return self


@dataclass(frozen=True, kw_only=True)
class _Gap:
    """sign * (key - query), or its absolute value."""

    sign: int
    absolute: bool = False

    def __abs__(self) -> _Gap:
        return _Gap(sign=1, absolute=True)

    def __le__(self, limit: int) -> Shown:
        if self.absolute:
            return Shown(least=-limit, most=limit)
        return Shown(most=limit) if self.sign > 0 else Shown(least=-limit)

    def __lt__(self, limit: int) -> Shown:
        return self <= limit - 1


@dataclass(frozen=True, kw_only=True)
class _Index:
    """A query's or a key's position plus a number."""

    is_key: bool
    offset: int = 0

    def __add__(self, number: int) -> _Index:
        return _Index(is_key=self.is_key, offset=self.offset + number)

    def __sub__(self, other: int | _Index) -> Any:
        if isinstance(other, int):
            return self + -other
        if self.is_key == other.is_key or self.offset or other.offset:
            return NotImplemented
        return _Gap(sign=1 if self.is_key else -1)

    def __le__(self, other: object) -> Shown:
        if not isinstance(other, _Index) or self.is_key == other.is_key:
            return NotImplemented
        room = other.offset - self.offset
        return Shown(most=room) if self.is_key else Shown(least=-room)

    def __lt__(self, other: object) -> Shown:
        return self <= other - 1 if isinstance(other, _Index) else NotImplemented

    def __ge__(self, other: object) -> Shown:
        if other == 0 and self.offset >= 0:  # every position is
            return Shown()
        return other <= self if isinstance(other, _Index) else NotImplemented

    def __gt__(self, other: object) -> Shown:
        return other < self if isinstance(other, _Index) else NotImplemented

    def new_ones(self, *_: object, **__: object) -> Shown:
        """What a conjunction of masks starts from."""
        return Shown()


def understood(mask_function: MaskFunction) -> Shown | None:
    """What a mask function shows; None if it is more than limits of key - query."""
    try:
        found = mask_function(object(), object(), _Index(is_key=False), _Index(is_key=True))
    except Exception:  # a function that needs more than positions may fail in any way
        return None
    return found if isinstance(found, Shown) else None


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A mask as the operator takes it: see `block_sparse_attention`; key_padding bool [B, Lk]."""

    is_causal: bool
    window: int | None
    q_start: int
    key_padding: Tensor | None


class LazyMask(Tensor):
    """A mask bool [B, 1, Lq, Lk] that is made only if something else than the operator looks.

    Any operation on it makes it; one that writes into it, or into a view of it, ends its structure.
    """

    _structure: Structure | None
    _made: Tensor | None
    _arguments: Mapping[str, Any]

    @staticmethod
    def __new__(
        cls, structure: Structure, shape: Sequence[int], device: Any, arguments: Mapping[str, Any]
    ) -> LazyMask:
        """arguments: of sdpa_mask, which makes the mask, wherever it is needed then."""
        with torch.inference_mode(False):  # which would count no writes
            mask: LazyMask = Tensor._make_wrapper_subclass(
                cls, shape, dtype=torch.bool, device=device
            )
        mask._structure, mask._arguments, mask._made = structure, arguments, None
        return mask

    @property
    def structure(self) -> Structure | None:
        """What it shows; None if it was written to."""
        return None if self._version else self._structure

    def dense(self) -> Tensor:
        """The mask as a plain tensor."""
        if self._made is None:
            arguments = {**self._arguments, "allow_is_causal_skip": False}
            with torch.inference_mode(False):
                made = sdpa_mask(**{**arguments, "allow_is_bidirectional_skip": False})
                assert made is not None, "nothing is skipped"
                made = made.to(self.device)
                self._made = made.clone() if made.is_inference() else made
        return self._made

    def _moved(self, device: torch.device) -> LazyMask:
        """The mask on another device, as layers on several devices need it; still not made."""
        assert self.structure is not None, "it was not written to"
        padding = self.structure.key_padding
        padding = None if padding is None else padding.to(device)
        structure = replace(self.structure, key_padding=padding)
        return LazyMask(structure, self.shape, device, self._arguments)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no classmethod
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(value: object) -> object:
            if not isinstance(value, LazyMask):
                return value
            if func._schema.is_mutable:  # in inference mode not every such call is counted
                value._structure = None
            return value.dense()

        given = kwargs or {}
        device, dtype = given.get("device"), given.get("dtype", torch.bool)
        moves = func is torch.ops.aten._to_copy.default and device and dtype == torch.bool
        if moves and args[0].structure is not None:
            return args[0]._moved(device)
        return func(*tree_map(plain, args), **tree_map(plain, given))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask function of "bsfa" for transformers' AttentionMaskInterface.

    Arguments are those of transformers.masking_utils.sdpa_mask; so is what is returned while a
    graph is traced, in decoding, and where the mask is more than causal, window and padding.
    """
    arguments = {
        **options,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
    }
    traced = torch.compiler.is_compiling()
    structure = None if traced or q_length == 1 else _structure(arguments)
    if structure is None:
        plain: Tensor | None = sdpa_mask(**arguments)
        return plain
    if structure.key_padding is None and structure.window is None:
        top_left = structure.is_causal and structure.q_start == 0 and kv_length >= q_length
        if top_left and options.get("allow_is_causal_skip", True):
            return None
        if not structure.is_causal and options.get("allow_is_bidirectional_skip", False):
            return None
    shape = (batch_size, 1, q_length, kv_length)
    return LazyMask(structure, shape, options.get("device", "cpu"), arguments)


def _structure(given: Mapping[str, Any]) -> Structure | None:
    shown = understood(given["mask_function"])
    first, keys, batch = given["kv_offset"], given["kv_length"], given["batch_size"]
    q_start = int(given["q_offset"]) - first
    if shown is None or q_start < 0:
        return None
    padding = given["attention_mask"]
    if padding is not None:
        padding = prepare_padding_mask(padding, keys, first)[:, first : first + keys].bool()
        padding = None if bool(padding.all()) else padding.expand(batch, keys)
    window = None
    if shown.least is not None:
        window = 1 - shown.least
        if shown.most not in (0, -shown.least) or window < 1:
            return None
        if shown.most == 0 and window >= keys:
            window = None
    elif shown.most not in (0, None):
        return None
    return Structure(is_causal=shown.most == 0, window=window, q_start=q_start, key_padding=padding)
