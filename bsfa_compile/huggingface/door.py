"""The attention function of attn_implementation="bsfa", registered by being imported.

Thresholds and counters are the buffers that `apply` puts on an attention module. Without them,
and while a graph is traced, this is transformers' "sdpa": the graph passes see it and rewrite it.
Calibration is told of every call (`observing.py`), so that it need not trace.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from bsfa_compile.huggingface import observing
from bsfa_compile.huggingface.masks import LazyMask, Structure, make_mask
from bsfa_compile.ops import library
from bsfa_compile.ops.call import lse_dtype
from bsfa_compile.ops.tiles import reached
from bsfa_compile.passes.attach import names
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.state import site_name, state_of

NAME = "bsfa"
_THRESHOLDS, _COUNTERS, _SECOND = names("thresholds", 0), names("counters", 0), names("counters", 1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of "bsfa" for transformers' AttentionInterface.

    query [B, H, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> [B, Lq, H, Dv] and None.
    Block-sparse where the module has thresholds and the mask is understood; else dense, and the
    reason goes to the model's report. Decoding is dense.
    """
    eager = not torch.compiler.is_compiling() and query.shape[2] > 1
    if eager and observing.watched():
        mask = _structure_of(module, attention_mask, is_causal)
        reason = _why_dense(module, mask, dropout, scaling, options)
        observing.tell(module, query, key, mask, reason, softcap=softcap, scale=scaling)
    if eager and _THRESHOLDS in module._buffers:
        state = state_of(module)
        if state is not None:
            mask = _structure_of(module, attention_mask, is_causal)
            reason = _why_dense(module, mask, dropout, scaling, options)
            state.ran(site_name(state.names[id(module)], 0), reason)
            if reason is None and mask is not None:
                sizes = mask.q_start, query.shape[2], key.shape[2]
                state.met(*reached(*sizes, mask.is_causal, mask.window))
                out = _sparse(module, query, key, value, mask, state.rule, scaling, softcap, s_aux)
                return out.transpose(1, 2).contiguous(), None
    plain = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            plain,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return out, None
    causal = plain is None and _causal(module, is_causal)
    out = _written(
        query,
        key,
        value,
        plain,
        causal=causal,
        dropout=dropout,
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _structure_of(
    module: nn.Module, mask: Tensor | None, is_causal: bool | None
) -> Structure | None:
    if isinstance(mask, LazyMask):
        return mask.structure
    if mask is not None:
        return None
    return _unmasked(_causal(module, is_causal))


@functools.cache
def _unmasked(is_causal: bool) -> Structure:
    return Structure(is_causal=is_causal, window=None, q_start=0, key_padding=None)


def _why_dense(
    module: nn.Module,
    mask: Structure | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> str | None:
    if mask is None:
        return "the attention mask means more than causality, window and padding"
    if dropout:
        return "attention dropout is active"
    if scaling is not None and not 0 < scaling < math.inf:
        return f"the scale is {scaling}: only positive ones are supported"
    if options.get("position_bias") is not None:
        return "the attention has a bias that depends on positions"
    if options.get("cache") is not None:
        return "a paged cache"
    if _SECOND in module._buffers:
        return "its module attends more than once: compile=True tells the calls apart"
    return None


def _sparse(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Structure,
    rule: Rule,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    buffers: Any = module._buffers  # `get_buffer` is ten times slower
    thresholds, counters = buffers[_THRESHOLDS], buffers[_COUNTERS]
    out, _, _, counts = library.attention(
        q,
        k,
        v,
        thresholds.to(q.device).view(torch.float32),
        mask.key_padding,
        None,
        mask.q_start,
        mask.is_causal,
        mask.window,
        softcap,
        scaling,
        *rule.arguments,
        None if sinks is None else sinks.to(lse_dtype(q.dtype)),
    )
    counters.add_(counts.to(counters.device))
    found: Tensor = out
    return found


def _written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention as transformers writes it out: SDPA has neither softcap nor sinks."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    scale = 1 / math.sqrt(q.shape[3]) if scaling is None else scaling
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal and q.shape[2] > 1:
        row = torch.arange(q.shape[2], device=q.device)[:, None]
        mask = (torch.arange(k.shape[2], device=q.device)[None, :] <= row)[None, None]
    if mask is not None:
        if mask.dtype == torch.bool:
            # The softmax is in float32: the least float64 would be -inf there.
            hidden = max(torch.finfo(t).min for t in (scores.dtype, torch.float32))
            mask = torch.where(mask, torch.zeros((), dtype=scores.dtype, device=q.device), hidden)
        scores = scores + mask
    if sinks is not None:
        extra = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        scores = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, v)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, make_mask)
