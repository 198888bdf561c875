"""Find attention in a graph: every site, what it computes, or the reason why it stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bsfa_compile.passes import eligible
from bsfa_compile.passes.emit import realisable
from bsfa_compile.passes.heads import unrepeated
from bsfa_compile.passes.masks import Meaning, recognise
from bsfa_compile.passes.nodes import op_name, tensor

SDPA = frozenset(
    (
        torch.nn.functional.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )
)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_HIDDEN = {
    "multi_head_attention_forward": "nn.MultiheadAttention hides its attention from torch.compile;"
    " torch.export shows it",
    "transformer_encoder_layer_fwd": "the fused nn.TransformerEncoderLayer hides its attention;"
    " torch.export shows it, or torch.backends.mha.set_fastpath_enabled(False)",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention call of a graph.

    node: the call. module: the innermost module's key in nn_module_stack ("" if there is none);
    path: its qualified name in the graph's own words. ordinal: its place among the attention
    calls of that module's call. q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]: nodes,
    before any repetition of heads. meaning: what the mask shows. reason: why it stays dense.
    """

    node: fx.Node
    module: str
    path: str
    ordinal: int
    q: fx.Node | None = None
    k: fx.Node | None = None
    v: fx.Node | None = None
    meaning: Meaning | None = None
    scale: float | None = None
    softcap: float | None = None
    reason: str | None = None


def graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph module and those that its higher-order operators call."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            inner: object = gm
            for name in str(node.target).split("."):
                inner = getattr(inner, name, None)
            if isinstance(inner, fx.GraphModule):
                yield from graphs(inner)


def owner(node: fx.Node) -> tuple[str, str]:
    """Key and path of the innermost module whose forward holds a node; "" without one."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    key, entry = list(stack.items())[-1]
    path = entry[0] if isinstance(entry, tuple) else entry
    return str(key), _plain(str(path))


def _plain(path: str) -> str:
    """Dynamo writes "L['self'].model.layers.0", export "L__self__.layer" or the plain name."""
    for root in ("L['self']", "L__self__"):
        if path == root or path.startswith(root + "."):
            return path[len(root) + 1 :]
    return path


def find(gm: fx.GraphModule) -> list[Site]:
    """Every attention site of a graph and of its sub-graphs, in the order of execution."""
    found, calls = [], Counter[str]()
    for part in graphs(gm):
        for node in part.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in SDPA:
                key, path = owner(node)
                found.append(_site(node, key, path, calls[key]))
                calls[key] += 1
            elif (why := _other_attention(node)) is not None:
                key, path = owner(node)
                found.append(Site(node=node, module=key, path=path, ordinal=0, reason=why))
    return found


def _other_attention(node: fx.Node) -> str | None:
    name = op_name(node)
    if name in _HIDDEN:
        return _HIDDEN[name]
    if getattr(node.target, "namespace", "") == "bsfa":
        return None
    return f"{name} is another attention operator" if "attention" in name else None


def arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of an SDPA call by the names of its schema."""
    return {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _site(node: fx.Node, key: str, path: str, ordinal: int) -> Site:
    given = arguments(node)
    bare = Site(node=node, module=key, path=path, ordinal=ordinal)
    q, k, v = given["query"], given["key"], given["value"]
    fake_q, fake_k = tensor(q), tensor(k)
    why = eligible.reason(given)
    if why is not None or fake_q is None or fake_k is None:
        return replace(bare, reason=why)
    meaning: Meaning | str = Meaning(is_causal=given["is_causal"])
    mask = given["attn_mask"]
    if mask is not None:
        meaning = recognise(mask, node, fake_q.shape[2], fake_k.shape[2])
        if isinstance(meaning, Meaning) and not realisable(meaning, node):
            meaning = "the position of the first query cannot be computed from the graph"
    if isinstance(meaning, str):
        return replace(bare, reason=meaning)
    bare_k, bare_v = unrepeated(k, node), unrepeated(v, node)
    heads = [None if fake is None else fake.shape[1] for fake in map(tensor, (bare_k, bare_v))]
    if heads[0] == heads[1]:
        k, v = bare_k, bare_v
    scale = None if given["scale"] is None else float(given["scale"])
    return replace(bare, q=q, k=k, v=v, meaning=meaning, scale=scale)
