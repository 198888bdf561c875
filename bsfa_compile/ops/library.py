"""The torch operators `bsfa::*_v1`: schema, fake, registration per device, autograd.

Compiler caches do not key on a custom operator's schema or fake, hence a version in each name.
Shapes: q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]. Outputs:
  out        [B, H, Lq, Dv] over [B, Lq, H, Dv] storage, dtype of q
  lse        [B, H, Lq] natural log, skipped tiles excluded, the sink included, -inf for a row
             that sees nothing; float32 (float64 if q is)
  tile_mask  int32 [B, H, mask_rows(Lq), mask_words(Lk)], see `tiles.pack`
  counts     int64 [H, 2]: (dropped, candidates); a candidate tile is visible and not always kept
sinks [H], in lse's dtype: one more logit in the denominator of each row of a head.
Arguments are validated by `attention.block_sparse_attention`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from bsfa_compile.ops import autograd, dispatch
from bsfa_compile.ops.call import Gate, Result, empty_out, lse_dtype, make_call
from bsfa_compile.ops.tiles import mask_rows, mask_words, reached

_MASK = (
    "Tensor? key_padding_mask, Tensor? q_start_tensor, SymInt q_start, bool is_causal, "
    "SymInt? window, float? softcap, float? scale"
)
_SCHEMAS = {
    "attention_v1": f"(Tensor q, Tensor k, Tensor v, Tensor? thresholds, {_MASK}, str gate, "
    "str precision, int sink_tiles, int block_q, int block_k, bool dense_if_faster, "
    "Tensor? sinks=None) -> (Tensor out, Tensor lse, Tensor tile_mask, Tensor counts)",
    "gate_v1": f"(Tensor q, Tensor k, Tensor thresholds, {_MASK}, str gate, str precision, "
    "int sink_tiles, int block_q, int block_k) -> (Tensor tile_mask, Tensor counts)",
    "attend_v1": f"(Tensor q, Tensor k, Tensor v, Tensor tile_mask, {_MASK}, int block_q, "
    "int block_k, Tensor? sinks=None) -> (Tensor out, Tensor lse)",
    "attend_backward_v1": "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, Tensor tile_mask, {_MASK}, int block_q, int block_k) "
    "-> (Tensor, Tensor, Tensor)",
    "site_v1": "(Tensor thresholds, Tensor counters) -> ()",
    "met_v1": "(Tensor thresholds, SymInt q_start, SymInt q_len, SymInt k_len, bool is_causal, "
    "SymInt? window) -> Tensor",
}
_LIBRARY = torch.library.Library("bsfa", "DEF")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(
        _name + _schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    )


# In the schemas' order: `mask` is the 7 arguments key_padding_mask ... scale. Trailing defaults may
# be missing.


def _sinks(last: Sequence[Any]) -> Tensor | None:
    return last[0] if last else None


def _attention(q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor | None, *config: Any) -> Result:
    gate, precision, sink_tiles, block_q, block_k, dense_if_faster = config[7:13]
    sinks = _sinks(config[13:])
    call = make_call(
        q,
        k,
        config[:7],
        sink_tiles=sink_tiles,
        block_q=block_q,
        block_k=block_k,
        sinks=sinks,
    )
    rule = None if thresholds is None else Gate(thresholds, gate, precision)
    return dispatch.attention(q, k, v, call, rule, dense_if_faster=dense_if_faster)


def _gate(q: Tensor, k: Tensor, thresholds: Tensor, *config: Any) -> tuple[Tensor, Tensor]:
    *mask, gate, precision, sink_tiles, block_q, block_k = config
    call = make_call(q, k, mask, sink_tiles=sink_tiles, block_q=block_q, block_k=block_k)
    rule = Gate(thresholds=thresholds, rule=gate, precision=precision)
    return dispatch.tile_mask(q, k, call, rule)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, tile_mask: Tensor, *config: Any
) -> tuple[Tensor, Tensor]:
    *mask, block_q, block_k = config[:9]
    sinks = _sinks(config[9:])
    call = make_call(q, k, mask, sink_tiles=0, block_q=block_q, block_k=block_k, sinks=sinks)
    return dispatch.attend(q, k, v, tile_mask, call)


def _attend_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, tile_mask, *mask, block_q, block_k = config
    call = make_call(q, k, mask, sink_tiles=0, block_q=block_q, block_k=block_k)
    return dispatch.attend_backward(grad_out, grad_lse, q, k, v, out, lse, tile_mask, call)


when_unread: list[Callable[[Tensor], None]] = []  # told the counters of markers that are run


def _site(thresholds: Tensor, counters: Tensor) -> None:
    """A marker that our compiler passes read and erase: the buffers of the module being traced.

    It runs only in what another compiler made, where attention is dense.
    """
    for tell in when_unread:
        tell(counters)


def _fake_site(*args: object) -> None:
    """Shapes: nothing comes back."""


when_met: list[Callable[[Tensor, int, int], None]] = []  # told thresholds and `tiles.reached`


def _met(thresholds: Tensor, *span: Any) -> Tensor:
    """The thresholds; tells how long the inputs are that a traced graph runs them on."""
    for tell in when_met:
        tell(thresholds, *reached(*span))
    return thresholds.clone()


def _outputs(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    rows, words = mask_rows(q.shape[2], block_q), mask_words(k.shape[2], block_k)
    tile_mask = q.new_empty((q.shape[0], q.shape[1], rows, words), dtype=torch.int32)
    return tile_mask, q.new_empty((q.shape[1], 2), dtype=torch.int64)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor | None, *config: Any
) -> tuple[Tensor, ...]:
    block_q, block_k = config[10:12]
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return empty_out(q, v), lse, *_outputs(q, k, block_q, block_k)


def _fake_gate(q: Tensor, k: Tensor, thresholds: Tensor, *config: Any) -> tuple[Tensor, ...]:
    return _outputs(q, k, *config[-2:])


def _fake_attend(q: Tensor, k: Tensor, v: Tensor, *config: Any) -> tuple[Tensor, ...]:
    return empty_out(q, v), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *config: Any
) -> tuple[Tensor, ...]:
    return empty_out(q, q), empty_out(k, k), empty_out(v, v)


def _lower(x: Tensor) -> Tensor:
    """As autocast does for attention: to the dtype in force, float64 excepted."""
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if eligible else x


def _autocast_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    with torch.autocast(q.device.type, enabled=False):
        return attention(_lower(q), _lower(k), _lower(v), *rest)


_REAL: dict[str, Callable[..., Any]] = {
    "attention_v1": _attention,
    "gate_v1": _gate,
    "attend_v1": _attend,
    "attend_backward_v1": _attend_backward,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "attention_v1": _fake_attention,
    "gate_v1": _fake_gate,
    "attend_v1": _fake_attend,
    "attend_backward_v1": _fake_backward,
}
for _name, _function in _REAL.items():
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"bsfa::{_name}", _FAKE[_name], lib=_LIBRARY)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention_v1", _autocast_attention, f"Autocast{_device}")
_LIBRARY.impl("site_v1", _site, "CompositeExplicitAutograd")
torch.library.register_fake("bsfa::site_v1", _fake_site, lib=_LIBRARY)
_LIBRARY.impl("met_v1", _met, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bsfa::met_v1", lambda thresholds, *span: torch.empty_like(thresholds), lib=_LIBRARY
)
_LIBRARY.impl("attention_v1", autograd.of_attention(_attention), "Autograd", with_keyset=True)
torch.library.register_autograd(
    "bsfa::attend_v1", autograd.of_attend, setup_context=autograd.attend_context, lib=_LIBRARY
)
torch.library.register_autograd("bsfa::attend_backward_v1", autograd.twice, lib=_LIBRARY)

attention = torch.ops.bsfa.attention_v1.default
gate = torch.ops.bsfa.gate_v1.default
attend = torch.ops.bsfa.attend_v1.default
attend_backward = torch.ops.bsfa.attend_backward_v1.default
site = torch.ops.bsfa.site_v1.default
met = torch.ops.bsfa.met_v1.default
has_side_effect(site)  # else compilers would delete it
