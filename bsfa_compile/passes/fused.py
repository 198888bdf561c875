"""nn.MultiheadAttention, one node in Dynamo's graphs: opened into projections and SDPA."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from bsfa_compile.passes.nodes import tensor, value

MULTI_HEAD = F.multi_head_attention_forward
_SIGNATURE = inspect.signature(MULTI_HEAD)
FAST_PATH = (
    "the fused nn.TransformerEncoderLayer hides its attention; torch.export shows it, or "
    "torch.backends.mha.set_fastpath_enabled(False)"
)


def _why_closed(node: fx.Node) -> str | None:
    """Why a call of multi_head_attention_forward is not opened; None if it is."""
    given = _arguments(node)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in _used(node)):
        return "nn.MultiheadAttention returns its weights: pass need_weights=False"
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if given[name] is not None:
            return f"nn.MultiheadAttention with {name}"
    if given["add_zero_attn"]:
        return "nn.MultiheadAttention with add_zero_attn"
    fake = tensor(given["query"])
    if fake is None or fake.dim() != 3:
        return "nn.MultiheadAttention of tensors without a batch axis"
    return None


HIDDEN: Mapping[str, Callable[[fx.Node], str | None]] = {
    "multi_head_attention_forward": _why_closed,
    "transformer_encoder_layer_fwd": lambda node: FAST_PATH,
}


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _used(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is not operator.getitem or user.users]


def open_fused(graph: fx.Graph, closed: Collection[fx.Node] = ()) -> None:
    """Replace calls of multi_head_attention_forward by what they compute, attention by SDPA.

    closed: nodes that stay as they are.
    """
    for node in list(graph.nodes):
        if node.target is not MULTI_HEAD or node in closed or _why_closed(node) is not None:
            continue
        last = node.prev
        with graph.inserting_before(node):
            tracer = GraphAppendingTracer(graph)
            given: dict[str, Any] = {
                name: fx.Proxy(held, tracer) if isinstance(held, fx.Node) else held
                for name, held in _arguments(node).items()
            }
            output = _attend(**given).node
        made = last.next
        while made is not node:
            _annotate(made, node)
            made = made.next
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(output)
            graph.erase_node(user)
        graph.erase_node(node)


def _annotate(made: fx.Node, origin: fx.Node) -> None:
    """Give a new node what tracing would have known of it."""
    args, kwargs = tree_map(value, (made.args, made.kwargs))
    if made.op == "call_method":
        own, *rest = args
        made.meta["example_value"] = getattr(own, str(made.target))(*rest, **kwargs)
    else:
        assert callable(made.target), "a proxy calls functions and methods"
        made.meta["example_value"] = made.target(*args, **kwargs)
    for key in ("nn_module_stack", "stack_trace"):
        if key in origin.meta:
            made.meta[key] = origin.meta[key]


def _attend(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool,
    key_padding_mask: Any,
    attn_mask: Any,
    use_separate_proj_weight: bool,
    q_proj_weight: Any,
    k_proj_weight: Any,
    v_proj_weight: Any,
    is_causal: bool,
    need_weights: bool,
    **_: Any,
) -> Any:
    """What multi_head_attention_forward computes of query, key, value [L, B, E], less weights."""
    inputs = (query, key, value)
    if not use_separate_proj_weight and len({x.node for x in inputs}) == 1:
        packed = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
        wide = [packed[i] for i in range(3)]
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        if not use_separate_proj_weight:
            weights = in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        wide = [F.linear(x, weights[i], biases[i]) for i, x in enumerate(inputs)]
    heads = [x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in wide]
    causal = is_causal and key_padding_mask is None and not need_weights  # else it is a hint
    mask = None if causal else _mask(attn_mask, key_padding_mask, num_heads)
    p = dropout_p if training else 0.0
    q, k, v = heads
    y = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    return F.linear(y.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)


def _mask(attn_mask: Any, padding: Any, heads: int) -> Any:
    """The mask of SDPA: bool masks hide where they are True, others are added."""
    parts = []
    for given, rank in ((attn_mask, 2), (padding, 2)):
        if given is None:
            continue
        fake = tensor(given.node)
        assert fake is not None, "Dynamo knows its tensors"
        shows = ~given if fake.dtype == torch.bool else given
        if given is padding:
            shows = shows.unsqueeze(1).unsqueeze(1)
        elif fake.dim() > rank:
            shows = shows.unflatten(0, (-1, heads))
        parts.append((shows, fake.dtype == torch.bool))
    if len(parts) < 2:
        return parts[0][0] if parts else None
    (a, a_bool), (b, b_bool) = parts
    if a_bool and b_bool:
        return a & b
    if a_bool or b_bool:  # F.multi_head_attention_forward warns of this
        floating, boolean = (b, a) if a_bool else (a, b)
        return torch.where(boolean, floating, float("-inf"))
    return a + b
