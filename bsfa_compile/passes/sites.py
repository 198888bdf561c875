"""Find attention in a graph, also written out: what it computes, or why it stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bsfa_compile.ops.held import Claim
from bsfa_compile.passes import eligible
from bsfa_compile.passes.arrange import Written
from bsfa_compile.passes.claims import mark
from bsfa_compile.passes.emit import realisable
from bsfa_compile.passes.fused import HIDDEN, open_fused
from bsfa_compile.passes.heads import unrepeated
from bsfa_compile.passes.masks import Mask, Meaning, recognise
from bsfa_compile.passes.nodes import op_name, rebind, tensor, transformed
from bsfa_compile.passes.operands import by_position
from bsfa_compile.passes.written import ANCHORS, attends, match

SDPA = frozenset(
    (
        torch.nn.functional.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )
)
TRANSFORMED = "it is inside a transform of torch.func (vmap, grad, jvp)"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention call of a graph.

    node: the call. module: the innermost module's key in nn_module_stack ("" if there is none);
    path: its qualified name in the graph's own words, of which a module may have several. ordinal:
    its place among the attention calls of that module's call. q [B, H, Lq, D], k [B, Hkv, Lk, D],
    v [B, Hkv, Lk, Dv]: nodes, before any repetition of heads. meaning: what the masks show.
    sinks [H]: one more logit per head in each row's denominator. reason: why it stays dense.
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
    sinks: fx.Node | None = None
    masks: tuple[Mask, ...] = ()
    reason: str | None = None

    @property
    def heads(self) -> object:
        """The number of query heads, None if it is not known."""
        fake = tensor(self.q)
        return None if fake is None else fake.shape[1]


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph module and those that its higher-order operators call, each once."""
    found = [gm]
    for part in found:
        for node in part.graph.nodes:
            if node.op == "get_attr":
                inner: object = part
                for name in str(node.target).split("."):
                    inner = getattr(inner, name, None)
                if isinstance(inner, fx.GraphModule) and all(inner is not f for f in found):
                    found.append(inner)
    return found


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


def find(gm: fx.GraphModule, claims: Mapping[fx.Node, Claim] | None = None) -> list[Site]:
    """Every attention site of a graph and of its sub-graphs, in the order of execution.

    claims: what may be assumed of the graph's inputs, if the caller sees to it (`Meaning.premises`
    says where it was). The graph stays the same function: fused attention is opened, views may be
    added to it.
    """
    found, calls = [], Counter[tuple[str, str]]()
    mark(claims or {})
    for part in graphs(gm):
        by_position(part.graph)
        rebind(part.graph)
        inside = transformed(part.graph)
        open_fused(part.graph, inside)
        for node in list(part.graph.nodes):
            if node.op not in ("call_function", "call_method"):
                continue
            written = match(node) if op_name(node) in ANCHORS and node not in inside else None
            other = None if node.target in SDPA else _other_attention(node)
            if node in inside and (node.target in SDPA or other is not None or attends(node)):
                other = TRANSFORMED
            if node.target not in SDPA and written is None and other is None:
                continue
            key, path = owner(node)
            bare = Site(node=node, module=key, path=path, ordinal=calls[key, path], reason=other)
            calls[key, path] += 1
            if written is not None:
                found.append(_written_site(replace(bare, node=written.out), written))
            else:
                found.append(_site(bare) if other is None else bare)
    return found


def _other_attention(node: fx.Node) -> str | None:
    name = op_name(node)
    if name in HIDDEN:
        return HIDDEN[name](node)
    if getattr(node.target, "namespace", "") == "bsfa":
        return None
    return f"{name} is another attention operator" if "attention" in name else None


def arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of an SDPA call by the names of its schema."""
    return {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _site(bare: Site) -> Site:
    """The site of an SDPA call."""
    given = arguments(bare.node)
    causal = given["is_causal"] is True
    masks: list[Mask] = [] if given["attn_mask"] is None else [given["attn_mask"]]
    return _understood(bare, given, masks, causal=causal)


def _written_site(bare: Site, written: Written) -> Site:
    """The site of attention that is written out."""
    if written.reason is not None:
        return replace(bare, reason=written.reason)
    given = {"query": written.q, "key": written.k, "value": written.v, "scale": written.scale}
    found = _understood(bare, {**_DEFAULTS, **given}, written.masks, causal=False)
    return replace(found, softcap=written.softcap, sinks=written.sinks)


def _understood(bare: Site, given: Mapping[str, Any], masks: list[Mask], *, causal: bool) -> Site:
    """The site with its inputs and the meaning of its masks, or with a reason."""
    node, q, k, v = bare.node, given["query"], given["key"], given["value"]
    fake_q, fake_k = tensor(q), tensor(k)
    why = eligible.reason(given)
    if why is not None or fake_q is None or fake_k is None:
        return replace(bare, reason=why)
    meaning: Meaning | str = Meaning(is_causal=causal)
    if masks:
        meaning = recognise(masks, node, fake_q.shape[2], fake_k.shape[2])
        if isinstance(meaning, Meaning) and not realisable(meaning, node):
            meaning = "the position of the first query cannot be computed from the graph"
    if isinstance(meaning, str):
        return replace(bare, reason=meaning)
    bare_k, bare_v = unrepeated(k, node), unrepeated(v, node)
    heads = [None if fake is None else fake.shape[1] for fake in map(tensor, (bare_k, bare_v))]
    if heads[0] == heads[1]:
        k, v = bare_k, bare_v
    scale = None if given["scale"] is None else float(given["scale"])
    return replace(bare, q=q, k=k, v=v, meaning=meaning, masks=tuple(masks), scale=scale)
