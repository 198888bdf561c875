"""The guard against attention that was understood wrongly: bsfa::verify_v1, run at calibration.

On the real inputs, a mask that was recognised must show what the model's own mask shows, and the
operator, dropping nothing, must give what the model's attention gave. A site that fails stays
dense, and the calibration says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bsfa_compile.calibrate import observer
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
_ROWS = 256


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
    if q.shape[2] < 2 or 0 in q.shape or 0 in k.shape or observer.mismatch(handle):
        return
    limits = (key_padding_mask, q_start_tensor, q_start, is_causal, window)
    with torch.no_grad():
        start = q_start if q_start_tensor is None else int(q_start_tensor)
        if _masks_differ(masks, q, k, key_padding_mask, start, is_causal, window):
            observer.set_mismatch(handle, "its mask was understood wrongly, by the numbers")
            return
        rule = ("relative", "exact", 1, 128, 64, True)
        given = library.attention(q, k, v, None, *limits, softcap, scale, *rule, sinks)
        error = _error(out, given[0], given[1])
    if error > _TOLERANCES.get(out.dtype, 0.0):
        why = f"the operator would give other numbers (relative error {error:.2g})"
        observer.set_mismatch(handle, why)


def _masks_differ(
    masks: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    start: int,
    is_causal: bool,
    window: int | None,
) -> bool:
    """Whether any score is shown by the model's masks and not by the operator, or the reverse."""
    keys = torch.arange(k.shape[2], device=q.device)
    for first in range(0, q.shape[2] if masks else 0, _ROWS):
        rows = slice(first, min(first + _ROWS, q.shape[2]))
        places = start + torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        seen = torch.ones_like(keys > places)
        if is_causal:
            seen &= keys <= places
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
        if bool((shown != seen).any()):
            return True
    return False


def _error(out: Tensor, wanted: Tensor, lse: Tensor) -> float:
    """Largest error of a head over the rows that see something; inf if there are none."""
    seen = (lse > -torch.inf)[..., None] & torch.isfinite(wanted).all(dim=-1, keepdim=True)
    if not bool(seen.any()):
        return torch.inf
    wide = torch.promote_types(wanted.dtype, torch.float32)
    difference = torch.where(seen, out.to(wide) - wanted.to(wide), 0.0).norm(dim=(2, 3))
    size = torch.where(seen, wanted.to(wide), 0.0).norm(dim=(2, 3))
    found = torch.where(difference == 0, difference, difference / size)
    return float(found.nan_to_num(nan=torch.inf).max())


def _verify_fake(*args: object) -> None:
    """Shapes: nothing comes back."""


_library = torch.library.Library("bsfa", "FRAGMENT")
_library.define(
    "verify_v1(Tensor out, Tensor q, Tensor k, Tensor v, Tensor[] masks, "
    "Tensor? key_padding_mask, Tensor? q_start_tensor, SymInt q_start, bool is_causal, "
    "SymInt? window, float? softcap, float? scale, Tensor? sinks, Tensor(a!) handle) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_library.impl("verify_v1", _verify, "CompositeExplicitAutograd")
torch.library.register_fake("bsfa::verify_v1", _verify_fake, lib=_library)
