"""Whether one attention call can become block-sparse: the reason why not, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from bsfa_compile.passes.nodes import is_one, same, tensor

DECODE = "decode: a single query row, dense attention is faster"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reason(arguments: Mapping[str, object]) -> str | None:
    """Why the call with these arguments (the schema of SDPA) must stay dense, mask apart."""
    nodes = [arguments[name] for name in ("query", "key", "value", "attn_mask")]
    if not all(isinstance(n, fx.Node) for n in nodes[:3]):
        return "query, key or value is a constant"
    if not isinstance(nodes[3], fx.Node | None):
        return "the attention mask is a constant"
    q, k, v = map(tensor, nodes[:3])
    if q is None or k is None or v is None:
        return "the graph does not know the shapes of query, key and value"
    return _tensors(q, k, v) or _shapes(q, k, v, arguments) or _options(arguments)


def _tensors(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    for fake in (q, k, v):
        if fake.is_nested or fake.layout != torch.strided:
            return f"tensors of layout {fake.layout} are not supported"
        if fake.dtype not in _DTYPES:
            return f"dtype {fake.dtype} is not supported"
        if fake.dim() != 4:
            return f"tensors of {fake.dim()} dimensions; [batch, heads, length, head_dim] is needed"
    if len({q.device, k.device, v.device}) > 1:
        return "query, key and value are on different devices"
    return None


def _shapes(q: Tensor, k: Tensor, v: Tensor, arguments: Mapping[str, object]) -> str | None:
    if is_one(q.shape[2]):
        return DECODE
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        return "batch sizes of query, key and value differ"
    heads, kv_heads = q.shape[1], k.shape[1]
    if not same(kv_heads, v.shape[1]):
        return "key and value have different numbers of heads"
    if not same(heads, kv_heads):
        if not isinstance(heads, int) or not isinstance(kv_heads, int):
            return "the numbers of heads are not constant"
        grouped = arguments["enable_gqa"] is True or kv_heads == 1
        if kv_heads == 0 or heads % kv_heads or not grouped:
            return f"{heads} query heads do not share {kv_heads} key heads evenly"
    return None


def _options(arguments: Mapping[str, object]) -> str | None:
    if arguments["dropout_p"] not in (0, 0.0) or isinstance(arguments["dropout_p"], fx.Node):
        return "attention dropout is active"
    scale = arguments["scale"]
    if scale is not None and not isinstance(scale, int | float):
        return "the scale is not a constant"
    if scale is not None and not 0 < scale < math.inf:
        return f"the scale is {scale}: only positive ones are supported"
    if not isinstance(arguments["is_causal"], bool):
        return "is_causal is not a constant"
    if arguments["is_causal"] and arguments["attn_mask"] is not None:
        return "is_causal and attn_mask are both given"
    return None
