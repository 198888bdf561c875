"""The guard against attention that was understood wrongly: bsfa::verify_v1, run at calibration.

On the real inputs, a mask that was recognised must show what the model's own mask shows, and, on a
site's first input, the operator, dropping nothing, must give what the model's attention gave. A
site that fails stays dense, and the calibration says so. Nothing here waits for the device, and
nothing of size Lq x Lk is made: masks are compared some rows at a time, outputs head by head.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from bsfa_compile.calibrate import observer
from bsfa_compile.calibrate.operators import watching
from bsfa_compile.ops import library

# Largest relative error (Frobenius norm, per batch row and head) that rounding explains: written
# out in low precision, attention rounds its scores and weights; float32 on a GPU may be TF32.
_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 2e-2,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}
_HIDDEN = -10000.0  # an additive mask hides what it makes this small
_SCORES = 2**25  # of a mask that are compared at a time
_MASK = "its mask was understood wrongly, by the numbers"
_NUMBERS = "the operator would give other numbers (relative error {:.2g})"


def _verify(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[Tensor],
    key_padding_mask: Tensor | None,
    q_start_tensor: Tensor | None,
    q_start: int,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    sinks: Tensor | None,
    handle: Tensor,
) -> None:
    """Compare the model's attention `out` [B, H, Lq, Dv] with the operator's of q, k, v.

    masks: the model's, bool (True shows) or additive, broadcast to [B, H, Lq, Lk]. The others are
    arguments of the operator. A difference is noted under the site's handle.
    """
    if q.shape[2] < 2 or 0 in q.shape or 0 in k.shape:
        return
    doubts = observer.doubts(handle)
    limits = (key_padding_mask, q_start_tensor, q_start, is_causal, window)
    with torch.no_grad():
        if masks:
            differ = _masks_differ(masks, q, k, *limits)
            known = doubts.get(_MASK, differ)
            doubts[_MASK] = torch.maximum(known.to(differ.device), differ)
        if _NUMBERS not in doubts:
            rule = ("relative", "exact", 1, 128, 64, True)
            given = library.attention(q, k, v, None, *limits, softcap, scale, *rule, sinks)
            error = _error(out, given[0], given[1])
            doubts[_NUMBERS] = torch.where(error > _TOLERANCES.get(out.dtype, 0.0), error, 0.0)


class _Compared:
    """The last masks that were compared: layers in a row share theirs."""

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[object], found: Tensor) -> None:
        self._tensors = [(weakref.ref(tensor), tensor._version) for tensor in tensors]
        self._numbers, self.found = numbers, found

    def are(self, tensors: Sequence[Tensor], numbers: Sequence[object]) -> bool:
        """Whether these are the same tensors, not written to since, under the same numbers."""
        return (
            len(tensors) == len(self._tensors)
            and numbers == self._numbers
            and all(
                known() is tensor and version == tensor._version
                for tensor, (known, version) in zip(tensors, self._tensors, strict=True)
            )
        )


_last: list[_Compared] = []


def _masks_differ(
    masks: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    start_tensor: Tensor | None,
    start: int,
    is_causal: bool,
    window: int | None,
) -> Tensor:
    """1.0 if any score is shown by the model's masks and not by the operator, or the reverse."""
    tensors = [t for t in (*masks, padding, start_tensor) if t is not None]
    numbers = (q.shape[0], q.shape[2], k.shape[2], start, is_causal, window)
    inference = any(t.is_inference() for t in tensors)  # these count no writes
    if not inference:
        for known in _last:
            if known.are(tensors, numbers):
                return known.found
    keys = torch.arange(k.shape[2], device=q.device)
    differ = torch.zeros((), dtype=torch.bool, device=q.device)
    wide = max(q.shape[0], *(mask[..., :1, :1].numel() for mask in masks))
    step = max(1, _SCORES // (wide * k.shape[2]))
    for first in range(0, q.shape[2], step):
        rows = slice(first, min(first + step, q.shape[2]))
        places = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + start
        if start_tensor is not None:
            places = places + start_tensor.to(q.device)
        seen = keys <= places if is_causal else torch.ones_like(keys > places)
        if window is not None:
            seen &= keys > places - window
            seen &= keys < places + window
        if padding is not None:
            seen = seen & padding[:, None, None, :]
        shown = torch.ones((), dtype=torch.bool, device=q.device)
        for mask in masks:
            part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            shown = shown & (part if part.dtype == torch.bool else part > _HIDDEN)
        if shown.dim() == 3 and shown.shape[0] > 1:  # [B * H, Lq, Lk]
            shown = shown.unflatten(0, (q.shape[0], -1))
        differ |= (shown != seen).any()
    found = differ.float()
    if not inference:
        _last[:] = [_Compared(tensors, numbers, found), *_last[:1]]
    return found


def _error(out: Tensor, wanted: Tensor, lse: Tensor) -> Tensor:
    """Largest error of a head over the rows that see something; inf if there are none."""
    wide = torch.promote_types(wanted.dtype, torch.float32)
    worst = torch.zeros((), dtype=wide, device=out.device)
    any_seen = torch.zeros((), dtype=torch.bool, device=out.device)
    for head in range(out.shape[1]):
        exact = wanted[:, head].to(wide)
        seen = (lse[:, head] > -torch.inf)[..., None] & torch.isfinite(exact).all(-1, keepdim=True)
        difference = torch.where(seen, out[:, head].to(wide) - exact, 0.0).norm(dim=(1, 2))
        size = torch.where(seen, exact, 0.0).norm(dim=(1, 2))
        error = torch.where(difference == 0, difference, difference / size)
        worst = torch.maximum(worst, error.nan_to_num(nan=torch.inf).max())
        any_seen |= seen.any()
    return torch.where(any_seen, worst, torch.inf)


watching(
    "verify_v1",
    "Tensor out, Tensor q, Tensor k, Tensor v, Tensor[] masks, Tensor? key_padding_mask, "
    "Tensor? q_start_tensor, SymInt q_start, bool is_causal, SymInt? window, float? softcap, "
    "float? scale, Tensor? sinks",
    _verify,
)
